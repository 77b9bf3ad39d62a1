"""Policies to compare with and fall back on: round robin, arrival, deadline, slack, fair share.

Each takes the most rows that its lane has. `early_drop` decides whether rows that would make a
batch late are given up (`batching.window`) or run late; without it only what has expired is
dropped.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Final

from batching.policy import LaneView, Pick, Situation
from batching.values import LaneKey, Ticket
from batching.window import Window, window_of

__all__ = ["EarliestDeadline", "FairShare", "FirstCome", "LeastSlack", "RoundRobin"]


class _Ranked:
    """The lane of least rank; what it runs is its window, or all that fits."""

    __slots__ = ("_early_drop",)

    def __init__(self, *, early_drop: bool = True) -> None:
        self._early_drop: Final = early_drop

    def added(self, key: LaneKey) -> None:
        """See `Policy.added`."""

    def removed(self, key: LaneKey) -> None:
        """See `Policy.removed`."""

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


def _first(lane: LaneView) -> Ticket:
    """The ticket whose rows run next."""
    group = lane.retry
    first = group[0][0] if group else lane.first()
    assert first is not None, "a lane without rows was shown"
    return first
