"""What a router makes of what devices say of themselves: whom it asks, and whom it turns away."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from batching.allowance import BEST_EFFORT, DEFAULT
from batching.busyness import FRESH_S, PROBE_S, Busyness, News
from shards.specs import Spec
from shards.wire import LATER
from tests.cluster.routing_actors import Asked
from tests.cluster.routing_fakes import (
    AB,
    Bench,
    VirtualLoop,
    doubled,
    epoch,
    floats,
    manifest,
    map_unit,
    plain,
    run_virtually,
    sleep_ms,
    turns,
)

ONE = {"unit": [["a"]]}
WHOSE = ("unit", "model", 1)


async def serving(loop: VirtualLoop, *versions: Any) -> Bench:
    bench = Bench(loop)
    await bench.router.adopt(epoch(1, *versions))
    return bench


def answer(asked: Asked, wait_ms: float, row_ms: float = 1.0) -> None:
    """Answer, and say how long others will have to wait."""
    asked.answer(asked.arrays[0] * 2, news=(int(1000 * wait_ms), int(1000 * row_ms)))


async def told(bench: Bench, actor: str, wait_ms: float, row_ms: float = 1.0) -> None:
    """Some request is answered by an actor, which says how busy it is."""
    before = len(bench.actors[actor].asked)
    assert not before, "the test has not taken what was asked"
    recorders = []
    while not bench.actors[actor].asked:
        recorders.append(bench.ask_x(0.0))
        await turns()
    for fake in bench.actors:
        for asked in list(fake.asked):
            fake.asked.remove(asked)
            if fake.name == actor:
                answer(asked, wait_ms, row_ms)
            else:
                doubled(asked)
    assert all(each.is_told for each in recorders)


# One device


def test_who_could_not_be_in_time_is_turned_away_at_once_and_told_when_he_would_be() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = await serving(loop, (plain(), ONE))
        await told(bench, "a", wait_ms=50.0)
        early = bench.ask_x(1.0, timeout_s=0.030)
        late = bench.ask_x(2.0, timeout_s=0.060)
        assert early.error is not None
        assert (early.code, early.error.retry_after_ms) == ("RESOURCE_EXHAUSTED", 20)
        await turns()
        [asked] = bench.actors["a"].asked
        doubled(asked)
        assert late.answer.tolist() == [4.0]
        assert bench.router.stats.turned_away == 1
        bench.check_at_rest()

    run_virtually(scenario)


def test_after_the_time_that_he_was_told_he_is_not_turned_away() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = await serving(loop, (plain(), ONE))
        await told(bench, "a", wait_ms=50.0)
        first = bench.ask_x(1.0, timeout_s=0.045)
        assert first.error is not None
        await sleep_ms(first.error.retry_after_ms)
        second = bench.ask_x(1.0, timeout_s=0.0451)
        await turns()
        assert not second.is_told
        assert len(bench.actors["a"].asked) == 1

    run_virtually(scenario)


def test_one_goes_through_now_and_then_and_brings_news() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = await serving(loop, (plain(), ONE))
        await told(bench, "a", wait_ms=90.0)
        through: list[float] = []
        for tick in range(30):
            found = bench.ask_x(1.0, timeout_s=0.020)
            await turns()
            if not found.is_told:
                through.append(tick)
            await sleep_ms(1)
        gaps = [after - before for before, after in pairwise(through)]
        assert through
        assert all(gap == pytest.approx(1000 * PROBE_S, abs=1) for gap in gaps)
        answer(bench.actors["a"].take(), wait_ms=0.0)
        found = bench.ask_x(1.0, timeout_s=0.020)
        await turns()
        assert not found.is_told  # it is with the device

    run_virtually(scenario)


def test_old_news_turns_nobody_away() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = await serving(loop, (plain(), ONE))
        await told(bench, "a", wait_ms=10_000.0)
        await sleep_ms(1000 * FRESH_S + 1)
        for _ in range(3):
            assert not bench.ask_x(1.0, timeout_s=0.020).is_told

    run_virtually(scenario)


def test_after_a_refusal_no_other_like_it_is_sent_until_it_would_be_in_time() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = await serving(loop, (plain(), ONE))
        first = bench.ask_x(1.0, timeout_s=0.050)
        await turns()
        bench.actors["a"].take().refuse("RESOURCE_EXHAUSTED", "busy", 8)
        assert first.code == "RESOURCE_EXHAUSTED"
        await sleep_ms(3)
        second = bench.ask_x(1.0, timeout_s=0.050)
        assert second.error is not None
        assert (second.code, second.error.retry_after_ms) == ("RESOURCE_EXHAUSTED", 5)
        patient = bench.ask_x(1.0, timeout_s=0.070)
        await sleep_ms(5.1)
        third = bench.ask_x(1.0, timeout_s=0.050)
        await turns()
        assert not patient.is_told
        assert not third.is_told
        assert len(bench.actors["a"].asked) == 2

    run_virtually(scenario)


def test_what_one_servable_is_told_says_nothing_of_another_on_the_same_unit() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = await serving(loop, (plain("flood"), ONE), (plain("model"), ONE))
        flood = bench.ask({"x": floats(1.0)}, name="flood", timeout_s=0.050)
        await turns()
        bench.actors["a"].take().refuse("RESOURCE_EXHAUSTED", "busy", 80)
        assert flood.is_told
        assert bench.ask({"x": floats(1.0)}, name="flood", timeout_s=0.050).is_told
        other = bench.ask({"x": floats(1.0)}, name="model", timeout_s=0.050)
        await turns()
        doubled(bench.actors["a"].take())
        assert other.answer.tolist() == [2.0]

    run_virtually(scenario)


def test_rows_of_another_criticality_are_not_turned_away_for_it() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = await serving(loop, (plain(), ONE))
        await told(bench, "a", wait_ms=90.0)
        assert bench.ask_x(1.0, timeout_s=0.050).is_told
        for criticality in (DEFAULT, BEST_EFFORT):
            found = bench.ask_x(1.0, timeout_s=0.050, criticality=criticality)
            assert not found.is_told

    run_virtually(scenario)


# Several devices


def test_the_device_that_would_begin_first_is_asked() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = await serving(loop, (plain(), AB))
        await told(bench, "a", wait_ms=40.0)
        await told(bench, "b", wait_ms=5.0)
        for _ in range(20):
            bench.ask_x(1.0)
        await turns()
        assert (len(bench.actors["a"].asked), len(bench.actors["b"].asked)) == (0, 20)

    run_virtually(scenario)


def test_what_was_sent_since_counts() -> None:
    """b would begin 10 ms earlier, and each row puts that off by a millisecond."""

    async def scenario(loop: VirtualLoop) -> None:
        bench = await serving(loop, (plain(), AB))
        await told(bench, "a", wait_ms=20.0, row_ms=1.0)
        await told(bench, "b", wait_ms=10.0, row_ms=1.0)
        for _ in range(30):
            bench.ask_x(1.0)
        await turns()
        assert len(bench.actors["a"].asked) == pytest.approx(10, abs=2)
        assert len(bench.actors["b"].asked) == pytest.approx(20, abs=2)

    run_virtually(scenario)


def test_without_news_the_one_with_fewest_calls_under_way_is_asked() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = await serving(loop, (plain(), AB))
        for _ in range(10):
            bench.ask_x(1.0)
        await turns()
        assert [len(bench.actors[name].asked) for name in "ab"] == [5, 5]

    run_virtually(scenario)


def test_only_where_all_would_refuse_is_a_request_turned_away() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = await serving(loop, (plain(), AB))
        first = bench.ask_x(1.0, timeout_s=0.050)
        await turns()
        refusing = next(fake for fake in bench.actors if fake.asked)
        other = bench.actors["b" if refusing.name == "a" else "a"]
        refusing.take().refuse("RESOURCE_EXHAUSTED", "busy", 60)
        assert not first.is_told
        for _ in range(3):
            assert not bench.ask_x(1.0, timeout_s=0.050).is_told
        await turns()
        assert (len(refusing.asked), len(other.asked)) == (0, 4)
        for _ in range(4):
            other.take().refuse("RESOURCE_EXHAUSTED", "busy", 40)
        last = bench.ask_x(1.0, timeout_s=0.050)
        assert last.error is not None
        assert last.error.retry_after_ms == 40

    run_virtually(scenario)


def of_two(bench: Bench) -> tuple[Any, Any]:
    """The device that has been asked, and the other."""
    asked = next(fake for fake in bench.actors if fake.asked)
    return asked, bench.actors["b" if asked.name == "a" else "a"]


def test_what_a_device_refuses_another_is_asked_for() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = await serving(loop, (plain(), AB))
        sink = bench.ask_x(3.0, timeout_s=0.050)
        await sleep_ms(5)
        refusing, other = of_two(bench)
        refusing.take().refuse("RESOURCE_EXHAUSTED", "busy", 8)
        await turns()
        asked = other.take()
        assert asked.item.remaining_us == pytest.approx(45_000, abs=2)
        doubled(asked)
        assert sink.answer.tolist() == [6.0]
        assert bench.router.stats.elsewhere == 1
        bench.check_at_rest()

    run_virtually(scenario)


def test_no_third_device_is_asked() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = await serving(loop, (plain(), {"unit": [["a", "b", "c"]]}))
        sink = bench.ask_x(1.0, timeout_s=0.050)
        for _ in range(2):
            await turns()
            [asking] = [fake for fake in bench.actors if fake.asked]
            assert not sink.is_told
            asking.take().refuse("RESOURCE_EXHAUSTED", "busy", 8)
        assert sink.error is not None
        assert (sink.code, sink.error.retry_after_ms) == ("RESOURCE_EXHAUSTED", 8)
        await turns()
        assert not any(fake.asked for fake in bench.actors)
        bench.check_at_rest()

    run_virtually(scenario)


def test_a_device_that_would_be_late_is_not_asked_for_what_another_refused() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = await serving(loop, (plain(), AB))
        await told(bench, "a", wait_ms=40.0)
        sink = bench.ask_x(1.0, timeout_s=0.030)
        await turns()
        bench.actors["b"].take().refuse("RESOURCE_EXHAUSTED", "busy", 8)
        assert sink.code == "RESOURCE_EXHAUSTED"
        assert not bench.actors["a"].asked
        bench.check_at_rest()

    run_virtually(scenario)


# Graphs


def chain() -> tuple[Any, Any]:
    """Two map units, one after the other, on a device each."""
    x, y = {"x": Spec(("b",))}, {"y": Spec(("b",))}
    units = {"first": map_unit("first"), "then": map_unit("then", {"x": Spec(("b",))})}
    nodes = [("first", {"x": "in:x"}), ("then", {"x": "0:y"})]
    found = manifest(units, nodes, x, y, {"y": "1:y"})
    return found, {"first": [["a"]], "then": [["b"]]}


async def passed(bench: Bench, first_ms: float, then_ms: float) -> None:
    """One request goes through both units."""
    sink = bench.ask_x(1.0)
    await sleep_ms(first_ms)
    doubled(bench.actors["a"].take())
    await sleep_ms(then_ms)
    doubled(bench.actors["b"].take())
    assert sink.answer.tolist() == [4.0]


def test_a_unit_is_due_so_much_earlier_as_those_after_it_take() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = await serving(loop, chain())
        bench.ask_x(1.0, timeout_s=0.100)
        await turns()
        assert bench.actors["a"].asked[0].item.remaining_us == pytest.approx(100_000, abs=2)
        doubled(bench.actors["a"].take())
        await sleep_ms(20)
        assert bench.actors["b"].asked[0].item.remaining_us == pytest.approx(100_000, abs=2)
        doubled(bench.actors["b"].take())
        bench.ask_x(1.0, timeout_s=0.100)
        await turns()
        assert bench.actors["a"].take().item.remaining_us == pytest.approx(80_000, abs=2)

    run_virtually(scenario)


def test_half_of_what_is_left_is_for_the_unit_itself() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = await serving(loop, chain())
        await passed(bench, 1, 500)
        bench.ask_x(1.0, timeout_s=0.100)
        await turns()
        assert bench.actors["a"].take().item.remaining_us == pytest.approx(50_000, abs=2)

    run_virtually(scenario)


def test_a_request_is_turned_away_before_its_first_unit_if_a_later_one_cannot_take_it() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = await serving(loop, chain())
        sink = bench.ask_x(1.0)
        await turns()
        doubled(bench.actors["a"].take())
        await turns()
        answer(bench.actors["b"].take(), wait_ms=60.0)
        assert sink.is_told
        found = bench.ask_x(1.0, timeout_s=0.050)
        assert found.error is not None
        assert (found.code, found.error.retry_after_ms) == ("RESOURCE_EXHAUSTED", 10)
        await turns()
        assert not bench.actors["a"].asked
        bench.check_at_rest()

    run_virtually(scenario)


def test_a_later_unit_that_a_device_refuses_is_asked_of_another_and_nothing_runs_again() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        found, _ = chain()
        bench = await serving(loop, (found, {"first": [["c"]], "then": [["a", "b"]]}))
        sink = bench.ask_x(1.0)
        await turns()
        doubled(bench.actors["c"].take())
        await turns()
        refusing, other = of_two(bench)
        refusing.take().refuse("RESOURCE_EXHAUSTED", "busy", 8)
        await turns()
        again = other.take()
        assert again.header.op == LATER
        doubled(again)
        assert sink.answer.tolist() == [4.0]
        assert not bench.actors["c"].asked
        bench.check_at_rest()

    run_virtually(scenario)


def test_a_unit_whose_time_is_up_before_the_requests_is_no_passed_deadline() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = await serving(loop, chain())
        await passed(bench, 1, 20)
        sink = bench.ask_x(1.0, timeout_s=0.100)
        await sleep_ms(80)
        bench.actors["a"].take().refuse("DEADLINE_EXCEEDED")
        assert sink.code == "RESOURCE_EXHAUSTED"
        last = bench.ask_x(1.0, timeout_s=0.100)
        await turns()
        doubled(bench.actors["a"].take())
        await turns()
        bench.actors["b"].take().refuse("DEADLINE_EXCEEDED")
        assert last.code == "DEADLINE_EXCEEDED"

    run_virtually(scenario)


# The parts


def test_news_of_many_kinds_is_forgotten_rather_than_kept_for_ever() -> None:
    busyness = Busyness()
    for number in range(10_000):
        busyness.answered((f"unit-{number}", "model", 1), 5, 1, 0.0)
    assert busyness.get(("unit-0", "model", 1)) is None
    assert busyness.get(("unit-9999", "model", 1)) is not None
    assert len(busyness._news) <= 4096


def test_nothing_is_known_of_an_actor_that_never_answered() -> None:
    assert Busyness().get(WHOSE) is None
    news = News()
    assert news.late_s(0.0, 0.0) == 0.0


def test_an_answer_opens_again_what_a_refusal_closed() -> None:
    news = News()
    news.refused(deadline=1.0, retry_s=0.5, now=0.9)
    assert news.late_s(1.2, 0.95) == pytest.approx(0.3)
    news.answered(0.0, 0.001, 0.96)
    assert news.late_s(1.2, 0.97) == 0.0
