"""Requests of several units: graphs walked, look-ups fanned out and put together again."""

from __future__ import annotations

import numpy as np

from batching.errors import Code
from shards.specs import Spec
from tests.cluster.routing_fakes import (
    Bench,
    VirtualLoop,
    epoch,
    floats,
    host_unit,
    look_up,
    manifest,
    map_unit,
    rows_of,
    run_virtually,
    sentence_model,
    sleep_ms,
    table_unit,
    turns,
)

# Graphs


def test_a_graph_is_walked_unit_by_unit() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, sentence_model()))
        sink = bench.ask({"text": np.array([b"a", b"bb"], object)})
        await turns()
        asked = bench.actors["h"].take()
        assert asked.arrays[0].tolist() == [b"a", b"bb"]
        asked.answer(np.array([1, 5], np.int64))
        await turns()
        table = rows_of(table_unit())
        for name in ("s", "t"):
            part = bench.actors[name].take()
            part.answer(table[part.arrays[0].astype(int)])
        await turns()
        last = bench.actors["d"].take()
        assert last.arrays[0].tolist() == table[[1, 5]].tolist()
        last.answer(last.arrays[0].sum(axis=1))
        assert sink.answer.tolist() == table[[1, 5]].sum(axis=1).tolist()
        bench.check_at_rest()
        bench.router.close()

    run_virtually(scenario)


def test_a_device_is_told_that_another_unit_ran_before() -> None:
    row = {"x": Spec(("b",))}
    nodes = [("first", {"x": "in:x"}), ("second", {"x": "0:y"})]
    units = {"first": map_unit("first"), "second": map_unit("second")}
    found = manifest(units, nodes, row, {"y": Spec(("b",))}, {"y": "1:y"})

    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, (found, {"first": [["d"]], "second": [["d"]]})))
        sink = bench.ask({"x": floats(1, 2)})
        for unit, op in (("first", "run"), ("second", "later")):
            await turns()
            asked = bench.actors["d"].take()
            assert (asked.header.unit, asked.header.op) == (unit, op)
            asked.answer(asked.arrays[0])
        assert sink.answer.tolist() == [1, 2]
        bench.check_at_rest()
        bench.router.close()

    run_virtually(scenario)


def test_a_look_up_with_nothing_to_ask_as_the_last_node_ends_the_request_once() -> None:
    """All ids that the first unit yields are missing: the second node arrives inside the first."""
    table = table_unit(missing="zero")
    text, rows = {"text": Spec(("b",), "string")}, {"rows": Spec(("b", 2))}
    nodes = [("host", {"text": "in:text"}), ("table", {"ids": "0:ids"})]
    found = manifest({"host": host_unit(), "table": table}, nodes, text, rows, {"rows": "1:rows"})

    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        placement = {"host": [["h"]], "table": [["s"], ["s"], ["s"]]}
        await bench.router.adopt(epoch(1, (found, placement)))
        sink = bench.ask({"text": np.array([b"x"], object)})
        await turns()
        bench.actors["h"].take().answer(np.array([-1], np.int64))
        assert sink.answer.tolist() == [[0.0, 0.0]]
        assert bench.router.stats.missing_rows == 1
        bench.check_at_rest()
        bench.router.close()

    run_virtually(scenario)


def test_a_unit_that_yields_what_the_next_cannot_take_fails_the_request() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, sentence_model()))
        sink = bench.ask({"text": np.array([b"a"], object)})
        await turns()
        bench.actors["h"].take().answer(floats(1.5))
        assert sink.code == "INVALID_ARGUMENT"
        assert "must be integers" in str(sink.error)
        bench.check_at_rest()
        bench.router.close()

    run_virtually(scenario)


def test_one_failed_branch_fails_the_request_and_cancels_the_other() -> None:
    x = {"x": Spec(("b",))}
    outputs = {"one": Spec(("b",)), "two": Spec(("b",))}
    nodes = [("first", {"x": "in:x"}), ("second", {"x": "in:x"})]
    units = {"first": map_unit("first"), "second": map_unit("second")}
    found = manifest(units, nodes, x, outputs, {"one": "0:y", "two": "1:y"})

    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, (found, {"first": [["a"]], "second": [["b"]]})))
        sink = bench.ask_x(1)
        await turns()
        bench.actors["a"].take().refuse(Code.INTERNAL, "it broke")
        await turns()
        assert (sink.code, str(sink.error)) == ("INTERNAL", "it broke")
        other = bench.actors["b"]
        assert other.link.cancelled == [other.take().item.request]
        bench.check_at_rest()
        bench.router.close()

    run_virtually(scenario)


# Tables


def test_a_look_up_asks_every_holder_once_and_puts_rows_back_in_place() -> None:
    table = table_unit(sizes=(4, 3, 5))
    ids = [11, 0, 5, 0, 4, 3, 11]

    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        placement = {"unit": [["a"], ["b"], ["a"]]}
        await bench.router.adopt(epoch(1, (look_up(table), placement)))
        sink = bench.ask_ids(*ids)
        await turns()
        asked = {name: bench.actors[name].take() for name in ("b", "a")}
        assert asked["a"].arrays[0].tolist() == [11, 0, 0, 3, 11]
        assert asked["b"].arrays[0].tolist() == [5, 4]
        assert asked["a"].header.op == "rows"
        for part in asked.values():
            part.answer(rows_of(table)[part.arrays[0].astype(int)])
        assert sink.answer.tolist() == rows_of(table)[ids].tolist()
        bench.check_at_rest()
        bench.router.close()

    run_virtually(scenario)


def test_an_id_that_does_not_exist_fails_the_request_and_asks_nobody() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, (look_up(table_unit()), {"unit": [["a"]] * 3})))
        sink = bench.ask_ids(1, 12)
        assert sink.code == "INVALID_ARGUMENT"
        assert "id 12 is not in a table of 12 rows" in str(sink.error)
        await turns()
        assert not bench.actors["a"].asked
        bench.router.close()

    run_virtually(scenario)


def test_a_partition_that_nobody_holds_fails_the_requests_that_need_it_alone() -> None:
    table = table_unit(sizes=(4, 4))

    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        bench.actors["b"].is_away = True
        placement = {"unit": [["a"], ["b"]]}
        await bench.router.adopt(epoch(1, (look_up(table), placement)), timeout_s=0.1)
        fine, needs_b = bench.ask_ids(1), bench.ask_ids(1, 6)
        await turns()
        assert needs_b.code == "UNAVAILABLE"
        asked = bench.actors["a"].take()
        asked.answer(rows_of(table)[[1]])
        assert fine.answer.tolist() == rows_of(table)[[1]].tolist()
        bench.check_at_rest()
        bench.router.close()

    run_virtually(scenario)


def test_a_shard_that_does_not_answer_is_an_error_and_never_a_missing_row() -> None:
    table = table_unit(sizes=(4, 4), missing="zero")

    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, (look_up(table), {"unit": [["a"], ["b"]]})))
        sink = bench.ask_ids(1, 6, timeout_s=0.2)
        await turns()
        bench.actors["a"].take().answer(rows_of(table)[[1]])
        await sleep_ms(300)
        assert sink.code == "DEADLINE_EXCEEDED"
        assert bench.router.stats.missing_rows == 0
        bench.router.close()

    run_virtually(scenario)
