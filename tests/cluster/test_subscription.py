"""How a router keeps up with the controller, and does without it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from cluster.epochs import Epoch, encode_epoch
from cluster.subscription import Subscription
from tests.cluster.routing_fakes import (
    Bench,
    VirtualLoop,
    doubled,
    epoch,
    plain,
    run_virtually,
    sleep_ms,
    turns,
)

ONE = {"unit": [["a"]]}


class Controller:
    """Answers polls from a script: epochs, nothing (b""), garbage, or an exception."""

    def __init__(self, loop: VirtualLoop, *script: Epoch | bytes | Exception) -> None:
        self._loop = loop
        self._script = list(script)
        self.polls: list[tuple[str, tuple[int, int], int]] = []
        self.at: list[float] = []

    async def watch(self, name: str, have: tuple[int, int], oldest: int) -> bytes:
        self.polls.append((name, have, oldest))
        self.at.append(self._loop.time())
        if not self._script:
            await asyncio.Event().wait()
        answer = self._script.pop(0)
        await asyncio.sleep(0)
        if isinstance(answer, Exception):
            raise answer
        return encode_epoch(answer) if isinstance(answer, Epoch) else answer


Scenario = Callable[[Bench, Controller, Subscription], Coroutine[Any, Any, None]]


def follow(scenario: Scenario, *script: Epoch | bytes | Exception) -> None:
    async def run(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        controller = Controller(loop, *script)
        subscription = Subscription("router-1", bench.router, controller.watch)
        task = loop.create_task(subscription.run())
        await scenario(bench, controller, subscription)
        assert not task.done(), "it must go on for ever"
        task.cancel()
        bench.router.close()

    run_virtually(run)


def test_a_poll_says_who_asks_and_what_it_has() -> None:
    async def scenario(bench: Bench, controller: Controller, _: Subscription) -> None:
        await sleep_ms(1)
        assert controller.polls == [("router-1", (0, 0), 0), ("router-1", (2, 7), 7)]
        assert bench.plan().version == 1

    follow(scenario, epoch(7, (plain(), ONE), term=2))


def test_the_next_poll_acknowledges_the_oldest_epoch_that_is_still_used() -> None:
    async def scenario(bench: Bench, controller: Controller, _: Subscription) -> None:
        await sleep_ms(1)
        bench.ask_x(1)
        controller._script += [epoch(2, (plain(), ONE)), b""]
        # The poll under way waits for ever; a real one returns after a while.
        await restart(bench, controller)
        assert controller.polls[-2:] == [("again", (1, 2), 1)] * 2
        await turns()
        doubled(bench.actors["a"].take())
        controller._script.append(b"")
        await restart(bench, controller)
        assert controller.polls[-1] == ("again", (1, 2), 2)

    follow(scenario, epoch(1, (plain(), ONE)))


class Parked:
    """A controller that answers news at once, and other polls only as a real one: after 2 s."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._news = asyncio.Event()
        self._latest = epoch(0)
        self.polls: list[tuple[tuple[int, int], int]] = []
        self.open_now = 0
        self.open_most = 0
        #: what a poll of one that has no epoch fails with
        self.trouble: Exception | None = None

    def publish(self, latest: Epoch) -> None:
        self._latest = latest
        self._news.set()
        self._news = asyncio.Event()

    async def watch(self, name: str, have: tuple[int, int], oldest: int) -> bytes:
        self.polls.append((have, oldest))
        self.open_now += 1
        self.open_most = max(self.open_most, self.open_now)
        try:
            if have == (0, 0) and self.trouble is not None:
                raise self.trouble
            news = self._news
            await asyncio.sleep(0.01)
            if (self._latest.term, self._latest.number) <= have:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(news.wait(), 2.0)
            return encode_epoch(self._latest)
        finally:
            self.open_now -= 1


def keep_up(scenario: Callable[[Bench, Parked, list[Any]], Coroutine[Any, Any, None]]) -> None:
    """With epoch 1 and a request that is pinned to it, then epoch 2."""

    async def run(loop: VirtualLoop) -> None:
        bench, controller = Bench(loop), Parked(loop)
        task = loop.create_task(Subscription("r", bench.router, controller.watch).run())
        controller.publish(epoch(1, (plain(), ONE)))
        await sleep_ms(100)
        sinks = [bench.ask_x(1)]
        await turns()
        controller.publish(epoch(2, (plain(), ONE)))
        await sleep_ms(100)
        assert controller.polls == [((0, 0), 0), ((1, 1), 1), ((1, 2), 1)]
        await scenario(bench, controller, sinks)
        assert controller.open_most <= 2
        task.cancel()
        await turns()
        assert controller.open_now == 0
        bench.router.close()

    run_virtually(run)


def test_a_poll_under_way_is_corrected_when_the_last_request_of_an_old_epoch_has_ended() -> None:
    async def scenario(bench: Bench, controller: Parked, sinks: list[Any]) -> None:
        await sleep_ms(500)
        assert len(controller.polls) == 3
        doubled(bench.actors["a"].take())
        assert sinks[0].answer.tolist() == [2]
        await sleep_ms(100)
        assert controller.polls[3:] == [((0, 0), 2)]
        await sleep_ms(1_000)
        assert len(controller.polls) == 4  # once, and nobody looks any more
        assert bench.router.routes.number == 2

    keep_up(scenario)


def test_while_new_epochs_come_and_old_requests_end_two_polls_are_open_at_most() -> None:
    async def scenario(bench: Bench, controller: Parked, _: list[Any]) -> None:
        for number in range(3, 60):
            bench.ask_x(1)
            await turns()
            controller.publish(epoch(number, (plain(), ONE)))
            await sleep_ms(37)
            doubled(bench.actors["a"].take())  # of the one before
        doubled(bench.actors["a"].take())
        await sleep_ms(200)
        assert controller.open_most == 2
        assert bench.router.routes.number == 59
        assert controller.polls[-1] == ((0, 0), 59)

    keep_up(scenario)


def test_a_correction_that_fails_is_left_to_the_next_poll() -> None:
    async def scenario(bench: Bench, controller: Parked, _: list[Any]) -> None:
        controller.trouble = ConnectionError("away")
        doubled(bench.actors["a"].take())
        await sleep_ms(3_000)
        assert controller.polls[3:] == [((0, 0), 2), ((1, 2), 2)]

    keep_up(scenario)


async def restart(bench: Bench, controller: Controller) -> None:
    task = asyncio.create_task(Subscription("again", bench.router, controller.watch).run())
    await sleep_ms(1)
    task.cancel()


def test_only_newer_epochs_are_adopted() -> None:
    async def scenario(bench: Bench, controller: Controller, _: Subscription) -> None:
        await sleep_ms(1)
        assert bench.router.routes.epoch.term == 2
        assert bench.plan().version == 5
        assert [have for _, have, _ in controller.polls] == [(0, 0), (2, 3), (2, 3), (2, 3)]

    follow(
        scenario,
        epoch(3, (plain(version=5), ONE), term=2),
        epoch(3, (plain(version=6), ONE), term=2),
        epoch(9, (plain(version=7), ONE), term=1),
    )


def test_an_empty_answer_means_ask_again() -> None:
    async def scenario(bench: Bench, controller: Controller, it: Subscription) -> None:
        await sleep_ms(1)
        assert len(controller.polls) == 4
        assert not await it.wait_epoch(1.0)

    follow(scenario, b"", b"", b"")


def test_the_first_epoch_is_announced() -> None:
    async def scenario(bench: Bench, controller: Controller, it: Subscription) -> None:
        assert not await it.wait_epoch(0.0)
        assert await it.wait_epoch(1.0)
        assert bench.router.routes.number == 1

    follow(scenario, b"", epoch(1, (plain(), ONE)))


@pytest.mark.parametrize("trouble", [ConnectionError("away"), b"\xc1 no epoch at all"])
def test_trouble_is_waited_out_ever_longer_up_to_a_bound(trouble: Exception | bytes) -> None:
    async def scenario(bench: Bench, controller: Controller, _: Subscription) -> None:
        await sleep_ms(30_000)
        gaps = [later - before for before, later in itertools.pairwise(controller.at)]
        assert gaps[:5] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6])
        assert max(gaps) == pytest.approx(2.0)

    follow(scenario, *[trouble] * 30)


def test_after_an_answer_the_patience_is_new() -> None:
    async def scenario(bench: Bench, controller: Controller, _: Subscription) -> None:
        await sleep_ms(10_000)
        last = controller.at[-1] - controller.at[-2]
        assert last == pytest.approx(0.1)

    away = ConnectionError("away")
    follow(scenario, away, away, away, b"", away)


def test_while_the_controller_is_away_requests_go_on() -> None:
    async def scenario(bench: Bench, controller: Controller, _: Subscription) -> None:
        await sleep_ms(500)
        sink = bench.ask_x(2)
        await turns()
        doubled(bench.actors["a"].take())
        assert sink.answer.tolist() == [4]

    follow(scenario, epoch(1, (plain(), ONE)), *[ConnectionError("away")] * 10)
