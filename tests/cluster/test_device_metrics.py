"""What devices count, as Prometheus's own parser reads it."""

from __future__ import annotations

import re
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from batching.telemetry import ERROR_BOUNDS, TIME_BOUNDS
from cluster.device_metrics import FAMILIES, OUTCOMES, DeviceReport, samples, texts
from shards.figures import (
    BucketStatistics,
    DeviceStatistics,
    ServableStatistics,
    Spread,
    UnitStatistics,
)
from tests.test_tidy import ROOT

UNIT = "0123456789abcdef"
QUEUE = Spread(counts=(0, 2, 1, *[0] * (len(TIME_BOUNDS) - 2)), total=0.25)
NONE = Spread(counts=(0,) * (len(TIME_BOUNDS) + 1), total=0.0)
NO_ERROR = Spread(counts=(0,) * (len(ERROR_BOUNDS) + 1), total=0.0)


def servable(name: str = "m", **changes: Any) -> ServableStatistics:
    values: dict[str, Any] = dict.fromkeys(OUTCOMES, 0)
    values |= {
        "servable": name, "unit": UNIT, "waiting": 2, "waiting_rows": 5, "accepted": 9,
        "rows": 30, "busy_s": 1.5, "padding_s": 0.5, "queue": QUEUE,
    }  # fmt: skip
    return ServableStatistics(**(values | changes))


def unit(**changes: Any) -> UnitStatistics:
    values: dict[str, Any] = {
        "unit": UNIT, "executables": 3, "load_s": 2.5, "in_flight": 1, "bisections": 1,
        "useful_cells": 30, "batch_padding_cells": 8, "length_padding_cells": 2, "wait": NONE,
        "device": NONE, "host": NONE, "error": NO_ERROR,
        "buckets": (BucketStatistics(bucket="8", batches=4, rows=30, slots=32, estimate_s=0.5),),
    }  # fmt: skip
    return UnitStatistics(**(values | changes))


def device(**changes: Any) -> DeviceStatistics:
    values: dict[str, Any] = {
        "up_s": 100.0, "busy_s": 2.0, "in_flight": 1, "depths": (3, 1), "decisions": 5,
        "decision_s": 0.001, "compiles_after_available": 0, "compiles_for_loads": 2,
        "staging_bytes": 4096,
        "shares": {"m": 1.25}, "servables": (servable(),), "units": (unit(),),
    }  # fmt: skip
    return DeviceStatistics(**(values | changes))


def text(*reports: DeviceReport) -> str:
    return "".join(texts(reports))


def parsed(written: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(written)
        for sample in family.samples
    }


def test_prometheus_reads_what_was_told_and_every_family_has_its_kind() -> None:
    reports = [DeviceReport("device-0", device()), DeviceReport("device-1", device())]
    written = text(*reports)
    assert parsed(written) == samples(reports)
    kinds = {family.name: family.type for family in text_string_to_metric_families(written)}
    assert kinds == {family.name.removesuffix("_total"): family.kind for family in FAMILIES}


def test_names_follow_the_conventions() -> None:
    for family in FAMILIES:
        assert family.name.startswith("shardserve_device_")
        assert (family.kind == "counter") == family.name.endswith("_total"), family.name
        if family.kind == "histogram":
            assert family.name.endswith(("_seconds", "_ratio")), family.name
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


def test_histograms_add_up() -> None:
    found = samples([DeviceReport("device-0", device())])
    pair = {("device", "device-0"), ("servable", "m"), ("unit", UNIT[:12])}
    name = "shardserve_device_queue_seconds"
    for bound, count in (
        (TIME_BOUNDS[0], 0),
        (TIME_BOUNDS[1], 2),
        (TIME_BOUNDS[2], 3),
        ("+Inf", 3),
    ):
        assert found[f"{name}_bucket", frozenset(pair | {("le", str(bound))})] == count
    assert found[f"{name}_count", frozenset(pair)] == 3
    assert found[f"{name}_sum", frozenset(pair)] == 0.25


def test_requests_are_told_by_outcome() -> None:
    counts: dict[str, Any] = {name: at for at, name in enumerate(OUTCOMES, 1)}
    told = device(servables=(servable(**counts),))
    found = samples([DeviceReport("device-0", told)])
    for at, name in enumerate(OUTCOMES, 1):
        labels = {("device", "device-0"), ("servable", "m"), ("unit", UNIT[:12]), ("outcome", name)}
        assert found["shardserve_device_requests_total", frozenset(labels)] == at


def test_of_an_actor_that_does_not_answer_is_told_that_it_is_down_and_nothing_else() -> None:
    found = samples([DeviceReport("device-0", None), DeviceReport("device-1", device())])
    of_first = {name: value for (name, labels), value in found.items()
                if ("device", "device-0") in labels}  # fmt: skip
    assert of_first == {"shardserve_device_up": 0}
    assert found["shardserve_device_up", frozenset({("device", "device-1")})] == 1


def test_names_of_servables_are_escaped() -> None:
    name = 'a"b\\c\nd'
    reports = [DeviceReport("device-0", device(servables=(servable(name),)))]
    assert parsed(text(*reports)) == samples(reports)


def test_the_readme_lists_every_metric_with_its_labels() -> None:
    rows = re.findall(
        r"^\| `(shardserve_device_\w+)` \| (\w+) \| ([^|]*) \|",
        (ROOT / "README.md").read_text(),
        re.M,
    )
    listed = {name: (kind, tuple(re.findall(r"\w+", labels))) for name, kind, labels in rows}
    assert listed == {family.name: (family.kind, family.labels) for family in FAMILIES}
