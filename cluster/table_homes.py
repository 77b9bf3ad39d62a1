"""Which shard actors hold the partitions of a version's tables.

Decides by bytes: copies and shards spread over nodes first, a version's partitions evenly over its
shards, each copy of them over shards of its own; a partition whose base an actor holds already, for
whichever version, is preferred there. Equal inputs give equal homes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from batching.errors import ResourceExhausted
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
) -> dict[str, tuple[tuple[str, ...], ...]]:
    """For each partition of a version's tables the actors that get a copy of it.

    Args:
        books: the shard actors that may be used, by name; not changed.
        tables: local unit name to what is cut into partitions.
        replicas: copies of each partition; 0 for none.
        shards: see `cluster.placement.place`.
        cached: likewise.
        label: of the version, for refusals.

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
        counts = [min(len(parts), len(books) // replicas if shards is None else shards)]
        if shards is None and replicas > 1:
            # Copies that are spread less leave the actors that are nearly full to others.
            counts += range(counts[0] - 1, 0, -1)
        homes = _place_all(books, parts, replicas, counts, label)
    return {
        name: tuple(homes[name, partition] for partition in range(len(piece_sizes(table))))
        for name, table in tables.items()
    }


def _place_all(
    books: Sequence[Book],
    parts: Mapping[PieceKey, Part],
    replicas: int,
    counts: Sequence[int],
    label: str,
) -> Mapping[PieceKey, tuple[str, ...]]:
    """Every copy of all partitions, each over as many actors as the first count that fits."""
    refusals: list[ResourceExhausted] = []
    for count in counts:
        try:
            return _place_each([Book(book.site) for book in books], parts, replicas, count, label)
        except ResourceExhausted as error:
            refusals.append(error)
    raise refusals[0]


def _place_each(
    books: Sequence[Book],
    parts: Mapping[PieceKey, Part],
    replicas: int,
    count: int,
    label: str,
) -> Mapping[PieceKey, tuple[str, ...]]:
    """Each copy on actors of its own.

    One of them that is lost, or given up for another version, takes parts of one copy with it.
    """
    left = list(books)
    homes: dict[PieceKey, tuple[str, ...]] = dict.fromkeys(parts, ())
    nodes: dict[PieceKey, set[str]] = {key: set() for key in parts}
    for _ in range(replicas):
        chosen = _spread(left, count, parts.values())
        left = [book for book in left if book not in chosen]
        for key, book in _place_copy(chosen, parts, nodes, label).items():
            homes[key] = (*homes[key], book.site.name)
            nodes[key].add(book.site.node)
    return homes


def _place_copy(
    books: Sequence[Book],
    parts: Mapping[PieceKey, Part],
    nodes: Mapping[PieceKey, Collection[str]],
    label: str,
) -> dict[PieceKey, Book]:
    """One copy of all partitions; `nodes` are those that hold another copy already."""
    homes: dict[PieceKey, Book] = {}
    own = {book.site.name: (0, 0) for book in books}
    # By the bases alone: a version with other overlays is spread as the one before it, whose bases
    # are there already, and not anew because some partition has got a few rows more.
    sizes = {key: next(iter(part.values())) for key, part in parts.items()}
    # Longest first onto the emptiest actor: at most 4/3 of the best possible balance.
    for key in sorted(parts, key=lambda key: (-sizes[key], key)):
        part = parts[key]
        roomy = [book for book in books if book.has_room(part)]
        if not roomy:
            raise ResourceExhausted(
                f"{label}: partition {key[1]} of {key[0]!r} fits nowhere: "
                f"{shortages(books, 'shard', part)}"
            )
        # Its own balance first: what a version's look-ups cost depends on where *its* rows are.
        best = min(
            roomy,
            key=lambda b: (b.site.node in nodes[key], own[b.site.name], b.rank(part)),
        )
        best.put(part)
        homes[key] = best
        own[best.site.name] = (own[best.site.name][0] + sizes[key], own[best.site.name][1] + 1)
    return homes


def _spread(books: Sequence[Book], count: int, parts: Collection[Part]) -> list[Book]:
    """Actors for these parts: a second one of a node only when every node has given one.

    Within a node those come first that hold most of the parts already, then the emptiest.
    """
    held = {
        book.site.name: sum(
            size for part in parts for piece, size in part.items() if piece in book.pieces
        )
        for book in books
    }
    chosen: list[Book] = []
    per_node: dict[str, int] = {}
    for _ in range(count):
        best = min(
            (book for book in books if book not in chosen),
            key=lambda b: (
                per_node.get(b.site.node, 0),
                -held[b.site.name],
                -b.free,
                b.used,
                b.site.name,
            ),
        )
        per_node[best.site.node] = per_node.get(best.site.node, 0) + 1
        chosen.append(best)
    return chosen
