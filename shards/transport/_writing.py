"""Writes the frames of a session to its pipe: small ones in order, large ones in pieces between.

Small frames of one turn of the loop leave in one write. Of the pieces of large ones, no more goes
to the pipe than keeps it busy. When to write is the session's to say.
"""

from __future__ import annotations

from typing import Final

from shards.transport._link import Counters
from shards.transport._pipe import Pipe
from shards.transport._streams import Streams
from shards.wire import CHUNK_BYTES, Buffer

__all__ = ["PIECES_BYTES_MAX", "PIECES_MARK_BYTES", "Writer"]

#: Joining buffers for one write pays up to about this many bytes; beyond, they are written apart.
_JOIN_BYTES_MAX: Final = 64 << 10
#: While the pipe holds more than the mark, no piece is written to it; then, up to so many bytes.
PIECES_MARK_BYTES: Final = CHUNK_BYTES // 2
PIECES_BYTES_MAX: Final = 2 * CHUNK_BYTES


class Writer:
    """See the module.

    Args:
        streams: the large frames.
        counters: of what was written.
        pieces_bytes_max: of large frames, so much is written at a time.

    Attributes:
        pipe: None before there is one, and when it is lost.
        small: small frames that wait, in order.
    """

    __slots__ = ("_counters", "_pieces_bytes_max", "_small_bytes", "_streams", "pipe", "small")

    def __init__(self, streams: Streams, counters: Counters, pieces_bytes_max: int) -> None:
        self._streams = streams
        self._counters = counters
        self._pieces_bytes_max = pieces_bytes_max
        self.pipe: Pipe | None = None
        self.small: list[Buffer] = []
        self._small_bytes = 0

    @property
    def waiting_bytes(self) -> int:
        """Bytes that a small frame added now would have before it."""
        written = self.pipe.get_write_buffer_size() if self.pipe is not None else 0
        return self._small_bytes + written

    def add(self, frame: list[Buffer], size: int) -> None:
        """Let a small frame wait for the next write."""
        self.small += frame
        self._count(size)

    def add_first(self, frame: bytes) -> None:
        """The same, before all that waits."""
        self.small.insert(0, frame)
        self._count(len(frame))

    def write_small(self) -> None:
        """Write the small frames."""
        small, size = self.small, self._small_bytes
        if not small or self.pipe is None:
            return
        self.small, self._small_bytes = [], 0
        if len(small) == 1:
            self.pipe.write(small[0])
        elif size <= _JOIN_BYTES_MAX:
            self.pipe.write(b"".join(small))
        else:
            self.pipe.writelines(small)

    def write_pieces(self) -> bool:
        """Write as much of the large frames as keeps the pipe busy.

        Returns:
            whether to come back soon; else the pipe's owner says when it has room.
        """
        pipe = self.pipe
        if pipe is None or pipe.get_write_buffer_size() > PIECES_MARK_BYTES:
            return False
        pieces = self._streams.take(self._pieces_bytes_max)
        self._counters.bytes_sent += sum(map(len, pieces))
        pipe.writelines(pieces)
        return bool(self._streams.turns) and pipe.get_write_buffer_size() <= PIECES_MARK_BYTES

    def forget(self) -> None:
        """Nothing that waits will be written."""
        self.small, self._small_bytes = [], 0

    def _count(self, size: int) -> None:
        self._small_bytes += size
        self._counters.frames_sent += 1
        self._counters.bytes_sent += size
