"""The large frames of one end of a link, both ways: what is sent, received, cancelled and refused.

Joins `Outbound` and `Inbound`, and is the whole of what two ends say to each other about streams.
Pure, as they are: bytes and frames in, bytes and frames out; nothing here waits or writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from shards.errors import FrameCorrupt, FrameRefused, LinkFull
from shards.transport._inbound import Inbound, Lease
from shards.transport._outbound import Outbound
from shards.wire import Buffer, CancelHeader, Frame, FrameKind, Header

__all__ = ["Streams"]

_REASON_BYTES_MAX: Final = 200


class Streams:
    """See the module.

    Args:
        inbound: of this end.
        outbound: of this end.
        waiting_bytes_max: of bodies that wait to be sent; one is always taken while none waits.

    Attributes:
        answers: what to tell the peer, in this order; the caller sends it and empties the list. To
            be looked at after every call but `take`, and after every read.
        chunks: what the link's reader is to be given.
        turns: true if `take` has something to give.
    """

    __slots__ = ("_outbound", "_waiting_bytes_max", "answers", "chunks", "turns")

    def __init__(self, inbound: Inbound, outbound: Outbound, waiting_bytes_max: int) -> None:
        self.answers = inbound.answers
        self.chunks = inbound
        self.turns = outbound.turns
        self._outbound = outbound
        self._waiting_bytes_max = waiting_bytes_max

    @property
    def all_sent(self) -> bool:
        """Whether nothing waits to be sent, allowed to or not."""
        return self._outbound.is_empty

    @property
    def waiting_bytes(self) -> int:
        """Of bodies that wait to be sent."""
        return self._outbound.waiting_bytes

    def offer(
        self, kind: FrameKind, header: Header, header_data: bytes, buffers: Sequence[Buffer]
    ) -> None:
        """Send a large frame; arguments as of `Outbound.offer`.

        Raises:
            LinkFull: too many bytes wait already.
        """
        waiting, bound = self._outbound.waiting_bytes, self._waiting_bytes_max
        if waiting and waiting + sum(map(len, buffers)) > bound:
            raise LinkFull(f"{waiting} bytes of large frames wait, the bound is {bound}")
        self._outbound.offer(kind, header, header_data, buffers)

    def take(self, nbytes: int) -> list[Buffer]:
        """What to write next, see `Outbound.take`."""
        return self._outbound.take(nbytes)

    def receive(self, frame: Frame) -> tuple[Header, FrameRefused] | None:
        """A CREDIT, RESET or STOP came.

        Returns:
            the header of a frame that the peer does not take, and why, if that is what it said.

        Raises:
            FrameCorrupt: it is none of these, or not a whole one.
        """
        data = frame.header
        assert isinstance(data, bytes)
        if frame.kind is FrameKind.CREDIT and len(data) == 4:
            self._outbound.credit(frame.stream, int.from_bytes(data, "little"))
        elif frame.kind is FrameKind.RESET:
            self.chunks.reset(frame.stream)
        elif frame.kind is FrameKind.STOP:
            header = self._outbound.stop(frame.stream)
            # Without a reason, its requests were cancelled: who did that needs no telling.
            if header is not None and data:
                return header, FrameRefused(data[:_REASON_BYTES_MAX].decode(errors="replace"))
        else:
            raise FrameCorrupt(f"{frame.kind.name} of {len(data)} bytes on an open link")
        return None

    def cancel(self, header: CancelHeader, sent: FrameKind, awaited: FrameKind) -> None:
        """Nobody waits for these requests: drop what is about no others.

        Args:
            header: names the requests.
            sent: frames of this kind, on their way out.
            awaited: frames of this kind, on their way in.
        """
        for stream in self._outbound.cancel(sent, header.requests):
            self.answers.append((FrameKind.RESET, stream, b""))
        self.chunks.cancel(awaited, header.requests)

    def free(self, lease: Lease) -> None:
        """Nobody views the memory of this lease any more."""
        self.chunks.free(lease)

    def close(self) -> None:
        """The link is over, or nearly: nothing is sent, or completed, any more."""
        self._outbound.close()
        self.chunks.close()
