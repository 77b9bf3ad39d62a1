"""One link over any ordered pipe of bytes: handshake, frames, coalescing, bounds, keep-alive.

Sockets and Ray calls both feed bytes into a `Session` and give it a `Pipe` to write to; everything
that must behave alike on both is here. The states of a session::

    HANDSHAKE --proven--> OPEN --close, goodbye, corrupt frame--> CLOSING --pipe lost--> CLOSED

and from any of them to CLOSED when the pipe is lost. The owner hears of a link that was open
exactly once when it reaches CLOSED. A session lives on one loop and is not safe for threads; it
makes no task and no future per frame.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Final, Protocol

import msgspec

from batching.errors import InvalidArgument
from shards.errors import FrameCorrupt, HandshakeRefused, LinkClosed, LinkFull
from shards.handshake import HANDSHAKE_BYTES_MAX, Handshake, PeerInfo, refusal
from shards.transport._link import Counters, Limits, LinkHandler
from shards.wire import (
    PREFIX_BYTES,
    SLAB_BYTES,
    Buffer,
    Frame,
    FrameKind,
    FrameReader,
    encode_frame,
    encode_header,
)

logger = logging.getLogger(__name__)

#: Joining buffers for one write pays up to about this many bytes; beyond, they are written apart.
_JOIN_BYTES_MAX: Final = 64 << 10
_REASON_BYTES_MAX: Final = 200
_PING_BYTES_MAX: Final = 64


class Pipe(Protocol):
    """Where a session writes; an asyncio transport is one."""

    def write(self, data: Buffer) -> None: ...
    def writelines(self, list_of_data: Sequence[Buffer]) -> None: ...
    def get_write_buffer_size(self) -> int: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...


def log_refusal(counters: Counters, name: str, error: Exception | None) -> None:
    """What a listener tells of a link that did not open, without filling the log."""
    count = counters.handshakes_refused
    if isinstance(error, HandshakeRefused | FrameCorrupt) and count & (count - 1) == 0:
        logger.warning("%s refused a handshake, its %d. by now: %s", name, count, error)


class State(StrEnum):
    """Where a session is in its life."""

    HANDSHAKE = "HANDSHAKE"
    OPEN = "OPEN"
    CLOSING = "CLOSING"
    CLOSED = "CLOSED"


class Session:
    """A `Link` over a `Pipe`.

    Args:
        handshake: this side of it.
        on_settled: told once: None when the link opened, or why it never will.
        on_lost: told once, last, when nothing of the session is left; it may never have opened.
    """

    __slots__ = (
        "_corked",
        "_counters",
        "_error",
        "_flushing",
        "_handler",
        "_handshake",
        "_heard",
        "_limits",
        "_loop",
        "_on_lost",
        "_on_settled",
        "_peer",
        "_pending",
        "_pending_bytes",
        "_pipe",
        "_reader",
        "_silent_pings",
        "_state",
        "_timer",
    )

    def __init__(
        self,
        *,
        loop: asyncio.AbstractEventLoop,
        handshake: Handshake,
        handler: LinkHandler,
        limits: Limits,
        counters: Counters,
        on_settled: Callable[[Session, Exception | None], None],
        on_lost: Callable[[Session], None],
    ) -> None:
        self._loop = loop
        self._handshake = handshake
        self._handler = handler
        self._limits = limits
        self._counters = counters
        self._on_settled = on_settled
        self._on_lost = on_lost
        self._state = State.HANDSHAKE
        self._peer: PeerInfo | None = None
        self._pipe: Pipe | None = None
        self._error: Exception | None = None
        self._reader = FrameReader(
            header_bytes_max=HANDSHAKE_BYTES_MAX,
            body_bytes_max=0,
            slab_bytes=HANDSHAKE_BYTES_MAX + PREFIX_BYTES,
        )
        self._pending: list[Buffer] = []
        self._pending_bytes = 0
        self._corked = False  # a flush follows at the end of this read
        self._flushing = False  # a flush follows at the end of this turn
        self._heard = False  # since the last tick
        self._silent_pings = 0
        self._timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Session {self._state} with {self._peer}>"

    # The Link.

    @property
    def peer(self) -> PeerInfo:
        """See `Link.peer`."""
        assert self._peer is not None, "a link is handed out only once its peer is proven"
        return self._peer

    @property
    def waiting_bytes(self) -> int:
        """See `Link.waiting_bytes`."""
        written = self._pipe.get_write_buffer_size() if self._pipe is not None else 0
        return self._pending_bytes + written

    def send(
        self,
        kind: FrameKind,
        header: msgspec.Struct | bytes,
        buffers: Sequence[Buffer] = (),
        stream: int = 0,
    ) -> None:
        """See `Link.send`."""
        assert FrameKind.CALL <= kind <= FrameKind.CANCEL
        if self._state is not State.OPEN:
            raise LinkClosed(f"the link to {self.peer.name} is closed")
        data = header if isinstance(header, bytes) else encode_header(header)
        frame = encode_frame(kind, stream, data, buffers)
        size = sum(map(len, frame))
        limits = self._limits
        body_bytes = size - len(data) - PREFIX_BYTES
        if body_bytes > limits.body_bytes_max or len(data) > limits.header_bytes_max:
            raise InvalidArgument(
                f"a frame of {len(data)} bytes of header and {body_bytes} of body is over the "
                f"bounds of {limits.header_bytes_max} and {limits.body_bytes_max}"
            )
        waiting = self.waiting_bytes
        if waiting and waiting + size > limits.waiting_bytes_max:
            raise LinkFull(
                f"{waiting} bytes wait for {self.peer.name}, the bound is "
                f"{limits.waiting_bytes_max}"
            )
        self._queue(frame, size)

    def close(self, reason: str = "") -> None:
        """See `Link.close`."""
        if self._state is State.OPEN:
            goodbye = reason.encode()[:_REASON_BYTES_MAX]
            self._queue_now(FrameKind.GOODBYE, goodbye)
            self._finish()

    # What the pipe's owner calls.

    def begin(self, pipe: Pipe) -> None:
        """The pipe is there: start the handshake."""
        if self._state is not State.HANDSHAKE:  # given up while the pipe was being made
            pipe.abort()
            return
        self._pipe = pipe
        self._timer = self._loop.call_later(self._limits.handshake_timeout_s, self._handshake_late)
        for kind, header in self._handshake.start():
            self._queue_now(kind, header)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the pipe's next bytes go."""
        return self._reader.get_buffer(sizehint)

    def buffer_updated(self, nbytes: int) -> None:
        """So many bytes came into the buffer."""
        self._counters.bytes_received += nbytes
        self._heard = True
        self._reader.buffer_updated(nbytes)
        self._drain()

    def feed(self, data: Buffer) -> None:
        """These bytes came, from a pipe that cannot receive into a buffer."""
        rest = memoryview(data)
        while rest and self._state in (State.HANDSHAKE, State.OPEN):
            room = self._reader.get_buffer()
            size = min(len(room), len(rest))
            room[:size] = rest[:size]
            rest = rest[size:]
            try:
                self.buffer_updated(size)
            except Exception as error:
                # As asyncio does for a socket: who made the call that carried the bytes is not
                # to blame for this side's handler.
                self._loop.call_exception_handler(
                    {"message": f"the handler of {self} failed", "exception": error}
                )

    @property
    def is_open(self) -> bool:
        """Whether frames may be sent."""
        return self._state is State.OPEN

    def shut(self, reason: str) -> None:
        """Close, whatever state this is in."""
        if self._state is State.OPEN:
            self.close(reason)
        else:
            self.fail(LinkClosed(reason))

    def lost(self, error: BaseException | None) -> None:
        """The pipe is gone. May be told more than once."""
        if self._state is State.CLOSED:
            return
        was, self._state = self._state, State.CLOSED
        if self._timer is not None:
            self._timer.cancel()
        self._pipe = self._timer = None
        self._pending, self._pending_bytes = [], 0
        if was is not State.CLOSING and self._error is None:
            name = self._peer.name if self._peer else "a peer in its handshake"
            self._error = LinkClosed(f"{name} went away" + (f": {error}" if error else ""))
        try:
            if self._peer is None:
                self._on_settled(self, self._error or LinkClosed("closed before it was open"))
            else:
                self._counters.links_closed += 1
                self._handler.on_closed(self, self._error)
        finally:
            self._on_lost(self)

    def fail(self, error: Exception) -> None:
        """Give the link up for this reason, dropping what waits."""
        if self._state in (State.CLOSING, State.CLOSED):
            return
        if self._peer is None and isinstance(error, HandshakeRefused | FrameCorrupt):
            self._counters.handshakes_refused += 1
        self._error = error
        self._state = State.CLOSING
        self._pending, self._pending_bytes = [], 0
        if self._timer is not None:
            self._timer.cancel()
        if self._pipe is not None:
            self._pipe.abort()

    # Receiving.

    def _drain(self) -> None:
        self._corked = True
        try:
            while self._state is State.OPEN or self._state is State.HANDSHAKE:
                frame = self._reader.next_frame()
                if frame is None:
                    break
                self._counters.frames_received += 1
                # Only CALL, REPLY and CANCEL have headers that are not plain bytes.
                if type(frame.header) is not bytes and self._peer is not None:
                    self._handler.on_frame(self, frame)
                else:
                    self._on_control(frame)
        except FrameCorrupt as error:
            self.fail(error)
        except BaseException as error:
            self.fail(LinkClosed(f"closed by a fault of the link's own handler: {error!r}"))
            raise  # the loop's exception handler is the one to tell
        finally:
            self._corked = False
            if self._pending:
                self._flush()

    def _on_control(self, frame: Frame) -> None:
        if self._peer is None:
            self._on_handshake(frame)
            return
        match frame.kind:
            case FrameKind.PING:
                # A peer that pings but does not read gets no more of our memory for it.
                if self.waiting_bytes < self._limits.waiting_bytes_max:
                    assert isinstance(frame.header, bytes)
                    self._queue_now(FrameKind.PONG, frame.header[:_PING_BYTES_MAX])
            case FrameKind.PONG:
                pass
            case FrameKind.GOODBYE:
                self._finish()
            case _:
                raise FrameCorrupt(f"{frame.kind.name} on an open link")

    def _on_handshake(self, frame: Frame) -> None:
        header = frame.header if isinstance(frame.header, bytes) else b""
        try:
            for kind, answer in self._handshake.receive(frame.kind, header):
                self._queue_now(kind, answer)
        except HandshakeRefused as error:
            self._refuse(frame.kind, error)
            return
        if self._handshake.peer is None:
            return
        self._peer = self._handshake.peer
        self._state = State.OPEN
        self._reader.header_bytes_max = self._limits.header_bytes_max
        self._reader.body_bytes_max = self._limits.body_bytes_max
        self._reader.slab_bytes = SLAB_BYTES
        self._counters.links_opened += 1
        self._set_timer(self._limits.ping_after_s, self._tick)
        self._on_settled(self, None)

    def _refuse(self, came: FrameKind, error: HandshakeRefused) -> None:
        self._counters.handshakes_refused += 1
        self._error = error
        if came is not FrameKind.REFUSED:  # else it is the peer who refuses, and knows why
            self._queue_now(*refusal(error))
        self._finish()

    # Sending.

    def _queue_now(self, kind: FrameKind, header: bytes) -> None:
        frame = encode_frame(kind, 0, header)
        self._queue(frame, len(frame[0]))

    def _queue(self, frame: list[Buffer], size: int) -> None:
        self._pending += frame
        self._pending_bytes += size
        self._counters.frames_sent += 1
        self._counters.bytes_sent += size
        if not self._corked and not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._end_turn)

    def flush(self) -> None:
        """See `Link.flush`."""
        if not self._corked:
            self._flush()

    def _end_turn(self) -> None:
        self._flushing = False
        self._flush()

    def _flush(self) -> None:
        pending, size = self._pending, self._pending_bytes
        if not pending or self._pipe is None:
            return
        self._pending, self._pending_bytes = [], 0
        if len(pending) == 1:
            self._pipe.write(pending[0])
        elif size <= _JOIN_BYTES_MAX:
            self._pipe.write(b"".join(pending))
        else:
            self._pipe.writelines(pending)

    def _finish(self) -> None:
        """Write what waits, then close the pipe."""
        self._state = State.CLOSING
        self._flush()
        self._set_timer(self._limits.close_timeout_s, self._close_late)
        if self._pipe is not None:
            self._pipe.close()

    # Time.

    def _set_timer(self, delay_s: float, callback: Callable[[], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(delay_s, callback)

    def _handshake_late(self) -> None:
        # A peer that hangs is away rather than wrong, but a listener must see how often it happens.
        self._counters.handshakes_refused += 1
        self.fail(LinkClosed(f"no handshake within {self._limits.handshake_timeout_s:g} s"))

    def _close_late(self) -> None:
        if self._pipe is not None:
            self._pipe.abort()

    def _tick(self) -> None:
        # Ticks are counted, not seconds: a loop that was held up for long sees one late tick, and
        # does not take its own absence for the peer's.
        if self._heard:
            self._heard, self._silent_pings = False, 0
        elif self._silent_pings == self._limits.silent_pings_max:
            self.fail(LinkClosed(f"{self.peer.name} answered no ping"))
            return
        else:
            self._silent_pings += 1
            self._queue_now(FrameKind.PING, b"")
        self._set_timer(self._limits.ping_after_s, self._tick)
