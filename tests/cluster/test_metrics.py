"""What Prometheus reads, read back by Prometheus's own parser."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.doors.stats import DoorStats
from cluster.metrics import Metrics
from cluster.router import Router, RouterStats
from tests.cluster.routing_fakes import Bench, VirtualLoop, run_virtually

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(metrics: Metrics, stats: RouterStats | None = None) -> Samples:
    async def run(loop: VirtualLoop) -> bytes:
        router: Router = Bench(loop).router
        if stats is not None:
            router.stats = stats
        await asyncio.sleep(0)
        return metrics.render(router)

    text = run_virtually(run).decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def find(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def test_answers_are_counted_in_buckets_that_add_up() -> None:
    metrics = Metrics()
    latencies = [0.00005, 0.0001, 0.00011, 0.004, 0.004, 29.0, 31.0]
    for latency_s in latencies:
        metrics.of("m", 1).answered(latency_s)
    samples = scrape(metrics)
    name, labels = "serving_request_latency_seconds", {"servable": "m", "version": "1"}
    for bound, count in (("0.0001", 2), ("0.0002", 3), ("0.005", 5), ("30.0", 6), ("+Inf", 7)):
        assert find(samples, f"{name}_bucket", le=bound, **labels) == count
    assert find(samples, f"{name}_count", **labels) == len(latencies)
    assert find(samples, f"{name}_sum", **labels) == pytest.approx(sum(latencies))
    assert find(samples, "serving_requests_total", code="OK", **labels) == len(latencies)


def test_failures_are_counted_by_version_and_code() -> None:
    metrics = Metrics()
    metrics.of("m", 1).failed("UNAVAILABLE")
    metrics.of("m", 1).failed("UNAVAILABLE")
    metrics.of("m", 2).failed("INTERNAL")
    samples = scrape(metrics)
    name = "serving_requests_total"
    assert find(samples, name, servable="m", version="1", code="UNAVAILABLE") == 2
    assert find(samples, name, servable="m", version="2", code="INTERNAL") == 1
    assert find(samples, name, servable="m", version="2", code="OK") == 0


def test_errors_and_refusals_of_the_door_are_counted() -> None:
    metrics = Metrics()
    for _ in range(3):
        metrics.failed("NOT_FOUND")
    metrics.refused(413)
    samples = scrape(metrics)
    assert find(samples, "serving_errors_total", code="NOT_FOUND") == 3
    assert find(samples, "serving_refused_total", status="413") == 1


def test_every_count_of_the_router_is_there() -> None:
    names = [name for name in RouterStats.__struct_fields__ if name != "missing_by"]
    values = {name: float(at) for at, name in enumerate(names, start=1)}
    stats = RouterStats(**{name: int(value) for name, value in values.items()})  # type: ignore[arg-type]
    stats.missing_by["ranker", "users"] = 7
    samples = scrape(Metrics(), stats)
    assert find(samples, "serving_table_missing_rows_total", servable="ranker", table="users") == 7
    for name, value in values.items():
        assert find(samples, f"serving_router_{name}_total") == value
    assert find(samples, "serving_in_flight") == 0
    assert find(samples, "serving_epoch") == 0


def test_names_are_escaped() -> None:
    metrics = Metrics()
    name = 'a"b\\c\nd'
    metrics.of(name, 1).answered(0.1)
    samples = scrape(metrics)
    assert find(samples, "serving_requests_total", servable=name, version="1", code="OK") == 1


def test_the_version_that_was_asked_for_the_longest_ago_is_dropped_at_the_bound() -> None:
    metrics = Metrics(versions_max=2)
    metrics.of("m", 1).answered(0.1)
    metrics.of("m", 2).answered(0.1)
    metrics.of("m", 1)
    metrics.of("m", 3).answered(0.1)
    samples = scrape(metrics)
    versions = {
        dict(labels)["version"] for name, labels in samples if name == "serving_requests_total"
    }
    assert versions == {"1", "3"}


def test_counts_of_one_version_stay_together() -> None:
    metrics = Metrics()
    first = metrics.of("m", 1)
    assert metrics.of("m", 1) is first
    assert metrics.of("m", 2) is not first


def test_scrapes_take_a_twentieth_of_the_time_at_most() -> None:
    metrics = Metrics()
    now = 10.0

    async def run(loop: VirtualLoop) -> None:
        nonlocal now
        router: Router = Bench(loop).router
        await asyncio.sleep(0)
        ticks = iter([0.0, 0.0, 0.002])

        def clock() -> float:
            return now + next(ticks, 0.0)

        told: list[bytes] = []

        def scrape() -> bytes:
            metrics.scrape(router, clock, lambda then: then(), told.append)
            return told[-1]

        first = scrape()
        metrics.failed("NOT_FOUND")
        now += 0.035
        assert scrape() is first
        now += 0.006
        assert b"NOT_FOUND" in scrape()

    run_virtually(run)


def test_requests_pass_while_many_versions_are_printed() -> None:
    metrics = Metrics()
    for number in range(1, 41):
        metrics.of("m", number).answered(0.1)

    async def run(loop: VirtualLoop) -> None:
        router: Router = Bench(loop).router
        await asyncio.sleep(0)
        ticks = itertools.count(step=0.0001)
        turns: list[Callable[[], None]] = []
        told: list[bytes] = []
        for _ in range(2):
            metrics.scrape(router, lambda: next(ticks), turns.append, told.append)
        taken = 0
        while turns:
            assert told == []
            metrics.of("m", 100 + taken).failed("UNAVAILABLE")
            turns.pop(0)()
            taken += 1
        assert taken > 10
        [first, second] = told
        assert first is second
        assert first.count(b"serving_requests_total{") == 40

    run_virtually(run)


def test_counts_of_the_door_are_there() -> None:
    metrics = Metrics()
    metrics.door.open = 7
    metrics.door.timed_out_head = 3
    samples = scrape(metrics)
    assert find(samples, "serving_door_open") == 7
    assert find(samples, "serving_door_timed_out_head_total") == 3
    for name in set(DoorStats.__struct_fields__) - {"open"}:
        assert find(samples, f"serving_door_{name}_total") >= 0
