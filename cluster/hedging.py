"""When a call is also asked of another replica: a second request against the slow few.

Of every shard it is learned under which time nine of ten answers stay. A call that takes `_FACTOR`
times as long is late for a reason of its own (a fault of a page, a stalled process), and another
replica will likely be quicker. A second call costs work, so there is a budget: no more than
`SHARE` of the calls that have been made, and no more than `_SAVED_MAX` at once after a quiet time,
so that a cluster that is slow as a whole is not asked for more than it can do.

Pure: time comes in, numbers come out. Does not know replicas, links or what an answer is.
"""

from __future__ import annotations

from collections.abc import Hashable
from math import ceil, log2
from typing import Final

from cluster.deadlines import DeadlineWheel

__all__ = ["SHARE", "Hedging"]

#: Second calls for each call that could have one.
SHARE: Final = 0.03
#: Second calls that may be saved up.
_SAVED_MAX: Final = 10.0
_QUANTILE: Final = 0.9
#: A call is late after this many times what nine of ten need.
_FACTOR: Final = 2.0
#: Buckets of a time's histogram for each doubling: times are known to a fifth.
_PER_OCTAVE: Final = 4
_BUCKETS: Final = 30 * _PER_OCTAVE
_MICROSECONDS: Final = 1e6
#: Answers before anything is said, and after which it is worked out again.
_ANSWERS_MIN: Final = 64
_NEWS_EVERY: Final = 32
#: Answers after which all that is known counts half.
_FADES_AT: Final = 1024
#: Shards that are remembered; there are fewer, but versions change.
_SHARDS_MAX: Final = 4096
_TICK_S: Final = 0.001


class _Times:
    """How long one shard's answers take: a histogram that forgets."""

    __slots__ = ("_counts", "_news", "_total", "wait_s")

    def __init__(self) -> None:
        self._counts = [0] * _BUCKETS
        self._total = 0
        self._news = _ANSWERS_MIN
        #: after how long a call is late; 0 before that is known
        self.wait_s = 0.0

    def observe(self, seconds: float) -> None:
        at = int(_PER_OCTAVE * log2(max(seconds * _MICROSECONDS, 1.0)))
        self._counts[min(at, _BUCKETS - 1)] += 1
        self._total += 1
        self._news -= 1
        if not self._news:
            self._news = _NEWS_EVERY
            self._work_out()

    def _work_out(self) -> None:
        left = ceil(_QUANTILE * self._total)
        for at, count in enumerate(self._counts):
            left -= count
            if left <= 0:
                self.wait_s = _FACTOR * 2.0 ** ((at + 1) / _PER_OCTAVE) / _MICROSECONDS
                break
        if self._total >= _FADES_AT:
            self._counts = [count // 2 for count in self._counts]
            self._total = sum(self._counts)


class Hedging:
    """Watches calls by number, and says which are late while the budget lasts."""

    def __init__(self) -> None:
        self._shards: dict[Hashable, _Times] = {}
        self._watched: DeadlineWheel[int] = DeadlineWheel(_TICK_S)
        self._saved = 0.0

    def asked(self, shard: Hashable, number: int, now: float) -> int:
        """A call was made that another replica could be asked for.

        Args:
            shard: whose times it has.
            number: of the call.
            now: this instant.

        Returns:
            What `answered` wants back; -1 for a call that is not watched.
        """
        self._saved = min(self._saved + SHARE, _SAVED_MAX)
        times = self._shards.get(shard)
        if times is None or not times.wait_s:
            return -1
        return self._watched.add(number, now + times.wait_s)

    def answered(self, shard: Hashable, number: int, slot: int, seconds: float) -> None:
        """A call was answered, by whichever replica, so long after it was first made."""
        if slot >= 0:
            self._watched.remove(number, slot)
        times = self._shards.get(shard)
        if times is None:
            if len(self._shards) >= _SHARDS_MAX:
                self._shards.clear()
            times = self._shards[shard] = _Times()
        times.observe(seconds)

    def late(self, now: float) -> list[int]:
        """The calls that are late. Each is said once; one that failed may be among them."""
        return self._watched.expired(now)

    def spend(self) -> bool:
        """Whether one more second call may be made; if so, it is counted."""
        if self._saved < 1.0:
            return False
        self._saved -= 1.0
        return True

    def wakes_at(self, slot: int) -> float:
        """When a call watched in this slot is late."""
        return slot * _TICK_S

    def next_wakeup(self) -> float | None:
        """When `late` can next return something, or None."""
        return self._watched.next_wakeup()
