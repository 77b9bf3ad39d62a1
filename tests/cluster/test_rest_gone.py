"""Clients that go away: what they asked for and will never read is not computed."""

from __future__ import annotations

import asyncio

import pytest

from tests.cluster.rest_clients import LOOPS, door_open, get, run_on, until


@pytest.fixture(params=LOOPS)
def loop(request: pytest.FixtureRequest) -> str:
    """The name of a loop."""
    return str(request.param)


def test_a_client_that_vanishes_in_flight_cancels_its_request(loop: str) -> None:
    async def scenario() -> None:
        async with door_open() as scene:
            client = await scene.client()
            client.send(get("/later"))
            await until(lambda: len(scene.service.waiting) == 1)
            await client.reset()
            await until(lambda: not scene.door.connections)
            assert scene.service.cancelled == [b"/later"]

    run_on(loop, scenario)


def test_a_client_that_goes_after_its_answer_cancels_nothing(loop: str) -> None:
    async def scenario() -> None:
        async with door_open() as scene:
            client = await scene.client()
            client.send(get("/later") + get("/echo"))
            await until(lambda: len(scene.service.waiting) == 1)
            scene.service.answer_one()
            assert [(await client.reply()).status for _ in range(2)] == [200, 200]
            await client.reset()
            await until(lambda: not scene.door.connections)
            assert scene.service.cancelled == []

    run_on(loop, scenario)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_client_that_only_closed_its_half_gets_its_answer(loop: str, version: str) -> None:
    async def scenario() -> None:
        async with door_open() as scene:
            client = await scene.client()
            client.send(get("/later", version=version))
            client.half_close()
            await until(lambda: len(scene.service.waiting) == 1)
            await asyncio.sleep(0.3)  # longer than the door waits for a client to be gone
            scene.service.answer_one()
            replies = [await client.reply()]
            if version == "1.1":  # a word that means nothing came first
                replies.append(await client.reply())
            assert [reply.status for reply in replies] == (
                [100, 200] if version == "1.1" else [200]
            )
            assert scene.service.cancelled == []

    run_on(loop, scenario)


def test_a_client_that_closed_cancels_its_request_before_it_is_answered(loop: str) -> None:
    """As the kernel closes for a process that was killed: nothing is reset by itself."""

    async def scenario() -> None:
        async with door_open() as scene:
            client = await scene.client()
            client.send(get("/later"))
            await until(lambda: len(scene.service.waiting) == 1)
            await client.close()
            await until(lambda: scene.service.cancelled == [b"/later"])
            assert not scene.door.connections

    run_on(loop, scenario)
