"""Whether an event loop that has nothing to do looks for more, or sleeps until it is woken.

Waking a thread costs more than a small request does: some 50 us until it runs, and then its code is
no longer in the processor's caches. A client that asks again as soon as it has its answer wakes the
router twice and the device once for every request. So a loop that was told something twice within
`stay_s` looks for more, turn after turn, for that long; one that hears less often sleeps as ever,
and so does one that has looked in vain until it has heard something twice again. (One connection of
a small model, two processors with the client: p50 0.36 ms, and 0.44 without this.)

Decides by instants alone: `Vigil` knows no clock and no loop, `Awake` hands it both.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping
from math import inf, nan
from typing import Final

__all__ = ["FEW", "Awake", "Vigil", "stay_s"]

#: Longer than a small model takes from one request of a client to its next.
_STAY_S: Final = 0.0006
#: Where more requests than this are under way there is enough to do, and others need the processor.
FEW: Final = 1
#: Microseconds; 0 lets loops sleep at once.
_VARIABLE: Final = "SHARDSERVE_STAY_AWAKE_US"


def stay_s(environment: Mapping[str, str] = os.environ, processors: int | None = None) -> float:
    """For how long loops of this process look for more.

    Args:
        environment: may say it, in microseconds.
        processors: that the process may use; on the only one, who looks keeps others from it.

    Raises:
        ValueError: what it says is not a number, or negative.
    """
    if processors is None:
        processors = len(os.sched_getaffinity(0))
    text = environment.get(_VARIABLE)
    told = _STAY_S if text is None else _seconds(text)
    return told if processors > 1 else 0.0


def _seconds(text: str) -> float:
    try:
        found = float(text) * 1e-6
    except ValueError:
        found = nan
    if not 0 <= found < inf:
        raise ValueError(f"{_VARIABLE} must be a number of microseconds, 0 or more, not {text!r}")
    return found


class Vigil:
    """Until when a loop looks for more.

    Args:
        stay_s: for so long after it has heard something; 0 for never.
    """

    __slots__ = ("_heard_at", "_stay_s", "_until")

    def __init__(self, stay_s: float) -> None:
        self._stay_s = stay_s
        self._heard_at = self._until = -inf

    def heard(self, now: float) -> bool:
        """Something came; whether to look for more from now on."""
        is_busy = now - self._heard_at < self._stay_s
        self._heard_at = now
        if is_busy:
            self._until = now + self._stay_s
        return is_busy

    def rest(self) -> None:
        """Look no more until something has come twice again."""
        self._heard_at = self._until = -inf

    def is_over(self, now: float) -> bool:
        """Whether to sleep."""
        return now >= self._until


class Awake:
    """Keeps a loop from sleeping. Every method runs on the loop's thread.

    Args:
        loop: the loop.
        stay_s: see `Vigil`.
        clock: seconds.
    """

    __slots__ = ("_clock", "_is_looking", "_loop", "_vigil", "rest")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        stay_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._loop = loop
        self._clock = clock
        self._vigil = Vigil(stay_s)
        self._is_looking = False
        #: see `Vigil.rest`
        self.rest = self._vigil.rest

    def heard(self) -> None:
        """Something came."""
        if self._vigil.heard(self._clock()) and not self._is_looking:
            self._is_looking = True
            self._loop.call_soon(self._look)

    def _look(self) -> None:
        # A loop with a callback that is due asks for what has come, and does not wait for it. Who
        # else wants this processor, perhaps the client, goes first.
        if self._vigil.is_over(self._clock()):
            self._is_looking = False
        else:
            os.sched_yield()
            self._loop.call_soon(self._look)
