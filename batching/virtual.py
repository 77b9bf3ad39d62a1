"""Virtual time: what happens next, and who is busy until when.

Events happen in the order of their instants, and of one instant in the order in which they were
arranged, so a run is the same bit for bit whenever its inputs are. Nothing here knows what is
simulated.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from random import Random
from typing import Final, TypeAlias

__all__ = ["Serial", "VirtualTime", "varied"]

_Action: TypeAlias = Callable[[], None]
#: Less cannot be seen, and its gamma distribution cannot be drawn from.
_CV_MIN: Final = 1e-4


class VirtualTime:
    """A clock and what is arranged to happen.

    Attributes:
        now: this instant.
    """

    __slots__ = ("_arranged", "_number", "now")

    def __init__(self) -> None:
        self.now = 0.0
        self._arranged: Final[list[tuple[float, int, _Action]]] = []
        self._number = 0

    def at(self, instant: float, action: _Action) -> None:
        """Let something happen then, or now if that has passed."""
        self._number += 1
        heapq.heappush(self._arranged, (max(instant, self.now), self._number, action))

    def step(self) -> bool:
        """Let the next thing happen; False if there is none."""
        if not self._arranged:
            return False
        self.now, _, action = heapq.heappop(self._arranged)
        action()
        return True


def varied(cv: float, random: Random) -> float:
    """A factor of mean one: gamma distributed with this coefficient of variation, 1 without."""
    if cv < _CV_MIN:
        return 1.0
    return random.gammavariate(cv**-2, cv**2)


class Serial:
    """Somebody who does one thing after the other: an event loop, a thread.

    Attributes:
        busy_s: seconds at work so far.
        free_at: when all work that was given is done.
    """

    __slots__ = ("_time", "busy_s", "free_at")

    def __init__(self, time: VirtualTime) -> None:
        self._time: Final = time
        self.busy_s = 0.0
        self.free_at = 0.0

    def work(self, seconds: float, then: _Action) -> None:
        """Work so long, when what was given before is done; then let this happen."""
        self.busy_s += seconds
        self.free_at = max(self.free_at, self._time.now) + seconds
        if self.free_at <= self._time.now:
            then()
        else:
            self._time.at(self.free_at, then)
