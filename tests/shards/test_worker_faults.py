"""The worker engine among units that fail and peers that are confused."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from batching.errors import InvalidArgument, Unavailable
from shards.worker import Handler, WorkerEngine
from tests.shards.serving import Array, FakeLink, call, until
from tests.shards.workers import answered, ask, double, ints, no_negatives, run

# --- faults of host functions ------------------------------------------------------------------


def test_what_one_request_does_wrong_costs_no_other_of_its_frame() -> None:
    async def scenario(engine: WorkerEngine) -> None:
        link = FakeLink()
        engine.install("unit", no_negatives)
        frame = call("unit", {1: 1, 2: 2, 3: 1}, ints(1, 2, -2, 3))
        await ask(engine, link, frame, ends=3)
        assert answered(link) == {1: [2], 3: [6]}
        assert link.codes == {2: "INTERNAL"}

    run(scenario)


def test_a_message_of_many_lines_becomes_its_first() -> None:
    async def scenario(engine: WorkerEngine) -> None:
        link = FakeLink()
        engine.install("unit", no_negatives)
        await ask(engine, link, call("unit", {1: 1}, ints(-1)))
        assert link.errors[1].message == "ValueError: a negative number among [-1]"

    run(scenario)


def test_an_error_with_a_code_keeps_code_message_and_hint() -> None:
    def busy(_: Sequence[Array]) -> Sequence[Array]:
        raise Unavailable("the index is being rebuilt", 1500)

    async def scenario(engine: WorkerEngine) -> None:
        link = FakeLink()
        engine.install("unit", busy)
        await ask(engine, link, call("unit", {1: 1}, ints(1)))
        error = link.errors[1]
        assert (error.code, error.message) == ("UNAVAILABLE", "the index is being rebuilt")
        assert error.retry_after_ms == 1500

    run(scenario)


def leave(_: Sequence[Array]) -> Sequence[Array]:
    sys.exit("good bye")


def text(inputs: Sequence[Array]) -> Sequence[Array]:
    return [np.array(["not bytes"] * len(inputs[0]), object)]


def complex_numbers(inputs: Sequence[Array]) -> Sequence[Array]:
    return [inputs[0].astype(np.complex64)]


def one_row(inputs: Sequence[Array]) -> Sequence[Array]:
    return [np.zeros(1)]


def no_array(inputs: Sequence[Array]) -> Any:
    return [[1, 2]]


def scalar(inputs: Sequence[Array]) -> Sequence[Array]:
    return [np.array(1.0)]


def nothing(inputs: Sequence[Array]) -> Any:
    return None


@pytest.mark.parametrize(
    "handler", [leave, text, complex_numbers, one_row, no_array, scalar, nothing]
)
def test_whatever_a_function_does_its_requests_end_and_the_worker_goes_on(
    handler: Handler,
) -> None:
    async def scenario(engine: WorkerEngine) -> None:
        link = FakeLink()
        engine.install("bad", handler)
        engine.install("good", double)
        await ask(engine, link, call("bad", {1: 2, 2: 2}, ints(1, 2, 3, 4)), ends=2)
        assert link.codes == {1: "INTERNAL", 2: "INTERNAL"}
        await ask(engine, link, call("good", {3: 1}, ints(3)), ends=3)
        assert answered(link) == {3: [6]}

    run(scenario)


def test_rows_are_never_given_to_the_wrong_request_when_a_function_loses_some() -> None:
    def distinct(inputs: Sequence[Array]) -> Sequence[Array]:
        return [np.unique(inputs[0])]

    async def scenario(engine: WorkerEngine) -> None:
        link = FakeLink()
        engine.install("unit", distinct)
        await ask(engine, link, call("unit", {1: 1, 2: 1}, ints(5, 5)), ends=2)
        # Together they make one row of two; each alone makes its own.
        assert answered(link) == {1: [5], 2: [5]}

    run(scenario)


def test_requests_whose_answers_do_not_fit_together_are_answered_apart() -> None:
    def up_to_the_largest(inputs: Sequence[Array]) -> Sequence[Array]:
        if (inputs[0] < 0).any():
            raise InvalidArgument("negative")
        return [np.ones((len(inputs[0]), inputs[0].max()), np.int64)]

    async def scenario(engine: WorkerEngine) -> None:
        link = FakeLink()
        engine.install("unit", up_to_the_largest)
        await ask(engine, link, call("unit", {1: 1, 2: 1, 3: 1}, ints(2, -1, 4)), ends=3)
        assert {number: rows[0].shape for number, rows in link.answers.items()} == {
            1: (1, 2),
            3: (1, 4),
        }
        assert link.codes == {2: "INVALID_ARGUMENT"}

    run(scenario)


def test_a_peer_that_does_not_read_costs_nobody_else() -> None:
    async def scenario(engine: WorkerEngine) -> None:
        slow, good = FakeLink(), FakeLink()
        slow.full = True
        engine.install("unit", double)
        engine.on_call(slow, call("unit", {1: 1}, ints(1)))
        await ask(engine, good, call("unit", {1: 1}, ints(2)))
        assert slow.closed == ["answers are not read"]
        assert answered(good) == {1: [4]}

    run(scenario)


# --- confused peers ----------------------------------------------------------------------------


def test_frames_without_items_end_without_a_word() -> None:
    async def scenario(engine: WorkerEngine) -> None:
        link = FakeLink()
        engine.install("unit", double)
        for _ in range(2):
            engine.on_call(link, call("unit", {}, ints()))
        await until(lambda: not engine._running)
        await ask(engine, link, call("unit", {1: 1}, ints(1)))
        assert len(link.sent) == 1

    run(scenario)


def test_a_number_used_twice_at_once_loses_no_answer() -> None:
    async def scenario(engine: WorkerEngine) -> None:
        link = FakeLink()
        engine.install("unit", double)
        for value in (1, 2):
            engine.on_call(link, call("unit", {1: 1}, ints(value)))
        await until(lambda: len(link.sent) == 2)
        assert [arrays[0].tolist() for _, arrays in link.replies] == [[2], [4]]

    run(scenario)


# --- any order of events -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_every_request_is_answered_refused_or_cancelled_exactly_once(seed: int) -> None:
    chance = random.Random(seed)

    async def scenario(engine: WorkerEngine) -> None:
        links = [FakeLink(f"link {n}") for n in range(3)]
        asked: list[dict[int, Array]] = [{} for _ in links]
        cancelled: list[set[int]] = [set() for _ in links]
        engine.install("unit", no_negatives)
        for turn in range(150):
            number = chance.randrange(len(links))
            link, mine = links[number], asked[number]
            requests = {10 * turn + n: chance.randint(0, 3) for n in range(chance.randint(1, 4))}
            values = ints(*(chance.randint(-1, 20) for _ in range(sum(requests.values()))))
            at = 0
            for request, count in requests.items():
                mine[request] = values[at : at + count]
                at += count
            engine.on_call(link, call("unit", requests, values))
            if chance.random() < 0.2:
                some = set(chance.sample(sorted(mine), min(3, len(mine))))
                cancelled[number] |= some
                engine.on_cancel(link, sorted(some))
            if chance.random() < 0.3:
                await asyncio.sleep(0)
        await engine.remove("unit")
        for link, mine, gone in zip(links, asked, cancelled, strict=True):
            assert link.ended | gone == mine.keys()
            for request, values in mine.items():
                if request in link.answers:
                    assert answered(link)[request] == (values * 2).tolist()
                elif request in link.codes and link.codes[request] == "INTERNAL":
                    assert (values < 0).any()

    run(scenario, waiting_bytes_max=2000)
