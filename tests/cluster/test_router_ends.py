"""Requests that nobody waits for any more: cancelled by their client, or past their deadline."""

from __future__ import annotations

import pytest

from tests.cluster.routing_fakes import (
    AB,
    Bench,
    VirtualLoop,
    doubled,
    epoch,
    floats,
    plain,
    run_virtually,
    sleep_ms,
    turns,
)

# Cancelling


def test_a_cancelled_request_ends_once_and_its_rows_are_called_back() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, (plain(), {"unit": [["a"]]})))
        sink, other = bench.ask_x(1), bench.ask_x(2)
        await turns()
        assert sink.request is not None
        bench.router.cancel(sink.request)
        assert sink.code == "CANCELLED"
        await turns()
        first, second = bench.actors["a"].asked
        assert bench.actors["a"].link.cancelled == [first.item.request]
        first.answer(floats(10))
        second.answer(floats(20))
        assert other.answer.tolist() == [20]
        stats = bench.router.stats
        assert (stats.cancelled, stats.failed, stats.late_replies) == (1, 1, 1)
        bench.check_at_rest()
        bench.router.close()

    run_virtually(scenario)


def test_a_request_that_has_ended_is_not_cancelled() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, (plain(), {"unit": [["a"]]})))
        sink = bench.ask_x(1)
        await turns()
        doubled(bench.actors["a"].take())
        assert sink.request is not None
        bench.router.cancel(sink.request)
        assert sink.answer.tolist() == [2]
        assert bench.router.stats.cancelled == 0
        assert bench.ask({"x": floats()}).request is None, "refused, and yet it can be cancelled"
        bench.check_at_rest()
        bench.router.close()

    run_virtually(scenario)


# Deadlines


def test_a_deadline_ends_a_request_within_a_tick_and_cancels_its_call() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, (plain(), {"unit": [["a"]]})))
        began = loop.time()
        sink = bench.ask_x(1, timeout_s=0.25)
        while not sink.is_told:
            await sleep_ms(1)
        assert sink.code == "DEADLINE_EXCEEDED"
        assert 0.25 <= loop.time() - began <= 0.262
        await turns()
        actor = bench.actors["a"]
        assert actor.link.cancelled == [actor.take().item.request]
        assert (bench.router.stats.expired, bench.router.stats.failed) == (1, 1)
        bench.check_at_rest()
        bench.router.close()

    run_virtually(scenario)


@pytest.mark.parametrize("timeouts", [(5.0, 0.1), (0.1, 5.0), (1.0, 0.01, 3.0, 0.02)])
def test_every_deadline_fires_whatever_order_they_came_in(timeouts: tuple[float, ...]) -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, (plain(), {"unit": [["a"]]})))
        began = loop.time()
        sinks = {timeout: bench.ask_x(1, timeout_s=timeout) for timeout in timeouts}
        for timeout in sorted(timeouts):
            assert not sinks[timeout].is_told
            await sleep_ms((timeout + 0.012 - (loop.time() - began)) * 1000)
            assert sinks[timeout].code == "DEADLINE_EXCEEDED"
        bench.check_at_rest()
        bench.router.close()

    run_virtually(scenario)


def test_a_request_whose_deadline_is_past_ends_at_once() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, (plain(), AB)))
        sink = bench.ask_x(1, timeout_s=-1.0)
        await sleep_ms(6)
        assert sink.code == "DEADLINE_EXCEEDED"
        bench.check_at_rest()
        bench.router.close()

    run_virtually(scenario)


def test_an_answer_after_the_deadline_is_dropped_and_counted() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, (plain(), {"unit": [["a"]]})))
        sink = bench.ask_x(1, timeout_s=0.1)
        await sleep_ms(200)
        assert sink.code == "DEADLINE_EXCEEDED"
        doubled(bench.actors["a"].take())
        assert bench.router.stats.late_replies == 1
        bench.check_at_rest()
        bench.router.close()

    run_virtually(scenario)
