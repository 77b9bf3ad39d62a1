"""Compaction ahead of time: versions stay what they are, and the next delta has a shorter chain."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batching.errors import Cancelled, InvalidArgument
from shards.bundle import Bundle
from shards.cache import NodeCache
from shards.checking import blobs_of
from shards.folding import FOLDED, fold, folded, longest_chain
from shards.progress import Progress
from shards.store import LocalStore, open_store
from shards.sweeping import references_of, sweep
from shards.transfer import transfer
from tests.buckets import Bucket
from tests.shards.serving import Array
from tests.shards.test_delta import ROWS, Killed, changed, contents, save, update, users_of

FIRST, SECOND = ([1, 39], 5.0), ([1, 2], 6.0)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """A store whose version 3 has partitions of two, no, no and one overlays."""
    store = LocalStore(tmp_path / "store")
    save(store, 1)
    update(store, *FIRST)
    update(store, *SECOND)
    return store


def clear(store: LocalStore) -> set[str]:
    """Sweep without a grace; the digests that are left."""
    sweep(store.shelf, lambda known: references_of(store, known), grace_s=-1.0, placed=())
    store.clear(-1.0)
    return {path.name for path in (store.path / "blobs" / "blake3").iterdir()}


def overlays(store: LocalStore, version: int) -> list[int]:
    manifest = store.read_manifest("model", version)
    return [len(part.overlays) for part in users_of(manifest).partitions]


def test_a_version_that_is_folded_stays_what_it_is_and_the_next_delta_begins_anew(
    store: LocalStore,
) -> None:
    version = store.read_manifest("model", 3)
    assert longest_chain(version) == 2
    progress = Progress(0)
    assert fold(store, version, progress=progress) == 2
    assert (progress.done, progress.total) == (2 * 80, 2 * 80)
    assert store.read_manifest("model", 3) == version
    assert store.versions("model") == (1, 2, 3)
    with Bundle.delta(store, "model") as bundle:
        bundle.update_rows("users", [0, 38], np.full((2, 2), 7, np.float32))
    told = "table 'users', partition 0: 2 overlays were folded into its base ahead of time"
    assert bundle.notices[0] == told
    assert overlays(store, 4) == [1, 0, 0, 1]
    expected = changed(FIRST, SECOND, ([0, 38], 7.0))
    np.testing.assert_array_equal(contents(store, bundle.manifest), expected)


def test_what_was_folded_once_is_not_again(store: LocalStore) -> None:
    version = store.read_manifest("model", 3)
    assert fold(store, version) == 2
    before = store.hashed_bytes
    assert fold(store, version) == 0
    assert store.hashed_bytes == before


def test_only_chains_that_are_long_enough_are_folded(store: LocalStore) -> None:
    assert fold(store, store.read_manifest("model", 3), overlays_min=2) == 1
    update(store, [0, 38], 7.0)
    assert overlays(store, 4) == [1, 0, 0, 2]
    with pytest.raises(InvalidArgument, match="at least 0 overlays is every partition"):
        fold(store, store.read_manifest("model", 3), overlays_min=0)


def test_overlays_that_came_after_a_fold_lie_over_it(store: LocalStore) -> None:
    """As when a publisher saves while the compaction of the version before goes on."""
    update(store, [2], 7.0)
    fold(store, store.read_manifest("model", 3))
    manifest = update(store, [3], 8.0)
    assert overlays(store, 5) == [2, 0, 0, 1]  # partition 3 is not updated, and stays as it is
    expected = changed(FIRST, SECOND, ([2], 7.0), ([3], 8.0))
    np.testing.assert_array_equal(contents(store, manifest), expected)


def test_a_compaction_finds_what_was_folded(store: LocalStore) -> None:
    fold(store, store.read_manifest("model", 3))
    before = clear(store)
    with Bundle.delta(store, "model") as bundle:
        assert bundle.compact() == ("users",)
    assert clear(store) == before
    assert users_of(bundle.manifest) == users_of(save(store, 9, changed(FIRST, SECOND)))


def test_a_fold_stays_as_long_as_a_version_has_what_it_was_made_of(store: LocalStore) -> None:
    fold(store, store.read_manifest("model", 3))
    refs = {digest for v in (1, 2, 3) for digest in blobs_of(store.read_manifest("model", v))}
    assert len(clear(store) - refs) == 2
    shutil.rmtree(store.path / "model" / "3")
    # Partition 3 has the same overlay in version 2; partition 0 has another chain there.
    assert len(clear(store)) == len(refs) - 1 + 1
    assert len(folded(store.shelf)) == 1
    shutil.rmtree(store.path / "model" / "2")
    assert clear(store) == set(blobs_of(store.read_manifest("model", 1)))
    assert not folded(store.shelf)


@pytest.mark.parametrize("damage", ["gone", "short", "other"])
def test_a_record_without_its_blob_means_nothing(store: LocalStore, damage: str) -> None:
    fold(store, store.read_manifest("model", 3))
    for path, record in folded(store.shelf).items():
        assert record is not None
        blob = store.path / "blobs" / "blake3" / record.blob.digest
        if damage == "gone":
            blob.unlink()
        elif damage == "short":
            os.truncate(blob, 8)
        else:
            (store.path / path).write_bytes(b"{")  # cut off with the machine
    manifest = update(store, [0, 38], 7.0)
    assert overlays(store, 4) == [3, 0, 0, 2]
    expected = changed(FIRST, SECOND, ([0, 38], 7.0))
    np.testing.assert_array_equal(contents(store, manifest), expected)
    # And can be made again.
    assert fold(store, store.read_manifest("model", 3)) == 2


def test_a_fold_that_is_called_off_leaves_nothing(store: LocalStore) -> None:
    progress = Progress(0)
    progress.cancel("enough")
    with pytest.raises(Cancelled, match="enough"):
        fold(store, store.read_manifest("model", 3), progress=progress)
    assert not folded(store.shelf)


def test_folding_that_ends_at_any_step_leaves_a_sound_store_and_can_be_repeated(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step is anything that makes a difference on the disk: a file written, named or removed."""
    version = store.read_manifest("model", 3)
    expected = changed(FIRST, SECOND, ([0, 38], 7.0))
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
        there = LocalStore(shutil.copytree(store.path, store.path.with_name(f"died-{died}")))
        left = died
        try:
            fold(there, version)
            break
        except Killed:
            left = 1_000_000
        died += 1
        assert there.verify("model", 3) == version
        # Whatever is there already, the next delta says the same, and what died is done again.
        np.testing.assert_array_equal(contents(there, update(there, [0, 38], 7.0)), expected)
        shutil.rmtree(there.path / "model" / "4")
        fold(there, version)
        assert_only_the_fold_is_left(there, expected)
    left = 1_000_000
    assert died > 10
    assert_only_the_fold_is_left(there, expected)


def assert_only_the_fold_is_left(store: LocalStore, expected: Array) -> None:
    """A delta builds upon the fold, and is all there is once the versions before it are gone."""
    manifest = update(store, [0, 38], 7.0)
    assert overlays(store, 4) == [1, 0, 0, 1]
    for number in (1, 2, 3):
        shutil.rmtree(store.path / "model" / str(number))
    assert clear(store) == set(blobs_of(manifest))
    np.testing.assert_array_equal(contents(store, manifest), expected)


def test_a_version_in_a_bucket_is_folded_like_one_in_a_directory(
    store: LocalStore, bucket: Bucket, tmp_path: Path
) -> None:
    there = open_store(bucket.url, NodeCache(tmp_path / "cache"))
    transfer(store, there, [("model", 3)], Progress(0))
    assert fold(there, there.read_manifest("model", 3)) == 2
    with Bundle.delta(there, "model") as bundle:
        bundle.update_rows("users", [0, 38], np.full((2, 2), 7, np.float32))
    fold(store, store.read_manifest("model", 3))
    assert users_of(bundle.manifest) == users_of(update(store, [0, 38], 7.0))
    assert all(path.startswith(f"{FOLDED}/") for path in folded(there.shelf))
    assert ROWS.shape == contents(there, bundle.manifest).shape
