"""Frames that find the device idle are run and answered at once, as they would be otherwise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from batching import EffSafe
from tests.shards.serving import (
    Array,
    Bench,
    FakeLink,
    VirtualLoop,
    call,
    map_unit,
    run_virtual,
    until,
)


def rows(*values: float) -> Array:
    return np.repeat(np.array(values, np.float32)[:, None], 2, axis=1)


def plus_one(x: Array) -> Sequence[Array]:
    if (x < 0).any():
        raise ValueError("a negative row")
    return (x + 1,)


async def known(loop: VirtualLoop, *owners: str) -> Bench:
    """An engine that has served these owners, and counts its steps from then on."""
    bench = Bench(loop, run_now_s=0.1, policy=EffSafe())
    bench.install(plus_one, map_unit(batch_buckets=(1, 2, 4, 8)), cost_s=0.0)
    link = FakeLink()
    for number, owner in enumerate(owners or ("",)):
        bench.engine.on_call(link, call("unit", {number: 1}, rows(0), owner=owner))
    await until(lambda: len(link.ended) == max(len(owners), 1))
    bench.device.ran_now.clear()
    return bench


def tally_of(bench: Bench, owner: str = "") -> tuple[int, int, int]:
    [lane] = bench.batcher.stats().lanes.values()
    tally = lane.owners[owner].tally
    return tally.offered, tally.finished, tally.failed


def test_a_frame_is_one_step_for_which_nothing_waited() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench, link = await known(loop), FakeLink()
        number = bench.batcher._ticket_number
        bench.engine.on_call(link, call("unit", {1: 1, 2: 2, 3: 1}, rows(1, 2, 3, 4)))
        await bench.settle()
        assert len(bench.device.ran_now) == 1
        assert bench.batcher._ticket_number == number
        assert link.answers[2][0][:, 0].tolist() == [3.0, 4.0]
        bench.check_idle()

    run_virtual(scenario)


def test_each_request_of_a_frame_is_counted() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench, link = await known(loop), FakeLink()
        bench.engine.on_call(link, call("unit", {1: 1, 2: 2, 3: 1}, rows(1, 2, 3, 4)))
        await bench.settle()
        assert tally_of(bench) == (4, 4, 0)

    run_virtual(scenario)


def test_frames_of_several_routers_are_one_step_and_answered_to_each() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench, one, two = await known(loop), FakeLink("one"), FakeLink("two")
        bench.engine.on_call(one, call("unit", {1: 1, 2: 1}, rows(1, 2)))
        bench.engine.on_call(two, call("unit", {1: 1}, rows(5)))
        bench.engine.on_call(two, call("unit", {2: 1}, rows(6)))
        await bench.settle()
        assert len(bench.device.ran_now) == 1
        assert [one.answers[n][0][0, 0] for n in (1, 2)] == [2.0, 3.0]
        assert [two.answers[n][0][0, 0] for n in (1, 2)] == [6.0, 7.0]
        assert len(two.sent) == 1  # neighbours share a frame

    run_virtual(scenario)


def test_a_poison_row_fails_alone() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench, link = await known(loop), FakeLink()
        bench.engine.on_call(link, call("unit", {1: 1, 2: 1, 3: 1}, rows(1, -1, 3)))
        await until(lambda: len(link.ended) == 3)
        assert link.codes == {2: "INTERNAL"}
        assert tally_of(bench) == (4, 3, 1)
        bench.check_idle()

    run_virtual(scenario)


def test_rows_of_several_servables_still_share_a_step() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench, link = await known(loop, "a", "b"), FakeLink()
        bench.engine.on_call(link, call("unit", {1: 1}, rows(1), owner="a"))
        bench.engine.on_call(link, call("unit", {2: 1}, rows(2), owner="b"))
        await until(lambda: len(link.ended) == 2)
        assert len(bench.device.ran_now) == 1
        assert [tally_of(bench, owner) for owner in "ab"] == [(2, 2, 0)] * 2

    run_virtual(scenario)


def test_what_is_cancelled_before_it_runs_is_not_answered() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench, link = await known(loop), FakeLink()
        bench.engine.on_call(link, call("unit", {1: 1, 2: 1}, rows(1, 2)))
        bench.engine.on_cancel(link, [1])
        await bench.settle()
        assert link.ended == {2}
        bench.check_idle()

    run_virtual(scenario)


def test_a_router_that_is_gone_is_not_answered() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench, link = await known(loop), FakeLink()
        bench.engine.on_call(link, call("unit", {1: 1}, rows(1)))
        bench.engine.on_link_closed(link)
        await bench.settle()
        assert not link.sent
        bench.check_idle()

    run_virtual(scenario)


def test_of_requests_that_come_together_one_may_be_late_already() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench, link = await known(loop), FakeLink()
        bench.engine.on_call(link, call("unit", {1: 1}, rows(1), remaining_us=0))
        bench.engine.on_call(link, call("unit", {2: 1}, rows(2)))
        await until(lambda: len(link.ended) == 2)
        assert link.codes == {1: "DEADLINE_EXCEEDED"}
        bench.check_idle()

    run_virtual(scenario)


def test_rows_beyond_the_largest_batch_are_all_answered() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench, link = await known(loop), FakeLink()
        bench.engine.on_call(link, call("unit", dict.fromkeys(range(1, 21), 1), rows(*range(20))))
        await until(lambda: len(link.ended) == 20)
        assert len(bench.device.ran_now) == 3
        bench.check_idle()

    run_virtual(scenario)
