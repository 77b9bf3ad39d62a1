"""The device engine under failures, removals and load, on a fake device in virtual time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from batching import policy_named
from batching.allowance import BEST_EFFORT, CRITICAL, DEFAULT, SHEDDABLE, Allowance
from batching.errors import FailedPrecondition, InvalidArgument
from batching.testing import CheckedTicket
from shards.wire import Item
from tests.shards.serving import (
    Array,
    Bench,
    FakeLink,
    VirtualLoop,
    call,
    map_unit,
    run_virtual,
    until,
)


def rows(*values: float) -> Array:
    return np.repeat(np.array(values, np.float32)[:, None], 2, axis=1)


def plus_one(x: Array) -> Sequence[Array]:
    return (x + 1,)


def no_negatives(x: Array) -> Sequence[Array]:
    """Fails the whole batch for one bad row, as a program does."""
    if (x < 0).any():
        raise ValueError("a negative row")
    return (x + 1,)


# --- failures ----------------------------------------------------------------------------------


def test_a_poison_row_fails_alone_and_its_batch_mates_are_answered() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop, in_flight_max=1)
        bench.install(no_negatives, map_unit(batch_buckets=(1, 2, 4, 8)))
        one, two = FakeLink(), FakeLink()
        bench.engine.on_call(one, call("unit", {0: 1}, rows(0)))
        bench.engine.on_call(one, call("unit", {1: 1, 2: 1, 3: 1}, rows(1, -2, 3)))
        bench.engine.on_call(two, call("unit", {4: 1, 5: 1, 6: 2}, rows(4, 5, 6, 7)))
        await bench.finish_all()
        assert one.codes == {2: "INTERNAL"}
        assert one.errors[2].message == "a negative row"
        assert one.answers.keys() == {0, 1, 3}
        assert two.answers.keys() == {4, 5, 6}
        assert two.answers[6][0][:, 0].tolist() == [7.0, 8.0]
        # One good step, and 6 tickets cut in halves until one was left: no row runs for ever.
        assert bench.device.launched <= 1 + 1 + 2 * 3
        bench.check_idle()

    run_virtual(scenario)


def test_a_split_ticket_with_a_poison_row_fails_once() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        bench.install(no_negatives)
        link = FakeLink()
        bench.engine.on_call(link, call("unit", {1: 9}, rows(0, 1, 2, 3, 4, -5, 6, 7, 8)))
        bench.engine.on_call(link, call("unit", {2: 1}, rows(9)))
        await bench.finish_all()
        assert link.codes == {1: "INTERNAL"}
        assert link.answers.keys() == {2}
        bench.check_idle()

    run_virtual(scenario)


def test_rows_that_wait_to_be_tried_again_still_expire_and_can_be_cancelled() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop, in_flight_max=1)
        bench.install(no_negatives)
        link = FakeLink()
        bench.engine.on_call(link, call("unit", {0: 1}, rows(0)))
        items = [Item(request, 1, 1_000_000) for request in (1, 2, 3, 4)]
        bench.engine.on_call(link, call("unit", {}, rows(-1, 2, 3, 4), items=items))
        await bench.finish()  # the four run together
        await bench.finish()  # they fail; the first half runs, the second waits
        bench.engine.on_cancel(link, [4])
        await asyncio.sleep(1.5)
        assert link.codes == {3: "DEADLINE_EXCEEDED"}
        await bench.finish_all()
        # The first half was begun in time, but its own halves would come too late.
        assert link.codes == dict.fromkeys((1, 2, 3), "DEADLINE_EXCEEDED")
        assert link.answers.keys() == {0}
        bench.check_idle()

    run_virtual(scenario)


def test_a_peer_that_does_not_read_loses_its_link_and_nobody_else_notices() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop, in_flight_max=1)
        bench.install(plus_one)
        slow, good = FakeLink("slow"), FakeLink("good")
        slow.full = True
        bench.engine.on_call(good, call("unit", {0: 1}, rows(0)))
        bench.engine.on_call(slow, call("unit", {1: 1}, rows(1)))
        bench.engine.on_call(good, call("unit", {2: 1}, rows(2)))
        await bench.finish_all()
        assert slow.closed == ["answers are not read"]
        assert good.answers.keys() == {0, 2}
        bench.check_idle()

    run_virtual(scenario)


def test_an_answer_larger_than_a_frame_is_an_error_and_the_lane_goes_on() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        bench.install(lambda x: (np.zeros((len(x), 100), np.float32),))
        link = FakeLink(body_bytes_max=1000)
        bench.engine.on_call(link, call("unit", {1: 3}, rows(1, 2, 3)))
        await bench.finish_all()
        assert link.codes == {1: "INVALID_ARGUMENT"}
        assert "a body over the bound" in link.errors[1].message
        bench.engine.on_call(link, call("unit", {2: 1}, rows(1)))
        await bench.finish_all()
        assert link.answers.keys() == {2}
        bench.check_idle()

    run_virtual(scenario)


# --- units come and go -------------------------------------------------------------------------


def test_a_removed_unit_finishes_its_rows_and_takes_no_more() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop, in_flight_max=1)
        bench.install(plus_one)
        link = FakeLink()
        bench.engine.on_call(link, call("unit", {1: 9}, rows(*range(9))))
        removing = asyncio.ensure_future(bench.engine.lanes.remove("unit"))
        await bench.settle()
        bench.engine.on_call(link, call("unit", {2: 1}, rows(2)))
        assert link.codes == {2: "STALE_EPOCH"}
        while bench.device.running:
            assert not removing.done()
            await bench.finish()
        await removing
        assert link.answers.keys() == {1}
        assert not bench.device.units
        assert not bench.batcher.stats().lanes
        bench.check_idle()

    run_virtual(scenario)


def end_by_cancel(bench: Bench, link: FakeLink) -> None:
    bench.engine.on_cancel(link, [0, 1])


def end_by_loss(bench: Bench, link: FakeLink) -> None:
    link.close()
    bench.engine.on_link_closed(link)


@pytest.mark.parametrize("end", [end_by_cancel, end_by_loss])
def test_a_removal_does_not_wait_for_rows_that_nobody_wants(
    end: Callable[[Bench, FakeLink], None],
) -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop, in_flight_max=1)
        bench.install(plus_one)
        bench.install(plus_one, map_unit("busy"))
        link = FakeLink()
        bench.engine.on_call(FakeLink(), call("busy", {0: 1}, rows(0)))  # takes the only credit
        bench.engine.on_call(link, call("unit", {0: 1, 1: 1}, rows(0, 1)))
        removing = asyncio.ensure_future(bench.engine.lanes.remove("unit"))
        await bench.settle()
        start = loop.now
        end(bench, link)
        await removing
        assert loop.now == start, "it waited for the deadlines"
        await bench.finish_all()

    run_virtual(scenario)


def test_a_removal_ends_when_the_last_waiting_row_expires() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop, in_flight_max=1)
        bench.install(plus_one)
        bench.install(plus_one, map_unit("busy"))
        link = FakeLink()
        bench.engine.on_call(FakeLink(), call("busy", {0: 1}, rows(0)))
        bench.engine.on_call(link, call("unit", {1: 1}, rows(1), remaining_us=2_000_000))
        start = loop.now
        await bench.engine.lanes.remove("unit")
        assert loop.now - start == pytest.approx(2.0, abs=0.01)
        assert link.codes == {1: "DEADLINE_EXCEEDED"}
        await bench.finish_all()

    run_virtual(scenario)


def test_a_removal_whose_caller_gave_up_is_carried_out_all_the_same() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        bench.install(plus_one)
        link = FakeLink()
        bench.engine.on_call(link, call("unit", {1: 1}, rows(1)))
        removing = asyncio.ensure_future(bench.engine.lanes.remove("unit"))
        await bench.settle()
        removing.cancel()
        again = asyncio.ensure_future(bench.engine.lanes.remove("unit"))
        await bench.settle()
        assert not again.done()
        await bench.finish_all()
        await again
        assert not bench.device.units
        bench.install(plus_one)

    run_virtual(scenario)


def test_a_unit_that_is_not_there_is_removed_at_once() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        await Bench(loop).engine.lanes.remove("never was")

    run_virtual(scenario)


def test_a_unit_with_impossible_bounds_leaves_nothing_behind() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        with pytest.raises(InvalidArgument):
            bench.install(plus_one, rows_max=0)
        assert not bench.device.units
        assert bench.engine.staging_bytes == 0
        bench.install(plus_one)
        with pytest.raises(FailedPrecondition):
            bench.install(plus_one)

    run_virtual(scenario)


# --- short steps -------------------------------------------------------------------------------


def test_frames_that_come_in_one_turn_share_a_short_step() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop, run_now_s=0.1)
        bench.install(plus_one, cost_s=0.0)
        links = [FakeLink(f"link {n}") for n in range(4)]
        for link in links:
            bench.engine.on_call(link, call("unit", {1: 1}, rows(5)))
        assert not bench.device.ran_now
        await bench.settle()
        assert len(bench.device.ran_now) == 1
        assert [link.answers[1][0].tolist() for link in links] == [[[6.0, 6.0]]] * 4
        bench.check_idle()

    run_virtual(scenario)


def test_more_short_steps_than_credits_are_all_run() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop, run_now_s=0.1)
        bench.install(plus_one, cost_s=0.0)
        link = FakeLink()
        bench.engine.on_call(link, call("unit", {1: 50}, rows(*range(50))))
        await until(lambda: bool(link.ended))
        assert link.answers[1][0][:, 0].tolist() == [n + 1.0 for n in range(50)]
        bench.check_idle()

    run_virtual(scenario)


def test_a_short_step_does_not_run_here_while_the_device_has_another() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop, run_now_s=0.1)
        bench.install(plus_one, cost_s=0.0)
        bench.install(plus_one, map_unit("long"), cost_s=1.0)
        link = FakeLink()
        bench.engine.on_call(link, call("long", {1: 1}, rows(1)))
        await bench.settle()
        bench.engine.on_call(link, call("unit", {2: 1}, rows(2)))
        await bench.settle()
        assert not bench.device.ran_now
        assert len(bench.device.running) == 2
        await bench.finish_all()
        bench.engine.on_call(link, call("unit", {3: 1}, rows(3)))
        await bench.settle()
        assert len(bench.device.ran_now) == 1
        assert link.answers.keys() == {1, 2, 3}

    run_virtual(scenario)


def test_a_poison_row_in_short_steps_fails_alone() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop, run_now_s=0.1)
        bench.install(no_negatives, cost_s=0.0)
        link = FakeLink()
        bench.engine.on_call(link, call("unit", dict.fromkeys(range(4), 1), rows(0, 1, -1, 3)))
        await until(lambda: len(link.ended) == 4)
        assert link.codes == {2: "INTERNAL"}
        bench.check_idle()

    run_virtual(scenario)


def test_a_removal_waits_for_short_steps_that_are_due() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop, run_now_s=0.1)
        bench.install(plus_one, cost_s=0.0)
        link = FakeLink()
        bench.engine.on_call(link, call("unit", {1: 30}, rows(*range(30))))
        await bench.engine.lanes.remove("unit")
        assert link.answers.keys() == {1}
        assert not bench.device.units

    run_virtual(scenario)


def test_a_deadline_of_rows_behind_short_steps_is_kept() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop, in_flight_max=1, run_now_s=0.1)
        bench.install(plus_one, cost_s=0.0)
        bench.install(plus_one, map_unit("long"), cost_s=1.0)
        link, start = FakeLink(), loop.now
        bench.engine.on_call(link, call("long", {1: 1}, rows(1)))
        bench.engine.on_call(link, call("unit", {2: 1}, rows(2), remaining_us=1_000_000))
        await until(lambda: bool(link.codes))
        assert link.codes == {2: "DEADLINE_EXCEEDED"}
        assert loop.now - start == pytest.approx(1.0, abs=0.01)
        await bench.finish_all()

    run_virtual(scenario)


# --- any order of events -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_every_accepted_request_has_exactly_one_end(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Links, requests, cancels, losses, failures and removals at random, all in virtual time,
    under two policies."""
    monkeypatch.setattr("shards.engine.Ticket", CheckedTicket)

    async def scenario(loop: VirtualLoop) -> None:
        story = _Story(loop, random.Random(seed))
        for _ in range(400):
            await story.step()
        await story.end()

    run_virtual(scenario)


class _Story:
    """A random life of an engine, and what must have come of every request."""

    def __init__(self, loop: VirtualLoop, chance: random.Random) -> None:
        self._chance = chance
        policy = policy_named(chance.choice(("round-robin", "effsafe")))
        run_now_s = chance.choice((0.0, 0.1))
        self._bench = Bench(loop, chance.choice((1, 2, 3)), run_now_s, policy)
        self._bench.batcher.allow("", Allowance(criticality=CRITICAL))
        self._links: list[FakeLink] = [FakeLink(f"link {n}") for n in range(3)]
        self._asked: dict[FakeLink, dict[int, Array]] = {link: {} for link in self._links}
        self._cancelled: dict[FakeLink, set[int]] = {link: set() for link in self._links}
        self._removals: list[asyncio.Future[None]] = []
        self._next = 0
        self._install("a")
        self._install("b")

    def _install(self, name: str) -> None:
        buckets = self._chance.choice(((1, 2, 4), (3, 6), (5,)))
        rows_max = self._chance.choice((6, 40))
        unit = map_unit(name, batch_buckets=buckets)
        cost_s = 0.0 if name == "a" else 1.0
        self._bench.install(no_negatives, unit, rows_max=rows_max, cost_s=cost_s)

    async def step(self) -> None:
        action = self._chance.choices(
            [self._call, self._finish, self._cancel, self._lose, self._pass_time, self._replace],
            [10, 9, 2, 0.3, 2, 0.5],
        )[0]
        await action()
        await self._bench.settle()

    async def _call(self) -> None:
        link = self._chance.choice(self._links)
        counts = [self._chance.choice((1, 1, 2, 7)) for _ in range(self._chance.randint(1, 4))]
        numbers = range(self._next, self._next + len(counts))
        self._next += len(counts)
        values = rows(*(self._chance.randint(0, 99) for _ in range(sum(counts))))
        if self._chance.random() < 0.2:
            values[self._chance.randrange(len(values))] = -1
        at = 0
        items = []
        for number, count in zip(numbers, counts, strict=True):
            self._asked[link][number] = values[at : at + count]
            at += count
            items.append(Item(number, count, self._chance.choice((500_000, 60_000_000))))
        criticality = self._chance.choice((CRITICAL, DEFAULT, SHEDDABLE, BEST_EFFORT))
        unit = self._chance.choice("ab")
        frame = call(unit, {}, values, items=items, criticality=criticality)
        self._bench.engine.on_call(link, frame)

    async def _finish(self) -> None:
        running = self._bench.device.running
        if running:
            self._bench.device.finish(self._chance.randrange(len(running)))

    async def _cancel(self) -> None:
        link = self._chance.choice(self._links)
        numbers = self._chance.sample(sorted(self._asked[link]), min(2, len(self._asked[link])))
        self._cancelled[link].update(set(numbers) - link.ended)
        self._bench.engine.on_cancel(link, numbers)

    async def _lose(self) -> None:
        link = self._chance.choice(self._links)
        self._links.remove(link)
        self._links.append(FakeLink())
        self._asked[self._links[-1]], self._cancelled[self._links[-1]] = {}, set()
        self._cancelled[link].update(self._asked[link].keys() - link.ended)
        link.close("lost")
        self._bench.engine.on_link_closed(link)

    async def _pass_time(self) -> None:
        await asyncio.sleep(self._chance.choice((0.01, 0.3, 1.0)))

    async def _replace(self) -> None:
        if all(removal.done() for removal in self._removals):
            removal = asyncio.ensure_future(self._bench.engine.lanes.remove("b"))
            removal.add_done_callback(lambda _: self._install("b"))
            self._removals.append(removal)

    async def end(self) -> None:
        await self._bench.finish_all()
        await asyncio.gather(*self._removals)
        await self._bench.settle()
        self._bench.check_idle()
        for link, asked in self._asked.items():
            answers, cancelled = link.answers, self._cancelled[link]
            assert link.ended | cancelled == asked.keys()
            assert not link.ended & cancelled
            for request, (outputs,) in answers.items():
                np.testing.assert_array_equal(outputs, asked[request] + 1)
            for request, code in link.codes.items():
                assert code != "INTERNAL" or (asked[request] < 0).any()
