"""Which sizes are worth compiling: ladders learned from what was counted or measured.

A length bucket is paid for by every row that is shorter; a batch bucket by every batch that is not
full. Both are the same question: choose K sizes so that what all requests are rounded up to costs
least. It is answered exactly, by dynamic programming over the sizes that occur. Because a larger
size never costs less, the last cut moves only upwards from one size to the next, so that a layer
takes O(M log M) for M distinct sizes instead of O(M^2).

Costs are tokens unless a measured table or a function is given. Does not know what a unit computes,
nor when it is compiled; what a request is rounded up to is `batching.buckets`' decision alone.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import inf
from typing import Final, TypeAlias

from batching.buckets import Ladder
from batching.errors import InvalidArgument

__all__ = [
    "SAVING_MIN",
    "Advice",
    "Cost",
    "advise",
    "expected_cost",
    "fixed_width",
    "learn_batch_buckets",
    "learn_buckets",
    "powers_of_two",
    "slowdown_of",
    "waste_of",
]

#: What one row (or one batch) of a size costs, in any unit.
Cost: TypeAlias = Callable[[int], float] | Mapping[int, float]

#: A new ladder is worth its compiling only if it is predicted to save this part of the cost.
SAVING_MIN: Final = 0.05
#: Weights are counts: so many of them tell small from smaller.
_WEIGHT_MAX: Final = 1 << 32
#: More sizes than this would take longer to compile than any saving is worth.
_COUNT_MAX: Final = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """Whether to change a ladder.

    Attributes:
        ladder: the best of its length.
        saving: part of the present cost that it is predicted to save; negative if it costs more.
        is_worth_it: whether that is at least `SAVING_MIN`.
    """

    ladder: Ladder
    saving: float
    is_worth_it: bool


def learn_buckets(
    histogram: Mapping[int, int],
    *,
    count: int | None = None,
    waste: float | None = None,
    cost: Cost | None = None,
    largest: int | None = None,
) -> Ladder:
    """The ladder that costs least for these lengths.

    Args:
        histogram: how often each length occurred.
        count: the most sizes of the ladder.
        waste: instead of `count`: as few sizes as keep padding at or below this share of what is
            executed (0.1 for a tenth).
        cost: of a row by size; None counts tokens. Of a table, only its sizes are chosen.
        largest: the longest length that must be served, if it is more than any that occurred.

    Raises:
        InvalidArgument: there are no lengths, neither or both of `count` and `waste` are given or
            mean nothing, or a length is over every size that has a cost.
    """
    if (count is None) == (waste is None):
        raise InvalidArgument("say either how many buckets, or how much waste")
    if count is not None and not 1 <= count <= _COUNT_MAX:
        raise InvalidArgument(f"{count} buckets: from 1 to {_COUNT_MAX}")
    if waste is not None and not 0 <= waste < 1:
        raise InvalidArgument(f"waste is a share from 0 to below 1, not {waste:g}")
    problem = _Problem(histogram, cost, largest)
    ladders = problem.ladders()
    ladder = next(ladders)
    for better in ladders:
        if count is not None and len(ladder.sizes) >= count:
            break
        if waste is not None and waste_of(histogram, ladder, cost) <= waste:
            break
        ladder = better
    return ladder


def learn_batch_buckets(
    costs: Mapping[int, float],
    *,
    within: float = SAVING_MIN,
    rows: Mapping[int, int] | None = None,
) -> Ladder:
    """The batch sizes that pay: as few as are hardly slower than all that were measured.

    Args:
        costs: seconds of a batch by size. A size that holds the largest is always there.
        within: how much longer than with all sizes a batch may take on average.
        rows: how often each number of rows ran. None counts every doubling alike, since quiet hours
            run small batches and busy ones large: one row as often as 2 and 3 together.

    Raises:
        InvalidArgument: there are no costs, or one is not positive.
    """
    if within < 0:
        raise InvalidArgument(f"{within:g} is no part by which a cost may be exceeded")
    weights = _by_relative_cost(costs, rows)
    ladders = list(_Problem(weights, costs, max(costs)).ladders())
    return next(
        (ladder for ladder in ladders if slowdown_of(ladder, costs, rows) <= within), ladders[-1]
    )


def slowdown_of(
    ladder: Ladder, costs: Mapping[int, float], rows: Mapping[int, int] | None = None
) -> float:
    """How much longer batches take in these sizes than in the best of all measured ones.

    The mean over `rows`, as in `learn_batch_buckets`; 0 is no longer, 1 is twice as long.

    Raises:
        InvalidArgument: a size has no cost, or the ladder does not hold the rows.
    """
    weights = _by_relative_cost(costs, rows)
    best = _best(sorted(weights), costs)
    total = sum(times * best[n] for n, times in weights.items()) / sum(weights.values())
    return expected_cost(weights, ladder, costs) / total - 1.0


def _by_relative_cost(costs: Mapping[int, float], rows: Mapping[int, int] | None) -> dict[int, int]:
    """Numbers of rows, weighted so that a batch twice as long as need be counts the same for all.

    Without that, one row that takes the time of eight would be lost in what large batches take.
    """
    if not costs:
        raise InvalidArgument("no batch size was measured")
    counted: Mapping[int, float] = rows or {n: 1.0 / n for n in range(1, max(costs) + 1)}
    best = _best(sorted(counted), costs)
    scale = _WEIGHT_MAX / max(times / best[n] for n, times in counted.items())
    return {n: round(scale * times / best[n]) for n, times in counted.items() if times}


def _best(lengths: Sequence[int], costs: Mapping[int, float]) -> dict[int, float]:
    return dict(zip(lengths, _cheapest(lengths, costs)[1], strict=True))


def advise(
    histogram: Mapping[int, int],
    current: Ladder,
    *,
    count: int | None = None,
    cost: Cost | None = None,
) -> Advice:
    """Whether a ladder should be exchanged for the best one.

    Compiling and warming a version again is not free, so a ladder that is nearly best stays.

    Args:
        histogram: how often each length occurred of late.
        current: what is served now; what is longer than its largest cannot be served.
        count: sizes of the new ladder; None for as many as now.
        cost: of a row by size; None counts tokens.

    Raises:
        InvalidArgument: there are no lengths, or the present ladder does not hold them.
    """
    now = expected_cost(histogram, current, cost)
    ladder = learn_buckets(
        histogram, count=count or len(current.sizes), cost=cost, largest=current.largest
    )
    saving = 1.0 - expected_cost(histogram, ladder, cost) / now
    return Advice(ladder=ladder, saving=saving, is_worth_it=saving >= SAVING_MIN)


def waste_of(histogram: Mapping[int, int], ladder: Ladder, cost: Cost | None = None) -> float:
    """Share of what is executed that is padding: 1 - cost of the lengths / cost of their buckets.

    Under a table, a length costs what the least size that holds it costs, in proportion.

    Raises:
        InvalidArgument: a length fits no bucket, or nothing was counted.
    """
    of = _cost_of(cost)
    executed = expected_cost(histogram, ladder, cost)
    useful = 0.0
    for size, times in _counted(histogram):
        bucket = ladder.bucket_of(size)
        useful += times * (size / bucket) * of(bucket) if cost is not None else times * size
    return 1.0 - useful / (executed * sum(times for _, times in _counted(histogram)))


def expected_cost(histogram: Mapping[int, int], ladder: Ladder, cost: Cost | None = None) -> float:
    """Mean cost of a row when lengths are rounded up by this ladder; tokens without a cost.

    Raises:
        InvalidArgument: a length fits no bucket, a bucket has no cost, or nothing was counted.
    """
    of = _cost_of(cost)
    total = times_in_all = 0.0
    for size, times in _counted(histogram):
        total += times * of(ladder.bucket_of(size))
        times_in_all += times
    return total / times_in_all


def powers_of_two(largest: int) -> Ladder:
    """1, 2, 4 and so on, up to the first that holds `largest`.

    Raises:
        InvalidArgument: it is not positive.
    """
    if largest < 1:
        raise InvalidArgument(f"a largest size of {largest}")
    return Ladder([1 << power for power in range((largest - 1).bit_length() + 1)])


def fixed_width(width: int, largest: int) -> Ladder:
    """Multiples of `width`, up to the first that holds `largest`.

    Raises:
        InvalidArgument: one of them is not positive.
    """
    if width < 1 or largest < 1:
        raise InvalidArgument(f"buckets of width {width} up to {largest}")
    return Ladder(range(width, largest + width, width))


class _Problem:
    """Distinct lengths, how often they occur, and the size and cost of a bucket that ends at each.

    A bucket for lengths up to `lengths[j]` has size `sizes[j]`: the cheapest that holds them.
    """

    def __init__(
        self, histogram: Mapping[int, int], cost: Cost | None, largest: int | None
    ) -> None:
        counted = dict(_counted(histogram))
        if largest is not None and largest > max(counted):
            counted[largest] = 0
        lengths = sorted(counted)
        self._counts: Final = [0, *accumulate(counted[length] for length in lengths)]
        self._sizes, self._costs = _cheapest(lengths, cost)

    def ladders(self) -> Iterator[Ladder]:
        """The best ladder of one size, of two, and so on until more make no difference."""
        many = len(self._costs)
        best = [inf] * many
        cuts: list[list[int]] = []
        before = [0.0] + [inf] * many  # best cost of the first j lengths, by j
        total = inf
        for _ in range(min(many, _COUNT_MAX)):
            cut = [0] * many
            best = [inf] * many
            self._layer(before, best, cut)
            cuts.append(cut)
            if not best[-1] < total:
                return
            total = best[-1]
            yield self._trace(cuts)
            before = [inf, *best]

    def _layer(self, before: Sequence[float], best: list[float], cut: list[int]) -> None:
        """One more bucket: for every last length the best place at which it begins.

        Divide and conquer: the best beginning never moves down as the end moves up.
        """
        counts, costs = self._counts, self._costs
        todo = [(0, len(costs) - 1, 0, len(costs) - 1)]
        while todo:
            low, high, first, last = todo.pop()
            end = (low + high) // 2
            price, upto = costs[end], counts[end + 1]
            least, at = inf, first
            for begin in range(first, min(end, last) + 1):
                found = before[begin] + price * (upto - counts[begin])
                if found < least:
                    least, at = found, begin
            best[end], cut[end] = least, at
            if low < end:
                todo.append((low, end - 1, first, at))
            if end < high:
                todo.append((end + 1, high, at, last))

    def _trace(self, cuts: Sequence[Sequence[int]]) -> Ladder:
        end = len(self._sizes) - 1
        sizes: list[int] = []
        for cut in reversed(cuts):
            sizes.append(self._sizes[end])
            end = cut[end] - 1
        # Two buckets may be of one size, where the cheapest for both lengths is the same.
        return Ladder(sorted(set(sizes)))


def _cheapest(lengths: Sequence[int], cost: Cost | None) -> tuple[list[int], list[float]]:
    """For each length the size of the bucket that holds it for least, and its cost.

    Measured curves have steps, and a larger size that is cheaper is the better bucket.
    """
    of = _cost_of(cost)
    candidates = sorted(cost) if isinstance(cost, Mapping) else list(lengths)
    if candidates[-1] < lengths[-1]:
        raise InvalidArgument(f"a length of {lengths[-1]} is over the largest cost's size")
    best: list[tuple[float, int]] = []
    least = (inf, 0)
    for size in reversed(candidates):
        found = of(size)
        if not 0 < found < inf:
            raise InvalidArgument(f"the cost of size {size} must be positive, not {found}")
        least = min(least, (found, size))
        best.append(least)
    best.reverse()
    chosen = [best[bisect_left(candidates, length)] for length in lengths]
    return [size for _, size in chosen], [seconds for seconds, _ in chosen]


def _cost_of(cost: Cost | None) -> Callable[[int], float]:
    if cost is None:
        return float
    if not isinstance(cost, Mapping):
        return cost
    table = cost

    def looked_up(size: int) -> float:
        try:
            return table[size]
        except KeyError:
            raise InvalidArgument(f"size {size} has no cost") from None

    return looked_up


def _counted(histogram: Mapping[int, int]) -> list[tuple[int, int]]:
    found = [(size, times) for size, times in histogram.items() if times]
    if not found:
        raise InvalidArgument("nothing was counted")
    if min(size for size, _ in found) < 1 or min(times for _, times in found) < 0:
        raise InvalidArgument("lengths are positive, and occur so and so often")
    return found
