"""What a device engine counts beside its batcher, and everything that is counted, put together.

On the path of a request nothing is done here; a batch costs two readings of a clock and one
histogram. Statistics are made when somebody asks, at most a few times a second, and are bounded in
size whatever is loaded: beyond the bounds rows are summed up.

Does not know who asks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from math import prod
from typing import Final, TypeVar

import msgspec

from batching import Batcher, CostTable, Effect, Histogram, LaneKey, LaneStats, OwnerStats
from batching.telemetry import ERROR_BOUNDS, TIME_BOUNDS, Distribution
from batching.values import Batch
from shards.figures import (
    OTHER,
    BucketStatistics,
    DeviceStatistics,
    ServableStatistics,
    Spread,
    UnitStatistics,
)
from shards.inbound import payload_of

__all__ = ["Meter", "UnitMeter"]

_Row = TypeVar("_Row", ServableStatistics, UnitStatistics, BucketStatistics)

#: Pairs of a servable and a unit that are told apart, and units, and compiled sizes of each.
PAIRS_MAX: Final = 128
UNITS_MAX: Final = 64
BUCKETS_MAX: Final = 64
#: Statistics that are younger are given again.
_FRESH_S: Final = 0.2
#: One poll in so many is timed. A prime: every second poll finds nothing to do.
_SAMPLE: Final = 61


class UnitMeter:
    """Counts of one installed unit.

    Attributes:
        executables: compiled programs.
        load_s: seconds that loading took.
        host: seconds that the host had with a batch: laying it out, and sending its rows back.
        useful_cells: cells of batches that held something.
        batch_padding_cells: those in rows that filled up a batch size.
        length_padding_cells: those in real rows beyond their length.
    """

    __slots__ = (
        "batch_padding_cells", "executables", "host", "length_padding_cells", "load_s",
        "useful_cells",
    )  # fmt: skip

    def __init__(self, executables: int = 0, load_s: float = 0.0) -> None:
        self.executables = executables
        self.load_s = load_s
        self.host: Final = Histogram()
        self.useful_cells = self.batch_padding_cells = self.length_padding_cells = 0


class Meter:
    """Counts of one engine.

    Args:
        batcher: whose decisions are timed, and which counts the rest.
        clock: seconds.

    Attributes:
        units: meters of installed units, by id.
        compiles: how many programs were compiled while serving.
        staging_bytes: how much memory batches are laid out in.
    """

    def __init__(self, batcher: Batcher, clock: Callable[[], float]) -> None:
        self.units: Final[dict[str, UnitMeter]] = {}
        self.compiles: Callable[[], int] = lambda: 0
        self.staging_bytes: Callable[[], int] = lambda: 0
        self._batcher = batcher
        self._clock = clock
        self._began = clock()
        self._polls = self._decisions = 0
        self._decision_s = 0.0
        self._encoded = b""
        self._encoded_at = float("-inf")

    def poll(self, now: float) -> list[Effect]:
        """What the batcher decides; a few of its decisions are timed."""
        self._polls += 1
        if self._polls % _SAMPLE:
            return self._batcher.poll(now)
        began = time.thread_time()
        effects = self._batcher.poll(now)
        if effects:
            self._decisions += 1
            self._decision_s += time.thread_time() - began
        return effects

    def landed(self, batch: Batch) -> None:
        """A batch came back, whatever of it."""
        unit, rows = self.units[batch.lane.unit], batch.rows
        each, useful = 1, rows
        if batch.lane.shape:
            each, useful = prod(batch.lane.shape), 0
            for ticket, start, stop in batch.parts:
                useful += (stop - start) * prod(payload_of(ticket)[0].lengths)
        unit.useful_cells += useful
        unit.batch_padding_cells += (batch.bucket - rows) * each
        unit.length_padding_cells += rows * each - useful

    def delivered(self, batch: Batch, host_s: float) -> None:
        """The rows of a batch were sent back; the host had so long with it."""
        self.units[batch.lane.unit].host.add(host_s)

    def encoded(self) -> bytes:
        """The statistics as msgpack, of this instant or just before."""
        now = self._clock()
        if now >= self._encoded_at + _FRESH_S:
            self._encoded = msgspec.msgpack.encode(self.read())
            self._encoded_at = now
        return self._encoded

    def read(self) -> DeviceStatistics:
        """Everything that was counted."""
        stats = self._batcher.stats()
        by_unit: dict[str, dict[LaneKey, LaneStats]] = {unit: {} for unit in self.units}
        for key, lane in stats.lanes.items():
            by_unit.setdefault(key.unit, {})[key] = lane
        units = [
            _unit(unit, self.units.get(unit) or UnitMeter(), lanes, self._batcher.costs)
            for unit, lanes in by_unit.items()
        ]
        return DeviceStatistics(
            up_s=self._clock() - self._began,
            busy_s=stats.busy_s,
            in_flight=stats.in_flight,
            depths=tuple(stats.depths),
            decisions=self._decisions,
            decision_s=self._decision_s,
            compiles_after_available=self.compiles(),
            staging_bytes=self.staging_bytes(),
            shares=dict(islice(stats.shares.items(), PAIRS_MAX)),
            servables=tuple(_bounded(_servables(by_unit), PAIRS_MAX, servable=OTHER, unit=OTHER)),
            units=tuple(_bounded(units, UNITS_MAX, unit=OTHER, buckets=())),
        )


def _servables(units: Mapping[str, Mapping[LaneKey, LaneStats]]) -> list[ServableStatistics]:
    """By servable and unit, over the unit's lanes."""
    found: list[ServableStatistics] = []
    for unit, lanes in units.items():
        lines: dict[str, list[OwnerStats]] = {}
        for lane in lanes.values():
            for owner, line in lane.owners.items():
                lines.setdefault(owner, []).append(line)
        found += [_servable(owner, unit, of) for owner, of in lines.items()]
    return found


def _servable(owner: str, unit: str, lines: Sequence[OwnerStats]) -> ServableStatistics:
    def total(name: str) -> int:
        return sum(getattr(line.tally, name) for line in lines)

    hopeless, evicted, late = total("hopeless"), total("evicted"), total("late")
    return ServableStatistics(
        servable=owner,
        unit=unit,
        waiting=sum(line.tickets for line in lines),
        waiting_rows=sum(line.rows for line in lines),
        accepted=total("offered"),
        in_time=total("finished") - late,
        late=late,
        failed=total("failed"),
        expired=total("expired"),
        shed_hopeless=hopeless,
        shed_dropped=total("shed") - hopeless - evicted,
        shed_evicted=evicted,
        cancelled=total("cancelled"),
        refused_full=total("refused_full"),
        refused_admission=total("refused_admission"),
        refused_late=total("refused_late"),
        refused_other=total("refused_other"),
        rows=total("rows_run"),
        busy_s=sum(line.tally.busy_s for line in lines),
        padding_s=sum(line.tally.padding_s for line in lines),
        queue=_spread(line.queue for line in lines),
    )


def _unit(
    unit: str, meter: UnitMeter, lanes: Mapping[LaneKey, LaneStats], costs: CostTable
) -> UnitStatistics:
    estimates = costs.table()
    buckets = [
        BucketStatistics(
            bucket="x".join(map(str, (size, *key.shape))),
            batches=batches,
            rows=rows,
            slots=batches * size,
            estimate_s=estimates[key].get(size, 0.0),
        )
        for key, lane in lanes.items()
        for size in sorted({*estimates[key], *lane.runs})  # it may have had others
        for batches, rows in (lane.runs.get(size, (0, 0)),)
    ]
    return UnitStatistics(
        unit=unit,
        executables=meter.executables,
        load_s=meter.load_s,
        in_flight=sum(lane.in_flight for lane in lanes.values()),
        bisections=sum(lane.bisections for lane in lanes.values()),
        useful_cells=meter.useful_cells,
        batch_padding_cells=meter.batch_padding_cells,
        length_padding_cells=meter.length_padding_cells,
        wait=_spread(lane.wait for lane in lanes.values()),
        device=_spread(lane.device for lane in lanes.values()),
        host=Spread.of(meter.host.read()),
        error=_spread((lane.error for lane in lanes.values()), ERROR_BOUNDS),
        buckets=tuple(_bounded(buckets, BUCKETS_MAX, bucket=OTHER, estimate_s=0.0)),
    )


def _spread(found: Iterable[Distribution], bounds: tuple[float, ...] = TIME_BOUNDS) -> Spread:
    return Spread.of(sum(found, Histogram(bounds).read()))


def _bounded(rows: list[_Row], limit: int, **named: object) -> list[_Row]:
    """The first rows, and the others as one. Who came first stays, so that no count jumps.

    Args:
        rows: of one kind.
        limit: how many stay as they are.
        named: fields of the one that are not the sum of the others'.
    """
    if len(rows) <= limit:
        return rows
    rest = rows[limit:]
    for name in rest[0].__struct_fields__:
        if name not in named:
            first, *others = (getattr(row, name) for row in rest)
            named[name] = sum(others, first)
    kept = rows[:limit]
    kept.append(msgspec.structs.replace(rest[0], **named))
    return kept
