"""The files of request logs: when one is full, which ones go, and the thread that writes them.

Each servable has a directory; a file's name begins with when it was begun, so that names sort by
age. Every request is one write: a file is whole after each of them, and what is read from it is
what was answered. Several processes of a node write into one directory, each into files of its
own. Decides which files there are. Does not know which requests are chosen, nor the event loop.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from batching.errors import ServingError
from cluster.doors.settings import RequestLog
from cluster.doors.stats import LogStats
from shards.recorded import FILE_HEAD, Recorded, encode_request
from shards.wire import Buffer

__all__ = ["Entry", "LogFile", "LogWriter", "Rotation", "expired", "redacted"]

logger = logging.getLogger(__name__)

Array = npt.NDArray[np.generic]

_SUFFIX: Final = ".requests"
#: A directory that cannot be written is not tried for each request.
_PAUSE_S: Final = 5.0
#: More buffers than a single write may have are joined first.
_BUFFERS_MAX: Final = 512
#: What may wait to be written, of all servables.
_WAITING_MAX: Final = 256
_WAITING_BYTES_MAX: Final = 16 << 20
_CLOSE_S: Final = 2.0


class Rotation:
    """How full a file is.

    Args:
        requests_max: of a file.
        bytes_max: of a file.
    """

    __slots__ = ("_bytes_max", "_requests_max", "requests", "size")

    def __init__(self, requests_max: int, bytes_max: int) -> None:
        self._requests_max = requests_max
        self._bytes_max = bytes_max
        self.requests = 0
        self.size = len(FILE_HEAD)

    def has_room(self, nbytes: int) -> bool:
        """Whether a request of so many bytes goes into this file."""
        return self.requests < self._requests_max and self.size + nbytes <= self._bytes_max

    def could_have(self, nbytes: int) -> bool:
        """Whether it would go into an empty one."""
        return len(FILE_HEAD) + nbytes <= self._bytes_max

    def add(self, nbytes: int) -> None:
        """A request was written."""
        self.requests += 1
        self.size += nbytes


def expired(names: Sequence[str], files_max: int) -> list[str]:
    """Which files of a directory are too many: the oldest. Other files than ours are left alone."""
    ours = sorted(name for name in names if name.endswith(_SUFFIX))
    return ours[: max(len(ours) - files_max, 0)]


def redacted(inputs: Mapping[str, Array], names: Sequence[str]) -> dict[str, Array]:
    """The inputs, of which those with these names say nothing but their shapes and lengths."""
    return {name: _blank(array) if name in names else array for name, array in inputs.items()}


def _blank(array: Array) -> Array:
    if array.dtype != object:
        return np.zeros_like(array)
    blank = np.empty(array.size, object)
    blank[:] = [b"x" * len(text) for text in array.reshape(-1).tolist()]
    return blank.reshape(array.shape)


class LogFile:
    """The files of one servable that one process writes. Belongs to the writing thread.

    Args:
        rule: how requests are kept.
        servable: whose they are.
        clock: seconds, for pauses.
        wall_ns: nanoseconds since 1970, for names.
    """

    def __init__(
        self,
        rule: RequestLog,
        servable: str,
        clock: Callable[[], float] = time.monotonic,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._rule = rule
        self._directory = Path(rule.directory, servable)
        self._clock = clock
        self._wall_ns = wall_ns
        self._descriptor = -1
        self._rotation = self._new_rotation()
        self._broken_until = -math.inf
        self._is_retired = False

    def write(self, request: Recorded) -> bool:
        """Append a request; False where it was not.

        Nothing that goes wrong with the file is raised: it is said once in a while, and the next
        requests are not tried for a moment.
        """
        if self._clock() < self._broken_until or self._is_retired:
            return False
        try:
            blanked = redacted(request.inputs, self._rule.redact)
            buffers = encode_request(
                Recorded(signature=request.signature, inputs=blanked, version=request.version)
            )
            nbytes = sum(len(buffer) for buffer in buffers)
            if not self._rotation.could_have(nbytes):
                return False
            self._make_room(nbytes)
            self._append(buffers, nbytes)
        except ServingError:
            return False  # a request that no file can have
        except OSError as error:
            logger.warning("the request log in %s is not written: %s", self._directory, error)
            self._broken_until = self._clock() + _PAUSE_S
            self.close()
            return False
        return True

    def close(self) -> None:
        """End the file; the next request begins another."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def retire(self) -> None:
        """End the file for good."""
        self.close()
        self._is_retired = True

    def _new_rotation(self) -> Rotation:
        return Rotation(self._rule.requests_max, self._rule.bytes_max)

    def _make_room(self, nbytes: int) -> None:
        if self._descriptor >= 0:
            # Another process may have found it to be one too many, and removed it.
            is_there = os.fstat(self._descriptor).st_nlink > 0
            if is_there and self._rotation.has_room(nbytes):
                return
            self.close()
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        name = f"{self._wall_ns():020d}-{os.getpid()}{_SUFFIX}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(self._directory / name, flags, 0o600)
        self._rotation = self._new_rotation()
        self._write((FILE_HEAD,), len(FILE_HEAD))
        for old in expired(os.listdir(self._directory), self._rule.files_max):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._directory / old)

    def _append(self, buffers: Sequence[Buffer], nbytes: int) -> None:
        try:
            self._write(buffers, nbytes)
        except OSError:
            # What was written of it would make the file one that is cut off.
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._rotation.size)
            raise
        self._rotation.add(nbytes)

    def _write(self, buffers: Sequence[Buffer], nbytes: int) -> None:
        together = buffers if len(buffers) <= _BUFFERS_MAX else (b"".join(buffers),)
        written = os.writev(self._descriptor, together)
        if written != nbytes:
            raise OSError(f"{written} of {nbytes} bytes were written: the disk is full")


class Entry(NamedTuple):
    """A request that waits to be written.

    Attributes:
        file: where it goes.
        stats: where that is counted.
        request: it, or None where the file gets no more.
        nbytes: that it keeps from being freed.
    """

    file: LogFile
    stats: LogStats
    request: Recorded | None
    nbytes: int = 0


class LogWriter:
    """Writes requests on a thread of its own, which is started when the first one comes.

    What waits is bounded in number and bytes. Each side counts in integers that only it changes, so
    nothing is locked.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[Entry | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._offered = self._offered_bytes = 0
        self._done = self._done_bytes = 0

    def offer(self, entry: Entry) -> bool:
        """Have an entry written; False where too much waits. Never waits itself."""
        waiting = self._offered - self._done
        waiting_bytes = self._offered_bytes - self._done_bytes + entry.nbytes
        is_full = waiting >= _WAITING_MAX or waiting_bytes > _WAITING_BYTES_MAX
        if is_full and entry.request is not None:
            return False
        self._offered += 1
        self._offered_bytes += entry.nbytes
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="request-log", daemon=True)
            self._thread.start()
        self._queue.put(entry)
        return True

    def close(self) -> None:
        """Write what waits, if that is soon done, and end the thread."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(_CLOSE_S)
            self._thread = None

    def _run(self) -> None:
        while (entry := self._queue.get()) is not None:
            try:
                if entry.request is None:
                    entry.file.retire()
                elif entry.file.write(entry.request):
                    entry.stats.written += 1
                else:
                    entry.stats.failed += 1
            except Exception:  # one request, and not the log
                logger.exception("a request could not be logged")
                entry.stats.failed += 1
            self._done += 1
            self._done_bytes += entry.nbytes
