"""Look-ups whose rows go from the shards straight to the device: who is told what, when it is done
so, and what becomes of a request when it does not work out.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from shards.manifest import Manifest, Unit
from shards.replies import UNJOINED
from shards.specs import Spec
from shards.wire import NO_SLOT, CallHeader, ItemError
from tests.cluster.routing_actors import Asked
from tests.cluster.routing_fakes import (
    Bench,
    Recorder,
    VirtualLoop,
    epoch,
    manifest,
    map_unit,
    rows_of,
    run_virtually,
    sleep_ms,
    table_unit,
    turns,
)

USERS = table_unit("users", sizes=(6,), missing="zero")
ITEMS = table_unit("items", sizes=(4, 3, 5), missing="zero")
TRUNK = map_unit(
    "trunk", {"u": Spec(("b", 2)), "i": Spec(("b", "t", 2)), "x": Spec(("b",))}, lengths={"t": (4,)}
)
PLACEMENT = {"users": [["s"]], "items": [["s"], ["t"], ["s"]], "trunk": [["d"]]}
DETOUR_S = 5.0


def ranker(*, missing: str = "zero") -> Manifest:
    """A user, some items and a number; rows of both tables are for the trunk alone."""
    items = table_unit("items", sizes=(4, 3, 5), missing=missing)  # type: ignore[arg-type]
    units: dict[str, Unit] = {"users": USERS, "items": items, "trunk": TRUNK}
    nodes = [
        ("users", {"ids": "in:user"}),
        ("items", {"ids": "in:item"}),
        ("trunk", {"u": "0:rows", "i": "1:rows", "x": "in:x"}),
    ]
    inputs = {
        "user": Spec(("b",), "int64"), "item": Spec(("b", "t"), "int64"), "x": Spec(("b",)),
    }  # fmt: skip
    return manifest(units, nodes, inputs, {"y": Spec(("b",))}, {"y": "2:y"})


def scored(u: Any, i: Any, x: Any) -> Any:
    return u.sum(1) + 7 * i.sum((1, 2)) + x


def expected(given: dict[str, Any]) -> list[float]:
    def rows(unit: Any, ids: Any) -> Any:
        known = (ids >= 0) & (ids < unit.rows)
        table = rows_of(unit)
        return np.where(known[..., None], table[np.where(known, ids, 0)], np.float32(0))

    found = scored(rows(USERS, given["user"]), rows(ITEMS, given["item"]), given["x"])
    return [float(each) for each in found]


def inputs(users: list[int], items: list[list[int]]) -> dict[str, Any]:
    return {
        "user": np.array(users, np.int64),
        "item": np.array(items, np.int64),
        "x": np.arange(len(users), dtype=np.float32),
    }


class Scene(Bench):
    """The ranker on two shards and a device that joins."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__(loop)
        self.actors["d"].host(TRUNK)

    async def open(self, least: int | None = 0, number: int = 1, **options: Any) -> None:
        found = (ranker(**options), PLACEMENT)
        await self.router.adopt(epoch(number, found, continuation_bytes_min=least))

    def headers(self, name: str) -> list[CallHeader]:
        return [header for header, _ in self.actors[name].link.calls]

    def ops(self) -> dict[str, list[str]]:
        """What each actor was asked for, by whom its rows are wanted."""
        return {
            name: [
                header.op if header.reply_to is None else f"{header.op} for {header.reply_to.actor}"
                for header in self.headers(name)
            ]
            for name in "std"
        }

    async def answer_all(self) -> None:
        """Every actor does what it is asked until there is nothing left to do."""
        while any(self.actors[name].asked for name in "std"):
            for name in "std":
                for asked in [*self.actors[name].asked]:
                    self.actors[name].asked.remove(asked)
                    answer(asked)
            await turns()

    def check(self, sink: Recorder, given: dict[str, Any]) -> None:
        assert [float(each) for each in sink.answer] == expected(given)
        self.check_at_rest()


def answer(asked: Asked) -> None:
    match asked.header.unit:
        case "users":
            asked.answer(rows_of(USERS)[asked.arrays[0]])
        case "items":
            asked.answer(rows_of(ITEMS)[asked.arrays[0]])
        case "trunk":
            asked.answer(scored(*asked.arrays))


GIVEN = inputs([1, 5], [[0, 4, 11], [5, 5, -1]])


def test_shards_are_told_to_send_on_and_the_device_what_to_wait_for() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = Scene(loop)
        await scene.open()
        sink = scene.ask(GIVEN)
        await turns()
        assert scene.ops() == {
            "s": ["rows for d", "rows for d"], "t": ["rows for d"], "d": ["join"],
        }  # fmt: skip
        [(header, arrays)] = scene.actors["d"].link.calls
        [item] = header.items
        assert item.join is not None
        assert [(part.actor, part.rows, part.tensor) for part in item.join.parts] == [
            ("s", 2, 0), ("s", 2, 1), ("t", 3, 1),
        ]  # fmt: skip
        assert arrays[1].tolist() == [[1, 2, 1], [2, 2, NO_SLOT]]
        assert scene.router.stats.missing_rows == 1
        await scene.answer_all()
        scene.check(sink, GIVEN)
        stats = scene.router.stats
        assert (stats.joined, stats.unjoined, stats.retried) == (1, 0, 0)
        scene.router.close()

    run_virtually(scenario)


@pytest.mark.parametrize(("least", "joined"), [(None, 0), (65, 0), (64, 1), (0, 1)])
def test_rows_of_fewer_bytes_than_pays_come_through_the_router(
    least: int | None, joined: int
) -> None:
    """Two users and six items of two floats each: 64 bytes."""

    async def scenario(loop: VirtualLoop) -> None:
        scene = Scene(loop)
        await scene.open(least)
        sink = scene.ask(GIVEN)
        await turns()
        await scene.answer_all()
        scene.check(sink, GIVEN)
        assert scene.router.stats.joined == joined
        scene.router.close()

    run_virtually(scenario)


@pytest.mark.parametrize("seed", range(12))
def test_both_ways_answer_bit_for_bit_alike(seed: int) -> None:
    chosen = random.Random(seed)

    async def scenario(loop: VirtualLoop) -> None:
        answers: list[list[list[float]]] = []
        asked = []
        for _ in range(6):
            rows, items = chosen.randint(1, 5), chosen.randint(1, 4)
            asked.append(
                inputs(
                    [chosen.randint(-1, 6) for _ in range(rows)],
                    [[chosen.randint(-1, 12) for _ in range(items)] for _ in range(rows)],
                )
            )
        for least in (None, 0):
            scene = Scene(loop)
            await scene.open(least)
            sinks = [scene.ask(given) for given in asked]
            await turns()
            await scene.answer_all()
            answers.append([sink.answer.tolist() for sink in sinks])
            scene.check_at_rest()
            scene.router.close()
        assert answers[0] == answers[1] == [expected(given) for given in asked]

    run_virtually(scenario)


def test_a_look_up_of_which_no_row_exists_asks_nobody_for_it() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = Scene(loop)
        await scene.open()
        half, none = inputs([-1], [[1, 2]]), inputs([-1], [[-1, 12]])
        sinks = [scene.ask(half), scene.ask(none)]
        await turns()
        assert scene.ops() == {"s": ["rows for d"], "t": [], "d": ["join", "run"]}
        await scene.answer_all()
        assert [sink.answer.tolist() for sink in sinks] == [expected(half), expected(none)]
        scene.check_at_rest()
        scene.router.close()

    run_virtually(scenario)


def test_a_missing_id_that_is_an_error_ends_the_request_before_anybody_is_asked() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = Scene(loop)
        await scene.open(missing="error")
        sink = scene.ask(GIVEN)
        assert sink.code == "INVALID_ARGUMENT"
        assert "id -1 is not in a table of 12 rows" in str(sink.error)
        await turns()
        assert scene.ops() == {"s": [], "t": [], "d": []}
        scene.check_at_rest()
        scene.router.close()

    run_virtually(scenario)


def test_rows_that_do_not_fit_the_unit_are_refused_before_anybody_is_asked() -> None:
    """Five items where the longest bucket has four: as if the rows had come here."""

    async def scenario(loop: VirtualLoop) -> None:
        scene = Scene(loop)
        codes = []
        for number, least in enumerate((None, 0), 1):
            await scene.open(least, number)
            sink = scene.ask(inputs([1], [[1, 2, 3, 4, 5]]))
            await turns()
            await scene.answer_all()
            codes.append((sink.code, str(sink.error)))
        assert codes[0] == codes[1]
        scene.check_at_rest()
        scene.router.close()

    run_virtually(scenario)


@pytest.mark.parametrize("who", ["s", "d"])
def test_rows_that_cannot_be_joined_come_through_the_router_once_and_for_a_while(
    who: str,
) -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = Scene(loop)
        await scene.open()
        first = scene.ask(GIVEN)
        await turns()
        if who == "s":
            scene.actors["s"].take().refuse(UNJOINED, "d cannot be reached")
        else:
            [header] = scene.headers("d")
            scene.actors["d"].link.reply([], (), "trunk", [_unjoined(header)])
        await turns()
        assert scene.router.stats.retried == 1
        await scene.answer_all()
        scene.check(first, GIVEN)
        second = scene.ask(GIVEN)
        await turns()
        await scene.answer_all()
        scene.check(second, GIVEN)
        assert (scene.router.stats.joined, scene.router.stats.unjoined) == (1, 1)
        await sleep_ms(DETOUR_S * 1000 + 1)
        third = scene.ask(GIVEN)
        await turns()
        await scene.answer_all()
        scene.check(third, GIVEN)
        assert (scene.router.stats.joined, scene.router.stats.unjoined) == (2, 1)
        scene.router.close()

    run_virtually(scenario)


def _unjoined(header: CallHeader) -> ItemError:
    return ItemError(header.items[0].request, UNJOINED, "a part was not what is awaited")


def test_the_end_of_a_request_takes_back_what_everybody_was_told() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = Scene(loop)
        await scene.open()
        late, gone = scene.ask(GIVEN, timeout_s=0.1), scene.ask(GIVEN)
        await turns()
        assert gone.request is not None
        scene.router.cancel(gone.request)
        await sleep_ms(120)
        assert (late.code, gone.code) == ("DEADLINE_EXCEEDED", "CANCELLED")
        scene.check_at_rest()
        for name, calls in (("s", 4), ("t", 2), ("d", 2)):
            assert len(set(scene.actors[name].link.cancelled)) == calls
        await scene.answer_all()  # the shards did not hear in time
        assert scene.actors["d"].desk is not None
        assert scene.actors["d"].desk._joins.stats.late == 6
        assert not scene.actors["d"].asked
        scene.router.close()

    run_virtually(scenario)


@pytest.mark.parametrize("who", ["s", "d"])
def test_a_lost_actor_means_one_more_try_through_the_router(who: str) -> None:
    """The only shard is away for the second try, too; the device is back when the rows are here."""

    async def scenario(loop: VirtualLoop) -> None:
        scene = Scene(loop)
        await scene.open()
        sink = scene.ask(GIVEN)
        await turns()
        for name in "std":
            scene.actors[name].asked.clear()
        scene.actors[who].link.break_off()
        assert scene.router.stats.retried == 1
        await sleep_ms(200)
        await scene.answer_all()
        if who == "s":
            assert sink.code == "UNAVAILABLE"
            scene.check_at_rest()
        else:
            scene.check(sink, GIVEN)
        assert scene.router.stats.joined == 1
        scene.router.close()

    run_virtually(scenario)


def test_an_answer_by_another_plan_is_refused_and_counted() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = Scene(loop)
        await scene.open(None)
        sink = scene.ask(GIVEN)
        await turns()
        asked = scene.actors["t"].take()
        assert asked.header.plan
        asked.answer(rows_of(ITEMS)[asked.arrays[0]], plan="another")
        assert sink.code == "INTERNAL"
        assert scene.router.stats.mismatched == 1
        scene.check_at_rest()
        scene.router.close()

    run_virtually(scenario)


def test_rows_that_come_back_although_they_were_to_go_on_are_never_merged() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = Scene(loop)
        await scene.open()
        sink = scene.ask(GIVEN)
        await turns()
        asked = scene.actors["t"].take()
        rows = rows_of(ITEMS)[asked.arrays[0]]
        items = [(asked.item.request, asked.item.rows)]
        asked.link.reply(items, [rows], "items", plan=asked.header.plan)
        assert sink.code == "INTERNAL"
        scene.check_at_rest()
        scene.router.close()

    run_virtually(scenario)


def test_requests_for_one_device_share_frames_and_those_for_another_do_not() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = Scene(loop)
        scene.actors["e"].host(TRUNK)
        placement = {**PLACEMENT, "trunk": [["d", "e"]]}
        await scene.router.adopt(epoch(1, (ranker(), placement), continuation_bytes_min=0))
        sinks = [scene.ask(GIVEN) for _ in range(4)]
        await turns()
        assert [len(header.items) for header in scene.headers("d")] == [2]
        assert [len(header.items) for header in scene.headers("e")] == [2]
        devices = [header.reply_to.actor for header in scene.headers("t") if header.reply_to]
        assert sorted(devices) == ["d", "e"]
        await scene.answer_all()
        for asked in [*scene.actors["e"].asked]:
            answer(asked)
        assert [sink.answer.tolist() for sink in sinks] == [expected(GIVEN)] * 4
        scene.check_at_rest()
        scene.router.close()

    run_virtually(scenario)


def test_two_routers_never_use_the_same_join_number() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        numbers: set[int] = set()
        for _ in range(2):
            scene = Scene(loop)
            await scene.open()
            for _ in range(3):
                scene.ask(GIVEN)
            await turns()
            for header in scene.headers("d"):
                numbers.update(item.join.request for item in header.items if item.join)
            scene.router.close()
        assert len(numbers) == 6

    run_virtually(scenario)
