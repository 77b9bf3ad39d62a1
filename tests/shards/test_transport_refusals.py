"""Whom every plane refuses, and what it says: the same scenario over each of them."""

from __future__ import annotations

import struct
from typing import Any

import msgspec
import pytest

from shards.errors import FrameCorrupt, HandshakeRefused, LinkClosed
from shards.handshake import PROTOCOL
from shards.transport import Limits
from shards.wire import FrameFlag, FrameKind, FrameOversize
from tests.shards.transport_planes import (
    GENERATION,
    PLANES,
    SECRET,
    Recorder,
    call,
    client_handshake,
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


@pytest.mark.parametrize(
    ("garbage", "kind"),
    [
        (struct.pack("<BBHIII", FrameKind.CALL, 0, 0, 0, 10, 5001), FrameOversize),
        (struct.pack("<BBHIII", FrameKind.CALL, 0, 0, 0, 2 << 20, 0), FrameOversize),
        (struct.pack("<BBHIII", 99, 0, 0, 0, 0, 0), FrameCorrupt),
        (struct.pack("<BBHIII", FrameKind.CALL, 1, 0, 0, 0, 0), FrameCorrupt),
        (frame_bytes(FrameKind.CALL, b"\xc1"), FrameCorrupt),
        (frame_bytes(FrameKind.HELLO, b""), FrameCorrupt),
        (struct.pack("<BBHIII", FrameKind.CHUNK, 0, 0, 1, 0, 9), FrameCorrupt),
        (struct.pack("<BBHIII", FrameKind.CALL, FrameFlag.MORE, 0, 2, 0, 5000), FrameCorrupt),
        (frame_bytes(FrameKind.CREDIT, b"123"), FrameCorrupt),
    ],
    ids=[
        "body too large",
        "header too large",
        "kind",
        "flags",
        "header",
        "second handshake",
        "piece of no stream",
        "head without a header",
        "credit",
    ],
)
def test_bytes_that_are_no_frame_close_that_link_only(
    plane: str, garbage: bytes, kind: type[Exception]
) -> None:
    async def scenario(untaken: list[Any]) -> None:
        here, there = Recorder(), Recorder(echo=True)
        async with serving(
            plane, there, Limits(body_bytes_max=5000, close_timeout_s=0.1)
        ) as served:
            link = await served.connect(here)
            peer = await served.raw()
            await prove(peer)
            await peer.send(frame_bytes(FrameKind.CALL, call(1)) + garbage)
            await until(lambda: bool(there.closed))
            assert [frame.header for frame in there.frames] == [call(1)]  # what was good came
            link.send(FrameKind.CALL, call(2))
            await until(lambda: bool(here.frames))
            assert len(there.closed) == 1
            assert type(there.errors[0]) is kind

    run(plane, scenario)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"secret": b"another"}, "did not prove"),
        ({"expected_generation": GENERATION - 1}, "generation 6 was expected"),
        ({"expected_name": "somebody"}, "somebody of generation 7 was expected"),
        ({"protocol": PROTOCOL + 1}, f"protocol {PROTOCOL + 1} meets protocol {PROTOCOL}"),
        ({"distribution": "0.0.0"}, "shardserve 0.0.0 meets"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_peer_is_refused_counted_and_told_why(
    plane: str, changes: dict[str, Any], reason: str
) -> None:
    async def scenario(untaken: list[Any]) -> None:
        there = Recorder()
        async with serving(plane, there) as served:
            peer = await served.raw()
            with pytest.raises(HandshakeRefused, match=reason) as refused:
                await prove(peer, client_handshake(**changes))
            assert SECRET.decode() not in str(refused.value)
            assert await peer.receive() == b""
            assert served.counters.handshakes_refused == 1
            assert served.counters.links_opened == 0
        assert there.closed == []

    run(plane, scenario)


@pytest.mark.parametrize("wrong", ["secret", "generation"])
def test_connect_raises_the_refusal(plane: str, wrong: str) -> None:
    async def scenario(untaken: list[Any]) -> None:
        here = Recorder()
        async with serving(plane, Recorder()) as served:
            stale = msgspec.structs.replace(served.endpoint, generation=GENERATION + 1)
            changes: dict[str, Any] = (
                {"secret": b"another"} if wrong == "secret" else {"endpoint": stale}
            )
            with pytest.raises(HandshakeRefused, match="server refused: "):
                await served.connect(here, **changes)
            assert served.counters.handshakes_refused == 1
            assert isinstance(await served.connect(here), object)
            assert here.closed == []

    run(plane, scenario)


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
        bytes(16),
        struct.pack("<BBHIII", FrameKind.HELLO, 0, 0, 0, 5000, 0),
        struct.pack("<BBHIII", FrameKind.HELLO, 0, 0, 0, 10, 1),
        frame_bytes(FrameKind.HELLO, b"\x91\x01"),
        frame_bytes(FrameKind.PROOF, b"\x91\xc4\x00"),
        frame_bytes(FrameKind.CALL, call(1)),
        frame_bytes(FrameKind.GOODBYE, b""),
    ],
)
def test_a_stranger_is_closed_and_counted(plane: str, garbage: bytes) -> None:
    async def scenario(untaken: list[Any]) -> None:
        there = Recorder()
        async with serving(plane, there) as served:
            peer = await served.raw()
            await peer.send(garbage)
            while await peer.receive():
                pass
            assert served.counters.handshakes_refused == 1
        assert there.frames == []
        assert there.closed == []

    run(plane, scenario)


def test_who_says_nothing_is_closed_at_the_deadline(plane: str) -> None:
    async def scenario(untaken: list[Any]) -> None:
        async with serving(plane, Recorder(), Limits(handshake_timeout_s=0.05)) as served:
            peer = await served.raw()
            (hello,) = client_handshake().start()
            await peer.send(frame_bytes(*hello)[:20])
            while await peer.receive():
                pass
            assert served.counters.handshakes_refused == 1

    run(plane, scenario)


def test_more_links_than_the_bound_are_not_taken(plane: str) -> None:
    async def scenario(untaken: list[Any]) -> None:
        there = Recorder()
        async with serving(plane, there, Limits(links_max=1)) as served:
            first = await served.connect(Recorder())
            with pytest.raises(LinkClosed):
                await served.connect(Recorder())
            assert served.counters.handshakes_refused == 1
            first.close()
            await until(lambda: bool(there.closed))
            await served.connect(Recorder())

    run(plane, scenario)
