"""Replicas of a look-up's parts: one that breaks is replaced, one that is late hedged."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tests.cluster.routing_actors import Asked, FakeActor
from tests.cluster.routing_fakes import (
    Bench,
    Recorder,
    VirtualLoop,
    epoch,
    floats,
    look_up,
    rows_of,
    run_virtually,
    sentence_model,
    sleep_ms,
    table_unit,
    turns,
)

TABLE = table_unit(sizes=(4, 4))
ROWS = rows_of(TABLE)
#: Two partitions of two replicas each.
TWICE = {"unit": [["a", "b"], ["c", "d"]]}


async def serving(loop: VirtualLoop, placement: object = None) -> Bench:
    bench = Bench(loop)
    await bench.router.adopt(epoch(1, (look_up(TABLE), placement or TWICE)))  # type: ignore[arg-type]
    return bench


def answer(asked: Asked) -> None:
    asked.answer(ROWS[asked.arrays[0]])


def answer_all(bench: Bench) -> None:
    for actor in bench.actors:
        while actor.asked:
            answer(actor.take())


async def learned(bench: Bench, count: int = 100) -> None:
    """Answers of 4 ms, from which it is learned what is late: 8 ms and a little more."""
    for _ in range(count):
        sink = bench.ask_ids(0, 4)
        await sleep_ms(4)
        answer_all(bench)
        assert sink.answer.shape == (2, 2)


def asked_of(bench: Bench, *names: str) -> FakeActor:
    """Which of these has been asked."""
    [found] = [bench.actors[name] for name in names if bench.actors[name].asked]
    return found


def other_of(bench: Bench, actor: FakeActor) -> FakeActor:
    return bench.actors[{"a": "b", "b": "a", "c": "d", "d": "c"}[actor.name]]


async def half_answered(bench: Bench) -> tuple[Recorder, FakeActor]:
    """A request of which one part is there, and who owes the other."""
    sink = bench.ask_ids(5, 1)
    await turns()
    answer(asked_of(bench, "c", "d").take())
    return sink, asked_of(bench, "a", "b")


def test_the_first_answer_to_a_late_part_wins_and_the_other_replica_is_told() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = await serving(loop)
        await learned(bench)
        sink, late = await half_answered(bench)
        await sleep_ms(7)
        assert not other_of(bench, late).asked
        await sleep_ms(5)
        first, second = late.take(), other_of(bench, late).take()
        np.testing.assert_array_equal(first.arrays[0], second.arrays[0])
        answer(second)
        np.testing.assert_array_equal(sink.answer, ROWS[[5, 1]])
        await turns()
        assert late.link.cancelled == [first.item.request]
        answer(first)
        stats = bench.router.stats
        assert (stats.hedged, stats.hedges_won, stats.late_replies) == (1, 1, 1)
        bench.check_at_rest()

    run_virtually(scenario)


def test_the_replica_that_was_late_may_still_be_first() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = await serving(loop)
        await learned(bench)
        sink, late = await half_answered(bench)
        await sleep_ms(12)
        answer(late.take())
        np.testing.assert_array_equal(sink.answer, ROWS[[5, 1]])
        await turns()
        other = other_of(bench, late)
        assert other.link.cancelled == [other.take().item.request]
        assert (bench.router.stats.hedged, bench.router.stats.hedges_won) == (1, 0)
        bench.check_at_rest()

    run_virtually(scenario)


@pytest.mark.parametrize("breaks", ["first", "second", "refuses"])
def test_one_of_two_that_were_asked_may_fail(breaks: str) -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = await serving(loop)
        await learned(bench)
        sink, late = await half_answered(bench)
        await sleep_ms(12)
        other = other_of(bench, late)
        if breaks == "refuses":
            other.take().refuse("RESOURCE_EXHAUSTED", "busy", 8)
            left = late
        elif breaks == "second":
            other.link.break_off()
            left = late
        else:
            late.link.break_off()
            left = other
        assert not sink.is_told
        answer(left.take())
        np.testing.assert_array_equal(sink.answer, ROWS[[5, 1]])
        assert bench.router.stats.retried == 0
        bench.check_at_rest()

    run_virtually(scenario)


def test_without_replicas_nothing_is_asked_twice() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = await serving(loop, {"unit": [["a"], ["c"]]})
        await learned(bench)
        sink = bench.ask_ids(1)
        await sleep_ms(500)
        assert not sink.is_told
        assert len(bench.actors["a"].asked) == 1
        answer_all(bench)
        assert bench.router.stats.hedged == 0
        bench.check_at_rest()

    run_virtually(scenario)


def test_a_replica_that_breaks_is_replaced_for_its_part_alone() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = await serving(loop)
        sink, broken = await half_answered(bench)
        broken.is_away = True
        broken.link.break_off()
        await turns()
        answer(other_of(bench, broken).take())
        np.testing.assert_array_equal(sink.answer, ROWS[[5, 1]])
        stats = bench.router.stats
        assert (stats.replaced, stats.retried) == (1, 0)
        assert not any(actor.asked for actor in bench.actors if actor is not broken)
        bench.check_at_rest()

    run_virtually(scenario)


def test_when_all_replicas_break_a_request_ends_with_unavailable() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = await serving(loop)
        sink, _ = await half_answered(bench)
        for name in ("a", "b"):
            bench.actors[name].is_away = True
        for name in ("a", "b"):
            bench.actors[name].link.break_off()
        assert sink.code == "UNAVAILABLE"
        bench.check_at_rest()

    run_virtually(scenario)


def test_a_late_part_ends_at_its_deadline_and_nothing_is_left() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = await serving(loop)
        await learned(bench)
        sink = bench.ask_ids(1, timeout_s=0.1)
        await sleep_ms(200)
        assert sink.code == "DEADLINE_EXCEEDED"
        assert "(of a, b)" in str(sink.error)  # both replicas of the shard that was asked
        assert bench.router.stats.hedged == 1
        bench.check_at_rest()

    run_virtually(scenario)


@pytest.mark.parametrize("seed", range(3))
def test_under_losses_and_late_answers_every_request_ends_once(seed: int) -> None:
    """One replica of each partition dies now and then: no request fails, hedges keep in budget."""

    async def scenario(loop: VirtualLoop) -> None:
        chance = random.Random(seed)
        bench = await serving(loop)
        sinks: list[Recorder] = []

        def soon(asked: Asked) -> None:
            late_ms = 50 if chance.random() < 0.02 else chance.uniform(1, 3)
            loop.call_later(late_ms / 1000, answer, asked)

        for turn in range(2000):
            sinks.append(bench.ask_ids(chance.randrange(8), chance.randrange(8)))
            if turn % 400 == 399:  # one at a time: its fellow is up
                bench.actors[chance.choice("abcd")].link.break_off()
            await sleep_ms(2)
            for actor in bench.actors:
                while actor.asked:
                    soon(actor.take())
        await sleep_ms(200)
        for actor in bench.actors:
            while actor.asked:
                answer(actor.take())
        stats = bench.router.stats
        assert stats.answered == len(sinks)
        assert all(sink.is_told for sink in sinks)
        assert 0 < stats.hedged <= 0.03 * 2 * len(sinks)
        assert stats.hedges_won > 0
        bench.check_at_rest()

    run_virtually(scenario)


def test_a_replica_that_was_late_is_avoided_until_it_answers_or_a_while_has_passed() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = await serving(loop)
        await learned(bench)
        for it_answers in (True, False):
            _, late = await half_answered(bench)
            await sleep_ms(14)
            other = other_of(bench, late)
            owed, second = late.take(), other.take()
            answer(second)
            await turns()
            # Both are idle as far as calls under way tell, whichever the epoch names first.
            for _ in range(2):
                bench.ask_ids(0)
                await turns()
                assert not late.asked
                answer(other.take())
                await turns()
            if it_answers:
                answer(owed)
                await turns()
            else:
                await sleep_ms(251)
            for _ in range(4):  # more than it would get that is not thought late
                bench.ask_ids(0)
                await turns()
            assert late.asked
            answer_all(bench)

    run_virtually(scenario)


def owed(bench: Bench) -> dict[str, int]:
    return {peer.endpoint.actor: peer.pace.owed for peer in bench.router.peers}


@pytest.mark.parametrize("end", ["answered", "cancelled", "expired", "hedged", "lost"])
def test_no_replica_owes_anything_once_a_request_has_ended(end: str) -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = await serving(loop)
        await learned(bench)
        sink, asked = await half_answered(bench)
        assert owed(bench)[asked.name] > 0
        if end == "answered":
            answer(asked.take())
        elif end == "cancelled":
            assert sink.request is not None
            bench.router.cancel(sink.request)
        elif end == "expired":
            await sleep_ms(11_000)
        elif end == "hedged":
            await sleep_ms(12)
            answer(other_of(bench, asked).take())
        else:
            asked.link.break_off()
            await turns()
            answer(other_of(bench, asked).take())
        assert sink.is_told
        assert set(owed(bench).values()) == {0}
        bench.check_at_rest()

    run_virtually(scenario)


def test_a_replica_that_answers_late_without_being_hedged_is_asked_less() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = await serving(loop, {"unit": [["a", "b"], ["c"]]})
        asked = {"a": 0, "b": 0}
        for _ in range(40):
            bench.ask_ids(0)
            await sleep_ms(2)
            for name in asked:
                for part in [bench.actors[name].take() for _ in bench.actors[name].asked]:
                    asked[name] += 1
                    loop.call_later(0.0 if name == "b" else 0.006, answer, part)
        await sleep_ms(10)
        assert asked["b"] > 3 * asked["a"] > 0
        bench.check_at_rest()

    run_virtually(scenario)


def test_partitions_of_the_same_replicas_are_asked_of_the_same_one() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = await serving(loop, {"unit": [["a", "b"], ["a", "b"]]})
        for _ in range(4):
            bench.ask_ids(0, 5)
            await turns()
            assert len(asked_of(bench, "a", "b").asked) == 1
            answer_all(bench)
        bench.check_at_rest()

    run_virtually(scenario)


async def before_a_slow_device(loop: VirtualLoop) -> Bench:
    """A sentence's ids, looked up on either of two replicas, and a device that needs 20 ms."""
    found, placement = sentence_model()
    bench = Bench(loop)
    await bench.router.adopt(epoch(1, (found, {**placement, "table": [["s", "t"]] * 3})))
    for _ in range(200):
        sink = ask_sentence(bench)
        await turns()
        answer_ids(bench)
        await turns()
        asked_of(bench, "s", "t").take().answer(floats(1, 2)[None])
        await sleep_ms(20)
        bench.actors["d"].take().answer(floats(3))
        assert sink.answer.tolist() == [3]
    return bench


def ask_sentence(bench: Bench) -> Recorder:
    return bench.ask({"text": np.array([b"x"], object)}, timeout_s=0.1)


def answer_ids(bench: Bench) -> None:
    bench.actors["h"].take().answer(np.array([1], np.int64))


@pytest.mark.parametrize("code", ["DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"])
def test_a_part_that_a_replica_does_not_do_in_its_time_is_asked_of_another(code: str) -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = await before_a_slow_device(loop)
        sink = ask_sentence(bench)
        await turns()
        answer_ids(bench)
        await turns()
        first = asked_of(bench, "s", "t")
        part = first.take()
        # What the device needs is kept for it.
        assert 79_000 <= part.item.remaining_us <= 80_100
        await sleep_ms(30)
        part.refuse(code, "no", 8)
        await turns()
        second = asked_of(bench, "s", "t")
        assert second is not first
        second.take().answer(floats(1, 2)[None])
        await turns()
        bench.actors["d"].take().answer(floats(3))
        assert sink.answer.tolist() == [3]
        assert bench.router.stats.replaced == 1
        bench.check_at_rest()

    run_virtually(scenario)


def test_a_part_that_no_replica_does_in_its_time_fails_and_names_who_was_asked_last() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = await before_a_slow_device(loop)
        sink = ask_sentence(bench)
        await turns()
        answer_ids(bench)
        for _ in range(2):
            await turns()
            last = asked_of(bench, "s", "t")
            last.take().refuse("DEADLINE_EXCEEDED")
        assert sink.code == "RESOURCE_EXHAUSTED"
        assert f"actor {last.name} left too little time" in str(sink.error)
        bench.check_at_rest()

    run_virtually(scenario)


@pytest.mark.parametrize("wrong", [{"plan": "0" * 64}, {"unit": "another"}])
def test_a_part_of_another_plan_or_unit_is_never_merged_and_everybody_else_is_told_to_stop(
    wrong: dict[str, str],
) -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = await serving(loop)
        await learned(bench)
        sink = bench.ask_ids(5, 1)
        await sleep_ms(12)
        assert bench.router.stats.hedged == 2
        wanted = {actor.name: actor.take() for actor in bench.actors}
        wanted["a"].answer(ROWS[wanted["a"].arrays[0]], **wrong)  # type: ignore[arg-type]
        assert sink.code == "INTERNAL"
        assert "actor a " in str(sink.error)
        await turns()
        for name in ("b", "c", "d"):
            assert bench.actors[name].link.cancelled == [wanted[name].item.request]
        assert bench.router.stats.mismatched == 1
        bench.check_at_rest()

    run_virtually(scenario)
