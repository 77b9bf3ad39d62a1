"""How pages of tables come to memory: when they are asked for, beforehand, or for good."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shards
from batching.errors import FailedPrecondition, ResourceExhausted
from shards.bundle import Bundle
from shards.local import LocalStore
from shards.manifest import TableUnit
from shards.openers import TableOpener
from shards.orders import HostedUnit, LoadOrder, Residency
from shards.residency import settle
from shards.sparse_rows import SparseRows
from tests.shards.opening import Actor, run
from tests.shards.serving import call, until

ROWS = 4096
DIM = 64


def save(store: LocalStore, rows: Any, version: int = 1) -> TableUnit:
    with Bundle.create(store, "model", version) as bundle:
        table = bundle.table("users", rows, partitions=2)

        @bundle.signature("serving_default", inputs={"ids": shards.Spec(("b",), "int64")})
        def look_up(ids: Any) -> Any:
            return {"rows": table.rows(ids)}

    unit = bundle.manifest.units["users"]
    assert isinstance(unit, TableUnit)
    return unit


def held_pages(store: LocalStore, digest: str) -> dict[str, int]:
    """Bytes of this process's mapping of a blob: ``Rss`` and ``Locked``."""
    found: dict[str, int] = {}
    is_it = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, _, rest = line.partition(" ")
        if not key.endswith(":"):
            is_it = line.endswith(f"{store.path}/blobs/blake3/{digest}")
        elif is_it and key in ("Rss:", "Locked:"):
            found[key[:-1]] = found.get(key[:-1], 0) + (int(rest.split()[0]) << 10)
    return found


def flags_of(store: LocalStore, digest: str) -> list[str]:
    """What the kernel was told of this process's mapping of a blob."""
    is_it = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, _, rest = line.partition(" ")
        if not key.endswith(":"):
            is_it = line.endswith(f"{store.path}/blobs/blake3/{digest}")
        elif is_it and key == "VmFlags:":
            return rest.split()
    return []


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def unit(store: LocalStore) -> TableUnit:
    rows = np.arange(ROWS * DIM, dtype=np.float32).reshape(ROWS, DIM)
    return save(store, rows)


def order(resident: Residency, store: LocalStore, version: int = 1) -> LoadOrder:
    units = (HostedUnit(name="users", partitions=(0, 1)),)
    return LoadOrder(
        term=1, store=str(store.path), servable="model", version=version, units=units,
        resident=resident,
    )  # fmt: skip


def test_a_mapped_table_is_read_when_it_is_asked_for(store: LocalStore, unit: TableUnit) -> None:
    blob = unit.partitions[0].blob

    async def scenario(actor: Actor) -> None:
        await actor.books.load(order("mapped", store))
        assert held_pages(store, blob.digest)["Rss"] < blob.size // 2

    run(store.path, TableOpener, scenario)


@pytest.mark.parametrize("resident", ["populated", "locked"])
def test_a_table_is_in_memory_before_it_is_available(
    store: LocalStore, unit: TableUnit, resident: Residency
) -> None:
    async def scenario(actor: Actor) -> None:
        await actor.books.load(order(resident, store))
        for part in unit.partitions:
            pages = held_pages(store, part.blob.digest)
            assert pages["Rss"] == part.blob.size
            assert pages["Locked"] == (part.blob.size if resident == "locked" else 0)

    run(store.path, TableOpener, scenario)


def test_a_version_that_wants_more_of_a_table_that_is_open_gets_it(
    store: LocalStore, unit: TableUnit
) -> None:
    save(store, np.arange(ROWS * DIM, dtype=np.float32).reshape(ROWS, DIM), version=2)
    blob = unit.partitions[1].blob

    async def scenario(actor: Actor) -> None:
        link, few = actor.link, np.arange(3)
        await actor.books.load(order("mapped", store))
        actor.engine.on_call(link, call(unit.id, {1: 3}, few, op="rows"))
        assert not link.ended  # a page may have to come from a disk: a thread waits for it
        await until(lambda: link.ended == {1})
        await actor.books.load(order("locked", store, version=2))
        assert held_pages(store, blob.digest)["Locked"] == blob.size
        actor.engine.on_call(link, call(unit.id, {2: 3}, few, op="rows"))
        assert link.ended == {1, 2}
        await actor.unload(1)
        actor.engine.on_call(link, call(unit.id, {3: 3}, few, op="rows"))
        assert link.ended == {1, 2, 3}

    run(store.path, TableOpener, scenario)


@pytest.mark.parametrize("resident", ["populated", "locked"])
def test_the_holes_of_a_sparse_table_do_not_become_memory(
    store: LocalStore, resident: Residency
) -> None:
    rows = SparseRows(rows=1 << 30, dim=DIM, given=[])
    save(store, rows)

    async def scenario(actor: Actor) -> None:
        with pytest.raises(FailedPrecondition, match="resident: mapped"):
            await actor.books.load(order(resident, store))
        assert actor.books.reserved_bytes == 0

    run(store.path, TableOpener, scenario)


def test_what_may_not_be_locked_is_refused_and_nothing_stays_locked(
    store: LocalStore, unit: TableUnit, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = unit.partitions[0].blob
    rows = store.map(blob)

    class Libc:
        """As for a process without the right to lock what it likes."""

        unlocked = 0

        def madvise(self, *_: object) -> int:
            return 0

        def mlock(self, *_: object) -> int:
            return -1

        def munlock(self, *_: object) -> int:
            self.unlocked += 1
            return 0

    libc = Libc()
    monkeypatch.setattr("shards.residency._LIBC", libc)
    with pytest.raises(ResourceExhausted, match=blob.digest):
        settle(rows, blob, "locked")
    assert libc.unlocked == 1


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without huge pages"
)
@pytest.mark.parametrize(("residency", "is_asked"), [("mapped", False), ("populated", True)])
def test_huge_pages_are_asked_for_where_all_is_read(
    store: LocalStore, unit: TableUnit, residency: Residency, is_asked: bool
) -> None:
    ref = unit.partitions[0].blob
    rows = np.frombuffer(store.map(ref), np.uint8)
    settle(rows, ref, residency)
    assert ("hg" in flags_of(store, ref.digest)) is is_asked
