"""What the REST door refuses before a request exists, and how the client hears of it."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from cluster.doors.connection import Connection
from cluster.doors.rest import RestDoor
from cluster.doors.service import Service
from cluster.doors.settings import DoorLimits
from tests.cluster.rest_clients import (
    LOOPS,
    DoorScene,
    FakeService,
    chunked,
    door_open,
    get,
    post,
    run_on,
    until,
)


@pytest.fixture(params=LOOPS)
def loop(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


async def refused(scene: DoorScene, request: str | bytes, status: int) -> str:
    """The error text; the connection must close after it, and the refusal be counted."""
    client = await scene.client()
    client.send(request)
    reply = await client.reply()
    assert (reply.status, reply.headers["connection"]) == (status, "close")
    assert reply.headers["content-type"] == "application/json"
    assert await client.rest() == b""
    assert scene.service.refused == [status]
    return str(reply.json["error"])


@pytest.mark.parametrize(
    "garbage",
    [
        pytest.param(b"garbage\r\n\r\n", id="no request line"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", id="a TLS hello"),
        pytest.param(b"GET / HTTP/9.9\r\n\r\n", id="a version of the future"),
        pytest.param(b"GET / HTTP/1.1\r\nno colon\r\n\r\n", id="a header without a colon"),
        pytest.param(
            b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
            id="two lengths",
        ),
        pytest.param(
            b"POST / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            id="length and chunks",
        ),
        pytest.param(b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", id="a negative length"),
        pytest.param(
            b"POST / HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n", id="a huge length"
        ),
        pytest.param(
            b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", id="a bad chunk"
        ),
    ],
)
def test_what_is_not_http_is_answered_400(loop: str, garbage: bytes) -> None:
    async def scenario() -> None:
        async with door_open() as scene:
            assert "not a valid HTTP request" in await refused(scene, garbage, 400)
            assert scene.service.paths == []

    run_on(loop, scenario)


# Heads


def test_a_head_at_its_bound_is_taken_and_one_byte_more_is_not(loop: str) -> None:
    async def scenario() -> None:
        async with door_open(head_bytes_max=200) as scene:
            room = 200 - len("/echo" + "Host: x\r\n" + "X-Fill: \r\n")
            fits = get("/echo", "X-Fill: " + "y" * room)
            assert (await scene.ask(fits)).status == 200
            text = await refused(scene, get("/echo", "X-Fill: " + "y" * (room + 1)), 431)
            assert "headers are too large" in text

    run_on(loop, scenario)


def test_headers_of_next_to_nothing_are_bytes_too(loop: str) -> None:
    async def scenario() -> None:
        async with door_open(head_bytes_max=1000) as scene:
            assert (await scene.ask(get("/echo", *["a:"] * 190))).status == 200
            assert "headers are too large" in await refused(scene, get("/echo", *["a:"] * 200), 431)

    run_on(loop, scenario)


def test_a_request_line_that_is_too_long_is_refused(loop: str) -> None:
    async def scenario() -> None:
        async with door_open(head_bytes_max=200) as scene:
            assert "request line" in await refused(scene, get("/echo/" + "a" * 300), 431)

    run_on(loop, scenario)


@pytest.mark.parametrize(
    "beginning",
    [
        pytest.param("GET / HTTP/1.1\r\nX-Endless: ", id="value"),
        pytest.param("GET / HTTP/1.1\r\n", id="name"),
        pytest.param(chunked("/", "body", end="0\r\nX-Trailer: "), id="trailer"),
        pytest.param(chunked("/", "body", end="5;"), id="chunk extension"),
    ],
)
def test_a_line_without_an_end_is_refused_before_it_fills_memory(loop: str, beginning: str) -> None:
    async def scenario() -> None:
        async with door_open(head_bytes_max=1000) as scene:
            client = await scene.client()
            client.send(beginning)
            for _ in range(200):
                client.send(b"a" * 100)
                await client.drain()
                if scene.service.refused:
                    break
                await scene.round_trip()
            assert scene.service.refused == [431]
            assert (await client.reply()).status == 431

    run_on(loop, scenario)


def test_a_slow_but_honest_request_is_not_taken_for_an_endless_one(loop: str) -> None:
    async def scenario() -> None:
        async with door_open(head_bytes_max=300) as scene:
            client = await scene.client()
            for byte in chunked("/echo", *(["piece"] * 120)):
                client.send(byte)
                await client.drain()
            assert (await client.reply()).json["body"] == "piece" * 120

    run_on(loop, scenario)


# Bodies


def test_a_body_at_its_bound_is_taken(loop: str) -> None:
    async def scenario() -> None:
        async with door_open(body_bytes_max=1000) as scene:
            assert (await scene.ask(post("/echo", "x" * 1000))).status == 200
            assert (await scene.ask(chunked("/echo", "x" * 500, "x" * 500))).status == 200

    run_on(loop, scenario)


def test_an_announced_body_over_the_bound_is_refused_before_it_comes(loop: str) -> None:
    async def scenario() -> None:
        async with door_open(body_bytes_max=1000) as scene:
            head = post("/echo", "x" * 1001).removesuffix("x" * 1001)
            text = await refused_keeping_open(scene, head)
            assert "larger than the limit of 1000 bytes" in text

    run_on(loop, scenario)


async def refused_keeping_open(scene: DoorScene, request: str) -> str:
    client = await scene.client()
    client.send(request)
    reply = await client.reply()
    assert reply.status == 413
    assert scene.service.paths == []
    return str(reply.json["error"])


@pytest.mark.parametrize("pieces", [("x" * 1001,), ("x" * 600, "x" * 600), ("x",) * 1001])
def test_a_chunked_body_over_the_bound_is_refused(loop: str, pieces: tuple[str, ...]) -> None:
    async def scenario() -> None:
        async with door_open(body_bytes_max=1000) as scene:
            await refused(scene, chunked("/echo", *pieces), 413)
            assert scene.service.paths == []

    run_on(loop, scenario)


def test_a_client_in_the_middle_of_a_large_upload_reads_why_it_was_refused(loop: str) -> None:
    """If the door just closed, the bytes under way would reset the connection."""

    async def scenario() -> None:
        async with door_open(body_bytes_max=1000) as scene:
            client = await scene.client()
            client.send(post("/echo", "x" * (16 << 20)))
            await client.drain()
            assert (await client.reply()).status == 413
            assert await client.rest() == b""

    run_on(loop, scenario)


def test_a_refused_client_that_never_closes_is_cut(
    loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.doors.connection._LINGER_S", 0.05)

    async def scenario() -> None:
        async with door_open() as scene:
            client = await scene.client()
            client.send("garbage\r\n\r\n")
            assert (await client.reply()).status == 400
            await until(lambda: not scene.door.connections)

    run_on(loop, scenario)


# Order


def test_requests_before_a_bad_one_get_their_answers_and_then_it_is_refused(loop: str) -> None:
    async def scenario() -> None:
        async with door_open() as scene:
            client = await scene.client()
            client.send(get("/later") + get("/echo") + "garbage\r\n\r\n" + get("/echo/after"))
            await until(lambda: scene.service.refused == [400])
            scene.service.answer_one()
            assert [(await client.reply()).status for _ in range(3)] == [200, 200, 400]
            assert await client.rest() == b""
            assert b"/echo/after" not in scene.service.paths

    run_on(loop, scenario)


def test_too_many_connections_are_answered_503_and_counted(loop: str) -> None:
    async def scenario() -> None:
        async with door_open(connections_max=2) as scene:
            first, second = await scene.client(), await scene.client()
            await until(lambda: len(scene.door.connections) == 2)
            third = await scene.client()
            reply = await third.reply()
            assert (reply.status, reply.json["error"]) == (503, "too many connections")
            assert await third.rest() == b""
            assert scene.door.stats.refused == 1
            await first.close()
            await until(lambda: len(scene.door.connections) == 1)
            assert (await scene.ask(get("/echo"))).status == 200
            await second.close()

    run_on(loop, scenario)


# Bytes as they come, without a network


class FakeTransport(asyncio.Transport):
    """Collects what is written; reading goes on unless it was paused."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.is_closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.is_closed
        self.written += bytes(data)

    def close(self) -> None:
        self.is_closed = True

    def is_closing(self) -> bool:
        return self.is_closed

    def write_eof(self) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


def connected() -> tuple[Connection, FakeTransport, FakeService]:
    service = FakeService()
    connection = Connection(RestDoor(cast(Service, service), DoorLimits()))
    transport = FakeTransport()
    connection.connection_made(transport)
    return connection, transport, service


EVERYTHING = (
    post("/echo/1", "body", "X-Long-Name: value", "Connection: keep-alive")
    + chunked("/echo/2", "two", "pieces", end="0\r\nX-Trailer: t\r\n\r\n")
    + get("/echo/3")
).encode()


def test_bytes_may_be_cut_anywhere() -> None:
    async def whole_and_cut() -> None:
        wanted = await answers_to([EVERYTHING])
        assert wanted.count(b"HTTP/1.1 200 OK") == 3
        for cut in range(1, len(EVERYTHING)):
            assert await answers_to([EVERYTHING[:cut], EVERYTHING[cut:]]) == wanted, cut
        single = [EVERYTHING[at : at + 1] for at in range(len(EVERYTHING))]
        assert await answers_to(single) == wanted

    asyncio.run(whole_and_cut())


async def answers_to(pieces: list[bytes]) -> bytes:
    connection, transport, service = connected()
    for piece in pieces:
        connection.data_received(piece)
    await until(lambda: len(service.paths) == 3)
    await asyncio.sleep(0)  # answers may leave at the end of the turn
    return transport.written


def test_a_request_between_an_answer_and_the_next_turn_does_not_overtake() -> None:
    """On uvloop, bytes can come after an answer and before what the answer scheduled."""

    async def scenario() -> None:
        connection, _, service = connected()
        connection.data_received((get("/later") + get("/echo/1")).encode())
        service.answer_one()
        connection.data_received(get("/echo/2").encode())
        await until(lambda: len(service.paths) == 3)
        assert service.paths == [b"/later", b"/echo/1", b"/echo/2"]

    asyncio.run(scenario())


@pytest.mark.parametrize("how", ["half-close", "the door closes"])
def test_an_end_between_an_answer_and_the_next_turn_loses_no_request(how: str) -> None:
    async def scenario() -> None:
        connection, transport, service = connected()
        connection.data_received((get("/later") + get("/echo/1")).encode())
        service.answer_one()
        if how == "half-close":
            assert connection.eof_received(), "the transport would close"
        else:
            connection.close_when_idle()
        assert not transport.is_closed
        await until(lambda: transport.is_closed)
        assert transport.written.count(b"HTTP/1.1 200 OK") == 2

    asyncio.run(scenario())
