"""Archives: whole, mapped where they lie, and refused when they are something else."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from batching.errors import NotFound
from shards.archive import ArchiveStore, pack_archive
from shards.checking import blobs_of, encode_manifest
from shards.errors import BundleCorrupt, BundleIncomplete, BundleNotFound
from shards.local import LocalStore
from shards.manifest import BlobRef, Manifest
from shards.progress import Progress
from tests.shards.bundles import full_manifest


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "store")
    store.write_manifest(full_manifest(store))
    return store


@pytest.fixture
def manifest(store: LocalStore) -> Manifest:
    return store.read_manifest("ranker", 1)


@pytest.fixture
def archive(store: LocalStore, tmp_path: Path) -> Path:
    path = tmp_path / "ranker.tar"
    pack_archive(store, [("ranker", 1)], path, Progress(0))
    return path


def test_an_archive_is_a_store_that_maps_in_place(
    archive: Path, store: LocalStore, manifest: Manifest
) -> None:
    packed = ArchiveStore(archive)
    assert packed.servables() == ("ranker",)
    assert packed.versions("ranker") == (1,)
    assert packed.read_manifest("ranker", 1) == manifest
    for ref in blobs_of(manifest).values():
        data = packed.map(ref)
        assert data.tobytes() == store.map(ref).tobytes()
        assert data.ctypes.data % 64 == 0
        assert not data.flags.writeable
    with pytest.raises(BundleNotFound):
        packed.read_manifest("ranker", 2)
    with pytest.raises(BundleIncomplete):
        packed.map(BlobRef(digest="0" * 64, size=1))
    with pytest.raises(NotFound):
        ArchiveStore(archive.with_name("nowhere.tar"))


def test_ordinary_tools_unpack_it_into_a_store_and_pack_it_again(
    archive: Path, tmp_path: Path, manifest: Manifest
) -> None:
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    subprocess.run(["tar", "-xf", archive, "-C", unpacked], check=True)
    assert LocalStore(unpacked).verify("ranker", 1) == manifest
    again = tmp_path / "again.tar"
    subprocess.run(["tar", "-cf", again, "-C", unpacked, "."], check=True)
    with_python = tmp_path / "python.tar"
    with tarfile.open(with_python, "w") as tar:  # with extensions for times
        tar.add(unpacked, ".")
    for path in (again, with_python):
        packed = ArchiveStore(path)
        assert packed.read_manifest("ranker", 1) == manifest
        for ref in blobs_of(manifest).values():
            packed.map(ref)


def test_an_archive_cut_off_anywhere_is_incomplete(archive: Path, tmp_path: Path) -> None:
    data = archive.read_bytes()
    cut = tmp_path / "cut.tar"
    for size in range(0, len(data) - 1024, 200):
        cut.write_bytes(data[:size])
        with pytest.raises((BundleIncomplete, BundleNotFound)):
            ArchiveStore(cut).read_manifest("ranker", 1)


def test_a_changed_blob_is_corrupt(archive: Path, store: LocalStore, manifest: Manifest) -> None:
    ref = next(iter(blobs_of(manifest).values()))
    data = archive.read_bytes()
    at = data.index(store.map(ref).tobytes())
    archive.write_bytes(data[:at] + b"\xff" + data[at + 1 :])
    with pytest.raises(BundleCorrupt, match=ref.digest):
        ArchiveStore(archive).map(ref)


def member(name: str, data: bytes = b"", **fields: object) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


def pax(text: bytes) -> bytes:
    return member("x", text, type=tarfile.XHDTYPE)


END = bytes(1024)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(member("a", type=tarfile.SYMTYPE, linkname="/etc/passwd"), id="symlink"),
        pytest.param(member("a", type=tarfile.LNKTYPE, linkname="../../b"), id="hard link"),
        pytest.param(member("a", type=tarfile.CHRTYPE), id="device"),
        pytest.param(member("a", type=tarfile.FIFOTYPE), id="pipe"),
        pytest.param(member("a", type=tarfile.GNUTYPE_SPARSE), id="sparse"),
        pytest.param(member("a", b"y" * 70_000, type=tarfile.XHDTYPE), id="large extension"),
        pytest.param(pax(b"20 path=../../evil\n\n") + member("a", b"x"), id="renaming"),
        pytest.param(pax(b"12 size=999\n") + member("a", b"x"), id="resizing"),
        pytest.param(member("a", size=-512), id="negative size"),
        pytest.param(member("a", size=1 << 60), id="size beyond the end"),
        pytest.param(b"\x1f\x8b" + os.urandom(1000), id="compressed"),
        pytest.param(b"x" * 100, id="too short"),
        pytest.param(
            member("m/1/servable.json", b"{}") + member("./m/1/servable.json", b"{}"), id="twice"
        ),
    ],
)
def test_what_is_no_plain_archive_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "bad.tar"
    path.write_bytes(data + END)
    with pytest.raises((BundleCorrupt, BundleIncomplete)):
        ArchiveStore(path)


@pytest.mark.parametrize(
    "name",
    [
        "../blobs/blake3/" + "0" * 64,
        "/etc/passwd",
        "../../evil/1/servable.json",
        "ranker/../../1/servable.json",
        "blobs/1/servable.json",
        "blobs/blake3/../../x",
        "_cluster/main/9-9.json",
        "readme.txt",
    ],
)
def test_other_names_mean_nothing(tmp_path: Path, name: str) -> None:
    path = tmp_path / "other.tar"
    path.write_bytes(member(name, b"data") + END)
    packed = ArchiveStore(path)
    assert packed.servables() == ()
    assert packed._members == {}


def test_a_manifest_names_no_file_outside(tmp_path: Path, manifest: Manifest) -> None:
    evil = encode_manifest(manifest).replace(
        next(iter(blobs_of(manifest))).encode(), b"../../../../etc/passwd"
    )
    path = tmp_path / "evil.tar"
    path.write_bytes(member("ranker/1/servable.json", evil) + END)
    with pytest.raises(BundleCorrupt, match="is not a blob"):
        ArchiveStore(path).read_manifest("ranker", 1)


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513])
def test_sizes_around_a_block(tmp_path: Path, size: int) -> None:
    store = LocalStore(tmp_path / "store")
    ref = store.put(bytes(size))
    out = io.BytesIO()
    out.write(member(f"blobs/blake3/{ref.digest}", bytes(size)) + END)
    path = tmp_path / "a.tar"
    path.write_bytes(out.getvalue())
    assert ArchiveStore(path).map(ref).tobytes() == bytes(size)


def test_a_failed_packing_leaves_no_file(store: LocalStore, tmp_path: Path) -> None:
    manifest = store.read_manifest("ranker", 1)
    (store.path / "blobs" / "blake3" / list(blobs_of(manifest))[-1]).unlink()
    before = set(tmp_path.iterdir())
    with pytest.raises(BundleIncomplete):
        pack_archive(store, [("ranker", 1)], tmp_path / "out.tar", Progress(0))
    assert set(tmp_path.iterdir()) == before
