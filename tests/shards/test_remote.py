"""A store in a bucket does what one in a directory does, and an outage is never emptiness."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest

import shards
from batching.errors import FailedPrecondition, InvalidArgument, Unavailable
from shards.cache import NodeCache
from shards.checking import blobs_of
from shards.errors import BundleCorrupt, BundleForeign, BundleIncomplete, BundleNotFound
from shards.layout import blob_path
from shards.local import LocalStore
from shards.locations import parse_location
from shards.manifest import BlobRef
from shards.objects import CHUNK, Objects, connect
from shards.progress import Progress
from shards.remote import RemoteStore
from tests.buckets import Bucket, BucketServer
from tests.shards.bundles import full_manifest


@pytest.fixture
def store(bucket: Bucket, tmp_path: Path) -> RemoteStore:
    return bucket.store(tmp_path / "cache")


def test_a_blob_comes_back_as_it_was_put_and_is_brought_once(
    store: RemoteStore, tmp_path: Path
) -> None:
    data = bytes(range(256)) * 1000
    pieces = [data[at : at + 1000] for at in range(0, len(data), 1000)]
    refs = {store.put(data), store.put(iter(pieces)), store.put(np.frombuffer(data, np.int32))}
    assert len(refs) == 1
    [ref] = refs
    mapped = store.map(ref)
    assert mapped.tobytes() == data
    assert not mapped.flags.writeable
    store.shelf.delete(blob_path(ref))
    assert store.map(ref).tobytes() == data  # from the cache of this node
    with pytest.raises(BundleIncomplete, match=ref.digest):
        RemoteStore(store._objects, NodeCache(tmp_path / "other")).map(ref)


def test_nothing_is_a_blob_too(store: RemoteStore) -> None:
    ref = store.put(b"")
    assert ref.size == 0
    assert store.map(ref).tobytes() == b""
    assert store.shelf.stat(blob_path(ref)) is not None


def test_a_blob_that_is_there_is_not_written_again(store: RemoteStore) -> None:
    ref = store.put(b"weights")
    store.shelf.write(blob_path(ref), b"WEIGHTS")  # the same size: only reading would tell
    assert store.put(b"weights") == ref
    assert store.shelf.read(blob_path(ref), 100) == b"WEIGHTS"
    store.shelf.write(blob_path(ref), b"cut")
    assert store.put(b"weights") == ref
    assert store.shelf.read(blob_path(ref), 100) == b"weights"


@pytest.mark.parametrize(
    ("data", "error"),
    [(None, BundleIncomplete), (b"weight", BundleIncomplete), (b"weights!", BundleCorrupt),
     (b"WEIGHTS", BundleCorrupt)],
)  # fmt: skip
def test_a_damaged_blob_is_refused_and_not_kept(
    store: RemoteStore, tmp_path: Path, data: bytes | None, error: type[Exception]
) -> None:
    ref = store.put(b"weights")
    store.shelf.delete(blob_path(ref))
    if data is not None:
        store.shelf.write(blob_path(ref), data)
    with pytest.raises(error, match=ref.digest):
        store.map(ref)
    assert [path for path in (tmp_path / "cache").rglob(ref.digest) if path.is_file()] == []


def test_a_manifest_comes_back_and_is_not_replaced_unless_asked(store: RemoteStore) -> None:
    manifest = full_manifest(store)
    assert store.servables() == ()
    store.write_manifest(manifest)
    assert store.read_manifest("ranker", 1) == manifest
    assert store.check("ranker", 1) == store.verify("ranker", 1) == manifest
    with pytest.raises(FailedPrecondition, match="ranker/1 exists"):
        store.write_manifest(manifest)
    changed = msgspec.structs.replace(
        manifest, created=msgspec.structs.replace(manifest.created, jax="9")
    )
    store.write_manifest(changed, overwrite=True)
    assert store.read_manifest("ranker", 1) == changed
    assert store.servables() == ("ranker",)
    assert store.versions("ranker") == (1,)


def test_of_writers_of_one_version_at_once_at_most_one_wins(
    bucket: Bucket, store: RemoteStore, tmp_path: Path
) -> None:
    manifest = full_manifest(store)

    def write(_: int) -> bool:
        try:
            bucket.store(tmp_path).write_manifest(manifest)
        except FailedPrecondition:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(write, range(4))) <= 1


def test_only_numbers_with_a_manifest_are_versions(store: RemoteStore) -> None:
    manifest = full_manifest(store)
    data = msgspec.json.encode(manifest)
    for path in ("ranker/007", "ranker/7", "ranker/12", "ranker/x", "ranker/0", "ranker/3/deep"):
        store.shelf.write(f"{path}/servable.json", data)
    store.shelf.write("ranker/9/servable.json.tmp", data)
    store.shelf.write("notes/readme.txt", b"")
    assert store.versions("ranker") == (7, 12)
    assert store.versions("nobody") == ()
    assert store.servables() == ("ranker",)
    assert store.read_manifest("ranker", 12).version == 12
    store.shelf.delete("ranker/7/servable.json")
    assert store.read_manifest("ranker", 7).version == 7
    with pytest.raises(BundleNotFound, match="versions of 'ranker': 7, 12"):
        store.read_manifest("ranker", 8)


@pytest.mark.parametrize(
    ("data", "error"), [(b"{", BundleCorrupt), (b"{}", BundleForeign), (b"", BundleCorrupt)]
)
def test_a_broken_manifest_is_refused(
    store: RemoteStore, data: bytes, error: type[Exception]
) -> None:
    store.shelf.write("ranker/1/servable.json", data)
    with pytest.raises(error, match="ranker/1"):
        store.read_manifest("ranker", 1)


def test_check_and_verify_say_which_blob_is_wrong(store: RemoteStore) -> None:
    manifest = full_manifest(store)
    store.write_manifest(manifest)
    ref = next(iter(blobs_of(manifest).values()))
    store.shelf.write(blob_path(ref), bytes(ref.size))
    assert store.check("ranker", 1) == manifest
    with pytest.raises(BundleCorrupt, match=ref.digest):
        store.verify("ranker", 1)
    store.shelf.delete(blob_path(ref))
    with pytest.raises(BundleIncomplete, match=ref.digest):
        store.check("ranker", 1)


@pytest.mark.parametrize("name", ["../x", "blobs", "", "a/b", "_cluster"])
def test_names_that_could_mean_something_else_are_refused(store: RemoteStore, name: str) -> None:
    with pytest.raises(InvalidArgument):
        store.versions(name)


def test_blobs_go_from_store_to_store(
    store: RemoteStore, bucket_server: BucketServer, tmp_path: Path
) -> None:
    local, other = LocalStore(tmp_path / "store"), bucket_server.bucket().store(tmp_path / "2")
    data = np.random.default_rng(0).bytes(CHUNK + 100)
    ref = local.put(data)
    progress = Progress(ref.size)
    assert store.bring(ref, local, progress)
    assert progress.done == ref.size
    assert not store.bring(ref, local)
    assert other.bring(ref, store)
    back = LocalStore(tmp_path / "back")
    assert back.bring(ref, other)
    assert not back.bring(ref, other)
    assert back.map(ref).tobytes() == data
    assert back.hashed_blobs == 0  # its bytes were verified while they came
    with pytest.raises(BundleIncomplete):
        back.bring(BlobRef(digest="0" * 64, size=3), other)


def test_a_bundle_is_saved_to_and_read_from_a_bucket(store: RemoteStore, tmp_path: Path) -> None:
    shards.save(
        lambda params, x: x @ params["w"],
        {"w": np.eye(4, dtype=np.float32)},
        store,
        "mlp",
        version=3,
        inputs={"x": shards.Spec(("b", 4))},
    )
    manifest = shards.read(store, "mlp")
    assert manifest.version == 3
    assert store.verify("mlp", 3) == manifest


def test_an_outage_is_unavailable_and_never_empty(tmp_path: Path) -> None:
    location = parse_location("s3://b/p?endpoint_override=127.0.0.1:1&scheme=http&region=us-east-1")
    store = RemoteStore(
        Objects(location.url, connect(location), location.root, timeout_s=2.0),
        NodeCache(tmp_path),
    )
    asking = [
        store.servables,
        store.create,
        lambda: store.versions("x"),
        lambda: store.read_manifest("x", 1),
        lambda: store.put(b"x"),
        lambda: store.map(BlobRef(digest="0" * 64, size=1)),
        lambda: store.latest_state("x"),
        lambda: store.put_state("x", 1, 1, b""),
        lambda: store.next_term("x"),
    ]
    with ThreadPoolExecutor(len(asking)) as pool:
        for asked in [pool.submit(ask) for ask in asking]:
            with pytest.raises(Unavailable):
                asked.result()
