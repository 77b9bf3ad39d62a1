"""What units need to answer at the least, and so how much time must be left for those after one.

A unit of a graph is to be done not by the request's deadline but so much earlier that the units
after it can be in time: then a device that is told the deadline serves first what has most left to
do, gives up what cannot be saved any more, and a request that is nearly done goes before one that
has just begun.

What is kept for later units is what they need, the quickest of recent answers. It is not what they
usually take: a device lets rows wait for as long as their deadlines allow, so usual answers take
whatever time there is. When the mean and two deviations were kept, the earlier units had half of
the time, and of 600 requests a second of eight servables on one trunk (the scene of `shardserve
bench prefix`) up to a fifth were refused that could be answered. And never more is kept than half
of what is left, so that a slow later unit does not keep the earlier ones from being tried.

Does not know graphs, actors or links.
"""

from __future__ import annotations

from math import inf
from typing import Final

__all__ = ["ReplyTimes"]

#: Answers after which the quickest of those before is forgotten.
_WINDOW: Final = 64
#: Units that are remembered; there are fewer, but versions change.
_UNITS_MAX: Final = 4096
#: The most of a request's time that is kept for later units.
_SHARE_MAX: Final = 0.5


class _Quickest:
    """The least of at least the last `_WINDOW` values, and of at most twice as many."""

    __slots__ = ("before", "count", "least")

    def __init__(self) -> None:
        self.before = self.least = inf
        self.count = 0

    def observe(self, seconds: float) -> None:
        if seconds < self.least:
            self.least = seconds
        self.count += 1
        if self.count == _WINDOW:
            self.before, self.least, self.count = self.least, inf, 0


class ReplyTimes:
    """Seconds from a call to its answer, by unit."""

    __slots__ = ("_times",)

    def __init__(self) -> None:
        self._times: Final[dict[str, _Quickest]] = {}

    def observe(self, unit: str, seconds: float) -> None:
        """A call of this unit was answered after so long."""
        found = self._times.get(unit)
        if found is None:
            if len(self._times) >= _UNITS_MAX:
                self._times.clear()
            found = self._times[unit] = _Quickest()
        found.observe(seconds)

    def least_s(self, unit: str) -> float:
        """The quickest of recent answers; 0 for a unit that never answered."""
        found = self._times.get(unit)
        return 0.0 if found is None else min(found.before, found.least)

    def due(self, deadline: float, after_s: float, now: float) -> float:
        """By when a unit is to be done, so that its request is answered by its deadline.

        Args:
            deadline: of the request.
            after_s: what the units after it need.
            now: this instant.
        """
        if not after_s or deadline <= now:
            return deadline
        return deadline - min(after_s, _SHARE_MAX * (deadline - now))
