"""Tables with holes: what is not there is never read, and is zeros."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import shards
from batching.errors import FailedPrecondition, InvalidArgument
from shards.bundle import Bundle
from shards.checking import check_manifest
from shards.errors import BundleCorrupt, SpecMismatch
from shards.folding import fold
from shards.local import LocalStore
from shards.manifest import Manifest, TableUnit
from shards.openers import TableOpener
from shards.orders import HostedUnit
from shards.overlays import rows_of_partition
from shards.progress import Progress
from shards.sparse import BLOCK, copy_data, digest_of_blocks, write_rows
from shards.sparse_rows import SparseRows
from shards.transfer import pack, transfer
from tests.shards.opening import Actor, run

TIB = 1 << 40
DIM = 256
ROWS = TIB // (4 * DIM)


def rows_for(ids: np.ndarray) -> np.ndarray:
    """Rows that tell their id, none of them zeros."""
    return (ids[:, None] % 1000 + np.arange(1, DIM + 1)).astype(np.float32)


def given_ids(count: int = 300, rows: int = ROWS, seed: int = 0) -> np.ndarray:
    return np.unique(np.random.default_rng(seed).integers(rows, size=count))


def save(store: LocalStore, ids: np.ndarray, rows: int = ROWS, partitions: int = 8) -> Manifest:
    table = SparseRows(
        rows=rows, dim=DIM, given=((part, rows_for(part)) for part in np.array_split(ids, 3))
    )
    with Bundle.create(store, "users", 1) as bundle:
        users = bundle.table("users", table, partitions=partitions)

        @bundle.signature("serving_default", inputs={"ids": shards.Spec(("b",), "int64")})
        def look_up(ids: Any) -> Mapping[str, Any]:
            return {"rows": users.rows(ids)}

    return bundle.manifest


def table_of(manifest: Manifest) -> TableUnit:
    unit = manifest.units["users"]
    assert isinstance(unit, TableUnit)
    return unit


def read_rows(store: LocalStore, manifest: Manifest, ids: np.ndarray) -> np.ndarray:
    """Rows of a table without overlays, as its files have them."""
    unit = table_of(manifest)
    out = np.empty((len(ids), DIM), np.float32)
    for part in unit.partitions:
        rows = store.map(part.blob).view(np.ndarray).view(np.float32).reshape(-1, DIM)
        mine = np.flatnonzero((ids >= part.first_row) & (ids < part.first_row + part.rows))
        out[mine] = rows[ids[mine] - part.first_row]
    return out


def disk_bytes(store: LocalStore) -> int:
    return sum(path.stat().st_blocks * 512 for path in store.path.rglob("*") if path.is_file())


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def file_of(path: Path, size: int, pieces: dict[int, bytes]) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    os.truncate(descriptor, size)
    for offset, data in pieces.items():
        os.pwrite(descriptor, data, offset)
    return descriptor


def test_a_terabyte_of_holes_is_saved_and_read_back_exactly(store: LocalStore) -> None:
    ids = given_ids()
    manifest = save(store, ids)
    assert sum(part.blob.size for part in table_of(manifest).partitions) == TIB
    assert np.array_equal(read_rows(store, manifest, ids), rows_for(ids))
    holes = np.setdiff1d(ids + 1, ids)
    assert not read_rows(store, manifest, holes[holes < ROWS]).any()
    assert disk_bytes(store) < 16 << 20
    assert store.verify("users", 1) == manifest


def test_a_sparse_blob_counts_with_the_data_that_it_has(store: LocalStore) -> None:
    ids = np.arange(8) * (ROWS // 8)
    parts = table_of(save(store, ids)).partitions
    assert [part.blob.data for part in parts] == [BLOCK] * 8
    assert [part.blob.stored for part in parts] == [BLOCK] * 8


def test_the_digest_does_not_depend_on_where_a_file_has_holes(tmp_path: Path) -> None:
    holey = file_of(tmp_path / "a", 40 * BLOCK, {BLOCK: b"x" * 10, 30 * BLOCK: b"y"})
    dense = file_of(tmp_path / "b", 40 * BLOCK, {0: bytes(40 * BLOCK)})
    os.pwrite(dense, b"x" * 10, BLOCK)
    os.pwrite(dense, b"y", 30 * BLOCK)
    assert digest_of_blocks(holey) == digest_of_blocks(dense)
    assert digest_of_blocks(holey)[1] == 2 * BLOCK
    os.close(holey)
    os.close(dense)


@pytest.mark.parametrize(
    "pieces",
    [
        {BLOCK: b"x" * 10, 31 * BLOCK: b"y"},  # another block
        {BLOCK: b"x" * 10, 30 * BLOCK: b"z"},  # other bytes
        {BLOCK: b"x" * 10},  # a block less
        {BLOCK + 1: b"x" * 10, 30 * BLOCK: b"y"},  # another place inside the block
    ],
)
def test_the_digest_depends_on_every_byte_that_is_there(
    tmp_path: Path, pieces: dict[int, bytes]
) -> None:
    one = file_of(tmp_path / "a", 40 * BLOCK, {BLOCK: b"x" * 10, 30 * BLOCK: b"y"})
    other = file_of(tmp_path / "b", 40 * BLOCK, pieces)
    assert digest_of_blocks(one)[0] != digest_of_blocks(other)[0]
    os.close(one)
    os.close(other)


def test_the_digest_depends_on_the_size(tmp_path: Path) -> None:
    found = set()
    for size in (0, 1, BLOCK - 1, BLOCK, BLOCK + 1):
        descriptor = file_of(tmp_path / str(size), size, {})
        found.add(digest_of_blocks(descriptor))
        os.close(descriptor)
    assert len(found) == 5
    assert {data for _, data in found} == {0}


def test_a_last_block_that_is_not_whole_counts(tmp_path: Path) -> None:
    descriptor = file_of(tmp_path / "a", BLOCK + 3, {BLOCK: b"abc"})
    other = file_of(tmp_path / "b", BLOCK + 3, {BLOCK: b"abd"})
    assert digest_of_blocks(descriptor)[1] == BLOCK
    assert digest_of_blocks(descriptor) != digest_of_blocks(other)
    os.close(descriptor)
    os.close(other)


def test_more_data_than_is_read_at_once_has_one_digest(tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(4100 * BLOCK)
    whole = file_of(tmp_path / "a", len(content), {0: content})
    # The same bytes over a hole that comes before them are other bytes.
    moved = file_of(tmp_path / "b", len(content) + BLOCK, {BLOCK: content})
    assert digest_of_blocks(whole)[1] == len(content)
    assert digest_of_blocks(moved)[0] != digest_of_blocks(whole)[0]
    os.close(whole)
    os.close(moved)


def test_a_copy_keeps_the_holes(tmp_path: Path) -> None:
    size = 1 << 36
    source = file_of(tmp_path / "a", size, {5 * BLOCK: b"q" * 9000, size - 3: b"end"})
    target = os.open(tmp_path / "b", os.O_RDWR | os.O_CREAT)
    told: list[int] = []
    copy_data(source, target, told.append)
    assert digest_of_blocks(source) == digest_of_blocks(target)
    assert told[-1] == size
    assert os.fstat(target).st_blocks * 512 < 1 << 20
    os.close(source)
    os.close(target)


def test_rows_that_lie_side_by_side_are_written_together(tmp_path: Path) -> None:
    descriptor = file_of(tmp_path / "a", 100 * 8, {})
    positions = np.array([1, 2, 3, 7, 99])
    write_rows(descriptor, positions, np.arange(10, dtype=np.float32).reshape(5, 2))
    rows = np.frombuffer(os.pread(descriptor, 800, 0), np.float32).reshape(100, 2)
    assert np.array_equal(rows[positions], np.arange(10).reshape(5, 2))
    assert not np.delete(rows, positions, axis=0).any()
    os.close(descriptor)


def test_a_row_that_is_given_again_is_the_later_one(store: LocalStore) -> None:
    ids = np.array([5, 9, 5])
    rows = np.stack([np.full(DIM, value, np.float32) for value in (1, 2, 3)])
    given = [(ids, rows), (np.array([9]), np.full((1, DIM), 4, np.float32))]
    with Bundle.create(store, "users", 1) as bundle:
        users = bundle.table("users", SparseRows(rows=10, dim=DIM, given=given), partitions=3)

        @bundle.signature("serving_default", inputs={"ids": shards.Spec(("b",), "int64")})
        def look_up(ids: Any) -> Mapping[str, Any]:
            return {"rows": users.rows(ids)}

    found = read_rows(store, bundle.manifest, np.array([5, 9, 0]))
    assert found[:, 0].tolist() == [3, 4, 0]


@pytest.mark.parametrize(
    ("ids", "rows", "error"),
    [
        ([10], np.zeros((1, DIM), np.float32), InvalidArgument),
        ([-1], np.zeros((1, DIM), np.float32), InvalidArgument),
        ([0.5], np.zeros((1, DIM), np.float32), SpecMismatch),
        ([0], np.zeros((2, DIM), np.float32), SpecMismatch),
        ([0], np.zeros((1, DIM), np.float64), SpecMismatch),
    ],
)
def test_rows_that_do_not_fit_are_refused_and_leave_nothing(
    store: LocalStore, ids: list[int], rows: np.ndarray, error: type[Exception]
) -> None:
    table = SparseRows(rows=10, dim=DIM, given=[(ids, rows)])
    with pytest.raises(error), Bundle.create(store, "users", 1) as bundle:
        bundle.table("users", table, partitions=2)
    assert not [path for path in store.path.rglob("*") if path.is_file()]


def test_more_partitions_than_rows_are_refused(store: LocalStore) -> None:
    with pytest.raises(InvalidArgument), Bundle.create(store, "users", 1) as bundle:
        bundle.table("users", SparseRows(rows=3, dim=1, given=[]), partitions=4)


def test_one_changed_byte_is_found(store: LocalStore) -> None:
    manifest = save(store, given_ids())
    ref = table_of(manifest).partitions[0].blob
    path = store.path / "blobs" / "blake3" / ref.digest
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(7 * BLOCK)
        file.write(b"\1")
    with pytest.raises(BundleCorrupt, match=ref.digest):
        store.verify("users", 1)
    with pytest.raises(BundleCorrupt, match=ref.digest):
        LocalStore(store.path).map(ref)


def test_a_manifest_that_tells_of_less_data_than_there_is_is_found(store: LocalStore) -> None:
    manifest = save(store, given_ids())
    ref = table_of(manifest).partitions[0].blob
    store._stamps.forget(ref.digest)
    with pytest.raises(BundleCorrupt, match=ref.digest):
        LocalStore(store.path).map(msgspec.structs.replace(ref, data=BLOCK))


@pytest.mark.parametrize("data", [-BLOCK, 1, TIB])
def test_a_manifest_with_an_impossible_amount_of_data_is_refused(
    store: LocalStore, data: int
) -> None:
    manifest = save(store, given_ids())
    unit = table_of(manifest)
    first = unit.partitions[0]
    blob = msgspec.structs.replace(first.blob, data=data)
    parts = (msgspec.structs.replace(first, blob=blob), *unit.partitions[1:])
    broken = msgspec.structs.replace(
        manifest, units={"users": msgspec.structs.replace(unit, partitions=parts)}
    )
    with pytest.raises(BundleCorrupt, match="not a blob"):
        check_manifest(broken, "here")


def test_a_bundle_of_holes_goes_from_directory_to_directory(
    store: LocalStore, tmp_path: Path
) -> None:
    ids = given_ids()
    manifest = save(store, ids)
    other = LocalStore(tmp_path / "other")
    transfer(store, other, [("users", 1)], Progress(0))
    assert np.array_equal(read_rows(other, manifest, ids), rows_for(ids))
    assert disk_bytes(other) < 16 << 20
    assert other.verify("users", 1) == manifest


def test_a_sparse_table_is_not_packed_into_an_archive(store: LocalStore, tmp_path: Path) -> None:
    save(store, given_ids())
    with pytest.raises(FailedPrecondition, match="keep it in a directory"):
        pack(store, [("users", 1)], tmp_path / "users.tar", Progress(0))
    assert not (tmp_path / "users.tar").exists()


@pytest.mark.parametrize("is_ahead", [False, True])
def test_overlays_are_folded_into_a_sparse_table_that_stays_sparse(
    store: LocalStore, is_ahead: bool
) -> None:
    ids = given_ids()
    save(store, ids)
    changed = np.concatenate([ids[::3], given_ids(20, seed=1)])
    changed = np.unique(changed)
    with Bundle.delta(store, "users", 1, 2) as delta:
        delta.update_rows("users", changed, rows_for(changed) + 1)
    if is_ahead:
        assert fold(store, delta.manifest) > 0
        compact = Bundle.delta(store, "users", 2, 3)
        compact.compact()
        compact.commit()
    else:
        with Bundle.delta(store, "users", 2, 3) as compact:
            assert compact.compact() == ("users",)
    parts = table_of(compact.manifest).partitions
    assert all(not part.overlays and part.blob.data is not None for part in parts)
    assert np.array_equal(read_rows(store, compact.manifest, changed), rows_for(changed) + 1)
    same = np.setdiff1d(ids, changed)
    assert np.array_equal(read_rows(store, compact.manifest, same), rows_for(same))
    assert disk_bytes(store) < 32 << 20


def test_a_small_sparse_table_has_the_rows_of_a_dense_one(store: LocalStore) -> None:
    ids = np.arange(0, 1000, 7)
    manifest = save(store, ids, rows=1000, partitions=3)
    dense = np.zeros((1000, DIM), np.float32)
    dense[ids] = rows_for(ids)
    unit = table_of(manifest)
    found = [rows for index in range(3) for rows in rows_of_partition(store, unit, index)]
    assert np.array_equal(np.concatenate(found), dense)


def test_what_is_sparse_is_told(store: LocalStore) -> None:
    manifest = save(store, given_ids())
    told = shards.describe(manifest)["units"]["users"]
    assert told["bytes"] == TIB
    assert told["stored_bytes"] == sum(p.blob.stored for p in table_of(manifest).partitions)


def test_an_actor_with_little_memory_serves_a_terabyte_of_holes(store: LocalStore) -> None:
    ids = given_ids()
    unit = table_of(save(store, ids))
    stored = sum(part.blob.stored for part in unit.partitions)

    async def scenario(actor: Actor) -> None:
        await actor.load(1, HostedUnit(name="users", partitions=tuple(range(8))), name="users")
        assert actor.books.reserved_bytes == stored
        asked = np.concatenate([ids, [0, ROWS - 1]])
        answer = await actor.ask(unit.id, asked)
        assert isinstance(answer[0], np.ndarray)
        assert np.array_equal(answer[0][:-2], rows_for(ids))
        assert not answer[0][-2:].any()

    run(store.path, TableOpener, scenario, capacity=stored)
