"""Several devices and routers in virtual time: one end for each request, and the same run again."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batching import POLICIES, Batcher, EffSafe, Ladder, LaneKey, RoundRobin, policy_named
from batching.costs import SizeCost
from batching.simulation import (
    Arrival,
    HostCosts,
    Network,
    Report,
    SimulatedCluster,
    SimulatedLane,
    noisy,
    simulate_cluster,
)
from batching.workloads import gamma, merged, poisson

SIZES = (1, 2, 4, 8, 16, 32, 64)


def cost(key: LaneKey, bucket: int) -> float:
    return (4.0 + bucket / 4.0) / 1000


def lanes(*units: str, sizes: tuple[int, ...] = SIZES) -> list[SimulatedLane]:
    return [SimulatedLane(key=LaneKey(unit), ladder=Ladder(sizes)) for unit in units]


def cluster(*devices: list[SimulatedLane], routers: int = 1, **changes: object) -> SimulatedCluster:
    made = SimulatedCluster(devices=devices, batcher=lambda: Batcher(EffSafe()), routers=routers)
    return SimulatedCluster(
        devices=made.devices,
        batcher=made.batcher,
        routers=routers,
        **changes,  # type: ignore[arg-type]
    )


def busy(devices: int, seed: int = 1, policy: str = "effsafe") -> Report:
    """Bursts of three servables over a trunk that they share and heads of their own."""
    units = ["trunk", "a/2", "b/2", "c"]
    loads = [
        gamma(LaneKey(unit), owner, 400.0, 1.0, cv=3.0, budget_s=0.08, seed=seed)
        for owner, unit in (("a", "trunk"), ("b", "trunk"), ("c", "c"))
    ]
    arrivals = [
        each._replace(then=() if each.owner == "c" else (LaneKey(f"{each.owner}/2"),))
        for each in merged(*loads)
    ]
    scene = SimulatedCluster(
        devices=[lanes(*units) for _ in range(devices)],
        batcher=lambda: Batcher(policy_named(policy)),
        routers=3,
        network=Network(turn_s=2e-5, request_s=3e-5, delay_s=2e-4, delay_cv=1.5),
        host=HostCosts(
            frame_s=1e-5, request_s=1e-5, batch_s=5e-5, answer_s=1e-5, hop_s=3e-5, shares_core=True
        ),
    )
    return simulate_cluster(scene, arrivals, cost, noisy(cost, 0.3), seed=seed)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_has_one_end_whatever_the_policy(policy: str) -> None:
    """The simulation holds this itself; here it is asked once more, of the busiest scene."""
    report = busy(2, policy=policy)
    assert report.offered > 800
    for outcome in report.owners.values():
        assert outcome.ended == outcome.offered
        assert len(outcome.latencies_s) == outcome.good + outcome.late
        assert not outcome.late, "a router answers nothing after the deadline"


def test_the_same_seed_gives_the_same_run_bit_for_bit() -> None:
    first, again, other = busy(3, seed=5), busy(3, seed=5), busy(3, seed=6)
    assert first == again
    assert first != other


@given(
    st.integers(1, 3), st.integers(0, 3), st.floats(0, 1e-3), st.floats(0, 2.0), st.integers(0, 99)
)
@settings(derandomize=True, max_examples=10, deadline=None)
def test_any_cluster_ends_every_request_once_and_repeats_itself(
    devices: int, routers: int, seconds: float, spread: float, seed: int
) -> None:
    def run() -> Report:
        arrivals = [
            each._replace(rows=1 + place % 9, budget_s=inf if place % 5 == 0 else 0.05)
            for place, each in enumerate(
                poisson(LaneKey("u"), f"m{seed}", 900.0, 0.1, budget_s=0.05, seed=seed)
            )
        ]
        scene = cluster(
            *(lanes("u", sizes=(1, 4, 16)) for _ in range(devices)),
            routers=routers,
            network=Network(
                turn_s=seconds / 9, request_s=seconds / 9, delay_s=seconds, delay_cv=spread
            ),
            host=HostCosts(frame_s=seconds / 9, request_s=seconds / 20, hop_s=seconds / 5),
        )
        return simulate_cluster(scene, arrivals, cost, noisy(cost, spread / 4), seed=seed)

    first = run()
    assert all(outcome.ended == outcome.offered for outcome in first.owners.values())
    assert first == run()


def test_two_devices_do_twice_the_work_of_one() -> None:
    load = list(poisson(LaneKey("u"), "m", 8000.0, 0.5, budget_s=0.05, seed=1))
    one = simulate_cluster(cluster(lanes("u")), load, cost)
    two = simulate_cluster(cluster(lanes("u"), lanes("u")), load, cost)
    assert two.goodput > 1.7 * one.goodput
    assert two.devices[0].rows == pytest.approx(two.devices[1].rows, rel=0.1)


def test_a_unit_is_asked_where_it_is() -> None:
    load = merged(
        poisson(LaneKey("a"), "a", 200.0, 0.5, seed=1),
        poisson(LaneKey("b"), "b", 100.0, 0.5, seed=1),
    )
    report = simulate_cluster(cluster(lanes("a"), lanes("b")), load, cost)
    assert [device.rows for device in report.devices] == [
        report.owners["a"].offered,
        report.owners["b"].offered,
    ]


def test_a_request_takes_the_time_of_everything_on_its_way() -> None:
    """Two units, of 5 ms each for one row, with all that is around them, and nobody else."""
    scene = cluster(
        lanes("trunk", "head", sizes=(4,)),
        network=Network(request_s=0.001, delay_s=0.010),
        host=HostCosts(frame_s=0.001, request_s=0.001, batch_s=0.001, answer_s=0.001, hop_s=0.002),
    )
    request = Arrival(0.0, LaneKey("trunk"), "m", then=(LaneKey("head"),))
    report = simulate_cluster(scene, [request], cost)
    # Each unit: a turn, a frame there, reading it, a hop, the batch, a hop, delivering, and back.
    each = 0.001 + 0.010 + 0.002 + 0.002 + 0.005 + 0.002 + 0.002 + 0.010
    [latency] = report.owners["m"].latencies_s
    assert latency == pytest.approx(2 * each + 0.001)
    assert report.devices[0].host_s == pytest.approx(0.008)


def test_a_core_that_both_share_does_one_thing_at_a_time() -> None:
    load = [Arrival(0.0, LaneKey("u"), "m"), Arrival(0.001, LaneKey("u"), "m")]

    def last(shares_core: bool) -> float:
        host = HostCosts(request_s=0.002, shares_core=shares_core)
        scene = cluster(lanes("u", sizes=(4,)), host=host)
        return max(simulate_cluster(scene, load, cost).owners["m"].latencies_s)

    # The second request is read at 2 to 4 ms, while the first one's batch runs from 2 to 7.
    assert last(False) == pytest.approx(0.012 - 0.001)
    assert last(True) == pytest.approx(0.014 - 0.001)


def test_requests_of_one_turn_share_a_frame() -> None:
    load = [Arrival(0.0, LaneKey("u"), "m") for _ in range(5)]
    host = HostCosts(frame_s=0.001)
    turns = simulate_cluster(
        cluster(lanes("u"), network=Network(turn_s=0.001), host=host), load, cost
    )
    assert turns.devices[0].host_s == pytest.approx(0.001)
    assert turns.devices[0].batches == 1


def test_a_router_answers_at_the_deadline_and_the_device_hears_of_it() -> None:
    scene = cluster(lanes("u", sizes=(1,)), network=Network(delay_s=0.001))
    load = [Arrival(0.0, LaneKey("u"), "m", budget_s=0.1 if n < 3 else 0.009) for n in range(4)]
    report = simulate_cluster(scene, load, lambda key, size: 0.02)
    outcome = report.owners["m"]
    assert (outcome.good, outcome.expired + outcome.shed) == (3, 1)
    assert report.batches == 3


def test_a_unit_is_not_run_for_a_request_whose_later_units_would_be_late() -> None:
    """It is due so much before the deadline that the later one, 10 ms, can be in time."""
    trunk, head, other = (LaneKey(unit) for unit in ("trunk", "head", "other"))
    arrivals = [
        Arrival(0.0, trunk, "a", 1, 1.0, (head,)),  # teaches what a head needs
        Arrival(1.0, other, "b"),  # 10 ms
        Arrival(1.001, trunk, "a", 1, 0.025, (head,)),  # 9, 10 and 10 ms
    ]
    scene = cluster(lanes("trunk", "head", "other", sizes=(1,)))
    report = simulate_cluster(scene, arrivals, lambda key, bucket: 0.010)
    assert (report.owners["a"].good, report.owners["a"].shed) == (1, 1)
    assert report.devices[0].batches == 3


def test_requests_of_the_warm_up_are_served_and_not_counted() -> None:
    load = list(poisson(LaneKey("u"), "m", 300.0, 1.0, seed=1))
    report = simulate_cluster(cluster(lanes("u")), load, cost, warm_s=0.6)
    assert report.offered == sum(each.at >= 0.6 for each in load)
    assert report.rows == len(load)
    assert 0.39 < report.seconds < 0.45


def test_a_lane_goes_on_from_what_was_measured() -> None:
    """Batches take the mean; what they are expected to take is the bound."""
    known = {1: SizeCost(0.010, 0.030, 40)}
    lane = SimulatedLane(key=LaneKey("u"), ladder=Ladder([1]), known=known)
    request = Arrival(0.0, LaneKey("u"), "m", budget_s=0.020)
    # An estimate of 30 ms is over the deadline, so the row is given up though 10 ms would do.
    report = simulate_cluster(cluster([lane]), [request], lambda key, size: 0.010)
    assert report.owners["m"].shed == 1
    certain = SimulatedLane(
        key=LaneKey("u"), ladder=Ladder([1]), known={1: SizeCost(0.01, 0.01, 9)}
    )
    report = simulate_cluster(cluster([certain]), [request], lambda key, size: 0.010)
    assert report.owners["m"].good == 1


@pytest.mark.parametrize("is_on", [True, False])
def test_routers_turn_away_whom_no_device_would_answer_in_time_if_devices_do(is_on: bool) -> None:
    """And only then: a device that refuses and gives up nobody says nothing to go by."""
    batchers: list[Batcher] = []

    def batcher() -> Batcher:
        batchers.append(Batcher(EffSafe() if is_on else RoundRobin(), admission=is_on))
        return batchers[-1]

    scene = SimulatedCluster(
        devices=[lanes("a"), lanes("a")],
        batcher=batcher,
        network=Network(delay_s=2e-4),
    )
    load = poisson(LaneKey("a"), "a", 8000.0, 0.5, budget_s=0.05, seed=1)
    report = simulate_cluster(scene, load, cost)
    tallies = [each.stats().lanes[LaneKey("a")].owners["a"].tally for each in batchers]
    reached = sum(each.offered + each.refused for each in tallies)
    assert (report.offered - reached > 100) is is_on
    assert report.owners["a"].refused >= report.offered - reached
