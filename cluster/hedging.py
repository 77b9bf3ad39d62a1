"""When a call is also asked of another replica: a second request against the slow few.

Of every shard it is learned under which time nine of ten answers stay. A call that takes `_FACTOR`
times as long is late for a reason of its own (a fault of a page, a stalled process), and another
replica will likely be quicker. A second call costs work, so there is a budget: no more than
`SHARE` of the calls that have been made, and no more than `_SAVED_MAX` at once after a quiet time,
so that a cluster that is slow as a whole is not asked for more than it can do.

All calls pay for the few that are late, so little is done for each: its time is noted and looked at
with those of many others, and it stands in line until it would be late, answered or not.

Pure: time comes in, numbers come out. Does not know replicas, links or what an answer is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Hashable
from math import inf
from typing import Final

__all__ = ["SHARE", "Hedging", "Shard"]

#: Second calls for each call that could have one.
SHARE: Final = 0.03
#: Second calls that may be saved up.
_SAVED_MAX: Final = 10.0
#: A call is late after this many times what nine of ten need.
_FACTOR: Final = 2.0
#: Answers that are looked at together, and which of them, in order, nine of ten stay under.
_ANSWERS: Final = 64
_NINE_OF_TEN: Final = 57
#: What so many answers weigh against all before.
_WEIGHT: Final = 0.25
#: Shards that are remembered; there are fewer, but versions change.
_SHARDS_MAX: Final = 4096


class Shard:
    """What is asked of the same replicas: how long answers take, and whose are owed.

    Attributes:
        wait_s: after how long a call is late; 0 before that is known.
        watched: calls in the order in which they were made, each with when it is late.
    """

    __slots__ = ("_seconds", "wait_s", "watched")

    def __init__(self) -> None:
        self.wait_s = 0.0
        self.watched: deque[tuple[float, int]] = deque()
        self._seconds: list[float] = []

    def answered(self, seconds: float) -> None:
        """A call was answered, by whichever replica, so long after it was first made."""
        times = self._seconds
        times.append(seconds)
        if len(times) == _ANSWERS:
            times.sort()
            wait_s = _FACTOR * times[_NINE_OF_TEN]
            self.wait_s += (wait_s - self.wait_s) * (_WEIGHT if self.wait_s else 1.0)
            times.clear()


class Hedging:
    """Watches calls by number, and says which are late while the budget lasts.

    Attributes:
        wakes_at: when `late` can next return something.
    """

    def __init__(self) -> None:
        self.wakes_at = inf
        self._shards: dict[Hashable, Shard] = {}
        #: those of which calls are watched
        self._watching: set[Shard] = set()
        self._saved = 0.0

    def shard(self, name: Hashable) -> Shard:
        """The shard of this name."""
        found = self._shards.get(name)
        if found is None:
            if len(self._shards) >= _SHARDS_MAX:
                self._shards.clear()  # those with calls under way live on with these
            found = self._shards[name] = Shard()
        return found

    def asked(self, shard: Shard, number: int, now: float) -> None:
        """A call was made that another replica could be asked for."""
        self._saved += SHARE
        wait_s = shard.wait_s
        if wait_s:
            at = now + wait_s
            watched = shard.watched
            if not watched:
                self._watching.add(shard)
                self.wakes_at = min(self.wakes_at, at)
            watched.append((at, number))

    def late(self, now: float, under_way: Container[int]) -> list[int]:
        """The calls that are late and among those that are under way. Each is said once."""
        found: list[int] = []
        self.wakes_at = inf
        for shard in list(self._watching):
            watched = shard.watched
            while watched and watched[0][0] <= now:
                number = watched.popleft()[1]
                if number in under_way:
                    found.append(number)
            if watched:
                self.wakes_at = min(self.wakes_at, watched[0][0])
            else:
                self._watching.remove(shard)
        return found

    def spend(self) -> bool:
        """Whether one more second call may be made; if so, it is counted."""
        self._saved = min(self._saved, _SAVED_MAX)
        if self._saved < 1.0:
            return False
        self._saved -= 1.0
        return True
