"""A value made from files, made again when they change. The last good one stays.

Decides when to read again and what to believe when reading fails. Does not know what the files
say.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final, Generic, TypeVar

from batching.errors import ServingError

__all__ = ["Watched", "follow"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_POLL_S: Final = 2.0

#: What tells one state of a file from the next: a rename over it changes the inode, a write in
#: place the time or the size.
_Mark = tuple[int, int, int] | None


class Watched(Generic[T]):
    """A value and the files it came from.

    Args:
        read: makes the value, and names every file that it depends on.

    Raises:
        ServingError: the first reading fails; there is no good value to fall back on.
    """

    def __init__(self, read: Callable[[], tuple[T, tuple[Path, ...]]]) -> None:
        self._read = read
        #: why the last reading failed; empty when it did not
        self.error = ""
        self.value, self._files = read()
        # Not looked at before they were read, so the first poll reads them once more.
        self._marks: dict[Path, _Mark] = {}

    def poll(self) -> bool:
        """Read again if a file has changed; whether `value` is a new one. Blocks on the files."""
        marks = self._look()
        if marks == self._marks:
            return False
        # Looked at before reading: what changes meanwhile is read again by the next poll.
        self._marks = marks
        try:
            self.value, self._files = self._read()
        except ServingError as error:
            self.error = error.message
            return False
        self.error = ""
        self._marks = {file: marks.get(file) for file in self._files}
        return True

    def __str__(self) -> str:
        return ", ".join(map(str, self._files))

    def _look(self) -> dict[Path, _Mark]:
        return {file: _mark(file) for file in self._files}


def _mark(file: Path) -> _Mark:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


async def follow(watched: Watched[T], use: Callable[[T], None], poll_s: float = _POLL_S) -> None:
    """Poll for ever, beside the loop, and use every new value."""
    while True:
        await asyncio.sleep(poll_s)
        before = watched.error
        if await asyncio.to_thread(watched.poll):
            logger.info("read again: %s", watched)
            use(watched.value)
        elif watched.error and watched.error != before:
            logger.error("%s; what was read before stays in use", watched.error)
