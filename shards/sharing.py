"""Which sizes a unit is compiled for, by the servables that share it.

What a member's own bundle declares is always there: every length bucket, and every batch bucket
at every length that the member may send. Where several servables share the unit their rows meet
in one lane, so batches there may be as large as the largest of each servable together; with the
limit of one of them, a shared lane would need more batches than lanes apart. Versions of one
servable count once: a new version takes over requests and brings none, and a swap should compile
nothing.

Does not know memory, compilers or lanes: who asks says which of the larger sizes may be had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from batching import Ladder, shapes
from shards.compiling.messages import Bucket
from shards.manifest import MapUnit

__all__ = [
    "Member",
    "Members",
    "Shape",
    "Sizes",
    "admits",
    "declared_sizes",
    "larger_sizes",
    "maker_of",
    "sizes_for",
]

#: Sizes of a unit's symbols, other than the batch, in the order of their names.
Shape: TypeAlias = tuple[int, ...]


class Member(NamedTuple):
    """A version that uses a unit.

    Attributes:
        unit: as its own bundle declares it.
        shared_bucket_max: the largest batch that it may run in with others, but for what it
            declares itself.
    """

    unit: MapUnit
    shared_bucket_max: int


#: By servable and version.
Members: TypeAlias = Mapping[tuple[str, int], Member]


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a unit is compiled for.

    Attributes:
        symbols: sizes of every symbol but the batch.
        batches: batch sizes of every shape that rows can have.
        requests: where some inputs are per request: numbers of requests of every batch and shape.
    """

    symbols: Mapping[str, Ladder]
    batches: Mapping[Shape, Ladder]
    requests: Mapping[Bucket, Ladder]

    @property
    def buckets(self) -> list[Bucket]:
        """Every combination, small batches first."""
        found = [bucket for shape in self.batches for bucket in self.buckets_of(shape)]
        return sorted(found, key=lambda bucket: bucket[0])

    def buckets_of(self, shape: Shape) -> list[Bucket]:
        """Every combination for rows of this shape."""
        found: list[Bucket] = []
        for batch in self.batches[shape].sizes:
            counts = self.requests.get((batch, shape))
            if counts is None:
                found.append((batch, shape))
            else:
                found += [(batch, (*shape, count)) for count in counts.sizes]
        return found

    @property
    def largest(self) -> int:
        """The largest batch of any shape."""
        return max(ladder.largest for ladder in self.batches.values())


def sizes_for(members: Members, may_have: Callable[[Bucket], bool] = lambda _: False) -> Sizes:
    """What the unit of these members is compiled for.

    Args:
        members: at least one.
        may_have: whether a size may be there that no member declares.
    """
    units = [member.unit for member in members.values()]
    symbols = {
        symbol: Ladder(sorted({size for unit in units for size in unit.length_buckets[symbol]}))
        for symbol in sorted(units[0].length_buckets)
    }
    batches: dict[Shape, Ladder] = {}
    requests: dict[Bucket, Ladder] = {}
    for shape in shapes(symbols):
        senders = [unit for unit in units if admits(unit, shape)]
        if not senders:  # two symbols may be long for no member at once
            continue
        found = {batch for unit in senders for batch in unit.batch_buckets}
        for batch in (*found, *larger_sizes(members, shape)):
            counts = sorted({count for unit in senders for count in unit.requests_of(batch)})
            every = [(batch, (*shape, count)) for count in counts] or [(batch, shape)]
            if batch in found or all(map(may_have, every)):
                found.add(batch)
                if counts:
                    requests[batch, shape] = Ladder(counts)
        batches[shape] = Ladder(sorted(found))
    return Sizes(symbols, batches, requests)


def maker_of(members: Members, bucket: Bucket) -> tuple[str, int]:
    """The member by whose program a bucket is compiled: the newest that may send such rows."""
    batch, sizes = bucket
    for version, (unit, _) in reversed(list(members.items())):
        made_for = {program.batch for program in unit.programs}
        shape = sizes[: len(unit.length_buckets)]
        if admits(unit, shape) and (None in made_for or batch in made_for):
            return version
    raise AssertionError(f"no member has a program for {bucket}")


def declared_sizes(unit: MapUnit) -> Sizes:
    """The sizes of a unit with one member."""
    return sizes_for({("", 0): Member(unit, 0)})


def admits(unit: MapUnit, shape: Shape) -> bool:
    """Whether rows of this shape are within the limits of a unit as it was declared."""
    limits = (unit.length_buckets[symbol][-1] for symbol in sorted(unit.length_buckets))
    return all(size <= limit for size, limit in zip(shape, limits, strict=True))


def larger_sizes(members: Members, shape: Shape) -> Sequence[int]:
    """Batch sizes above what any member declares, up to what all servables declare together.

    Powers of two and the sum itself, but none above what a member shares. None where the unit has
    a program for each declared size instead of one for all.
    """
    largest: dict[str, int] = {}
    bound = None
    for (servable, _), (unit, shared_bucket_max) in members.items():
        if admits(unit, shape):
            largest[servable] = max(largest.get(servable, 0), unit.batch_buckets[-1])
            bound = shared_bucket_max if bound is None else min(bound, shared_bucket_max)
            if any(program.batch is not None for program in unit.programs):
                return ()
    if bound is None:
        return ()
    return list(_rungs(max(largest.values()), min(sum(largest.values()), bound)))


def _rungs(declared: int, cap: int) -> Iterator[int]:
    size = 1 << declared.bit_length()
    while size < cap:
        yield size
        size *= 2
    if cap > declared:
        yield cap
