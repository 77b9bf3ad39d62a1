"""What is particular to Ray calls: numbering and polling."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from batching.errors import ResourceExhausted
from shards.errors import LinkClosed
from shards.orders import Endpoint
from shards.transport import Limits, raycalls
from shards.transport.raycalls import RayPlane, connect_actor
from shards.wire import FrameKind
from tests.shards.transport_planes import (
    GENERATION,
    NODE,
    SECRET,
    FakeHandle,
    RawCaller,
    Recorder,
    call,
    client_handshake,
    frame_bytes,
    prove,
    run,
    until,
)

ENDPOINT = Endpoint(actor="server", generation=GENERATION, node=NODE)
HELLO = frame_bytes(*client_handshake().start()[0])


def serve(handler: Recorder, limits: Limits | None = None) -> RayPlane:
    return RayPlane(
        name="server",
        generation=GENERATION,
        node=NODE,
        secret=SECRET,
        handler=handler,
        limits=limits or Limits(close_timeout_s=0.05),
    )


def test_a_call_that_was_lost_or_came_twice_ends_the_link() -> None:
    async def scenario(untaken: list[Any]) -> None:
        for numbers in ((0, 2), (0, 0)):
            plane = serve(Recorder())
            await plane.send("link", numbers[0], HELLO[:20])
            with pytest.raises(LinkClosed, match="lost"):
                await plane.send("link", numbers[1], HELLO[20:])
            assert await plane.receive("link") is None
            with pytest.raises(LinkClosed, match="no such link"):
                await plane.send("link", 1, b"")

    run("ray calls", scenario)


def test_a_link_begins_with_call_0() -> None:
    async def scenario(untaken: list[Any]) -> None:
        plane = serve(Recorder())
        with pytest.raises(LinkClosed, match="no such link"):
            await plane.send("link", 1, HELLO)
        assert await plane.receive("link") is None

    run("ray calls", scenario)


def test_links_are_bounded() -> None:
    async def scenario(untaken: list[Any]) -> None:
        plane = serve(Recorder(), Limits(links_max=2, close_timeout_s=0.05))
        await plane.send("one", 0, HELLO)
        await plane.send("two", 0, HELLO)
        with pytest.raises(ResourceExhausted):
            await plane.send("three", 0, HELLO)
        await plane.close()
        assert await plane.receive("one") is None

    run("ray calls", scenario)


def test_a_poll_without_bytes_ends_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raycalls, "_POLL_S", 0.01)

    async def scenario(untaken: list[Any]) -> None:
        here, plane = Recorder(), serve(Recorder(echo=True))
        await plane.send("link", 0, HELLO[:20])
        assert await plane.receive("link") == b""
        handle = FakeHandle(plane)
        polls = 0
        receive = plane.receive

        async def counted(link_id: str) -> bytes | None:
            nonlocal polls
            polls += 1
            return await receive(link_id)

        handle.plane_receive._method = counted
        link = await connect_actor(
            handle, ENDPOINT, name="caller", node=NODE, secret=SECRET, handler=here
        )
        await until(lambda: polls > 4)
        link.send(FrameKind.CALL, call(1))
        await until(lambda: bool(here.frames))
        await plane.close()

    run("ray calls", scenario)


def test_what_is_sent_during_a_call_goes_with_the_next() -> None:
    async def scenario(untaken: list[Any]) -> None:
        there = Recorder()
        plane = serve(there)
        handle = FakeHandle(plane)
        calls: list[int] = []
        send = plane.send

        async def counted(link_id: str, number: int, data: bytes) -> None:
            calls.append(number)
            await asyncio.sleep(0.005)
            await send(link_id, number, data)

        handle.plane_send._method = counted
        link = await connect_actor(
            handle, ENDPOINT, name="caller", node=NODE, secret=SECRET, handler=Recorder()
        )
        opening = len(calls)
        for number in range(500):
            link.send(FrameKind.CALL, call(number))
            await asyncio.sleep(0)
        await until(lambda: len(there.frames) == 500)
        assert [frame.header for frame in there.frames] == [call(n) for n in range(500)]
        assert calls == list(range(len(calls)))
        assert len(calls) - opening < 100
        link.close()
        await until(lambda: bool(there.closed))

    run("ray calls", scenario)


def test_the_tasks_of_a_link_end_with_it() -> None:
    async def scenario(untaken: list[Any]) -> None:
        here, there = Recorder(), Recorder()
        plane = serve(there)
        before = asyncio.all_tasks()
        link = await connect_actor(
            FakeHandle(plane), ENDPOINT, name="caller", node=NODE, secret=SECRET, handler=here
        )
        link.close()
        await until(lambda: bool(here.closed and there.closed))
        await until(lambda: asyncio.all_tasks() == before)
        assert there.errors == [None]

    run("ray calls", scenario)


def test_a_caller_told_goodbye_need_not_ask_again() -> None:
    async def scenario(untaken: list[Any]) -> None:
        there = Recorder()
        plane = serve(there, Limits(close_timeout_s=60))
        peer = RawCaller(plane)
        await prove(peer)
        closing = asyncio.ensure_future(plane.close("enough"))
        assert await peer.receive() == frame_bytes(FrameKind.GOODBYE, b"enough")
        await closing
        assert there.errors == [None]

    run("ray calls", scenario, timeout_s=40)


def test_the_tasks_of_a_link_end_even_if_the_actor_hangs() -> None:
    async def scenario(untaken: list[Any]) -> None:
        here = Recorder()
        plane = serve(Recorder())
        handle = FakeHandle(plane)
        before = asyncio.all_tasks()
        link = await connect_actor(
            handle,
            ENDPOINT,
            name="caller",
            node=NODE,
            secret=SECRET,
            handler=here,
            limits=Limits(close_timeout_s=0.02),
        )

        async def hang(*_: object) -> None:
            await asyncio.Event().wait()

        handle.plane_send._method = hang
        link.send(FrameKind.CALL, call(1))
        link.close()
        await until(lambda: bool(here.closed))
        await until(lambda: asyncio.all_tasks() == before)
        await plane.close()

    run("ray calls", scenario)
