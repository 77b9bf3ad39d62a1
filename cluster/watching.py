"""Hearing from actors: how long one may be silent, and what its end is called.

An actor is asked for a report that it gives after `WATCH_S`, so a call is always pending and the
end of a process is known at once. A process can also stop without ending: a loop that no longer
turns, a stopped process, a machine that is cut off. So the call is bounded, too. This file does not
know Ray.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable
from typing import Final, TypeVar

import msgspec

from shards.orders import decode

__all__ = ["SILENT_S", "START_S", "heard", "reason_of"]

T = TypeVar("T", bound=msgspec.Struct)

#: Reports come every five seconds (`shards.actors`); three that are missed mean that no more come.
SILENT_S: Final = 20.0
#: A first report waits for a process to start and import what it needs; below the time after which
#: the controller asks for the start again.
START_S: Final = 110.0
#: A loop whose clock rings so late had stood still.
_STALL_S: Final = 1.0
#: Of the page that Ray writes about the end of a process, the one word that differs.
_EXIT_TYPE: Final = re.compile(r"Worker exit type: (\w+)")


async def heard(answer: Awaitable[bytes], kind: type[T], within_s: float) -> T:
    """What an actor answers.

    Raises:
        TimeoutError: nothing for so long; says so.
    """

    async def wait() -> bytes:
        return await answer

    loop = asyncio.get_running_loop()
    asked = asyncio.ensure_future(wait())
    try:
        while True:
            due = loop.time() + within_s
            done, _ = await asyncio.wait({asked}, timeout=within_s)
            if done:
                return decode(asked.result(), kind)
            # If this process itself stood still, its clock is the first to know that it goes on:
            # what was said meanwhile is yet to be taken in.
            if loop.time() - due < _STALL_S:
                raise TimeoutError(f"not a word from it for {within_s:g} s")
    finally:
        asked.cancel()


def reason_of(error: BaseException) -> str:
    """What went wrong, in a line for people."""
    text = str(error)
    ended = _EXIT_TYPE.search(text)
    if ended is not None:
        return f"its process ended ({ended[1]})"
    if isinstance(error, TimeoutError) and text:
        return text
    lines = [line for line in text.splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip() if lines else ''}"[:512]
