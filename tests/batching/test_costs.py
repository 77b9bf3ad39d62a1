"""What batches are expected to take: seeded, followed, never fooled by one bad batch."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batching import CostTable, Ladder, LaneKey
from batching.costs import CLAMP, HALF_LIFE_S

KEY = LaneKey("a")
LADDER = Ladder((1, 4, 16))

seconds = st.floats(1e-5, 10.0)


def table(**seeds: float) -> CostTable:
    costs = CostTable()
    costs.add(KEY, LADDER, {int(size[1:]): s for size, s in seeds.items()})
    return costs


def test_an_estimate_begins_with_what_warm_up_measured() -> None:
    costs = table(b1=0.001, b4=0.002, b16=0.004)
    assert [costs[KEY].of_rows(size) for size in LADDER.sizes] == [0.001, 0.002, 0.004]


@given(st.lists(st.tuples(st.sampled_from(LADDER.sizes), seconds), max_size=30))
def test_a_larger_size_is_never_thought_cheaper(observed: list[tuple[int, float]]) -> None:
    costs = table()
    for size, took in observed:
        costs[KEY].observe(size, took)
    estimates = [costs[KEY].of_rows(size) for size in LADDER.sizes]
    assert estimates == sorted(estimates)
    assert costs[KEY].of_rows(1) == estimates[0]


def test_other_sizes_keep_what_is_known_and_are_seeded_for_the_rest() -> None:
    costs = table(b1=0.001, b4=0.002, b16=0.004)
    costs[KEY].observe(4, 0.003)
    learned = costs[KEY].of_rows(4)
    grown = costs.resize(KEY, Ladder((4, 32, 64)), {4: 1.0, 32: 0.01, 64: 0.02})
    assert grown is costs[KEY]
    assert grown.estimates == [learned, 0.01, 0.02]
    assert costs.resize(KEY, Ladder((4, 16))).unmeasured() == [16]


def test_a_batch_of_a_size_that_is_no_longer_there_says_nothing() -> None:
    costs = table(b1=0.001, b4=0.002, b16=0.004)
    before = list(costs.resize(KEY, Ladder((1, 6))).estimates)
    for size in (4, 16):
        costs[KEY].observe(size, 9.0)
    assert costs[KEY].estimates == before


def test_estimates_follow_what_batches_take() -> None:
    costs = table(b1=0.001)
    for _ in range(200):
        costs[KEY].observe(1, 0.010)
    assert costs[KEY].of_rows(1) == pytest.approx(0.010, rel=0.05)


def test_an_estimate_leaves_room_for_two_standard_deviations() -> None:
    costs = table(b1=0.010)
    for number in range(400):
        costs[KEY].observe(1, 0.008 if number % 2 else 0.012)
    assert 0.0135 < costs[KEY].of_rows(1) < 0.0145


def test_one_batch_that_hung_counts_only_so_much() -> None:
    costs = table(b1=0.010)
    costs[KEY].observe(1, 60.0)
    assert costs[KEY].of_rows(1) < CLAMP * 0.010


def test_a_size_that_never_ran_is_guessed_by_rows_and_named() -> None:
    costs = table(b4=0.004)
    assert costs[KEY].of_rows(16) == pytest.approx(0.016)
    assert costs[KEY].unmeasured() == [1, 16]


def test_a_time_that_is_no_time_says_nothing() -> None:
    costs = table(b1=0.010)
    costs[KEY].observe(1, 0.0)
    assert costs[KEY].estimates == [0.010, 0.040, 0.160]


def test_a_snapshot_tells_means_bounds_and_of_how_many_batches() -> None:
    costs = table(b1=0.010)
    costs[KEY].observe(1, 0.018)
    found = costs.snapshot()[KEY]
    assert found[1].mean_s == pytest.approx(0.011)
    assert found[1].bound_s == costs[KEY].of_rows(1) > found[1].mean_s
    assert [found[size].batches for size in (1, 4, 16)] == [2, 0, 0]
    assert found[16].mean_s == found[16].bound_s == costs[KEY].of_rows(16)


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan")])
def test_a_seed_that_is_no_time_says_nothing(wrong: float) -> None:
    assert table(b1=wrong)[KEY].unmeasured() == [1, 4, 16]


def test_measurements_of_sizes_that_are_not_compiled_are_ignored() -> None:
    costs = table(b2=5.0, b4=0.004)
    assert costs[KEY].of_rows(4) == 0.004


# What was measured long ago


def test_what_a_size_took_beyond_its_seed_fades_while_it_is_not_run() -> None:
    costs = table(b1=0.010)
    costs[KEY].observe(1, 0.030, now=100.0)
    above = costs[KEY].estimates[0] - 0.010
    costs[KEY].fade(100.0 + HALF_LIFE_S)
    assert costs[KEY].estimates[0] - 0.010 == pytest.approx(above / 2)
    costs[KEY].fade(100.0 + 2 * HALF_LIFE_S)
    assert costs[KEY].estimates[0] - 0.010 == pytest.approx(above / 4)


def test_what_a_size_took_less_than_its_seed_does_not_fade() -> None:
    costs = table(b1=0.010)
    for number in range(200):
        costs[KEY].observe(1, 0.005, now=100.0 + number / 1000)
    costs[KEY].fade(1000.0)
    assert costs[KEY].estimates[0] == pytest.approx(0.005, rel=0.01)


def test_batches_of_other_sizes_let_a_slow_one_be_forgotten() -> None:
    costs = table(b1=0.010, b4=0.011, b16=0.012)
    costs[KEY].observe(1, 0.030, now=100.0)
    assert costs[KEY].estimates[1] > 0.02, "a larger size is never thought cheaper"
    for number in range(1000):
        costs[KEY].observe(16, 0.012, now=100.0 + number * 0.02)
    assert costs[KEY].estimates == pytest.approx([0.010, 0.011, 0.012], rel=0.01)


def test_what_runs_all_the_time_does_not_fade() -> None:
    costs = table(b1=0.010)
    for number in range(500):
        costs[KEY].observe(1, 0.020, now=100.0 + number * 0.02)
    assert costs[KEY].estimates[0] == pytest.approx(0.020, rel=0.02)


# What nobody has confirmed


def test_a_seed_by_which_rows_are_given_up_is_believed_less_until_it_is_confirmed() -> None:
    costs = table(b1=0.010)
    costs[KEY].doubt(100.0)
    assert costs[KEY].estimates[0] == 0.010, "the first doubt begins the time"
    costs[KEY].doubt(100.0 + HALF_LIFE_S)
    assert costs[KEY].estimates[0] == pytest.approx(0.005)


def test_one_batch_says_what_a_doubted_seed_is_worth() -> None:
    costs = table(b1=0.010)
    for number in range(6):
        costs[KEY].doubt(100.0 + number * HALF_LIFE_S)
    costs[KEY].observe(1, 0.009, now=120.0)
    assert costs[KEY].estimates[0] == pytest.approx(0.009)
    costs[KEY].doubt(130.0)
    costs[KEY].doubt(1000.0)
    assert costs[KEY].estimates[0] == pytest.approx(0.009), "what was confirmed is not doubted"


def test_sizes_that_ran_are_not_doubted_with_those_that_did_not() -> None:
    costs = table(b1=0.010, b4=0.012, b16=0.050)
    costs[KEY].observe(1, 0.010, now=100.0)
    costs[KEY].doubt(100.0)
    costs[KEY].doubt(100.0 + HALF_LIFE_S)
    assert costs[KEY].estimates[0] == pytest.approx(0.010)
    assert costs[KEY].estimates[2] == pytest.approx(0.025)
