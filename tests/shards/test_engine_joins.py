"""Rows that shards send straight to a device: joined in their places, refused when they are not
what was awaited, and forgotten when nobody waits for them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from shards.join_desk import JoinDesk
from shards.manifest import MapUnit
from shards.replies import UNJOINED
from shards.specs import Spec
from shards.wire import (
    NO_SLOT,
    Awaited,
    CallHeader,
    Continuation,
    Frame,
    FrameKind,
    Item,
    Join,
    encode_tensors,
)
from tests.shards.serving import (
    HOUR_US,
    Array,
    Bench,
    FakeLink,
    VirtualLoop,
    call,
    map_unit,
    run_virtual,
)

PLAN = "plan"
DIM = 2
POOLED = map_unit(
    "pooled",
    inputs={"rows": Spec(("b", "t", DIM)), "bias": Spec(("b",))},
    outputs={"y": Spec(("b",))},
    length_buckets={"t": (2, 4)},
)
TABLE = np.arange(40, dtype=np.float32).reshape(20, DIM)


def pooled(rows: Array, bias: Array) -> Sequence[Array]:
    return (rows.sum((1, 2)) + bias,)


def frame_of(op: str, items: list[Item], *arrays: Array, unit: str, **changes: Any) -> Frame:
    headers, buffers = encode_tensors(arrays)
    header = CallHeader(changes.pop("epoch", 1), unit, op, items, headers, changes.pop("plan", ""))
    assert not changes
    return Frame(FrameKind.CALL, 0, header, memoryview(b"".join(buffers)))


class Asked:
    """A look-up of ids ``[b, t]`` that is joined: what a router would send to whom.

    Args:
        ids: rows of `TABLE`, or -1 for one that is missing.
        shards: how many shards the rows come from; id modulo this says which.
    """

    def __init__(self, number: int, ids: Any, shards: int = 2, request: int = 1) -> None:
        self.number, self.request = number, request
        self.ids = np.array(ids, np.int64)
        flat = self.ids.reshape(-1)
        self.slots = np.full(flat.shape, NO_SLOT, np.uint16)
        self.awaited: list[Awaited] = []
        self.rows: list[Array] = []
        for shard in range(shards):
            where = np.flatnonzero((flat >= 0) & (flat % shards == shard))
            if len(where):
                self.slots[where] = len(self.awaited)
                self.awaited.append(Awaited(f"shard-{shard}", 1, len(where), PLAN, 0))
                self.rows.append(TABLE[flat[where]])
        self.bias = np.arange(len(self.ids), dtype=np.float32) * 100

    @property
    def item(self) -> Item:
        join = Join(self.number, self.awaited)
        return Item(self.request, len(self.ids), HOUR_US, b"", None, join)

    @property
    def join(self) -> Frame:
        return frame_of(
            "join", [self.item], self.slots.reshape(self.ids.shape), self.bias, unit="pooled"
        )

    def part(self, slot: int, **changes: Any) -> Frame:
        rows = changes.pop("rows", self.rows[slot])
        continuation = Continuation("device-0", self.number, slot, "place")
        item = Item(90 + slot, len(rows), HOUR_US, b"", continuation)
        return frame_of("part", [item], rows, unit="table", **{"plan": PLAN, **changes})

    @property
    def expected(self) -> list[float]:
        rows = np.where(self.ids[..., None] >= 0, TABLE[self.ids], np.float32(0))
        return [float(each) for each in rows.sum((1, 2)) + self.bias]


class Scene:
    """An engine with one unit, a router's link, and a link from each shard."""

    def __init__(self, loop: VirtualLoop, unit: MapUnit = POOLED) -> None:
        self.bench = Bench(loop)
        self.bench.install(pooled, unit)
        self.router = FakeLink()
        self.shards = {name: FakeLink(name) for name in ("shard-0", "shard-1", "shard-2")}

    def ask(self, asked: Asked) -> None:
        self.bench.engine.on_call(self.router, asked.join)

    def send(self, asked: Asked, slot: int, **changes: Any) -> None:
        link = self.shards[asked.awaited[slot].actor]
        self.bench.engine.on_call(link, asked.part(slot, **changes))

    def check_idle(self) -> None:
        self.bench.check_idle()
        assert not self.desk._requests
        self.desk._joins.check_invariants()
        assert not self.desk._joins._open

    @property
    def desk(self) -> JoinDesk:
        return self.bench.engine._desk

    def answer(self, request: int = 1) -> list[float]:
        [found] = self.router.answers[request]
        return [float(each) for each in found]


@pytest.mark.parametrize("order", [("join", 0, 1), (1, "join", 0), (1, 0, "join")])
def test_rows_that_come_in_parts_are_answered_as_rows_that_came_in_one_piece(
    order: tuple[str | int, ...],
) -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = Scene(loop)
        asked = Asked(5, [[1, 2, 3], [-1, 4, 4]])
        for what in order:
            if isinstance(what, int):
                scene.send(asked, what)
            else:
                scene.ask(asked)
        await scene.bench.finish_all()
        assert scene.answer() == asked.expected
        scene.check_idle()

    run_virtual(scenario)


def test_one_shard_that_has_every_row_is_not_copied_and_answers_alike() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = Scene(loop)
        asked = Asked(5, [[1, 2], [4, 0]], shards=1)
        scene.ask(asked)
        scene.send(asked, 0)
        await scene.bench.finish_all()
        assert scene.answer() == asked.expected

    run_virtual(scenario)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_asked_and_in_whatever_order_it_comes_the_answers_are_exact(
    seed: int,
) -> None:
    chosen = random.Random(seed)

    async def scenario(loop: VirtualLoop) -> None:
        scene = Scene(loop)
        waiting: list[tuple[Asked, int | None]] = []
        every: list[Asked] = []
        for request in range(8):
            shape = (chosen.randint(1, 4), chosen.randint(1, 4))
            ids = [[chosen.randint(-1, 19) for _ in range(shape[1])] for _ in range(shape[0])]
            ids[0][0] = 3  # a look-up of nothing that exists is not joined
            asked = Asked(1000 + request, ids, chosen.randint(1, 3), request)
            every.append(asked)
            waiting += [(asked, slot) for slot in [None, *range(len(asked.awaited))]]
        chosen.shuffle(waiting)
        for asked, slot in waiting:
            if slot is None:
                scene.ask(asked)
            else:
                scene.send(asked, slot)
        await scene.bench.finish_all()
        for asked in every:
            assert scene.answer(asked.request) == asked.expected
        scene.check_idle()

    run_virtual(scenario)


def test_items_of_several_requests_share_frames_on_either_side() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = Scene(loop)
        one, two = Asked(5, [[1, 2]], request=1), Asked(6, [[3, 4], [7, 8]], request=2)
        slots = np.concatenate([each.slots.reshape(each.ids.shape) for each in (one, two)])
        bias = np.concatenate([one.bias, two.bias])
        scene.bench.engine.on_call(
            scene.router, frame_of("join", [one.item, two.item], slots, bias, unit="pooled")
        )
        for slot, name in enumerate(("shard-0", "shard-1")):
            items = [
                Item(90, len(each.rows[slot]), HOUR_US, b"",
                     Continuation("device-0", each.number, slot, "place"))
                for each in (one, two)
            ]  # fmt: skip
            rows = np.concatenate([one.rows[slot], two.rows[slot]])
            frame = frame_of("part", items, rows, unit="table", plan=PLAN)
            scene.bench.engine.on_call(scene.shards[name], frame)
        await scene.bench.finish_all()
        assert scene.answer(1) == one.expected
        assert scene.answer(2) == two.expected

    run_virtual(scenario)


@pytest.mark.parametrize("changes", [{"epoch": 2}, {"plan": "other"}, {"rows": TABLE[:5]}])
def test_a_part_that_is_not_what_is_awaited_is_refused_and_counted(
    changes: dict[str, Any],
) -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = Scene(loop)
        asked = Asked(5, [[1, 2, 3]])
        scene.ask(asked)
        scene.send(asked, 0, **changes)
        assert scene.router.codes == {1: UNJOINED}
        assert scene.bench.engine.parts_mismatched == 1
        scene.send(asked, 1)
        assert scene.bench.device.launched == 0
        scene.check_idle()

    run_virtual(scenario)


def test_a_part_of_another_process_is_refused_whatever_it_says() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = Scene(loop)
        asked = Asked(5, [[1, 2, 3]])
        scene.ask(asked)
        scene.bench.engine.on_call(scene.shards["shard-1"], asked.part(0))
        assert scene.router.codes == {1: UNJOINED}
        assert "shard-1" in scene.router.errors[1].message

    run_virtual(scenario)


@pytest.mark.parametrize("rows", [TABLE[[2]].astype(np.float64), np.zeros((1, 3), np.float32)])
def test_rows_of_another_shape_or_dtype_end_the_request_and_are_not_merged(rows: Any) -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = Scene(loop)
        asked = Asked(5, [[1, 2, 3]])
        scene.ask(asked)
        scene.send(asked, 1)
        scene.send(asked, 0, rows=rows)
        assert scene.router.codes == {1: "INTERNAL"}
        assert scene.bench.device.launched == 0
        scene.check_idle()

    run_virtual(scenario)


def test_a_cancelled_join_is_forgotten_and_its_late_parts_are_dropped() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = Scene(loop)
        asked = Asked(5, [[1, 2, 3]])
        scene.ask(asked)
        scene.send(asked, 0)
        scene.bench.engine.on_cancel(scene.router, [1])
        scene.send(asked, 1)
        assert scene.desk._joins.stats.late == 1
        assert scene.router.ended == set()
        scene.check_idle()

    run_virtual(scenario)


def test_rows_that_were_joined_and_wait_in_a_lane_are_cancelled_like_any_others() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = Scene(loop)
        for number in range(3):
            asked = Asked(number, [[1, 2, 3]], request=number)
            scene.ask(asked)
            scene.send(asked, 0)
            scene.send(asked, 1)
        assert scene.bench.batcher.stats().waiting == 1
        scene.bench.engine.on_cancel(scene.router, [2])
        assert scene.bench.batcher.stats().waiting == 0
        await scene.bench.finish_all()
        assert scene.router.ended == {0, 1}
        scene.check_idle()

    run_virtual(scenario)


def test_a_router_that_is_gone_takes_its_joins_with_it() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = Scene(loop)
        scene.ask(Asked(5, [[1, 2, 3]]))
        scene.bench.engine.on_link_closed(scene.router)
        scene.check_idle()
        assert scene.router.sent == []

    run_virtual(scenario)


def test_a_shard_whose_link_breaks_ends_what_waits_for_it_and_nothing_else() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = Scene(loop)
        waits, has = Asked(5, [[1, 2, 3]], request=1), Asked(6, [[1, 2, 3]], request=2)
        scene.ask(waits)
        scene.ask(has)
        scene.send(has, 0)
        scene.bench.engine.on_link_closed(scene.shards["shard-0"])
        assert scene.router.codes == {1: UNJOINED}
        scene.send(has, 1)
        await scene.bench.finish_all()
        assert scene.answer(2) == has.expected

    run_virtual(scenario)


def test_what_nobody_speaks_of_again_is_cleared_away_at_its_deadline() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = Scene(loop)
        scene.ask(Asked(5, [[1, 2, 3]]))
        scene.send(Asked(6, [[1, 2, 3]]), 0)
        loop.now += HOUR_US / 1e6
        while scene.desk._sweeping is not None:
            loop.now += 0.3
            await scene.bench.settle()
        assert scene.router.codes == {1: "DEADLINE_EXCEEDED"}
        assert scene.desk._joins.is_idle

    run_virtual(scenario)


def test_a_unit_that_left_while_rows_were_awaited_is_asked_for_again_elsewhere() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = Scene(loop)
        asked = Asked(5, [[1, 2, 3]])
        scene.ask(asked)
        await scene.bench.engine.lanes.remove("pooled")
        scene.send(asked, 0)
        scene.send(asked, 1)
        assert scene.router.codes == {1: "STALE_EPOCH"}

    run_virtual(scenario)


def _broken(which: str) -> Frame:
    asked = Asked(5, [[1, 2, 3]])
    slots = asked.slots.reshape(asked.ids.shape)
    join = Join(5, asked.awaited)
    match which:
        case "no join":
            return frame_of("join", [Item(1, 1, HOUR_US)], slots, asked.bias, unit="pooled")
        case "no part":
            join = Join(5, [])
        case "a tensor that is not there":
            join = Join(5, [Awaited("shard-0", 1, 1, PLAN, 7)])
        case "a row in no part":
            join = Join(5, asked.awaited[:1])
        case "slots of another dtype":
            slots = slots.astype(np.int32)
        case "a tensor too few":
            item = Item(1, 1, HOUR_US, b"", None, join)
            return frame_of("join", [item], slots, unit="pooled")
        case "rows that do not add up":
            slots = np.concatenate([slots, slots])
        case "another unit":
            return frame_of("join", [asked.item], slots, asked.bias, unit="gone")
    item = Item(1, 1, HOUR_US, b"", None, join)
    return frame_of("join", [item], slots, asked.bias, unit="pooled")


@pytest.mark.parametrize(
    "which",
    ["no join", "no part", "a tensor that is not there", "a row in no part", "another unit",
     "slots of another dtype", "a tensor too few", "rows that do not add up"],
)  # fmt: skip
def test_an_item_that_makes_no_sense_is_refused_with_its_reason(which: str) -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = Scene(loop)
        scene.bench.engine.on_call(scene.router, _broken(which))
        wanted = "STALE_EPOCH" if which == "another unit" else "INVALID_ARGUMENT"
        assert scene.router.codes == {1: wanted}
        assert scene.router.errors[1].message
        scene.check_idle()

    run_virtual(scenario)


def test_slots_that_name_another_tensors_part_leave_no_row_unfilled() -> None:
    """The counts add up, but one place names a slot that nobody fills: no silent zero."""

    async def scenario(loop: VirtualLoop) -> None:
        scene = Scene(loop)
        asked = Asked(5, [[1, 2, 3]])
        asked.slots[0] = 9
        scene.ask(asked)
        scene.send(asked, 0)
        scene.send(asked, 1)
        assert scene.router.codes == {1: "INVALID_ARGUMENT"}
        assert scene.bench.device.launched == 0

    run_virtual(scenario)


def test_a_frame_of_parts_that_is_none_is_told_to_its_sender() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = Scene(loop)
        link = scene.shards["shard-0"]
        bare = frame_of("part", [Item(1, 1, HOUR_US)], TABLE[:1], unit="table")
        scene.bench.engine.on_call(link, bare)
        scene.bench.engine.on_call(link, call("pooled", {2: 1}, np.ones((1, 2), np.float32)))
        assert link.codes == {1: "INVALID_ARGUMENT", 2: "INVALID_ARGUMENT"}

    run_virtual(scenario)
