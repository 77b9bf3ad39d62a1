"""The device engine: how critical rows are, by what their call says and their owner is allowed."""

from __future__ import annotations

import pytest

from batching.allowance import BEST_EFFORT, CRITICAL, DEFAULT, SHEDDABLE, Allowance
from tests.shards.serving import Bench, FakeLink, VirtualLoop, call, run_virtual
from tests.shards.test_engine import answered, plus_one, rows


@pytest.mark.parametrize(
    ("allowed", "asked", "expected"),
    [
        (None, CRITICAL, DEFAULT),
        (None, BEST_EFFORT, BEST_EFFORT),
        (DEFAULT, CRITICAL, DEFAULT),
        (CRITICAL, CRITICAL, CRITICAL),
        (CRITICAL, SHEDDABLE, SHEDDABLE),
        (SHEDDABLE, DEFAULT, SHEDDABLE),
    ],
)
def test_a_call_may_lower_what_its_owner_is_allowed_and_not_raise_it(
    allowed: int | None, asked: int, expected: int
) -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop, in_flight_max=1)
        bench.install(plus_one)
        if allowed is not None:
            bench.batcher.allow("m", Allowance(criticality=allowed))
        link = FakeLink()
        bench.engine.on_call(link, call("unit", {1: 1}, rows(0)))
        bench.engine.on_call(link, call("unit", {2: 1}, rows(1), owner="m", criticality=asked))
        assert bench.engine._tickets[link][2].priority == expected
        await bench.finish_all()
        assert answered(link) == {1: [1.0], 2: [2.0]}
        bench.check_idle()

    run_virtual(scenario)


def test_best_effort_rows_are_answered_from_the_padding_of_others() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop, in_flight_max=1)
        bench.install(plus_one)
        link = FakeLink()
        bench.engine.on_call(link, call("unit", {1: 1}, rows(0)))
        bench.engine.on_call(link, call("unit", {2: 2}, rows(10, 11), criticality=BEST_EFFORT))
        bench.engine.on_call(link, call("unit", {3: 3}, rows(20, 21, 22)))
        await bench.finish()
        assert [held.bucket for held in bench.device.running] == [4]
        await bench.finish()
        assert answered(link) == {1: [1.0], 3: [21.0, 22.0, 23.0]}
        await bench.finish_all()
        assert answered(link)[2] == [11.0, 12.0]
        bench.check_idle()

    run_virtual(scenario)


def test_who_makes_room_is_told_why_and_when_to_come_back() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop, in_flight_max=1)
        bench.install(plus_one, rows_max=2)
        link = FakeLink()
        bench.engine.on_call(link, call("unit", {1: 1}, rows(0)))
        bench.engine.on_call(link, call("unit", {2: 2}, rows(1, 2), criticality=BEST_EFFORT))
        bench.engine.on_call(link, call("unit", {3: 2}, rows(3, 4)))
        error = link.errors[2]
        assert error.code == "RESOURCE_EXHAUSTED"
        assert error.retry_after_ms == 1000  # what runs takes a second
        assert "more critical requests" in error.message
        await bench.finish_all()
        assert answered(link) == {1: [1.0], 3: [4.0, 5.0]}
        bench.check_idle()

    run_virtual(scenario)
