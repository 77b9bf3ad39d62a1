"""From an object store to a local file: ranges read in parallel, hashed in order, verified.

Decides how many bytes are under way at once, which bound the memory and are all that a slow range
can hold up. Bytes are hashed while they are in the cache of the processor anyway; runs of zeros
are left as holes. Does not know where the file lies, nor who waits for it.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol, Self

from batching.errors import Unavailable
from shards.calls import Call
from shards.errors import BundleCorrupt, BundleIncomplete
from shards.files import Bytes, Hasher, flat_view, is_zeros
from shards.manifest import BlobRef
from shards.objects import CHUNK
from shards.progress import Progress

__all__ = ["STREAMS", "Gate", "Source", "fetch"]

#: Ranges of one blob that are read at the same time.
STREAMS: Final = 8


class Source(Protocol):
    """Where the bytes come from: `shards.objects.Reading` is one."""

    @property
    def size(self) -> int:
        """How many bytes there are."""

    def start(
        self, offset: int, size: int, then: Callable[[Bytes], memoryview]
    ) -> Call[memoryview]:
        """Begin to read a range and to do something with it, on another thread."""


class Gate:
    """Bounds the ranges that several blobs have under way together, and with them the memory."""

    def __init__(self, ranges_max: int) -> None:
        self._slots = threading.BoundedSemaphore(ranges_max)

    def enter(self, *, wait: bool) -> bool:
        """Take a place; without waiting, False says that there is none."""
        return self._slots.acquire(blocking=wait)

    def leave(self) -> None:
        """Give a place back."""
        self._slots.release()


class _Range(NamedTuple):
    offset: int
    size: int
    call: Call[memoryview]


def fetch(
    source: Source,
    ref: BlobRef,
    descriptor: int | None,
    *,
    gate: Gate,
    timeout_s: float,
    progress: Progress | None = None,
) -> None:
    """Read a blob, verify it, and write it into a file.

    Args:
        source: of its bytes.
        ref: what they must be.
        descriptor: an empty file; None only verifies.
        gate: shared by all who read from the same store.
        timeout_s: the longest that one range may take.
        progress: told what has come.

    Raises:
        BundleIncomplete: the source is short.
        BundleCorrupt: the source is long, or does not have its digest.
        Unavailable: the source stopped answering.
        Cancelled: `progress` says so.
        OSError: the file cannot be written.
    """
    if source.size != ref.size:
        kind = BundleIncomplete if source.size < ref.size else BundleCorrupt
        raise kind(f"blob {ref.digest} has {source.size} of {ref.size} bytes in the store")
    with _Target(descriptor, ref.size) as target:
        found = _read_all(source, ref, target, gate, timeout_s, progress)
    if progress is not None:
        progress.note(ref.digest, ref.size)
    if found != ref.digest:
        raise BundleCorrupt(f"blob {ref.digest} in the store has digest {found}: corrupt")


def _read_all(
    source: Source,
    ref: BlobRef,
    target: _Target,
    gate: Gate,
    timeout_s: float,
    progress: Progress | None,
) -> str:
    """Read every range, and return the digest of all of them in order."""
    hasher = Hasher()
    under_way: deque[_Range] = deque()
    offset = 0
    try:
        while hasher.size < ref.size:
            if progress is not None:
                progress.note(ref.digest, hasher.size)
            # Waits only with empty hands: what is under way is always awaited by its owner, so
            # that blobs which share the gate cannot wait for each other.
            while offset < ref.size and len(under_way) < STREAMS:
                if not gate.enter(wait=not under_way):
                    break
                size = min(CHUNK, ref.size - offset)
                under_way.append(_begin(source, offset, size, target, gate))
                offset += size
            hasher.update(_come(under_way[0], ref, timeout_s))
            under_way.popleft()
            gate.leave()
    finally:
        for _ in under_way:
            gate.leave()
    return hasher.hexdigest()


def _begin(source: Source, offset: int, size: int, target: _Target, gate: Gate) -> _Range:
    def keep(data: Bytes) -> memoryview:
        view = flat_view(data)
        target.write(view, offset)
        return view

    try:
        return _Range(offset, size, source.start(offset, size, keep))
    except BaseException:
        gate.leave()
        raise


def _come(part: _Range, ref: BlobRef, timeout_s: float) -> memoryview:
    data = part.call.result(timeout_s)
    if len(data) != part.size:
        raise Unavailable(
            f"blob {ref.digest}: {len(data)} of {part.size} bytes at {part.offset} came"
        )
    return data


class _Target:
    """The file that is written, or none.

    A range that hangs outlives the fetch that began it, and would write through a number that by
    then names another file: so it writes through a duplicate, which is closed when the fetch has
    ended and no write is under way, and from then on writes nothing.
    """

    def __init__(self, descriptor: int | None, size: int) -> None:
        self._descriptor = None
        if descriptor is not None:
            os.truncate(descriptor, size)
            self._descriptor = os.dup(descriptor)
        self._lock = threading.Lock()
        self._writing = 0
        self._ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._settle(0, ended=True)

    def write(self, view: memoryview, offset: int) -> None:
        """Write a range, or leave a hole where it is all zeros."""
        if is_zeros(view):
            return
        with self._lock:
            descriptor = self._descriptor
            if self._ended or descriptor is None:
                return
            self._writing += 1
        try:
            while view:
                done = os.pwrite(descriptor, view, offset)
                view = view[done:]
                offset += done
        finally:
            self._settle(-1)

    def _settle(self, change: int, *, ended: bool = False) -> None:
        with self._lock:
            self._writing += change
            self._ended = self._ended or ended
            if self._ended and not self._writing and self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None
