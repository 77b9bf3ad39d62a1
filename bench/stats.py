"""Percentiles of latencies, and medians with their confidence intervals.

Percentiles are exact (nearest rank over every sample, no fitting), and a median over rounds comes
with a percentile-bootstrap interval. This file does not know what was measured, or by whom.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import numpy.typing as npt

__all__ = ["Estimate", "Histogram", "bootstrap", "paired_ratio"]

_RESAMPLES: Final = 4000
_CONFIDENCE: Final = 0.95


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Histogram:
    """Every sample of a measurement, as distinct values and how often each came.

    Attributes:
        values: distinct values, ascending.
        counts: how often each value came, at least once.
    """

    values: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.values.shape != self.counts.shape or self.values.ndim != 1:
            raise ValueError("values and counts must be two vectors of one length")
        if np.any(np.diff(self.values) <= 0) or np.any(self.counts <= 0):
            raise ValueError("values must ascend and every count be positive")

    @classmethod
    def of(cls, samples: npt.ArrayLike) -> Self:
        """The histogram of these samples, in any order."""
        values, counts = np.unique(np.asarray(samples, np.float64), return_counts=True)
        return cls(values=values, counts=counts.astype(np.int64))

    @classmethod
    def pooled(cls, histograms: Sequence[Self]) -> Self:
        """All samples of several histograms."""
        every = np.concatenate([histogram.values for histogram in histograms])
        counts = np.concatenate([histogram.counts for histogram in histograms])
        values, place = np.unique(every, return_inverse=True)
        summed = np.zeros(values.shape, np.int64)
        np.add.at(summed, place, counts)
        return cls(values=values, counts=summed)

    @property
    def total(self) -> int:
        """The number of samples."""
        return int(self.counts.sum())

    def percentile(self, percent: float) -> float:
        """The smallest sample that at least ``percent`` of all samples do not exceed.

        Raises:
            ValueError: there is no sample, or ``percent`` is not within 0 and 100.
        """
        if not 0 <= percent <= 100:
            raise ValueError(f"{percent} is not a percentage")
        total = self.total
        if total == 0:
            raise ValueError("no samples, so no percentile")
        # The product first, then the division: 99 / 100 * 200 is a hair above 198.
        rank = max(1, int(np.ceil(percent * total / 100)))
        return float(self.values[np.searchsorted(np.cumsum(self.counts), rank)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A median over rounds and how sure of it we are.

    Attributes:
        value: the median.
        low: lower end of the 95 % bootstrap interval.
        high: upper end of it.
        rounds: the number of rounds behind it.
    """

    value: float
    low: float
    high: float
    rounds: int


def bootstrap(samples: Sequence[float], *, seed: int) -> Estimate:
    """The median of one figure per round, with its percentile-bootstrap interval.

    Raises:
        ValueError: there is no sample.
    """
    values = np.asarray(samples, np.float64)
    if values.size == 0:
        raise ValueError("no rounds, so no median")
    picks = np.random.default_rng(seed).integers(values.size, size=(_RESAMPLES, values.size))
    medians = np.median(values[picks], axis=1)
    tail = 100 * (1 - _CONFIDENCE) / 2
    low, high = np.percentile(medians, [tail, 100 - tail])
    return Estimate(
        value=float(np.median(values)), low=float(low), high=float(high), rounds=values.size
    )


def paired_ratio(
    numerators: Sequence[float], denominators: Sequence[float], *, seed: int
) -> Estimate:
    """The median over rounds of one contender's figure over the other's of the same round.

    Pairing by round keeps a machine that slows down for a while from counting against only one.

    Raises:
        ValueError: the two do not have the same number of rounds, or there is none.
    """
    pairs = zip(numerators, denominators, strict=True)
    return bootstrap([above / below for above, below in pairs], seed=seed)
