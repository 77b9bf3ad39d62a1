"""The arithmetic of the bench of the simulator, on made-up measurements."""

from __future__ import annotations

import pytest

from batching import LaneKey
from batching.costs import SizeCost
from batching.simulation import HostCosts, Network
from batching.workloads import poisson
from bench.simulator import Frozen, Pair, Spent, drift_of, ratios_of, simulated, split

FROZEN = Frozen(
    durations_s={1: [0.003, 0.0031], 8: [0.005], 32: [0.013, 0.014]},
    known={
        "m": {size: SizeCost(0.003 + size / 3000, 0.004 + size / 3000, 9) for size in (1, 8, 32)}
    },
    host=HostCosts(frame_s=2e-5, request_s=5e-6, batch_s=3e-4, hop_s=1e-4, shares_core=True),
    network=Network(request_s=1e-5, delay_s=1e-4),
    single_s=0.004,
    capacity=2300.0,
)


def spent(batches: float, requests: float, frames: float) -> Spent:
    """What a loop spends that takes 40 us for a frame, 10 for a request and 300 for a batch."""
    seconds = 40e-6 * frames + 10e-6 * requests + 300e-6 * batches
    return Spent(seconds, batches, requests, frames)


def test_the_loops_time_is_taken_apart_exactly() -> None:
    loads = [spent(50, 50, 50), spent(100, 3200, 100), spent(60, 300, 300)]
    assert split(loads) == pytest.approx((40e-6, 10e-6, 300e-6))
    more = [*loads, spent(90, 1000, 400)]
    assert split(more) == pytest.approx((40e-6, 10e-6, 300e-6))


def test_nothing_takes_less_than_no_time() -> None:
    full = Spent(3e-4, 100, 3200, 100)  # less than batches without requests take
    found = split([spent(50, 50, 50), full, spent(60, 300, 300)])
    assert min(found) == 0.0


def test_the_worst_load_counts_and_rounds_do_by_their_median() -> None:
    def pair(load: float, number: int, real: float, predicted: float) -> Pair:
        return Pair(
            load=load,
            number=number,
            real=(real, 1000 * real, 0.0, 0.0),
            predicted=(predicted, 1000 * predicted, 0.0, 0.0),
            behind_s=0.0,
        )

    pairs = [pair(0.5, 0, 1.0, 0.99), pair(0.5, 1, 1.0, 0.5), pair(0.5, 2, 1.0, 1.0)]
    pairs += [pair(1.1, number, 0.8, 0.76) for number in range(3)]
    ratios, estimates = ratios_of(pairs, seed=0)
    assert ratios["attainment_error_points"] == pytest.approx(4.0)
    assert ratios["throughput_error"] == pytest.approx(0.05)
    assert estimates["attainment_error_points_0.5"].value == pytest.approx(-1.0)
    assert estimates["throughput_error_1.1"].value == pytest.approx(-0.05)


def test_drift_is_the_range_of_the_rounds_by_their_median() -> None:
    assert drift_of([1600.0, 2000.0, 1900.0, 2100.0, 2000.0]) == pytest.approx(0.25)
    assert drift_of([1600.0]) == 0.0


def test_a_prediction_is_of_the_counted_requests_and_repeats_itself() -> None:
    load = list(poisson(LaneKey("m"), "m", 1000.0, 2.0, budget_s=0.08, seed=3))
    first, again = (simulated(FROZEN, load, warm_s=0.5, seed=1) for _ in range(2))
    assert first == again
    assert first.offered == sum(arrival.at >= 0.5 for arrival in load)
    assert first.attainment > 0.95
    assert first.devices[0].host_s > 0
