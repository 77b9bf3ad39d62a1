"""What every plane promises of large frames: the same scenario over each of them."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import numpy as np
import pytest

from batching.errors import Code
from shards.errors import LinkClosed, LinkFull
from shards.transport import Limits, Link
from shards.transport._session import Session
from shards.transport.sockets import _SocketProtocol
from shards.wire import (
    BODY_BYTES_MAX,
    CHUNK_BYTES,
    CallHeader,
    CancelHeader,
    Frame,
    FrameFlag,
    FrameKind,
    ReplyHeader,
    encode_header,
    encode_prefix,
)
from tests.shards.transport_planes import (
    GENERATION,
    PLANES,
    Recorder,
    call,
    frame_bytes,
    prove,
    run,
    serving,
    until,
)

MIB = 1 << 20


#: Of the planes, those over which such bodies come in pieces; the others lend them.
IN_PIECES = tuple(plane for plane in PLANES if plane not in ("unix", "unix on the standard loop"))


@pytest.fixture(params=IN_PIECES)
def plane(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def held_bytes(link: Link) -> int:
    """Memory of large bodies that this end of a link counts."""
    assert isinstance(link, Session)
    return link._streams.chunks.held_bytes


def request_of(frame: Frame) -> int:
    assert isinstance(frame.header, CallHeader)
    return frame.header.items[0].request


def requests_of(there: Recorder) -> list[int]:
    return [request_of(frame) for frame in there.frames]


@pytest.mark.parametrize("plane", PLANES)
def test_small_requests_pass_a_frame_of_256_mib(plane: str) -> None:
    body = np.arange(64 * MIB, dtype=np.uint32).view(np.uint8)

    async def scenario(untaken: list[Any]) -> None:
        here, there = Recorder(), Recorder()
        answered_before = 0

        def answer(link: Link, frame: Frame) -> None:
            if not frame.stream:
                link.send(FrameKind.REPLY, ReplyHeader("unit", GENERATION, [(2, 1)], []))

        def again(link: Link, frame: Frame) -> None:
            nonlocal answered_before
            if not any(frame.stream for frame in there.frames):
                answered_before += 1
                link.send(FrameKind.CALL, call(2))

        there.hook, here.hook = answer, again
        async with serving(plane, there) as served:
            link = await served.connect(here)
            link.send(FrameKind.CALL, call(1), [body.data])
            link.send(FrameKind.CALL, call(2))
            await until(lambda: any(frame.stream for frame in there.frames))
        assert requests_of(there)[0] == 2
        assert answered_before > 20
        (large,) = (frame for frame in there.frames if frame.stream)
        assert np.array_equal(np.frombuffer(large.body, np.uint8), body)

    run(plane, scenario)


def test_large_frames_take_turns(plane: str) -> None:
    async def scenario(untaken: list[Any]) -> None:
        there = Recorder()
        async with serving(plane, there) as served:
            link = await served.connect(Recorder())
            for number, size in enumerate([32 * MIB, 8 * MIB, 2 * MIB]):
                link.send(FrameKind.CALL, call(number), [bytes([number]) * size])
            await until(lambda: len(there.frames) == 3)
        assert requests_of(there) == [2, 1, 0]
        for frame in there.frames:
            assert np.all(np.frombuffer(frame.body, np.uint8) == request_of(frame))

    run(plane, scenario)


def test_more_large_frames_than_streams_all_arrive(plane: str) -> None:
    async def scenario(untaken: list[Any]) -> None:
        there = Recorder()
        async with serving(plane, there) as served:
            link = await served.connect(Recorder())
            for number in range(150):
                link.send(FrameKind.CALL, call(number), [bytes(CHUNK_BYTES + 1)])
            await until(lambda: len(there.frames) == 150)
        assert sorted(requests_of(there)) == list(range(150))

    run(plane, scenario)


def test_a_cancelled_call_is_dropped_on_both_sides_while_it_is_sent(plane: str) -> None:
    async def scenario(untaken: list[Any]) -> None:
        there = Recorder()
        async with serving(plane, there) as served:
            link = await served.connect(Recorder())
            link.send(FrameKind.CALL, call(0))
            await until(lambda: bool(there.frames))
            link.send(FrameKind.CALL, call(1, 2), [bytes(64 * MIB)])
            await until(lambda: held_bytes(there.links[0]) == 64 * MIB)
            link.send(FrameKind.CANCEL, CancelHeader([1]))
            assert link.waiting_bytes > 32 * MIB  # somebody still waits for the other
            link.send(FrameKind.CANCEL, CancelHeader([2]))
            assert link.waiting_bytes < 2 * MIB
            await until(lambda: held_bytes(there.links[0]) == 0)
            link.send(FrameKind.CALL, call(3), [bytes(2 * MIB)])
            await until(lambda: any(frame.stream for frame in there.frames))
        assert [frame.kind for frame in there.frames] == [
            FrameKind.CALL,
            FrameKind.CANCEL,
            FrameKind.CANCEL,
            FrameKind.CALL,
        ]
        assert request_of(there.frames[-1]) == 3

    run(plane, scenario)


def test_a_cancelled_reply_is_dropped_on_both_sides_while_it_comes(plane: str) -> None:
    async def scenario(untaken: list[Any]) -> None:
        here, there = Recorder(), Recorder()
        body = bytes(64 * MIB)

        def answer(link: Link, frame: Frame) -> None:
            if isinstance(frame.header, CallHeader):
                reply = ReplyHeader("unit", GENERATION, [(request_of(frame), 1)], [])
                link.send(FrameKind.REPLY, reply, [body] if request_of(frame) == 1 else [])

        there.hook = answer
        async with serving(plane, there) as served:
            link = await served.connect(here)
            link.send(FrameKind.CALL, call(1))
            await until(lambda: held_bytes(link) == 64 * MIB)
            link.send(FrameKind.CANCEL, CancelHeader([1]))
            await until(lambda: held_bytes(link) == 0)
            await until(lambda: there.links[0].waiting_bytes == 0)
            link.send(FrameKind.CALL, call(2))
            await until(lambda: bool(here.frames))
        assert [frame.header for frame in here.frames] == [
            ReplyHeader("unit", GENERATION, [(2, 1)], [])
        ]

    run(plane, scenario)


def test_a_handler_that_keeps_large_frames_holds_back_large_ones_only(plane: str) -> None:
    limits = Limits(body_bytes_max=4 * MIB, stream_bytes_max=8 * MIB, close_timeout_s=0.1)

    async def scenario(untaken: list[Any]) -> None:
        there = Recorder()
        async with serving(plane, there, limits) as served:
            link = await served.connect(Recorder())
            for number in range(4):
                link.send(FrameKind.CALL, call(number), [bytes([number]) * 3 * MIB])
            await until(lambda: len(there.frames) == 2)
            for number in range(4, 10):
                link.send(FrameKind.CALL, call(number), [bytes(CHUNK_BYTES)])
                link.send(FrameKind.CALL, call(number + 6), [bytes(MIB)])
            await until(lambda: len(there.frames) == 14)
            assert sorted(requests_of(there)) == [0, 1, *range(4, 16)]
            assert held_bytes(there.links[0]) == 6 * MIB
            assert link.waiting_bytes == 2 * (3 - 1) * MIB  # what is more than a window
            there.frames.clear()
            await until(lambda: len(there.frames) == 2)
        assert sorted(requests_of(there)) == [2, 3]
        for frame in there.frames:
            assert bytes(frame.body) == bytes([request_of(frame)]) * 3 * MIB

    run(plane, scenario)


def test_a_body_over_the_receivers_bound_is_refused_and_the_link_goes_on(plane: str) -> None:
    async def scenario(untaken: list[Any]) -> None:
        here, there = Recorder(), Recorder(echo=True)
        async with serving(plane, there, Limits(body_bytes_max=MIB)) as served:
            link = await served.connect(here)
            link.send(FrameKind.CALL, call(1), [bytes(32 * MIB)])
            await until(lambda: bool(here.refused))
            ((header, error),) = here.refused
            assert header == call(1)
            assert error.code == Code.RESOURCE_EXHAUSTED
            assert "33554432 bytes is over the bound of 1048576" in str(error)
            await until(lambda: link.waiting_bytes == 0)
            link.send(FrameKind.CALL, call(2), [bytes(MIB)])
            await until(lambda: bool(here.frames))
        assert requests_of(there) == [2]

    run(plane, scenario)


def head(stream: int, body_bytes: int) -> bytes:
    data = encode_header(call(stream))
    return encode_prefix(FrameKind.CALL, FrameFlag.MORE, stream, len(data), body_bytes) + data


def piece(stream: int, nbytes: int) -> bytes:
    return encode_prefix(FrameKind.CHUNK, 0, stream, 0, nbytes) + bytes(nbytes)


def test_a_caller_that_dies_in_the_middle_of_a_body_leaves_nothing(plane: str) -> None:
    async def scenario(untaken: list[Any]) -> None:
        there = Recorder()
        limits = Limits(ping_after_s=0.02, silent_pings_max=2)
        async with serving(plane, there, limits) as served:
            peer = await served.raw()
            await prove(peer)
            await peer.send(frame_bytes(FrameKind.CALL, call(0)) + head(1, 8 * MIB))
            await peer.send(piece(1, CHUNK_BYTES) + piece(1, CHUNK_BYTES)[:1000])
            await until(lambda: bool(there.links) and held_bytes(there.links[0]) == 8 * MIB)
            await peer.vanish()
            await until(lambda: bool(there.closed))
            assert isinstance(there.errors[0], LinkClosed)
            assert requests_of(there) == [0]

    run(plane, scenario)


def fill(link: Link) -> None:
    """Send what is small until no more is taken: in one turn of the loop, nothing leaves."""
    for _ in range(1000):
        link.send(FrameKind.CANCEL, CancelHeader([8] * 100))


def test_a_cancel_frees_memory_even_where_the_link_is_too_full_to_carry_it(plane: str) -> None:
    limits = Limits(waiting_bytes_max=1000, close_timeout_s=0.05)

    async def scenario(untaken: list[Any]) -> None:
        there = Recorder()
        async with serving(plane, there, limits) as served:
            peer = await served.raw()
            await prove(peer)
            await peer.send(frame_bytes(FrameKind.CALL, call(1)))
            await until(lambda: bool(there.links))
            (link,) = there.links
            await until(lambda: link.waiting_bytes == 0)
            link.send(FrameKind.CALL, call(7), [bytes(32 * MIB)])
            with pytest.raises(LinkFull):
                fill(link)
            assert link.waiting_bytes > 30 * MIB
            with pytest.raises(LinkFull):
                link.send(FrameKind.CANCEL, CancelHeader([7] * 100))
            assert link.waiting_bytes < MIB

    run(plane, scenario)


def test_a_link_that_closes_gives_up_on_a_peer_that_takes_no_more(plane: str) -> None:
    async def scenario(untaken: list[Any]) -> None:
        there = Recorder()
        async with serving(plane, there, Limits(close_timeout_s=0.05)) as served:
            peer = await served.raw()
            await prove(peer)
            await peer.send(frame_bytes(FrameKind.CALL, call(1)))
            await until(lambda: bool(there.links))
            reply = ReplyHeader("unit", GENERATION, [(1, 1)], [])
            there.links[0].send(FrameKind.REPLY, reply, [bytes(8 * MIB)])
            there.links[0].close()
            await until(lambda: bool(there.closed))
        assert "did not take what was left" in str(there.errors[0])

    run(plane, scenario)


class Flooded:
    """A transport and a session in one, of a connection that always has more to read."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.told: list[str] = []
        self.is_over = False

    def begin(self, pipe: Any) -> None: ...

    def share_memory(self, pid: int) -> None: ...

    def buffer_updated(self, nbytes: int) -> None: ...

    def set_write_buffer_limits(self, high: int) -> None: ...

    def get_extra_info(self, name: str) -> socket.socket:
        return self.sock

    def is_closing(self) -> bool:
        return self.is_over

    def pause_reading(self) -> None:
        self.told.append("pause")

    def resume_reading(self) -> None:
        self.told.append("resume")


def test_a_link_that_never_runs_dry_lets_the_others_have_their_turn() -> None:
    async def scenario(untaken: list[Any]) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            flooded: Any = Flooded(ours)
            protocol = _SocketProtocol(flooded)
            protocol.connection_made(flooded)
            for _ in range(4):
                protocol.buffer_updated(CHUNK_BYTES)
            assert flooded.told == []
            protocol.buffer_updated(1)
            assert flooded.told == ["pause"]
            await asyncio.sleep(0)
            assert flooded.told == ["pause", "resume"]
            protocol.buffer_updated(4 * CHUNK_BYTES + 1)
            flooded.is_over = True
            await asyncio.sleep(0)
            assert flooded.told == ["pause", "resume", "pause"]  # there is nothing to go on with

    run("unix", scenario)


def test_the_largest_body_fits_the_default_bounds() -> None:
    assert Limits().stream_bytes_max >= Limits().body_bytes_max == BODY_BYTES_MAX
    with pytest.raises(ValueError, match="could never come"):
        Limits(stream_bytes_max=MIB)
