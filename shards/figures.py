"""What a device actor says of itself: values.

All numbers count from the start of the process or, for a unit, from when it was loaded; who wants
rates looks twice. Does not know how the numbers come about, how they travel, nor who prints them.
"""

from __future__ import annotations

from typing import Final

import msgspec

from batching.telemetry import Distribution

__all__ = [
    "BucketStatistics",
    "DeviceStatistics",
    "OTHER",
    "ServableStatistics",
    "Spread",
    "UnitStatistics",
]

#: What rows are called that are summed up because there are too many of them.
OTHER: Final = "(other)"


class _Value(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the statistics' values."""


class Spread(_Value, frozen=True):
    """A `batching.Distribution` without its bounds, which both sides know.

    Attributes:
        counts: values by bucket, those beyond the last bound last.
        total: sum of the values.
    """

    counts: tuple[int, ...]
    total: float

    @classmethod
    def of(cls, found: Distribution) -> Spread:
        """Of what was counted."""
        return cls(counts=tuple(found.counts), total=found.total)

    def __add__(self, other: Spread) -> Spread:
        counts = tuple(map(sum, zip(self.counts, other.counts, strict=True)))
        return Spread(counts=counts, total=self.total + other.total)


class ServableStatistics(_Value, frozen=True):
    """Requests of one servable at one unit, over all its lanes; see `batching.values.Tally`.

    Attributes:
        waiting: requests with rows in line.
        in_time: answered by their deadline.
        late: answered after it.
        shed_hopeless: given up since they would have missed it in any case.
        shed_dropped: given up for the sake of several others.
        shed_evicted: their place in a full line was given to a more critical one.
        rows: real rows that came back from the device.
        busy_s: device seconds of them, padding included.
        padding_s: of these, padding.
        queue: seconds in line.
    """

    servable: str
    unit: str
    waiting: int
    waiting_rows: int
    accepted: int
    in_time: int
    late: int
    failed: int
    expired: int
    shed_hopeless: int
    shed_dropped: int
    shed_evicted: int
    cancelled: int
    refused_full: int
    refused_admission: int
    refused_late: int
    refused_other: int
    rows: int
    busy_s: float
    padding_s: float
    queue: Spread


class BucketStatistics(_Value, frozen=True):
    """Batches of one compiled size of a unit.

    Attributes:
        bucket: its sizes, the batch first: ``32``, or ``32x128`` for a unit with a length.
        rows: real rows in them.
        slots: rows that they had room for.
        estimate_s: what the next one is expected to take at most; 0 where many are summed up, and
            for a size that is no more.
    """

    bucket: str
    batches: int
    rows: int
    slots: int
    estimate_s: float


class UnitStatistics(_Value, frozen=True):
    """The batches of one unit. A cell is one row of a unit without lengths, else one place of it.

    Attributes:
        executables: compiled programs that are held.
        load_s: seconds from parameters on the device to the last program run once.
        in_flight: batches on the device.
        bisections: failed batches that were cut in two.
        useful_cells: that held something.
        batch_padding_cells: in rows that only fill up a batch size.
        length_padding_cells: in real rows, beyond their length.
        wait: seconds of a batch until the device began with it.
        device: seconds of the device.
        host: seconds that laying out and sending back took.
        error: how far estimates were off, as a share of what batches took.
    """

    unit: str
    executables: int
    load_s: float
    in_flight: int
    bisections: int
    useful_cells: int
    batch_padding_cells: int
    length_padding_cells: int
    wait: Spread
    device: Spread
    host: Spread
    error: Spread
    buckets: tuple[BucketStatistics, ...]


class DeviceStatistics(_Value, frozen=True):
    """One device actor at one instant.

    Attributes:
        up_s: seconds since its engine began: the time scale of all that is counted.
        busy_s: seconds of the device that came back.
        in_flight: batches on it.
        depths: batches that were launched, by how many were then in flight.
        decisions: of the scheduler, of those that were timed (one in 61).
        decision_s: processor seconds of these.
        compiles_after_available: programs compiled while serving; must stay 0.
        compiles_for_loads: programs compiled in loads; a version of the programs and shapes of
            another one adds none.
        staging_bytes: memory for laying out batches.
        shares: virtual time by servable.
        servables: what servables had of units.
        units: what units did.
    """

    up_s: float
    busy_s: float
    in_flight: int
    depths: tuple[int, ...]
    decisions: int
    decision_s: float
    compiles_after_available: int
    compiles_for_loads: int
    staging_bytes: int
    shares: dict[str, float]
    servables: tuple[ServableStatistics, ...]
    units: tuple[UnitStatistics, ...]
