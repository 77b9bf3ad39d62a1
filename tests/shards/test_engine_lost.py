"""Devices that are lost or stuck: the process ends, and nothing is tried on them again."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest

from batching.testing import FakeClock
from shards.errors import DeviceLost
from shards.watchdog import Watchdog
from shards.worker import WorkerEngine
from tests.shards.serving import (
    Array,
    Bench,
    FakeLink,
    VirtualLoop,
    call,
    run_virtual,
    until,
)
from tests.shards.workers import Held, ints, run


def plus_one(x: Array) -> Sequence[Array]:
    return (x + 1,)


def lost(x: Array) -> Sequence[Array]:
    raise DeviceLost("the device is lost: it fell off the bus")


def rows(count: int) -> Array:
    return np.ones((count, 2), np.float32)


def test_a_lost_device_ends_the_process_and_no_row_is_tried_on_it_again() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop, in_flight_max=1)
        bench.install(lost)
        link = FakeLink()
        bench.engine.on_call(link, call("unit", {0: 1}, rows(1)))
        bench.engine.on_call(link, call("unit", {1: 1, 2: 1, 3: 1}, rows(3)))
        await bench.finish()
        await bench.finish()
        assert bench.lost == ["the device is lost: it fell off the bus"] * 2
        assert set(link.codes.values()) == {"UNAVAILABLE"}
        assert len(link.codes) == 4
        assert bench.device.launched == 2, "a batch was bisected on a device that is gone"
        bench.check_idle()

    run_virtual(scenario)


def test_a_failing_row_is_no_lost_device() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        def broken(x: Array) -> Sequence[Array]:
            raise ValueError("a bad row")

        bench = Bench(loop)
        bench.install(broken)
        link = FakeLink()
        bench.engine.on_call(link, call("unit", {1: 1}, rows(1)))
        await bench.finish_all()
        assert link.codes == {1: "INTERNAL"}
        assert bench.lost == []

    run_virtual(scenario)


@pytest.mark.parametrize(("cost_s", "bound_s"), [(0.001, 60.0), (3.0, 120.0)])
def test_a_step_that_does_not_come_back_ends_the_process(cost_s: float, bound_s: float) -> None:
    """Sixty seconds, and twenty times what its bucket took when it was warmed."""

    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        bench.install(plus_one, cost_s=cost_s)
        began = loop.time()
        bench.engine.on_call(FakeLink(), call("unit", {1: 1}, rows(1)))
        while not bench.lost:
            assert loop.time() < began + 1000.0
            await asyncio.sleep(1.0)
        assert bound_s <= loop.time() - began <= bound_s + 16.0
        assert "has not ended for" in bench.lost[0]
        await bench.finish()
        await asyncio.sleep(100.0)
        assert len(bench.lost) < 3, "nothing is on the device, and yet it is called stuck"

    run_virtual(scenario)


def test_a_drain_on_a_stuck_device_is_bounded_by_the_end_of_the_process() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        bench.install(plus_one)
        bench.engine.on_call(FakeLink(), call("unit", {1: 1}, rows(1)))
        draining = asyncio.ensure_future(bench.engine.lanes.remove("unit"))
        await asyncio.sleep(99.0)
        assert bench.lost
        assert not draining.done()
        await bench.finish()
        await draining

    run_virtual(scenario)


def test_steps_that_come_back_leave_no_timer() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        bench.install(plus_one)
        for request in range(5):
            bench.engine.on_call(FakeLink(), call("unit", {request: 1}, rows(1)))
            await bench.finish_all()
            await asyncio.sleep(30.0)
        assert bench.engine._watchdog._timer is None
        assert bench.lost == []

    run_virtual(scenario)


def test_a_host_function_that_does_not_return_is_stuck_and_a_slow_one_is_not() -> None:
    clock = FakeClock()

    async def scenario(engine: WorkerEngine) -> None:
        held, link = Held(), FakeLink()
        engine.install("unit", held)
        assert engine._stuck_call() is None
        engine.on_call(link, call("unit", {1: 1}, ints(1), remaining_us=10_000_000))
        await held.has_begun()
        clock.advance(70.0)
        assert engine._stuck_call() == ""
        clock.advance(0.1)
        assert engine._stuck_call() == "a call of unit unit is 60 s past its deadline"
        held.go.release()
        await until(lambda: bool(link.ended))
        assert engine._stuck_call() is None

    run(scenario, clock=clock)


def test_a_watchdog_tells_at_every_look_and_ends_with_its_work() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        answers = ["", "stuck", "stuck", None]
        told: list[tuple[float, str]] = []
        began = loop.time()
        watchdog = Watchdog(
            loop, 5.0, lambda: answers.pop(0), lambda what: told.append((loop.time() - began, what))
        )
        watchdog.start()
        watchdog.start()
        await asyncio.sleep(21.0)
        assert told == [(10.0, "stuck"), (15.0, "stuck")]
        assert answers == []
        answers.append(None)
        watchdog.start()
        await asyncio.sleep(6.0)
        assert answers == []

    run_virtual(scenario)
