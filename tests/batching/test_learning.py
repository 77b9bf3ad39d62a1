"""Ladders that are learned: as good as trying all, and as good as the published figures."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batching import Ladder, advise, learn_batch_buckets, learn_buckets
from batching.errors import InvalidArgument
from batching.europarl import EUROPARL_LENGTHS
from batching.learning import expected_cost, fixed_width, powers_of_two, waste_of

histograms = st.dictionaries(st.integers(1, 60), st.integers(1, 50), min_size=1, max_size=9)


@pytest.mark.parametrize(
    ("count", "percent"), [(4, 31.6), (6, 21.2), (8, 15.6), (12, 10.0), (16, 7.1)]
)
def test_europarl_wastes_what_was_computed_for_it_elsewhere(count: int, percent: float) -> None:
    ladder = learn_buckets(EUROPARL_LENGTHS, count=count)
    assert len(ladder.sizes) == count
    assert 100 * waste_of(EUROPARL_LENGTHS, ladder) == pytest.approx(percent, abs=0.06)


def test_the_usual_ladders_waste_more_of_europarl() -> None:
    def percent(ladder: Ladder) -> float:
        return 100 * waste_of(EUROPARL_LENGTHS, ladder)

    assert percent(powers_of_two(257)) == pytest.approx(29.5, abs=0.06)
    assert percent(fixed_width(10, 257)) == pytest.approx(13.4, abs=0.06)
    assert percent(fixed_width(20, 257)) == pytest.approx(24.5, abs=0.06)


def test_waste_may_be_asked_for_instead_of_a_number() -> None:
    ladder = learn_buckets(EUROPARL_LENGTHS, waste=0.156)
    assert waste_of(EUROPARL_LENGTHS, ladder) <= 0.156
    fewer = learn_buckets(EUROPARL_LENGTHS, count=len(ladder.sizes) - 1)
    assert waste_of(EUROPARL_LENGTHS, fewer) > 0.156


@given(histograms, st.integers(1, 5))
@settings(derandomize=True, max_examples=60)
def test_no_other_ladder_of_so_many_sizes_is_cheaper(histogram: dict[int, int], count: int) -> None:
    found = expected_cost(histogram, learn_buckets(histogram, count=count))
    lengths = sorted(histogram)
    rest = min(count - 1, len(lengths) - 1)
    best = min(
        expected_cost(histogram, Ladder([*chosen, lengths[-1]]))
        for chosen in combinations(lengths[:-1], rest)
    )
    assert found == pytest.approx(best)


@given(
    histograms,
    st.dictionaries(st.integers(1, 59), st.floats(0.1, 9.0), max_size=8),
    st.floats(0.1, 9.0),
    st.integers(1, 4),
)
@settings(derandomize=True, max_examples=60)
def test_with_measured_costs_no_choice_of_measured_sizes_is_cheaper(
    histogram: dict[int, int], table: dict[int, float], last: float, count: int
) -> None:
    """Also where a larger size is the cheaper one, as on machines with vectors of a fixed width."""
    table = {**table, 60: last}
    found = learn_buckets(histogram, count=count, cost=table)
    holding = [
        Ladder(chosen)
        for many in range(1, count + 1)
        for chosen in combinations(sorted(table), many)
        if chosen[-1] >= max(histogram)
    ]
    assert len(found.sizes) <= count
    assert expected_cost(histogram, found, table) == pytest.approx(
        min(expected_cost(histogram, ladder, table) for ladder in holding)
    )


def test_a_length_that_must_be_served_has_a_bucket_though_it_never_occurred() -> None:
    assert learn_buckets({3: 5}, count=2, largest=100).sizes == (3, 100)


def test_a_ladder_is_changed_only_for_a_saving_that_is_worth_it() -> None:
    best = learn_buckets(EUROPARL_LENGTHS, count=8)
    assert not advise(EUROPARL_LENGTHS, best).is_worth_it
    nearly = Ladder([size + 1 for size in best.sizes])
    assert not advise(EUROPARL_LENGTHS, nearly).is_worth_it
    advice = advise(EUROPARL_LENGTHS, powers_of_two(257))
    assert advice.is_worth_it
    assert advice.saving > 0.15
    assert advice.ladder.largest >= 257


def test_batch_sizes_that_cost_as_good_as_nothing_less_are_left_out() -> None:
    flat = {size: 0.002 + 1e-6 * size for size in (1, 2, 4, 8, 16, 32, 64)}
    assert learn_batch_buckets(flat).sizes == (64,)
    steep = {size: 0.001 * size for size in (1, 2, 4, 8, 16, 32, 64)}
    assert learn_batch_buckets(steep).sizes == tuple(steep)


def test_a_batch_size_that_costs_more_than_a_larger_one_is_left_out() -> None:
    assert 16 not in learn_batch_buckets({1: 1.0, 8: 4.0, 16: 9.0, 32: 8.0}).sizes


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda: learn_buckets({}, count=1), "nothing was counted"),
        (lambda: learn_buckets({0: 1}, count=1), "lengths are positive"),
        (lambda: learn_buckets({1: 1}), "either how many"),
        (lambda: learn_buckets({1: 1}, count=1, waste=0.1), "either how many"),
        (lambda: learn_buckets({1: 1}, count=0), "0 buckets"),
        (lambda: learn_buckets({1: 1}, waste=1.0), "waste is a share"),
        (lambda: learn_buckets({9: 1}, count=1, cost={8: 1.0}), "over the largest cost"),
        (lambda: learn_buckets({9: 1}, count=1, cost={9: 0.0}), "must be positive"),
        (lambda: learn_batch_buckets({}), "no batch size"),
        (lambda: learn_batch_buckets({1: 1.0}, within=-1), "no part"),
        (lambda: expected_cost({1: 1}, Ladder([2]), {1: 1.0}), "size 2 has no cost"),
        (lambda: powers_of_two(0), "largest size"),
        (lambda: fixed_width(0, 3), "width 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(call: object, why: str) -> None:
    assert callable(call)
    with pytest.raises(InvalidArgument, match=why):
        call()
