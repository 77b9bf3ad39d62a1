"""Units of registered kinds: all partitions asked the same, their answers made into one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from batching.errors import Code
from shards.manifest import CustomUnit, Manifest
from shards.specs import Spec
from tests.cluster.routing_fakes import (
    Bench,
    VirtualLoop,
    epoch,
    floats,
    manifest,
    run_virtually,
    turns,
)

SPECS = {"x": Spec(("b",))}

Holders = dict[str, list[list[str]]]


def summed(
    *holders: list[str], combine: str = "sum"
) -> tuple[Manifest, dict[str, list[list[str]]]]:
    """A servable of one unit, a partition for each list of actors that hold it."""
    unit = CustomUnit(
        id="custom", kind="any", inputs=SPECS, outputs=SPECS, combine=combine,
        partitions=tuple({} for _ in holders),
    )  # fmt: skip
    found = manifest({"unit": unit}, [("unit", {"x": "in:x"})], SPECS, SPECS, {"x": "0:x"})
    return found, {"unit": list(holders)}


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_answers_are_combined_in_the_order_of_partitions_whichever_comes_first(
    order: tuple[int, ...],
) -> None:
    # In 32 bits this sum depends on the order in which its terms are added.
    terms = [1e8, 1.0, -1e8]

    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, summed(["a"], ["b"], ["c"])))
        sink = bench.ask_x(7)
        await turns()
        asked = [bench.actors[name].take() for name in "abc"]
        assert [each.arrays[0].tolist() for each in asked] == [[7.0]] * 3
        for partition in order:
            asked[partition].answer(floats(terms[partition]))
        expected = np.float32(np.float32(1e8) + np.float32(1.0)) + np.float32(-1e8)
        assert sink.answer.tolist() == [expected]
        bench.check_at_rest()
        bench.router.close()

    run_virtually(scenario)


def test_partitions_of_one_actor_are_asked_by_addresses_of_their_own() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, summed(["a"], ["a"])))
        sink = bench.ask_x(1)
        await turns()
        first, second = bench.actors["a"].take(), bench.actors["a"].take()
        assert (first.header.unit, second.header.unit) == ("custom/0", "custom/1")
        second.answer(floats(5))
        first.answer(floats(3))
        assert sink.answer.tolist() == [8.0]
        bench.router.close()

    run_virtually(scenario)


def test_an_answer_of_another_partition_is_never_merged() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, summed(["a"], ["b"])))
        sink = bench.ask_x(1)
        await turns()
        bench.actors["a"].take().answer(floats(1), unit="custom/1")
        assert sink.code == "INTERNAL"
        assert "something else than it was asked" in str(sink.error)
        bench.router.close()

    run_virtually(scenario)


def test_one_partition_that_refuses_fails_the_request_and_cancels_the_others() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, summed(["a"], ["b"])))
        sink = bench.ask_x(1)
        await turns()
        bench.actors["a"].take().refuse(Code.INVALID_ARGUMENT, "not that")
        await turns()
        assert (sink.code, str(sink.error)) == ("INVALID_ARGUMENT", "not that")
        other = bench.actors["b"]
        assert other.link.cancelled == [other.take().item.request]
        bench.check_at_rest()
        bench.router.close()

    run_virtually(scenario)


def test_a_partition_that_nobody_holds_fails_the_request_before_anyone_is_asked() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, summed(["a"], ["b"])))
        bench.actors["b"].link.break_off()
        bench.actors["b"].is_away = True
        await turns()
        sink = bench.ask_x(1)
        await turns()
        assert sink.code == "UNAVAILABLE"
        assert bench.actors["a"].asked == []
        bench.router.close()

    run_virtually(scenario)


def test_one_partition_needs_no_combine() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, summed(["a"], combine="")))
        sink = bench.ask_x(2)
        await turns()
        bench.actors["a"].take().answer(floats(4))
        assert sink.answer.tolist() == [4.0]
        bench.router.close()

    run_virtually(scenario)


def test_a_combine_that_is_not_here_fails_its_requests_alone() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, summed(["a"], ["b"], combine="median")))
        sink = bench.ask_x(1)
        await turns()
        assert sink.code == "FAILED_PRECONDITION"
        assert "no combine 'median' here" in str(sink.error)
        bench.check_at_rest()
        bench.router.close()

    run_virtually(scenario)


def test_answers_of_different_shapes_are_never_stretched_to_fit() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, summed(["a"], ["b"])))
        sink = bench.ask_x(1)
        await turns()
        bench.actors["a"].take().answer(floats(1))
        bench.actors["b"].take().answer(np.zeros((1, 3), np.float32))
        assert sink.code == "INTERNAL"
        assert "different shapes" in str(sink.error)
        bench.router.close()

    run_virtually(scenario)


def test_what_a_combine_has_against_the_answers_is_what_the_request_hears() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, summed(["a"], ["b"], combine="topk")))
        sink = bench.ask_x(1)
        await turns()
        for name in "ab":
            bench.actors[name].take().answer(floats(1))
        assert sink.code == "INVALID_ARGUMENT"
        assert "topk needs" in str(sink.error)
        bench.router.close()

    run_virtually(scenario)
