"""Tables in the NVMe tier, as an actor serves them: the same rows, from disk, within a budget."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.bundle import Bundle
from shards.cold_rows import ColdRows
from shards.crew import Crew
from shards.manifest import TableUnit
from shards.openers import TableOpener, _Opening
from shards.orders import HostedUnit, UnitState
from shards.overlays import Patch
from shards.pooling import pool_rows
from shards.specs import Spec
from shards.store import LocalStore
from shards.tables import HostedTable
from tests.shards.opening import Actor, run
from tests.shards.serving import Array, FakeLink, call, until

ROWS = np.random.default_rng(3).integers(-60, 60, size=(4000, 24)).astype(np.float32)
CACHED = 0.25
TABLE_BYTES = ROWS.nbytes


def save(store: Path, version: int = 1, name: str = "model", dtype: str = "float32") -> TableUnit:
    with Bundle.create(store, name, version) as bundle:
        rows = bundle.table("words", ROWS, partitions=4, dtype=dtype)
        declare(bundle, rows)
    return unit_of(store, version, name)


def declare(bundle: Bundle, rows: Any) -> None:
    @bundle.signature(inputs={"ids": Spec(("b",), "int64")})
    def answer(ids: Any) -> Mapping[str, Any]:
        return {"rows": rows.rows(ids)}


def save_delta(store: Path, ids: Array) -> TableUnit:
    with Bundle.delta(store, "model", 1, 2) as bundle:
        bundle.update_rows("words", ids, ROWS[ids] + 1000)
    return unit_of(store, 2)


def unit_of(store: Path, version: int, name: str = "model") -> TableUnit:
    unit = LocalStore(store).read_manifest(name, version).units["words"]
    assert isinstance(unit, TableUnit)
    return unit


def words(cached: float | None = CACHED, *partitions: int) -> HostedUnit:
    return HostedUnit(name="words", partitions=partitions or (0, 1, 2, 3), cached=cached)


async def rows_of(actor: Actor, unit: TableUnit, ids: Array) -> Array:
    answer = await actor.ask(unit.id, ids)
    assert isinstance(answer, list), answer
    return answer[0]


def state_of(actor: Actor, unit: TableUnit) -> UnitState:
    (found,) = [state for state in actor.books.units if state.id == unit.id]
    return found


def drawn(count: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(len(ROWS), size=count)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("op", ["rows", "sum", "max"])
def test_rows_and_bags_are_those_of_the_same_table_in_memory(
    tmp_path: Path, dtype: str, op: str
) -> None:
    unit = save(tmp_path, dtype=dtype)
    store, crew = LocalStore(tmp_path), Crew(3)
    tables = {}
    for cached in (None, CACHED):
        parts = _Opening(store, unit, words(cached), crew).parts(range(4), {})
        is_cold = [isinstance(part.rows, ColdRows) for part in parts.values()]
        assert is_cold == [cached is not None] * 4
        tables[cached] = HostedTable(unit, {index: part.rows for index, part in parts.items()})
    for turn in range(4):
        ids = drawn(700, turn)
        if op == "rows":
            found = [table.rows(ids) for table in tables.values()]
        else:
            offsets = np.array([0, 3, 3, 400, 700], np.int64)
            weights = np.arange(700, dtype=np.float32) if op == "sum" else None
            found = [t.pool(ids, offsets, op, weights) for t in tables.values()]  # type: ignore[arg-type]
        assert found[0].dtype == found[1].dtype
        assert found[0].tobytes() == found[1].tobytes()


def test_bags_are_pooled_at_the_actor(tmp_path: Path) -> None:
    unit = save(tmp_path)

    async def scenario(actor: Actor) -> None:
        await actor.load(1, words())
        ids, counts = drawn(50), np.array([20, 0, 30], np.int32)
        link = FakeLink()
        actor.engine.on_call(link, call(unit.id, {1: 3}, counts, ids, op="sum"))
        await until(lambda: 1 in link.ended)
        expected = pool_rows(ROWS[ids], np.array([0, 20, 20, 50]), "sum", None)
        assert link.answers[1][0].tobytes() == expected.tobytes()

    run(tmp_path, TableOpener, scenario)


def test_books_count_the_budget_and_state_tells_what_was_asked(tmp_path: Path) -> None:
    unit = save(tmp_path)

    async def scenario(actor: Actor) -> None:
        await actor.load(1, words())
        assert 0.5 * CACHED * TABLE_BYTES < actor.books.reserved_bytes <= CACHED * TABLE_BYTES
        ids = drawn(600)
        for _ in range(3):
            np.testing.assert_array_equal(await rows_of(actor, unit, ids), ROWS[ids])
        state = state_of(actor, unit)
        assert state.nbytes == actor.books.reserved_bytes
        assert state.note == ""
        assert state.cache is not None
        assert state.cache.nbytes == state.nbytes <= state.cache.budget
        assert state.cache.budget == 4 * int(TABLE_BYTES // 4 * CACHED)
        assert 0 < state.cache.used < state.cache.nbytes
        assert state.cache.wait_s > 0
        assert state.cache.hits + state.cache.misses == 1800
        assert state.cache.hits > 600
        assert state.cache.read_bytes >= state.cache.reads * 4096 > 0

    # There is no room for the table in memory.
    run(tmp_path, TableOpener, scenario, capacity=TABLE_BYTES // 2)


def test_a_delta_shares_the_cache_of_its_base_and_keeps_its_own_rows(tmp_path: Path) -> None:
    first = save(tmp_path)
    changed = np.arange(0, len(ROWS), 7)
    second = save_delta(tmp_path, changed)

    async def scenario(actor: Actor) -> None:
        await actor.load(1, words())
        one = actor.books.reserved_bytes
        await actor.load(2, words())
        overlays = sum(part.overlays[0].blob.size for part in second.partitions)
        assert actor.books.reserved_bytes == one + overlays
        ids = drawn(500)
        new = ROWS.copy()
        new[changed] += 1000
        np.testing.assert_array_equal(await rows_of(actor, first, ids), ROWS[ids])
        misses = state_of(actor, first).cache
        assert actor.opener.caches == {first.id: misses}
        np.testing.assert_array_equal(await rows_of(actor, second, ids), new[ids])
        after = state_of(actor, second).cache
        assert misses is not None
        assert after is not None
        assert after.hits > misses.hits
        await actor.unload(1)
        np.testing.assert_array_equal(await rows_of(actor, second, ids), new[ids])
        await actor.unload(2)
        assert actor.books.reserved_bytes == 0

    run(tmp_path, TableOpener, scenario)


@pytest.mark.parametrize("first", [None, CACHED])
def test_a_base_stays_as_its_first_user_wanted_it_until_nobody_uses_it(
    tmp_path: Path, first: float | None
) -> None:
    unit = save(tmp_path)
    other = save_delta(tmp_path, np.array([5]))
    second = CACHED if first is None else None

    async def scenario(actor: Actor) -> None:
        await actor.load(1, words(first))
        await actor.load(2, words(second))
        assert state_of(actor, unit).note == ""
        assert "another version" in state_of(actor, other).note
        assert (state_of(actor, other).cache is None) == (first is None)
        assert (await rows_of(actor, other, np.array([5])))[0, 0] == ROWS[5, 0] + 1000
        await actor.unload(1)
        await actor.unload(2)
        await actor.load(2, words(second))
        assert state_of(actor, other).note == ""
        assert (state_of(actor, other).cache is None) == (second is None)

    run(tmp_path, TableOpener, scenario)


def test_tables_of_the_same_bytes_and_other_rows_have_their_own_caches(tmp_path: Path) -> None:
    with Bundle.create(tmp_path, "model", 1) as bundle:
        wide = bundle.table("words", np.zeros((100, 8), np.float32))
        narrow = bundle.table("more", np.zeros((200, 4), np.float32))

        @bundle.signature(inputs={"ids": Spec(("b",), "int64")})
        def answer(ids: Any) -> Mapping[str, Any]:
            return {"wide": wide.rows(ids), "narrow": narrow.rows(ids)}

    units = LocalStore(tmp_path).read_manifest("model", 1).units
    assert len({unit.partitions[0].blob.digest for unit in units.values()}) == 1  # type: ignore[union-attr]

    async def scenario(actor: Actor) -> None:
        hosted = [HostedUnit(name=name, partitions=(0,), cached=1.0) for name in units]
        await actor.load(1, *hosted)
        for name, width in (("words", 8), ("more", 4)):
            found = await rows_of(actor, units[name], np.array([99, 0]))  # type: ignore[arg-type]
            np.testing.assert_array_equal(found, np.zeros((2, width), np.float32))

    run(tmp_path, TableOpener, scenario)


def test_overlays_are_over_rows_on_disk_in_one_and_in_several_partitions(tmp_path: Path) -> None:
    save(tmp_path)
    unit = save_delta(tmp_path, np.arange(0, len(ROWS), 3))
    opening = _Opening(LocalStore(tmp_path), unit, words(), Crew(2))
    expected = ROWS.copy()
    expected[::3] += 1000
    for held in ((2,), (0, 1, 2, 3)):
        parts = opening.parts(held, {})
        patches = {index: part.patch for index, part in parts.items()}
        assert all(isinstance(patch, Patch) for patch in patches.values())
        table = HostedTable(unit, {i: part.rows for i, part in parts.items()}, patches)  # type: ignore[arg-type]
        ids = 2000 + drawn(300) % 1000
        np.testing.assert_array_equal(table.rows(ids), expected[ids])
