"""The device engine: frames in, rows batched, frames out; on a fake device in virtual time."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence

import numpy as np
import pytest

from shards.specs import Spec
from shards.wire import Item
from tests.shards.serving import (
    Array,
    Bench,
    FakeLink,
    VirtualLoop,
    call,
    map_unit,
    run_virtual,
)

WORDS = map_unit(
    "words",
    inputs={"x": Spec(("b", "t"), pad=9.0), "n": Spec(("b",), "int32")},
    outputs={"kept": Spec(("b", "t")), "sum": Spec(("b",))},
    length_buckets={"t": (4, 8)},
)


def plus_one(x: Array) -> Sequence[Array]:
    return (x + 1,)


def refuse_negative(x: Array) -> Sequence[Array]:
    """Fails the whole batch for one bad row, as a program does."""
    if (x < 0).any():
        raise ValueError("a negative row\nwith a second line")
    return (x + 1,)


def summed(x: Array, n: Array) -> Sequence[Array]:
    return x, x.sum(1) + n


def rows(*values: float) -> Array:
    """Rows of the plain unit, told apart by their value."""
    return np.repeat(np.array(values, np.float32)[:, None], 2, axis=1)


def answered(link: FakeLink) -> dict[int, list[float]]:
    """Request to the first column of its answer, for the plain unit."""
    return {request: outputs[0][:, 0].tolist() for request, outputs in link.answers.items()}


# --- rows in, rows out -------------------------------------------------------------------------


def test_rows_of_several_frames_and_links_share_a_batch_and_each_link_gets_its_own() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop, in_flight_max=1)
        bench.install(plus_one)
        first, one, two = FakeLink(), FakeLink(), FakeLink()
        bench.engine.on_call(first, call("unit", {1: 1}, rows(0)))
        bench.engine.on_call(one, call("unit", {1: 1, 2: 1}, rows(10, 20)))
        bench.engine.on_call(two, call("unit", {1: 2}, rows(30, 40)))
        await bench.finish()
        assert [held.bucket for held in bench.device.running] == [4]
        await bench.finish()
        assert answered(first) == {1: [1.0]}
        assert answered(one) == {1: [11.0], 2: [21.0]}
        assert answered(two) == {1: [31.0, 41.0]}
        bench.check_idle()

    run_virtual(scenario)


def test_neighbours_of_one_link_are_answered_in_one_frame() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop, in_flight_max=1)
        bench.install(plus_one)
        other, link = FakeLink(), FakeLink()
        bench.engine.on_call(other, call("unit", {1: 1}, rows(0)))
        bench.engine.on_call(link, call("unit", {1: 1, 2: 1}, rows(1, 2)))
        bench.engine.on_call(link, call("unit", {3: 1}, rows(3)))
        await bench.finish_all()
        ((header, _),) = link.replies
        assert header.items == [(1, 1), (2, 1), (3, 1)]

    run_virtual(scenario)


def test_two_units_never_share_a_batch() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        link = FakeLink()
        bench.install(plus_one)
        bench.install(lambda x: (x * 2,), map_unit("double"))
        bench.engine.on_call(link, call("unit", {1: 1}, rows(5)))
        bench.engine.on_call(link, call("double", {2: 1}, rows(5)))
        await bench.finish_all()
        assert answered(link) == {1: [6.0], 2: [10.0]}
        assert [header.unit for header, _ in link.replies] == ["unit", "double"]

    run_virtual(scenario)


def test_rows_that_come_while_the_device_is_busy_join_a_batch_that_does_not_exist_yet() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop, in_flight_max=1)
        bench.install(plus_one)
        link = FakeLink()
        for request in range(4):
            bench.engine.on_call(link, call("unit", {request: 1}, rows(request)))
        assert bench.device.launched == 1
        await bench.finish()
        assert bench.device.launched == 2
        (held,) = bench.device.running
        assert held.views[0][:3, 0].tolist() == [1.0, 2.0, 3.0]

    run_virtual(scenario)


def test_padding_rows_of_a_batch_are_answered_to_nobody() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        bench.install(plus_one, map_unit(batch_buckets=(8,)))
        link = FakeLink()
        bench.engine.on_call(link, call("unit", {1: 3}, rows(1, 2, 3)))
        (held,) = bench.device.running
        assert held.views[0][:, 0].tolist() == [1, 2, 3, 1, 1, 1, 1, 1]
        await bench.finish_all()
        assert answered(link) == {1: [2.0, 3.0, 4.0]}

    run_virtual(scenario)


@pytest.mark.parametrize("order", [(0, 0, 0), (1, 0, 0), (1, 1, 0)])
def test_a_ticket_larger_than_the_largest_bucket_is_split_and_put_together_in_order(
    order: tuple[int, ...],
) -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop, in_flight_max=3)
        bench.install(plus_one)
        link = FakeLink()
        bench.engine.on_call(link, call("unit", {1: 10}, rows(*range(10))))
        assert [held.bucket for held in bench.device.running] == [4, 4, 4]
        for index in order:
            assert not link.sent
            await bench.finish(index)
        assert answered(link) == {1: [float(n + 1) for n in range(10)]}
        assert len(link.sent) == 1
        bench.check_idle()

    run_virtual(scenario)


def test_a_slot_is_not_laid_out_again_before_its_step_has_ended() -> None:
    # The device ends steps out of order, so a slot that is free too early comes round again while
    # the oldest step still reads it.
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop, in_flight_max=2)
        bench.install(plus_one, map_unit(batch_buckets=(1,)))
        link = FakeLink()
        for request in range(12):
            bench.engine.on_call(link, call("unit", {request: 1}, rows(request)))
        (oldest, _) = bench.device.running
        for _ in range(10):
            await bench.finish(1)
            slots = [held.step.descriptor.slot for held in bench.device.running]
            assert len(set(slots)) == len(slots)
            assert oldest.views[0][0, 0] == 0.0
        await bench.finish_all()
        assert answered(link) == {request: [request + 1.0] for request in range(12)}
        bench.check_idle()

    run_virtual(scenario)


def test_an_answer_is_not_changed_by_what_is_computed_after_it() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        bench.install(plus_one)
        link = FakeLink()
        bench.engine.on_call(link, call("unit", {0: 10}, rows(*range(10))))
        await bench.finish_all()
        for request in range(1, 10):
            bench.engine.on_call(link, call("unit", {request: 4}, rows(90, 91, 92, 93)))
            await bench.finish_all()
        assert answered(link)[0] == [float(n + 1) for n in range(10)]

    run_virtual(scenario)


# --- lengths -----------------------------------------------------------------------------------


def test_lengths_are_padded_with_the_units_value_and_cut_back() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        bench.install(summed, WORDS)
        link = FakeLink()
        x = np.arange(10, dtype=np.float32).reshape(2, 5)
        bench.engine.on_call(link, call("words", {1: 2}, x, np.array([100, 200], np.int32)))
        (held,) = bench.device.running
        assert held.step.descriptor.lengths == (8,)
        assert held.views[0][:2, 5:].tolist() == [[9.0] * 3] * 2
        await bench.finish_all()
        kept, total = link.answers[1]
        np.testing.assert_array_equal(kept, x)
        np.testing.assert_array_equal(total, x.sum(1) + 27 + [100, 200])

    run_virtual(scenario)


def test_requests_of_different_lengths_in_one_bucket_share_a_batch_and_are_cut_apart() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop, in_flight_max=1)
        bench.install(summed, WORDS)
        link = FakeLink()
        zero = np.zeros(1, np.int32)
        bench.engine.on_call(link, call("words", {0: 1}, np.zeros((1, 8), np.float32), zero))
        for request, length in ((1, 5), (2, 7), (3, 7)):
            x = np.full((1, length), request, np.float32)
            bench.engine.on_call(link, call("words", {request: 1}, x, zero))
        await bench.finish()
        assert [held.bucket for held in bench.device.running] == [4]
        await bench.finish()
        for request, length in ((1, 5), (2, 7), (3, 7)):
            assert link.answers[request][0].tolist() == [[float(request)] * length]
        assert [header.items for header, _ in link.replies[1:]] == [[(1, 1)], [(2, 1), (3, 1)]]

    run_virtual(scenario)


def test_a_split_ticket_is_cut_back_too() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        bench.install(summed, WORDS)
        link = FakeLink()
        x = np.arange(18, dtype=np.float32).reshape(6, 3)
        bench.engine.on_call(link, call("words", {1: 6}, x, np.zeros(6, np.int32)))
        await bench.finish_all()
        np.testing.assert_array_equal(link.answers[1][0], x)

    run_virtual(scenario)


def test_lengths_of_another_bucket_wait_in_another_lane() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        bench.install(summed, WORDS)
        link = FakeLink()
        for request, length in ((1, 4), (2, 5)):
            x = np.zeros((1, length), np.float32)
            bench.engine.on_call(link, call("words", {request: 1}, x, np.zeros(1, np.int32)))
        assert [held.step.descriptor.lengths for held in bench.device.running] == [(4,), (8,)]
        await bench.finish_all()

    run_virtual(scenario)


# --- refusals ----------------------------------------------------------------------------------


def test_a_unit_that_is_not_hosted_is_a_stale_epoch_for_every_item() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        link = FakeLink()
        bench.engine.on_call(link, call("gone", {1: 1, 2: 1}, rows(1, 2)))
        assert link.codes == {1: "STALE_EPOCH", 2: "STALE_EPOCH"}

    run_virtual(scenario)


Float, Int = np.float32, np.int32


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ([np.zeros((1, 4), Float)], "1 tensors, the unit takes 2"),
        ([np.zeros((1, 4), np.float64), np.zeros(1, Int)], "float64"),
        ([np.zeros((1, 4, 1), Float), np.zeros(1, Int)], r"\[1, 4, 1\]"),
        ([np.zeros((), Float), np.zeros(1, Int)], r"float32\[\]"),
        ([np.zeros((1, 9), Float), np.zeros(1, Int)], "9"),
        ([np.zeros((2, 4), Float), np.zeros(2, Int)], "2 rows, the items have 1"),
        ([np.zeros((1, 4), Float), np.zeros(2, Int)], "2 rows, the items have 1"),
        ([np.zeros((0, 4), Float), np.zeros(0, Int)], "0 rows, the items have 1"),
    ],
    ids=[
        "too few", "dtype", "rank", "scalar", "length over the limit", "rows", "uneven rows", "none"
    ],
)  # fmt: skip
def test_tensors_that_the_unit_cannot_take_are_the_callers_mistake(
    arrays: list[Array], said: str
) -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        bench.install(summed, WORDS)
        link = FakeLink()
        bench.engine.on_call(link, call("words", {1: 1}, *arrays))
        assert link.codes == {1: "INVALID_ARGUMENT"}
        assert re.search(said, link.errors[1].message)
        assert not bench.device.launched
        bench.check_idle()

    run_virtual(scenario)


def test_a_single_row_beside_several_is_refused_and_not_repeated() -> None:
    # NumPy would broadcast it: an answer, and a wrong one.
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        bench.install(summed, WORDS)
        link = FakeLink()
        frame = call("words", {1: 2}, np.zeros((2, 4), np.float32), np.ones(1, np.int32))
        bench.engine.on_call(link, frame)
        assert link.codes == {1: "INVALID_ARGUMENT"}

    run_virtual(scenario)


def test_an_item_without_rows_is_refused_and_its_neighbours_are_answered() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        bench.install(plus_one)
        link = FakeLink()
        bench.engine.on_call(link, call("unit", {1: 1, 2: 0, 3: 1}, rows(1, 3)))
        await bench.finish_all()
        assert link.codes == {2: "INVALID_ARGUMENT"}
        assert answered(link) == {1: [2.0], 3: [4.0]}

    run_virtual(scenario)


def test_a_full_lane_refuses_with_a_hint_and_takes_what_still_fits() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop, in_flight_max=1)
        bench.install(plus_one, rows_max=4)
        link = FakeLink()
        bench.engine.on_call(link, call("unit", {0: 1}, rows(0)))
        bench.engine.on_call(link, call("unit", {1: 3, 2: 2, 3: 1}, rows(*range(6))))
        assert link.codes == {2: "RESOURCE_EXHAUSTED"}
        assert link.errors[2].retry_after_ms > 0
        await bench.finish_all()
        assert link.answers.keys() == {0, 1, 3}

    run_virtual(scenario)


def test_bytes_are_bounded_like_rows() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop, in_flight_max=1)
        bench.install(plus_one, bytes_max=16)  # two rows of two floats
        link = FakeLink()
        for request in range(4):
            bench.engine.on_call(link, call("unit", {request: 1}, rows(request)))
        assert link.codes == {3: "RESOURCE_EXHAUSTED"}
        await bench.finish_all()

    run_virtual(scenario)


def test_more_refusals_than_a_header_holds_are_sent_in_several_frames() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        link = FakeLink()
        requests = dict.fromkeys(range(20_000), 0)
        bench.engine.on_call(link, call("a unit that is not hosted", requests, rows()))
        assert link.errors.keys() == requests.keys()

    run_virtual(scenario)


# --- ends other than an answer -----------------------------------------------------------------


def test_a_deadline_that_came_before_the_rows_is_refused_at_once() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        bench.install(plus_one)
        link = FakeLink()
        for request, remaining_us in ((1, 0), (2, -5)):
            frame = call("unit", {request: 1}, rows(1), remaining_us=remaining_us)
            bench.engine.on_call(link, frame)
        assert link.codes == {1: "DEADLINE_EXCEEDED", 2: "DEADLINE_EXCEEDED"}
        assert not bench.device.launched

    run_virtual(scenario)


def test_waiting_rows_expire_one_by_one_each_at_its_instant() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop, in_flight_max=1)
        bench.install(plus_one)
        link = FakeLink()
        start = loop.now
        bench.engine.on_call(link, call("unit", {0: 1}, rows(0), remaining_us=1))
        items = [Item(1, 1, 3_000_000), Item(2, 1, 1_000_000), Item(3, 1, 9_000_000)]
        bench.engine.on_call(link, call("unit", {}, rows(1, 2, 3), items=items))
        expired: list[tuple[int, float]] = []
        while len(expired) < 2:
            before = set(link.codes)
            await asyncio.sleep(0.25)
            expired += [(request, loop.now - start) for request in link.codes.keys() - before]
        assert [request for request, _ in expired] == [2, 1]
        assert [at for _, at in expired] == pytest.approx([1.0, 3.0], abs=0.26)
        assert set(link.codes.values()) == {"DEADLINE_EXCEEDED"}
        # What the device has already begun is not taken back, and the last one still counts.
        await bench.finish_all()
        assert answered(link) == {0: [1.0], 3: [4.0]}
        bench.check_idle()

    run_virtual(scenario)


def test_a_cancelled_request_is_neither_run_nor_answered() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop, in_flight_max=1)
        bench.install(plus_one)
        link = FakeLink()
        for request in range(4):
            bench.engine.on_call(link, call("unit", {request: 1}, rows(request)))
        bench.engine.on_cancel(link, [0, 2, 77])  # one runs, one waits, one is unknown
        await bench.finish()
        (held,) = bench.device.running
        assert held.views[0][:2, 0].tolist() == [1.0, 3.0]
        await bench.finish_all()
        assert answered(link) == {1: [2.0], 3: [4.0]}
        assert not link.errors
        bench.check_idle()

    run_virtual(scenario)


def test_a_cancel_reaches_only_the_link_that_sent_it() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        bench.install(plus_one)
        one, two = FakeLink(), FakeLink()
        bench.engine.on_call(one, call("unit", {1: 1}, rows(1)))
        bench.engine.on_call(two, call("unit", {1: 1}, rows(2)))
        bench.engine.on_cancel(one, [1])
        await bench.finish_all()
        assert not one.sent
        assert answered(two) == {1: [3.0]}

    run_virtual(scenario)


def test_a_peer_that_is_gone_costs_the_device_nothing_more() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop, in_flight_max=1)
        bench.install(plus_one)
        gone, here = FakeLink(), FakeLink()
        bench.engine.on_call(gone, call("unit", {0: 1}, rows(0)))
        bench.engine.on_call(gone, call("unit", dict.fromkeys(range(1, 9), 1), rows(*range(8))))
        bench.engine.on_call(here, call("unit", {1: 1}, rows(5)))
        gone.close()
        bench.engine.on_link_closed(gone)
        await bench.finish_all()
        assert bench.device.launched == 2
        assert not gone.sent
        assert answered(here) == {1: [6.0]}
        bench.check_idle()

    run_virtual(scenario)
