"""What the parts of a version weigh where they are hosted, by the pieces that are held as a whole.

A part is a unit, or a partition of one; its pieces are what other versions may have in common with
it. Values from manifests, and from what was measured, alone; decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, TypeAlias

import msgspec

from shards.cold_rows import base_bytes
from shards.identity import table_identity
from shards.manifest import CustomUnit, HostUnit, MapUnit, TableUnit, Unit
from shards.needs import outputs_bytes, parameter_bytes, staging_bytes
from shards.orders import ActorKind
from shards.overlays import index_bytes

__all__ = [
    "NOT_MEASURED",
    "STAGING",
    "Part",
    "Partitioned",
    "PieceKey",
    "Programs",
    "Steps",
    "add_pieces",
    "kind_of",
    "parts_with_pieces",
    "piece_sizes",
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

#: The pieces of what goes to one actor, with bytes; the unit itself, or a partition's base, first.
Part: TypeAlias = Mapping[PieceKey, int]

#: What is placed partition by partition, on shard actors.
Partitioned: TypeAlias = TableUnit | CustomUnit

#: Manifests are all that is known.
NOT_MEASURED: Final[Steps] = MappingProxyType({})


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
) -> tuple[Part, ...]:
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
