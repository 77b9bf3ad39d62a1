"""One link over any ordered pipe of bytes: handshake, frames, coalescing, bounds, keep-alive.

Sockets and Ray calls both feed bytes into a `Session` and give it a `Pipe` to write to; everything
that must behave alike on both is here. The states of a session::

    HANDSHAKE --proven--> OPEN --close--> DRAINING --all is sent--> CLOSING --pipe lost--> CLOSED
                            |                |                         ^
                            +----------------+--goodbye, a fault-------+

and from any of them to CLOSED when the pipe is lost. The owner hears of a link that was open
exactly once when it reaches CLOSED. A session lives on one loop and is not safe for threads; it
makes no task and no future per frame.

Small frames go to the pipe as they come. Large ones are lent to a peer on the same node
(`Sharing`), where that can be; else they go in pieces (`Streams`), and no more of these goes to the
pipe than keeps it busy, so what is small never waits for longer than a piece or two takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import Final

from batching.errors import InvalidArgument
from shards.errors import FrameCorrupt, HandshakeRefused, LinkClosed, LinkFull
from shards.handshake import HANDSHAKE_BYTES_MAX, Handshake, PeerInfo, refusal
from shards.transport._inbound import Inbound, Lease
from shards.transport._link import Counters, Limits, LinkHandler
from shards.transport._outbound import Outbound
from shards.transport._pipe import Pipe, State
from shards.transport._sharing import Sharing
from shards.transport._streams import Streams
from shards.transport._writing import PIECES_BYTES_MAX, Writer
from shards.wire import (
    CHUNK_BYTES,
    PREFIX_BYTES,
    SLAB_BYTES,
    Buffer,
    CancelHeader,
    Frame,
    FrameKind,
    FrameReader,
    Header,
    encode_frame,
    encode_header,
)

_REASON_BYTES_MAX: Final = 200
_PING_BYTES_MAX: Final = 64
#: Members that are looked at for every frame: looking them up in their class costs 0.1 us each.
_OPEN: Final = State.OPEN
_DRAINING: Final = State.DRAINING
_FIRST_SENT: Final = FrameKind.CALL
_LAST_SENT: Final = FrameKind.CANCEL
#: States in which frames are read.
_READING: Final = frozenset({State.HANDSHAKE, _OPEN, _DRAINING})


class Session:
    """A `Link` over a `Pipe`.

    Args:
        handshake: this side of it.
        pieces_bytes_max: of large frames, so much is written to the pipe at a time.
        on_settled: told once: None when the link opened, or why it never will.
        on_lost: told once, last, when nothing of the session is left; it may never have opened.
    """

    __slots__ = (
        "_corked",
        "_counters",
        "_error",
        "_flushing",
        "_goodbye",
        "_handler",
        "_handshake",
        "_heard",
        "_limits",
        "_loop",
        "_on_lost",
        "_on_settled",
        "_peer",
        "_pipe",
        "_reader",
        "_shared_bytes_min",
        "_sharing",
        "_silent_pings",
        "_state",
        "_streams",
        "_timer",
        "_writer",
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
        pieces_bytes_max: int = PIECES_BYTES_MAX,
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
        self._goodbye = b""  # to be said once all is sent
        self._reader = FrameReader(
            header_bytes_max=HANDSHAKE_BYTES_MAX,
            body_bytes_max=0,
            slab_bytes=HANDSHAKE_BYTES_MAX + PREFIX_BYTES,
        )
        inbound = Inbound(
            self._on_unused,
            body_bytes_max=limits.body_bytes_max,
            bytes_max=limits.stream_bytes_max,
        )
        self._streams = Streams(inbound, Outbound(), limits.stream_bytes_max)
        self._writer = Writer(self._streams, counters, pieces_bytes_max)
        self._sharing = self._make_sharing(0, 0)
        self._shared_bytes_min = sys.maxsize  # of a body that goes through shared memory
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
        placing = self._sharing.waiting_bytes
        return self._writer.waiting_bytes + self._streams.waiting_bytes + placing

    def send(
        self,
        kind: FrameKind,
        header: Header,
        buffers: Sequence[Buffer] = (),
    ) -> None:
        """See `Link.send`."""
        assert _FIRST_SENT <= kind <= _LAST_SENT
        if self._state is not _OPEN:
            raise LinkClosed(f"the link to {self.peer.name} is closed")
        data = header if isinstance(header, bytes) else encode_header(header)
        frame = encode_frame(kind, 0, data, buffers)
        size = sum(map(len, frame))
        limits = self._limits
        body_bytes = size - len(data) - PREFIX_BYTES
        if body_bytes > limits.body_bytes_max or len(data) > limits.header_bytes_max:
            raise InvalidArgument(
                f"a frame of {len(data)} bytes of header and {body_bytes} of body is over the "
                f"bounds of {limits.header_bytes_max} and {limits.body_bytes_max}"
            )
        if body_bytes >= self._shared_bytes_min and self._sharing.offer(
            kind, header, data, buffers, body_bytes
        ):
            return
        if body_bytes > CHUNK_BYTES:
            rest = memoryview(frame[0])[PREFIX_BYTES + len(data) :]
            self._streams.offer(kind, header, data, [rest, *frame[1:]] if rest else frame[1:])
            self._counters.frames_sent += 1
            self._flush_soon()
            return
        if type(header) is CancelHeader:  # also where there is no room to tell the peer
            self._sharing.cancel(FrameKind.CALL, header.requests)
            self._streams.cancel(header, FrameKind.CALL, FrameKind.REPLY)
            self._answer()
        waiting = self._writer.waiting_bytes
        if waiting and waiting + size > limits.waiting_bytes_max:
            raise LinkFull(
                f"{waiting} bytes wait for {self.peer.name}, the bound is "
                f"{limits.waiting_bytes_max}"
            )
        self._queue(frame, size)

    def close(self, reason: str = "") -> None:
        """See `Link.close`."""
        if self._state is State.OPEN:
            self._state = State.DRAINING
            self._goodbye = reason.encode()[:_REASON_BYTES_MAX]
            self._set_timer(self._limits.close_timeout_s, self._close_late)
            self._flush()

    # What the pipe's owner calls.

    def share_memory(self, pid: int) -> None:
        """The peer is this process of the same node: large bodies need not go through the pipe."""
        limits = self._limits
        self._sharing = self._make_sharing(pid, limits.shared_bytes_max)
        if limits.shared_bytes_max:
            self._shared_bytes_min = limits.shared_body_bytes_min

    def begin(self, pipe: Pipe) -> None:
        """The pipe is there: start the handshake."""
        if self._state is not State.HANDSHAKE:  # given up while the pipe was being made
            pipe.abort()
            return
        self._pipe = self._writer.pipe = pipe
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
        self._read()

    def resume_writing(self) -> None:
        """The pipe's buffer is below the mark again."""
        if self._streams.turns:
            self._flush()

    def feed(self, data: Buffer) -> None:
        """These bytes came, from a pipe that cannot receive into a buffer."""
        rest = memoryview(data)
        while rest and self._state in _READING:
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
        elif self._state is not State.DRAINING:
            self.fail(LinkClosed(reason))

    def lost(self, error: BaseException | None) -> None:
        """The pipe is gone. May be told more than once."""
        if self._state is State.CLOSED:
            return
        was, self._state = self._state, State.CLOSED
        if self._timer is not None:
            self._timer.cancel()
        self._pipe = self._writer.pipe = self._timer = None
        self._forget_frames()
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
        self._forget_frames()
        if self._timer is not None:
            self._timer.cancel()
        if self._pipe is not None:
            self._pipe.abort()

    # Receiving.

    def _read(self) -> None:
        self._corked = True
        streams, sharing = self._streams, self._sharing
        try:
            while self._state in _READING:
                frame = self._reader.next_frame()
                if frame is None:
                    break
                self._counters.frames_received += 1
                # Only CALL, REPLY and CANCEL have headers that are not plain bytes.
                if type(frame.header) is bytes or self._peer is None:
                    self._on_control(frame)
                elif self._state is _OPEN:
                    if type(frame.header) is CancelHeader:
                        sharing.cancel(FrameKind.REPLY, frame.header.requests)
                        streams.cancel(frame.header, FrameKind.REPLY, FrameKind.CALL)
                    self._handler.on_frame(self, frame)
        except FrameCorrupt as error:
            self.fail(error)
        except BaseException as error:
            self.fail(LinkClosed(f"closed by a fault of the link's own handler: {error!r}"))
            raise  # the loop's exception handler is the one to tell
        finally:
            self._corked = False
            if streams.answers:
                self._answer()
            if self._writer.small or streams.turns or sharing.due or self._state is _DRAINING:
                self._flush()

    def _on_control(self, frame: Frame) -> None:
        if self._peer is None:
            self._on_handshake(frame)
            return
        assert isinstance(frame.header, bytes)
        match frame.kind:
            case FrameKind.PING:
                # A peer that pings but does not read gets no more of our memory for it.
                if self._writer.waiting_bytes < self._limits.waiting_bytes_max:
                    self._queue_now(FrameKind.PONG, frame.header[:_PING_BYTES_MAX])
            case FrameKind.PONG:
                pass
            case FrameKind.GOODBYE:
                self._streams.close()
                self._finish()
            case _:
                if self._sharing.receive(frame):
                    return
                refused = self._streams.receive(frame)
                if refused is not None and self._state is State.OPEN:
                    self._handler.on_refused(self, *refused)

    def _answer(self) -> None:
        """Send what the streams have to say."""
        answers = self._streams.answers
        if not answers:
            return
        if self._state is State.OPEN or self._state is State.DRAINING:
            for kind, stream, header in answers:
                self._queue_now(kind, header, stream)
        answers.clear()
        # Each is small, but a peer that begins streams and never reads could have us keep many.
        if self._writer.waiting_bytes > 2 * self._limits.waiting_bytes_max:
            self.fail(LinkClosed(f"{self.peer.name} does not read what it is told"))

    def _make_sharing(self, pid: int, segment_bytes: int) -> Sharing:
        loop, flush = self._loop, self._flush_soon
        return Sharing(pid, segment_bytes, loop=loop, send=self._queue_whole, flush=flush)

    def _on_unused(self, lease: Lease) -> None:
        """A handler's last view of a large body is gone; on whatever thread it had it."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, and this link with it
            self._loop.call_soon_threadsafe(self._free, lease)

    def _free(self, lease: Lease) -> None:
        self._streams.free(lease)
        self._answer()

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
        self._reader.body_bytes_max = min(self._limits.body_bytes_max, CHUNK_BYTES)
        self._reader.chunks = self._streams.chunks
        self._reader.borrow = self._sharing.borrow
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

    def _queue_now(self, kind: FrameKind, header: bytes, stream: int = 0) -> None:
        frame = encode_frame(kind, stream, header)
        self._queue(frame, len(frame[0]))

    def _queue(self, frame: list[Buffer], size: int) -> None:
        self._writer.add(frame, size)
        self._flush_soon()

    def _queue_whole(self, frame: bytes) -> None:
        self._queue([frame], len(frame))

    def _flush_soon(self) -> None:
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
        if self._pipe is None:
            return
        writer, streams, sharing = self._writer, self._streams, self._sharing
        if sharing.due:
            writer.add_first(sharing.take_returns())
        writer.write_small()
        if streams.turns and writer.write_pieces():
            self._flush_soon()  # after what else this turn of the loop has to do
        if self._state is _DRAINING and streams.all_sent and not sharing.is_placing:
            self._queue_now(FrameKind.GOODBYE, self._goodbye)
            self._finish()

    def _forget_frames(self) -> None:
        """Nothing that waits will be sent, and nothing half received will be completed."""
        self._writer.forget()
        self._streams.close()
        self._sharing.close()

    def _finish(self) -> None:
        """Write what waits, then close the pipe."""
        self._state = State.CLOSING
        self._sharing.close()
        self._writer.write_small()
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
        if self._state is State.DRAINING:
            limit = self._limits.close_timeout_s
            self.fail(LinkClosed(f"{self.peer.name} did not take what was left in {limit:g} s"))
        elif self._pipe is not None:
            self._pipe.abort()

    def _tick(self) -> None:
        # Ticks are counted, not seconds: a loop that was held up for long sees one late tick, and
        # does not take its own absence for the peer's.
        self._sharing.trim()
        if self._heard:
            self._heard, self._silent_pings = False, 0
        elif self._silent_pings == self._limits.silent_pings_max:
            self.fail(LinkClosed(f"{self.peer.name} answered no ping"))
            return
        else:
            self._silent_pings += 1
            self._queue_now(FrameKind.PING, b"")
        self._set_timer(self._limits.ping_after_s, self._tick)
