"""Looking after work that another thread, or a device, may never give back.

Looks only while there is something to look after; a look costs what the question costs. What counts
as stuck is decided by who asks for the watch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

__all__ = ["Watchdog"]


class Watchdog:
    """Asks a question every so often. Used on the loop's thread.

    Args:
        loop: the loop whose thread this is.
        period_s: between two looks.
        find: says what is stuck; "" for nothing; None for nothing to look after any more.
        report: told of what is stuck, at every look that finds it.
    """

    __slots__ = ("_find", "_loop", "_period_s", "_report", "_timer")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        period_s: float,
        find: Callable[[], str | None],
        report: Callable[[str], None],
    ) -> None:
        self._loop = loop
        self._period_s = period_s
        self._find = find
        self._report = report
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """There is something to look after; called for every piece of work."""
        if self._timer is None:
            self._timer = self._loop.call_later(self._period_s, self._look)

    def _look(self) -> None:
        self._timer = None
        found = self._find()
        if found:
            self._report(found)
        if found is not None:
            self.start()
