"""Whether a controller still reigns, asked before what a successor would suffer from.

A controller may stand still (a stopped process, a paused machine) until another one has taken its
place, and then go on with what it had in mind. States that it would keep are refused by the store,
and orders by the actors, since both name its term; but Ray kills and creates actors for whoever
asks. So it looks first which term the latest durable state is of: a successor writes one before it
does anything else. Between the look and the deed there is a moment, which this file keeps short and
cannot take away.

Where the store is away nobody knows: then actors are made, which a successor finds by their names,
and none is killed.

Decides whether a deed may be done. Does not know Ray, nor what is done.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

from batching.errors import FailedPrecondition, Unavailable
from cluster.declared import StateStore

__all__ = ["Deeds", "Reign", "ReignOver"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: What was seen longer ago is not believed: a successor needs as long to begin.
_FRESH_S: Final = 1.0
_LOOKS_MAX: Final = 3


class ReignOver(FailedPrecondition):
    """Another controller has taken over."""


class Reign:
    """The reign of one controller.

    Args:
        store: keeps the states of the cluster.
        cluster: its name.
        term: of this reign.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        store: StateStore,
        cluster: str,
        term: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._cluster = cluster
        self._term = term
        self._clock = clock

    def check(self) -> None:
        """Look which reign the latest durable state is of. Waits for the store.

        Raises:
            ReignOver: it is of a later one.
            Unavailable: the store does not answer, so nobody knows.
            OSError: likewise.
        """
        latest = self._store.latest_state(self._cluster)
        if latest is not None and latest[0] > self._term:
            raise ReignOver(
                f"term {self._term} of cluster {self._cluster!r} is over: "
                f"another controller has begun term {latest[0]}"
            )

    def act(self, deed: Callable[[], T], *, blindly: bool = False) -> T:
        """Do something at once after a look, on the same thread.

        Args:
            deed: what to do.
            blindly: do it, too, where the store does not answer.

        Raises:
            ReignOver: this reign is over; nothing was done.
            Unavailable: the store does not answer, or too slowly; nothing was done.
            OSError: likewise, or of the deed.
        """
        for _ in range(_LOOKS_MAX):
            asked_at = self._clock()
            try:
                self.check()
            except (Unavailable, OSError):
                if not blindly:
                    raise
            # This process may have stood still during the look, for long enough to be succeeded.
            if self._clock() - asked_at <= _FRESH_S:
                break
        else:
            if not blindly:
                raise Unavailable(
                    f"the store takes over {_FRESH_S:g} s to say which term of cluster "
                    f"{self._cluster!r} is the latest"
                )
        return deed()


class Deeds:
    """What a controller has Ray do, for its loop.

    Args:
        reign: asked before each.
        aside: runs what blocks on another thread.
    """

    def __init__(self, reign: Reign, aside: Callable[[Callable[[], Any]], Awaitable[Any]]) -> None:
        self._reign = reign
        self._aside = aside

    async def create(self, deed: Callable[[], T]) -> T:
        """Make an actor. Also while the store is away: a successor finds it by its name.

        Raises:
            ReignOver: this reign is over; nothing was done.
        """
        made: T = await self._aside(lambda: self._reign.act(deed, blindly=True))
        return made

    async def kill(self, deed: Callable[[], None], *, blindly: bool = False) -> bool:
        """End an actor, if this reign is known to last.

        Args:
            deed: kills it.
            blindly: also where nobody knows.

        Returns:
            Whether it was done; if not, the store is away.

        Raises:
            ReignOver: this reign is over; nothing was done.
        """
        try:
            await self._aside(lambda: self._reign.act(deed, blindly=blindly))
        except (Unavailable, OSError) as error:
            logger.error("controller: nothing is killed while the store is away: %s", error)
            return False
        return True
