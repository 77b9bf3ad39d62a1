"""What a device engine counts beside its batcher, and everything that is counted, put together.

On the path of a request nothing is done here; a batch costs two readings of a clock and one
histogram. Statistics are made when somebody asks, at most a few times a second, and are bounded in
size whatever is loaded: beyond the bounds rows are summed up.

Does not know who asks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from math import prod
from typing import Final, TypeVar

import msgspec

from batching import Batcher, Effect, Histogram, LaneKey, LaneStats, OwnerStats, Tally
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

_Row = TypeVar("_Row", UnitStatistics, BucketStatistics)

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
        compiles_for_loads: how many were compiled before they served.
        staging_bytes: how much memory batches are laid out in.
    """

    def __init__(self, batcher: Batcher, clock: Callable[[], float]) -> None:
        self.units: Final[dict[str, UnitMeter]] = {}
        self.compiles: Callable[[], int] = lambda: 0
        self.compiles_for_loads: Callable[[], int] = lambda: 0
        self.staging_bytes: Callable[[], int] = lambda: 0
        self._batcher = batcher
        self._clock = clock
        self._began = clock()
        self._polls = self._decisions = 0
        self._decision_s = 0.0
        #: the pairs of a servable and a unit that are told apart, and were from when they came
        self._told: dict[tuple[str, str], None] = {}
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
        estimates = self._batcher.costs.table()
        units = [
            _unit(unit, self.units.get(unit) or UnitMeter(), lanes, estimates)
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
            compiles_for_loads=self.compiles_for_loads(),
            staging_bytes=self.staging_bytes(),
            shares=dict(islice(stats.shares.items(), PAIRS_MAX)),
            servables=tuple(self._servables(by_unit)),
            units=tuple(_bounded(units, UNITS_MAX, unit=OTHER, buckets=())),
        )

    def _servables(
        self, units: Mapping[str, Mapping[LaneKey, LaneStats]]
    ) -> list[ServableStatistics]:
        """By servable and unit, over the unit's lanes."""
        lines: dict[tuple[str, str], list[OwnerStats]] = {}
        for unit, lanes in units.items():
            for lane in lanes.values():
                for owner, line in lane.owners.items():
                    lines.setdefault((owner, unit), []).append(line)
        told = self._told = {pair: None for pair in self._told if pair in lines}
        for pair in lines:
            if len(told) < PAIRS_MAX:
                told.setdefault(pair)
        found = [_servable(*pair, lines[pair]) for pair in told]
        if rest := [line for pair, of in lines.items() if pair not in told for line in of]:
            found.append(_servable(OTHER, OTHER, rest))
        return found


def _servable(owner: str, unit: str, lines: Sequence[OwnerStats]) -> ServableStatistics:
    tally = lines[0].tally if len(lines) == 1 else _total([line.tally for line in lines])
    return ServableStatistics(
        servable=owner,
        unit=unit,
        waiting=sum(line.tickets for line in lines),
        waiting_rows=sum(line.rows for line in lines),
        accepted=tally.offered,
        in_time=tally.finished - tally.late,
        late=tally.late,
        failed=tally.failed,
        expired=tally.expired,
        shed_hopeless=tally.hopeless,
        shed_dropped=tally.shed - tally.hopeless - tally.evicted,
        shed_evicted=tally.evicted,
        cancelled=tally.cancelled,
        refused_full=tally.refused_full,
        refused_admission=tally.refused_admission,
        refused_late=tally.refused_late,
        refused_other=tally.refused_other,
        rows=tally.rows_run,
        busy_s=tally.busy_s,
        padding_s=tally.padding_s,
        queue=_spread([line.queue for line in lines]),
    )


def _total(tallies: Sequence[Tally]) -> Tally:
    columns = {name: [getattr(tally, name) for tally in tallies] for name in Tally.__slots__}
    return Tally(**{name: sum(column) for name, column in columns.items()})


def _unit(
    unit: str,
    meter: UnitMeter,
    lanes: Mapping[LaneKey, LaneStats],
    estimates: Mapping[LaneKey, Mapping[int, float]],
) -> UnitStatistics:
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
        wait=_spread([lane.wait for lane in lanes.values()]),
        device=_spread([lane.device for lane in lanes.values()]),
        host=Spread.of(meter.host.read()),
        error=_spread([lane.error for lane in lanes.values()], ERROR_BOUNDS),
        buckets=tuple(_bounded(buckets, BUCKETS_MAX, bucket=OTHER, estimate_s=0.0)),
    )


def _spread(found: Sequence[Distribution], bounds: tuple[float, ...] = TIME_BOUNDS) -> Spread:
    if not found:
        return Spread.of(Histogram(bounds).read())
    if len(found) == 1:  # of hundreds of units most have one lane, and this is on the engine's loop
        return Spread.of(found[0])
    counts = tuple(map(sum, zip(*(each.counts for each in found), strict=True)))
    return Spread(counts=counts, total=sum(each.total for each in found))


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
