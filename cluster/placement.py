"""Which actor hosts which part of a version: all of it fits, or nothing is promised.

Map units go to device actors, partitions of tables and of registered kinds to shard actors, host
units to host actors.
Decides by bytes: the emptiest actor that has room, copies and shards spread over nodes first, a
version's partitions evenly over its shards, each copy of them over shards of its own; a part that
an actor holds already, for whichever version, costs nothing there and is preferred.
Equal inputs give equal placements. Does not know whether an actor really has the room it reports,
nor anything about load, health or time.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, TypeAlias

import msgspec

from batching.errors import ResourceExhausted
from shards.cold_rows import base_bytes
from shards.identity import table_identity
from shards.manifest import CustomUnit, HostUnit, Manifest, MapUnit, TableUnit, Unit
from shards.needs import outputs_bytes, parameter_bytes, staging_bytes
from shards.orders import ActorKind, HostedUnit
from shards.overlays import index_bytes

__all__ = [
    "Copies",
    "NOT_MEASURED",
    "STAGING",
    "PieceKey",
    "Placement",
    "Programs",
    "Site",
    "Steps",
    "add_pieces",
    "cost_on",
    "fits",
    "kind_of",
    "orders_of",
    "parts_with_pieces",
    "piece_sizes",
    "pieces_on",
    "place",
    "programs_of",
]

#: Bytes that are held as a whole: the unit's identity and the partition (0 but for tables); of an
#: overlay its digest and the partition.
PieceKey = tuple[str, int]

#: The slots of a device for laying out batches: as large as the largest that a unit there needs.
STAGING: Final[PieceKey] = ("", 0)

#: What a unit computes, whatever its weights: digests of its programs, and its sizes.
Programs: TypeAlias = tuple[object, ...]

#: What a step of units allocates, where that was measured, by their programs.
Steps: TypeAlias = Mapping[Programs, int]

#: For each partition (one for map and host units) the actors that hold a copy of it.
Copies = tuple[tuple[str, ...], ...]

#: The pieces of what goes to one actor, with bytes; the unit itself, or a partition's base, first.
_Part: TypeAlias = Mapping[PieceKey, int]

#: What is placed partition by partition, on shard actors.
_Partitioned: TypeAlias = TableUnit | CustomUnit

#: Manifests are all that is known.
NOT_MEASURED: Final[Steps] = MappingProxyType({})
#: Actors that a refusal lists.
_LISTED_MAX: Final = 4
_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """An actor as placement sees it.

    Attributes:
        name: the actor.
        kind: what it can host.
        node: where it runs.
        capacity_bytes: the most it may promise; 0 where it states no bound.
        pieces: what is promised there already, with bytes.
    """

    name: str
    kind: ActorKind
    node: str
    capacity_bytes: int = 0
    pieces: Mapping[PieceKey, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a version is to be.

    Attributes:
        units: local unit name to its copies.
        pieces: actor to the pieces it hosts, with bytes.
    """

    units: Mapping[str, Copies]
    pieces: Mapping[str, Mapping[PieceKey, int]]


def kind_of(unit: Unit) -> ActorKind:
    """The kind of actor that hosts a unit."""
    match unit:
        case MapUnit():
            return "device"
        case TableUnit() | CustomUnit():
            return "shard"
        case HostUnit():
            return "host"


def piece_sizes(unit: Unit, cached: float | None = None) -> tuple[int, ...]:
    """Bytes of each part of a unit: its partitions, or the whole of what has none.

    Args:
        unit: the unit.
        cached: of tables on disk, bytes of memory for each byte of rows; None for tables in memory.
    """
    match unit:
        case TableUnit():
            return tuple(
                base_bytes(part, cached) + sum(each.blob.stored for each in part.overlays)
                for part in unit.partitions
            )
        case MapUnit():
            return (parameter_bytes(unit),)
        case HostUnit():
            return (sum(blob.size for blob in unit.files.values()),)
        case CustomUnit():
            return tuple(sum(blob.size for blob in files.values()) for files in unit.partitions)


def programs_of(unit: MapUnit) -> Programs:
    """What a unit computes: steps of units for which this is equal allocate the same."""
    digests = tuple(program.blob.digest for program in unit.programs)
    lengths = tuple(sorted(unit.length_buckets.items()))
    return (digests, unit.batch_buckets, lengths, unit.request_buckets)


def add_pieces(book: dict[PieceKey, int], pieces: Mapping[PieceKey, int]) -> None:
    """Add what comes to an actor to what is there; what is there already counts once."""
    staging = max(book.get(STAGING, 0), pieces.get(STAGING, 0))
    book.update(pieces)
    if staging:
        book[STAGING] = staging


def parts_with_pieces(
    unit: Unit, steps: Steps = NOT_MEASURED, cached: float | None = None
) -> tuple[_Part, ...]:
    """The pieces of each part of a unit: one, or for a partition its base and its overlays.

    Tables that differ in overlays alone have their bases in common: the base is named as in the
    table that has none.
    """
    if isinstance(unit, MapUnit):
        step = max(outputs_bytes(unit), steps.get(programs_of(unit), 0))
        part = {(unit.id, 0): parameter_bytes(unit) + step}
        staging = staging_bytes(unit)
        return (part | {STAGING: staging} if staging else part,)
    if not isinstance(unit, TableUnit) or not any(part.overlays for part in unit.partitions):
        return tuple({(unit.id, part): size} for part, size in enumerate(piece_sizes(unit, cached)))
    bare = [msgspec.structs.replace(part, overlays=()) for part in unit.partitions]
    base = table_identity(unit.dtype, unit.dim, bare, unit.stored)
    return tuple(
        {(base, index): base_bytes(part, cached)}
        | {(overlay.blob.digest, index): overlay.blob.stored for overlay in part.overlays}
        | ({(unit.id, index): index_bytes(part)} if index_bytes(part) else {})
        for index, part in enumerate(unit.partitions)
    )


def place(
    manifest: Manifest,
    sites: Iterable[Site],
    *,
    replicas: int = 1,
    table_replicas: int = 1,
    shards: int | None = None,
    steps: Steps = NOT_MEASURED,
    cached: float | None = None,
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

    Raises:
        ResourceExhausted: there is no room; the message says for what, where, and how much is
            short.
    """
    books = sorted((_Book(site) for site in sites), key=lambda book: book.site.name)
    label = f"{manifest.name} version {manifest.version}"
    units: dict[str, Copies] = {}
    tables: dict[str, _Partitioned] = {}
    # The largest first: small ones find room beside large ones, not the other way round.
    for name, unit in sorted(
        manifest.units.items(), key=lambda item: (-sum(piece_sizes(item[1])), item[0])
    ):
        if isinstance(unit, _Partitioned):
            tables[name] = unit
            continue
        usable = [book for book in books if book.site.kind == kind_of(unit)]
        what = f"{label}: unit {name!r}"
        (part,) = parts_with_pieces(unit, steps, cached)
        units[name] = (_place_copies(usable, part, kind_of(unit), replicas, what),)
    usable = [book for book in books if book.site.kind == "shard"]
    units.update(_place_tables(usable, tables, table_replicas, shards, cached, label))
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
    return _Book(site).cost(pieces)


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
                if isinstance(manifest.units[name], _Partitioned)
                else (),
            )
            for name, partitions in hosted.items()
        )
        for actor, hosted in sorted(parts.items())
    }


class _Book:
    """A site while a placement is being worked out."""

    __slots__ = ("pieces", "site", "used")

    def __init__(self, site: Site) -> None:
        self.site = site
        self.pieces = dict(site.pieces)
        self.used = sum(self.pieces.values())

    @property
    def free(self) -> float:
        return self.site.capacity_bytes - self.used if self.site.capacity_bytes else math.inf

    def cost(self, part: _Part) -> int:
        staging = max(part.get(STAGING, 0) - self.pieces.get(STAGING, 0), 0)
        return staging + sum(
            size for piece, size in part.items() if piece not in self.pieces and piece != STAGING
        )

    def has_room(self, part: _Part) -> bool:
        return self.cost(part) <= max(self.free, 0)

    def put(self, part: _Part) -> None:
        self.used += self.cost(part)
        add_pieces(self.pieces, part)

    def rank(self, part: _Part) -> tuple[bool, float, int, str]:
        """Smallest is best: holds the part already, most room, least used, first by name.

        A partition whose base is held counts as held: its overlays are small beside it.
        """
        return (next(iter(part)) not in self.pieces, -self.free, self.used, self.site.name)


def _place_copies(
    books: Sequence[_Book], part: _Part, kind: ActorKind, replicas: int, what: str
) -> tuple[str, ...]:
    if len(books) < replicas:
        raise ResourceExhausted(
            f"{what} needs {replicas} {kind} actors for its copies, {len(books)} are up"
        )
    chosen: list[_Book] = []
    per_node: dict[str, int] = {}
    for copy in range(replicas):
        left = [book for book in books if book not in chosen]
        roomy = [book for book in left if book.has_room(part)]
        if not roomy:
            raise ResourceExhausted(
                f"{what}, copy {copy + 1} of {replicas}, fits nowhere: "
                f"{_shortages(left, kind, part)}"
            )
        best = min(roomy, key=lambda b: (per_node.get(b.site.node, 0), b.rank(part)))
        best.put(part)
        per_node[best.site.node] = per_node.get(best.site.node, 0) + 1
        chosen.append(best)
    return tuple(book.site.name for book in chosen)


def _place_tables(
    books: Sequence[_Book],
    tables: Mapping[str, _Partitioned],
    replicas: int,
    shards: int | None,
    cached: float | None,
    label: str,
) -> dict[str, Copies]:
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
    books: Sequence[_Book],
    parts: Mapping[PieceKey, _Part],
    replicas: int,
    counts: Sequence[int],
    label: str,
) -> Mapping[PieceKey, tuple[str, ...]]:
    """Every copy of all partitions, each over as many actors as the first count that fits."""
    refusals: list[ResourceExhausted] = []
    for count in counts:
        try:
            return _place_each([_Book(book.site) for book in books], parts, replicas, count, label)
        except ResourceExhausted as error:
            refusals.append(error)
    raise refusals[0]


def _place_each(
    books: Sequence[_Book],
    parts: Mapping[PieceKey, _Part],
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
    books: Sequence[_Book],
    parts: Mapping[PieceKey, _Part],
    nodes: Mapping[PieceKey, Collection[str]],
    label: str,
) -> dict[PieceKey, _Book]:
    """One copy of all partitions; `nodes` are those that hold another copy already."""
    homes: dict[PieceKey, _Book] = {}
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
                f"{_shortages(books, 'shard', part)}"
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


def _spread(books: Sequence[_Book], count: int, parts: Collection[_Part]) -> list[_Book]:
    """Actors for these parts: a second one of a node only when every node has given one.

    Within a node those come first that hold most of the parts already, then the emptiest.
    """
    held = {
        book.site.name: sum(
            size for part in parts for piece, size in part.items() if piece in book.pieces
        )
        for book in books
    }
    chosen: list[_Book] = []
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


def _shortages(books: Sequence[_Book], kind: ActorKind, part: _Part) -> str:
    """What is short on each actor, the one that lacks the least first."""
    ordered = sorted(books, key=lambda book: (book.cost(part) - book.free, book.site.name))
    told = [_shortage(book, kind, part) for book in ordered[:_LISTED_MAX]]
    more = len(ordered) - len(told)
    return "; ".join(told) + (f"; and {more} more" if more else "")


def _shortage(book: _Book, kind: ActorKind, part: _Part) -> str:
    free, size = max(int(book.free), 0), book.cost(part)
    return (
        f"{book.site.name} needs {_bytes_text(size)} of {kind} memory, "
        f"{_bytes_text(free)} free of {_bytes_text(book.site.capacity_bytes)}: "
        f"{_bytes_text(size - free)} short"
    )


def _bytes_text(count: int) -> str:
    power = min(max(count.bit_length() - 1, 0) // 10, len(_UNITS) - 1)
    return f"{count / 1024**power:.4g} {_UNITS[power]}"
