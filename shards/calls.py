"""Calls that may hang, made so that the caller never does.

A storage client promises no bound on a call: a server that sends a byte a second keeps it inside
for days. Each call runs on a thread of its own; a caller waits as long as it wants and leaves, and
the thread ends when the call does. There are only so many threads: when all of them hang, the next
caller is told at once instead of adding to them. Does not know what is called.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from batching.errors import Unavailable

__all__ = ["Call", "Calls", "under_way"]

T = TypeVar("T")

_UNSET: Final = object()
_THREAD: Final = "store-call"


class Call(Generic[T]):
    """One call that was begun."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._ended = threading.Event()
        self._result: T | object = _UNSET
        self._error: BaseException | None = None

    def result(self, timeout_s: float) -> T:
        """What the call returned.

        Raises:
            Unavailable: it has not ended in time; whether it took effect is not known.
            BaseException: whatever the call raised.
        """
        if not self._ended.wait(timeout_s):
            raise Unavailable(f"{self._what}: no answer in time")
        if self._error is not None:
            raise self._error
        assert self._result is not _UNSET
        return self._result  # type: ignore[return-value]

    def is_ended(self) -> bool:
        """Whether `result` would return, or raise, at once."""
        return self._ended.is_set()

    def _run(self, fn: Callable[[], T]) -> None:
        try:
            self._result = fn()
        except BaseException as error:
            self._error = error
        finally:
            self._ended.set()


class Calls:
    """Begins calls, up to a number at a time.

    Args:
        calls_max: that are begun and not ended.
    """

    def __init__(self, calls_max: int) -> None:
        self._slots = threading.BoundedSemaphore(calls_max)
        self._calls_max = calls_max

    def run(self, what: str, fn: Callable[[], T], timeout_s: float) -> T:
        """Call and wait for the result.

        Args:
            what: how messages name the call.
            fn: is called on another thread.
            timeout_s: until when there must be a free thread and a result.

        Raises:
            Unavailable: no thread, or no result, in time.
            BaseException: whatever `fn` raised.
        """
        until = time.monotonic() + timeout_s
        call = self.start(what, fn, timeout_s)
        return call.result(max(until - time.monotonic(), 0.0))

    def start(self, what: str, fn: Callable[[], T], timeout_s: float) -> Call[T]:
        """Begin a call.

        Raises:
            Unavailable: all threads were taken for so long.
        """
        if not self._slots.acquire(timeout=timeout_s):
            raise Unavailable(f"{what}: {self._calls_max} earlier calls have not ended yet")
        call: Call[T] = Call(what)

        def work() -> None:
            try:
                call._run(fn)
            finally:
                self._slots.release()

        # A daemon: a call that hangs must not keep the process from ending.
        threading.Thread(target=work, name=_THREAD, daemon=True).start()
        return call


def under_way() -> bool:
    """Whether any call of this process has not ended: a client library may wait for it at exit."""
    return any(thread.name == _THREAD for thread in threading.enumerate())
