"""Large frames on their way in: pieces put together, in memory that is bounded in bytes.

The peer may send a window of each stream unasked. Before it is allowed any more of one, memory for
the *whole* body is set apart; then all of it is credited at once. So a body that was begun beyond
its window can always be finished, whatever else is under way, and no set of half-received bodies
can wait for one another. Who gets memory next is who asked first.

The memory of a body counts until the last view of it is gone, not until its frame was handed on:
a handler that keeps large frames holds back further ones of the same link, and nothing else. (What
fits into a window is like a small frame: it comes unasked, and it is for the handler to bound how
many it keeps.) A handler must not wait for a large frame in order to let go of another one.

Pure: the memory apart, no I/O, no clock; who frees memory on another thread must hand the lease
over to the thread of this file. It does not know who sends, or what a unit is.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Collection
from typing import Any, Final, TypeAlias

from shards.errors import FrameCorrupt
from shards.transport._outbound import STREAMS_MAX, WINDOW_BYTES, next_stream
from shards.wire import (
    BODY_BYTES_MAX,
    CHUNK_BYTES,
    PREFIX_BYTES,
    Frame,
    FrameKind,
    Header,
    aligned,
    requests_of,
)

__all__ = ["Answer", "Inbound", "Lease"]

#: To be sent to the peer: kind, stream and header.
Answer: TypeAlias = tuple[FrameKind, int, bytes]

_NUMBERS: Final = 1 << 32
#: Where pieces of streams that were dropped go. Nobody reads it, so every link may write to it.
_NOWHERE: Final = memoryview(bytearray(CHUNK_BYTES))


class Lease(weakref.ref[Any]):
    """Watches the memory of one body."""

    __slots__ = ("nbytes",)
    # References to arrays are neither hashable nor comparable; this one is itself and no other.
    __hash__ = object.__hash__
    __eq__ = object.__eq__

    nbytes: int


class _Stream:
    """One frame that is being received."""

    __slots__ = ("body_bytes", "credit", "filled", "header", "kind", "memory", "number", "requests")

    def __init__(
        self, kind: FrameKind, number: int, header: Header, body_bytes: int, credit: int
    ) -> None:
        self.kind = kind
        self.number = number
        self.header = header
        self.body_bytes = body_bytes
        self.credit = credit  # that the peer has and did not use
        self.filled = 0
        self.memory: memoryview  # of the window, or of the whole body; a prefix longer
        self.requests = requests_of(header)  # that somebody still waits for


class Inbound:
    """The streams that one end of a link receives; the `Chunks` of its reader.

    Args:
        on_unused: told of a lease whose memory nobody views any more, on whatever thread: `free`
            must then be called with it.
        body_bytes_max: a larger body is refused on its head alone.
        bytes_max: of memory for bodies larger than the window, handed on or not.
        chunk_bytes: the largest piece.
        window_bytes: what may come of a stream unasked.
        streams_max: that may be under way at a time.

    Attributes:
        answers: to be sent to the peer; the caller empties it.
        held_bytes: of memory that is counted against ``bytes_max``.
    """

    __slots__ = (
        "_body_bytes_max",
        "_bytes_max",
        "_chunk_bytes",
        "_current",
        "_current_bytes",
        "_last",
        "_leases",
        "_on_unused",
        "_open",
        "_streams_max",
        "_waiting",
        "_window_bytes",
        "answers",
        "held_bytes",
    )

    def __init__(
        self,
        on_unused: Callable[[Lease], None],
        *,
        body_bytes_max: int = BODY_BYTES_MAX,
        bytes_max: int,
        chunk_bytes: int = CHUNK_BYTES,
        window_bytes: int = WINDOW_BYTES,
        streams_max: int = STREAMS_MAX,
    ) -> None:
        assert body_bytes_max <= bytes_max, "one body must fit"
        self._on_unused = on_unused
        self._body_bytes_max = body_bytes_max
        self._bytes_max = bytes_max
        self._chunk_bytes = chunk_bytes
        self._window_bytes = window_bytes
        self._streams_max = streams_max
        self._last = 0
        self._open: dict[int, _Stream] = {}
        self._waiting: deque[_Stream] = deque()  # for memory; they have only their window
        self._current: _Stream | None = None  # whose piece is being received
        self._current_bytes = 0
        self._leases: set[Lease] = set()
        self.answers: list[Answer] = []
        self.held_bytes = 0

    # What the reader tells.

    def open(self, kind: FrameKind, stream: int, header: Header, body_bytes: int) -> None:
        """See `shards.wire.Chunks.open`. A stream that cannot be taken is stopped, alone."""
        if stream != next_stream(self._last):
            raise FrameCorrupt(f"stream {stream} began after stream {self._last}")
        self._last = stream
        if body_bytes <= self._chunk_bytes:
            raise FrameCorrupt(f"a body of {body_bytes} bytes in pieces")
        if body_bytes > self._body_bytes_max:
            self._refuse(
                stream, f"a body of {body_bytes} bytes is over the bound of {self._body_bytes_max}"
            )
            return
        if len(self._open) >= self._streams_max:
            self._refuse(stream, f"{self._streams_max} large frames are under way already")
            return
        window = min(self._window_bytes, body_bytes)
        new = self._open[stream] = _Stream(kind, stream, header, body_bytes, window)
        if body_bytes <= self._window_bytes:
            new.memory = aligned(body_bytes + PREFIX_BYTES)
            return
        self._waiting.append(new)
        self._give_memory()
        if new in self._waiting:
            new.memory = aligned(window + PREFIX_BYTES)

    def begin(self, stream: int, nbytes: int) -> memoryview:
        """See `shards.wire.Chunks.begin`."""
        if not 0 < nbytes <= self._chunk_bytes:
            raise FrameCorrupt(f"a piece of {nbytes} bytes")
        self._current_bytes = nbytes
        current = self._current = self._open.get(stream)
        if current is None:
            # Of a stream that was stopped there may still be pieces under way.
            if stream == 0 or (self._last - stream) % _NUMBERS >= _NUMBERS // 2:
                raise FrameCorrupt(f"a piece of stream {stream}, which has not begun")
            return _NOWHERE[:nbytes]
        if nbytes > current.credit:
            raise FrameCorrupt(f"{nbytes} bytes came where {current.credit} were allowed")
        current.credit -= nbytes
        return current.memory[current.filled :]

    def end(self) -> Frame | None:
        """See `shards.wire.Chunks.end`."""
        current, self._current = self._current, None
        if current is None or current.number not in self._open:
            return None  # it was dropped, before this piece or during it
        current.filled += self._current_bytes
        if current.filled < current.body_bytes:
            if self._waiting:
                self._give_memory()
            return None
        del self._open[current.number]
        body = current.memory[: current.body_bytes].toreadonly()
        return Frame(current.kind, current.number, current.header, body)

    # What the owner of the link tells.

    def reset(self, stream: int) -> None:
        """The peer drops the rest of a stream."""
        dropped = self._open.get(stream)
        if dropped is not None:
            self._drop(dropped)

    def cancel(self, kind: FrameKind, requests: Collection[int]) -> None:
        """Nobody waits for these requests: stop frames of this kind that are about no others."""
        for stream in tuple(self._open.values()):
            if stream.kind is not kind or not stream.requests:
                continue
            stream.requests.difference_update(requests)
            if not stream.requests:
                self._drop(stream)
                self.answers.append((FrameKind.STOP, stream.number, b""))

    def free(self, lease: Lease) -> None:
        """Nobody views this memory any more."""
        self._leases.remove(lease)
        self.held_bytes -= lease.nbytes
        self._give_memory()

    def close(self) -> None:
        """Forget all that has not come whole."""
        self._open.clear()
        self._waiting.clear()
        self.answers.clear()

    def _refuse(self, stream: int, why: str) -> None:
        self.answers.append((FrameKind.STOP, stream, why.encode()))

    def _drop(self, stream: _Stream) -> None:
        del self._open[stream.number]
        if stream in self._waiting:
            self._waiting.remove(stream)
        del stream.memory  # a piece that is being received keeps it until it is there
        self._give_memory()

    def _give_memory(self) -> None:
        while self._waiting:
            stream = self._waiting[0]
            if self.held_bytes + stream.body_bytes > self._bytes_max:
                return
            # While a piece goes into its window, that cannot be moved; `end` comes back here.
            if stream is self._current:
                return
            self._waiting.popleft()
            try:
                memory = self._leased(stream.body_bytes + PREFIX_BYTES, stream.body_bytes)
            except MemoryError:
                del self._open[stream.number]
                self._refuse(stream.number, f"no memory for a body of {stream.body_bytes} bytes")
                continue
            if stream.filled:
                memory[: stream.filled] = stream.memory[: stream.filled]
            stream.memory = memory
            grant = stream.body_bytes - self._window_bytes
            stream.credit += grant
            self.answers.append((FrameKind.CREDIT, stream.number, grant.to_bytes(4, "little")))

    def _leased(self, nbytes: int, counted: int) -> memoryview:
        memory = aligned(nbytes)
        lease = Lease(memory.obj, self._on_unused)
        lease.nbytes = counted
        self._leases.add(lease)
        self.held_bytes += counted
        return memory
