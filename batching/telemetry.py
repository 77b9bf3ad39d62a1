"""How long things took, counted so cheaply that it is always on.

A histogram is an array of counts over fixed bounds, about a factor of two apart: adding a value is
a bisection and two additions, and makes no object. What was counted is read as a `Distribution`, a
value that can be added to others and asked for a quantile, to within its bucket.

Does not know clocks, lanes or who reads the counts.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

__all__ = ["Distribution", "ERROR_BOUNDS", "Histogram", "LaneMeter", "TIME_BOUNDS"]

#: Upper bounds in seconds: 20 us to 30 s.
TIME_BOUNDS: Final = (
    0.00002, 0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02,
    0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0,
)  # fmt: skip
#: Upper bounds of how far an estimate was off, as a share of what came out.
ERROR_BOUNDS: Final = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


@dataclass(frozen=True, slots=True)
class Distribution:
    """What a histogram had counted at some instant.

    Attributes:
        bounds: upper bounds, ascending; each belongs to its bucket.
        counts: values in each bucket, and after these the values beyond the last bound.
        total: sum of the values.
    """

    bounds: Sequence[float]
    counts: Sequence[int]
    total: float

    @property
    def count(self) -> int:
        """How many values."""
        return sum(self.counts)

    def __add__(self, other: Distribution) -> Distribution:
        assert tuple(self.bounds) == tuple(other.bounds), "of other bounds"
        counts = [mine + its for mine, its in zip(self.counts, other.counts, strict=True)]
        return Distribution(self.bounds, counts, self.total + other.total)

    def quantile(self, share: float) -> float:
        """The value below which this share of the values lies; nan without values.

        Straight between the bounds of its bucket; of values beyond the last bound no more is known
        than that.
        """
        rank = share * self.count
        if not self.count:
            return float("nan")
        below = 0
        for place, reached in enumerate(accumulate(self.counts)):
            if reached >= rank and reached > below:
                if place == len(self.bounds):
                    break
                low = self.bounds[place - 1] if place else 0.0
                return low + (self.bounds[place] - low) * (rank - below) / (reached - below)
            below = reached
        return self.bounds[-1]


class Histogram:
    """Counts of values over fixed bounds.

    Attributes:
        bounds: upper bounds, ascending.
        counts: one more than there are bounds. In a loop, add to it by `bisect_left` of the bounds.
        total: sum of the values.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...] = TIME_BOUNDS) -> None:
        self.bounds: Final = bounds
        self.counts: Final = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def read(self) -> Distribution:
        """The counts as they are."""
        return Distribution(self.bounds, tuple(self.counts), self.total)


class LaneMeter:
    """What the batches of one lane held and took, by the time they came back.

    Attributes:
        runs: by compiled size, how many batches came back and how many real rows they had.
        wait: seconds from when a batch was formed until the device began with it.
        device: seconds of the device that a batch took.
        error: how far the estimate of a batch was off, as a share of what it took. Estimates are
            meant to be kept, so they lie above most batches.
    """

    __slots__ = ("device", "error", "runs", "wait")

    def __init__(self) -> None:
        self.runs: Final[dict[int, list[int]]] = {}
        self.wait: Final = Histogram()
        self.device: Final = Histogram()
        self.error: Final = Histogram(ERROR_BOUNDS)

    def landed(
        self, bucket: int, rows: int, wait_s: float, device_s: float, expected_s: float
    ) -> None:
        """A batch came back."""
        run = self.runs.get(bucket)
        if run is None:
            run = self.runs[bucket] = [0, 0]
        run[0] += 1
        run[1] += rows
        self.wait.add(wait_s)
        self.device.add(device_s)
        if device_s > 0:
            self.error.add(abs(expected_s - device_s) / device_s)
