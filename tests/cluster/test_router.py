"""The router core over fake links in virtual time: where requests go, and how each ends once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from shards.errors import FrameCorrupt, LinkClosed, LinkFull
from shards.specs import Spec
from tests.cluster.routing_fakes import (
    AB,
    Bench,
    Recorder,
    VirtualLoop,
    doubled,
    epoch,
    floats,
    manifest,
    plain,
    run_virtually,
    sleep_ms,
    table_unit,
    turns,
)

# One request


def test_an_answer_is_the_rows_that_came_back() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, (plain(), AB)))
        sink = bench.ask_x(1, 2, 3)
        await turns()
        doubled(bench.actors["a"].take())
        assert sink.answer.tolist() == [2, 4, 6]
        bench.check_at_rest()
        bench.router.close()

    run_virtually(scenario)


def test_a_call_says_which_unit_epoch_rows_and_time_are_meant() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(7, (plain(), AB)))
        bench.ask_x(1, 2, timeout_s=2.0)
        await turns()
        asked = bench.actors["a"].take()
        assert (asked.header.unit, asked.header.op, asked.header.epoch) == ("map", "run", 7)
        assert (asked.item.rows, asked.item.remaining_us) == (2, 2_000_000)
        bench.router.close()

    run_virtually(scenario)


def test_an_actors_refusal_becomes_the_requests_error() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, (plain(), {"unit": [["a"]]})))
        sink = bench.ask_x(1)
        await turns()
        bench.actors["a"].take().refuse("RESOURCE_EXHAUSTED", "the lane is full", 250)
        assert sink.error is not None
        assert (sink.code, sink.error.message) == ("RESOURCE_EXHAUSTED", "the lane is full")
        assert sink.error.retry_after_ms == 250
        assert bench.router.stats.retried == 0
        bench.check_at_rest()
        bench.router.close()

    run_virtually(scenario)


def test_a_request_without_rows_is_refused_and_reaches_no_actor() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, (plain(), AB)))
        assert bench.ask_x().code == "INVALID_ARGUMENT"
        await turns()
        assert not bench.actors["a"].asked
        assert bench.router.stats.accepted == 0
        bench.router.close()

    run_virtually(scenario)


def test_beyond_the_bound_requests_are_refused_and_below_it_taken_again() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop, in_flight_max=2)
        await bench.router.adopt(epoch(1, (plain(), AB)))
        first, second, third = bench.ask_x(1), bench.ask_x(2), bench.ask_x(3)
        assert third.code == "RESOURCE_EXHAUSTED"
        assert third.error is not None
        assert third.error.retry_after_ms > 0
        assert (bench.router.in_flight, bench.router.stats.refused) == (2, 1)
        await turns()
        doubled((bench.actors["a"].asked + bench.actors["b"].asked)[0])
        assert bench.ask_x(4).error is None
        assert [first.is_told, second.is_told].count(True) == 1
        bench.router.close()

    run_virtually(scenario)


def test_without_a_reachable_actor_a_request_fails_at_once_and_names_them() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        bench.actors["a"].is_away = bench.actors["b"].is_away = True
        await bench.router.adopt(epoch(1, (plain(), AB)), timeout_s=0.5)
        sink = bench.ask_x(1)
        assert sink.code == "UNAVAILABLE"
        assert "a, b" in str(sink.error)
        bench.check_at_rest()
        bench.router.close()

    run_virtually(scenario)


def test_a_signature_that_returns_its_input_is_answered() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        x = {"x": Spec(("b",))}
        echo = manifest({}, [], x, {"y": Spec(("b",))}, {"y": "in:x"})
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, (echo, {})))
        assert bench.ask_x(1, 2).answer.tolist() == [1, 2]
        bench.check_at_rest()
        bench.router.close()

    run_virtually(scenario)


def test_a_sink_that_raises_harms_no_request_of_the_same_frame() -> None:
    class Broken(Recorder):
        def done(self, outputs: Any, frame: Any) -> None:
            raise RuntimeError("a bug of the door")

    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, (plain(), {"unit": [["a"]]})))
        x = {"x": floats(1)}
        bench.router.submit(bench.plan(), x, 1, loop.time() + 1, Broken())
        sink = bench.ask_x(2)
        await turns()
        first, second = bench.actors["a"].asked
        items = [(first.item.request, 1), (second.item.request, 1)]
        first.link.reply(items, [floats(10, 20)], "map")
        assert sink.answer.tolist() == [20]
        bench.check_at_rest()
        bench.router.close()

    run_virtually(scenario)


# Whom to ask


def test_the_replica_with_the_fewest_calls_under_way_is_asked() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, (plain(), AB)))
        a, b = bench.actors["a"], bench.actors["b"]
        for number in range(6):
            bench.ask_x(number)
        await turns()
        assert (len(a.asked), len(b.asked)) == (3, 3)
        doubled(b.take())
        doubled(b.take())
        bench.ask_x(6)
        await turns()
        assert (len(a.asked), len(b.asked)) == (3, 2)
        bench.router.close()

    run_virtually(scenario)


def test_a_replica_that_is_away_is_not_asked() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        bench.actors["a"].is_away = True
        await bench.router.adopt(epoch(1, (plain(), AB)), timeout_s=0.1)
        sinks = [bench.ask_x(number) for number in range(3)]
        await turns()
        for asked in bench.actors["b"].asked:
            doubled(asked)
        assert [sink.answer.tolist() for sink in sinks] == [[0], [2], [4]]
        bench.router.close()

    run_virtually(scenario)


# Losses and retries


def test_a_lost_peers_requests_are_retried_once_on_another_replica() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, (plain(), AB)))
        sink = bench.ask_x(3)
        await turns()
        bench.actors["a"].link.break_off()
        await turns()
        assert not sink.is_told
        doubled(bench.actors["b"].take())
        assert sink.answer.tolist() == [6]
        assert bench.router.stats.retried == 1
        bench.check_at_rest()
        bench.router.close()

    run_virtually(scenario)


def test_a_request_that_loses_two_peers_fails_with_the_second_loss() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, (plain(), {"unit": [["a", "b", "c"]]})))
        sink = bench.ask_x(3)
        await turns()
        bench.actors["a"].link.break_off()
        await turns()
        bench.actors["b"].link.break_off(FrameCorrupt("nonsense"))
        assert sink.code == "UNAVAILABLE"
        assert "actor b was lost: nonsense" in str(sink.error)
        assert not bench.actors["c"].asked
        bench.router.close()

    run_virtually(scenario)


def test_without_another_replica_a_lost_peers_request_fails() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, (plain(), {"unit": [["a"]]})))
        sink = bench.ask_x(3)
        await turns()
        bench.actors["a"].link.break_off()
        assert sink.code == "UNAVAILABLE"
        bench.check_at_rest()
        bench.router.close()

    run_virtually(scenario)


def test_after_a_loss_with_several_calls_the_peer_is_chosen_by_its_true_load() -> None:
    """Two look-ups of one request on one peer: losing both must not make its count negative."""
    ids = {"ids": Spec(("b",), "int64")}
    first, second = table_unit("first"), table_unit("second")
    outputs = {"one": Spec(("b", 2)), "two": Spec(("b", 2))}
    nodes = [("first", {"ids": "in:ids"}), ("second", {"ids": "in:ids"})]
    both = manifest(
        {"first": first, "second": second}, nodes, ids, outputs, {"one": "0:rows", "two": "1:rows"}
    )
    parts = [["a"], ["a"], ["a"]]

    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, (both, {"first": parts, "second": parts})))
        sink = bench.ask_ids(1, 2)
        await turns()
        assert len(bench.actors["a"].asked) == 2
        bench.actors["a"].link.break_off()
        assert sink.code == "UNAVAILABLE"
        bench.check_at_rest()
        bench.router.close()

    run_virtually(scenario)


def test_a_frame_that_a_full_link_does_not_take_fails_its_requests_and_no_others() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, (plain(), AB)))
        bench.actors["a"].link.refuses = LinkFull("the peer does not read")
        sinks = [bench.ask_x(number) for number in range(4)]
        await turns()
        for asked in bench.actors["b"].asked:
            doubled(asked)
        codes = [sink.code if sink.error else "OK" for sink in sinks]
        assert codes == ["RESOURCE_EXHAUSTED", "OK", "RESOURCE_EXHAUSTED", "OK"]
        bench.check_at_rest()
        bench.router.close()

    run_virtually(scenario)


def test_a_link_that_closes_under_the_send_means_another_replica_is_asked() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, (plain(), AB)))
        bench.actors["a"].link.close()  # the router hears of it a turn later
        sink = bench.ask_x(2)
        await turns()
        doubled(bench.actors["b"].take())
        assert sink.answer.tolist() == [4]
        bench.check_at_rest()
        bench.router.close()

    run_virtually(scenario)


def test_a_send_into_a_closing_link_means_another_replica_is_asked() -> None:
    """A real link tells of its end only when what it still had to say is said."""

    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, (plain(), AB)))
        bench.actors["a"].link.refuses = LinkClosed("closing")
        sink = bench.ask_x(2)
        await turns()
        doubled(bench.actors["b"].take())
        assert sink.answer.tolist() == [4]
        bench.check_at_rest()
        bench.router.close()

    run_virtually(scenario)


# Wrong answers


def ask_and_answer(give: Any) -> tuple[Recorder, Bench]:
    async def scenario(loop: VirtualLoop) -> tuple[Recorder, Bench]:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, (plain(), {"unit": [["a"]]})))
        sink = bench.ask_x(1, 2)
        await turns()
        give(bench.actors["a"].take())
        bench.check_at_rest()
        bench.router.close()
        return sink, bench

    return run_virtually(scenario)


@pytest.mark.parametrize(
    "give",
    [
        pytest.param(lambda a: a.answer(floats(1, 2), unit="another"), id="another unit"),
        pytest.param(lambda a: a.answer(floats(1), rows=1), id="fewer rows"),
        pytest.param(lambda a: a.answer(floats(1, 2, 3), rows=3), id="more rows"),
        pytest.param(lambda a: a.answer(floats(1)), id="fewer rows than announced"),
        pytest.param(lambda a: a.answer(floats(1, 2, 3)), id="more rows than announced"),
        pytest.param(lambda a: a.answer(np.float32(1.0)), id="a scalar"),
        pytest.param(lambda a: a.answer(), id="no tensor"),
        pytest.param(lambda a: a.answer(floats(1, 2), floats(3, 4)), id="two tensors"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_is_refused(give: Any) -> None:
    sink, _ = ask_and_answer(give)
    assert sink.code == "INTERNAL"


def test_an_error_of_an_unknown_code_is_internal() -> None:
    sink, _ = ask_and_answer(lambda asked: asked.refuse("MADE_UP", "text"))
    assert sink.code == "INTERNAL"


def test_an_answer_to_nobody_is_counted_and_dropped() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, (plain(), AB)))
        sink = bench.ask_x(1)
        await turns()
        bench.actors["a"].link.reply([(999, 1)], [floats(1)], "map")
        assert not sink.is_told
        assert bench.router.stats.late_replies == 1
        bench.router.close()

    run_virtually(scenario)


# The end


def test_close_fails_what_is_under_way_and_closes_every_link() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, (plain(), AB)))
        sinks = [bench.ask_x(number) for number in range(3)]
        await turns()
        bench.router.close()
        assert {sink.code for sink in sinks} == {"UNAVAILABLE"}
        bench.check_at_rest()
        await turns()
        assert not any(bench.actors[name].link.is_open() for name in ("a", "b"))
        await sleep_ms(60_000)
        assert len(bench.actors["a"].links) == 1

    run_virtually(scenario)


def test_a_request_after_close_is_refused() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, (plain(), AB)))
        bench.router.close()
        assert bench.ask_x(1).code == "UNAVAILABLE"
        bench.check_at_rest()

    run_virtually(scenario)
