"""How long units take to answer, and so how much of a request's time is for the units after one.

A unit of a graph is to be done not by the request's deadline but so much earlier that the units
after it can be in time: then a device that is told the deadline serves first what has most left to
do, gives up what cannot be saved any more, and a request that is nearly done goes before one that
has just begun. What is kept for later units is what their answers hardly exceed (the mean and two
deviations of recent ones), and never more than half of what is left, so that a slow later unit
does not keep the earlier ones from being tried.

Does not know actors or links.
"""

from __future__ import annotations

from math import sqrt
from typing import Final

from cluster.routes import PlannedNode, SignaturePlan

__all__ = ["ReplyTimes"]

#: Weight of the newest answer in the moving mean and variance.
_WEIGHT: Final = 1 / 16
#: Units that are remembered; there are fewer, but versions change.
_UNITS_MAX: Final = 4096
#: The most of a request's time that is kept for later units.
_SHARE_MAX: Final = 0.5


class ReplyTimes:
    """Seconds from a call to its answer, by unit."""

    __slots__ = ("_times",)

    def __init__(self) -> None:
        self._times: Final[dict[str, tuple[float, float]]] = {}  # mean, variance

    def observe(self, unit: str, seconds: float) -> None:
        """A call of this unit was answered after so long."""
        found = self._times.get(unit)
        if found is None:
            if len(self._times) >= _UNITS_MAX:
                self._times.clear()
            self._times[unit] = (seconds, 0.0)
            return
        mean, variance = found
        delta = seconds - mean
        step = _WEIGHT * delta
        self._times[unit] = (mean + step, (1.0 - _WEIGHT) * (variance + delta * step))

    def bound_s(self, unit: str) -> float:
        """What an answer hardly exceeds; 0 for a unit that never answered."""
        mean, variance = self._times.get(unit, (0.0, 0.0))
        return mean + 2.0 * sqrt(variance)

    def after_s(self, plan: SignaturePlan, node: PlannedNode) -> float:
        """What the units after this one take, along the longest way."""
        nodes = plan.nodes
        longest = 0.0
        for index in node.feeds:
            later = nodes[index]
            longest = max(longest, self.bound_s(later.unit) + self.after_s(plan, later))
        return longest

    def due(self, plan: SignaturePlan, node: PlannedNode, deadline: float, now: float) -> float:
        """By when a unit is to be done, so that a request is answered by its deadline."""
        after_s = self.after_s(plan, node)
        if not after_s or deadline <= now:
            return deadline
        return deadline - min(after_s, _SHARE_MAX * (deadline - now))
