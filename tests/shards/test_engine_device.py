"""The device engine under failures, drains and load: on a fake device, and on JAX with threads."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from batching.errors import FailedPrecondition, InvalidArgument
from batching.testing import CheckedTicket
from shards.engine import LaneBounds
from shards.programs import buckets_of
from shards.specs import Spec
from shards.wire import Item
from tests.shards.serving import (
    DEADLINE_S,
    Array,
    Bench,
    DeviceRig,
    FakeLink,
    VirtualLoop,
    call,
    compiled,
    loaded,
    map_unit,
    run_virtual,
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
        removing = asyncio.ensure_future(bench.engine.remove("unit"))
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
        removing = asyncio.ensure_future(bench.engine.remove("unit"))
        await bench.settle()
        end(bench, link)
        await removing
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
        await bench.engine.remove("unit")
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
        removing = asyncio.ensure_future(bench.engine.remove("unit"))
        await bench.settle()
        removing.cancel()
        again = asyncio.ensure_future(bench.engine.remove("unit"))
        await bench.settle()
        assert not again.done()
        await bench.finish_all()
        await again
        assert not bench.device.units
        bench.install(plus_one)

    run_virtual(scenario)


def test_a_unit_that_is_not_there_is_removed_at_once() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        await Bench(loop).engine.remove("never was")

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


# --- any order of events -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_every_accepted_request_has_exactly_one_end(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Links, requests, cancels, losses, failures and removals at random, all in virtual time."""
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
        self._bench = Bench(loop, in_flight_max=chance.choice((1, 2, 3)))
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
        self._bench.install(no_negatives, map_unit(name, batch_buckets=buckets), rows_max=rows_max)

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
        frame = call(self._chance.choice("ab"), {}, values, items=items)
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
            removal = asyncio.ensure_future(self._bench.engine.remove("b"))
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


# --- on JAX ------------------------------------------------------------------------------------

SEQUENCES = map_unit(
    "sequences",
    inputs={"x": Spec(("b", "t", 3)), "keep": Spec(("b", "t"), "int32", 0)},
    outputs={"each": Spec(("b", "t", 5)), "total": Spec(("b", 5))},
    batch_buckets=(1, 2, 8),
    length_buckets={"t": (4, 16)},
)
W = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)


def encode(w: Any, x: Any, keep: Any) -> Any:
    each = jnp.tanh(x @ w) * keep[..., None].astype(x.dtype)
    return each, each.sum(1)


def sequence(chance: np.random.Generator, count: int, length: int) -> tuple[Array, Array]:
    x = chance.standard_normal((count, length, 3)).astype(np.float32)
    return x, np.ones((count, length), np.int32)


@pytest.mark.parametrize("cost_s", [0.0, 1.0], ids=["short steps", "long steps"])
def test_many_links_are_answered_right_and_nothing_compiles(cost_s: float) -> None:
    chance = np.random.default_rng(3)
    with DeviceRig() as rig:
        rig.install(SEQUENCES, compiled(encode, SEQUENCES, [W], cost_s))
        before = rig.watch.count
        links = [FakeLink(f"link {n}") for n in range(4)]
        asked: dict[tuple[int, int], Array] = {}
        for turn in range(60):
            mine = turn % len(links)
            count, length = int(chance.integers(1, 12)), int(chance.integers(1, 17))
            x, keep = sequence(chance, count, length)
            asked[mine, turn] = x
            rig.call(links[mine], call("sequences", {turn: count}, x, keep))
        for number, link in enumerate(links):
            link.wait_for(15)
            assert not link.errors
            for turn, (each, total) in link.answers.items():
                expected = np.tanh(asked[number, turn] @ W)
                np.testing.assert_allclose(each, expected, atol=1e-5)
                np.testing.assert_allclose(total, expected.sum(1), atol=1e-4)
        assert sum(len(link.answers) for link in links) == len(asked)
        assert rig.watch.count == before == 0


def test_no_bucket_compiles_once_it_is_installed() -> None:
    chance = np.random.default_rng(4)
    with DeviceRig() as rig:
        rig.install(SEQUENCES, compiled(encode, SEQUENCES, [W]))
        link = FakeLink()
        used = set()
        for number, (batch, sizes) in enumerate(buckets_of(SEQUENCES)):
            rig.call(link, call("sequences", {number: batch}, *sequence(chance, batch, sizes["t"])))
            link.wait_for(number + 1)
            used.add((batch, sizes["t"]))
        assert len(used) == 6
        assert rig.io.call(rig.batcher.stats).in_flight == 0
        assert rig.watch.count == 0


def test_a_row_is_the_same_bit_for_bit_whatever_its_neighbours_in_the_bucket() -> None:
    chance = np.random.default_rng(5)
    unit = map_unit(
        inputs={"x": Spec(("b", 64))}, outputs={"y": Spec(("b", 64))}, batch_buckets=(8,)
    )
    w = chance.standard_normal((64, 64)).astype(np.float32)

    def layer(w: Any, x: Any) -> Any:
        return (jnp.tanh(x @ w) @ w.T,)

    x = chance.standard_normal((1, 64)).astype(np.float32)
    with DeviceRig() as rig:
        rig.install(unit, compiled(layer, unit, [w]))
        link = FakeLink()
        for number in range(8):
            # The same row at every position, among strangers on either side.
            before = chance.standard_normal((number, 64)).astype(np.float32)
            after = chance.standard_normal((7 - number, 64)).astype(np.float32) * 100
            frame = call(
                "unit",
                {3 * number: number, 3 * number + 1: 1, 3 * number + 2: 7 - number},
                np.concatenate([before, x, after]),
            )
            rig.call(link, frame)
            link.wait_for(3 * (number + 1))
        alone = link.answers[1][0]
        rig.call(link, call("unit", {100: 1}, x))
        link.wait_for(25)
        assert link.answers[100][0].tobytes() == alone.tobytes()
        for number in range(8):
            assert link.answers[3 * number + 1][0].tobytes() == alone.tobytes()


def test_a_program_that_fails_for_one_row_on_the_device_fails_one_request() -> None:
    unit = map_unit(batch_buckets=(4,))
    run = compiled(lambda x: (x + 1,), unit).compiled[4, ()]

    def program(x: Array) -> Any:
        if np.isnan(x).any():
            raise ValueError("not a number\nat line 2")
        return run(x)

    with DeviceRig() as rig:
        rig.install(unit, loaded(unit, {(4, ()): program}))
        links = [FakeLink(), FakeLink()]
        rig.call(links[0], call("unit", {0: 1, 1: 1, 2: 1}, rows(0, np.nan, 2)))
        rig.call(links[1], call("unit", {3: 1}, rows(3)))
        links[0].wait_for(3)
        links[1].wait_for(1)
        assert links[0].answers.keys() == {0, 2}
        assert links[0].codes == {1: "INTERNAL"}
        assert links[0].errors[1].message.endswith("ValueError: not a number")
        assert links[1].answers[3][0].tolist() == [[4.0, 4.0]]


def test_a_removal_waits_for_the_device_and_the_next_unit_of_that_name_serves() -> None:
    unit = map_unit()
    with DeviceRig() as rig:
        rig.install(unit, compiled(lambda x: (x + 1,), unit, cost_s=1.0))
        link = FakeLink()
        rig.call(link, call("unit", dict.fromkeys(range(40), 1), rows(*range(40))))
        rig.io.run(rig.engine.remove("unit"), DEADLINE_S)
        assert link.answers.keys() == set(range(40))
        bounds = LaneBounds()
        rig.io.call(rig.engine.install, unit, compiled(lambda x: (x * 2,), unit), bounds)
        rig.call(link, call("unit", {50: 1}, rows(4)))
        link.wait_for(41)
        assert link.answers[50][0].tolist() == [[8.0, 8.0]]
