"""A bundle in one file: a plain, uncompressed tar whose members are named as in a store.

    blobs/blake3/<digest>            every blob, at a multiple of 512 bytes: mapped where it lies
    <name>/<version>/servable.json   the manifest, last: an archive that was cut off has none

`ArchiveStore` reads such a file as a store that cannot be written to. Nothing is ever extracted:
members are looked up by name, blobs are verified against their digests, and a path in an archive
is never a path on the disk. What is not an archive of this form is refused, whoever made it; one
that ordinary tools made of an unpacked store is fine. Sizes are bounded by that of the file.
"""

from __future__ import annotations

import mmap
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Final

import msgspec
import numpy as np

from batching.errors import NotFound, Unavailable
from shards.checking import blobs_of, decode_manifest, encode_manifest
from shards.drafts import refuse_sparse
from shards.errors import BundleCorrupt, BundleIncomplete, BundleNotFound
from shards.files import Bytes, copy_sparsely, digest_of, write_atomically
from shards.layout import MANIFEST, Buffer, blob_path, is_name, manifest_path, version_of
from shards.manifest import BlobRef, Manifest
from shards.progress import Progress
from shards.store import Source

__all__ = ["ArchiveStore", "pack_archive"]

_BLOCK: Final = tarfile.BLOCKSIZE
_PIECE: Final = 64 << 20
#: A size that the oldest form of a header can hold.
_USTAR_SIZE_MAX: Final = 8 << 30
_MEMBERS_MAX: Final = 1_000_000
_MANIFEST_BYTES_MAX: Final = 256 << 20
_EXTENSION_BYTES_MAX: Final = 64 << 10
_FILE: Final = (tarfile.REGTYPE, tarfile.AREGTYPE)
_EXTENSION: Final = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_BLOB: Final = re.compile(r"blobs/blake3/([0-9a-f]{64})")
#: What an extension may not say: then its member is not what its header says.
_TELLING: Final = re.compile(rb"\d+ (?:path|linkpath|size|GNU\.sparse[^=]*)=")


def pack_archive(
    source: Source, versions: Iterable[tuple[str, int]], path: Path, progress: Progress
) -> None:
    """Write versions of a store into one file, which appears when it is whole.

    Args:
        source: the store.
        versions: names and versions.
        path: of the file; one that is there is replaced.
        progress: told of the bytes that are written.

    Raises:
        ServingError: a bundle's own trouble.
        OSError: the file cannot be written.
    """
    manifests = [source.read_manifest(*version) for version in versions]
    refs = {ref.digest: ref for manifest in manifests for ref in blobs_of(manifest).values()}
    progress.total = sum(ref.size for ref in refs.values())

    def members() -> Iterator[Bytes]:
        for ref in refs.values():
            refuse_sparse(ref, "an archive")
            yield from _member(blob_path(ref), source.map(ref).data)
            progress.note(ref.digest, ref.size)
        for manifest in manifests:
            data = encode_manifest(manifest)
            yield from _member(manifest_path(manifest.name, manifest.version), data)
        yield bytes(2 * _BLOCK)

    write_atomically(path, members())


def _member(name: str, data: Bytes) -> Iterator[Bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o444
    is_small = len(data) < _USTAR_SIZE_MAX
    yield info.tobuf(tarfile.USTAR_FORMAT if is_small else tarfile.GNU_FORMAT)
    for at in range(0, len(data), _PIECE):
        yield data[at : at + _PIECE]
    yield bytes(-len(data) % _BLOCK)


class ArchiveStore:
    """The bundles of an archive.

    Args:
        path: of the file.

    Raises:
        NotFound: there is no such file.
        BundleCorrupt: it is not an archive of bundles; says why.
        BundleIncomplete: it was cut off.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().absolute()
        try:
            with open(self.path, "rb") as file:
                self._members = dict(_index(file))
                self._data = (
                    np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
                    if self._members
                    else np.empty(0, np.uint8)
                )
        except FileNotFoundError:
            raise NotFound(f"{self.path} is not there") from None
        except OSError as error:
            raise Unavailable(f"{self.path} cannot be read: {error.strerror}") from None
        self._verified: set[str] = set()
        self._manifests = {
            key: name for name in self._members if (key := _version_in(name)) is not None
        }

    @property
    def url(self) -> str:
        """The path."""
        return str(self.path)

    def servables(self) -> tuple[str, ...]:
        """Names with at least one version, in order."""
        return tuple(sorted({name for name, _ in self._manifests}))

    def versions(self, name: str) -> tuple[int, ...]:
        """Versions of a servable, ascending."""
        return tuple(sorted(version for each, version in self._manifests if each == name))

    def read_manifest(self, name: str, version: int) -> Manifest:
        """The manifest of a version; name and version are those of its path.

        Raises:
            BundleNotFound: no such servable or version.
            BundleForeign: not ours, or too new.
            BundleCorrupt: broken.
        """
        where = f"{name}/{version}"
        member = self._manifests.get((name, version))
        if member is None:
            raise BundleNotFound(f"{self.path} has no {where}")
        offset, size = self._members[member]
        if size > _MANIFEST_BYTES_MAX:
            raise BundleCorrupt(f"{where}: a manifest of {size} bytes")
        manifest = decode_manifest(self._data[offset : offset + size].tobytes(), where)
        return msgspec.structs.replace(manifest, name=name, version=version)

    def map(self, ref: BlobRef, progress: Progress | None = None) -> Buffer:
        """A blob as read-only memory, where it lies in the file; verified once.

        Raises:
            BundleIncomplete: it is missing or short.
            BundleCorrupt: it does not have its digest.
        """
        found = self._members.get(blob_path(ref))
        if found is None:
            raise BundleIncomplete(f"blob {ref.digest} is missing from {self.path}")
        offset, size = found
        if size != ref.size:
            kind = BundleIncomplete if size < ref.size else BundleCorrupt
            raise kind(f"blob {ref.digest} in {self.path} has {size} of {ref.size} bytes")
        data = self._data[offset : offset + size]
        if ref.digest not in self._verified:
            if (digest := digest_of(data.data)) != ref.digest:
                raise BundleCorrupt(f"blob {ref.digest} in {self.path} has digest {digest}")
            self._verified.add(ref.digest)
        if progress is not None:
            progress.note(ref.digest, ref.size)
        return data

    def fetch(self, ref: BlobRef, descriptor: int, progress: Progress | None = None) -> None:
        """Write a blob's verified bytes into an empty file."""

        def wrote(done: int) -> None:
            if progress is not None:
                progress.note(ref.digest, done)

        copy_sparsely(self.map(ref).data, descriptor, wrote)


def _version_in(member: str) -> tuple[str, int] | None:
    name, _, rest = member.partition("/")
    folder, _, file = rest.partition("/")
    version = version_of(folder)
    if file != MANIFEST or version is None or not is_name(name):
        return None
    return name, version


def _index(file: BinaryIO) -> Iterator[tuple[str, tuple[int, int]]]:
    """Members that are blobs or manifests: name to offset and size."""
    end = os.fstat(file.fileno()).st_size
    seen: set[str] = set()
    at = 0
    for _ in range(_MEMBERS_MAX):
        file.seek(at)
        block = file.read(_BLOCK)
        if block.count(0) == _BLOCK:
            return
        if len(block) < _BLOCK:
            raise BundleIncomplete(f"{file.name} was cut off after {at} bytes, or is no archive")
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            raise BundleCorrupt(f"{file.name} is not an archive of bundles: {error}") from None
        at += _BLOCK
        if not 0 <= info.size <= end - at:
            raise BundleIncomplete(f"{file.name} was cut off in {info.name!r}")
        _check_member(file, info)
        name = info.name.removeprefix("./")
        if info.type in _FILE and (_BLOB.fullmatch(name) or _version_in(name)):
            if name in seen:
                raise BundleCorrupt(f"{file.name} holds {name!r} twice")
            seen.add(name)
            yield name, (at, info.size)
        at += -(-info.size // _BLOCK) * _BLOCK
    raise BundleCorrupt(f"{file.name} has more than {_MEMBERS_MAX} members")


def _check_member(file: BinaryIO, info: tarfile.TarInfo) -> None:
    """Refuse a member that is not simply a file with a name and a size.

    Raises:
        BundleCorrupt: links, devices, sparse files, and headers that change the next one.
    """
    if info.type in _FILE:
        return
    if info.type == tarfile.DIRTYPE and info.size == 0:
        return
    is_small = info.type in _EXTENSION and info.size <= _EXTENSION_BYTES_MAX
    if is_small and _TELLING.search(file.read(info.size)) is None:
        return
    raise BundleCorrupt(
        f"{file.name} holds {info.name!r} of type {info.type!r}, which no archive of bundles does"
    )
