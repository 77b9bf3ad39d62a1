"""Streams by example: what one end accepts of a peer, and whatever bytes a peer sends."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import FrameCorrupt, LinkFull
from shards.transport._inbound import Inbound, Lease
from shards.transport._outbound import Outbound, next_stream
from shards.transport._streams import Streams
from shards.wire import (
    ALIGNMENT,
    PREFIX_BYTES,
    Buffer,
    CallHeader,
    CancelHeader,
    Frame,
    FrameKind,
    FrameReader,
    Item,
    ItemError,
    ReplyHeader,
    encode_frame,
    encode_header,
    requests_of,
)

CHUNK = 100
WINDOW = 400


class Receiver:
    """An inbound end whose memory comes back when it is asked to look."""

    def __init__(self, *, bytes_max: int = 5000, streams_max: int = 4) -> None:
        self.unused: list[Lease] = []
        self.inbound = Inbound(
            self.unused.append,
            body_bytes_max=5000,
            bytes_max=bytes_max,
            chunk_bytes=CHUNK,
            window_bytes=WINDOW,
            streams_max=streams_max,
        )

    def open(self, stream: int, body_bytes: int) -> None:
        self.inbound.open(FrameKind.CALL, stream, call(stream), body_bytes)

    def piece(self, stream: int, nbytes: int = CHUNK) -> Frame | None:
        memory = self.inbound.begin(stream, nbytes)
        memory[:nbytes] = bytes([stream]) * nbytes
        return self.inbound.end()

    def body(self, stream: int, nbytes: int) -> Frame:
        """The pieces of a whole body, the last of which completes it."""
        while nbytes > CHUNK:
            assert self.piece(stream) is None
            nbytes -= CHUNK
        frame = self.piece(stream, nbytes)
        assert frame is not None
        return frame

    def free(self) -> None:
        while self.unused:
            self.inbound.free(self.unused.pop())

    def told(self) -> list[tuple[FrameKind, int, bytes]]:
        answers = list(self.inbound.answers)
        self.inbound.answers.clear()
        return answers


def call(*requests: int) -> CallHeader:
    return CallHeader(1, "u", "run", [Item(request, 1, 100) for request in requests], [])


def credit(stream: int, nbytes: int) -> tuple[FrameKind, int, bytes]:
    return FrameKind.CREDIT, stream, nbytes.to_bytes(4, "little")


def test_what_fits_a_window_needs_no_word_and_is_aligned() -> None:
    receiver = Receiver()
    receiver.open(1, WINDOW)
    frame = receiver.body(1, WINDOW)
    assert bytes(frame.body) == b"\1" * WINDOW
    assert np.frombuffer(frame.body, np.uint8).ctypes.data % ALIGNMENT == 0
    assert receiver.told() == []
    assert receiver.inbound.held_bytes == 0


def test_what_is_larger_is_credited_once_its_memory_is_set_apart() -> None:
    receiver = Receiver()
    receiver.open(1, 3000)
    assert receiver.told() == [credit(1, 3000 - WINDOW)]
    receiver.open(2, 2001)  # for both there is no memory
    assert receiver.told() == []
    for _ in range(WINDOW // CHUNK):
        receiver.piece(2)
    with pytest.raises(FrameCorrupt, match="100 bytes came where 0 were allowed"):
        receiver.piece(2)
    frame = receiver.body(1, 3000)
    receiver.free()
    assert receiver.told() == []  # handed on, but still viewed
    del frame
    receiver.free()
    assert receiver.told() == [credit(2, 2001 - WINDOW)]
    assert bytes(receiver.body(2, 2001 - WINDOW).body) == b"\2" * 2001


def test_memory_goes_to_who_asked_first_and_to_the_next_if_that_one_leaves() -> None:
    receiver = Receiver()
    receiver.open(1, 3000)
    receiver.open(2, 4000)
    receiver.open(3, 1000)
    assert receiver.told() == [credit(1, 2600)]
    receiver.inbound.reset(2)
    assert receiver.told() == [credit(3, 600)]


def test_a_view_of_a_part_keeps_the_whole_body_counted() -> None:
    receiver = Receiver()
    receiver.open(1, 3000)
    view = np.frombuffer(receiver.body(1, 3000).body, np.uint8)[100:110]
    receiver.free()
    assert receiver.inbound.held_bytes == 3000
    assert view.tolist() == [1] * 10
    del view
    receiver.free()
    assert receiver.inbound.held_bytes == 0


def test_too_many_streams_or_bytes_are_refused_one_by_one() -> None:
    receiver = Receiver(streams_max=1)
    receiver.open(1, 200)
    receiver.open(2, 200)
    receiver.open(3, 5001)
    (_, two, many), (_, three, much) = receiver.told()
    assert (two, many) == (2, b"1 large frames are under way already")
    assert (three, much) == (3, b"a body of 5001 bytes is over the bound of 5000")
    assert receiver.piece(2) is None  # what was under way when it was told
    assert bytes(receiver.body(1, 200).body) == b"\1" * 200


@pytest.mark.parametrize(
    ("stream", "body_bytes"), [(0, 200), (2, 200), (7, 200), (1, 0), (1, CHUNK)]
)
def test_a_head_that_cannot_be_is_corrupt(stream: int, body_bytes: int) -> None:
    with pytest.raises(FrameCorrupt):
        Receiver().open(stream, body_bytes)


@pytest.mark.parametrize(("stream", "nbytes"), [(1, 0), (1, CHUNK + 1), (0, 10), (2, 10), (9, 10)])
def test_a_piece_that_cannot_be_is_corrupt(stream: int, nbytes: int) -> None:
    receiver = Receiver()
    receiver.open(1, 200)
    with pytest.raises(FrameCorrupt):
        receiver.piece(stream, nbytes)


def test_the_memory_of_a_stream_dropped_during_a_piece_is_free_after_it() -> None:
    receiver = Receiver()
    receiver.open(1, 3000)
    memory = receiver.inbound.begin(1, CHUNK)
    receiver.inbound.cancel(FrameKind.CALL, [1])
    receiver.free()
    assert receiver.inbound.held_bytes == 3000
    memory[:CHUNK] = bytes(CHUNK)
    del memory
    assert receiver.inbound.end() is None
    receiver.free()
    assert receiver.inbound.held_bytes == 0
    assert receiver.told() == [credit(1, 2600), (FrameKind.STOP, 1, b"")]


def test_streams_are_numbered_on_past_the_largest_number() -> None:
    assert next_stream(0) == 1
    assert next_stream(0xFFFF_FFFE) == 0xFFFF_FFFF
    assert next_stream(0xFFFF_FFFF) == 1


def test_a_reply_is_about_what_it_answers_and_what_it_refuses() -> None:
    header = ReplyHeader("u", 1, [(4, 1), (5, 2)], [], [ItemError(6, "INTERNAL", "")])
    assert requests_of(header) == {4, 5, 6}
    assert requests_of(b"encoded") == set()


def test_a_large_frame_is_taken_while_none_waits_and_then_within_the_bound() -> None:
    streams = Streams(Receiver().inbound, Outbound(chunk_bytes=CHUNK, window_bytes=WINDOW), 1000)
    streams.offer(FrameKind.CALL, call(1), b"", [bytes(5000)])
    with pytest.raises(LinkFull, match="5000 bytes of large frames wait, the bound is 1000"):
        streams.offer(FrameKind.CALL, call(2), b"", [bytes(200)])
    assert streams.waiting_bytes == 5000
    streams.cancel(CancelHeader([1]), FrameKind.CALL, FrameKind.REPLY)
    assert streams.answers == []  # the peer has not heard of it
    assert streams.all_sent
    streams.offer(FrameKind.CALL, call(2), b"", [bytes(200)])


def numbers(pieces: list[Buffer]) -> list[int]:
    """The streams of what was taken, head or piece, in order."""
    found: list[int] = []
    data = b"".join(pieces)
    while data:
        kind, _, _, stream, header_bytes, body_bytes = struct.unpack_from("<BBHIII", data)
        size = header_bytes + (body_bytes if kind == FrameKind.CHUNK else 0)
        found.append(stream)
        data = data[PREFIX_BYTES + size :]
    return found


def test_a_stalled_stream_holds_up_no_other_and_goes_on_where_it_was() -> None:
    outbound = Outbound(chunk_bytes=CHUNK, window_bytes=WINDOW)
    outbound.offer(FrameKind.CALL, call(1), b"", [b"a" * 1000])
    outbound.offer(FrameKind.CALL, call(2), b"", [b"b" * 1000])
    turns = [1, 1, 2, 2, 1, 2, 1, 2, 1, 2]  # heads, then pieces
    assert numbers(outbound.take(5000)) == turns
    assert outbound.take(5000) == []
    outbound.credit(2, 600)
    assert numbers(outbound.take(5000)) == [2] * 6
    assert not outbound.turns
    assert outbound.waiting_bytes == 600
    outbound.credit(1, 150)
    outbound.credit(1, 450)
    rest = outbound.take(5000)
    assert numbers(rest) == [1] * 6
    assert outbound.is_empty


def test_a_stream_beyond_the_slots_waits_for_one_to_end() -> None:
    outbound = Outbound(chunk_bytes=CHUNK, window_bytes=WINDOW, streams_max=1)
    outbound.offer(FrameKind.CALL, call(1), b"", [bytes(500)])
    outbound.offer(FrameKind.CALL, call(2), b"", [bytes(200)])
    assert set(numbers(outbound.take(5000))) == {1}
    assert outbound.stop(1) == call(1)
    assert outbound.stop(1) is None
    assert set(numbers(outbound.take(5000))) == {2}


def sent(*bodies: int) -> bytes:
    """What a peer sends that has all the credit there is."""
    outbound = Outbound(chunk_bytes=CHUNK, window_bytes=5000)
    for number, nbytes in enumerate(bodies):
        header = call(number)
        outbound.offer(FrameKind.CALL, header, encode_header(header), [bytes([number]) * nbytes])
    data = b"".join(outbound.take(1 << 20))
    for kind in (FrameKind.CREDIT, FrameKind.RESET, FrameKind.STOP):
        data += b"".join(encode_frame(kind, 1, b"1234"))
    return data


def survive(data: bytes) -> None:
    """Read as a link does: nothing but `FrameCorrupt` may come of it, and no bound be passed."""
    receiver = Receiver()
    streams = Streams(receiver.inbound, Outbound(chunk_bytes=CHUNK, window_bytes=WINDOW), 1000)
    reader = FrameReader(body_bytes_max=CHUNK, chunks=receiver.inbound)
    try:
        for frame in reader.feed(data):
            if isinstance(frame.header, bytes):
                streams.receive(frame)
            receiver.free()
    except FrameCorrupt:
        pass
    assert receiver.inbound.held_bytes <= 5000


@settings(max_examples=400, deadline=None)
@given(
    bodies=st.lists(st.integers(CHUNK + 1, WINDOW), min_size=1, max_size=4),
    flips=st.lists(st.tuples(st.integers(0, 100_000), st.integers(0, 255)), max_size=6),
)
def test_pieces_with_wrong_bytes_give_frames_or_the_typed_error(
    bodies: list[int], flips: list[tuple[int, int]]
) -> None:
    data = bytearray(sent(*bodies))
    for at, value in flips:
        data[at % len(data)] = value
    survive(bytes(data))


def test_pieces_with_right_bytes_survive() -> None:
    receiver = Receiver()
    reader = FrameReader(body_bytes_max=CHUNK, chunks=receiver.inbound)
    frames = [frame for frame in reader.feed(sent(101, 400, 250)) if frame.stream and frame.body]
    assert sorted(len(frame.body) for frame in frames) == [101, 250, 400]
