"""What Ray says of its nodes: which live, what they bring, and how to start something on one."""

from __future__ import annotations

from collections.abc import Iterable

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.signals import NodesSeen

__all__ = ["accelerators", "alive_nodes", "nodes_seen", "not_on", "of_the_head", "on_node"]

#: A resource that Ray gives to the node with its own control.
_HEAD = "node:__internal_head__"
#: The head has 1 of it.
_LITTLE = 0.001


def alive_nodes() -> list[str]:
    """The ids of the nodes that Ray believes to live."""
    return sorted(node["NodeID"] for node in ray.nodes() if node["Alive"])


def nodes_seen(accelerator: str) -> NodesSeen:
    """The nodes that live, with the bytes of memory that Ray has counted on each.

    Args:
        accelerator: what Ray calls those that are counted; "" for none.
    """
    found = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    counts = {node: int(has.get(accelerator, 0)) for node, has in found.items()}
    return NodesSeen(
        memory_bytes={node: int(has.get("memory", 0)) for node, has in found.items()},
        accelerators={node: count for node, count in counts.items() if count},
    )


def accelerators() -> tuple[str, int]:
    """What Ray calls the accelerators of this cluster, "" if it has none, and how many."""
    resources = ray.cluster_resources()
    for name in ("GPU", "TPU"):
        if count := int(resources.get(name, 0)):
            return name, count
    return "", 0


def on_node(node: str) -> NodeAffinitySchedulingStrategy:
    """The strategy that starts something on this node or not at all."""
    return NodeAffinitySchedulingStrategy(node_id=node, soft=False)


def not_on(nodes: Iterable[str]) -> dict[str, str] | None:
    """A selector of labels that keeps what is started off some nodes; None for no nodes.

    Ray gives every node a label with its id.
    """
    named = sorted(nodes)
    return {"ray.io/node-id": f"!in({', '.join(named)})"} if named else None


def of_the_head() -> dict[str, float] | None:
    """A little of what only the node beside Ray's own control has: who wants it is started there.

    Then the loss of a worker takes no controller. A strategy that names the node would not do: as a
    wish Ray passes it over for what needs no resource (11 of 24 actors came to the other of two
    nodes), and as a demand it is of that very node, and not of the head that comes after it.
    """
    known = any(node["Alive"] and _HEAD in node["Resources"] for node in ray.nodes())
    return {_HEAD: _LITTLE} if known else None
