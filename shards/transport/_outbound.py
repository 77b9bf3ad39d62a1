"""Large frames on their way out: in pieces that take turns, as far as the peer allows.

A frame whose body is larger than a chunk becomes a *stream*. Streams take turns, a chunk each; what
is small never waits here and passes between the chunks. A stream may send a window of bytes at
once and after that as many as the peer credits to it; one that has no credit is left out until it
gets some, and holds up no other. So many streams are begun at a time, the others wait in order:
what they wait for is a stream, never a neighbour's credit alone, as long as one has any.

Pure: bytes are handed out when the caller has room for them, and this file knows no clock and does
no I/O. It does not know what a header says but for the requests that a frame is about.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import Final

from shards.wire import (
    CHUNK_BYTES,
    Buffer,
    FrameFlag,
    FrameKind,
    Header,
    encode_prefix,
    requests_of,
)

__all__ = ["STREAMS_MAX", "WINDOW_BYTES", "Outbound", "next_stream"]

#: What a stream may send before the peer has said anything: a body of 1 MiB needs no answer.
WINDOW_BYTES: Final = 4 * CHUNK_BYTES
#: Streams that are begun and not ended, in each direction of a link.
STREAMS_MAX: Final = 64

_STREAM_MAX: Final = 0xFFFF_FFFF


def next_stream(stream: int) -> int:
    """The number after this one; 0 is no stream's."""
    return stream % _STREAM_MAX + 1


class _Stream:
    """One frame that is being sent."""

    __slots__ = ("buffers", "credit", "header", "header_data", "kind", "left", "number", "requests")

    def __init__(
        self,
        kind: FrameKind,
        header: Header,
        header_data: bytes,
        buffers: Sequence[Buffer],
        nbytes: int,
        credit: int,
    ) -> None:
        self.kind = kind
        self.header = header
        self.header_data = header_data
        self.buffers = deque([memoryview(buffer) for buffer in buffers])  # what is not sent
        self.left = nbytes  # bytes of them
        self.credit = credit
        self.number = 0  # until it is begun
        self.requests = requests_of(header)  # that somebody still waits for

    def take(self, nbytes: int, pieces: list[Buffer]) -> None:
        """Move so many bytes of the body to ``pieces``."""
        self.left -= nbytes
        self.credit -= nbytes
        buffers = self.buffers
        while nbytes:
            first = buffers[0]
            if len(first) > nbytes:
                pieces.append(first[:nbytes])
                buffers[0] = first[nbytes:]
                return
            if first:
                pieces.append(first)
            nbytes -= len(first)
            buffers.popleft()


class Outbound:
    """The streams that one end of a link sends.

    Args:
        chunk_bytes: the largest piece.
        window_bytes: what a stream may send without credit; the peer's must be the same.
        streams_max: that are begun at a time; the peer must take as many.

    Attributes:
        turns: streams that may send; true if there is anything to `take`.
        waiting_bytes: of bodies, not yet taken.
    """

    __slots__ = (
        "_begun",
        "_chunk_bytes",
        "_last",
        "_queue",
        "_slots",
        "_window_bytes",
        "turns",
        "waiting_bytes",
    )

    def __init__(
        self,
        *,
        chunk_bytes: int = CHUNK_BYTES,
        window_bytes: int = WINDOW_BYTES,
        streams_max: int = STREAMS_MAX,
    ) -> None:
        self._chunk_bytes = chunk_bytes
        self._window_bytes = window_bytes
        self._slots = streams_max  # that are free
        self._last = 0
        self._begun: dict[int, _Stream] = {}
        self._queue: deque[_Stream] = deque()  # for which there is no slot
        self.turns: deque[_Stream] = deque()
        self.waiting_bytes = 0

    @property
    def is_empty(self) -> bool:
        """Whether all that was offered has been taken, stopped or cancelled."""
        return not (self.turns or self._begun or self._queue)

    def offer(
        self, kind: FrameKind, header: Header, header_data: bytes, buffers: Sequence[Buffer]
    ) -> None:
        """Send this frame.

        Args:
            kind: CALL or REPLY.
            header: as a value, for who wants to cancel the frame; bytes if that is not known.
            header_data: as it travels.
            buffers: of the body, flat. They must not change until they were sent.
        """
        nbytes = sum(map(len, buffers))
        stream = _Stream(kind, header, header_data, buffers, nbytes, self._window_bytes)
        self.waiting_bytes += nbytes
        self._queue.append(stream)
        self._fill_slots()

    def take(self, nbytes: int) -> list[Buffer]:
        """What to write next: at least so many bytes if there are, and at most a chunk more."""
        pieces: list[Buffer] = []
        turns = self.turns
        while turns and nbytes > 0:
            stream = turns.popleft()
            if not stream.number:
                self._begin(stream, pieces)
            size = min(stream.left, stream.credit, self._chunk_bytes)
            pieces.append(encode_prefix(FrameKind.CHUNK, 0, stream.number, 0, size))
            stream.take(size, pieces)
            self.waiting_bytes -= size
            nbytes -= size
            if not stream.left:
                self._end(stream)
            elif stream.credit:
                turns.append(stream)
        return pieces

    def credit(self, number: int, nbytes: int) -> None:
        """The peer takes so many more bytes of a stream, which may have ended meanwhile."""
        stream = self._begun.get(number)
        if stream is None or not nbytes:
            return
        if not stream.credit:
            self.turns.append(stream)
        stream.credit += nbytes

    def stop(self, number: int) -> Header | None:
        """The peer wants no more of a stream: the header of what it will not get, if any."""
        stream = self._begun.get(number)
        if stream is None:
            return None
        self._drop(stream)
        return stream.header

    def cancel(self, kind: FrameKind, requests: Collection[int]) -> list[int]:
        """Nobody waits for these requests: drop the frames of this kind that are about no others.

        Returns:
            the streams that were begun: the peer must be told that they end here.
        """
        told: list[int] = []
        unbegun = [stream for stream in self.turns if not stream.number]
        for stream in (*self._begun.values(), *unbegun, *self._queue):
            if stream.kind is not kind or not stream.requests:
                continue
            stream.requests.difference_update(requests)
            if not stream.requests:
                self._drop(stream)
                if stream.number:
                    told.append(stream.number)
        return told

    def close(self) -> None:
        """Forget all that waits."""
        self._begun.clear()
        self._queue.clear()
        self.turns.clear()
        self.waiting_bytes = 0

    def _begin(self, stream: _Stream, pieces: list[Buffer]) -> None:
        # Numbered only now, so that numbers go out without a gap and the peer can check them.
        self._last = stream.number = next_stream(self._last)
        self._begun[stream.number] = stream
        data = stream.header_data
        head = encode_prefix(stream.kind, FrameFlag.MORE, stream.number, len(data), stream.left)
        pieces.append(head + data)

    def _drop(self, stream: _Stream) -> None:
        self.waiting_bytes -= stream.left
        if stream in self._queue:
            self._queue.remove(stream)
            return
        if stream in self.turns:
            self.turns.remove(stream)
        self._end(stream)

    def _end(self, stream: _Stream) -> None:
        self._begun.pop(stream.number, None)
        self._slots += 1
        self._fill_slots()

    def _fill_slots(self) -> None:
        while self._queue and self._slots:
            self._slots -= 1
            self.turns.append(self._queue.popleft())
