"""Which shard actors hold the partitions of a version's tables.

Decides by one of the strategies of `cluster.packing`. Copies and shards are spread over nodes
first, a version's partitions evenly over its shards, each copy of them over shards of its own; a
partition whose base an actor holds already, for whichever version, is preferred there. Equal inputs
give equal homes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from batching.errors import ResourceExhausted
from cluster.packing import Strategy
from cluster.pieces import NOT_MEASURED, Part, Partitioned, PieceKey, parts_with_pieces, piece_sizes
from cluster.sites import Book, shortages

__all__ = ["homes_of"]


def homes_of(
    books: Sequence[Book],
    tables: Mapping[str, Partitioned],
    replicas: int,
    shards: int | None,
    cached: float | None,
    label: str,
    strategy: Strategy = "capacity",
    weights: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, tuple[tuple[str, ...], ...]]:
    """For each partition of a version's tables the actors that get a copy of it.

    Args:
        books: the shard actors that may be used, by name; not changed.
        tables: local unit name to what is cut into partitions.
        replicas: copies of each partition; 0 for none.
        shards: see `cluster.placement.place`.
        cached: likewise.
        label: of the version, for refusals.
        strategy: ``capacity`` makes the bytes of a version's partitions even over its actors,
            ``load`` what its look-ups read there; ``messages`` takes as few actors as have room,
            and where it finds none that have, is ``capacity``.
        weights: what look-ups read in each partition; None where that is not known, and then
            ``load`` is ``capacity``.

    Raises:
        ResourceExhausted: there is no room; the message says for what, where, and how much is
            short.
    """
    parts = {
        (name, partition): part
        for name, table in tables.items()
        for partition, part in enumerate(parts_with_pieces(table, NOT_MEASURED, cached))
    }
    homes: Mapping[PieceKey, tuple[str, ...]] = dict.fromkeys(parts, ())
    if parts and replicas:
        needed = replicas * (shards or 1)
        if len(books) < needed:
            raise ResourceExhausted(
                f"{label}: its partitions need {needed} shard actors, {len(books)} are up"
            )
        most = min(len(parts), len(books) // replicas if shards is None else shards)
        counts: Sequence[int] = [most]
        if strategy == "messages":
            counts = range(1, most + 1)
        elif shards is None and replicas > 1:
            # Copies that are spread less leave the actors that are nearly full to others.
            counts = range(most, 0, -1)
        wanted = _Wanted(parts, replicas, strategy, label)
        try:
            homes = wanted.placed(books, counts, _rules(parts, strategy, weights))
        except ResourceExhausted:
            if strategy != "messages":
                raise
            # Actors of few nodes may leave the copies no room that actors of more of them have.
            return homes_of(books, tables, replicas, shards, cached, label)
    return {
        name: tuple(homes[name, partition] for partition in range(len(piece_sizes(table))))
        for name, table in tables.items()
    }


class _Rule(NamedTuple):
    """How partitions of a copy are put on the actors that were chosen for it.

    Attributes:
        weights: what is made even over the actors.
        first: what is put first where it is large; those weights unless it is said.
        tight: whether nothing is made even: each goes where it fits tightest.
    """

    weights: Mapping[PieceKey, float]
    first: Mapping[PieceKey, float]
    tight: bool = False

    def rank(self, book: Book, part: Part, own: tuple[float, float, int]) -> tuple[object, ...]:
        """Smallest is best; `own` is what the actor has got of this copy."""
        if self.tight:
            return not book.holds(part), book.free, book.site.name
        # Its own balance first: what a version's look-ups cost depends on where *its* rows are.
        return own, book.rank(part)


def _rules(
    parts: Mapping[PieceKey, Part],
    strategy: Strategy,
    weights: Mapping[str, Sequence[float]] | None,
) -> list[_Rule]:
    """The rules of a strategy, one tried where the one before it found no room."""
    # By the bases alone: a version with other overlays is spread as the one before it, whose bases
    # are there already, and not anew because some partition has got a few rows more.
    sizes = {key: next(iter(part.values())) for key, part in parts.items()}
    even = _Rule(sizes, sizes)
    if strategy == "messages":
        return [even, _Rule(sizes, sizes, tight=True)]
    if strategy == "capacity" or weights is None:
        return [even]
    loads = {(name, index): weights[name][index] for name, index in parts}
    # What is looked up much goes first, which may leave large cold parts no room.
    return [_Rule(loads, loads), _Rule(loads, sizes), even]


class _Wanted(NamedTuple):
    """What is to be placed: see `homes_of`."""

    parts: Mapping[PieceKey, Part]
    replicas: int
    strategy: Strategy
    label: str

    def placed(
        self, books: Sequence[Book], counts: Iterable[int], rules: Sequence[_Rule]
    ) -> Mapping[PieceKey, tuple[str, ...]]:
        """Every copy of all partitions, each over as many actors as the first count that fits.

        Raises:
            ResourceExhausted: none does; with the words for the largest of them.
        """
        refusals: list[tuple[int, ResourceExhausted]] = []
        for count in counts:
            for rule in rules:
                try:
                    return self._each([Book(book.site) for book in books], count, rule)
                except ResourceExhausted as error:
                    refusals.append((count, error))
        raise max(refusals, key=lambda refusal: refusal[0])[1]

    def _each(
        self, books: Sequence[Book], count: int, rule: _Rule
    ) -> Mapping[PieceKey, tuple[str, ...]]:
        """Each copy on actors of its own.

        One of them that is lost, or given up for another version, takes parts of one copy with it.
        """
        left = list(books)
        homes: dict[PieceKey, tuple[str, ...]] = dict.fromkeys(self.parts, ())
        nodes: dict[PieceKey, set[str]] = {key: set() for key in self.parts}
        used: Counter[str] = Counter()
        for _ in range(self.replicas):
            chosen = self._chosen(left, count, used)
            used.update(book.site.node for book in chosen)
            left = [book for book in left if book not in chosen]
            for key, book in self._copy(chosen, nodes, rule).items():
                homes[key] = (*homes[key], book.site.name)
                nodes[key].add(book.site.node)
        return homes

    def _copy(
        self, books: Sequence[Book], nodes: Mapping[PieceKey, Collection[str]], rule: _Rule
    ) -> dict[PieceKey, Book]:
        """One copy of all partitions; `nodes` are those that hold another copy already."""
        homes: dict[PieceKey, Book] = {}
        own = {book.site.name: (0.0, 0.0, 0) for book in books}
        # Longest first onto the emptiest actor: at most 4/3 of the best possible balance.
        for key in sorted(self.parts, key=lambda key: (-rule.first[key], -rule.weights[key], key)):
            part = self.parts[key]
            size = next(iter(part.values()))
            roomy = [book for book in books if book.has_room(part)]
            if not roomy:
                raise ResourceExhausted(
                    f"{self.label}: partition {key[1]} of {key[0]!r} fits nowhere: "
                    f"{shortages(books, 'shard', part)}"
                )
            best = min(
                roomy,
                key=lambda b: (b.site.node in nodes[key], rule.rank(b, part, own[b.site.name])),
            )
            best.put(part)
            homes[key] = best
            weight, nbytes, count = own[best.site.name]
            own[best.site.name] = (weight + rule.weights[key], nbytes + size, count + 1)
        return homes

    def _chosen(self, books: Sequence[Book], count: int, used: Counter[str]) -> list[Book]:
        """Actors for a copy, those first that hold most of it already, then the emptiest.

        A second one of a node only when every node has given one, other copies' included; where
        messages are to be few, only those of other copies count.
        """
        held = {
            book.site.name: sum(
                size for part in self.parts.values() for piece, size in part.items()
                if piece in book.pieces
            )
            for book in books
        }  # fmt: skip
        chosen: list[Book] = []
        per_node = used.copy()
        for _ in range(count):
            best = min(
                (book for book in books if book not in chosen),
                key=lambda b: (
                    per_node[b.site.node],
                    -held[b.site.name],
                    -b.free,
                    b.used,
                    b.site.name,
                ),
            )
            if self.strategy != "messages":
                per_node[best.site.node] += 1
            chosen.append(best)
        return chosen
