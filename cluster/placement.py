"""Which actor hosts which part of a version: all of it fits, or nothing is promised.

Map units go to device actors, partitions of tables and of registered kinds to shard actors
(`cluster.table_homes`), host units to host actors.
Decides by bytes: the emptiest actor that has room, copies spread over nodes first; a part that an
actor holds already, for whichever version, costs nothing there and is preferred.
Equal inputs give equal placements. Does not know whether an actor really has the room it reports,
nor anything about load, health or time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from batching.errors import ResourceExhausted
from cluster.asked_rows import weights_of
from cluster.packing import Strategy
from cluster.pieces import (
    NOT_MEASURED,
    Part,
    Partitioned,
    PieceKey,
    Steps,
    add_pieces,
    kind_of,
    parts_with_pieces,
    piece_sizes,
)
from cluster.sites import Book, Site, shortages
from cluster.table_homes import homes_of
from shards.manifest import Manifest
from shards.orders import ActorKind, HostedUnit

__all__ = ["Copies", "Placement", "cost_on", "fits", "orders_of", "pieces_on", "place"]

#: For each partition (one for map and host units) the actors that hold a copy of it.
Copies = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a version is to be.

    Attributes:
        units: local unit name to its copies.
        pieces: actor to the pieces it hosts, with bytes.
    """

    units: Mapping[str, Copies]
    pieces: Mapping[str, Mapping[PieceKey, int]]


def place(
    manifest: Manifest,
    sites: Iterable[Site],
    *,
    replicas: int = 1,
    table_replicas: int = 1,
    shards: int | None = None,
    steps: Steps = NOT_MEASURED,
    cached: float | None = None,
    strategy: Strategy = "capacity",
) -> Placement:
    """Find room for every part of a version.

    Args:
        manifest: the version.
        sites: the actors that may be used.
        replicas: copies of each map and host unit; 0 to leave them out.
        table_replicas: copies of each partition; 0 to leave them out.
        shards: shard actors to spread one copy of all partitions over; None for as many as there
            are partitions and actors.
        steps: what steps of units allocate, as far as it was measured.
        cached: of its tables, see `piece_sizes`.
        strategy: by which partitions are spread, see `cluster.table_homes.homes_of`.

    Raises:
        ResourceExhausted: there is no room; the message says for what, where, and how much is
            short.
    """
    books = sorted((Book(site) for site in sites), key=lambda book: book.site.name)
    label = f"{manifest.name} version {manifest.version}"
    units: dict[str, Copies] = {}
    tables: dict[str, Partitioned] = {}
    # The largest first: small ones find room beside large ones, not the other way round.
    for name, unit in sorted(
        manifest.units.items(), key=lambda item: (-sum(piece_sizes(item[1])), item[0])
    ):
        if isinstance(unit, Partitioned):
            tables[name] = unit
            continue
        usable = [book for book in books if book.site.kind == kind_of(unit)]
        what = f"{label}: unit {name!r}"
        (part,) = parts_with_pieces(unit, steps, cached)
        units[name] = (_place_copies(usable, part, kind_of(unit), replicas, what),)
    usable = [book for book in books if book.site.kind == "shard"]
    weights = weights_of(manifest) if strategy == "load" else None
    units.update(homes_of(usable, tables, table_replicas, shards, cached, label, strategy, weights))
    ordered = {name: units[name] for name in manifest.units}
    return Placement(units=ordered, pieces=pieces_on(manifest, ordered, steps, cached))


def fits(manifest: Manifest, units: Mapping[str, Copies]) -> bool:
    """Whether a placement that was kept from earlier names every part of this manifest."""
    return units.keys() == manifest.units.keys() and all(
        len(units[name]) == len(piece_sizes(unit)) and all(units[name])
        for name, unit in manifest.units.items()
    )


def cost_on(site: Site, pieces: Mapping[PieceKey, int]) -> int:
    """Bytes that pieces would take at a site; what is there already costs nothing."""
    return Book(site).cost(pieces)


def pieces_on(
    manifest: Manifest,
    units: Mapping[str, Copies],
    steps: Steps = NOT_MEASURED,
    cached: float | None = None,
) -> dict[str, dict[PieceKey, int]]:
    """Actor to the pieces a placement puts there, with bytes."""
    found: dict[str, dict[PieceKey, int]] = {}
    for name, copies in units.items():
        unit = manifest.units[name]
        for part, actors in zip(parts_with_pieces(unit, steps, cached), copies, strict=True):
            for actor in actors:
                add_pieces(found.setdefault(actor, {}), part)
    return dict(sorted(found.items()))


def orders_of(manifest: Manifest, units: Mapping[str, Copies]) -> dict[str, tuple[HostedUnit, ...]]:
    """Actor to what it is told to host."""
    parts: dict[str, dict[str, list[int]]] = {}
    for name, copies in units.items():
        for partition, actors in enumerate(copies):
            for actor in actors:
                parts.setdefault(actor, {}).setdefault(name, []).append(partition)
    return {
        actor: tuple(
            HostedUnit(
                name=name,
                partitions=tuple(partitions)
                if isinstance(manifest.units[name], Partitioned)
                else (),
            )
            for name, partitions in hosted.items()
        )
        for actor, hosted in sorted(parts.items())
    }


def _place_copies(
    books: Sequence[Book], part: Part, kind: ActorKind, replicas: int, what: str
) -> tuple[str, ...]:
    if len(books) < replicas:
        raise ResourceExhausted(
            f"{what} needs {replicas} {kind} actors for its copies, {len(books)} are up"
        )
    chosen: list[Book] = []
    per_node: dict[str, int] = {}
    for copy in range(replicas):
        left = [book for book in books if book not in chosen]
        roomy = [book for book in left if book.has_room(part)]
        if not roomy:
            raise ResourceExhausted(
                f"{what}, copy {copy + 1} of {replicas}, fits nowhere: "
                f"{shortages(left, kind, part)}"
            )
        best = min(roomy, key=lambda b: (per_node.get(b.site.node, 0), b.rank(part)))
        best.put(part)
        per_node[best.site.node] = per_node.get(best.site.node, 0) + 1
        chosen.append(best)
    return tuple(book.site.name for book in chosen)
