"""What device actors count, as Prometheus reads it: names, labels, and the text.

`FAMILIES` is the whole list; the README's table is held against it. Numbers are the actors' own
(`shards.figures`); their rows are bounded there, so the number of series is, too. Of an actor that
does not answer nothing is told but that it is down: old numbers would look like news.

Does not know how actors are asked, nor who reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Final, Literal, NamedTuple, TypeAlias

from batching.telemetry import ERROR_BOUNDS, TIME_BOUNDS
from shards.figures import DeviceStatistics, Spread

__all__ = ["FAMILIES", "OUTCOMES", "DeviceReport", "Family", "Series", "samples", "texts"]

#: Name and labels of one number.
Series: TypeAlias = tuple[str, frozenset[tuple[str, str]]]
_Read: TypeAlias = Callable[
    [DeviceStatistics], Iterable[tuple[tuple[str, ...], "int | float | Spread"]]
]

#: So much of a unit's id tells it apart.
_UNIT_CHARS: Final = 12
#: Lines that are made at once; each takes some 3 us.
_PIECE_LINES: Final = 200
#: How a request may end at a device: fields of `ServableStatistics`.
OUTCOMES: Final = (
    "in_time", "late", "failed", "expired", "shed_hopeless", "shed_dropped", "shed_evicted",
    "cancelled", "refused_full", "refused_admission", "refused_late", "refused_other",
)  # fmt: skip
_CELLS: Final = ("useful", "batch_padding", "length_padding")


class DeviceReport(NamedTuple):
    """What is known of an actor; None while it does not answer."""

    actor: str
    statistics: DeviceStatistics | None


class Family(NamedTuple):
    """One metric.

    Attributes:
        labels: after ``device``, which every family has.
        read: values of the labels, and the number that is theirs.
        bounds: of a histogram's buckets.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    text: str
    labels: tuple[str, ...]
    read: _Read
    bounds: tuple[float, ...] = ()


def _of_device(field: str) -> _Read:
    return lambda found: [((), getattr(found, field))]


def _of_units(field: str) -> _Read:
    return lambda found: [
        ((each.unit[:_UNIT_CHARS],), getattr(each, field)) for each in found.units
    ]


def _of_buckets(field: str) -> _Read:
    return lambda found: [
        ((unit.unit[:_UNIT_CHARS], each.bucket), getattr(each, field))
        for unit in found.units
        for each in unit.buckets
    ]


def _of_servables(field: str) -> _Read:
    return lambda found: [
        ((each.servable, each.unit[:_UNIT_CHARS]), getattr(each, field)) for each in found.servables
    ]


def _launches(found: DeviceStatistics) -> Iterator[tuple[tuple[str, ...], int]]:
    for depth, launches in enumerate(found.depths, start=1):
        yield (str(depth),), launches


def _shares(found: DeviceStatistics) -> Iterator[tuple[tuple[str, ...], float]]:
    for servable, seconds in found.shares.items():
        yield (servable,), seconds


def _cells(found: DeviceStatistics) -> Iterator[tuple[tuple[str, ...], int]]:
    for unit in found.units:
        for kind in _CELLS:
            yield (unit.unit[:_UNIT_CHARS], kind), getattr(unit, f"{kind}_cells")


def _requests(found: DeviceStatistics) -> Iterator[tuple[tuple[str, ...], int]]:
    for each in found.servables:
        for outcome in OUTCOMES:
            yield (each.servable, each.unit[:_UNIT_CHARS], outcome), getattr(each, outcome)


_UNIT: Final = ("unit",)
_BUCKET: Final = ("unit", "bucket")
_PAIR: Final = ("servable", "unit")

_UP: Final = Family(
    "shardserve_device_up", "gauge", "Whether the actor answers.", (), lambda found: [((), 1)]
)
FAMILIES: Final[tuple[Family, ...]] = (
    _UP,
    Family("shardserve_device_uptime_seconds", "gauge",
           "Since the actor began.", (), _of_device("up_s")),
    Family("shardserve_device_busy_seconds_total", "counter",
           "Time in which the device worked.", (), _of_device("busy_s")),
    Family("shardserve_device_in_flight_batches", "gauge",
           "Batches on the device.", (), _of_device("in_flight")),
    Family("shardserve_device_launches_total", "counter",
           "Batches launched, by how many were then in flight.", ("depth",), _launches),
    Family("shardserve_device_sampled_decisions_total", "counter",
           "Decisions of the scheduler that were timed.", (), _of_device("decisions")),
    Family("shardserve_device_sampled_decision_seconds_total", "counter",
           "Processor time of these.", (), _of_device("decision_s")),
    Family("shardserve_device_compiles_after_available_total", "counter",
           "Programs compiled while serving; must stay 0.", (),
           _of_device("compiles_after_available")),
    Family("shardserve_device_compiles_for_loads_total", "counter",
           "Programs compiled in loads.", (), _of_device("compiles_for_loads")),
    Family("shardserve_device_staging_bytes", "gauge",
           "Memory in which batches are laid out.", (), _of_device("staging_bytes")),
    Family("shardserve_device_virtual_seconds", "gauge",
           "Virtual time: the device time that a servable has had, by its weight.", ("servable",),
           _shares),
    Family("shardserve_device_waiting_requests", "gauge",
           "Requests with rows in line.", _PAIR, _of_servables("waiting")),
    Family("shardserve_device_waiting_rows", "gauge",
           "Rows in line.", _PAIR, _of_servables("waiting_rows")),
    Family("shardserve_device_accepted_requests_total", "counter",
           "Requests taken into line.", _PAIR, _of_servables("accepted")),
    Family("shardserve_device_requests_total", "counter",
           "Requests that ended or were refused, by how.", (*_PAIR, "outcome"), _requests),
    Family("shardserve_device_servable_rows_total", "counter",
           "Real rows that came back from the device.", _PAIR, _of_servables("rows")),
    Family("shardserve_device_servable_busy_seconds_total", "counter",
           "Device time of a servable's rows, its part of the padding included.", _PAIR,
           _of_servables("busy_s")),
    Family("shardserve_device_servable_padding_seconds_total", "counter",
           "Of this, the padding.", _PAIR, _of_servables("padding_s")),
    Family("shardserve_device_queue_seconds", "histogram",
           "From a request taken into line to the last of its rows in a batch.", _PAIR,
           _of_servables("queue"), TIME_BOUNDS),
    Family("shardserve_device_batch_wait_seconds", "histogram",
           "From a batch formed until the device began with it.", _UNIT, _of_units("wait"),
           TIME_BOUNDS),
    Family("shardserve_device_batch_seconds", "histogram",
           "From then until its outputs were back.", _UNIT, _of_units("device"), TIME_BOUNDS),
    Family("shardserve_device_batch_host_seconds", "histogram",
           "Laying a batch out, and sending its rows back.", _UNIT, _of_units("host"),
           TIME_BOUNDS),
    Family("shardserve_device_estimate_error_ratio", "histogram",
           "How far the estimate of a batch was off, as a share of what it took.", _UNIT,
           _of_units("error"), ERROR_BOUNDS),
    Family("shardserve_device_cells_total", "counter",
           "Cells of batches: useful, or padding of either kind.", (*_UNIT, "kind"), _cells),
    Family("shardserve_device_bisections_total", "counter",
           "Failed batches that were tried again in halves.", _UNIT, _of_units("bisections")),
    Family("shardserve_device_executables", "gauge",
           "Compiled programs held.", _UNIT, _of_units("executables")),
    Family("shardserve_device_load_seconds", "gauge",
           "What loading took, compiling and warming up included.", _UNIT, _of_units("load_s")),
    Family("shardserve_device_batches_total", "counter",
           "Batches that came back.", _BUCKET, _of_buckets("batches")),
    Family("shardserve_device_batch_rows_total", "counter",
           "Real rows in them.", _BUCKET, _of_buckets("rows")),
    Family("shardserve_device_batch_slots_total", "counter",
           "Rows that they had room for.", _BUCKET, _of_buckets("slots")),
    Family("shardserve_device_estimate_seconds", "gauge",
           "What the next batch of this size is expected to take at most.", _BUCKET,
           _of_buckets("estimate_s")),
)  # fmt: skip


def texts(reports: Sequence[DeviceReport]) -> Iterator[str]:
    """What Prometheus reads, in pieces of half a millisecond's work."""
    lines: list[str] = []
    for family in FAMILIES:
        is_first = True
        for name, labels, number in _samples(family, reports):
            if is_first:
                lines.append(f"# HELP {family.name} {family.text}\n")
                lines.append(f"# TYPE {family.name} {family.kind}\n")
                is_first = False
            told = ",".join([f'{label}="{_escaped(value)}"' for label, value in labels])
            lines.append(f"{name}{{{told}}} {number}\n")
            if len(lines) >= _PIECE_LINES:
                yield "".join(lines)
                lines.clear()
    yield "".join(lines)


def samples(reports: Sequence[DeviceReport]) -> dict[Series, float]:
    """The same numbers as a reader of the text has them."""
    return {
        (name, frozenset(labels)): float(number)
        for family in FAMILIES
        for name, labels, number in _samples(family, reports)
    }


def _samples(
    family: Family, reports: Sequence[DeviceReport]
) -> Iterator[tuple[str, list[tuple[str, str]], float]]:
    name = family.name
    for actor, statistics in reports:
        if statistics is None:
            if family is _UP:
                yield name, [("device", actor)], 0
            continue
        for values, found in family.read(statistics):
            labels = [("device", actor), *zip(family.labels, values, strict=True)]
            if not isinstance(found, Spread):
                yield name, labels, found
                continue
            bounds = [*map(str, family.bounds), "+Inf"]
            for bound, count in zip(bounds, accumulate(found.counts), strict=True):
                yield f"{name}_bucket", [*labels, ("le", bound)], count
            yield f"{name}_count", labels, sum(found.counts)
            yield f"{name}_sum", labels, found.total


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
