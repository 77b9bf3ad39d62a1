"""On which node an actor is started: actors of a kind lie as far apart as they can.

Losing a node should cost few copies and few shards. Ray's own spreading takes turns over whatever
is created meanwhile, and so may put both shards of a table on one node. Decides about actors that
need nothing of which Ray keeps count; accelerators are Ray's to find. Does not know what actors
will hold, see `cluster.placement`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from shards.orders import ActorKind

__all__ = ["emptiest"]


def emptiest(
    nodes: Collection[str], kind: ActorKind, actors: Iterable[tuple[ActorKind, str]]
) -> str:
    """The node with the fewest actors of a kind; among equals, the fewest of any.

    Args:
        nodes: those that may be used, at least one.
        kind: of the actor that is to be started.
        actors: kind and node of every other.
    """
    assert nodes, "no node is alive, not even ours"
    sites = Counter(actors)
    total = Counter[str]()
    for (_, node), count in sites.items():
        total[node] += count
    return min(sorted(nodes), key=lambda node: (sites[kind, node], total[node]))
