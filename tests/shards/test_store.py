"""The store: blobs, manifests, and what it refuses."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest

from batching.errors import FailedPrecondition, InvalidArgument, Unavailable, Unimplemented
from shards.checking import encode_manifest
from shards.errors import BundleCorrupt, BundleForeign, BundleIncomplete, BundleNotFound
from shards.manifest import SCHEMA, BlobRef
from shards.store import LocalStore, open_store, read
from tests.shards.bundles import full_manifest


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def blob_path(store: LocalStore, ref: BlobRef) -> Path:
    return store.path / "blobs" / "blake3" / ref.digest


def overwrite(path: Path, data: bytes, at: int = 0) -> None:
    """Write into an immutable file, as a broken disk or a careless person would."""
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


# --- blobs -------------------------------------------------------------------------------------


def test_a_blob_comes_back_as_it_was_put_read_only_and_named_by_its_digest(
    store: LocalStore,
) -> None:
    ref = store.put(b"some bytes")
    assert store.map(ref).tobytes() == b"some bytes"
    assert stat.S_IMODE(blob_path(store, ref).stat().st_mode) == 0o444
    with pytest.raises(ValueError, match="read-only"):
        store.map(ref)[0] = 1


def test_bytes_pieces_and_arrays_with_the_same_bytes_are_one_blob(store: LocalStore) -> None:
    array = np.arange(6, dtype=np.int16).reshape(2, 3)
    refs = {
        store.put(array),
        store.put(array.tobytes()),
        store.put(array.data),
        store.put(bytes([byte]) for byte in array.tobytes()),
        store.put(np.asfortranarray(array)),
    }
    assert len(refs) == 1
    assert len(os.listdir(store.path / "blobs" / "blake3")) == 1


def test_a_blob_that_is_there_is_not_written_again(store: LocalStore) -> None:
    ref = store.put(b"once")
    before = blob_path(store, ref).stat()
    assert store.put(b"once") == ref
    assert store.put([b"on", b"ce"]) == ref
    after = blob_path(store, ref).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


@pytest.mark.parametrize("empty", [b"", np.empty((0, 4), np.float32), ()])
def test_nothing_is_a_blob_too(store: LocalStore, empty: object) -> None:
    ref = store.put(empty)  # type: ignore[arg-type]
    assert ref.size == 0
    assert store.map(ref).shape == (0,)
    assert not store.map(ref).flags.writeable


def test_a_mapped_blob_begins_on_an_aligned_address_and_outlives_its_name(
    store: LocalStore,
) -> None:
    ref = store.put(np.arange(1000, dtype=np.float32))
    mapped = store.map(ref)
    assert mapped.ctypes.data % 64 == 0
    blob_path(store, ref).unlink()
    assert mapped.view(np.float32)[999] == 999


def test_a_source_that_breaks_leaves_no_blob(store: LocalStore) -> None:
    def pieces() -> object:
        yield b"first"
        raise RuntimeError("broke")

    with pytest.raises(RuntimeError, match="broke"):
        store.put(pieces())  # type: ignore[arg-type]
    assert os.listdir(store.path / "blobs" / "blake3") == []


def test_writers_of_the_same_blob_at_once_all_succeed(store: LocalStore) -> None:
    data = np.random.default_rng(0).bytes(200_000)
    with ThreadPoolExecutor(8) as pool:
        refs = set(pool.map(lambda _: LocalStore(store.path).put(data), range(16)))
    (ref,) = refs
    assert store.map(ref).tobytes() == data
    assert os.listdir(store.path / "blobs" / "blake3") == [ref.digest]


# --- verified once -----------------------------------------------------------------------------


def test_a_remap_hashes_nothing_in_this_process_and_in_the_next(store: LocalStore) -> None:
    ref = store.put(b"x" * 100_000)
    hashed = store.hashed_blobs
    for _ in range(3):
        store.map(ref)
    assert store.hashed_blobs == hashed == 1
    another = LocalStore(store.path)
    another.map(ref)
    assert another.hashed_blobs == 0


def test_a_copied_store_is_hashed_once(store: LocalStore, tmp_path: Path) -> None:
    ref = store.put(b"carried elsewhere")
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "blobs" / "blake3").mkdir(parents=True)
    (elsewhere / "blobs" / "blake3" / ref.digest).write_bytes(b"carried elsewhere")
    copy = LocalStore(elsewhere)
    copy.map(ref)
    copy.map(ref)
    assert (copy.hashed_blobs, copy.hashed_bytes) == (1, ref.size)
    again = LocalStore(elsewhere)
    again.map(ref)
    assert again.hashed_blobs == 0


def test_a_blob_that_was_written_to_is_hashed_again_and_refused(store: LocalStore) -> None:
    ref = store.put(b"sound bytes")
    overwrite(blob_path(store, ref), b"S")
    with pytest.raises(BundleCorrupt, match=ref.digest):
        store.map(ref)
    with pytest.raises(BundleCorrupt, match=ref.digest):
        LocalStore(store.path).map(ref)


def test_a_store_that_cannot_remember_still_serves(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = store.put(b"on a read-only disk")
    (store.path / ".verified" / ref.digest).unlink()
    reader = LocalStore(store.path)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr("shards.stamps.write_atomically", refuse)
    for _ in range(3):
        assert reader.map(ref).tobytes() == b"on a read-only disk"
    assert reader.hashed_blobs == 1


def test_putting_a_blob_again_heals_a_corrupt_one(
    store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    ref = store.put(b"sound bytes")
    overwrite(blob_path(store, ref), b"S")
    assert store.put(b"sound bytes") == ref
    assert store.map(ref).tobytes() == b"sound bytes"
    assert "writing it anew" in caplog.text


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        (None, BundleIncomplete, "missing"),
        (b"sou", BundleIncomplete, "short: 3 of 11 bytes"),
        (b"sound bytes!", BundleCorrupt, "12 bytes, not 11"),
        (b"Sound bytes", BundleCorrupt, "corrupt"),
    ],
)
def test_a_damaged_blob_is_refused_and_named(
    store: LocalStore, data: bytes | None, error: type[Exception], says: str
) -> None:
    ref = store.put(b"sound bytes")
    blob_path(store, ref).unlink()
    if data is not None:
        blob_path(store, ref).write_bytes(data)
    with pytest.raises(error, match=says) as caught:
        store.map(ref)
    assert ref.digest in str(caught.value)


def test_a_blob_that_the_disk_refuses_is_unavailable_and_not_missing(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write_manifest(full_manifest(store))

    def refuse(*_: object, **__: object) -> int:
        raise OSError(5, "Input/output error")

    ref = store.put(b"vocabulary")
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        with pytest.raises(Unavailable, match="Input/output error"):
            store.map(ref)
    assert store.map(ref).tobytes() == b"vocabulary"


# --- versions ----------------------------------------------------------------------------------


def test_only_numbers_with_a_manifest_are_versions(store: LocalStore) -> None:
    data = encode_manifest(full_manifest(store))
    for directory in ("9", "00017", "100", "latest", "-3", "0", "1.5", "²"):
        (store.path / "ranker" / directory).mkdir(parents=True)
        (store.path / "ranker" / directory / "servable.json").write_bytes(data)
    (store.path / "ranker" / "200").mkdir()
    (store.path / "ranker" / "300").write_bytes(b"a file, not a directory")
    assert store.versions("ranker") == (9, 17, 100)
    assert store.read_manifest("ranker", 17).version == 17
    assert read(store, "ranker").version == 100
    assert read(str(store.path), "ranker", 9).version == 9


def test_servables_are_the_names_with_a_version(store: LocalStore) -> None:
    for name in ("ranker", "b.2"):
        store.write_manifest(full_manifest(store, name))
    store.put_state("ranker", 1, 1, b"{}")
    for name in ("empty", ".hidden", "_cluster", "not a name"):
        (store.path / name / "1").mkdir(parents=True)
        if name != "empty":
            (store.path / name / "1" / "servable.json").write_bytes(b"{}")
    assert store.servables() == ("b.2", "ranker")


def test_an_absent_store_is_not_an_empty_one(tmp_path: Path) -> None:
    absent = LocalStore(tmp_path / "unmounted")
    with pytest.raises(Unavailable, match="unmounted"):
        absent.servables()
    with pytest.raises(Unavailable, match="unmounted"):
        absent.versions("ranker")
    (tmp_path / "empty").mkdir()
    assert LocalStore(tmp_path / "empty").servables() == ()
    assert LocalStore(tmp_path / "empty").versions("ranker") == ()


@pytest.mark.parametrize("name", ["", "_x", ".x", "blobs", "a/b", "..", "a b", "x" * 129, "é"])
def test_names_that_could_mean_something_else_are_refused(store: LocalStore, name: str) -> None:
    with pytest.raises(InvalidArgument, match="not a servable name"):
        store.versions(name)


@pytest.mark.parametrize("name", ["a", "0", "Ranker-2.b_c", "x" * 128])
def test_ordinary_names_are_taken(store: LocalStore, name: str) -> None:
    store.write_manifest(full_manifest(store, name))
    assert store.servables() == (name,)


# --- manifests ---------------------------------------------------------------------------------


def test_a_manifest_comes_back_as_it_was_written(store: LocalStore) -> None:
    manifest = full_manifest(store)
    store.write_manifest(manifest)
    assert store.read_manifest("ranker", 1) == manifest
    # Order is part of the meaning: inputs are passed by it.
    written = store.read_manifest("ranker", 1)
    assert list(written.units) == list(manifest.units)


def test_a_version_is_not_replaced_unless_asked(store: LocalStore) -> None:
    manifest = full_manifest(store)
    store.write_manifest(manifest)
    other = msgspec.structs.replace(manifest, units=dict(reversed(manifest.units.items())))
    with pytest.raises(FailedPrecondition, match=r"ranker/1 exists.*overwrite"):
        store.write_manifest(other)
    assert list(store.read_manifest("ranker", 1).units) == list(manifest.units)
    store.write_manifest(other, overwrite=True)
    assert list(store.read_manifest("ranker", 1).units) == list(other.units)


def test_a_version_of_leading_zeros_counts_as_existing(store: LocalStore) -> None:
    manifest = full_manifest(store)
    (store.path / "ranker" / "001").mkdir(parents=True)
    (store.path / "ranker" / "001" / "servable.json").write_bytes(encode_manifest(manifest))
    with pytest.raises(FailedPrecondition, match="exists"):
        store.write_manifest(manifest)


def test_of_writers_of_one_version_at_once_one_wins(store: LocalStore) -> None:
    manifest = full_manifest(store)

    def write(_: int) -> bool:
        try:
            LocalStore(store.path).write_manifest(manifest)
        except FailedPrecondition:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(write, range(16))) == 1
    assert store.read_manifest("ranker", 1) == manifest


@pytest.mark.parametrize("version", [0, -1])
def test_versions_are_positive(store: LocalStore, version: int) -> None:
    with pytest.raises(InvalidArgument, match="positive"):
        store.write_manifest(full_manifest(store, version=version))


def test_the_directory_names_the_servable_whatever_is_written_inside(store: LocalStore) -> None:
    store.write_manifest(full_manifest(store))
    (store.path / "ranker" / "1").rename(store.path / "ranker" / "2")
    (store.path / "ranker").rename(store.path / "renamed")
    manifest = read(store, "renamed")
    assert (manifest.name, manifest.version) == ("renamed", 2)


def test_what_is_not_there_is_said_to_be_not_there(store: LocalStore) -> None:
    store.write_manifest(full_manifest(store, version=3))
    with pytest.raises(BundleNotFound, match=r"ranker/2; versions of 'ranker': 3"):
        store.read_manifest("ranker", 2)
    with pytest.raises(BundleNotFound, match="no servable 'other'"):
        read(store, "other")
    (store.path / "ranker" / "4").mkdir()
    with pytest.raises(BundleIncomplete, match=r"ranker/4 .* half-written"):
        store.read_manifest("ranker", 4)
    assert store.versions("ranker") == (3,)


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        (b"", BundleCorrupt, "not JSON"),
        (b"\x00\x01", BundleCorrupt, "not JSON"),
        (b"\xff{}", BundleCorrupt, "not JSON"),
        (b"[" * 100_000, BundleCorrupt, "not JSON"),
        (b"[]", BundleForeign, "no schema number"),
        (b'{"name": "x"}', BundleForeign, "no schema number"),
        (b'{"schema": "1"}', BundleForeign, "no schema number"),
        (b'{"schema": true}', BundleForeign, "no schema number"),
        (b'{"schema": 99, "new": 1}', BundleForeign, rf"schema 99.*up to schema {SCHEMA}:"),
        (b'{"schema": 1}', BundleCorrupt, "does not parse"),
    ],
)
def test_bytes_that_are_no_manifest_are_refused_with_the_reason(
    store: LocalStore, data: bytes, error: type[Exception], says: str
) -> None:
    (store.path / "ranker" / "5").mkdir(parents=True)
    (store.path / "ranker" / "5" / "servable.json").write_bytes(data)
    with pytest.raises(error, match=says) as caught:
        store.read_manifest("ranker", 5)
    assert "ranker/5" in str(caught.value)


def test_a_manifest_cut_anywhere_is_corrupt(store: LocalStore) -> None:
    store.write_manifest(full_manifest(store))
    path = store.path / "ranker" / "1" / "servable.json"
    whole = path.read_bytes().rstrip()
    for stop in range(0, len(whole), 97):
        path.write_bytes(whole[:stop])
        with pytest.raises(BundleCorrupt, match="ranker/1"):
            store.read_manifest("ranker", 1)


# --- check and verify --------------------------------------------------------------------------


def test_a_sound_bundle_is_verified_and_every_blob_hashed(store: LocalStore) -> None:
    store.write_manifest(full_manifest(store))
    hashed = store.hashed_blobs
    assert store.check("ranker", 1).name == "ranker"
    assert store.hashed_blobs == hashed
    assert store.verify("ranker", 1).name == "ranker"
    assert store.hashed_blobs - hashed == len(os.listdir(store.path / "blobs" / "blake3"))


def test_every_blob_of_every_unit_is_checked(store: LocalStore) -> None:
    store.write_manifest(full_manifest(store))
    for digest in os.listdir(store.path / "blobs" / "blake3"):
        path = store.path / "blobs" / "blake3" / digest
        data = path.read_bytes()
        path.unlink()
        with pytest.raises(BundleIncomplete, match=digest):
            store.check("ranker", 1)
        path.write_bytes(data[:-1])
        with pytest.raises(BundleIncomplete, match=f"{digest}.*short"):
            store.check("ranker", 1)
        path.write_bytes(data)
    assert store.verify("ranker", 1).version == 1


def test_verify_finds_decay_that_leaves_no_trace_in_the_file_system(store: LocalStore) -> None:
    store.write_manifest(full_manifest(store))
    ref = store.put(b"vocabulary")
    before = blob_path(store, ref).stat()
    overwrite(blob_path(store, ref), b"V")
    os.utime(blob_path(store, ref), ns=(before.st_atime_ns, before.st_mtime_ns))
    assert store.map(ref).tobytes() == b"Vocabulary"  # the stamp fits: not hashed
    with pytest.raises(BundleCorrupt, match=ref.digest):
        store.verify("ranker", 1)
    with pytest.raises(BundleCorrupt, match=ref.digest):
        store.map(ref)  # and from now on nobody maps it
    with pytest.raises(BundleCorrupt, match=ref.digest):
        LocalStore(store.path).map(ref)


# --- opening -----------------------------------------------------------------------------------


def test_a_store_is_opened_from_what_names_it(store: LocalStore, tmp_path: Path) -> None:
    assert open_store(store) is store
    for name in (str(tmp_path), tmp_path, f"file://{tmp_path}"):
        assert open_store(name).url == str(tmp_path)
    with pytest.raises(Unimplemented, match="'hdfs'"):
        open_store("hdfs://bucket/prefix")


def test_opening_a_bucket_asks_nobody() -> None:
    store = open_store("s3://no-such-bucket/prefix/?region=eu-west-1")
    assert store.url == "s3://no-such-bucket/prefix?region=eu-west-1"


def test_a_disk_that_refuses_small_files_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"in the way")
    shelf = LocalStore(tmp_path).shelf
    for write in (shelf.write, shelf.create_exclusively):
        with pytest.raises(Unavailable, match="file/far/below"):
            write("file/far/below", b"")
    with pytest.raises(Unavailable, match="file/below"):
        shelf.delete("file/below")


def test_a_pipe_in_the_place_of_a_blob_or_manifest_holds_nobody_up(store: LocalStore) -> None:
    ref = store.put(b"weights")
    blob_path(store, ref).unlink()
    os.mkfifo(blob_path(store, ref))
    with pytest.raises((BundleCorrupt, BundleIncomplete)):
        store.map(ref)
    (store.path / "ranker" / "1").mkdir(parents=True)
    os.mkfifo(store.path / "ranker" / "1" / "servable.json")
    assert store.versions("ranker") == ()
    with pytest.raises(BundleIncomplete):
        store.read_manifest("ranker", 1)
