"""The REST door over real sockets: what it reads, in which order it answers, how it ends."""

from __future__ import annotations

import asyncio

import pytest

from tests.cluster.rest_clients import LOOPS, chunked, door_open, get, post, run_on, until


@pytest.fixture(params=LOOPS)
def loop(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


# Requests


def test_a_request_reaches_the_service_as_it_was_sent(loop: str) -> None:
    async def scenario() -> None:
        async with door_open() as scene:
            reply = await scene.ask(post("/echo?a=%20b", "body", "X-Case: Kept As Is"))
            assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
            seen = reply.json
            assert (seen["method"], seen["path"]) == ("POST", "/echo?a=%20b")
            assert (seen["body"], seen["headers"]["x-case"]) == ("body", "Kept As Is")

    run_on(loop, scenario)


def test_a_connection_serves_many_requests(loop: str) -> None:
    async def scenario() -> None:
        async with door_open() as scene:
            client = await scene.client()
            for number in range(5):
                client.send(post(f"/echo/{number}", "x" * number))
                reply = await client.reply()
                assert "connection" not in reply.headers
                assert reply.json["body"] == "x" * number
            assert len(scene.door.connections) == 1

    run_on(loop, scenario)


@pytest.mark.parametrize("pieces", [(), ("all",), ("in", " ", "several", " pieces")])
def test_a_chunked_body_is_put_together(loop: str, pieces: tuple[str, ...]) -> None:
    async def scenario() -> None:
        async with door_open() as scene:
            reply = await scene.ask(chunked("/echo", *pieces))
            assert reply.json["body"] == "".join(pieces)

    run_on(loop, scenario)


def test_a_megabyte_goes_in_and_comes_out(loop: str) -> None:
    async def scenario() -> None:
        async with door_open() as scene:
            body = "0123456789abcdef" * (1 << 16)
            reply = await scene.ask(post("/echo", body))
            assert reply.json["body"] == body

    run_on(loop, scenario)


def test_a_head_request_gets_the_length_of_the_body_and_no_body(loop: str) -> None:
    async def scenario() -> None:
        async with door_open() as scene:
            client = await scene.client()
            client.send("HEAD /echo HTTP/1.1\r\nHost: x\r\n\r\n" + get("/echo/next"))
            reply = await client.reply(has_body=False)
            assert int(reply.headers["content-length"]) > 0
            assert (await client.reply()).json["path"] == "/echo/next"

    run_on(loop, scenario)


@pytest.mark.parametrize("method", ["POST", "HEAD", "GET"])
def test_a_head_that_comes_again_means_the_same_as_the_first_time(loop: str, method: str) -> None:
    """Byte for byte the same head, with other bodies, whole and in pieces, on two connections."""

    async def scenario() -> None:
        async with door_open() as scene:
            clients = [await scene.client(), await scene.client()]
            for number, body in enumerate(["one", "two", "six", "ten", "end", "abc"]):
                client = clients[number % 2]
                whole = post("/echo/a", body, "X-Some: thing").replace("POST", method)
                cut = len(whole) if number < 4 else len(whole) - 1
                client.send(whole[:cut])
                if cut < len(whole):
                    await client.drain()
                    await scene.round_trip()
                    client.send(whole[cut:])
                reply = await client.reply(has_body=method != "HEAD")
                assert reply.status == 200
                if method != "HEAD":
                    seen = reply.json
                    assert (seen["method"], seen["path"]) == (method, "/echo/a")
                    assert (seen["body"], seen["headers"]["x-some"]) == (body, "thing")

    run_on(loop, scenario)


def test_a_known_head_in_the_middle_of_another_body_is_only_bytes(loop: str) -> None:
    async def scenario() -> None:
        async with door_open() as scene:
            client = await scene.client()
            inner = post("/echo/inner", "x")
            client.send(inner)
            await client.reply()
            head, _, _ = post("/echo/outer", inner).partition("\r\n\r\n")
            client.send(head + "\r\n\r\n")
            await client.drain()
            await scene.round_trip()
            client.send(inner)
            reply = await client.reply()
            assert (reply.json["path"], reply.json["body"]) == ("/echo/outer", inner)

    run_on(loop, scenario)


def test_known_heads_are_bounded_in_number_and_size(loop: str) -> None:
    async def scenario() -> None:
        async with door_open() as scene:
            client = await scene.client()
            for number in range(1100):
                client.send(post(f"/echo/{number}", "x"))
                await client.reply()
            client.send(post("/echo", "x", "X-Long: " + "y" * 8000))
            await client.reply()
            heads = scene.door.known_heads
            assert 0 < len(heads) <= 1024
            assert max(map(len, heads)) <= 2048

    run_on(loop, scenario)


# Pipelining


def test_pipelined_requests_are_answered_in_order(loop: str) -> None:
    async def scenario() -> None:
        async with door_open() as scene:
            client = await scene.client()
            client.send("".join(post(f"/echo/{number}", f"{number}") for number in range(200)))
            for number in range(200):
                assert (await client.reply()).json["body"] == f"{number}"

    run_on(loop, scenario)


def test_a_pipelined_request_waits_until_the_one_before_is_answered(loop: str) -> None:
    async def scenario() -> None:
        async with door_open() as scene:
            client = await scene.client()
            client.send(get("/later") + get("/echo/1") + get("/later") + get("/echo/2"))
            await until(lambda: len(scene.service.waiting) == 1)
            await scene.round_trip()
            assert scene.service.paths.count(b"/echo/1") == 0
            scene.service.answer_one()
            await until(lambda: len(scene.service.waiting) == 1)
            scene.service.answer_one()
            bodies = [(await client.reply()).body for _ in range(4)]
            assert [b"late" in body for body in bodies] == [True, False, True, False]

    run_on(loop, scenario)


def test_reading_stops_while_too_many_pipelined_requests_wait(loop: str) -> None:
    async def scenario() -> None:
        async with door_open(pipelined_max=4) as scene:
            client = await scene.client()
            client.send(get("/later"))
            await until(lambda: len(scene.service.waiting) == 1)
            for number in range(6):
                client.send(get(f"/echo/{number}"))
                await scene.round_trip()
            [connection] = [one for one in scene.door.connections if one._busy]
            assert len(connection._pipelined) == 4
            scene.service.answer_one()
            await client.reply()
            found = [(await client.reply()).json["path"] for _ in range(6)]
            assert found == [f"/echo/{number}" for number in range(6)]

    run_on(loop, scenario)


def test_reading_stops_while_pipelined_bodies_weigh_too_much(loop: str) -> None:
    async def scenario() -> None:
        async with door_open(body_bytes_max=1000) as scene:
            client = await scene.client()
            client.send(get("/later"))
            await until(lambda: len(scene.service.waiting) == 1)
            for _ in range(8):
                client.send(post("/echo", "x" * 400))
                await scene.round_trip()
            [connection] = [one for one in scene.door.connections if one._busy]
            assert connection._waiting_bytes == 1200
            scene.service.answer_one()
            for _ in range(9):
                assert (await client.reply()).status == 200
            assert connection._waiting_bytes == 0

    run_on(loop, scenario)


# Who closes when


def test_connection_close_is_honoured_and_said(loop: str) -> None:
    async def scenario() -> None:
        async with door_open() as scene:
            client = await scene.client()
            client.send(get("/echo", "Connection: close"))
            assert (await client.reply()).headers["connection"] == "close"
            assert await client.rest() == b""

    run_on(loop, scenario)


def test_http_1_0_closes_unless_it_asks_to_stay(loop: str) -> None:
    async def scenario() -> None:
        async with door_open() as scene:
            client = await scene.client()
            client.send(get("/echo", "Connection: keep-alive", version="1.0"))
            assert (await client.reply()).headers["connection"] == "keep-alive"
            client.send(get("/echo", version="1.0"))
            assert (await client.reply()).headers["connection"] == "close"
            assert await client.rest() == b""

    run_on(loop, scenario)


def test_a_half_closed_client_gets_all_its_answers(loop: str) -> None:
    async def scenario() -> None:
        async with door_open() as scene:
            client = await scene.client()
            client.send(get("/later") + get("/echo") + get("/later"))
            client.half_close()
            await until(lambda: len(scene.service.waiting) == 1)
            await scene.round_trip()
            scene.service.answer_one()
            assert (await client.reply()).status == 100  # whether it is there at all
            replies = [await client.reply(), await client.reply()]
            await until(lambda: len(scene.service.waiting) == 1)
            scene.service.answer_one()
            replies.append(await client.reply())
            assert ["connection" in reply.headers for reply in replies] == [False, False, True]
            assert await client.rest() == b""

    run_on(loop, scenario)


def test_a_client_that_closes_without_a_request_is_forgotten(loop: str) -> None:
    async def scenario() -> None:
        async with door_open() as scene:
            client = await scene.client()
            await until(lambda: len(scene.door.connections) == 1)
            await client.close()
            await until(lambda: not scene.door.connections)

    run_on(loop, scenario)


def test_a_client_that_vanishes_in_flight_costs_nothing(loop: str) -> None:
    async def scenario() -> None:
        async with door_open() as scene:
            client = await scene.client()
            client.send(get("/later") + get("/echo/never"))
            await until(lambda: len(scene.service.waiting) == 1)
            await client.reset()
            await until(lambda: not scene.door.connections)
            scene.service.answer_one()
            await scene.round_trip()
            assert b"/echo/never" not in scene.service.paths

    run_on(loop, scenario)


def test_an_upgrade_is_declined_by_a_plain_answer(loop: str) -> None:
    """As ``curl --http2`` asks for."""

    async def scenario() -> None:
        async with door_open() as scene:
            client = await scene.client()
            lines = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AA")
            client.send(get("/echo", *lines) + "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            assert (await client.reply()).json["path"] == "/echo"
            assert await client.rest() == b""
            assert scene.service.refused == []

    run_on(loop, scenario)


def test_an_upgrade_whose_answer_comes_later_is_answered_too(loop: str) -> None:
    async def scenario() -> None:
        async with door_open() as scene:
            client = await scene.client()
            client.send(get("/later", "Connection: Upgrade", "Upgrade: websocket"))
            await until(lambda: len(scene.service.waiting) == 1)
            scene.service.answer_one()
            assert (await client.reply()).headers["connection"] == "close"
            assert await client.rest() == b""

    run_on(loop, scenario)


# Expect


def test_expect_is_answered_before_the_body_comes(loop: str) -> None:
    async def scenario() -> None:
        async with door_open() as scene:
            client = await scene.client()
            head, _, body = post("/echo", "body", "Expect: 100-continue").partition("body")
            client.send(head)
            assert (await client.reply()).status == 100
            client.send("body" + body)
            reply = await client.reply()
            assert (reply.status, reply.json["body"]) == (200, "body")

    run_on(loop, scenario)


def test_expect_behind_another_request_is_answered_in_its_turn(loop: str) -> None:
    async def scenario() -> None:
        async with door_open() as scene:
            client = await scene.client()
            client.send(get("/later"))
            await until(lambda: len(scene.service.waiting) == 1)
            client.send(post("/echo", "body", "Expect: 100-continue").removesuffix("body"))
            await scene.round_trip()
            scene.service.answer_one()
            assert [(await client.reply()).status for _ in range(2)] == [200, 100]
            client.send("body")
            assert (await client.reply()).json["body"] == "body"

    run_on(loop, scenario)


@pytest.mark.parametrize("value", ["100-Continue", "something-else"])
def test_a_body_that_comes_unasked_is_taken_whatever_was_expected(loop: str, value: str) -> None:
    async def scenario() -> None:
        async with door_open() as scene:
            client = await scene.client()
            client.send(post("/echo", "body", f"Expect: {value}"))
            reply = await client.reply()
            if reply.status == 100:
                reply = await client.reply()
            assert reply.json["body"] == "body"

    run_on(loop, scenario)


def test_a_body_that_is_announced_too_large_is_refused_instead_of_asked_for(loop: str) -> None:
    async def scenario() -> None:
        async with door_open(body_bytes_max=10) as scene:
            client = await scene.client()
            client.send(post("/echo", "x" * 11, "Expect: 100-continue").removesuffix("x" * 11))
            assert (await client.reply()).status == 413

    run_on(loop, scenario)


# Slow readers


def test_a_client_that_does_not_read_is_not_served_ahead(loop: str) -> None:
    async def scenario() -> None:
        async with door_open() as scene:
            client = await scene.client()
            client._writer.transport.pause_reading()  # type: ignore[attr-defined]
            client.send(get("/big") * 60)
            await until(lambda: any(one._paused for one in scene.door.connections))
            for _ in range(5):
                await scene.round_trip()
            assert 0 < scene.service.paths.count(b"/big") < 30
            client._writer.transport.resume_reading()  # type: ignore[attr-defined]
            for read in range(60):
                assert len((await client.reply()).body) == 1 << 20
                if read < 5:  # no further ahead than before, however often it was resumed
                    await scene.round_trip()
                    assert scene.service.paths.count(b"/big") < 40

    run_on(loop, scenario)


# Closing the door


def test_close_lets_requests_end_and_closes_the_idle_at_once(loop: str) -> None:
    async def scenario() -> None:
        async with door_open() as scene:
            busy, idle = await scene.client(), await scene.client()
            busy.send(get("/later") + get("/echo"))
            idle.send(get("/echo"))
            await idle.reply()
            await until(lambda: len(scene.service.waiting) == 1)
            closing = asyncio.create_task(scene.door.close(grace_s=10.0))
            assert await idle.rest() == b""
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", scene.port)
            scene.service.answer_one()
            assert "connection" not in (await busy.reply()).headers
            assert (await busy.reply()).headers["connection"] == "close"
            await closing
            assert not scene.door.connections

    run_on(loop, scenario)


def test_close_cuts_what_has_not_ended_after_the_grace(loop: str) -> None:
    async def scenario() -> None:
        async with door_open() as scene:
            client = await scene.client()
            client.send(get("/later"))
            await until(lambda: len(scene.service.waiting) == 1)
            await scene.door.close(grace_s=0.05)
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await client.reply()
            await until(lambda: not scene.door.connections)
            scene.service.answer_one()

    run_on(loop, scenario)


def test_a_port_that_is_taken_is_an_error(loop: str) -> None:
    async def scenario() -> None:
        async with door_open() as scene:
            with pytest.raises(OSError, match=r"[Aa]ddress already in use"):
                await scene.door.open("127.0.0.1", scene.port)

    run_on(loop, scenario)
