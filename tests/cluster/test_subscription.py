"""How a router keeps up with the controller, and does without it."""

from __future__ import annotations

import asyncio
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
