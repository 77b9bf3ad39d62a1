"""Policies to compare with and fall back on: round robin, arrival, deadline, slack, fair share.

Most take the most rows that their lane has; their `early_drop` decides whether rows that would make
a batch late are given up (`batching.window`) or run late; without it only what has expired is
dropped. `Shrink` and `Aimd` make batches smaller instead.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Final

from batching.errors import InvalidArgument
from batching.policy import LaneView, Pick, Situation
from batching.values import Batch, LaneKey, Ticket
from batching.window import Window, window_of

__all__ = [
    "Aimd",
    "EarliestDeadline",
    "FairShare",
    "FirstCome",
    "LeastSlack",
    "RoundRobin",
    "Shrink",
]

#: By what Clipper's limit shrinks after a batch that took too long.
_BACK_OFF: Final = 0.9


class _Ranked:
    """The lane of least rank; what it runs is its window, or all that fits."""

    __slots__ = ("_early_drop",)

    def __init__(self, *, early_drop: bool = True) -> None:
        self._early_drop: Final = early_drop

    def added(self, key: LaneKey) -> None:
        """See `Policy.added`."""

    def removed(self, key: LaneKey) -> None:
        """See `Policy.removed`."""

    def landed(self, batch: Batch, now: float) -> None:
        """See `Policy.landed`."""

    def pick(self, situation: Situation) -> Pick | None:
        """See `Policy.pick`."""
        hopeless: list[Ticket] = []
        best: tuple[float, LaneView, Window] | None = None
        for lane in situation.lanes.values():
            window = self._window(lane, situation)
            hopeless += window.hopeless
            if window.rows:
                rank = self._rank(lane, window, situation)
                if best is None or rank < best[0]:
                    best = (rank, lane, window)
        if best is None:
            return Pick(None, hopeless=hopeless) if hopeless else None
        _, lane, window = best
        return Pick(lane.key, window.rows, hopeless, window.dropped)

    def _window(self, lane: LaneView, situation: Situation) -> Window:
        if self._early_drop:
            return window_of(lane, situation.free_at)
        group = lane.retry
        rows = sum(stop - start for _, start, stop in group) if group else lane.rows
        rows = rows or lane.spare_rows
        rows = min(rows, lane.costs.ladder.largest)
        return Window(_first(lane).deadline, lane.costs.of_rows(rows), rows)

    @abstractmethod
    def _rank(self, lane: LaneView, window: Window, situation: Situation) -> float: ...


class RoundRobin(_Ranked):
    """The lane that has gone longest without a turn; a new lane comes first.

    With k lanes, a lane with rows waits at most k - 1 turns. A pick costs O(lanes with rows).
    """

    __slots__ = ("_last_turn", "_turn")

    def __init__(self, *, early_drop: bool = False) -> None:
        super().__init__(early_drop=early_drop)
        self._turn = 0
        self._last_turn: dict[LaneKey, int] = {}

    def added(self, key: LaneKey) -> None:
        """See `Policy.added`."""
        self._last_turn[key] = 0

    def removed(self, key: LaneKey) -> None:
        """See `Policy.removed`."""
        del self._last_turn[key]

    def pick(self, situation: Situation) -> Pick | None:
        """See `Policy.pick`."""
        if self._early_drop:
            picked = super().pick(situation)
        else:
            # Nothing to estimate: what is cheapest to ask, and what runs where nothing is known.
            key = min(situation.lanes, key=self._last_turn.__getitem__)
            picked = Pick(key, situation.lanes[key].costs.ladder.largest)
        if picked is not None and picked.key is not None:
            self._turn += 1
            self._last_turn[picked.key] = self._turn
        return picked

    def _rank(self, lane: LaneView, window: Window, situation: Situation) -> float:
        return self._last_turn[lane.key]


class FirstCome(_Ranked):
    """The lane whose first ticket came first (FIFO)."""

    __slots__ = ()

    def _rank(self, lane: LaneView, window: Window, situation: Situation) -> float:
        return _first(lane).id


class Shrink(_Ranked):
    """The lane whose first ticket came first, in a batch so small that this ticket is in time.

    The other way to save a deadline than giving rows up: only what cannot be in time even by itself
    is dropped. At overload its batches become small, and so does the throughput.
    """

    __slots__ = ()

    def _window(self, lane: LaneView, situation: Situation) -> Window:
        window = window_of(lane, situation.free_at)
        if not window.dropped:
            return window
        first, costs = window.dropped[0], lane.costs
        size = max(
            size
            for size, cost in zip(costs.ladder.sizes, costs.estimates, strict=True)
            if situation.free_at + cost <= first.deadline
        )
        return Window(first.deadline, costs.of_rows(size), size, window.hopeless)

    def _rank(self, lane: LaneView, window: Window, situation: Situation) -> float:
        return _first(lane).id


class EarliestDeadline(_Ranked):
    """The lane whose first deadline is next (EDF)."""

    __slots__ = ()

    def _rank(self, lane: LaneView, window: Window, situation: Situation) -> float:
        return window.deadline


class LeastSlack(_Ranked):
    """The lane whose batch must begin soonest."""

    __slots__ = ()

    def _rank(self, lane: LaneView, window: Window, situation: Situation) -> float:
        return window.deadline - window.expected_s


class FairShare(_Ranked):
    """The lane of the owner that has had least of the device for its weight (WFQ)."""

    __slots__ = ()

    def _rank(self, lane: LaneView, window: Window, situation: Situation) -> float:
        return situation.shares.time_of(_first(lane).owner)


class Aimd:
    """Clipper's adaptive batching (NSDI 2017, section 4.3), for lanes that take turns.

    Every lane has a limit of rows a batch. It grows by one after a batch as large as the limit that
    took no longer than the objective, from its forming to its end, and shrinks to nine tenths after
    one that did. Nothing is known of what a batch will take, nor of other lanes: rows are dropped
    when they have expired, and not before.

    Args:
        slo_s: the objective.

    Raises:
        InvalidArgument: the objective is not positive.
    """

    __slots__ = ("_limits", "_slo_s", "_turns")

    def __init__(self, slo_s: float) -> None:
        if not slo_s > 0:
            raise InvalidArgument(f"an objective is positive, not {slo_s} s")
        self._slo_s: Final = slo_s
        self._limits: Final[dict[LaneKey, float]] = {}
        self._turns: Final = RoundRobin()

    def limit_of(self, key: LaneKey) -> int:
        """The most rows of this lane's next batch."""
        return int(self._limits[key])

    def added(self, key: LaneKey) -> None:
        """See `Policy.added`."""
        self._limits[key] = 1.0
        self._turns.added(key)

    def removed(self, key: LaneKey) -> None:
        """See `Policy.removed`."""
        del self._limits[key]
        self._turns.removed(key)

    def landed(self, batch: Batch, now: float) -> None:
        """See `Policy.landed`."""
        limit = self._limits.get(batch.lane)
        if limit is None:
            return
        if now - batch.formed_at > self._slo_s:
            self._limits[batch.lane] = max(1.0, limit * _BACK_OFF)
        elif batch.rows >= int(limit):  # a smaller one says nothing of batches of this size
            self._limits[batch.lane] = limit + 1.0

    def pick(self, situation: Situation) -> Pick | None:
        """See `Policy.pick`."""
        picked = self._turns.pick(situation)
        if picked is None or picked.key is None:
            return picked
        largest = situation.lanes[picked.key].costs.ladder.largest
        self._limits[picked.key] = min(self._limits[picked.key], float(largest))
        return Pick(picked.key, self.limit_of(picked.key))


def _first(lane: LaneView) -> Ticket:
    """The ticket whose rows run next."""
    group = lane.retry
    first = group[0][0] if group else lane.first()
    assert first is not None, "a lane without rows was shown"
    return first
