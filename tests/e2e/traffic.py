"""A client that asks all the time, so that a test can say what becomes of every request."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, NamedTuple, Self

from tests.e2e.running import Answer, until

__all__ = ["TYPED", "Outcome", "Traffic"]

#: Answers and typed errors of a request that was accepted or refused in order.
TYPED: Final = frozenset({200, 429, 503, 504})
_PAUSE_S: Final = 0.01


class Outcome(NamedTuple):
    """What became of one request; status 0 where the connection broke."""

    sent: float
    took_s: float
    status: int
    text: str


class Traffic:
    """Sends one request after the other from a thread of its own, until the context ends.

    Args:
        send: sends one; its error is an `OSError`.
    """

    def __init__(self, send: Callable[[], Answer]) -> None:
        self._send = send
        self._outcomes: list[Outcome] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="traffic", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        until("a first answer", self.answered_since_now(), 60.0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join(timeout=60.0)
        assert not self._thread.is_alive(), "a request never ended"

    @property
    def outcomes(self) -> Sequence[Outcome]:
        """All that is over, in order."""
        return list(self._outcomes)

    @property
    def statuses(self) -> Counter[int]:
        """How often which status came."""
        return Counter(outcome.status for outcome in self._outcomes)

    def answered_since_now(self) -> Callable[[], bool]:
        """Tells whether a request that was sent after this call has been answered with 200."""
        now = time.monotonic()
        return lambda: any(o.sent >= now and o.status == 200 for o in reversed(self._outcomes))

    def failures(self, allowed: frozenset[int] = frozenset({200})) -> list[Outcome]:
        """What ended otherwise."""
        return [outcome for outcome in self._outcomes if outcome.status not in allowed]

    def _run(self) -> None:
        while not self._ended.is_set():
            sent = time.monotonic()
            try:
                answer = self._send()
                status, text = answer.status, answer.body[:500].decode("utf-8", "replace")
            except OSError as error:
                status, text = 0, repr(error)
            self._outcomes.append(Outcome(sent, time.monotonic() - sent, status, text))
            self._ended.wait(_PAUSE_S)
