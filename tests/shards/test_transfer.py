"""Bundles go from store to store: missing blobs only, manifests last."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from batching.errors import FailedPrecondition, InvalidArgument, Unavailable
from shards.checking import blobs_of
from shards.errors import BundleCorrupt, BundleNotFound
from shards.local import LocalStore
from shards.manifest import BlobRef
from shards.progress import Progress
from shards.store import Source, Store
from shards.transfer import open_source, pack, transfer, versions_named
from tests.buckets import Bucket
from tests.shards.bundles import full_manifest


@pytest.fixture
def source(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "source")
    for name, version in (("ranker", 1), ("ranker", 2), ("other", 7)):
        manifest = full_manifest(store, name, version)
        store.write_manifest(manifest)
    return store


@pytest.fixture(params=["directory", "bucket"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "directory":
        return LocalStore(tmp_path / "target")
    bucket: Bucket = request.getfixturevalue("bucket")
    return bucket.store(tmp_path / "cache")


def test_what_is_missing_is_copied_and_then_nothing_is(source: LocalStore, target: Store) -> None:
    progress = Progress(0)
    first = transfer(source, target, [("ranker", 1)], progress)
    assert (first.blobs, first.there) == (5, 0)
    assert progress.done == progress.total == first.bytes
    assert target.verify("ranker", 1) == source.read_manifest("ranker", 1)
    assert target.versions("ranker") == (1,)
    again = transfer(source, target, versions_named(source, []), Progress(0))
    assert (again.blobs, again.there) == (0, 5)  # versions share their blobs
    assert target.servables() == ("other", "ranker")
    assert target.versions("ranker") == (1, 2)


def test_a_blob_that_was_lost_is_brought_back(source: LocalStore, target: Store) -> None:
    transfer(source, target, [("ranker", 1)], Progress(0))
    lost = next(iter(blobs_of(source.read_manifest("ranker", 1))))
    target.shelf.delete(f"blobs/blake3/{lost}")
    assert transfer(source, target, [("ranker", 1)], Progress(0)).blobs == 1
    target.verify("ranker", 1)


def test_another_bundle_of_the_same_version_is_not_replaced_unless_asked(
    source: LocalStore, target: Store
) -> None:
    transfer(source, target, [("ranker", 1)], Progress(0))
    manifest = source.read_manifest("ranker", 1)
    changed = msgspec.structs.replace(
        manifest,
        signatures={"renamed": manifest.signatures["serving_default"]},
        units=manifest.units,
    )
    source.write_manifest(changed, overwrite=True)
    with pytest.raises(FailedPrecondition, match="another bundle"):
        transfer(source, target, [("ranker", 1)], Progress(0))
    assert target.read_manifest("ranker", 1) == manifest
    transfer(source, target, [("ranker", 1)], Progress(0), overwrite=True)
    assert target.read_manifest("ranker", 1) == changed


class Failing(LocalStore):
    """Gives some blobs, then no more."""

    def __init__(self, path: Path, given: int, error: Exception) -> None:
        super().__init__(path)
        self.given = given
        self.error = error

    def fetch(self, ref: BlobRef, descriptor: int, progress: Progress | None = None) -> None:
        self.given -= 1
        if self.given < 0:
            raise self.error
        super().fetch(ref, descriptor, progress)


@pytest.mark.parametrize("error", [Unavailable("away"), BundleCorrupt("broken")])
def test_an_interrupted_transfer_makes_no_version_and_is_resumed(
    source: LocalStore, tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One after the other: the end of one transfer ends those beside it, too.
    monkeypatch.setattr("shards.transfer._BLOBS_AT_ONCE", 1)
    target = LocalStore(tmp_path / "target")
    with pytest.raises(type(error)):
        transfer(Failing(source.path, 2, error), target, [("ranker", 1)], Progress(0))
    assert target.servables() == ()
    resumed = transfer(source, target, [("ranker", 1)], Progress(0))
    assert (resumed.blobs, resumed.there) == (3, 2)
    assert not list(target.path.rglob(".tmp-*"))
    target.verify("ranker", 1)


@pytest.mark.parametrize("out", ["model.tar", "model"])
def test_a_pack_holds_all_it_needs_and_comes_back(
    source: LocalStore, tmp_path: Path, out: str
) -> None:
    path = tmp_path / out
    packed = pack(source, [("ranker", 2)], path, Progress(0))
    assert packed.blobs == 5
    opened: Source = open_source(str(path))
    assert [(name, opened.versions(name)) for name in opened.servables()] == [("ranker", (2,))]
    target = LocalStore(tmp_path / "target")
    transfer(opened, target, versions_named(opened, []), Progress(0))
    assert target.verify("ranker", 2) == source.read_manifest("ranker", 2)
    if out.endswith(".tar"):
        with pytest.raises(FailedPrecondition, match="there already"):
            pack(source, [("ranker", 2)], path, Progress(0))


@pytest.mark.parametrize(
    ("names", "meant"),
    [
        ([], [("other", 7), ("ranker", 1), ("ranker", 2)]),
        (["ranker"], [("ranker", 2)]),
        (["ranker:1", "other"], [("ranker", 1), ("other", 7)]),
        (["ranker:*", "ranker:1"], [("ranker", 1), ("ranker", 2)]),
    ],
)
def test_names_mean_versions(
    source: LocalStore, names: list[str], meant: list[tuple[str, int]]
) -> None:
    assert versions_named(source, names) == tuple(meant)


@pytest.mark.parametrize(
    ("name", "error"),
    [("ranker:x", InvalidArgument), ("ranker:", InvalidArgument), ("ranker:9", BundleNotFound),
     ("nobody", BundleNotFound), ("../x", InvalidArgument)],
)  # fmt: skip
def test_names_that_mean_nothing_are_refused(
    source: LocalStore, name: str, error: type[Exception]
) -> None:
    with pytest.raises(error):
        versions_named(source, [name])
