"""What a batch is expected to cost: device seconds by lane and compiled size.

Estimates begin with what warm-up measured and follow what batches really took. They are meant to be
kept, not to be fair: the mean of recent batches and two standard deviations, so that a plan which
counts on them rarely fails. One long batch (a collection of garbage, a machine that stood still)
must not make every plan timid, so a measurement counts as at most `CLAMP` times the estimate; and a
larger size is never thought cheaper than a smaller one.

What was measured is believed the less, the longer ago it is. A size that was slow once may be
thought too slow to be run, and so is never measured again; a lane whose smallest size was slow once
would give all its rows up for good. So what a size took beyond its seed fades, by half in
`HALF_LIFE_S`, while it is not run: then it is tried, and either it is as quick as it was, or one
batch says that it is not. What it took less than its seed does not fade: that keeps nobody from
running it. Whoever turns rows away by an estimate lets it fade, and doubts seeds that no batch has
confirmed (`LaneCosts.doubt`): warm-up may have measured on a busy machine. Such a seed halves in
`HALF_LIFE_S` until a batch of its size runs, and what that one takes is believed instead.

After "Clockwork" (OSDI 2020), which keeps a profile by model and batch size, and Clipper (NSDI
2017), which follows it online. Does not know what a lane computes, nor which batch is next.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf, sqrt
from typing import Final, NamedTuple

from batching.buckets import Ladder
from batching.values import LaneKey

__all__ = ["CLAMP", "HALF_LIFE_S", "CostTable", "LaneCosts", "SizeCost"]

#: The most that one measurement counts for, as a multiple of the estimate at the time.
CLAMP: Final = 3.0
#: In which what a size took beyond its seed fades by half, while it is not run.
HALF_LIFE_S: Final = 2.0
#: How often that is worked out for the sizes of a lane that runs others.
_FADES_EVERY_S: Final = 0.25
#: Weight of the newest batch in the moving mean and variance.
_WEIGHT: Final = 0.125
#: What a size that was never measured is thought to cost, where nothing of its lane is known.
_UNKNOWN_S: Final = 0.001


class SizeCost(NamedTuple):
    """What is known of one size, as it was at some instant.

    Attributes:
        mean_s: moving mean of the seconds that its batches took.
        bound_s: what one will hardly exceed; the mean and two standard deviations.
        batches: that were measured, the one at warm-up included; 0 where the rest is a guess.
    """

    mean_s: float
    bound_s: float
    batches: int


class _Cost:
    """Moving mean and variance of one size, until when they have faded, and towards what."""

    __slots__ = ("at", "batches", "is_doubted", "mean", "seed", "variance")

    def __init__(self, seconds: float, at: float = -inf) -> None:
        self.seed = self.mean = seconds
        self.variance = 0.0
        self.batches = 1
        self.at = at
        self.is_doubted = False

    @property
    def bound(self) -> float:
        return self.mean + 2.0 * sqrt(self.variance)

    def observe(self, seconds: float, now: float) -> None:
        self.batches += 1
        self.at = now
        if self.is_doubted:
            self.is_doubted = False
            self.mean = seconds
            self.seed = min(self.seed, seconds)
            return
        delta = min(seconds, CLAMP * self.bound) - self.mean
        step = _WEIGHT * delta
        self.mean += step
        self.variance = (1.0 - _WEIGHT) * (self.variance + delta * step)

    def fade(self, now: float) -> None:
        if now > self.at:
            left = 0.5 ** ((now - self.at) / HALF_LIFE_S)
            self.at = now
            self.variance *= left * left
            if self.mean > self.seed:
                self.mean = self.seed + left * (self.mean - self.seed)

    def doubt(self, now: float) -> None:
        if self.batches > 1:
            return
        if self.is_doubted and now > self.at:
            self.mean *= 0.5 ** ((now - self.at) / HALF_LIFE_S)
        self.is_doubted = True
        self.at = now


class LaneCosts:
    """The costs of one lane.

    Attributes:
        ladder: its compiled sizes.
        estimates: seconds that a batch will hardly exceed, in the order of the ladder's sizes. The
            list stays the same object, so that whoever asks often may keep it.
    """

    __slots__ = ("_faded_at", "_measured", "estimates", "ladder")

    def __init__(self, ladder: Ladder, seeds: Mapping[int, float]) -> None:
        self.ladder: Final = ladder
        self._faded_at = -inf
        self._measured: Final = {
            place: _Cost(seeds[size]) for place, size in enumerate(ladder.sizes) if size in seeds
        }
        self.estimates: Final[list[float]] = [0.0] * len(ladder.sizes)
        self._refresh()

    def of_rows(self, rows: int) -> float:
        """Seconds of the smallest size that holds so many rows."""
        return self.estimates[self.ladder.places[rows]]

    def observe(self, bucket: int, seconds: float, now: float = -inf) -> None:
        """A batch of this size took so long; a time that is not positive says nothing.

        Args:
            bucket: the size.
            seconds: of the device.
            now: when it came back; without it, it was long ago.
        """
        if not seconds > 0:
            return
        ladder = self.ladder
        if bucket > ladder.largest or ladder.sizes[ladder.places[bucket]] != bucket:
            return  # it was in flight when the lane's sizes changed
        place = ladder.places[bucket]
        cost = self._measured.get(place)
        if cost is None:
            self._measured[place] = _Cost(seconds, now)
            self._refresh()
            return
        cost.observe(seconds, now)
        if now > self._faded_at + _FADES_EVERY_S:
            self.fade(now)
            return
        found, estimates = cost.bound, self.estimates
        if (place and estimates[place - 1] > found) or (
            place + 1 < len(estimates) and estimates[place + 1] < found
        ):
            self._refresh()
        else:
            estimates[place] = found

    def fade(self, now: float) -> None:
        """Believe less of what was measured some time ago, where it speaks against a size."""
        self._faded_at = now
        for cost in self._measured.values():
            cost.fade(now)
        self._refresh()

    def doubt(self, now: float) -> None:
        """Rows were given up by an estimate: let it fade, and believe less of mere seeds."""
        for cost in self._measured.values():
            cost.doubt(now)
        self.fade(now)

    def resized(self, ladder: Ladder, seeds: Mapping[int, float]) -> LaneCosts:
        """The costs of the same lane with other sizes.

        Args:
            ladder: the sizes.
            seeds: seconds that warm-up measured, for sizes of which nothing else is known.
        """
        found = LaneCosts(ladder, seeds)
        for place, cost in self._measured.items():
            size = self.ladder.sizes[place]
            if size in ladder.sizes:
                found._measured[ladder.places[size]] = cost
        found._refresh()
        return found

    def snapshot(self) -> dict[int, SizeCost]:
        """What is known of every size; of one that was never measured, the guess."""
        found: dict[int, SizeCost] = {}
        for place, size in enumerate(self.ladder.sizes):
            cost = self._measured.get(place)
            if cost is None:
                guess = self.estimates[place]
                found[size] = SizeCost(guess, guess, 0)
            else:
                found[size] = SizeCost(cost.mean, cost.bound, cost.batches)
        return found

    def restore(self, known: Mapping[int, SizeCost]) -> None:
        """Go on from what was known elsewhere or earlier; sizes that are not compiled say nothing.

        What was only a guess stays one.
        """
        for place, size in enumerate(self.ladder.sizes):
            found = known.get(size)
            if found is not None and found.batches:
                cost = self._measured[place] = _Cost(found.mean_s)
                cost.variance = ((found.bound_s - found.mean_s) / 2.0) ** 2
                cost.batches = found.batches
        self._refresh()

    def unmeasured(self) -> list[int]:
        """Sizes whose cost is a guess; worth a batch when the device would idle."""
        return [size for place, size in enumerate(self.ladder.sizes) if place not in self._measured]

    def _refresh(self) -> None:
        """Estimates of all sizes: ascending, and of what was never measured a guess by size."""
        sizes, measured = self.ladder.sizes, self._measured
        # Rows of a size that was not run cost at most what rows cost elsewhere.
        per_row = max((cost.bound / sizes[place] for place, cost in measured.items()), default=0.0)
        least = 0.0
        for place, size in enumerate(sizes):
            found = per_row * size or _UNKNOWN_S
            if place in measured:
                found = measured[place].bound
            least = self.estimates[place] = max(least, found)


class CostTable:
    """The costs of all lanes of a device."""

    __slots__ = ("_lanes",)

    def __init__(self) -> None:
        self._lanes: Final[dict[LaneKey, LaneCosts]] = {}

    def __getitem__(self, key: LaneKey) -> LaneCosts:
        return self._lanes[key]

    def add(
        self, key: LaneKey, ladder: Ladder, seeds: Mapping[int, float] | None = None
    ) -> LaneCosts:
        """Begin to keep the costs of a lane.

        Args:
            key: the lane.
            ladder: its compiled sizes.
            seeds: seconds that warm-up measured, by bucket. Those of other sizes, and what is no
                time, say nothing.
        """
        costs = self._lanes[key] = LaneCosts(ladder, _usable(ladder, seeds))
        return costs

    def resize(
        self, key: LaneKey, ladder: Ladder, seeds: Mapping[int, float] | None = None
    ) -> LaneCosts:
        """A lane has other sizes from now on; what is known of those that stay is kept.

        Args:
            key: the lane.
            ladder: its compiled sizes.
            seeds: as for `add`; used for sizes of which nothing else is known.
        """
        costs = self._lanes[key] = self._lanes[key].resized(ladder, _usable(ladder, seeds))
        return costs

    def remove(self, key: LaneKey) -> None:
        """Forget a lane."""
        del self._lanes[key]

    def snapshot(self) -> dict[LaneKey, dict[int, SizeCost]]:
        """What is known of every lane and size, for people and for simulation."""
        return {key: costs.snapshot() for key, costs in self._lanes.items()}

    def table(self) -> dict[LaneKey, dict[int, float]]:
        """Every estimate by size."""
        return {
            key: dict(zip(costs.ladder.sizes, costs.estimates, strict=True))
            for key, costs in self._lanes.items()
        }


def _usable(ladder: Ladder, seeds: Mapping[int, float] | None) -> dict[int, float]:
    return {size: s for size, s in (seeds or {}).items() if size in ladder.sizes and s > 0}
