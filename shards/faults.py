"""A process that can no longer vouch for itself ends; who supervises it makes another.

Decides which faults are of that kind: a serving thread that died, since what it had will never be
answered, and a failed assertion on the event loop, since the books it guards are wrong. What else
is of that kind, an engine says (`end_process`). Anything else is logged and costs what it happened
to. Does not know what the threads do.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Collection
from typing import Any, Final

__all__ = ["EXIT_STATUS", "end_process", "end_process_on_fault"]

logger = logging.getLogger(__name__)

#: What the process ends with: "internal software error" of sysexits.h.
EXIT_STATUS: Final = 70


def end_process(reason: str) -> None:
    """End this process at once: links break, and whoever asked asks another one."""
    logger.critical("this process ends: %s", reason)
    os._exit(EXIT_STATUS)


def end_process_on_fault(loop: asyncio.AbstractEventLoop, threads: Collection[str]) -> None:
    """End this process when one of these threads dies, or the loop meets a failed assertion.

    Call it once, on the loop's thread or before the loop has work.

    Args:
        loop: whose callbacks and tasks are watched.
        threads: the first words of names of threads that must not die; those of others are none of
            our business.
    """
    elsewhere = threading.excepthook

    def on_thread_death(what: threading.ExceptHookArgs) -> None:
        if what.thread is None or what.thread.name.partition(" ")[0] not in threads:
            elsewhere(what)
            return
        logger.critical("thread %s died", what.thread.name, exc_info=what.exc_value)
        os._exit(EXIT_STATUS)

    def on_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        loop.default_exception_handler(context)
        if isinstance(context.get("exception"), AssertionError):
            logger.critical("an assertion failed: nothing here can be trusted any more")
            os._exit(EXIT_STATUS)

    threading.excepthook = on_thread_death
    loop.set_exception_handler(on_loop_error)
