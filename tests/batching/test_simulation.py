"""The scheduler in virtual time: what the policies are worth, on costs and loads that are known.

The shapes are those of the design's measurements: a batch of b rows takes 4 + b/4 ms.
"""

from __future__ import annotations

import functools
import itertools
from math import floor, inf

import pytest

from batching import (
    EarliestDeadline,
    EffSafe,
    FairShare,
    FirstCome,
    Ladder,
    LaneKey,
    Policy,
    RoundRobin,
)
from batching.allowance import CRITICAL, DEFAULT, SHEDDABLE
from batching.errors import InvalidArgument
from batching.simulation import Arrival, Report, SimulatedLane, simulate
from batching.workloads import (
    bursting,
    gamma,
    maf_style,
    merged,
    paced,
    poisson,
    power_law,
    sampled,
    switching,
    trace,
    with_criticalities,
    with_lengths,
)

SLO_S = 0.050


def cost(key: LaneKey, bucket: int) -> float:
    return (4.0 + bucket / 4.0) / 1000


def lane(name: str, largest: int = 1024) -> SimulatedLane:
    sizes = [1 << power for power in range(largest.bit_length())]
    return SimulatedLane(key=LaneKey(name), ladder=Ladder(sizes))


def overloaded(policy: Policy, rate: float = 3500.0) -> Report:
    load = poisson(LaneKey("a"), "a", rate, 4.0, budget_s=SLO_S, seed=1)
    return simulate(policy, [lane("a")], load, cost, in_flight_max=1)


@functools.cache
def flooded(name: str, faster: float = 1.0, credit_s: float | None = None) -> Report:
    """Seven servables of 60 requests a second each, and one of 6,000; or all that much faster."""
    policies: dict[str, Policy] = {
        "effsafe": EffSafe(),
        "edf": EarliestDeadline(),
        "rr": RoundRobin(early_drop=True),
        "fair": FairShare(),
    }
    lanes = [lane(f"m{number}", 64) for number in range(8)]
    loads = [
        poisson(
            each.key,
            each.key.unit,
            faster * (6000.0 if number == 7 else 60.0),
            6.0 / faster,
            budget_s=0.1 / faster,
            seed=2,
        )
        for number, each in enumerate(lanes)
    ]
    return simulate(
        policies[name],
        lanes,
        merged(*loads),
        lambda key, bucket: cost(key, bucket) / faster,
        in_flight_max=1,
        credit_s=credit_s,
    )


def victims(report: Report) -> float:
    of = [outcome for owner, outcome in report.owners.items() if owner != "m7"]
    return sum(each.good for each in of) / sum(each.offered for each in of)


def test_every_request_ends_once() -> None:
    for outcome in flooded("effsafe").owners.values():
        ends = outcome.good + outcome.late + outcome.refused + outcome.expired + outcome.shed
        assert ends == outcome.offered
        assert len(outcome.latencies_s) == outcome.good + outcome.late


def test_the_same_seed_gives_the_same_run() -> None:
    def run() -> Report:
        load = gamma(LaneKey("a"), "a", 800.0, 1.0, cv=3.0, budget_s=SLO_S, seed=7)
        return simulate(EffSafe(), [lane("a")], load, cost, noise=0.2, seed=7)

    assert run() == run()


def test_at_overload_early_drop_answers_several_times_what_arrival_order_does() -> None:
    fifo = overloaded(FirstCome(early_drop=False)).goodput
    assert overloaded(EffSafe()).goodput > 3 * fifo


def test_at_overload_most_of_the_capacity_is_goodput() -> None:
    """At most 2 x SLO / 3 of a batch's time is its own: 50 ms hold two batches of 25 ms."""
    best_batch = 64  # 20 ms: the largest size of which two fit into the SLO
    capacity = best_batch / cost(LaneKey("a"), best_batch)
    assert overloaded(EffSafe(), 5000.0).goodput > 0.9 * capacity


def test_under_a_flood_the_others_are_in_time() -> None:
    assert victims(flooded("effsafe")) >= 0.99


def test_the_credit_suits_a_device_of_any_speed() -> None:
    """Time is all that differs; a credit in seconds that suits one device fails another."""
    assert victims(flooded("effsafe", 20.0)) >= 0.99
    assert victims(flooded("effsafe", 20.0, credit_s=0.1)) < 0.75


def test_under_a_flood_deadline_order_fails_the_others() -> None:
    assert victims(flooded("edf")) < 0.95


def test_the_flooder_gets_more_than_round_robin_or_fair_share_leave_it() -> None:
    flooder = {name: flooded(name).owners["m7"].good for name in ("effsafe", "rr", "fair")}
    assert flooder["effsafe"] > 1.2 * flooder["rr"]
    assert flooder["rr"] > 2 * flooder["fair"]


def test_bursts_within_capacity_are_kept_as_well_as_by_deadline() -> None:
    """Who bursts is out of share for a while; that must cost nothing where there is room."""

    def good(policy: Policy) -> int:
        lanes = [lane(f"m{number}") for number in range(16)]
        loads = [
            gamma(each.key, each.key.unit, 140.0, 4.0, cv=4.0, budget_s=0.25, seed=1)
            for each in lanes
        ]
        report = simulate(policy, lanes, merged(*loads), cost)
        return sum(outcome.good for outcome in report.owners.values())

    assert good(EffSafe()) >= good(EarliestDeadline())


@pytest.mark.parametrize(("count", "slo"), [(1, 0.03), (2, 0.06), (4, 0.1), (8, 0.2)])
def test_saturated_lanes_in_turn_reach_the_rate_that_theory_gives(count: int, slo: float) -> None:
    """K lanes, cycle C = K (alpha + beta b): a row waits at most two cycles, so 2 C <= SLO."""
    alpha, beta = 0.004, 0.00025
    batch = floor((slo / (2 * count) - alpha) / beta)
    expected = count * batch / (count * (alpha + beta * batch))
    lanes = [
        SimulatedLane(key=LaneKey(f"m{n}"), ladder=Ladder(range(1, batch + 1)))
        for n in range(count)
    ]
    rate = 1.3 * expected / count
    loads = [poisson(each.key, each.key.unit, rate, 3.0, budget_s=slo, seed=3) for each in lanes]
    report = simulate(RoundRobin(early_drop=True), lanes, merged(*loads), cost, in_flight_max=1)
    assert report.goodput == pytest.approx(expected, rel=0.1)


def test_servables_that_share_a_unit_reach_what_apart_they_cannot() -> None:
    """Eight batches take turns, or one batch holds the rows of all eight."""

    def goodput(names: list[str]) -> float:
        lanes = [lane(name, 256) for name in dict.fromkeys(names)]
        loads = [
            poisson(LaneKey(name), f"m{n}", 450.0, 2.0, budget_s=SLO_S, seed=4)
            for n, name in enumerate(names)
        ]
        return simulate(EffSafe(), lanes, merged(*loads), cost, in_flight_max=1).goodput

    assert goodput(["trunk"] * 8) > 1.5 * goodput([f"m{n}" for n in range(8)])


def test_in_a_shared_lane_a_flooder_does_not_crowd_others_out() -> None:
    loads = [
        poisson(LaneKey("trunk"), f"m{n}", 9000.0 if n == 3 else 50.0, 3.0, budget_s=0.1, seed=5)
        for n in range(4)
    ]
    report = simulate(EffSafe(), [lane("trunk", 64)], merged(*loads), cost, in_flight_max=1)
    for number in range(3):
        assert report.owners[f"m{number}"].attainment >= 0.99


def test_a_lane_that_was_slow_once_is_not_given_up_for_good() -> None:
    """One batch takes so long that by its estimate no row is in time: it is tried again."""
    began: list[float] = []

    def stalls_once(key: LaneKey, bucket: int) -> float:
        began.append(1.0)
        return 0.5 if len(began) == 20 else 0.010

    one = SimulatedLane(key=LaneKey("a"), ladder=Ladder((1,)))
    load = poisson(one.key, "a", 20.0, 60.0, budget_s=0.022, seed=6)
    report = simulate(EffSafe(), [one], load, stalls_once)
    assert report.owners["a"].attainment > 0.85


def test_percentiles_and_attainment_are_of_what_happened() -> None:
    load = [Arrival(0.0, LaneKey("a"), "a", budget_s=1.0), Arrival(0.0, LaneKey("a"), "b", 2)]
    report = simulate(EffSafe(), [lane("a")], load, lambda key, bucket: 0.5)
    assert report.owners["a"].attainment == 1.0
    assert report.owners["a"].percentile(50) == 0.5
    assert (report.batches, report.rows) == (2, 3)


def test_arrivals_out_of_order_or_of_nowhere_are_refused() -> None:
    backwards = [Arrival(1.0, LaneKey("a"), "a"), Arrival(0.5, LaneKey("a"), "a")]
    with pytest.raises(InvalidArgument, match=r"0\.5 comes after one at 1"):
        simulate(EffSafe(), [lane("a")], backwards, cost)
    with pytest.raises(InvalidArgument, match="there is no lane"):
        simulate(EffSafe(), [lane("a")], [Arrival(0.0, LaneKey("b"), "b")], cost)


# Workloads


@pytest.mark.parametrize("cv", [1.0, 4.0])
def test_bursts_have_the_rate_and_the_spread_that_were_asked_for(cv: float) -> None:
    at = [each.at for each in gamma(LaneKey("a"), "a", 200.0, 400.0, cv=cv, seed=1)]
    gaps = [after - before for before, after in itertools.pairwise(at)]
    mean = sum(gaps) / len(gaps)
    spread = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(1 / 200, rel=0.1)
    assert spread / mean == pytest.approx(cv, rel=0.1)


def test_a_power_law_adds_up_and_falls() -> None:
    rates = power_law(100.0, 5)
    assert sum(rates) == pytest.approx(100.0)
    assert rates[0] / rates[4] == pytest.approx(5.0)


def test_sizes_are_drawn_as_often_as_they_were_counted() -> None:
    drawn = sampled({1: 3, 9: 1}, 4000, seed=1)
    assert drawn.count(1) / len(drawn) == pytest.approx(0.75, abs=0.03)


def lane_of(owner: str, length: int) -> LaneKey:
    return {"a": LaneKey("l", (length,) if length else ())}[owner]


def test_a_trace_is_read_line_by_line() -> None:
    text = ["at,owner,rows,budget_ms", "0.5,a,2,100", "0.7,a,,"]
    assert list(trace(text, lane_of)) == [
        Arrival(0.5, LaneKey("l"), "a", 2, 0.1),
        Arrival(0.7, LaneKey("l"), "a", 1, inf),
    ]


def test_a_trace_of_dates_and_tokens_is_read_as_it_is_published() -> None:
    text = [
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2023-11-16 18:15:46.6805900,374,44",
        "2023-11-16 18:15:50.9951690,396,109",
    ]
    found = list(trace(text, lambda owner, length: LaneKey(owner, (length,)), budget_s=2.0))
    assert [each.lane for each in found] == [LaneKey("model-0", (374,)), LaneKey("model-0", (396,))]
    assert [each.at for each in found] == pytest.approx([0.0, 4.314579], abs=1e-6)
    assert {each.budget_s for each in found} == {2.0}


def test_rates_follow_their_schedule_and_nothing_comes_at_rate_0() -> None:
    schedule = [(10.0, 100.0), (5.0, 0.0), (10.0, 400.0)]
    at = [each.at for each in paced(LaneKey("a"), "a", schedule, cv=2.0, seed=3)]
    assert at == sorted(at)
    counts = [sum(low <= each < high for each in at) for low, high in ((0, 10), (10, 15), (15, 25))]
    assert counts[0] == pytest.approx(1000, rel=0.2)
    assert counts[1] == 0
    assert counts[2] == pytest.approx(4000, rel=0.2)


def test_a_schedule_of_one_rate_is_the_plain_process() -> None:
    plain = list(gamma(LaneKey("a"), "a", 50.0, 20.0, cv=3.0, seed=5))
    halves = list(paced(LaneKey("a"), "a", [(10.0, 50.0), (10.0, 50.0)], cv=3.0, seed=5))
    assert [each.at for each in halves] == pytest.approx([each.at for each in plain])


def test_a_switching_rate_stays_at_each_for_the_time_that_was_asked_for() -> None:
    schedule = switching([10.0, 90.0], 2.0, 4000.0, seed=1)
    assert sum(seconds for seconds, _ in schedule) == pytest.approx(4000.0)
    assert all(first[1] != then[1] for first, then in itertools.pairwise(schedule))
    assert 4000.0 / len(schedule) == pytest.approx(2.0, rel=0.1)


def test_a_flood_lasts_as_long_as_it_should() -> None:
    assert bursting(10.0, 9.0, at=2.0, factor=5.0, length_s=3.0) == [
        (2.0, 10.0),
        (3.0, 50.0),
        (4.0, 10.0),
    ]
    with pytest.raises(InvalidArgument, match="not within 2"):
        bursting(10.0, 2.0, at=1.0, factor=5.0, length_s=3.0)


def test_servables_in_the_style_of_functions_share_the_rate_by_a_power_law() -> None:
    lanes = {f"m{n}": LaneKey(f"m{n}") for n in range(4)}
    found = list(maf_style(lanes, 100.0, 400.0, exponent=1.0, cv=4.0, seed=2))
    counts = [sum(each.owner == owner for each in found) for owner in lanes]
    assert len(found) == pytest.approx(40_000, rel=0.15)
    assert counts[0] > 1.4 * counts[1] > 1.4 * counts[3]


def test_lengths_are_drawn_and_put_into_their_lanes() -> None:
    load = poisson(LaneKey("a"), "a", 500.0, 4.0, seed=1)
    found = list(with_lengths(load, lambda owner, n: LaneKey(owner, (n,)), {3: 1, 9: 3}, seed=1))
    share = sum(each.lane.shape == (9,) for each in found) / len(found)
    assert {each.lane.shape for each in found} == {(3,), (9,)}
    assert share == pytest.approx(0.75, abs=0.04)


def test_criticalities_are_drawn_in_their_shares() -> None:
    load = poisson(LaneKey("a"), "a", 500.0, 4.0, seed=1)
    found = [
        each.priority for each in with_criticalities(load, {"critical": 0.1, "sheddable": 0.3})
    ]
    assert found.count(CRITICAL) / len(found) == pytest.approx(0.1, abs=0.03)
    assert found.count(SHEDDABLE) / len(found) == pytest.approx(0.3, abs=0.04)
    assert set(found) == {CRITICAL, DEFAULT, SHEDDABLE}


@pytest.mark.parametrize("shares", [{"urgent": 0.1}, {"critical": -0.1}, {"critical": 1.1}])
def test_criticalities_need_their_names_and_shares(shares: dict[str, float]) -> None:
    with pytest.raises(InvalidArgument):
        next(with_criticalities([], shares))


def test_a_trace_may_tell_criticalities() -> None:
    found = trace(["at,criticality", "1,sheddable", "2,"], lambda owner, length: LaneKey(owner))
    assert [each.priority for each in found] == [SHEDDABLE, DEFAULT]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (["at,owner,criticality", "1,a,urgent"], "line 2 of the trace: .*urgent"),
        (["when,owner", "1,a"], "needs one of the columns at"),
        (["at,owner", "soon,a"], "line 2 of the trace: .*soon"),
        (["at,owner", "1,b"], "line 2 of the trace: KeyError"),
    ],
)
def test_a_trace_that_cannot_be_meant_is_refused(text: list[str], why: str) -> None:
    with pytest.raises(InvalidArgument, match=why):
        list(trace(text, lane_of))


@pytest.mark.parametrize("wrong", [{"rate": 0.0}, {"seconds": -1.0}, {"cv": 0.0}])
def test_a_workload_needs_positive_numbers(wrong: dict[str, float]) -> None:
    numbers = {"rate": 1.0, "seconds": 1.0, "cv": 1.0, **wrong}
    with pytest.raises(InvalidArgument, match="must be positive"):
        next(gamma(LaneKey("a"), "a", numbers["rate"], numbers["seconds"], cv=numbers["cv"]))
