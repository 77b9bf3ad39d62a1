"""Which node holds which rows of tables, for a cluster that need not exist.

Decides how tables are cut and where their parts go, by one of three strategies (those that Lui et
al., "Understanding capacity-driven scale-out neural recommendation inference", ISPASS 2021,
compare): ``capacity`` makes bytes even, ``load`` the memory traffic of look-ups, ``messages``
packs tables that are asked for together onto as few nodes as have room. A table stays whole where
that is even enough: one that is cut over S nodes answers with up to S sums for one bag.

Greedy (the largest part first, onto the node that is used least), then improved by moving and
exchanging parts; equal inputs give equal layouts. Nothing says that a layout is the best, so a
lower bound of what any could have stands beside each figure. What a layout costs is worked out by
`cluster.layout_costs`. Does not know bundles, actors or a running cluster.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, cast, get_args

from batching.errors import InvalidArgument
from cluster.layout_costs import (
    Host,
    Load,
    Pace,
    Part,
    Resource,
    Shape,
    TooBusy,
    Traffic,
    loads_of,
    read_bytes,
)
from cluster.packing import Book, Piece, Strategy, TooLarge, arranged, evenly

__all__ = ["STRATEGIES", "Figure", "Layout", "Strategy", "TooLarge", "lay_out"]

STRATEGIES: Final = cast(tuple[Strategy, ...], get_args(Strategy))

#: How much finer than an even share tables are cut, one try after the other.
_FINER: Final = (1, 2, 4, 8, 16)
#: A layout so little over its bound is not cut finer, and one so little better than a coarser one
#: is not taken: each cut costs messages.
_GOOD: Final = 1.05
#: Parts that a layout has at most: a search over more takes minutes.
_PARTS_MAX: Final = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """What a layout came to, and the least that any layout of these tables could."""

    value: float
    bound: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where everything goes and what it costs.

    Attributes:
        parts: how each table is cut.
        homes: for each part of a table the nodes that hold a copy of it.
        nodes: what each node holds and does, in the order that nodes were given.
        traffic: what latencies are told for.
        full: share of its memory that the fullest node uses.
        busy: memory traffic of look-ups on the busiest node, for one request, in seconds of it.
        spread: nodes that hold anything.
        latency_s: expected time of a request's look-ups at the planned traffic.
    """

    strategy: Strategy
    parts: Mapping[str, tuple[Part, ...]]
    homes: Mapping[str, tuple[tuple[str, ...], ...]]
    nodes: tuple[Load, ...]
    traffic: Traffic
    full: Figure
    busy: Figure
    spread: Figure
    latency_s: float

    @property
    def messages(self) -> float:
        """Nodes that a request asks, on average."""
        return sum(node.messages for node in self.nodes)

    @property
    def limit(self) -> tuple[float, Resource, str]:
        """The highest rate of requests, the resource that is then used up, and the node where."""
        rate, host, resource = min((node.limit[0], node.host, node.limit[1]) for node in self.nodes)
        return rate, resource, host

    def check_rate(self) -> None:
        """Refuse traffic that this layout cannot serve.

        Raises:
            TooBusy: what is short, where, by how much.
        """
        rate, resource, host = self.limit
        if self.traffic.requests_s > rate:
            raise TooBusy(resource, host, self.traffic.requests_s, rate)


def lay_out(
    shapes: Sequence[Shape],
    hosts: Sequence[Host],
    *,
    strategy: Strategy = "load",
    copies: int = 1,
    traffic: Traffic | None = None,
    pace: Pace | None = None,
) -> Layout:
    """Find a place for all rows, and say what it costs.

    Args:
        shapes: the tables, of different names.
        hosts: the nodes, of different names.
        strategy: what to make even or few.
        copies: of every part, each on a node of its own.
        traffic: what comes; one row a request, and no rate, unless it is said.
        pace: what work costs a core.

    Raises:
        InvalidArgument: nothing to place, nowhere to place it, a name twice, or fewer nodes than
            copies.
        TooLarge: there is no room; no layout has where "" is the place, this search found none
            where it is a node.
    """
    for words, names in (("table", [s.name for s in shapes]), ("node", [h.name for h in hosts])):
        if not names or len(set(names)) < len(names):
            raise InvalidArgument(f"every {words} needs a name of its own, and one is needed")
    if not 1 <= copies <= len(hosts):
        raise InvalidArgument(f"{copies} copies need as many nodes, and one; got {len(hosts)}")
    total = copies * sum(shape.nbytes for shape in shapes)
    room = sum(host.memory_bytes for host in hosts)
    if total > room:
        raise TooLarge(f"{len(shapes)} tables of {total:,} bytes", "", total - room)
    best: tuple[float, Mapping[str, tuple[Part, ...]], list[Book]] | None = None
    refusal: TooLarge | None = None
    seen: set[tuple[int, ...]] = set()
    for finer in _FINER:
        cuts = {shape.name: _cut(shape, shapes, hosts, strategy, copies, finer) for shape in shapes}
        counts = tuple(len(parts) for parts in cuts.values())
        if counts in seen or sum(counts) * copies > _PARTS_MAX:
            continue
        seen.add(counts)
        try:
            books = arranged(_pieces(shapes, cuts, copies), hosts, strategy)
        except TooLarge as error:
            refusal = refusal or error
            continue
        found = max(book.busy for book in books)
        if best is None or found * _GOOD < best[0]:
            best = found, cuts, books
        if strategy == "messages" or found <= _GOOD * evenly(books):
            break
    if best is None:
        raise refusal or InvalidArgument(f"more than {_PARTS_MAX:,} parts")
    return _told(shapes, best[1], best[2], strategy, copies, traffic or Traffic(), pace or Pace())


def _cut(
    shape: Shape,
    shapes: Sequence[Shape],
    hosts: Sequence[Host],
    strategy: Strategy,
    copies: int,
    finer: int,
) -> tuple[Part, ...]:
    """Equal parts, or the table whole where it is no more than its share."""
    if shape.parts:
        return shape.parts
    if strategy == "messages":
        needed = shape.nbytes * finer / max(host.memory_bytes for host in hosts)
    else:
        needed = shape.nbytes * finer / min(host.memory_bytes for host in hosts)
        if strategy == "capacity":
            shares = shape.nbytes / copies / sum(each.nbytes for each in shapes)
        else:
            whole = sum(_traffic(each) for each in shapes)
            shares = _traffic(shape) / copies / whole if whole else 0.0
        needed = max(needed, shares * len(hosts) * finer)
    # What a division makes a little more than a whole number is not another part.
    count = min(max(math.ceil(needed - 1e-9), 1), shape.rows)
    each, more = divmod(shape.rows, count)
    sizes = (each + (index < more) for index in range(count))
    return tuple(Part(rows=rows, nbytes=rows * shape.row_bytes) for rows in sizes)


def _traffic(shape: Shape) -> float:
    return shape.ids * read_bytes(shape)


def _pieces(
    shapes: Sequence[Shape], cuts: Mapping[str, tuple[Part, ...]], copies: int
) -> list[Piece]:
    return [
        Piece(
            shape.name, index, shape.net, part.nbytes, part.rows,
            _traffic(shape) * part.rows / shape.rows / copies,
        )
        for _ in range(copies)
        for shape in shapes
        for index, part in enumerate(cuts[shape.name])
    ]  # fmt: skip


def _told(
    shapes: Sequence[Shape],
    cuts: Mapping[str, tuple[Part, ...]],
    books: Sequence[Book],
    strategy: Strategy,
    copies: int,
    traffic: Traffic,
    pace: Pace,
) -> Layout:
    hosts = [book.host for book in books]
    homes: dict[str, list[list[str]]] = {name: [[] for _ in parts] for name, parts in cuts.items()}
    held: dict[str, dict[str, tuple[int, int]]] = {}
    for book in books:
        mine = held[book.host.name] = {}
        for piece in book.pieces.values():
            rows, size = mine.get(piece.table, (0, 0))
            mine[piece.table] = rows + piece.rows, size + piece.nbytes
            homes[piece.table][piece.index].append(book.host.name)
    nodes = loads_of(shapes, hosts, held, copies=copies, traffic=traffic, pace=pace)
    reads = [sum(p.read_bytes for p in b.pieces.values()) * traffic.rows for b in books]
    # Of parts that no layout may cut.
    largest = max((part.nbytes for shape in shapes for part in shape.parts), default=0)
    total = copies * sum(shape.nbytes for shape in shapes)
    room = sum(host.memory_bytes for host in hosts)
    router_s = nodes[0].needs["router loop"] * len(hosts)
    routers_spare = 1 - traffic.requests_s * max(node.needs["router loop"] for node in nodes)
    waits = max(node.latency_s for node in nodes)
    return Layout(
        strategy=strategy,
        parts=cuts,
        homes={name: tuple(map(tuple, parts)) for name, parts in homes.items()},
        nodes=nodes,
        traffic=traffic,
        full=Figure(
            value=max(n.nbytes / h.memory_bytes for n, h in zip(nodes, hosts, strict=True)),
            bound=max(total / room, largest / max(host.memory_bytes for host in hosts)),
        ),
        busy=Figure(
            value=max(r / h.memory_bytes_s for r, h in zip(reads, hosts, strict=True)),
            bound=sum(reads) / sum(host.memory_bytes_s for host in hosts),
        ),
        spread=Figure(
            value=float(sum(bool(node.tables) for node in nodes)),
            bound=float(max(_fewest(hosts, total), copies)),
        ),
        latency_s=math.inf if routers_spare <= 0 else waits + router_s / routers_spare,
    )


def _fewest(hosts: Sequence[Host], total: int) -> int:
    """Nodes that are needed for so many bytes, if parts could be cut as one likes."""
    count = 0
    for size in sorted((host.memory_bytes for host in hosts), reverse=True):
        if total <= 0:
            break
        total -= size
        count += 1
    return count
