"""The interface of the data plane, the same over sockets and over Ray calls: values and protocols.

Public as `shards.transport`. This file does no I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from shards.errors import FrameRefused
from shards.handshake import PeerInfo
from shards.wire import BODY_BYTES_MAX, HEADER_BYTES_MAX, Buffer, Frame, FrameKind, Header


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Every bound of a link.

    Attributes:
        header_bytes_max: of one frame, in and out.
        body_bytes_max: of one frame, in and out; in shared memory, the peer's memory is the bound.
        waiting_bytes_max: of small frames that wait for the peer to read.
        stream_bytes_max: of large ones (over `shards.wire.CHUNK_BYTES`): of those that wait to be
            sent, and again of those that are being received or that the handler still views. A
            frame is always taken for sending while no large one waits.
        shared_bytes_max: of our memory that a peer on the same node may read; 0 shares none. What
            does not fit goes through the socket.
        shared_body_bytes_min: a smaller body always goes through the socket.
        links_max: a listener closes what connects beyond this.
        handshake_timeout_s: from connecting to having proven who one is.
        ping_after_s: of silence.
        silent_pings_max: so many pings without a byte in answer, and the peer is given up.
        close_timeout_s: how long a closing link waits for the peer to read what is left.
    """

    header_bytes_max: int = HEADER_BYTES_MAX
    body_bytes_max: int = BODY_BYTES_MAX
    waiting_bytes_max: int = 64 << 20
    stream_bytes_max: int = 512 << 20
    shared_bytes_max: int = 64 << 20
    shared_body_bytes_min: int = 64 << 10
    links_max: int = 4096
    handshake_timeout_s: float = 5.0
    ping_after_s: float = 10.0
    silent_pings_max: int = 3
    close_timeout_s: float = 5.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) <= 0 and name != "shared_bytes_max":
                raise ValueError(f"{name} must be positive")
        if self.header_bytes_max > HEADER_BYTES_MAX:
            raise ValueError(f"header_bytes_max is over {HEADER_BYTES_MAX}")
        if self.body_bytes_max > self.stream_bytes_max:
            raise ValueError(
                "body_bytes_max is over stream_bytes_max: such a body could never come"
            )


class Counters:
    """What went over the links of one listener, or of one caller, since it began."""

    __slots__ = (
        "bytes_received",
        "bytes_sent",
        "frames_received",
        "frames_sent",
        "handshakes_refused",
        "links_closed",
        "links_opened",
    )

    def __init__(self) -> None:
        self.bytes_received = 0
        self.bytes_sent = 0
        self.frames_received = 0
        self.frames_sent = 0
        self.handshakes_refused = 0
        self.links_closed = 0
        self.links_opened = 0

    def stats(self) -> dict[str, int]:
        """The counters by name."""
        return {name: getattr(self, name) for name in self.__slots__}


class Link(Protocol):
    """One connection to a proven peer, seen from either side. Used on its loop's thread alone."""

    @property
    def peer(self) -> PeerInfo:
        """Who is at the other end."""
        ...

    @property
    def waiting_bytes(self) -> int:
        """Bytes taken by `send` that have not left this process."""
        ...

    def send(
        self,
        kind: FrameKind,
        header: Header,
        buffers: Sequence[Buffer] = (),
    ) -> None:
        """Queue one CALL, REPLY or CANCEL frame. Never blocks.

        Frames sent in one turn of the loop leave in one write. Frames with a body of up to
        `shards.wire.CHUNK_BYTES` arrive in order. A larger one travels in pieces between them: it
        arrives when its last piece does, after small frames that were sent later. The buffers
        belong to the link from now on: they are not copied, and must never be written again.

        A CANCEL overtakes what it cancels: a large call whose requests it names, all of them, and
        a large reply to them are dropped on both sides, wherever they are by then.

        Args:
            kind: CALL, REPLY or CANCEL.
            header: a header of `shards.wire`, or its encoding. A frame that is to be found by a
                later CANCEL needs the header itself.
            buffers: the body, in order.

        Raises:
            LinkClosed: the link is closed or closing.
            LinkFull: the peer does not read, or does not take large frames, and the bound of
                waiting bytes is reached.
            InvalidArgument: the frame is over the bounds of one frame.
        """
        ...

    def flush(self) -> None:
        """Write what waits now, not at the end of the turn: its reader can begin meanwhile."""
        ...

    def close(self, reason: str = "") -> None:
        """Send what waits, say goodbye, and close. May be called again; `on_closed` follows."""
        ...


class LinkHandler(Protocol):
    """Who owns a link. Called on the loop's thread, never concurrently, and never from `send`."""

    def on_frame(self, link: Link, frame: Frame) -> None:
        """A CALL, REPLY or CANCEL came. What this raises closes the link."""
        ...

    def on_refused(self, link: Link, header: Header, error: FrameRefused) -> None:
        """The peer does not take a large frame that was sent; the link goes on.

        Args:
            link: over which it was sent.
            header: of the frame, as it was given to `Link.send`.
            error: says why.
        """
        ...

    def on_closed(self, link: Link, error: Exception | None) -> None:
        """The link is over; called exactly once for a link that was open.

        Args:
            link: stays good for its `peer`, and for nothing else.
            error: None after a goodbye of either side, else why: `LinkClosed`, `FrameCorrupt`.
        """
        ...
