"""Bags in several tables in one call: answered together, and by whatever each table is made of."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, cast

import msgspec
import numpy as np
import pytest

from batching.errors import InvalidArgument
from shards.bags import set_id
from shards.crew import Crew
from shards.errors import PartitionNotHeld, SpecMismatch
from shards.manifest import BlobRef, Partition, TableUnit
from shards.table_sets import TableSet
from shards.tables import HostedTable
from shards.wire import CallHeader, Frame, TableRef
from shards.worker import WorkerEngine
from tests.shards.serving import FakeLink, call, until
from tests.shards.workers import Held, ask, double, ints, run

BLOB = BlobRef(digest="0" * 64, size=0)
CREW = Crew(2)
COUNTS = np.array([2, 1, 0, 3, 1, 2], np.int32)
IDS = np.array([0, 29, 7, 1, 2, 3, 39, 5, 5], np.int32)
#: Of two requests in three tables.
BAGS = np.array([[2, 0, 1], [1, 1, 1]], np.int64)


def rows_of(number: int) -> Any:
    draw = np.random.default_rng(number)
    return draw.integers(-9, 9, (30 + 10 * number, 4)).astype(("float32", "float16")[number % 2])


def table_of(number: int, crew: Crew | None, dim: int = 4) -> HostedTable:
    rows = rows_of(number)
    half = len(rows) // 2
    unit = TableUnit(
        id=f"t{number}", dtype=str(rows.dtype), dim=dim, rows=len(rows),
        partitions=(
            Partition(first_row=0, rows=half, blob=BLOB),
            Partition(first_row=half, rows=len(rows) - half, blob=BLOB),
        ),
    )  # fmt: skip
    return HostedTable(unit, {0: rows[:half], 1: rows[half:]}, crew=crew)


def expected(op: str, weights: Any = None) -> list[list[float]]:
    """Of `BAGS`: each bag by the table that it is of."""
    owners = np.repeat([0, 1, 2] * 2, BAGS.reshape(-1))
    found = []
    for bag, ids in enumerate(np.split(IDS, np.cumsum(COUNTS)[:-1])):
        at = int(COUNTS[:bag].sum())
        picked = rows_of(owners[bag])[ids].astype(np.float32)
        if weights is not None:
            picked *= weights[at : at + len(ids), None]
        empty = np.zeros(4, np.float32)
        pooled = picked.max(0, initial=-np.inf) if op == "max" else picked.sum(0)
        found.append((pooled if len(ids) else empty).tolist())
    return found


@pytest.mark.parametrize("crews", [(CREW, CREW, CREW), (None, None, None), (CREW, None, CREW)])
def test_bags_of_several_tables_are_those_of_each_whatever_it_is_made_of(
    crews: Sequence[Crew | None],
) -> None:
    tables = TableSet([table_of(number, crew) for number, crew in enumerate(crews)])
    weights = np.arange(len(IDS), dtype=np.float32)
    assert tables.pool(BAGS, COUNTS, IDS, "sum").tolist() == expected("sum")
    assert tables.pool(BAGS, COUNTS, IDS, "max").tolist() == expected("max")
    assert tables.pool(BAGS, COUNTS, IDS, "sum", weights).tolist() == expected("sum", weights)
    beyond = IDS.copy()
    beyond[2] = 30  # the second table has such a row, the first has none
    with pytest.raises(PartitionNotHeld, match="id 30 "):
        tables.pool(BAGS, COUNTS, beyond, "sum")
    with pytest.raises(SpecMismatch, match="do not cut"):
        tables.pool(BAGS, COUNTS, IDS[1:], "sum")


def test_tables_whose_rows_differ_in_size_are_no_set() -> None:
    other = HostedTable(TableUnit(id="w", dtype="float32", dim=5, rows=0, partitions=()), {})
    with pytest.raises(InvalidArgument, match="differ in size"):
        TableSet([table_of(0, None), other])


# --- as calls ----------------------------------------------------------------------------------

REFS = tuple(TableRef(f"t{number}", f"plan{number}") for number in range(3))


def bags_call(
    refs: tuple[TableRef, ...] = REFS,
    bags: Sequence[tuple[int, ...]] = ((2, 0, 1), (1, 1, 1)),
    unit: str | None = None,
    op: str = "sum",
    ids: Any = IDS,
) -> Frame:
    """A call of requests 1 and 2."""
    name = set_id(refs) if unit is None else unit
    frame = call(name, {number: 3 for number in (1, 2)}, COUNTS, ids, op=op)
    header = cast(CallHeader, frame.header)
    replace = msgspec.structs.replace
    items = [replace(item, bags=own) for item, own in zip(header.items, bags, strict=True)]
    return replace(frame, header=replace(header, items=items, tables=refs))


def install(engine: WorkerEngine, **cold: bool) -> None:
    for number in range(3):
        name = f"t{number}"
        engine.install(
            name, double, 16, f"plan{number}", table_of(number, CREW),
            own_thread=cold.get(name, False),
        )  # fmt: skip


def test_each_request_of_a_call_of_several_tables_gets_its_own_bags() -> None:
    async def scenario(engine: WorkerEngine) -> None:
        install(engine)
        link = FakeLink()
        await ask(engine, link, bags_call(), ends=2)
        told = [row for number in (1, 2) for row in link.answers[number][0].tolist()]
        assert told == expected("sum")
        # What one asks wrongly costs the other nothing.
        lost, beyond = FakeLink(), IDS.copy()
        beyond[-1] = 99
        await ask(engine, lost, bags_call(ids=beyond), ends=2)
        assert lost.answers[1][0].tolist() == expected("sum")[:3]
        assert lost.errors.keys() == {2}

    run(scenario)


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (bags_call(unit="t0"), "INVALID_ARGUMENT"),
        (bags_call(unit=set_id(REFS[:2])), "INVALID_ARGUMENT"),
        (bags_call(bags=[(3, 0, 1), (1, 1, 1)]), "INVALID_ARGUMENT"),
        (bags_call(bags=[(2, 1), (1, 1, 1)]), "INVALID_ARGUMENT"),
        (bags_call(op="rows"), "INVALID_ARGUMENT"),
        (bags_call((*REFS[:2], TableRef("host", ""))), "INVALID_ARGUMENT"),
        (bags_call((*REFS[:2], TableRef("t3", "plan3"))), "STALE_EPOCH"),
        (bags_call((*REFS[:2], TableRef("t2", "other"))), "STALE_EPOCH"),
    ],
)
def test_a_call_that_does_not_say_what_it_asks_is_refused(frame: Frame, code: str) -> None:
    async def scenario(engine: WorkerEngine) -> None:
        install(engine)
        engine.install("host", double)
        link = FakeLink()
        await ask(engine, link, frame, ends=2)
        assert link.codes == {1: code, 2: code}

    run(scenario)


def test_a_call_with_a_table_on_disk_holds_up_no_other_call_and_leaves_no_thread() -> None:
    async def scenario(engine: WorkerEngine) -> None:
        before = set(threading.enumerate())
        install(engine, t1=True)
        held = Held()
        engine.install("held", held)
        blocked, link = FakeLink("blocked"), FakeLink()
        engine.on_call(blocked, call("held", {1: 1}, ints(1)))
        await held.has_begun()
        # The thread for all is busy: the call of the three is done in one of its own.
        await ask(engine, link, bags_call(), ends=2)
        assert not blocked.ended
        held.go.release()
        for name in ("t0", "t1", "t2"):
            await engine.remove(name)
        mine = set(threading.enumerate()) - before
        refused = FakeLink()
        await ask(engine, refused, bags_call(), ends=2)
        assert refused.codes == {1: "STALE_EPOCH", 2: "STALE_EPOCH"}
        await until(lambda: not any(each.is_alive() and "worker" in each.name for each in mine))

    run(scenario)
