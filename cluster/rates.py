"""How fast, from two readings of what devices count: rates, shares, attainment, quantiles.

A pure function over numbers as Prometheus has them, so that ``shardserve top`` (which reads
``/metrics``) and ``shardserve status`` (whose controller hears from the actors) say the same. The
time scale is each device's own uptime, so it does not matter when a reading was made or how long it
was kept. Of a device that was started again, or was not there before, what counts is all that it
counted.

Does not know where readings come from, nor how rates are shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Final, TypeAlias

import msgspec

from batching.telemetry import Distribution
from cluster.device_metrics import OUTCOMES, DeviceReport, Series, samples
from shards.figures import DeviceStatistics

__all__ = ["DROPS", "DeviceRates", "Samples", "ServableRates", "rates", "rates_between"]

#: One reading: see `cluster.device_metrics.samples`.
Samples: TypeAlias = Mapping[Series, float]

_Key: TypeAlias = tuple[str, ...]
_PAIR: Final = ("servable", "unit")
#: Outcomes that were not meant to be.
DROPS: Final = tuple(name for name in OUTCOMES if name not in ("in_time", "cancelled"))
#: Outcomes of requests that were accepted and of which somebody still wanted the answer.
_WANTED: Final = tuple(
    name for name in OUTCOMES if name != "cancelled" and not name.startswith("refused")
)


class ServableRates(msgspec.Struct, frozen=True, kw_only=True):
    """A servable at a unit of a device, between two readings; None where nothing says.

    Attributes:
        requests_s: requests answered a second.
        rows_s: real rows back from the device a second.
        waiting_rows: in line now.
        queue_p50_s: half of the requests were in line for less.
        queue_p99_s: all but a hundredth were.
        device: share of the time in which the device worked for it.
        share: share of the device's work that was for it.
        padding: share of its own device time that went into padding.
        attainment: share of accepted requests that were answered in time, of those that ended and
            were not cancelled.
        drops_s: requests a second that failed, were late, given up or refused, by cause.
        batch_rows: real rows in a batch of the unit, whoever they were of.
        occupancy: share of the rows of the unit's batches that were real.
    """

    device_name: str
    servable: str
    unit: str
    requests_s: float
    rows_s: float
    waiting_rows: int
    queue_p50_s: float | None
    queue_p99_s: float | None
    device: float
    share: float | None
    padding: float | None
    attainment: float | None
    drops_s: dict[str, float]
    batch_rows: float | None
    occupancy: float | None


class DeviceRates(msgspec.Struct, frozen=True, kw_only=True):
    """A device between two readings.

    Attributes:
        is_up: whether it answers; else all else is 0.
        seconds: of its time between the readings.
        busy: share of them in which it worked.
        in_flight: batches on it now.
        waiting_rows: rows in line now.
        compiles: programs compiled while serving, since it began; must be 0.
        servables: by name, then unit.
    """

    name: str
    is_up: bool
    seconds: float = 0.0
    busy: float = 0.0
    in_flight: int = 0
    waiting_rows: int = 0
    compiles: int = 0
    servables: tuple[ServableRates, ...] = ()


def rates(before: Samples, after: Samples) -> list[DeviceRates]:
    """What went on between two readings.

    Args:
        before: an earlier reading; empty for all since devices began.
        after: a later one.

    Returns:
        Every device of the later reading, by name.
    """
    old, new = _by_device(before), _by_device(after)
    return [_device(name, old.get(name, {}), new[name]) for name in sorted(new)]


def rates_between(
    name: str, before: DeviceStatistics | None, after: DeviceStatistics
) -> DeviceRates:
    """What went on at one device between two of its own accounts.

    Args:
        name: the actor.
        before: None for all since it began.
        after: a later one of the same process.
    """
    earlier = {} if before is None else samples([DeviceReport(name, before)])
    [found] = rates(earlier, samples([DeviceReport(name, after)]))
    return found


#: Numbers of one device: by name, then by the values of the other labels in order of their names.
_Numbers: TypeAlias = dict[str, dict[_Key, float]]


def _by_device(samples: Samples) -> dict[str, _Numbers]:
    found: dict[str, _Numbers] = {}
    for (name, labels), number in samples.items():
        short = name.removeprefix("shardserve_device_")
        if short == name:
            continue
        named = dict(labels)
        device = named.pop("device", "")
        key = tuple(value for _, value in sorted(named.items()))
        found.setdefault(device, {}).setdefault(short, {})[key] = number
    return found


class _Change:
    """The numbers of one device, and by how much they grew."""

    def __init__(self, before: _Numbers, after: _Numbers) -> None:
        began_anew = _one(after, "uptime_seconds") < _one(before, "uptime_seconds")
        self._before: _Numbers = {} if began_anew else before
        self._after = after

    def now(self, name: str) -> Mapping[_Key, float]:
        return self._after.get(name, {})

    def grown(self, name: str) -> dict[_Key, float]:
        """By the labels' values. What was forgotten meanwhile and came again counts whole."""
        old = self._before.get(name, {})
        return {
            key: number - old.get(key, 0.0) if number >= old.get(key, 0.0) else number
            for key, number in self.now(name).items()
        }


def _one(numbers: _Numbers, name: str) -> float:
    return numbers.get(name, {}).get((), 0.0)


def _device(name: str, before: _Numbers, after: _Numbers) -> DeviceRates:
    if not _one(after, "up"):
        return DeviceRates(name=name, is_up=False)
    change = _Change(before, after)
    seconds = change.grown("uptime_seconds").get((), 0.0)
    busy_s = change.grown("busy_seconds_total").get((), 0.0)
    waiting = change.now("waiting_rows")
    return DeviceRates(
        name=name,
        is_up=True,
        seconds=seconds,
        busy=_share(busy_s, seconds) or 0.0,
        in_flight=int(_one(after, "in_flight_batches")),
        waiting_rows=int(sum(waiting.values())),
        compiles=int(_one(after, "compiles_after_available_total")),
        servables=tuple(_servables(name, change, seconds, busy_s)),
    )


def _servables(
    device: str, change: _Change, seconds: float, busy_s: float
) -> Sequence[ServableRates]:
    ends: dict[_Key, dict[str, float]] = {}
    for (outcome, servable, unit), count in change.grown("requests_total").items():
        ends.setdefault((servable, unit), {})[outcome] = count
    queues = _distributions(change)
    rows = change.grown("servable_rows_total")
    busy = change.grown("servable_busy_seconds_total")
    padding = change.grown("servable_padding_seconds_total")
    units = _units(change)
    found: list[ServableRates] = []
    for pair, outcomes in sorted(ends.items()):
        servable, unit = pair
        queue = queues.get(pair)
        batches, real, slots = units.get(unit, (0.0, 0.0, 0.0))
        answered = outcomes.get("in_time", 0.0) + outcomes.get("late", 0.0)
        wanted = sum(outcomes.get(name, 0.0) for name in _WANTED)
        found.append(
            ServableRates(
                device_name=device,
                servable=servable,
                unit=unit,
                requests_s=_share(answered, seconds) or 0.0,
                rows_s=_share(rows.get(pair, 0.0), seconds) or 0.0,
                waiting_rows=int(change.now("waiting_rows").get(pair, 0)),
                queue_p50_s=None if queue is None else queue.quantile(0.5),
                queue_p99_s=None if queue is None else queue.quantile(0.99),
                device=_share(busy.get(pair, 0.0), seconds) or 0.0,
                share=_share(busy.get(pair, 0.0), busy_s),
                padding=_share(padding.get(pair, 0.0), busy.get(pair, 0.0)),
                attainment=_share(outcomes.get("in_time", 0.0), wanted),
                drops_s={
                    name: outcomes[name] / seconds
                    for name in DROPS
                    if seconds > 0 and outcomes.get(name, 0.0) > 0
                },
                batch_rows=_share(real, batches),
                occupancy=_share(real, slots),
            )
        )
    return found


def _units(change: _Change) -> dict[str, tuple[float, float, float]]:
    """Batches, real rows and room of each unit, over its sizes."""
    found: dict[str, list[float]] = {}
    for place, name in enumerate(("batches_total", "batch_rows_total", "batch_slots_total")):
        for (_, unit), count in change.grown(name).items():
            found.setdefault(unit, [0.0, 0.0, 0.0])[place] += count
    return {unit: (counts[0], counts[1], counts[2]) for unit, counts in found.items()}


def _distributions(change: _Change) -> dict[_Key, Distribution]:
    """Times in line, of those pairs of which any request left the line."""
    buckets: dict[_Key, list[tuple[float, float]]] = {}
    for (bound, servable, unit), count in change.grown("queue_seconds_bucket").items():
        buckets.setdefault((servable, unit), []).append((float(bound), count))
    found: dict[_Key, Distribution] = {}
    for pair, reached in buckets.items():
        reached.sort()
        below = [0.0, *(count for _, count in reached)]
        counts = [round(high - low) for low, high in pairwise(below)]
        if sum(counts) > 0:
            found[pair] = Distribution([bound for bound, _ in reached[:-1]], counts, 0.0)
    return found


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
