"""One port for several routers: who may share it, and where connections go."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from cluster.doors.rest import RestDoor
from cluster.doors.service import Service
from cluster.doors.sharing import processes_on
from tests.cluster.rest_clients import LOOPS, FakeService, door_open, run_on, until


@pytest.mark.parametrize(
    ("declared", "processors", "found"),
    [(0, 2, 1), (0, 15, 1), (0, 16, 2), (0, 64, 8), (0, 256, 8), (1, 256, 1), (3, 2, 3)],
)
def test_routers_are_as_many_as_declared_or_one_for_eight_processors(
    declared: int, processors: int, found: int
) -> None:
    assert processes_on(declared, processors) == found


@pytest.mark.parametrize("loop", LOOPS)
def test_when_one_of_two_doors_on_a_port_closes_the_other_takes_its_connections(loop: str) -> None:
    async def scenario() -> None:
        doors = [RestDoor(cast(Service, FakeService())) for _ in range(2)]
        port = await doors[0].open("127.0.0.1", 0, shared=True)
        await doors[1].open("127.0.0.1", port, shared=True)

        async def connect() -> asyncio.StreamWriter:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            return writer

        clients = [await connect() for _ in range(64)]
        await until(lambda: sum(door.stats.accepted for door in doors) == 64)
        assert all(door.stats.accepted for door in doors)
        await doors[0].close(0.0)
        before = doors[1].stats.accepted
        clients += [await connect() for _ in range(8)]
        await until(lambda: doors[1].stats.accepted == before + 8)
        for client in clients:
            client.close()
        await doors[1].close(0.0)

    run_on(loop, scenario)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_port_that_is_not_shared_stays_one_doors(loop: str) -> None:
    async def scenario() -> None:
        async with door_open() as scene:
            other = RestDoor(cast(Service, FakeService()))
            with pytest.raises(OSError, match="in use"):
                await other.open("127.0.0.1", scene.port, shared=True)

    run_on(loop, scenario)
