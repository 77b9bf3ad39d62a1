"""Two ends of a link joined by pipes that keep order and nothing else: bytes come when they may.

Whatever is sent, cancelled, kept and delivered in whatever order: what is not cancelled arrives
exactly once with the bytes that were sent, what is too large comes back to its sender, no bound is
passed, and once everything flows nothing is left.
"""

from __future__ import annotations

import random
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shards.transport._inbound import Inbound, Lease
from shards.transport._outbound import Outbound
from shards.transport._streams import Streams
from shards.wire import (
    CallHeader,
    CancelHeader,
    Frame,
    FrameKind,
    FrameReader,
    Header,
    Item,
    ReplyHeader,
    encode_frame,
    encode_header,
)

CHUNK = 64
WINDOW = 4 * CHUNK
STREAMS = 3
BODY_MAX = 3000
BYTES_MAX = 3200
WAITING_MAX = 1 << 20


class End:
    """What a session does with its streams, less the loop."""

    def __init__(self) -> None:
        self.unused: list[Lease] = []
        inbound = Inbound(
            self.unused.append,
            body_bytes_max=BODY_MAX,
            bytes_max=BYTES_MAX,
            chunk_bytes=CHUNK,
            window_bytes=WINDOW,
            streams_max=STREAMS,
        )
        outbound = Outbound(chunk_bytes=CHUNK, window_bytes=WINDOW, streams_max=STREAMS)
        self.inbound = inbound
        self.streams = Streams(inbound, outbound, WAITING_MAX)
        self.reader = FrameReader(body_bytes_max=CHUNK, slab_bytes=200, chunks=inbound)
        self.out = bytearray()
        self.came: list[Frame] = []
        self.refused: list[Header] = []

    def send(self, kind: FrameKind, header: Any, body: bytes, pieces: int) -> None:
        """The body as several buffers, of which some are large."""
        data = encode_header(header)
        if len(body) <= CHUNK:
            self.out += b"".join(encode_frame(kind, 0, data, [body]))
            return
        step = -(-len(body) // pieces)
        buffers = [body[at : at + step] for at in range(0, len(body), step)]
        self.streams.offer(kind, header, data, buffers)

    def cancel(self, header: CancelHeader) -> None:
        self.out += b"".join(encode_frame(FrameKind.CANCEL, 0, encode_header(header)))
        self.streams.cancel(header, FrameKind.CALL, FrameKind.REPLY)
        self.answer()

    def read(self, data: bytes) -> None:
        for frame in self.reader.feed(data):
            if isinstance(frame.header, bytes):
                refused = self.streams.receive(frame)
                if refused is not None:
                    self.refused.append(refused[0])
            elif isinstance(frame.header, CancelHeader):
                self.streams.cancel(frame.header, FrameKind.REPLY, FrameKind.CALL)
            else:
                self.came.append(frame)
        self.answer()

    def answer(self) -> None:
        while self.unused:
            self.streams.free(self.unused.pop())
        for kind, stream, header in self.streams.answers:
            self.out += b"".join(encode_frame(kind, stream, header))
        self.streams.answers.clear()


def numbers(header: Any) -> tuple[int, ...]:
    if isinstance(header, CallHeader):
        return tuple(item.request for item in header.items)
    return tuple(request for request, _ in header.items)


class Link(RuleBasedStateMachine):
    """A caller sends CALLs and cancels; a server sends REPLYs."""

    @initialize()
    def begin(self) -> None:
        self.caller, self.server = End(), End()
        self.ends = (self.caller, self.server)
        self.next_request = 0
        self.due: dict[tuple[int, ...], bytes] = {}  # what must arrive, in the order of sending
        self.free: dict[tuple[int, ...], bytes] = {}  # what was cancelled, and may arrive
        self.kept: list[Frame] = []
        self.small_sent: dict[End, list[tuple[int, ...]]] = {end: [] for end in self.ends}
        self.small_came: dict[End, list[tuple[int, ...]]] = {end: [] for end in self.ends}

    @rule(
        end=st.integers(0, 1),
        size=st.one_of(
            st.integers(0, CHUNK),
            st.integers(CHUNK + 1, BODY_MAX + 300),
            st.integers(WINDOW + 1, 900),
        ),
        requests=st.integers(1, 2),
        pieces=st.integers(1, 5),
    )
    def send(self, end: int, size: int, requests: int, pieces: int) -> None:
        these = tuple(range(self.next_request, self.next_request + requests))
        self.next_request += requests
        body = random.Random(these[0]).randbytes(size)
        sender = self.ends[end]
        if end == 0:
            items = [Item(number, 1, 5_000) for number in these]
            sender.send(FrameKind.CALL, CallHeader(1, "u", "run", items, []), body, pieces)
        else:
            pairs = [(number, 1) for number in these]
            sender.send(FrameKind.REPLY, ReplyHeader("u", 1, pairs, []), body, pieces)
        self.due[these] = body
        if size <= CHUNK:
            self.small_sent[sender].append(these)

    @rule(end=st.integers(0, 1), nbytes=st.sampled_from([1, 100, 1000, 8000]))
    def write(self, end: int, nbytes: int) -> None:
        sender = self.ends[end]
        pieces = sender.streams.take(nbytes)
        body_bytes = sum(map(len, pieces))
        assert (body_bytes > 0) == bool(pieces)
        sender.out += b"".join(pieces)

    @rule(end=st.integers(0, 1), nbytes=st.one_of(st.integers(1, 100), st.integers(1, 8000)))
    def deliver(self, end: int, nbytes: int) -> None:
        """Some bytes of what this end sent get through."""
        sender, receiver = self.ends[end], self.ends[1 - end]
        data = bytes(sender.out[:nbytes])
        del sender.out[:nbytes]
        receiver.read(data)
        self.take_in(sender, receiver)

    @precondition(lambda self: self.due)
    @rule(which=st.integers(0), both=st.booleans())
    def cancel(self, which: int, both: bool) -> None:
        """The caller gives up all, or the first, of the requests of something under way."""
        these = list(self.due)[which % len(self.due)]
        self.caller.cancel(CancelHeader(list(these if both else these[:1])))
        if both or len(these) == 1:
            self.free[these] = self.due.pop(these)

    @precondition(lambda self: self.kept)
    @rule(which=st.integers(0))
    def let_go(self, which: int) -> None:
        """A handler drops its last view of a frame."""
        del self.kept[which % len(self.kept)]
        for end in self.ends:
            end.answer()

    def take_in(self, sender: End, receiver: End) -> None:
        for frame in receiver.came:
            these = numbers(frame.header)
            body = self.due.pop(these, None)
            if body is None:
                body = self.free.pop(these)  # nothing else, and nothing twice
            assert bytes(frame.body) == body
            assert frame.body.readonly
            if len(body) <= CHUNK:
                self.small_came[sender].append(these)
        self.kept += receiver.came
        receiver.came.clear()
        for end in self.ends:
            for header in end.refused:
                body = self.due.pop(numbers(header), None)
                body = self.free.pop(numbers(header)) if body is None else body
                assert len(body) > BODY_MAX
            end.refused.clear()

    @invariant()
    def bounds_hold(self) -> None:
        for end in getattr(self, "ends", ()):
            inbound = end.inbound
            assert 0 <= inbound.held_bytes <= BYTES_MAX
            assert len(inbound._open) <= STREAMS
            windows = [s for s in inbound._open.values() if s.body_bytes <= WINDOW]
            windows += inbound._waiting
            assert all(stream.filled <= WINDOW for stream in windows)
            assert inbound.held_bytes == sum(lease.nbytes for lease in inbound._leases)
            outbound = end.streams._outbound
            every = {*outbound._begun.values(), *outbound.turns, *outbound._queue}
            assert outbound.waiting_bytes == sum(stream.left for stream in every)
            assert all(sum(map(len, s.buffers)) == s.left for s in every)

    @invariant()
    def small_frames_keep_their_order(self) -> None:
        for end in getattr(self, "ends", ()):
            came, sent = self.small_came[end], self.small_sent[end]
            assert came == sent[: len(came)]

    def flow(self) -> None:
        """Everything that may move does, until nothing can."""
        while any(end.out or end.streams.turns for end in self.ends):
            for number, end in enumerate(self.ends):
                end.out += b"".join(end.streams.take(1000))
                self.deliver(number, len(end.out))

    def teardown(self) -> None:
        if not hasattr(self, "ends"):
            return
        self.flow()
        for end in self.ends:
            # Only what handlers keep can hold anything up, and only what is larger than a window.
            assert not end.inbound._open or end.inbound.held_bytes
            assert list(end.inbound._open.values()) == list(end.inbound._waiting)
        while self.kept:
            self.let_go(0)
            self.flow()
        assert self.due == {}
        for end in self.ends:
            assert end.streams.all_sent
            assert end.streams.waiting_bytes == 0
            assert end.streams._outbound._slots == STREAMS
            assert end.inbound.held_bytes == 0
            assert not end.inbound._open
            assert not end.inbound._waiting


Link.TestCase.settings = settings(max_examples=80, stateful_step_count=70, deadline=None)
TestTwoEnds = Link.TestCase
