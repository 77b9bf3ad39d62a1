"""What every plane promises: the same scenario over each of them."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from batching.errors import InvalidArgument
from shards.errors import FrameCorrupt, LinkClosed, LinkFull
from shards.transport import Limits, Link
from shards.wire import CHUNK_BYTES, CancelHeader, Frame, FrameKind, ReplyHeader
from tests.shards.transport_planes import (
    GENERATION,
    NODE,
    PLANES,
    Recorder,
    call,
    frame_bytes,
    prove,
    run,
    serving,
    until,
)


@pytest.fixture(params=PLANES)
def plane(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.mark.parametrize("size", [0, 1, 16_383, 16_384, 65_536, (1 << 20) + 3, 64 << 20])
def test_a_body_comes_back_whole_read_only_and_aligned(plane: str, size: int) -> None:
    body = np.random.default_rng(size).integers(0, 256, size, np.uint8)

    async def scenario(untaken: list[Any]) -> None:
        here = Recorder()
        async with serving(plane, Recorder(echo=True)) as served:
            link = await served.connect(here)
            link.send(FrameKind.CALL, call(1), [body.data])
            await until(lambda: bool(here.frames))
        (frame,) = here.frames
        assert frame.kind is FrameKind.REPLY
        assert (frame.stream != 0) == (size > CHUNK_BYTES)
        assert frame.body.readonly
        back = np.frombuffer(frame.body, np.uint8)
        assert np.array_equal(back, body)
        assert size < 16_384 or back.ctypes.data % 64 == 0

    run(plane, scenario)


def test_many_frames_of_every_size_keep_their_order(plane: str) -> None:
    async def scenario(untaken: list[Any]) -> None:
        there = Recorder()
        bodies = [bytes([n % 251]) * size for n, size in enumerate([0, 3, 5000, 70_000, 20] * 400)]
        async with serving(plane, there) as served:
            link = await served.connect(Recorder(), limits=Limits(waiting_bytes_max=1 << 30))
            for number, body in enumerate(bodies):
                link.send(FrameKind.CALL, call(number), [body])
            await until(lambda: len(there.frames) == len(bodies))
            assert link.waiting_bytes == 0
        assert [frame.header for frame in there.frames] == [call(n) for n in range(len(bodies))]
        assert [bytes(frame.body) for frame in there.frames] == bodies

    run(plane, scenario)


def test_a_body_of_several_buffers_arrives_as_one(plane: str) -> None:
    async def scenario(untaken: list[Any]) -> None:
        there = Recorder()
        big = bytes(range(256)) * 400
        async with serving(plane, there) as served:
            link = await served.connect(Recorder())
            link.send(FrameKind.CALL, call(1), [b"head", big, bytearray(b"tail"), memoryview(big)])
            await until(lambda: bool(there.frames))
        assert bytes(there.frames[0].body) == b"head" + big + b"tail" + big

    run(plane, scenario)


def test_the_peer_is_named_on_both_sides(plane: str) -> None:
    async def scenario(untaken: list[Any]) -> None:
        there = Recorder()
        async with serving(plane, there) as served:
            link = await served.connect(Recorder(), name="router-1", generation=12)
            link.send(FrameKind.CANCEL, CancelHeader([1]))
            await until(lambda: bool(there.links))
            assert (link.peer.name, link.peer.generation) == ("server", GENERATION)
            assert (link.peer.node, there.links[0].peer.name) == (NODE, "router-1")
            assert there.links[0].peer.generation == 12

    run(plane, scenario)


def test_a_cancel_passes(plane: str) -> None:
    async def scenario(untaken: list[Any]) -> None:
        there = Recorder()
        async with serving(plane, there) as served:
            link = await served.connect(Recorder())
            link.send(FrameKind.CANCEL, CancelHeader([3, 4]))
            await until(lambda: bool(there.frames))
        assert there.frames[0].kind is FrameKind.CANCEL
        assert there.frames[0].header == CancelHeader([3, 4])

    run(plane, scenario)


async def fill(link: Link, reply: ReplyHeader) -> None:
    for _ in range(10_000):
        link.send(FrameKind.REPLY, reply, [bytes(1000)])
        await asyncio.sleep(0)


def test_a_peer_that_does_not_read_fills_the_link_and_no_more(plane: str) -> None:
    """A large answer is taken while none waits; then each bound holds, and by itself."""
    bound = 1 << 20

    async def scenario(untaken: list[Any]) -> None:
        there = Recorder()
        limits = Limits(
            waiting_bytes_max=bound,
            body_bytes_max=8 * bound,
            stream_bytes_max=8 * bound,
            close_timeout_s=0.05,
        )
        async with serving(plane, there, limits) as served:
            peer = await served.raw()
            await prove(peer)
            await peer.send(frame_bytes(FrameKind.CALL, call(1)))
            await until(lambda: bool(there.links))
            (link,) = there.links
            await until(lambda: link.waiting_bytes == 0)
            reply = ReplyHeader("unit", GENERATION, [(1, 1)], [])
            link.send(FrameKind.REPLY, reply, [bytes(5 * bound)])
            with pytest.raises(LinkFull, match="wait for raw"):
                await fill(link, reply)
            waiting = link.waiting_bytes
            assert 4 * bound < waiting <= 6 * bound
            with pytest.raises(LinkFull, match="large frames wait"):
                link.send(FrameKind.REPLY, reply, [bytes(5 * bound)])
            assert link.waiting_bytes == waiting

    run(plane, scenario)


def test_close_sends_what_waits_and_both_sides_hear_once_without_error(plane: str) -> None:
    async def scenario(untaken: list[Any]) -> None:
        here, there = Recorder(), Recorder()
        async with serving(plane, there) as served:
            link = await served.connect(here)
            link.send(FrameKind.CALL, call(1), [bytes(3 << 20)])
            link.close("done")
            link.close("done again")
            with pytest.raises(LinkClosed):
                link.send(FrameKind.CALL, call(2))
            assert here.closed == []  # never from inside our own call
            await until(lambda: bool(here.closed and there.closed))
            assert len(there.frames) == 1
            assert link.peer.name == "server"
        assert here.errors == there.errors == [None]
        assert served.counters.links_closed == served.counters.links_opened == 1

    run(plane, scenario)


def test_both_sides_may_close_at_once(plane: str) -> None:
    async def scenario(untaken: list[Any]) -> None:
        here, there = Recorder(), Recorder()
        async with serving(plane, there) as served:
            link = await served.connect(here)
            link.send(FrameKind.CALL, call(1))
            await until(lambda: bool(there.links))
            link.close()
            there.links[0].close()
            await until(lambda: bool(here.closed and there.closed))
        assert here.errors == there.errors == [None]

    run(plane, scenario)


def test_a_caller_that_dies_is_reported_once(plane: str) -> None:
    async def scenario(untaken: list[Any]) -> None:
        there = Recorder()
        # A caller over Ray calls just stops calling: it is the pings that find out.
        limits = Limits(ping_after_s=0.02, silent_pings_max=2)
        async with serving(plane, there, limits) as served:
            peer = await served.raw()
            await prove(peer)
            await peer.send(frame_bytes(FrameKind.CALL, call(1)))
            await until(lambda: bool(there.frames))
            await peer.vanish()
            await until(lambda: bool(there.closed))
        assert len(there.closed) == 1
        assert isinstance(there.errors[0], LinkClosed)

    run(plane, scenario)


def test_a_server_that_dies_is_reported_once(plane: str) -> None:
    async def scenario(untaken: list[Any]) -> None:
        here = Recorder()
        async with serving(plane, Recorder()) as served:
            link = await served.connect(here)
            served.kill()
            await until(lambda: bool(here.closed))
            with pytest.raises(LinkClosed):
                link.send(FrameKind.CALL, call(1))
            assert link.waiting_bytes == 0
        assert len(here.closed) == 1
        assert isinstance(here.errors[0], LinkClosed)
        assert "server" in str(here.errors[0])
        assert "\n" not in str(here.errors[0])

    run(plane, scenario)


def test_a_frame_over_the_bound_is_not_sent(plane: str) -> None:
    async def scenario(untaken: list[Any]) -> None:
        there = Recorder()
        async with serving(plane, there) as served:
            link = await served.connect(Recorder(), limits=Limits(body_bytes_max=100))
            with pytest.raises(InvalidArgument, match="over the bounds"):
                link.send(FrameKind.CALL, call(1), [bytes(101)])
            link.send(FrameKind.CALL, call(2), [bytes(100)])
            await until(lambda: bool(there.frames))
        assert there.frames[0].header == call(2)

    run(plane, scenario)


def test_pings_keep_an_idle_link_open(plane: str) -> None:
    async def scenario(untaken: list[Any]) -> None:
        here, there = Recorder(), Recorder(echo=True)
        limits = Limits(ping_after_s=0.005, silent_pings_max=20)
        async with serving(plane, there, limits) as served:
            link = await served.connect(here, limits=limits)
            before = served.counters.frames_received
            await until(lambda: served.counters.frames_received > before + 10)
            assert here.closed == there.closed == []
            link.send(FrameKind.CALL, call(1))
            await until(lambda: bool(here.frames))
            assert len(there.frames) == 1  # pings are not the handler's business

    run(plane, scenario)


def test_a_ping_is_answered_with_what_it_carried(plane: str) -> None:
    async def scenario(untaken: list[Any]) -> None:
        there = Recorder()
        async with serving(plane, there, Limits(close_timeout_s=0.1)) as served:
            peer = await served.raw()
            await prove(peer)
            await peer.send(frame_bytes(FrameKind.PING, b"12345678"))
            assert await peer.receive() == frame_bytes(FrameKind.PONG, b"12345678")
            assert there.frames == []

    run(plane, scenario)


def test_a_peer_that_answers_no_ping_is_given_up(plane: str) -> None:
    async def scenario(untaken: list[Any]) -> None:
        there = Recorder()
        limits = Limits(ping_after_s=0.01, silent_pings_max=2)
        async with serving(plane, there, limits) as served:
            peer = await served.raw()
            await prove(peer)
            await until(lambda: bool(there.closed))
            assert "answered no ping" in str(there.errors[0])
            assert len(there.closed) == 1

    run(plane, scenario)


def test_a_fault_of_the_handler_closes_its_link_and_reaches_the_loop(plane: str) -> None:
    async def scenario(untaken: list[Any]) -> None:
        there = Recorder()

        def fault(link: Link, frame: Frame) -> None:
            raise ZeroDivisionError("a fault")

        there.hook = fault
        async with serving(plane, there) as served:
            link = await served.connect(Recorder())
            link.send(FrameKind.CALL, call(1))
            link.send(FrameKind.CALL, call(2))
            await until(lambda: bool(there.closed and untaken))
        assert len(there.frames) == 1
        assert len(there.closed) == 1
        assert "a fault" in str(there.errors[0])
        assert [type(what["exception"]) for what in untaken] == [ZeroDivisionError]
        untaken.clear()

    run(plane, scenario)


def test_a_body_that_the_handler_finds_corrupt_closes_the_link(plane: str) -> None:
    async def scenario(untaken: list[Any]) -> None:
        there = Recorder()

        def check(link: Link, frame: Frame) -> None:
            raise FrameCorrupt("tensors end at byte 4 of 2")

        there.hook = check
        async with serving(plane, there) as served:
            link = await served.connect(Recorder())
            link.send(FrameKind.CALL, call(1), [b"ab"])
            await until(lambda: bool(there.closed))
        assert isinstance(there.errors[0], FrameCorrupt)

    run(plane, scenario)


def test_a_handler_may_close_the_link_from_inside_a_frame(plane: str) -> None:
    async def scenario(untaken: list[Any]) -> None:
        here, there = Recorder(), Recorder()
        there.hook = lambda link, frame: link.close("enough")
        async with serving(plane, there) as served:
            link = await served.connect(here)
            for number in range(3):
                link.send(FrameKind.CALL, call(number))
            await until(lambda: bool(here.closed and there.closed))
        assert len(there.frames) == 1
        assert here.errors == there.errors == [None]

    run(plane, scenario)


def test_a_server_that_closes_says_goodbye_and_is_then_away(plane: str) -> None:
    async def scenario(untaken: list[Any]) -> None:
        heres = [Recorder() for _ in range(3)]
        there = Recorder()
        async with serving(plane, there) as served:
            for here in heres:
                await served.connect(here)
            await served.close()
            await until(lambda: all(here.closed for here in heres))
            with pytest.raises(LinkClosed):
                await served.connect(Recorder())
        assert [here.errors for here in heres] == [[None]] * 3
        assert there.errors == [None] * 3

    run(plane, scenario)


def test_counters_of_both_sides_agree(plane: str) -> None:
    async def scenario(untaken: list[Any]) -> None:
        here, there = Recorder(), Recorder(echo=True)
        async with serving(plane, there) as served:
            link = await served.connect(here)
            before = served.counters.stats()
            for number in range(10):
                link.send(FrameKind.CALL, call(number), [bytes(100)])
            await until(lambda: len(here.frames) == 10)
            after = served.counters.stats()
        grown = {name: after[name] - before[name] for name in after}
        size = len(frame_bytes(FrameKind.CALL, call(0), bytes(100)))
        assert grown["frames_received"] == grown["frames_sent"] == 10
        assert grown["bytes_received"] == 10 * size
        assert grown["links_opened"] == 0

    run(plane, scenario)


def test_a_caller_that_gives_up_connecting_leaves_nothing_behind(plane: str) -> None:
    async def scenario(untaken: list[Any]) -> None:
        there = Recorder()
        async with serving(plane, there, Limits(close_timeout_s=0.05)) as served:
            attempt = asyncio.ensure_future(served.connect(Recorder()))
            for _ in range(3):
                await asyncio.sleep(0)
            attempt.cancel()
            with pytest.raises(asyncio.CancelledError):
                await attempt
            link = await served.connect(Recorder())
            assert link.peer.name == "server"

    run(plane, scenario)
