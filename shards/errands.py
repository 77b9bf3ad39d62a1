"""Work that loads wait for and that cannot be interrupted: others' code, compilers.

A thread cannot be ended. So whoever waits for one may stop waiting, and it is left to itself: what
it comes to is dropped. Decides who stops waiting, and that nothing is begun a second time while it
is still at it, so that what hangs takes one thread, however often its load is ordered. Does not
know what the work is.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import TypeVar

from batching.errors import Cancelled, Unavailable
from shards.hosting import ServableVersion

__all__ = ["Errands"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Errands:
    """What one opener waits for. Lives on its event loop."""

    def __init__(self) -> None:
        self._waiting: dict[ServableVersion, asyncio.Future[str]] = {}
        self._left: set[str] = set()

    async def run(self, version: ServableVersion, what: str, work: Callable[[], T]) -> T:
        """Have something done on a thread of its own, which does not hold up the process's end.

        Args:
            version: for which version.
            what: the work, in words that tell it from any other.
            work: does it.

        Raises:
            Cancelled: it was called off.
            Unavailable: it is still under way for a load that was called off.
            Exception: whatever the work raises.
        """
        if what in self._left:
            raise Unavailable(f"{what} is still at work for a load that was called off")
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        threading.Thread(
            target=_do, args=(work, done), name=f"errand {what}"[:60], daemon=True
        ).start()
        try:
            return await self.wait(version, done)
        finally:
            if not done.done():
                logger.warning("%s goes on though its load was called off", what)
                self._left.add(what)
                done.add_done_callback(lambda done: self._come_back(what, done))

    async def wait(self, version: ServableVersion, done: asyncio.Future[T]) -> T:
        """Wait for what others may wait for as well; it goes on if this is called off.

        Raises:
            Cancelled: it was called off.
            Exception: whatever the future has.
        """
        called_off = asyncio.get_running_loop().create_future()
        self._waiting[version] = called_off
        try:
            await asyncio.wait({done, called_off}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            del self._waiting[version]
        if not done.done():
            raise Cancelled(called_off.result())
        return done.result()

    def call_off(self, version: ServableVersion, reason: str) -> None:
        """Stop waiting on behalf of a version; what it waits for raises `Cancelled`."""
        called_off = self._waiting.get(version)
        if called_off is not None and not called_off.done():
            called_off.set_result(f"{version[0]} version {version[1]}: {reason}")

    def _come_back(self, what: str, done: asyncio.Future[T]) -> None:
        self._left.discard(what)
        error = done.exception()
        logger.info("%s has ended, for nobody: %s", what, error or "it went well")


def _do(work: Callable[[], T], done: asyncio.Future[T]) -> None:
    try:
        result = work()
    except BaseException as error:
        # What ends a loop, or cannot be in a future, is not for others' code to say.
        is_plain = isinstance(error, Exception) and not isinstance(error, StopIteration)
        _tell(done, done.set_exception, error if is_plain else RuntimeError(repr(error)))
    else:
        _tell(done, done.set_result, result)


def _tell(done: asyncio.Future[T], end: Callable[..., None], value: object) -> None:
    try:
        done.get_loop().call_soon_threadsafe(end, value)
    except RuntimeError:
        logger.debug("an errand ended after its loop")
