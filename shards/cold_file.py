"""Rows read from a file on a fast disk when they are asked for, and at no other time.

What a mapped page costs is not known: the kernel reads ahead, keeps what nobody needs, and stops a
thread that only wanted to look. Here rows are read by explicit calls, past the page cache where the
file system can (O_DIRECT; elsewhere what was read is dropped from there at once), several at a time
from as many threads, in the order in which they lie, and neighbours in one call. It takes a fixed
number of bytes to read into.

Decides how rows become calls. Does not know caches, ids or overlays.
"""

from __future__ import annotations

import itertools
import mmap
import os
import weakref
from collections import deque
from typing import Final

import numpy as np
import numpy.typing as npt

from batching.errors import Unavailable
from shards.crew import Crew
from shards.errors import BundleIncomplete

__all__ = ["ColdFile", "buffer_bytes"]

Positions = npt.NDArray[np.int64]
RawRows = npt.NDArray[np.uint8]

#: What an offset, a length and an address must be a multiple of to go past the page cache.
_BLOCK: Final = 4096
#: Rows are read in one call where no more than this lies between them: a call costs as much.
_NEAR: Final = 16 << 10
#: Read by one call, and by how many at the same time.
_SPAN: Final = 64 << 10
_CALLS: Final = 8
#: Buffers are no more than this part of what a table may take.
_PART: Final = 16


def _least(row_bytes: int) -> int:
    """Bytes of the blocks that one row may lie in."""
    return (row_bytes + 2 * _BLOCK - 2) // _BLOCK * _BLOCK


def _shape(row_bytes: int, memory_bytes: int) -> tuple[int, int]:
    """How many buffers there are, and bytes of each."""
    # With one block more, a buffer holds rows that begin in two blocks.
    least = _least(row_bytes) + _BLOCK
    for_each = memory_bytes // _PART // _CALLS // _BLOCK * _BLOCK
    span = max(least, min(for_each, _SPAN))
    return max(min(memory_bytes // _PART // span, _CALLS), 1), span


def buffer_bytes(row_bytes: int, memory_bytes: int) -> int:
    """Bytes of the buffers of a file whose rows may take so much memory in all."""
    calls, span = _shape(row_bytes, memory_bytes)
    return calls * span


class ColdFile:
    """An immutable file of rows of one size.

    Args:
        descriptor: open for reading, of a file whose content was verified. It is closed when this
            is given up, and not before.
        row_bytes: of a row.
        memory_bytes: that the table may take, which decides how large the buffers are.
        crew: threads to read with, beside the caller's own.
        name: of the file, for messages.
        direct: whether to try to read past the page cache.

    Attributes:
        row_bytes: of a row.
        is_direct: whether rows are read past the page cache.
        calls: how many were made to read.
        read_bytes: bytes that these have brought.
    """

    def __init__(
        self,
        descriptor: int,
        row_bytes: int,
        memory_bytes: int,
        crew: Crew,
        name: str,
        *,
        direct: bool = True,
    ) -> None:
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)
        self.row_bytes = row_bytes
        self._crew = crew
        self._name = name
        self.calls = self.read_bytes = 0
        calls, span = _shape(row_bytes, memory_bytes)
        self._window = span - _least(row_bytes)
        self._memory = mmap.mmap(-1, calls * span)  # begins on a page, as such reads need
        buffers = np.frombuffer(self._memory, np.uint8).reshape(calls, span)
        self._buffers = deque(buffers)
        past = _open_direct(descriptor, buffers[0]) if direct else None
        self.is_direct = past is not None
        if past is not None:
            weakref.finalize(self, os.close, past)
        else:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        self._reading = descriptor if past is None else past

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return len(self._memory)

    def read(self, positions: Positions) -> RawRows:
        """Rows as ``[n, row_bytes]``. One thread at a time may ask.

        Args:
            positions: ``[n]``, ascending, each once, inside the file.

        Raises:
            BundleIncomplete: the file ends before one of them.
            Unavailable: the disk refuses.
        """
        out = np.empty((len(positions), self.row_bytes), np.uint8)
        if not len(positions) or not self.row_bytes:
            return out
        first = positions * self.row_bytes
        begin = first // _BLOCK * _BLOCK
        end = -(-(first + self.row_bytes) // _BLOCK) * _BLOCK
        # Of one window: so that what is read in one call fits into a buffer.
        window = begin // self._window
        is_apart = (begin[1:] - end[:-1] > _NEAR) | (window[1:] != window[:-1])
        edges = np.concatenate(([0], np.flatnonzero(is_apart) + 1, [len(positions)])).tolist()
        runs = deque(itertools.pairwise(edges))
        begins, ends = begin.tolist(), end.tolist()
        self.calls += len(runs)
        self.read_bytes += sum(ends[stop - 1] - begins[start] for start, stop in runs)

        def work() -> int:
            try:
                buffer = self._buffers.popleft()
            except IndexError:  # as many read already as there are buffers
                return 0
            try:
                while runs:
                    try:
                        start, stop = runs.popleft()
                    except IndexError:
                        break
                    self._fill(buffer, begins[start], ends[stop - 1], int(first[stop - 1]))
                    at = int(first[start]) - begins[start]
                    if stop - start == 1:
                        out[start] = buffer[at : at + self.row_bytes]
                        continue
                    apart = positions[start:stop] - positions[start]
                    lying = buffer[at : at + (int(apart[-1]) + 1) * self.row_bytes]
                    out[start:stop] = lying.reshape(-1, self.row_bytes)[apart]
            except BaseException:
                runs.clear()  # nobody waits for the others any more
                raise
            finally:
                self._buffers.append(buffer)
            return 0

        if len(runs) == 1:
            work()
        else:
            self._crew.run(work)
        return out

    def _fill(self, buffer: RawRows, begin: int, end: int, last: int) -> None:
        """Read the bytes from `begin` to `end`, or to the end of the file after the last row."""
        got, needed = 0, last + self.row_bytes - begin
        try:
            while got < needed:
                came = os.preadv(self._reading, [buffer[got : end - begin].data], begin + got)
                got += came
                if not came:
                    break
            if not self.is_direct:
                os.posix_fadvise(self._reading, begin, end - begin, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            text = f"rows of blob {self._name} cannot be read: {error.strerror}"
            raise Unavailable(text) from error
        if got < needed:
            raise BundleIncomplete(f"blob {self._name} ends at byte {begin + got}: it was cut")


def _open_direct(descriptor: int, buffer: RawRows) -> int | None:
    """The same file once more, to be read past the page cache; None where that cannot be."""
    try:
        # By its descriptor and not by its name: what was verified is what is read.
        found = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        return None
    try:
        # Some file systems take the flag and refuse the reads.
        os.preadv(found, [buffer[:_BLOCK].data], 0)
    except OSError:
        os.close(found)
        return None
    return found
