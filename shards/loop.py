"""One event loop in one thread of its own: where an actor's sockets and its scheduler live.

Ray runs an actor's methods on Ray's loop. Ours is apart, so that nothing that Ray, a load or a
status call does can sit between a frame and its answer.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import uvloop

__all__ = ["LoopThread"]

T = TypeVar("T")


class LoopThread:
    """A uvloop event loop running in a daemon thread until `close`."""

    def __init__(self, name: str) -> None:
        self.loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    @property
    def ident(self) -> int:
        """The thread's identifier."""
        return self._thread.ident or 0

    def run(self, coroutine: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """Run a coroutine on the loop and wait for it, from another thread.

        Raises:
            TimeoutError: it did not end in time, and was cancelled.
        """
        assert threading.get_ident() != self.ident, "would wait for itself"
        running = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        try:
            return running.result(timeout_s)
        finally:
            running.cancel()  # says nothing to one that has ended

    def call(self, fn: Callable[..., T], *args: Any) -> T:
        """Run a function on the loop and wait for its result, from another thread."""

        async def run() -> T:
            return fn(*args)

        return self.run(run())

    async def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on this loop from a coroutine on another loop."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self.loop))

    def close(self) -> None:
        """Stop the loop, end the thread, close the loop."""
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()
        if not self.loop.is_closed():
            self.loop.close()
