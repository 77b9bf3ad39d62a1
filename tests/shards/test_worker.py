"""The worker engine: calls answered by host functions on one thread, within bounds."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Sequence

import numpy as np
import pytest

from batching.testing import FakeClock
from shards.wire import Frame, Item
from shards.worker import WorkerEngine
from tests.shards.serving import Array, FakeLink, call, eventually, together, until
from tests.shards.workers import Held, answered, ask, double, ints, run

# --- answers -----------------------------------------------------------------------------------


def test_each_request_of_a_frame_gets_its_rows_in_one_frame_and_by_one_call() -> None:
    async def scenario(engine: WorkerEngine) -> None:
        link, calls = FakeLink(), []

        def counted(inputs: Sequence[Array]) -> Sequence[Array]:
            calls.append(threading.current_thread().name)
            return double(inputs)

        engine.install("unit", counted)
        await ask(engine, link, call("unit", {1: 2, 2: 0, 3: 1}, ints(1, 2, 3)), ends=3)
        assert answered(link) == {1: [2, 4], 2: [], 3: [6]}
        assert len(link.sent) == 1
        assert calls == ["worker"]

    run(scenario)


def test_calls_are_done_first_come_first_served_whatever_link_they_came_by() -> None:
    async def scenario(engine: WorkerEngine) -> None:
        held, one, two = Held(), FakeLink(), FakeLink()
        engine.install("unit", held)
        for number in range(6):
            engine.on_call((one, two)[number % 2], call("unit", {number: 1}, ints(number)))
            held.go.release()
        await until(lambda: len(one.ended) + len(two.ended) == 6)
        assert held.calls == [[number] for number in range(6)]
        assert answered(two) == {1: [2], 3: [6], 5: [10]}

    run(scenario)


def test_a_look_up_that_takes_long_holds_no_loop() -> None:
    async def scenario(engine: WorkerEngine) -> None:
        held, link = Held(), FakeLink()
        engine.install("unit", held)
        engine.on_call(link, call("unit", {1: 1}, ints(1)))
        await held.has_begun()
        engine.on_call(link, call("gone", {2: 1}, ints(1)))
        assert link.codes == {2: "STALE_EPOCH"}
        held.go.release()
        await until(lambda: len(link.ended) == 2)

    run(scenario)


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "array",
    [ints(1, 2), ints(), np.array(5, np.int64), np.zeros((2, 3), np.int64)],
    ids=["too many", "none", "a scalar", "too many of rank two"],
)
def test_tensors_whose_rows_are_not_the_items_are_the_callers_mistake(array: Array) -> None:
    async def scenario(engine: WorkerEngine) -> None:
        link = FakeLink()
        engine.install("unit", double)
        engine.on_call(link, call("unit", {1: 1}, array))
        assert link.codes == {1: "INVALID_ARGUMENT"}
        assert "do not add up" in link.errors[1].message

    run(scenario)


def test_a_body_that_is_no_tensors_is_refused_for_every_item() -> None:
    async def scenario(engine: WorkerEngine) -> None:
        link = FakeLink()
        engine.install("unit", double)
        good = call("unit", {1: 1, 2: 1}, ints(1, 2))
        engine.on_call(link, Frame(good.kind, 0, good.header, good.body[:-1]))
        assert link.codes == {1: "DATA_LOSS", 2: "DATA_LOSS"}

    run(scenario)


def test_waiting_bytes_are_bounded_and_a_refusal_says_when_to_come_back() -> None:
    async def scenario(engine: WorkerEngine) -> None:
        held, link = Held(), FakeLink()
        engine.install("unit", held)
        for number in range(4):
            engine.on_call(link, call("unit", {number: 1}, ints(1)))
        assert link.codes == {3: "RESOURCE_EXHAUSTED"}
        assert link.errors[3].retry_after_ms > 0
        for _ in range(3):
            held.go.release()
        await until(lambda: len(link.ended) == 4)
        held.go.release()
        await ask(engine, link, call("unit", {4: 1}, ints(1)), ends=5)
        assert link.answers.keys() == {0, 1, 2, 4}

    run(scenario, waiting_bytes_max=24)


def test_expected_answers_count_against_the_bound() -> None:
    async def scenario(engine: WorkerEngine) -> None:
        link = FakeLink()
        engine.install("unit", double, row_bytes=100)
        engine.on_call(link, call("unit", {1: 2}, ints(1, 2)))  # 16 bytes in, 200 out
        assert link.codes == {1: "RESOURCE_EXHAUSTED"}
        await ask(engine, link, call("unit", {2: 1}, ints(1)), ends=2)
        assert answered(link) == {2: [2]}

    run(scenario, waiting_bytes_max=150)


def test_a_call_whose_deadline_came_while_it_waited_is_not_done() -> None:
    clock = FakeClock(100.0)

    async def scenario(engine: WorkerEngine) -> None:
        held, link = Held(), FakeLink()
        engine.install("unit", held)
        engine.on_call(link, call("unit", {0: 1}, ints(0), remaining_us=1))
        await held.has_begun()
        items = [Item(1, 1, 999_999), Item(2, 1, 1_000_000), Item(3, 1, 1_000_001)]
        engine.on_call(link, call("unit", {}, ints(1, 2, 3), items=items))
        clock.advance(1.0)
        held.go.release(2)
        await until(lambda: len(link.ended) == 4)
        assert link.codes == {1: "DEADLINE_EXCEEDED", 2: "DEADLINE_EXCEEDED"}
        # What had begun is answered: whether it is too late is the asker's to say.
        assert answered(link) == {0: [0], 3: [6]}
        assert held.calls == [[0], [3]]

    run(scenario, clock=clock)


# --- who gave up -------------------------------------------------------------------------------


def test_a_cancelled_call_is_skipped_if_it_has_not_begun() -> None:
    async def scenario(engine: WorkerEngine) -> None:
        held, link = Held(), FakeLink()
        engine.install("unit", held)
        engine.on_call(link, call("unit", {0: 1}, ints(0)))
        await held.has_begun()
        engine.on_call(link, call("unit", {1: 1, 2: 1}, ints(1, 2)))
        engine.on_call(link, call("unit", {3: 1}, ints(3)))
        engine.on_cancel(link, [0, 1, 3, 99])
        held.go.release(2)
        await until(lambda: not engine._open)
        assert answered(link) == {0: [0], 2: [4]}
        assert held.calls == [[0], [2]]
        assert not link.errors

    run(scenario)


def test_a_number_may_be_used_again_after_its_cancelled_call_has_gone() -> None:
    async def scenario(engine: WorkerEngine) -> None:
        held, link = Held(), FakeLink()
        engine.install("unit", held)
        engine.on_call(link, call("unit", {0: 1}, ints(0)))
        engine.on_call(link, call("unit", {1: 1}, ints(1)))
        engine.on_cancel(link, [1])
        held.go.release()
        await until(lambda: not engine._open)
        held.go.release()
        await ask(engine, link, call("unit", {1: 1}, ints(5)), ends=2)
        assert answered(link) == {0: [0], 1: [10]}

    run(scenario)


def test_a_cancel_reaches_only_the_link_that_sent_it() -> None:
    async def scenario(engine: WorkerEngine) -> None:
        held, one, two = Held(), FakeLink(), FakeLink()
        engine.install("unit", held)
        engine.on_call(one, call("unit", {0: 1}, ints(0)))
        await held.has_begun()
        engine.on_call(two, call("unit", {1: 1}, ints(1)))
        engine.on_cancel(one, [1])
        held.go.release(2)
        await until(lambda: len(two.ended) == 1)
        assert answered(two) == {1: [2]}
        await until(lambda: not engine._open)

    run(scenario)


def test_a_peer_that_is_gone_gets_nothing_more_done() -> None:
    async def scenario(engine: WorkerEngine) -> None:
        held, gone, here = Held(), FakeLink(), FakeLink()
        engine.install("unit", held)
        for number in range(5):
            engine.on_call(gone, call("unit", {number: 1}, ints(number)))
        await held.has_begun()
        engine.on_call(here, call("unit", {0: 1}, ints(7)))
        gone.close()
        engine.on_link_closed(gone)
        held.go.release(2)
        await until(lambda: len(here.ended) == 1)
        assert held.calls == [[0], [7]]
        await until(lambda: not engine._open)

    run(scenario)


# --- units come and go -------------------------------------------------------------------------


def test_a_removed_unit_finishes_what_it_has_and_takes_no_more() -> None:
    async def scenario(engine: WorkerEngine) -> None:
        held, link = Held(), FakeLink()
        engine.install("unit", held)
        for number in range(3):
            engine.on_call(link, call("unit", {number: 1}, ints(number)))
        await held.has_begun()
        removals = [asyncio.ensure_future(engine.remove("unit")) for _ in range(2)]
        await asyncio.sleep(0)
        engine.on_call(link, call("unit", {3: 1}, ints(3)))
        assert link.codes == {3: "STALE_EPOCH"}
        held.go.release(2)
        await until(lambda: len(link.answers) == 2)
        assert not any(removal.done() for removal in removals)
        held.go.release()
        await asyncio.gather(*removals)
        assert link.answers.keys() == {0, 1, 2}

    run(scenario)


def test_a_removal_whose_caller_gave_up_harms_nobody() -> None:
    async def scenario(engine: WorkerEngine) -> None:
        held, link = Held(), FakeLink()
        engine.install("unit", held)
        engine.on_call(link, call("unit", {1: 1}, ints(1)))
        removing = asyncio.ensure_future(engine.remove("unit"))
        await asyncio.sleep(0)
        removing.cancel()
        engine.install("unit", double)
        held.go.release()
        await ask(engine, link, call("unit", {2: 1}, ints(2)), ends=2)
        assert answered(link) == {1: [2], 2: [4]}

    run(scenario)


def test_a_unit_that_is_idle_or_not_there_is_removed_at_once() -> None:
    async def scenario(engine: WorkerEngine) -> None:
        engine.install("unit", double)
        await engine.remove("unit")
        await engine.remove("never was")

    run(scenario)


def test_a_removed_unit_is_not_kept_alive_by_the_idle_worker() -> None:
    class Big:
        def __call__(self, inputs: Sequence[Array]) -> Sequence[Array]:
            return double(inputs)

    async def scenario(engine: WorkerEngine) -> None:
        link = FakeLink()

        def install() -> weakref.ref[Big]:
            big = Big()
            engine.install("unit", big)
            return weakref.ref(big)

        kept = install()
        await ask(engine, link, call("unit", {1: 1}, ints(1)))
        await engine.remove("unit")
        await asyncio.to_thread(eventually, lambda: kept() is None)

    run(scenario)


def test_a_call_that_was_taken_is_done_by_the_function_that_was_there() -> None:
    async def scenario(engine: WorkerEngine) -> None:
        held, link = Held(), FakeLink()
        engine.install("unit", held)
        engine.on_call(link, call("unit", {1: 1}, ints(1)))
        engine.install("unit", lambda inputs: [inputs[0] + 100])
        held.go.release()
        await ask(engine, link, call("unit", {2: 1}, ints(2)), ends=2)
        assert answered(link) == {1: [2], 2: [102]}

    run(scenario)


def test_close_does_what_is_queued_first() -> None:
    async def scenario(engine: WorkerEngine) -> None:
        link = FakeLink()
        engine.install("unit", double)
        for number in range(20):
            engine.on_call(link, call("unit", {number: 1}, ints(number)))
        await asyncio.to_thread(engine.close)
        await until(lambda: len(link.ended) == 20)

    run(scenario)


# --- threads of their own ------------------------------------------------------------------------


def test_a_unit_with_a_thread_of_its_own_holds_up_no_other_unit() -> None:
    async def scenario(engine: WorkerEngine) -> None:
        slow, link = Held(), FakeLink()
        engine.install("slow", slow, own_thread=True)
        engine.install("quick", double)
        engine.on_call(link, call("slow", {1: 1}, ints(1)))
        await slow.has_begun()
        await ask(engine, link, call("quick", {2: 1}, ints(4)), ends=1)
        # So in one frame, too.
        engine.on_call(
            link,
            together(
                call("slow", {3: 1}, ints(5), op="rows"), call("quick", {4: 1}, ints(6), op="rows")
            ),
        )
        await until(lambda: link.ended == {2, 4})
        slow.go.release(2)
        await until(lambda: link.ended == {1, 2, 3, 4})
        assert answered(link) == {1: [2], 2: [8], 3: [10], 4: [12]}

    run(scenario)


def test_what_never_waits_is_done_at_once_where_it_is_little_and_nothing_else_is_under_way() -> (
    None
):
    async def scenario(engine: WorkerEngine) -> None:
        threads: list[threading.Thread] = []

        def seen(inputs: Sequence[Array]) -> Sequence[Array]:
            threads.append(threading.current_thread())
            return double(inputs)

        slow = Held()
        engine.install("slow", slow)
        engine.install("table", seen, row_bytes=512, never_waits=True)
        engine.install("mapped", seen, row_bytes=512)
        link, main = FakeLink(), threading.current_thread()
        few, many = ints(1), np.arange(1024)
        await ask(engine, link, call("table", {1: 1}, few), ends=1)
        assert threads.pop() is main
        await ask(engine, link, call("table", {2: 1024}, many), ends=2)
        assert threads.pop() is not main
        await ask(engine, link, call("mapped", {3: 1}, few), ends=3)
        assert threads.pop() is not main
        await ask(
            engine, link,
            together(call("table", {4: 1}, few, op="rows"), call("mapped", {5: 1}, few, op="rows")),
            ends=5,
        )  # fmt: skip
        assert main not in (threads.pop(), threads.pop())
        # Whoever is first in line stays so.
        engine.on_call(link, call("slow", {6: 1}, ints(7)))
        await slow.has_begun()
        engine.on_call(link, call("table", {7: 1}, ints(8)))
        assert link.ended == {1, 2, 3, 4, 5}
        slow.go.release()
        await until(lambda: link.ended == {1, 2, 3, 4, 5, 6, 7})
        assert threads.pop() is not main
        assert answered(link)[7] == [16]

    run(scenario)


def test_the_thread_of_a_unit_ends_when_the_unit_is_removed() -> None:
    async def scenario(engine: WorkerEngine) -> None:
        link = FakeLink()
        before = set(threading.enumerate())
        for _ in range(2):  # what is installed again keeps its thread
            engine.install("unit", double, own_thread=True)
        (mine,) = set(threading.enumerate()) - before
        await ask(engine, link, call("unit", {1: 1}, ints(1)), ends=1)
        await engine.remove("unit")
        await until(lambda: not mine.is_alive())
        engine.install("unit", double)
        await ask(engine, link, call("unit", {2: 1}, ints(1)), ends=2)
        assert answered(link) == {1: [2], 2: [2]}

    run(scenario)
