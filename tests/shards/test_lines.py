"""Who waits for whom where a table waits for a disk."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator

from shards.lines import waits_for_disk
from shards.manifest import TableUnit
from shards.tables import HostedTable
from shards.worker import WorkerEngine
from tests.shards.serving import FakeLink, call, together, until
from tests.shards.workers import Held, answered, ask, double, ints, run

TABLE = HostedTable(TableUnit(id="t", dtype="int64", dim=1, rows=0, partitions=()), {})


@contextlib.asynccontextmanager
async def blocked(
    engine: WorkerEngine, table: HostedTable | None = TABLE
) -> AsyncIterator[tuple[Held, FakeLink]]:
    """A unit `slow` in the midst of request 1 for it, and another, `quick`; it ends after that."""
    slow, link = Held(), FakeLink()
    engine.install("slow", slow, table=table)
    engine.install("quick", double, table=table)
    engine.on_call(link, call("slow", {1: 1}, ints(1)))
    await slow.has_begun()
    yield slow, link
    slow.go.release()


def test_a_table_that_waits_for_a_disk_holds_up_no_other() -> None:
    """Neither what came after it nor what came in its frame, before it or behind."""

    async def scenario(engine: WorkerEngine) -> None:
        cold, link = Held(), FakeLink()
        engine.install("cold", cold, table=TABLE)
        engine.install("warm", double, table=TABLE)
        before = call("warm", {1: 1}, ints(1), op="rows")
        behind = call("warm", {3: 1}, ints(3), op="rows")
        engine.on_call(link, together(before, call("cold", {2: 1}, ints(2), op="rows"), behind))
        await cold.has_begun()
        engine.on_call(link, call("warm", {4: 1}, ints(4)))
        await until(lambda: link.ended == {1, 3, 4})
        # What it is asked for meanwhile waits for it alone.
        engine.on_call(link, call("cold", {5: 1}, ints(5)))
        await ask(engine, link, call("warm", {6: 1}, ints(6)), ends=4)
        cold.go.release(2)
        await until(lambda: link.ended == {1, 2, 3, 4, 5, 6})
        assert answered(link) == {number: [2 * number] for number in range(1, 7)}

    run(scenario, waits=lambda thread: True)


def test_behind_it_in_one_frame_nobody_waits_either() -> None:
    async def scenario(engine: WorkerEngine) -> None:
        cold, link = Held(), FakeLink()
        engine.install("cold", cold, table=TABLE)
        engine.install("warm", double, table=TABLE)
        behind = call("warm", {2: 1}, ints(2), op="rows")
        engine.on_call(link, together(call("cold", {1: 1}, ints(1), op="rows"), behind))
        await until(lambda: link.ended == {2})
        cold.go.release()
        await until(lambda: link.ended == {1, 2})

    run(scenario, waits=lambda thread: True)


def test_several_tables_may_wait_at_once() -> None:
    async def scenario(engine: WorkerEngine) -> None:
        colds, link = [Held() for _ in range(3)], FakeLink()
        engine.install("warm", double, table=TABLE)
        for number, cold in enumerate(colds):
            engine.install(f"cold-{number}", cold, table=TABLE)
            engine.on_call(link, call(f"cold-{number}", {number: 1}, ints(number)))
        engine.on_call(link, call("warm", {9: 1}, ints(9)))
        await until(lambda: link.ended == {9})
        for cold in colds:
            cold.go.release()
        await until(lambda: link.ended == {0, 1, 2, 9})

    run(scenario, waits=lambda thread: True)


def test_behind_what_only_takes_long_others_wait() -> None:
    looks: list[threading.Thread] = []

    async def scenario(engine: WorkerEngine) -> None:
        async with blocked(engine) as (_, link):
            engine.on_call(link, call("quick", {2: 1}, ints(2)))
            await until(lambda: len(looks) > 1)
            assert link.ended == set()
        await until(lambda: link.ended == {1, 2})

    def waits(thread: threading.Thread) -> bool:
        looks.append(thread)
        return False

    run(scenario, waits=waits)


def test_a_host_function_keeps_its_thread_whatever_it_waits_for() -> None:
    """It may not be made for two threads."""
    looks: list[threading.Thread] = []

    async def scenario(engine: WorkerEngine) -> None:
        async with blocked(engine, table=None) as (_, link):
            engine.on_call(link, call("quick", {2: 1}, ints(2)))
            await asyncio.sleep(0.02)  # ten times what a table is given
            assert (link.ended, looks) == (set(), [])
        await until(lambda: link.ended == {1, 2})

    def waits(thread: threading.Thread) -> bool:
        looks.append(thread)
        return True

    run(scenario, waits=waits)


def test_a_table_that_waits_no_longer_comes_back_to_the_line_of_all() -> None:
    later = [0.0]

    async def scenario(engine: WorkerEngine) -> None:
        async with blocked(engine) as (slow, link):
            await ask(engine, link, call("quick", {2: 1}, ints(2)), ends=1)
            (kept,) = [line for line in engine._lines if line.thread.name == "worker slow"]
        await until(lambda: link.ended == {1, 2} and kept.is_idle)
        later[0] = 5.0
        slow.go.release()
        await ask(engine, link, call("slow", {3: 1}, ints(3)), ends=3)
        assert kept not in list(engine._lines)
        await until(lambda: not kept.thread.is_alive())

    run(scenario, waits=lambda thread: True, clock=lambda: time.monotonic() + later[0])


def test_a_table_that_is_removed_while_it_waits_leaves_no_thread() -> None:
    async def scenario(engine: WorkerEngine) -> None:
        async with blocked(engine) as (_, link):
            await ask(engine, link, call("quick", {2: 1}, ints(2)), ends=1)
            (kept,) = [line for line in engine._lines if line.thread.name == "worker slow"]
        await engine.remove("slow")
        await until(lambda: not kept.thread.is_alive())

    run(scenario, waits=lambda thread: True)


def test_a_thread_that_waits_for_another_waits_for_no_disk() -> None:
    go = threading.Event()
    thread = threading.Thread(target=go.wait, daemon=True)
    thread.start()
    assert not waits_for_disk(thread)
    go.set()
    thread.join()
    assert not waits_for_disk(thread)
