"""Calls of several tables in one frame: told apart again, and answered each by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batching.errors import InvalidArgument
from batching.testing import FakeClock
from shards.errors import FrameCorrupt
from shards.replies import UnitAnswer, answers, refuse_answer, send_together
from shards.together import joined, parted
from shards.wire import (
    Buffer,
    CallHeader,
    Frame,
    FrameKind,
    FrameReader,
    Item,
    ReplyHeader,
    decode_tensors,
    encode_frame,
    encode_header,
    encode_tensors,
    requests_of,
)
from shards.worker import WorkerEngine
from tests.shards.serving import GENERATION, Array, FakeLink, call, together, until
from tests.shards.workers import Held, answered, ask, double, ints, no_negatives, run


def part(unit: str, arrays: Sequence[Array]) -> tuple[CallHeader, list[Buffer]]:
    tensors, buffers = encode_tensors(arrays)
    return CallHeader(3, unit, "rows", [Item(len(arrays), 1, 1000)], tensors, "plan"), buffers


@given(
    shapes=st.lists(
        st.lists(st.tuples(st.integers(0, 40), st.sampled_from(["i4", "i8"])), max_size=3),
        min_size=1,
        max_size=5,
    )
)
def test_bodies_of_any_sizes_are_told_apart_again(shapes: list[list[tuple[int, str]]]) -> None:
    draw = np.random.default_rng(0)
    given_ = [[draw.integers(0, 99, size).astype(dtype) for size, dtype in of] for of in shapes]
    header, body = joined([part(f"t{n}", arrays) for n, arrays in enumerate(given_)])
    frame = b"".join(encode_frame(FrameKind.CALL, 0, encode_header(header), body))
    [read] = FrameReader().feed(frame)
    found = parted(cast(CallHeader, read.header), read.body)
    assert [each.unit for each, _ in found] == [f"t{n}" for n in range(len(shapes))]
    for arrays, (each, came) in zip(given_, found, strict=True):
        assert [array.tolist() for array in came] == [array.tolist() for array in arrays]
        assert [array.dtype for array in came] == [array.dtype for array in arrays]
        assert not any(array.ctypes.data % 8 for array in came)
        assert each.plan == "plan"


def test_a_frame_is_about_the_requests_of_all_its_calls() -> None:
    one = call("one", {1: 1, 2: 1}, ints(1, 2), op="rows")
    two = call("two", {3: 1}, ints(3), op="rows")
    assert requests_of(together(one, two).header) == {1, 2, 3}
    reply = ReplyHeader("u", 1, [(4, 1)], [], also=(ReplyHeader("v", 1, [(5, 1)], []),))
    assert requests_of(reply) == {4, 5}


def test_calls_of_calls_are_no_frame() -> None:
    inner, body = joined([part("a", [ints(1)]), part("b", [ints(2)])])
    tensors, buffers = encode_tensors([ints(3)])
    outer = CallHeader(3, "c", "rows", [], tensors, also=(inner,))
    padded = [*buffers, bytes(64 - 8), *body]
    with pytest.raises(FrameCorrupt):
        parted(outer, memoryview(b"".join(padded)))


def test_several_tables_are_answered_in_one_frame() -> None:
    async def scenario(engine: WorkerEngine) -> None:
        link = FakeLink()
        for unit in ("one", "two", "three"):
            engine.install(unit, double, plan=f"plan of {unit}")
        frame = together(
            call("one", {1: 2}, ints(1, 2), op="rows"),
            call("two", {2: 1, 3: 1}, ints(3, 4), op="rows"),
            call("three", {4: 0}, ints(), op="rows"),
        )
        await ask(engine, link, frame, ends=4)
        assert answered(link) == {1: [2, 4], 2: [6], 3: [8], 4: []}
        assert len(link.sent) == 1
        assert {header.unit: header.plan for header, _ in link.replies} == {
            unit: f"plan of {unit}" for unit in ("one", "two", "three")
        }

    run(scenario)


def test_what_is_wrong_with_one_table_costs_no_other() -> None:
    async def scenario(engine: WorkerEngine) -> None:
        link = FakeLink()
        engine.install("good", double)
        engine.install("bad", no_negatives)
        engine.install("cut otherwise", double, plan="another")
        wrong_plan = call("cut otherwise", {4: 1}, ints(1), op="rows")
        header = cast(CallHeader, wrong_plan.header)
        planned = CallHeader(1, header.unit, "rows", header.items, header.tensors, "plan")
        frame = together(
            call("bad", {1: 1, 2: 1}, ints(-1, 5), op="rows"),
            call("gone", {3: 1}, ints(1), op="rows"),
            Frame(FrameKind.CALL, 0, planned, wrong_plan.body),
            call("good", {5: 1}, ints(1, 2), op="rows"),
            call("good", {6: 1}, ints(7), op="rows"),
        )
        await ask(engine, link, frame, ends=6)
        assert answered(link) == {2: [10], 6: [14]}
        assert link.codes == {
            1: "INTERNAL",
            3: "STALE_EPOCH",
            4: "STALE_EPOCH",
            5: "INVALID_ARGUMENT",
        }

    run(scenario)


def test_a_body_that_is_no_tensors_is_refused_for_every_table() -> None:
    async def scenario(engine: WorkerEngine) -> None:
        link = FakeLink()
        engine.install("unit", double)
        frame = together(
            call("unit", {1: 1}, ints(1), op="rows"), call("unit", {2: 1}, ints(2), op="rows")
        )
        engine.on_call(link, Frame(FrameKind.CALL, 0, frame.header, frame.body[:-8]))
        assert link.codes.keys() == {1, 2}

    run(scenario)


def test_only_look_ups_share_a_frame() -> None:
    async def scenario(engine: WorkerEngine) -> None:
        link = FakeLink()
        engine.install("unit", double)
        frame = together(call("unit", {1: 1}, ints(1)), call("unit", {2: 1}, ints(2), op="rows"))
        await ask(engine, link, frame, ends=2)
        assert link.codes == {1: "INVALID_ARGUMENT"}
        assert answered(link) == {2: [4]}

    run(scenario)


def test_cancelled_and_late_tables_of_a_frame_are_skipped() -> None:
    clock = FakeClock()

    async def scenario(engine: WorkerEngine) -> None:
        held, link = Held(), FakeLink()
        engine.install("held", held)
        engine.install("unit", double)
        engine.on_call(link, call("held", {1: 1}, ints(1)))
        await held.has_begun()
        frame = together(
            call("unit", {2: 1}, ints(2), op="rows", remaining_us=1000),
            call("unit", {3: 1}, ints(3), op="rows"),
            call("unit", {4: 1}, ints(4), op="rows"),
        )
        engine.on_call(link, frame)
        engine.on_cancel(link, [3])
        clock.advance(0.002)
        held.go.release()
        await until(lambda: len(link.ended) == 3)
        assert link.codes == {2: "DEADLINE_EXCEEDED"}
        assert answered(link) == {1: [2], 4: [8]}

    run(scenario, clock=clock)


def test_answers_do_not_wait_for_a_table_that_takes_long() -> None:
    clock = FakeClock()

    def slow(inputs: Sequence[Array]) -> Sequence[Array]:
        clock.advance(0.1)
        return double(inputs)

    async def scenario(engine: WorkerEngine) -> None:
        held, link = Held(), FakeLink()
        engine.install("slow", slow)
        engine.install("held", held)
        frame = together(
            call("slow", {1: 1}, ints(1), op="rows"), call("held", {2: 1}, ints(2), op="rows")
        )
        engine.on_call(link, frame)
        await held.has_begun()
        await until(lambda: answered(link) == {1: [2]})
        held.go.release()
        await until(lambda: len(link.ended) == 2)

    run(scenario, clock=clock)


@pytest.mark.parametrize(("bound", "frames"), [(1 << 20, 1), (100, 3)])
def test_answers_that_do_not_fit_together_go_one_by_one(bound: int, frames: int) -> None:
    link = FakeLink(body_bytes_max=bound)
    found = []
    for number in range(3):
        [answer] = answers([(number, 2)], [ints(number, number)])
        found.append(UnitAnswer(f"t{number}", "", answer))
    send_together(link, GENERATION, found)
    assert len(link.sent) == frames
    assert answered(link) == {number: [number] * 2 for number in range(3)}


def test_an_answer_that_its_router_does_not_take_is_refused_for_every_table() -> None:
    link = FakeLink()
    parts = [ReplyHeader(f"t{n}", GENERATION, [(n, 1)], []) for n in range(3)]
    header = joined([(each, []) for each in parts])[0]
    refuse_answer(link, header, InvalidArgument("too much"))
    assert link.codes == dict.fromkeys(range(3), "INVALID_ARGUMENT")


def test_one_call_is_a_frame_as_it_ever_was() -> None:
    header, buffers = part("t", [ints(1, 2)])
    same, body = joined([(header, buffers)])
    assert same is header
    assert [array.tolist() for array in decode_tensors(header.tensors, body[0])] == [[1, 2]]  # type: ignore[arg-type]
