"""How far a load has come, how long the rest will take, and the way to call it off.

Counts bytes per blob, so that a blob that is begun anew counts once; or programs, each as one.
Written by the threads that bring and compile, read by whoever reports. Does not know what a blob,
a program or a load is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from batching.errors import Cancelled

__all__ = ["Progress"]


class Progress:
    """What is there, of what is wanted.

    Args:
        total: what is wanted.
        clock: seconds.
    """

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.total = total
        self._clock = clock
        self._since = clock()
        self._before = 0
        self._done: dict[str, int] = {}
        self._lock = threading.Lock()
        self._reason = ""

    @property
    def done(self) -> int:
        """What is there."""
        with self._lock:
            return sum(self._done.values())

    @property
    def left_s(self) -> float | None:
        """Seconds until all is there, at the pace since `expect`; None where nothing tells."""
        done = self.done
        if done >= self.total:
            return 0.0
        pace = (done - self._before) / max(self._clock() - self._since, 1e-9)
        return (self.total - done) / pace if pace > 0 else None

    def expect(self, total: int) -> None:
        """So much is wanted in all, and the rest of it is begun now."""
        self.total = total
        self._before, self._since = self.done, self._clock()

    def note(self, digest: str, done: int) -> None:
        """So much of one thing is there: bytes of a blob, or one for a program.

        Raises:
            Cancelled: the load was called off.
        """
        self.check()
        with self._lock:
            self._done[digest] = done

    def cancel(self, reason: str) -> None:
        """Call the load off: whoever brings something stops at the next piece."""
        self._reason = reason

    def check(self) -> None:
        """Go on, or not.

        Raises:
            Cancelled: the load was called off.
        """
        if self._reason:
            raise Cancelled(self._reason)
