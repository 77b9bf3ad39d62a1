"""Versions that are written as the difference from another, from Python to an actor's answers."""

from __future__ import annotations

import gc
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batching.errors import FailedPrecondition, InvalidArgument, NotFound
from shards.bundle import Bundle
from shards.cache import NodeCache
from shards.checking import OVERLAYS_MAX, blobs_of
from shards.errors import BundleIncomplete, BundleNotFound, SpecMismatch
from shards.inspection import describe, render, verify
from shards.interchange import table_to_arrow
from shards.manifest import Manifest, TableUnit
from shards.openers import TableOpener
from shards.orders import HostedUnit
from shards.overlays import rows_of_partition
from shards.progress import Progress
from shards.specs import Spec
from shards.store import LocalStore, Store, open_store
from shards.sweeping import references_of, sweep
from shards.transfer import transfer
from tests.buckets import Bucket
from tests.shards.opening import Actor, run
from tests.shards.serving import Array

ROWS = np.arange(80, dtype=np.float32).reshape(40, 2)
ALL = HostedUnit(name="users", partitions=(0, 1, 2, 3))


def save(store: LocalStore, version: int, rows: Array = ROWS, partitions: int = 4) -> Manifest:
    with Bundle.create(store, "model", version) as bundle:
        users = bundle.table("users", rows, partitions=partitions)

        @bundle.signature(inputs={"ids": Spec(("b",), "int64")})
        def answer(ids: Any) -> Any:
            return {"rows": users.rows(ids)}

    return bundle.manifest


def update(store: LocalStore, ids: list[int], value: float, **of: Any) -> Manifest:
    with Bundle.delta(store, "model", **of) as bundle:
        bundle.update_rows("users", np.array(ids, np.int32), np.full((len(ids), 2), value, "f4"))
    return bundle.manifest


def changed(*updates: tuple[list[int], float]) -> Array:
    rows = ROWS.copy()
    for ids, value in updates:
        rows[ids] = value
    return rows


def users_of(manifest: Manifest) -> TableUnit:
    unit = manifest.units["users"]
    assert isinstance(unit, TableUnit)
    return unit


def contents(store: Store, manifest: Manifest) -> Array:
    unit = users_of(manifest)
    pieces: Iterator[Array] = (
        rows
        for index in range(len(unit.partitions))
        for rows in rows_of_partition(store, unit, index)
    )
    return np.concatenate(list(pieces))


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """A store with version 1: a table of 40 rows in four partitions."""
    store = LocalStore(tmp_path / "store")
    save(store, 1)
    return store


# --- writing -----------------------------------------------------------------------------------


def test_a_delta_writes_the_rows_that_changed_and_refers_to_the_rest(store: LocalStore) -> None:
    base = store.read_manifest("model", 1)
    before = set(blobs_of(base))
    delta = update(store, [31, 2, 5], -1)
    assert delta.version == 2
    assert delta.signatures == base.signatures
    assert [len(part.overlays) for part in users_of(delta).partitions] == [1, 0, 0, 1]
    assert set(blobs_of(delta)) > before
    assert sum(blob.size for d, blob in blobs_of(delta).items() if d not in before) == 80 + 72
    assert users_of(delta).id != users_of(base).id
    np.testing.assert_array_equal(contents(store, delta), changed(([31, 2, 5], -1)))
    np.testing.assert_array_equal(contents(store, base), ROWS)
    assert verify(store, "model", 2)["blobs"] == 6


def test_deltas_of_deltas_lie_over_each_other_and_any_version_may_be_the_base(
    store: LocalStore,
) -> None:
    second, third = update(store, [0, 1], -1), update(store, [1, 2], -2)
    other = update(store, [39], -3, base=1, version=9)
    np.testing.assert_array_equal(contents(store, second), changed(([0, 1], -1)))
    np.testing.assert_array_equal(contents(store, third), changed(([0, 1], -1), ([1, 2], -2)))
    np.testing.assert_array_equal(contents(store, other), changed(([39], -3)))
    first, over = (users_of(each).partitions[0].overlays for each in (second, third))
    assert (over[:1], len(over)) == (first, 2)


def test_overlays_beyond_the_bound_are_written_as_one(store: LocalStore) -> None:
    for number in range(OVERLAYS_MAX):
        update(store, [number, 20], number)
    with Bundle.delta(store, "model") as bundle:
        bundle.update_rows("users", [3, 30], np.full((2, 2), 99, np.float32))
    told = "table 'users', partition 0: its 8 overlays and the new rows are written as one"
    assert bundle.notices == [told]
    overlays = [[each.rows for each in p.overlays] for p in users_of(bundle.manifest).partitions]
    assert overlays == [[8], [], [1] * 8, [1]]
    expected = changed(*(([number, 20], number) for number in range(OVERLAYS_MAX)), ([3, 30], 99))
    np.testing.assert_array_equal(contents(store, bundle.manifest), expected)


def test_several_calls_are_one_overlay_in_which_the_last_call_counts(store: LocalStore) -> None:
    with Bundle.delta(store, "model") as bundle:
        rows = np.ones((2, 2), np.float32)
        bundle.update_rows("users", [4, 1], rows)
        rows[:] = 7  # what was given is copied
        bundle.update_rows("users", np.array([4], np.uint64), np.full((1, 2), 5, np.float32))
        bundle.update_rows("users", [], np.empty((0, 2), np.float32))
    assert [each.rows for each in users_of(bundle.manifest).partitions[0].overlays] == [2]
    np.testing.assert_array_equal(contents(store, bundle.manifest), changed(([1], 1), ([4], 5)))


@pytest.mark.parametrize(
    ("ids", "rows", "kind", "message"),
    [
        ([40], np.zeros((1, 2), "f4"), InvalidArgument, "id 40 is not in a table of 40 rows"),
        ([-1], np.zeros((1, 2), "f4"), InvalidArgument, "id -1 is not in a table"),
        ([3, 1, 3], np.zeros((3, 2), "f4"), InvalidArgument, "id 3 comes twice"),
        ([1], np.zeros((1, 3), "f4"), SpecMismatch, r"must be \[1, 2\], got \[1, 3\]"),
        ([1, 2], np.zeros((1, 2), "f4"), SpecMismatch, r"must be \[2, 2\], got \[1, 2\]"),
        ([1], np.zeros((1, 2), "f8"), SpecMismatch, "must be float32, got float64"),
        ([1.0], np.zeros((1, 2), "f4"), SpecMismatch, "ids must be .* integers, got float64"),
    ],
)
def test_rows_that_are_not_of_the_table_are_refused(
    store: LocalStore, ids: list[Any], rows: Array, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message), Bundle.delta(store, "model") as bundle:
        bundle.update_rows("users", ids, rows)
    assert store.versions("model") == (1,)


def test_what_is_no_table_no_base_or_a_version_that_exists_is_refused(store: LocalStore) -> None:
    with pytest.raises(NotFound, match="model/1 has no table 'words'"):
        Bundle.delta(store, "model").update_rows("words", [1], np.zeros((1, 2), "f4"))
    with pytest.raises(BundleNotFound, match="has no model/7"):
        Bundle.delta(store, "model", base=7)
    with pytest.raises(FailedPrecondition, match="model/1 exists"):
        Bundle.delta(store, "model", base=1, version=1)


def test_a_unit_may_be_replaced_by_one_that_takes_and_yields_the_same(store: LocalStore) -> None:
    with Bundle.delta(store, "model") as bundle:
        bundle.table("users", ROWS[:12] * 2, partitions=3)
    np.testing.assert_array_equal(contents(store, bundle.manifest), ROWS[:12] * 2)
    mismatch = "unit 'users' is replaced by one that takes or yields something else"
    with pytest.raises(SpecMismatch, match=mismatch), Bundle.delta(store, "model") as bundle:
        bundle.table("users", np.ones((4, 3), np.float32))
    updated, replaced = Bundle.delta(store, "model"), Bundle.delta(store, "model")
    updated.update_rows("users", [1], np.zeros((1, 2), "f4"))
    with pytest.raises(InvalidArgument, match="rows of 'users' are updated"):
        updated.table("users", ROWS)
    replaced.table("users", ROWS)
    with pytest.raises(InvalidArgument, match="table 'users' is replaced"):
        replaced.update_rows("users", [1], np.zeros((1, 2), "f4"))
    assert store.versions("model") == (1, 2)


def test_signatures_of_the_base_go_on_with_a_unit_that_is_replaced(store: LocalStore) -> None:
    text, length = {"text": Spec(("b",), "string")}, {"length": Spec(("b",), "int64")}
    with Bundle.create(store, "lengths", 1) as bundle:
        unit = bundle.host("measure", "some:load", inputs=text, outputs=length)
        bundle.signature(inputs=text)(lambda text: unit(text=text))
    base = bundle.manifest
    with Bundle.delta(store, "lengths") as bundle:
        bundle.host("measure", "some:load", inputs=text, outputs=length, options={"limit": 8})
    assert bundle.manifest.signatures == base.signatures
    assert bundle.manifest.units["measure"].id != base.units["measure"].id
    wrong = {"length": Spec(("b",), "int32")}
    mismatch = "unit 'measure' is replaced by one that takes"
    with pytest.raises(SpecMismatch, match=mismatch), Bundle.delta(store, "lengths") as bundle:
        bundle.host("measure", "some:load", inputs=text, outputs=wrong)


def test_a_base_that_lacks_a_blob_is_refused_at_once(store: LocalStore) -> None:
    digest = next(iter(blobs_of(store.read_manifest("model", 1))))
    (store.path / "blobs" / "blake3" / digest).unlink()
    with pytest.raises(BundleIncomplete, match=f"blob {digest} is missing"):
        Bundle.delta(store, "model")


def test_overlays_are_shown(store: LocalStore) -> None:
    described = describe(update(store, [1, 2, 11], 5))
    assert described["units"]["users"]["overlays"] == [[2], [1], [], []]
    assert described["units"]["users"]["overlay_rows"] == 3
    assert described["units"]["users"]["overlay_bytes"] == 80 + 72
    assert "overlays: [2], [1], [], []" in render(described)
    assert "overlay" not in render(describe(store.read_manifest("model", 1)))


# --- compacting --------------------------------------------------------------------------------


def compacted(store: LocalStore, progress: Progress | None = None, **of: Any) -> Manifest:
    with Bundle.delta(store, "model", **of) as bundle:
        assert bundle.compact(progress) == ("users",)
    return bundle.manifest


def test_a_compacted_table_is_the_one_that_would_have_been_saved_whole(store: LocalStore) -> None:
    update(store, [1, 39], 5)
    update(store, [1, 2], 6)
    progress = Progress(0)
    folded = compacted(store, progress)
    assert folded.version == 4
    assert (progress.done, progress.total) == (2 * 80, 2 * 80)  # of the two that have overlays
    expected = changed(([1, 39], 5), ([1, 2], 6))
    np.testing.assert_array_equal(contents(store, folded), expected)
    assert users_of(folded) == users_of(save(store, 5, expected))
    # And may be the base of deltas again.
    np.testing.assert_array_equal(contents(store, update(store, [0], 7))[0], [7, 7])


def test_rows_are_not_updated_in_a_table_that_is_compacted_in_the_same_version(
    store: LocalStore,
) -> None:
    update(store, [1], 5)
    bundle = Bundle.delta(store, "model")
    bundle.update_rows("users", [1], np.zeros((1, 2), "f4"))
    with pytest.raises(InvalidArgument, match="rows of 'users' are updated"):
        bundle.compact()


class Killed(BaseException):
    """The end of a process, as far as a test can have one."""


def test_compaction_that_ends_at_any_step_leaves_the_store_as_it_was_and_can_be_repeated(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step is anything that makes a difference on the disk: a file written, named or removed."""
    delta = update(store, [1, 39], 5)
    left = 0

    def step(done: Any) -> Any:
        def counted(*arguments: Any, **more: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return done(*arguments, **more)

        return counted

    for name in ("replace", "fsync", "link", "unlink"):
        monkeypatch.setattr(os, name, step(getattr(os, name)))
    died = 0
    while True:
        left = died
        try:
            folded = compacted(store)
            break
        except Killed:
            left = 1_000_000
            # The manifest is there or it is not: only the last steps come after it.
            if store.versions("model") == (1, 2, 3):
                folded = store.verify("model", 3)
                break
            assert store.versions("model") == (1, 2)
            np.testing.assert_array_equal(contents(store, delta), changed(([1, 39], 5)))
            died += 1
    assert died > 10
    left = 1_000_000
    assert store.verify("model", 3) == folded
    np.testing.assert_array_equal(contents(store, folded), changed(([1, 39], 5)))
    shutil.rmtree(store.path / "model" / "1")
    shutil.rmtree(store.path / "model" / "2")
    sweep(store.shelf, lambda known: references_of(store, known), grace_s=-1.0, placed=())
    store.clear(-1.0)
    found = {path.name for path in (store.path / "blobs" / "blake3").iterdir()}
    assert found == {*blobs_of(folded)}
    np.testing.assert_array_equal(contents(store, folded), changed(([1, 39], 5)))


# --- stores ------------------------------------------------------------------------------------


def test_a_delta_outlives_its_base_in_the_store(store: LocalStore) -> None:
    delta = update(store, [1], 5)
    shutil.rmtree(store.path / "model" / "1")
    loose = store.put(b"nobody refers to it")
    found = sweep(store.shelf, lambda known: references_of(store, known), grace_s=-1.0, placed=())
    assert (found.blobs, found.removed) == (6, (loose.digest,))
    np.testing.assert_array_equal(contents(store, delta), changed(([1], 5)))


def test_only_the_rows_that_changed_are_copied_to_a_store_that_has_the_base(
    store: LocalStore, tmp_path: Path
) -> None:
    target = LocalStore(tmp_path / "target")
    transfer(store, target, [("model", 1)], Progress(0))
    delta = update(store, [1], 5)
    copied = transfer(store, target, [("model", 2)], Progress(0))
    assert (copied.blobs, copied.bytes, copied.there) == (1, 72, 4)
    np.testing.assert_array_equal(contents(target, delta), changed(([1], 5)))


def test_a_delta_in_a_bucket_is_written_and_read_like_one_in_a_directory(
    store: LocalStore, bucket: Bucket, tmp_path: Path
) -> None:
    there = open_store(bucket.url, NodeCache(tmp_path / "cache"))
    transfer(store, there, [("model", 1)], Progress(0))
    with Bundle.delta(there, "model") as bundle:
        bundle.update_rows("users", [1, 39], np.full((2, 2), 5, np.float32))
    assert users_of(bundle.manifest) == users_of(update(store, [1, 39], 5))
    np.testing.assert_array_equal(contents(there, bundle.manifest), changed(([1, 39], 5)))


def test_a_table_with_overlays_is_exported_as_look_ups_find_it(store: LocalStore) -> None:
    column = table_to_arrow(update(store, [1, 39], 5), store, "users").column("rows")
    assert column.to_pylist() == changed(([1, 39], 5)).tolist()


# --- serving -----------------------------------------------------------------------------------


def ids(*numbers: int) -> Array:
    return np.array(numbers, np.int64)


async def answers(actor: Actor, manifest: Manifest, expected: Array) -> None:
    asked = np.random.default_rng(0).integers(0, len(ROWS), 200)
    answer = await actor.ask(users_of(manifest).id, asked)
    assert isinstance(answer, list), answer
    np.testing.assert_array_equal(answer[0], expected[asked])


@pytest.mark.parametrize("gone", [1, 2])
def test_both_versions_answer_for_the_bytes_of_the_difference_and_either_may_go(
    store: LocalStore, gone: int
) -> None:
    versions = {1: store.read_manifest("model", 1), 2: update(store, [1, 39], 5)}
    rows = {1: ROWS, 2: changed(([1, 39], 5))}

    async def scenario(actor: Actor) -> None:
        await actor.load(1, ALL)
        assert actor.books.reserved_bytes == ROWS.nbytes
        await actor.load(2, ALL)
        assert actor.books.reserved_bytes == ROWS.nbytes + 2 * 72
        for version, manifest in versions.items():
            await answers(actor, manifest, rows[version])
        await actor.unload(gone)
        left = 3 - gone
        await answers(actor, versions[left], rows[left])
        assert actor.books.reserved_bytes == ROWS.nbytes + (2 * 72 if left == 2 else 0)
        code, _ = await actor.ask(users_of(versions[gone]).id, ids(0))
        assert code == "STALE_EPOCH"
        await actor.unload(left)
        assert actor.books.reserved_bytes == 0

    # Not one byte more than the two need together.
    run(store.path, TableOpener, scenario, capacity=ROWS.nbytes + 2 * 72)


def test_a_chain_is_served_and_its_index_is_in_the_books(store: LocalStore) -> None:
    update(store, [1, 2], 5)
    chain = update(store, [2, 3], 6)

    async def scenario(actor: Actor) -> None:
        await actor.load(3, ALL)
        await answers(actor, chain, changed(([1, 2], 5), ([2, 3], 6)))
        assert actor.books.reserved_bytes == ROWS.nbytes + 2 * 80 + 16 * 3
        (unit,) = actor.books.units
        assert unit.nbytes == actor.books.reserved_bytes

    run(store.path, TableOpener, scenario)


def test_a_load_beside_the_base_waits_for_the_overlays_alone(store: LocalStore) -> None:
    update(store, [1, 39], 5)

    async def scenario(actor: Actor) -> None:
        await actor.load(1, ALL)
        # Were it read, it would be missed: the base is mapped already, and stays so.
        for digest in blobs_of(store.read_manifest("model", 1)):
            (store.path / "blobs" / "blake3" / digest).unlink()
        await actor.load(2, ALL)
        await answers(actor, store.read_manifest("model", 2), changed(([1, 39], 5)))

    run(store.path, TableOpener, scenario)


def pss_bytes() -> int:
    """This process's share of the memory that it has touched."""
    found = re.search(r"^Pss: +(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.M)
    assert found is not None
    return int(found[1]) << 10


def test_two_versions_take_the_memory_of_one_and_of_the_difference(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    count, dim = 64_000, 128
    rows = np.arange(count * dim, dtype=np.float32).reshape(count, dim)
    save(store, 1, rows, partitions=2)
    some = np.arange(0, count, 100)
    with Bundle.delta(store, "model") as bundle:
        bundle.update_rows("users", some, rows[some] + 1)
    # A row of every page of the base, and every row of the overlays.
    asked = np.union1d(np.arange(0, count, 8), some)
    size = rows.nbytes
    del rows
    took: list[int] = []

    async def scenario(actor: Actor) -> None:
        for version in (1, 2):
            gc.collect()  # what tests before this one have left must not go meanwhile
            before = pss_bytes()
            await actor.load(version, HostedUnit(name="users", partitions=(0, 1)))
            unit = users_of(store.read_manifest("model", version))
            assert isinstance(await actor.ask(unit.id, asked), list)
            actor.link.sent.clear()
            gc.collect()
            took.append(pss_bytes() - before)

    run(tmp_path, TableOpener, scenario)
    parts = users_of(bundle.manifest).partitions
    difference = sum(each.blob.size for part in parts for each in part.overlays)
    assert difference < size // 50
    # What the interpreter and the allocator keep of an answer of 4 MiB is within the slack.
    slack = 6 << 20
    assert took[0] > size - slack
    assert took[1] < difference + slack
