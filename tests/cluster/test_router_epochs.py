"""Epochs under requests: pinned from first byte to last, retried whole, links kept while needed."""

from __future__ import annotations

import numpy as np
import pytest

from shards.replies import STALE
from shards.specs import Spec
from tests.cluster.routing_fakes import (
    AB,
    Bench,
    VirtualLoop,
    doubled,
    epoch,
    floats,
    look_up,
    manifest,
    map_unit,
    plain,
    rows_of,
    run_virtually,
    sentence_model,
    table_unit,
    turns,
)

# Epochs


def test_an_older_or_equal_epoch_is_ignored() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(5, (plain(), AB), term=2))
        await bench.router.adopt(epoch(5, (plain(version=2), AB), term=2))
        await bench.router.adopt(epoch(9, (plain(version=3), AB), term=1))
        assert bench.plan().version == 1
        await bench.router.adopt(epoch(6, (plain(version=4), AB), term=2))
        assert bench.plan().version == 4
        bench.router.close()

    run_virtually(scenario)


def test_the_oldest_live_epoch_is_that_of_the_oldest_request() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        assert bench.router.oldest_live_epoch() == 0
        await bench.router.adopt(epoch(1, (plain(), {"unit": [["a"]]})))
        old = bench.ask_x(1)
        await bench.router.adopt(epoch(2, (plain(), {"unit": [["a"]]})))
        bench.ask_x(2)
        await bench.router.adopt(epoch(3, (plain(), {"unit": [["a"]]})))
        await turns()
        assert bench.router.oldest_live_epoch() == 1
        doubled(bench.actors["a"].take())
        assert old.is_told
        assert bench.router.oldest_live_epoch() == 2
        doubled(bench.actors["a"].take())
        assert bench.router.oldest_live_epoch() == 3
        bench.router.close()

    run_virtually(scenario)


def test_a_request_of_an_old_epoch_ends_over_a_link_that_the_new_one_does_not_name() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, (plain(version=1), {"unit": [["a"]]})))
        sink = bench.ask_x(1)
        await turns()
        await bench.router.adopt(epoch(2, (plain(version=2), {"unit": [["b"]]})))
        await turns()
        assert bench.actors["a"].link.is_open()
        doubled(bench.actors["a"].take())
        assert sink.answer.tolist() == [2]
        await turns()
        assert not bench.actors["a"].link.is_open(), "a link that nobody needs stays open"
        bench.check_at_rest()
        bench.router.close()

    run_virtually(scenario)


def test_the_second_node_of_an_old_epochs_request_still_finds_its_actor() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, sentence_model()))
        sink = bench.ask({"text": np.array([b"x"], object)})
        await turns()
        await bench.router.adopt(epoch(2, (plain(name="other"), {"unit": [["z"]]})))
        bench.actors["h"].take().answer(np.array([1], np.int64))
        await turns()
        part = bench.actors["s"].take()
        part.answer(rows_of(table_unit())[[1]])
        await turns()
        doubled_rows = bench.actors["d"].take()
        doubled_rows.answer(floats(7))
        assert sink.answer.tolist() == [7]
        await turns()
        assert not any(bench.actors[name].link.is_open() for name in ("h", "s", "d"))
        bench.router.close()

    run_virtually(scenario)


def test_an_actors_next_generation_gets_a_new_link() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, (plain(), {"unit": [["a"]]})))
        await bench.router.adopt(epoch(2, (plain(), {"unit": [["a"]]}), generations={"a": 2}))
        await turns()
        first, second = bench.actors["a"].links
        assert (first.is_open(), second.is_open()) == (False, True)
        sink = bench.ask_x(4)
        await turns()
        doubled(bench.actors["a"].take())
        assert sink.answer.tolist() == [8]
        bench.router.close()

    run_virtually(scenario)


def test_an_actor_that_cannot_be_reached_does_not_hold_an_epoch_back_for_long() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        bench.actors["a"].is_away = True
        began = loop.time()
        await bench.router.adopt(epoch(1, (plain(), AB)), timeout_s=3.0)
        assert loop.time() - began == pytest.approx(3.0)
        assert bench.plan().version == 1
        bench.router.close()

    run_virtually(scenario)


def test_a_stale_refusal_is_retried_on_the_newer_epoch() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, (plain(), {"unit": [["a"]]})))
        sink = bench.ask_x(5)
        await turns()
        await bench.router.adopt(epoch(2, (plain(), {"unit": [["b"]]})))
        bench.actors["a"].take().refuse(STALE)
        await turns()
        again = bench.actors["b"].take()
        assert again.header.epoch == 2
        doubled(again)
        assert sink.answer.tolist() == [10]
        bench.check_at_rest()
        bench.router.close()

    run_virtually(scenario)


def test_a_second_stale_refusal_fails_the_request() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, (plain(), {"unit": [["a"]]})))
        sink = bench.ask_x(5)
        await turns()
        bench.actors["a"].take().refuse(STALE, "not here")
        await turns()
        bench.actors["a"].take().refuse(STALE, "still not here")
        assert (sink.code, str(sink.error)) == ("UNAVAILABLE", "still not here")
        assert bench.router.stats.retried == 1
        bench.check_at_rest()
        bench.router.close()

    run_virtually(scenario)


def test_a_version_that_is_gone_from_the_newer_epoch_is_not_replaced_by_another() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, (plain(version=1), {"unit": [["a"]]})))
        sink = bench.ask_x(5)
        await turns()
        await bench.router.adopt(epoch(2, (plain(version=2), {"unit": [["a"]]})))
        bench.actors["a"].take().refuse(STALE, "unloaded")
        assert (sink.code, str(sink.error)) == ("UNAVAILABLE", "unloaded")
        bench.check_at_rest()
        bench.router.close()

    run_virtually(scenario)


def test_a_retry_starts_from_the_beginning_so_parts_of_two_epochs_never_meet() -> None:
    """Half of a look-up came in the first epoch; all of the answer is of the second."""
    table = table_unit(sizes=(4, 4))

    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, (look_up(table), {"unit": [["a"], ["b"]]})))
        sink = bench.ask_ids(0, 7)
        await turns()
        bench.actors["a"].take().answer(floats(111, 111).reshape(1, 2))
        await bench.router.adopt(epoch(2, (look_up(table), {"unit": [["a"], ["b"]]})))
        bench.actors["b"].take().refuse(STALE)
        await turns()
        for name in ("a", "b"):
            asked = bench.actors[name].take()
            assert asked.header.epoch == 2
            asked.answer(rows_of(table)[asked.arrays[0].astype(int)])
        assert sink.answer.tolist() == rows_of(table)[[0, 7]].tolist()
        bench.check_at_rest()
        bench.router.close()

    run_virtually(scenario)


def test_a_part_of_the_first_try_is_never_an_answer_of_the_second() -> None:
    x = {"x": Spec(("b",))}
    outputs = {"one": Spec(("b",)), "two": Spec(("b",))}
    nodes = [("first", {"x": "in:x"}), ("second", {"x": "in:x"})]
    units = {"first": map_unit("first"), "second": map_unit("second")}
    found = manifest(units, nodes, x, outputs, {"one": "0:y", "two": "1:y"})
    placement = {"first": [["a"]], "second": [["b"]]}

    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, (found, placement)))
        sink = bench.ask_x(1)
        await turns()
        bench.actors["a"].take().answer(floats(111))
        bench.actors["b"].take().refuse(STALE)
        await turns()
        bench.actors["b"].take().answer(floats(2))
        assert not sink.is_told, "the first node's rows of the first try were used"
        bench.actors["a"].take().answer(floats(1))
        assert sink.outputs is not None
        assert {name: rows.tolist() for name, rows in sink.outputs.items()} == {
            "one": [1.0], "two": [2.0],
        }  # fmt: skip
        bench.router.close()

    run_virtually(scenario)
