"""How far a load has come, and the way to call it off.

Counts bytes per blob, so that a blob that is begun anew counts once. Written by the threads that
bring blobs, read by whoever reports. Does not know what a blob or a load is.
"""

from __future__ import annotations

import threading

from batching.errors import Cancelled

__all__ = ["Progress"]


class Progress:
    """Bytes that are there, of bytes that are wanted.

    Args:
        total: bytes that are wanted.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._done: dict[str, int] = {}
        self._lock = threading.Lock()
        self._reason = ""

    @property
    def done(self) -> int:
        """Bytes that are there."""
        with self._lock:
            return sum(self._done.values())

    def note(self, digest: str, done: int) -> None:
        """This many bytes of a blob are there.

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
