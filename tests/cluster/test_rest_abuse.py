"""The REST door and clients that mean harm, or are only slow: each is given up, nobody else is."""

from __future__ import annotations

import asyncio
import resource

import pytest

from cluster.doors.rest import RestDoor
from tests.cluster.rest_clients import (
    LOOPS,
    Client,
    DoorScene,
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


async def ends(client: Client) -> bytes:
    """Whatever comes until the door closes, or resets; it must do so by itself."""
    try:
        return await asyncio.wait_for(client.rest(), 10.0)
    except ConnectionError:
        return b""


async def dripped(scene: DoorScene, client: Client, data: bytes, piece: int = 1) -> None:
    """Send slowly, as long as the door listens."""
    refused = len(scene.service.refused)
    for at in range(0, len(data), piece):
        if len(scene.service.refused) > refused:
            return
        client.send(data[at : at + piece])
        await asyncio.sleep(0.01)


# Slow senders


@pytest.mark.parametrize("beginning", ["G", "GET /echo HTTP/1.1\r\nHost: x\r\nX-A: "])
def test_headers_that_do_not_end_are_answered_408(loop: str, beginning: str) -> None:
    async def scenario() -> None:
        async with door_open(head_s=0.1) as scene:
            client = await scene.client()
            client.send(beginning)
            reply = await client.reply()
            assert (reply.status, reply.headers["connection"]) == (408, "close")
            assert "request's head took too long" in reply.json["error"]
            assert scene.door.stats.timed_out_head == 1
            assert scene.service.refused == [408]

    run_on(loop, scenario)


def test_headers_that_drip_are_no_better_than_headers_that_stop(loop: str) -> None:
    async def scenario() -> None:
        async with door_open(head_s=0.15) as scene:
            client = await scene.client()
            await dripped(scene, client, b"GET /echo HTTP/1.1\r\nX-A: " + b"a" * 10_000)
            assert b" 408 " in await ends(client)
            assert scene.door.stats.timed_out_head == 1
            assert scene.service.paths == []

    run_on(loop, scenario)


@pytest.mark.parametrize("form", ["length", "chunks", "trailer"])
def test_a_body_that_stops_is_answered_408(loop: str, form: str) -> None:
    beginnings = {
        "length": post("/echo", "x" * 100)[:-50],
        "chunks": chunked("/echo", "some", "pieces", end=""),
        "trailer": chunked("/echo", "some", end="0\r\nX-T: "),
    }

    async def scenario() -> None:
        async with door_open(body_s=0.1) as scene:
            client = await scene.client()
            client.send(beginnings[form])
            assert (await client.reply()).status == 408
            assert scene.door.stats.timed_out_body == 1
            assert scene.service.paths == []

    run_on(loop, scenario)


def test_a_body_slower_than_the_rate_is_given_up_and_a_quicker_one_is_not(loop: str) -> None:
    async def scenario() -> None:
        async with door_open(body_s=0.3, rate_min_bytes=20_000) as scene:
            slow = await scene.client()
            await dripped(scene, slow, post("/echo", "x" * 10_000).encode())
            assert b" 408 " in await ends(slow)
            quick = await scene.client()
            await dripped(scene, quick, post("/echo", "x" * 40_000).encode(), piece=4000)
            assert (await quick.reply()).status == 200

    run_on(loop, scenario)


def test_a_late_body_behind_a_request_under_way_is_refused_after_its_answer(loop: str) -> None:
    async def scenario() -> None:
        async with door_open(body_s=0.1) as scene:
            client = await scene.client()
            client.send(get("/later") + post("/echo", "x" * 100)[:-50])
            await until(lambda: scene.door.stats.timed_out_body == 1)
            scene.service.answer_one()
            assert [(await client.reply()).status for _ in range(2)] == [200, 408]
            assert await client.rest() == b""

    run_on(loop, scenario)


def test_a_request_that_takes_long_is_not_a_slow_client(loop: str) -> None:
    async def scenario() -> None:
        async with door_open(head_s=0.2, body_s=0.2, read_s=0.2, idle_s=0.2) as scene:
            client = await scene.client()
            client.send(post("/later", "x"))
            await until(lambda: len(scene.service.waiting) == 1)
            await asyncio.sleep(0.5)
            scene.service.answer_one()
            assert (await client.reply()).status == 200

    run_on(loop, scenario)


# Idle ones


def test_a_connection_without_a_request_is_closed_in_silence(loop: str) -> None:
    async def scenario() -> None:
        async with door_open(head_s=0.1, idle_s=60.0) as scene:
            assert await ends(await scene.client()) == b""
            assert scene.door.stats.timed_out_idle == 1

    run_on(loop, scenario)


def test_an_idle_connection_is_closed_and_one_in_use_is_not(loop: str) -> None:
    async def scenario() -> None:
        async with door_open(idle_s=0.2) as scene:
            used, idle = await scene.client(), await scene.client()
            idle.send(get("/echo"))
            await idle.reply()
            while scene.door.stats.timed_out_idle == 0:
                used.send(post("/echo", "the same head each time"))
                assert (await used.reply()).status == 200
                await asyncio.sleep(0.02)
            assert await ends(idle) == b""
            used.send(get("/echo"))
            assert (await used.reply()).status == 200

    run_on(loop, scenario)


# Slow readers


def deaf(client: Client) -> None:
    """From now on the client takes nothing; its side of the connection fills up."""
    client._writer.transport.pause_reading()  # type: ignore[attr-defined]


def test_a_client_that_takes_no_answers_is_cut(loop: str) -> None:
    async def scenario() -> None:
        async with door_open(read_s=0.2) as scene:
            client = await scene.client()
            deaf(client)
            client.send(get("/big") * 60)
            await until(lambda: scene.door.stats.timed_out_unread == 1)
            await until(lambda: not scene.door.connections)
            assert scene.service.paths.count(b"/big") < 30

    run_on(loop, scenario)


def test_a_client_that_takes_no_answer_and_asked_to_close_is_cut_too(loop: str) -> None:
    async def scenario() -> None:
        async with door_open(read_s=0.2) as scene:
            client = await scene.client()
            deaf(client)
            client.send(get("/big") * 20 + get("/big", "Connection: close"))
            await until(lambda: not scene.door.connections)
            assert scene.door.stats.timed_out_unread == 1

    run_on(loop, scenario)


def test_all_answers_not_taken_are_bounded_and_the_slowest_reader_goes_first(loop: str) -> None:
    async def scenario() -> None:
        async with door_open(unread_bytes_max=3 << 20) as scene:
            clients = [await scene.client() for _ in range(4)]
            for client in clients[:3]:
                deaf(client)
                client.send(get("/big") * 30)
            await until(lambda: scene.door.stats.cut > 0)
            assert scene.door._unread_bytes <= 3 << 20
            clients[3].send(get("/big"))
            assert (await clients[3].reply()).status == 200

    run_on(loop, scenario)


# Many at a time


def test_too_many_connections_may_come_back_when_one_has_gone(loop: str) -> None:
    async def scenario() -> None:
        async with door_open(connections_max=1) as scene:
            first = await scene.client()
            await until(lambda: len(scene.door.connections) == 1)
            for _ in range(300):
                client = await scene.client()
                client.send(post("/echo", "x"))
                if scene.door.stats.refused < 250:
                    reply = await client.reply()
                    assert (reply.status, reply.headers["retry-after"]) == (503, "1")
            assert len(scene.door.connections) == 1
            await until(lambda: scene.door.stats.refused == 300)
            assert len(scene.door._lingering) <= 256
            await first.close()
            await until(lambda: not scene.door.connections)
            assert (await scene.ask(get("/echo"))).status == 200

    run_on(loop, scenario)


def test_connections_leave_files_for_the_rest_of_the_process() -> None:
    async def scenario() -> None:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        async with door_open(connections_max=10_000_000) as scene:
            assert 0 < scene.door._connections_max < soft
            assert isinstance(scene.door, RestDoor)

    run_on("uvloop", scenario)


def test_bodies_that_do_not_end_are_bounded_together(loop: str) -> None:
    async def scenario() -> None:
        async with door_open(body_bytes_max=1 << 20, bodies_bytes_max=2 << 20) as scene:
            half = post("/echo", "x" * (1 << 20))[: -(1 << 18)]
            clients = [await scene.client() for _ in range(4)]
            for client in clients:
                client.send(half)
                await client.drain()
            await until(lambda: scene.service.refused.count(503) >= 1)
            # A request that is whole at once needs no room beside them.
            await scene.round_trip()
            for client in clients:
                await client.reset()
            await until(lambda: scene.door._kept_bytes == 0)
            assert (await scene.ask(post("/echo", "x" * (1 << 20)))).status == 200

    run_on(loop, scenario)


def test_headers_that_do_not_end_count_among_what_is_kept(loop: str) -> None:
    async def scenario() -> None:
        async with door_open(body_bytes_max=10_000, bodies_bytes_max=10_000) as scene:
            for _ in range(3):
                client = await scene.client()
                client.send("GET / HTTP/1.1\r\nX-A: " + "a" * 4000 + "\r\nX-B: ")
                await client.drain()
            await until(lambda: scene.service.refused == [503])
            await scene.round_trip()

    run_on(loop, scenario)


def test_nothing_is_kept_of_requests_that_were_answered(loop: str) -> None:
    async def scenario() -> None:
        async with door_open() as scene:
            client = await scene.client()
            for number in range(20):
                client.send(post("/echo", "x" * 300_000) + get(f"/echo/{number}"))
                assert [(await client.reply()).status for _ in range(2)] == [200, 200]
            [connection] = scene.door.connections
            assert (scene.door._kept_bytes, connection._kept, connection._body) == (0, 0, b"")
            assert connection._headers == {}

    run_on(loop, scenario)


# Much in little


@pytest.mark.parametrize("count", [20_000])
def test_requests_in_one_write_are_read_a_few_a_turn_and_all_answered(
    loop: str, count: int
) -> None:
    async def scenario() -> None:
        async with door_open(pipelined_max=64) as scene:
            client = await scene.client()
            client.send(get("/later") + "GET /a HTTP/1.1\r\n\r\n" * count)
            await until(lambda: len(scene.service.waiting) == 1)
            for _ in range(5):
                await scene.round_trip()
            [connection] = [one for one in scene.door.connections if one._pipelined]
            assert len(connection._pipelined) < 64 + 4096 // 18 + 1
            scene.service.answer_one()
            for _ in range(count + 1):
                await client.reply()
            assert scene.service.paths.count(b"/a") == count
            assert scene.door._kept_bytes == 0

    run_on(loop, scenario)


def test_a_body_in_tiny_chunks_is_put_together_without_holding_others_up(loop: str) -> None:
    async def scenario() -> None:
        async with door_open() as scene:
            client = await scene.client()
            client.send(chunked("/echo", *(["x"] * 60_000)) + get("/echo/after"))
            body = (await client.reply()).json["body"]
            assert body == "x" * 60_000
            assert (await client.reply()).json["path"] == "/echo/after"

    run_on(loop, scenario)


def test_a_half_closed_client_gets_the_answers_of_requests_that_were_not_parsed_yet(
    loop: str,
) -> None:
    async def scenario() -> None:
        async with door_open() as scene:
            client = await scene.client()
            client.send("GET /a HTTP/1.1\r\n\r\n" * 2000)
            client.half_close()
            found = await ends(client)
            assert found.count(b"HTTP/1.1 200 OK") == 2000

    run_on(loop, scenario)


# What one server reads one way and the next another way


SMUGGLED = "GET /admin HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    ("lines", "body", "status"),
    [
        (("Content-Length: 3", "Transfer-Encoding: chunked"), "0\r\n\r\n" + SMUGGLED, 400),
        (("Transfer-Encoding: chunked", "Content-Length: 3"), "0\r\n\r\n" + SMUGGLED, 400),
        (("Content-Length: 0", "Content-Length: 40"), SMUGGLED, 400),
        (("Content-Length: 0", "Content-Length: 0"), SMUGGLED, 400),
        (("Content-Length: 0, 40",), SMUGGLED, 400),
        (("Content-Length: -0",), SMUGGLED, 400),
        (("Content-Length: +0",), SMUGGLED, 400),
        (("Content-Length: 0x0",), SMUGGLED, 400),
        (("Content-Length: ",), SMUGGLED, 400),
        (("Content-Length : 0",), SMUGGLED, 400),
        (("Transfer-Encoding: xchunked",), "0\r\n\r\n" + SMUGGLED, 501),
        (("Transfer-Encoding: gzip, chunked",), "0\r\n\r\n" + SMUGGLED, 501),
        (("Transfer-Encoding: chunked, identity",), "0\r\n\r\n" + SMUGGLED, 400),
        (("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"), "0\r\n\r\n" + SMUGGLED, 400),
        (("Transfer-Encoding : chunked",), "0\r\n\r\n" + SMUGGLED, 400),
        (("Transfer-Encoding: chunked",), "-1\r\nx\r\n0\r\n\r\n" + SMUGGLED, 400),
        (("Transfer-Encoding: chunked",), "0x0\r\n\r\n" + SMUGGLED, 400),
        (("Transfer-Encoding: chunked",), "ffffffffffffffffff\r\nx", 400),
        (("X-A: b\rContent-Length: 40",), SMUGGLED, 400),
        (("X-A: b\x00c",), SMUGGLED, 400),
        (("X-A: b", " Content-Length: 40"), SMUGGLED, 400),
    ],
)
def test_a_request_that_can_be_read_in_two_ways_is_refused(
    lines: tuple[str, ...], body: str, status: int
) -> None:
    async def scenario() -> None:
        async with door_open() as scene:
            client = await scene.client()
            client.send("\r\n".join(["POST /echo HTTP/1.1", "Host: x", *lines, "", ""]) + body)
            reply = await client.reply()
            assert (reply.status, reply.headers["connection"]) == (status, "close")
            assert await client.rest() == b""
            assert b"/admin" not in scene.service.paths

    run_on("uvloop", scenario)


def test_a_trailer_says_nothing_that_counts(loop: str) -> None:
    async def scenario() -> None:
        async with door_open() as scene:
            request = chunked("/echo", "x", end="0\r\nX-Api-Key: k\r\n\r\n")
            seen = (await scene.ask(request)).json
            assert "x-api-key" not in seen["headers"]

    run_on(loop, scenario)


def test_a_header_given_twice_is_a_list_of_both(loop: str) -> None:
    async def scenario() -> None:
        async with door_open() as scene:
            seen = (await scene.ask(get("/echo", "X-Api-Key: one", "x-api-key: two"))).json
            assert seen["headers"]["x-api-key"] == "one, two"

    run_on(loop, scenario)
