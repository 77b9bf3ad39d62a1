"""What the benches of scheduling make of their rounds: rates, ratios, tables, samples."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from batching import LaneKey
from batching.simulation import Arrival
from bench import isolation, overhead, overload, predictability
from bench.contest import (
    Contest,
    Entry,
    Measured,
    plot_of,
    rate_within,
    samples_of,
)
from bench.device_actor import AIMD, Count, Counts, UsePolicy
from bench.open_loop import Outcome, OwnerOutcome
from bench.report import Figure, json_line

COSTS = {1: 0.004, 2: 0.005, 4: 0.006, 8: 0.008, 16: 0.012}
TOLD: Mapping[str, Figure] = {"machine": "of the test"}


def owner(offered: int, good: int, ms: Sequence[float] = (1.0,)) -> OwnerOutcome:
    return OwnerOutcome(
        offered=offered, good=good, latencies_s=np.array(ms) / 1e3, errors={"RESOURCE_EXHAUSTED": 1}
    )


def outcome(seconds: float = 1.0, **owners: OwnerOutcome) -> Outcome:
    return Outcome(seconds=seconds, owners=owners, behind_s=0.001)


class Scene:
    """In a device's place: counts, and answers nothing."""

    def __init__(self) -> None:
        self.used: list[str] = []
        self._runs = 0

    def use(self, policy: UsePolicy) -> None:
        self.used.append(policy.name)

    def counts(self) -> Counts:
        self._runs += 1
        lane = Count(self._runs, 3 * self._runs, 0, 0.0, 0, {}, {})
        return Counts({"m": lane}, 0.001 * self._runs, 0.0, 0, frames=0)

    async def offer(self, arrivals: Sequence[Arrival], *, warm_s: float) -> Outcome:
        return outcome(m=owner(len(arrivals), 1))


def contest_of(*entries: tuple[str, str, int, Outcome]) -> Contest:
    found = Contest(Scene(), 0)  # type: ignore[arg-type]
    found.entries = [
        Entry(round=number, place=0, workload=workload, contender=contender, outcome=each)
        for workload, contender, number, each in entries
    ]
    return found


def test_every_contender_runs_once_a_round_in_an_order_that_changes() -> None:
    scene = Scene()
    contest = Contest(scene, 0)  # type: ignore[arg-type]
    arrivals = [Arrival(0.0, LaneKey("m"), "m")] * 4
    runs = [("w", name, UsePolicy(name), arrivals) for name in ("effsafe", "edf", "fifo")]

    async def rounds() -> None:
        for number in range(6):
            await contest.round(number, runs, 0.0)

    asyncio.run(rounds())
    orders = [tuple(scene.used[at : at + 3]) for at in range(0, 18, 3)]
    assert {tuple(sorted(order)) for order in orders} == {("edf", "effsafe", "fifo")}
    assert len(set(orders)) > 1
    assert contest.entries[0].batch_rows == 3.0
    assert contest.entries[0].loop_us == pytest.approx(0.001 / 4 * 1e6)
    assert [entry.place for entry in contest.entries[:3]] == [0, 1, 2]


def test_lanes_in_turn_are_served_in_time_when_two_turns_fit() -> None:
    """Theory: b* = (slo / 2K - alpha) / beta, and the rate is b* over what such a batch takes."""
    alpha, beta, lanes, slo = 0.004, 0.00025, 8, 0.1
    costs = {size: alpha + beta * size for size in (1, 2, 4, 8, 16, 32, 64)}
    best = (slo / (2 * lanes) - alpha) / beta
    assert rate_within(costs, lanes, slo) == pytest.approx(best / (alpha + beta * best))
    assert rate_within(costs, 1, 9.0) == pytest.approx(64 / costs[64])
    assert rate_within(costs, 16, 0.1) == 0.0


def test_ratios_are_taken_within_rounds() -> None:
    entries = contest_of(
        ("w", "a", 1, outcome(m=owner(10, 8))),
        ("w", "a", 0, outcome(m=owner(10, 4))),
        ("w", "b", 0, outcome(m=owner(10, 2))),
        ("w", "b", 1, outcome(m=owner(10, 4))),
    ).entries
    measured = Measured(entries, 0)
    ours = measured.figures("w", "a", lambda found: found.goodput)
    theirs = measured.figures("w", "b", lambda found: found.goodput)
    assert (ours, theirs) == ([4.0, 8.0], [2.0, 4.0])
    ratio = measured.ratio(ours, theirs)
    assert (ratio.value, ratio.low, ratio.high) == (2.0, 2.0, 2.0)


def test_all_that_was_counted_and_every_latency_is_kept() -> None:
    entries = contest_of(("w", "a", 0, outcome(m=owner(5, 3, (1.0, 1.04, 2.0))))).entries
    samples = samples_of(entries)
    assert samples["runs"].rows == [("w", "a", 0, 0, "m", 5, 3, "RESOURCE_EXHAUSTED:1", 1.0)]
    assert samples["latencies"].rows == [("w", "a", 0, "m", 1.0, 2), ("w", "a", 0, "m", 2.0, 1)]


def test_a_plot_counts_those_that_were_not_answered() -> None:
    entries = contest_of(("w", "a", 0, outcome(m=owner(10, 5, (1.0,) * 5)))).entries
    [series] = plot_of(entries, "title", "w").series
    assert max(series.y) < 50.0


def told(result: Any) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(json_line(result))
    return read


def test_overload_divides_by_at_least_one_answer() -> None:
    runs = [
        (workload, contender, number, outcome(2.0, m=owner(2000, good)))
        for number in range(3)
        for workload in ("1.1x", "1.5x")
        for contender, good in (("effsafe", 1800), ("fifo", 0), ("shrink", 500))
    ]
    result = overload._result(contest_of(*runs), [1000.0] * 3, 0.05, TOLD, 0)
    assert result.ratios["goodput_1_1x_vs_capacity"] == pytest.approx(0.9)
    assert result.ratios["goodput_1_1x_vs_fifo"] == 1800
    assert result.ratios["shrink_goodput_1_1x_vs_capacity"] == pytest.approx(0.25)
    assert told(result)["figures"]["intervals"]["goodput_1_1x_vs_capacity"] == [0.9, 0.9]


def test_isolation_tells_victims_and_flooder_apart() -> None:
    def flood(good: int, flooder: int) -> Outcome:
        return outcome(2.0, a=owner(100, good), b=owner(100, 100), c=owner(9000, flooder))

    runs = [
        ("flood", name, number, flood(98 if name == "effsafe" else 90, 3000 // (place + 1)))
        for number in range(3)
        for place, name in enumerate(isolation.POLICIES)
    ]
    quiet = [("no flood", "effsafe", number, flood(100, 90)) for number in range(3)]
    result = isolation._result(contest_of(*runs, *quiet), "c", TOLD, 0)
    assert result.ratios == {
        "victim_attainment": 0.99,
        "flooder_goodput_vs_round_robin": pytest.approx(2.0),
    }
    assert result.figures["worst_victim_attainment"] == 0.98
    assert result.figures["victim_attainment_no_flood"] == 1.0


def test_a_flood_begins_when_it_should_and_is_a_hundred_times_as_much() -> None:
    arrivals = isolation.workload(["a", "b"], 50.0, 0.1, 0, quiet_s=2.0, flood_s=2.0)
    assert [each.at for each in arrivals] == sorted(each.at for each in arrivals)
    quiet = [each for each in arrivals if each.at < 2.0]
    later = [each for each in arrivals if each.at >= 2.0]
    assert sum(each.owner == "b" for each in quiet) == pytest.approx(100, rel=0.3)
    assert sum(each.owner == "a" for each in later) == pytest.approx(100, rel=0.3)
    assert sum(each.owner == "b" for each in later) == pytest.approx(10_000, rel=0.05)
    assert not isolation.workload(["a"], 1.0, 0.1, 0, quiet_s=0.01, flood_s=0.0)


def test_predictability_divides_violations_and_by_at_least_one_request() -> None:
    assert predictability.violations(outcome(m=owner(10, 9))) == pytest.approx(0.1)
    assert predictability.violations_to_divide_by(outcome(m=owner(10, 10))) == 0.1
    runs = [
        ("70 %", contender, number, outcome(m=owner(1000, good)))
        for number in range(3)
        for contender, good in (("effsafe", 999), (AIMD, 980), ("edf", 1000))
    ]
    result = predictability._result(contest_of(*runs), TOLD, 0)
    assert result.ratios == {"violations_vs_aimd": pytest.approx(0.05)}
    assert result.figures["p99_9_ms"] == 1.0


def test_overhead_is_paired_by_round_and_counts_the_dearer_picks() -> None:
    picks = {0.9: [np.array([10.0, 30.0, 20.0])], 1.2: [np.array([40.0, 50.0, 60.0])]}
    result = overhead._result([90.0, 190.0], [100.0, 200.0], [5.0, 7.0], picks, TOLD, 0)
    assert result.ratios["throughput_vs_bare_loop"] == pytest.approx(0.925)
    assert result.ratios["pick_16_lanes_us"] == 50.0
    assert result.figures["loop_us_a_row"] == 6.0


def test_only_picks_among_sixteen_lanes_are_timed() -> None:
    seconds = overhead.time_picks(1.2, 0.1, 0)
    assert seconds
    assert all(0 < each < 1 for each in seconds)
