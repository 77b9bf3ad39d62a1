"""How long a door waits for a client: what counts as progress, and when it is too little.

Pure: somebody looks at connections from time to time and says what he sees and when. Exact to the
time between two looks, which costs a request nothing but the counting of itself.
"""

from __future__ import annotations

from enum import StrEnum

from cluster.doors.settings import DoorLimits

__all__ = ["Patience", "Phase"]


class Phase(StrEnum):
    """What a connection is waiting for."""

    #: the next request
    IDLE = "idle"
    #: the rest of a request's headers
    HEAD = "head"
    #: the rest of a request's body
    BODY = "body"
    #: the door itself; a request's own deadline ends that
    BUSY = "busy"
    #: its client to take answers
    UNREAD = "unread"


class Patience:
    """What a connection was seen doing, and since when."""

    __slots__ = ("_moved", "_phase", "_requests", "_since")

    def __init__(self, now: float) -> None:
        self._phase = Phase.IDLE
        self._requests = 0
        self._since = now
        self._moved = 0

    def is_over(
        self, phase: Phase, requests: int, moved: int, now: float, limits: DoorLimits
    ) -> bool:
        """Look once more.

        Args:
            phase: what the connection waits for now.
            requests: how many it has brought so far; another number is another wait.
            moved: bytes, on a scale that only grows while the client does its part.
            now: the time of this look.
            limits: how long each wait may take.
        """
        if phase is not self._phase or requests != self._requests:
            self._phase = phase
            self._requests = requests
            self._since = now
            self._moved = moved
            return False
        return now - self._since > self._allowed_s(moved - self._moved, limits)

    def _allowed_s(self, moved: int, limits: DoorLimits) -> float:
        match self._phase:
            case Phase.IDLE:
                return limits.idle_s if self._requests else limits.head_s
            case Phase.HEAD:
                return limits.head_s
            case Phase.BODY:
                return limits.body_s + max(moved, 0) / limits.rate_min_bytes
            case Phase.UNREAD:
                return limits.read_s + max(moved, 0) / limits.rate_min_bytes
            case Phase.BUSY:
                return float("inf")
