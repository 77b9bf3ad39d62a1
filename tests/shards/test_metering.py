"""What a device engine says of itself: on a fake device in virtual time, and asked over a link."""

from __future__ import annotations

import asyncio
import math

import msgspec
import numpy as np
import pytest

from batching import Batcher, Ladder, LaneKey, RoundRobin, Ticket
from batching.allowance import CRITICAL, SHEDDABLE
from batching.errors import Internal
from batching.telemetry import ERROR_BOUNDS, TIME_BOUNDS
from shards.figures import OTHER, DeviceStatistics, ServableStatistics
from shards.metering import BUCKETS_MAX, PAIRS_MAX, UNITS_MAX, Meter
from shards.questions import answered, question
from shards.specs import Spec
from shards.wire import Frame, FrameKind, Item, ItemError, ReplyHeader, encode_tensors
from tests.shards.serving import (
    GENERATION,
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
    inputs={"x": Spec(("b", "t"))},
    outputs={"y": Spec(("b", "t"))},
    batch_buckets=(1, 4),
    length_buckets={"t": (4, 8)},
)


def same(x: Array) -> tuple[Array]:
    return (x,)


def rows(count: int, length: int = 2) -> Array:
    return np.zeros((count, length), np.float32)


def owned(frame: Frame, owner: str) -> Frame:
    assert not isinstance(frame.header, bytes)
    header = msgspec.structs.replace(frame.header, owner=owner)
    return msgspec.structs.replace(frame, header=header)


def ask(bench: Bench) -> DeviceStatistics:
    """As a router does: a call goes in, a reply comes out."""
    link = FakeLink()
    bench.engine.on_call(link, Frame(FrameKind.CALL, 0, question(), memoryview(b"")))
    [(header, buffers)] = link.sent
    body = memoryview(b"".join(buffers))
    found = answered(Frame(FrameKind.REPLY, 0, header, body), DeviceStatistics)
    assert found is not None
    return found


def test_a_device_tells_what_became_of_every_servable_s_requests() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop, in_flight_max=1)
        bench.install(same)
        link = FakeLink()
        bench.engine.on_call(link, owned(call("unit", {1: 1}, rows(1)), "a"))
        bench.engine.on_call(link, owned(call("unit", {2: 2}, rows(2)), "b"))
        bench.engine.on_call(link, owned(call("unit", {3: 1}, rows(1), remaining_us=0), "b"))
        bench.engine.on_call(link, owned(call("unit", {4: 1}, rows(1)), "b"))
        bench.engine.on_cancel(link, [4])
        found = {each.servable: each for each in ask(bench).servables}
        assert found["b"].waiting == 1
        assert found["b"].waiting_rows == 2
        await bench.finish_all()
        await asyncio.sleep(1.0)
        statistics = ask(bench)
        first, second = statistics.servables
        assert (first.servable, first.unit) == ("a", "unit")
        assert (first.accepted, first.in_time, first.rows) == (1, 1, 1)
        assert (second.accepted, second.in_time, second.cancelled) == (2, 1, 1)
        assert (second.refused_late, second.waiting, second.rows) == (1, 0, 2)
        assert len(second.queue.counts) == len(TIME_BOUNDS) + 1
        assert sum(second.queue.counts) == 1
        assert set(statistics.shares) == {"a", "b"}
        assert statistics.up_s >= 1.0

    run_virtual(scenario)


def test_a_device_tells_what_its_batches_held_and_took() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop, in_flight_max=1)
        bench.install(same, WORDS)
        link = FakeLink()
        bench.engine.on_call(link, call("words", {1: 1}, rows(1, 3)))
        bench.engine.on_call(link, call("words", {2: 2}, rows(2, 4)))
        bench.engine.on_call(link, call("words", {3: 1}, rows(1, 2)))
        await bench.finish_all()
        statistics = ask(bench)
        [unit] = statistics.units
        buckets = {each.bucket: each for each in unit.buckets}
        assert set(buckets) == {"1x4", "4x4", "1x8", "4x8"}
        ran = {name: (b.batches, b.rows, b.slots) for name, b in buckets.items()}
        assert ran == {"1x4": (1, 1, 1), "4x4": (1, 3, 4), "1x8": (0, 0, 0), "4x8": (0, 0, 0)}
        assert all(each.estimate_s > 0 for each in unit.buckets)
        assert unit.useful_cells == 3 + 2 * 4 + 2
        assert unit.batch_padding_cells == 4
        assert unit.length_padding_cells == 1 + 2
        assert unit.executables == 4
        assert sum(unit.host.counts) == sum(unit.device.counts) == sum(unit.wait.counts) == 2
        assert len(unit.error.counts) == len(ERROR_BOUNDS) + 1
        assert statistics.depths == (2,)
        assert statistics.staging_bytes == bench.engine.staging_bytes > 0

    run_virtual(scenario)


def test_cells_of_a_unit_without_lengths_are_rows() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        bench.install(same)
        bench.engine.on_call(FakeLink(), call("unit", {1: 3}, rows(3)))
        await bench.finish_all()
        [unit] = ask(bench).units
        slots = sum(each.slots for each in unit.buckets)
        assert unit.useful_cells == 3
        assert unit.batch_padding_cells == slots - 3
        assert unit.length_padding_cells == 0

    run_virtual(scenario)


def test_statistics_are_made_a_few_times_a_second_at_most() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        bench.install(same)
        before = ask(bench)
        bench.engine.on_call(FakeLink(), call("unit", {1: 1}, rows(1)))
        assert ask(bench) == before
        await asyncio.sleep(0.3)
        assert ask(bench) != before

    run_virtual(scenario)


def test_a_removed_unit_is_told_no_more_and_the_device_s_work_stays() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        bench.install(same)
        bench.engine.on_call(FakeLink(), call("unit", {1: 1}, rows(1)))
        await asyncio.sleep(0.5)
        await bench.finish_all()
        await bench.engine.lanes.remove("unit")
        statistics = ask(bench)
        assert (statistics.units, statistics.servables) == ((), ())
        assert statistics.busy_s == pytest.approx(0.5)

    run_virtual(scenario)


def test_beyond_the_bounds_rows_are_summed_up_and_nothing_is_lost() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        for number in range(UNITS_MAX + 2):
            bench.install(same, map_unit(f"unit-{number}"))
        many = map_unit("many", batch_buckets=tuple(range(1, BUCKETS_MAX + 3)))
        bench.install(same, many)
        link = FakeLink()
        for number in range(PAIRS_MAX + 5):
            unit = f"unit-{number % 3}"
            frame = owned(call(unit, {number: 2}, rows(2)), f"owner-{number}")
            bench.engine.on_call(link, frame)
        await bench.finish_all()
        statistics = bench.engine.meter.read()
        assert len(statistics.servables) == PAIRS_MAX + 1
        assert len(statistics.units) == UNITS_MAX + 1
        rest: ServableStatistics = statistics.servables[-1]
        assert (rest.servable, rest.unit, rest.accepted, rest.rows) == (OTHER, OTHER, 5, 10)
        assert sum(rest.queue.counts) == 5
        # A pair that comes later, at whichever unit, takes nobody's place.
        bench.engine.on_call(link, owned(call("unit-0", {999: 1}, rows(1)), "late"))
        await bench.finish_all()
        again = bench.engine.meter.read()
        assert again.servables[:-1] == statistics.servables[:-1]
        assert again.servables[-1].accepted == 6
        assert statistics.units[-1].unit == OTHER
        assert len(statistics.shares) == PAIRS_MAX
        buckets = statistics.units[-1].buckets
        assert buckets == ()
        assert sum(unit.useful_cells for unit in statistics.units) == 2 * (PAIRS_MAX + 5)

    run_virtual(scenario)


def test_sizes_beyond_the_bound_are_one() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        bench.install(same, map_unit("many", batch_buckets=tuple(range(1, BUCKETS_MAX + 3))))
        link = FakeLink()
        for size in (BUCKETS_MAX + 1, BUCKETS_MAX + 2):
            bench.engine.on_call(link, call("many", {size: size}, rows(size)))
            await bench.finish_all()
        [unit] = ask(bench).units
        assert len(unit.buckets) == BUCKETS_MAX + 1
        rest = unit.buckets[-1]
        assert (rest.bucket, rest.batches, rest.rows) == (OTHER, 2, 2 * BUCKETS_MAX + 3)

    run_virtual(scenario)


def test_requests_that_are_given_up_are_told_by_why() -> None:
    batcher = Batcher(RoundRobin(), 1)
    lane = LaneKey("unit")
    batcher.add_lane(lane, Ladder((1,)), 2, 1 << 20)
    for priority in (SHEDDABLE, SHEDDABLE, CRITICAL):
        batcher.offer(Ticket(lane, 1, 1, math.inf, owner="a", priority=priority), 0.0)
    [found] = Meter(batcher, lambda: 1.0).read().servables
    assert (found.accepted, found.waiting, found.shed_evicted) == (3, 2, 1)
    assert (found.shed_dropped, found.shed_hopeless) == (0, 0)


def test_decisions_are_timed_now_and_then() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        bench.install(same)
        link = FakeLink()
        for number in range(200):
            bench.engine.on_call(link, call("unit", {number: 1}, rows(1)))
            await bench.finish_all()
        statistics = ask(bench)
        assert 0 < statistics.decisions < 200
        assert statistics.decision_s > 0

    run_virtual(scenario)


def test_who_has_no_statistics_refuses_and_nonsense_is_told_apart() -> None:
    refusal = ReplyHeader("", GENERATION, [], [], [ItemError(0, "STALE_EPOCH", "not here")])
    frame = Frame(FrameKind.REPLY, 0, refusal, memoryview(b""))
    assert answered(frame, DeviceStatistics) is None
    tensors, buffers = encode_tensors([np.frombuffer(b"\xc1nonsense", np.uint8)])
    header = ReplyHeader("", GENERATION, [(0, 9)], tensors)
    frame = Frame(FrameKind.REPLY, 0, header, memoryview(b"".join(buffers)))
    with pytest.raises(Internal, match="cannot be read"):
        answered(frame, DeviceStatistics)


def test_the_question_is_for_no_unit_and_has_no_rows() -> None:
    header = question()
    assert (header.unit, header.items) == ("", [Item(0, 0, 0)])
