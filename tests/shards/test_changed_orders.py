"""An actor that is told to hold other partitions of a table that it serves: no look-up fails."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from batching.errors import ResourceExhausted
from shards.bundle import Bundle
from shards.manifest import TableUnit
from shards.openers import TableOpener
from shards.orders import part_address
from shards.specs import Spec
from tests.shards.opening import Actor, run
from tests.shards.test_openers import PART_BYTES, ROWS, holds, ids, parts, save_table


@pytest.fixture
def table(tmp_path: Path) -> TableUnit:
    return save_table(tmp_path, 1)


def test_partitions_come_and_go_while_those_that_stay_are_looked_up(
    tmp_path: Path, table: TableUnit
) -> None:
    async def scenario(actor: Actor) -> None:
        await actor.load(1, parts(0))
        for wanted in ((0, 1, 2), (0, 2), (0,), (0, 3)):
            change = asyncio.ensure_future(actor.load(1, parts(*wanted)))
            while not change.done():
                assert isinstance(await actor.ask(table.id, ids(0, 1, 2)), list)
            await change
            assert await holds(actor, table) == set(wanted)
            assert actor.books.reserved_bytes == len(wanted) * PART_BYTES
        await actor.unload(1)
        assert actor.books.reserved_bytes == 0

    run(tmp_path, TableOpener, scenario)


def test_where_there_is_no_room_for_more_it_keeps_what_it_has(
    tmp_path: Path, table: TableUnit
) -> None:
    async def scenario(actor: Actor) -> None:
        await actor.load(1, parts(0, 1))
        with pytest.raises(ResourceExhausted, match="24 short"):
            await actor.load(1, parts(0, 1, 2))
        assert await holds(actor, table) == {0, 1}

    run(tmp_path, TableOpener, scenario, capacity=2 * PART_BYTES)


def test_pieces_of_columns_come_and_go_likewise(tmp_path: Path) -> None:
    with Bundle.create(tmp_path, "model", 1) as bundle:
        rows = bundle.table("words", ROWS, partitions=2, partition="columns")

        @bundle.signature(inputs={"ids": Spec(("b",), "int64")})
        def answer(ids: Any) -> Any:
            return {"rows": rows.rows(ids)}

    unit = bundle.manifest.units["words"]
    assert isinstance(unit, TableUnit)

    async def scenario(actor: Actor) -> None:
        for wanted in ((0,), (0, 1), (1,)):
            await actor.load(1, parts(*wanted))
            for index in range(2):
                found = await actor.ask(part_address(unit.id, index), ids(5))
                assert isinstance(found, list) == (index in wanted)
                if isinstance(found, list):
                    assert found[0].tolist() == ROWS[[5], index : index + 1].tolist()

    run(tmp_path, TableOpener, scenario)
