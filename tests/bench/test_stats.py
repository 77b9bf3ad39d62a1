"""Percentiles and intervals against definitions written another way."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.stats import Histogram, bootstrap, paired_ratio

samples = st.lists(st.integers(0, 50).map(float), min_size=1, max_size=60)


@given(samples, st.integers(0, 1000).map(lambda tenths: tenths / 10))
def test_percentile_is_the_nearest_rank_of_the_sorted_samples(
    values: list[float], percent: float
) -> None:
    least = min(
        value
        for value in values
        # In tenths of a percent, so that the definition is free of rounding.
        if sum(other <= value for other in values) * 1000 >= round(percent * 10) * len(values)
    )
    assert Histogram.of(values).percentile(percent) == least


def test_percentile_takes_exactly_the_rank_where_the_product_is_whole() -> None:
    assert Histogram.of(range(1, 201)).percentile(99) == 198
    assert Histogram.of(range(1, 1001)).percentile(99.9) == 999


def test_percentiles_at_the_ends_are_the_least_and_the_greatest() -> None:
    histogram = Histogram.of([5.0, 1.0, 3.0])
    assert (histogram.percentile(0), histogram.percentile(100)) == (1.0, 5.0)


def test_percentile_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        Histogram.of([]).percentile(50)


@pytest.mark.parametrize("percent", [-0.1, 100.1, math.nan])
def test_percentile_outside_0_and_100_is_refused(percent: float) -> None:
    with pytest.raises(ValueError, match="not a percentage"):
        Histogram.of([1.0]).percentile(percent)


@given(st.lists(samples, min_size=1, max_size=4))
def test_pooled_is_the_histogram_of_all_samples(parts: list[list[float]]) -> None:
    pooled = Histogram.pooled([Histogram.of(part) for part in parts])
    whole = Histogram.of([value for part in parts for value in part])
    assert pooled.values.tolist() == whole.values.tolist()
    assert pooled.counts.tolist() == whole.counts.tolist()


@pytest.mark.parametrize(
    ("values", "counts"),
    [([1.0, 1.0], [1, 1]), ([2.0, 1.0], [1, 1]), ([1.0], [0]), ([1.0], [1, 2])],
)
def test_malformed_histogram_is_refused(values: list[float], counts: list[int]) -> None:
    with pytest.raises(ValueError, match="values"):
        Histogram(values=np.asarray(values), counts=np.asarray(counts))


def test_bootstrap_is_the_median_and_brackets_it() -> None:
    estimate = bootstrap([3.0, 1.0, 2.0, 10.0, 2.5], seed=1)
    assert estimate.value == 2.5
    assert 1.0 <= estimate.low < estimate.value < estimate.high <= 10.0
    assert estimate.rounds == 5


def test_bootstrap_repeats_for_a_seed() -> None:
    assert bootstrap([1.0, 2.0, 4.0], seed=7) == bootstrap([1.0, 2.0, 4.0], seed=7)


def test_bootstrap_of_equal_rounds_has_no_width() -> None:
    estimate = bootstrap([2.0] * 4, seed=0)
    assert (estimate.low, estimate.value, estimate.high) == (2.0, 2.0, 2.0)


def test_bootstrap_covers_the_true_median_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(3)
    covered = 0
    for seed in range(200):
        estimate = bootstrap(generator.normal(10.0, 1.0, 9).tolist(), seed=seed)
        covered += estimate.low <= 10.0 <= estimate.high
    assert 0.85 <= covered / 200 <= 1.0


def test_paired_ratio_is_blind_to_a_round_that_is_slow_for_both() -> None:
    estimate = paired_ratio([10.0, 1.0, 20.0], [20.0, 2.0, 40.0], seed=0)
    assert (estimate.low, estimate.value, estimate.high) == (0.5, 0.5, 0.5)


def test_paired_ratio_of_unequal_rounds_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        paired_ratio([1.0, 2.0], [1.0], seed=0)
