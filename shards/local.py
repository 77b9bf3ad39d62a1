"""A store in a directory: blobs are verified where they lie, and mapped without a copy.

Beside what every store holds (`shards.layout`):

    <store>/.verified/<digest>       which file was found to have that digest

Decides what exists (only what has a manifest), and when bytes are hashed: once, at ingest. A file
whose inode, size and modification time are those that were verified is mapped without hashing.
Does not know JAX, nor what blobs mean.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt

from batching.errors import FailedPrecondition, InvalidArgument, ResourceExhausted, Unavailable
from shards.checking import blobs_of, decode_manifest, encode_manifest
from shards.drafts import Draft
from shards.errors import BundleCorrupt, BundleIncomplete, BundleNotFound
from shards.files import (
    TEMPORARY,
    Bytes,
    Hasher,
    copy_sparsely,
    digest_of,
    digest_of_file,
    flat_view,
    sync_directory,
    temporary_beside,
    write_atomically,
    write_through,
)
from shards.layout import BLOBS, MANIFEST, Buffer, check_name, is_name, version_of
from shards.manifest import BlobRef, Manifest
from shards.progress import Progress
from shards.shelves import DirectoryShelf
from shards.sparse import copy_data, digest_of_blocks
from shards.stamps import Stamps
from shards.states import States
from shards.touching import clock_of, is_there

if TYPE_CHECKING:
    from shards.store import Source

__all__ = ["LocalStore"]

logger = logging.getLogger(__name__)


class LocalStore:
    """A store in a directory. Safe to use from several threads and processes at once.

    Args:
        path: the directory; it is made by the first write.

    Attributes:
        path: the same, absolute.
        hashed_blobs: blobs that this object has hashed, for tests and metrics.
        hashed_bytes: their bytes.
        shelf: the small files of the store.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().absolute()
        self.hashed_blobs = 0
        self.hashed_bytes = 0
        self._blobs = self.path / BLOBS / "blake3"
        self._stamps = Stamps(self.path / ".verified")
        self.shelf = DirectoryShelf(self.path)
        self._states = States(self.shelf)

    @property
    def url(self) -> str:
        """The path."""
        return str(self.path)

    def create(self) -> None:
        """Make the directory; readers tell an empty store from an absent one."""
        self.path.mkdir(parents=True, exist_ok=True)

    # --- blobs ---------------------------------------------------------------------------------

    def put(self, data: Bytes | npt.NDArray[np.generic] | Iterable[Bytes]) -> BlobRef:
        """Keep bytes under their digest.

        Args:
            data: a buffer, an array (its bytes in C order), or an iterable of buffers that is
                consumed once and never held whole.

        Returns:
            The reference. A blob that is there already, and is sound, is not written again.
        """
        if isinstance(data, np.ndarray):
            # `view` on a flat contiguous array also works for types that memoryview refuses.
            data = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        if not isinstance(data, bytes | bytearray | memoryview):
            return self._put_stream(data)
        with flat_view(data) as flat:
            ref = BlobRef(digest=digest_of(flat), size=len(flat))
            self._count(ref.size)
            if not self._is_there(ref):
                temporary = self._new_temporary()
                try:
                    write_through(temporary, (flat,), 0o444)
                    self._adopt(temporary, ref)
                finally:
                    temporary.unlink(missing_ok=True)
        return ref

    def _put_stream(self, pieces: Iterable[Bytes]) -> BlobRef:
        hasher = Hasher()

        def hashed() -> Iterable[Bytes]:
            for piece in pieces:
                hasher.update(piece)
                yield piece

        temporary = self._new_temporary()
        try:
            write_through(temporary, hashed(), 0o444)
            ref = BlobRef(digest=hasher.hexdigest(), size=hasher.size)
            self._count(ref.size)
            if not self._is_there(ref):
                self._adopt(temporary, ref)
        finally:
            temporary.unlink(missing_ok=True)
        return ref

    @contextlib.contextmanager
    def draft(self, size: int) -> Iterator[Draft]:
        """A file of this many bytes, all a hole, that may be kept as a sparse blob."""
        temporary = self._new_temporary()
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

        def keep() -> BlobRef:
            os.fchmod(descriptor, 0o444)
            os.fsync(descriptor)
            digest, data = digest_of_blocks(descriptor)
            ref = BlobRef(digest=digest, size=size, data=data)
            self._count(data)
            if not self._is_there(ref):
                self._adopt(temporary, ref)
            return ref

        try:
            os.truncate(descriptor, size)
            yield Draft(descriptor, keep)
        finally:
            os.close(descriptor)
            temporary.unlink(missing_ok=True)

    def bring(self, ref: BlobRef, source: Source, progress: Progress | None = None) -> bool:
        """Copy a blob from another store.

        Returns:
            Whether it had to be copied; one that is there, and is sound, stays.

        Raises:
            ServingError: the other store does not have it, or not with these bytes.
            ResourceExhausted: the disk is full.
        """
        if self._is_there(ref):
            return False
        temporary = self._new_temporary()
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            source.fetch(ref, descriptor, progress)
            os.fchmod(descriptor, 0o444)
            os.fsync(descriptor)
            self._adopt(temporary, ref)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ResourceExhausted(
                    f"the disk of {self.path} is full: blob {ref.digest} has {ref.size} bytes"
                ) from None
            raise Unavailable(f"{self.path} cannot be written: {error.strerror}") from None
        finally:
            os.close(descriptor)
            temporary.unlink(missing_ok=True)
        return True

    def clear(self, grace_s: float) -> int:
        """Remove what saves that died have left half-written.

        Args:
            grace_s: what was written to within it stays: its save may go on.

        Returns:
            Bytes that were given back.
        """
        given_back = 0
        now_s = clock_of(self.shelf)
        for path in self._blobs.glob(f"{TEMPORARY}*"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                if now_s - status.st_mtime >= grace_s:
                    path.unlink()
                    given_back += status.st_size
        return given_back

    def fetch(self, ref: BlobRef, descriptor: int, progress: Progress | None = None) -> None:
        """Write a blob's verified bytes into an empty file; long runs of zeros become holes.

        Raises:
            ServingError: as of `map`.
            OSError: the file cannot be written.
        """
        if ref.data is None:
            copy_sparsely(self.map(ref).data, descriptor, lambda done: _note(progress, ref, done))
            return
        source = self._open(ref)
        try:
            self._verify_open(source, ref)
            copy_data(source, descriptor, lambda done: _note(progress, ref, done))
        finally:
            os.close(source)

    def map(self, ref: BlobRef, progress: Progress | None = None) -> Buffer:
        """A blob as read-only memory.

        It is hashed when this file was never verified before, and not otherwise. The memory
        begins on a page, so every 64-byte-aligned offset is aligned.

        Raises:
            BundleIncomplete: the blob is missing or short.
            BundleCorrupt: the blob does not have its digest.
            Unavailable: the disk or its permissions refuse.
        """
        descriptor = self.open(ref, progress)
        try:
            if ref.size == 0:  # a mapping must not be empty
                empty = np.empty(0, np.uint8)
                empty.flags.writeable = False
                return empty
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                return np.memmap(file, np.uint8, "r", shape=(ref.size,))
        finally:
            os.close(descriptor)

    def open(self, ref: BlobRef, progress: Progress | None = None) -> int:
        """A blob as a descriptor to read from; verified, and refused, as `map` does."""
        if progress is not None:
            progress.check()
        descriptor = self._open(ref)
        try:
            self._verify_open(descriptor, ref)
        except BaseException:
            os.close(descriptor)
            raise
        _note(progress, ref, ref.size)
        return descriptor

    def _blob(self, ref: BlobRef) -> Path:
        return self._blobs / ref.digest

    def _open(self, ref: BlobRef) -> int:
        try:
            # A pipe in its place, in a store that somebody else has filled, must not hold us up.
            return os.open(self._blob(ref), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise BundleIncomplete(f"blob {ref.digest} is missing from {self.path}") from None
        except OSError as error:
            raise Unavailable(f"{self._blob(ref)} cannot be read: {error.strerror}") from None

    def _new_temporary(self) -> Path:
        self._blobs.mkdir(parents=True, exist_ok=True)
        return temporary_beside(self._blobs / "blob")

    def _count(self, size: int) -> None:
        self.hashed_blobs += 1
        self.hashed_bytes += size

    def _adopt(self, temporary: Path, ref: BlobRef) -> None:
        """Name a file whose bytes we have just hashed ourselves; heals a broken namesake."""
        os.replace(temporary, self._blob(ref))
        sync_directory(self._blobs)
        self._stamps.remember(ref.digest, os.stat(self._blob(ref)))

    def _is_there(self, ref: BlobRef) -> bool:
        """Whether the blob needs not be written, and will not be swept away meanwhile."""
        return is_there(self.shelf, ref.digest, lambda: self._is_sound(ref))

    def _is_sound(self, ref: BlobRef) -> bool:
        try:
            self.map(ref)
        except (BundleIncomplete, BundleCorrupt) as error:
            if self._blob(ref).exists():
                logger.warning("%s: writing it anew", error)
            return False
        return True

    def _check_size(self, status: os.stat_result, ref: BlobRef) -> None:
        if not stat.S_ISREG(status.st_mode):
            raise BundleCorrupt(f"blob {ref.digest} in {self.path} is not a file")
        if status.st_size < ref.size:
            raise BundleIncomplete(
                f"blob {ref.digest} in {self.path} is short: {status.st_size} of {ref.size} bytes"
            )
        if status.st_size > ref.size:
            raise BundleCorrupt(
                f"blob {ref.digest} in {self.path} has {status.st_size} bytes, not {ref.size}"
            )

    def _verify_open(self, descriptor: int, ref: BlobRef, *, again: bool = False) -> None:
        status = os.fstat(descriptor)
        self._check_size(status, ref)
        if not again and self._stamps.fits(ref.digest, status):
            return
        found: tuple[str, int | None]
        if ref.data is None:
            found = digest_of_file(descriptor), None
        else:
            found = digest_of_blocks(descriptor)
        self._count(ref.stored)
        if found != (ref.digest, ref.data):
            raise BundleCorrupt(f"blob {ref.digest} in {self.path} has digest {found[0]}: corrupt")
        self._stamps.remember(ref.digest, status)

    # --- servables -----------------------------------------------------------------------------

    def servables(self) -> tuple[str, ...]:
        """Names with at least one version, in order.

        Raises:
            Unavailable: the store itself is not there, which is not the same as being empty.
        """
        try:
            entries = sorted(os.listdir(self.path))
        except OSError as error:
            raise Unavailable(f"the store {self.path} cannot be read: {error.strerror}") from None
        return tuple(name for name in entries if is_name(name) and self.versions(name))

    def versions(self, name: str) -> tuple[int, ...]:
        """Versions of a servable that have a manifest, ascending; none of an unknown servable.

        A version's directory is its number; leading zeros are allowed. Other directories, and
        those without a manifest, are not versions.

        Raises:
            Unavailable: the store itself is not there.
        """
        return tuple(
            sorted(
                version
                for version, directory in self._directories(name).items()
                if (directory / MANIFEST).is_file()
            )
        )

    def _directories(self, name: str) -> dict[int, Path]:
        """Directories that are named as versions; a plain number wins over leading zeros."""
        directory = self.path / check_name(name)
        try:
            entries = sorted(os.listdir(directory), key=len, reverse=True)
        except (FileNotFoundError, NotADirectoryError):
            if not self.path.is_dir():
                raise Unavailable(f"the store {self.path} is not there") from None
            return {}
        except OSError as error:
            raise Unavailable(f"{directory} cannot be read: {error.strerror}") from None
        return {
            version: directory / entry
            for entry in entries
            if (version := version_of(entry)) is not None and (directory / entry).is_dir()
        }

    def read_manifest(self, name: str, version: int) -> Manifest:
        """The manifest of a version.

        Name and version are those of the directory, whatever is written inside: a directory may
        be copied or renamed.

        Raises:
            BundleNotFound: no such servable or version.
            BundleIncomplete: the version's directory has no manifest.
            BundleForeign: not ours, or too new.
            BundleCorrupt: broken.
        """
        where = f"{name}/{version}"
        directory = self._directories(name).get(version)
        if directory is None:
            have = ", ".join(map(str, self.versions(name))) or "none"
            raise BundleNotFound(f"{self.path} has no {where}; versions of {name!r}: {have}")
        path = directory / MANIFEST
        try:
            data = path.read_bytes() if path.is_file() else None
        except OSError as error:
            raise Unavailable(f"{where} in {self.path} cannot be read: {error.strerror}") from None
        if data is None:
            raise BundleIncomplete(f"{where} in {self.path} has no {MANIFEST}: it is half-written")
        manifest = decode_manifest(data, where)
        if (manifest.name, manifest.version) == (name, version):
            return manifest
        return msgspec.structs.replace(manifest, name=name, version=version)

    def write_manifest(self, manifest: Manifest, *, overwrite: bool = False) -> None:
        """Make a version exist: the last step of a save.

        Raises:
            FailedPrecondition: the version exists, and `overwrite` is false.
            InvalidArgument: the name or version may not be used.
        """
        if manifest.version < 1:
            raise InvalidArgument(f"version {manifest.version} is not a positive integer")
        check_name(manifest.name)
        self.create()
        directory = self._directories(manifest.name).get(
            manifest.version, self.path / manifest.name / str(manifest.version)
        )
        try:
            write_atomically(
                directory / MANIFEST, (encode_manifest(manifest),), exclusive=not overwrite
            )
        except FileExistsError:
            raise FailedPrecondition(
                f"{manifest.name}/{manifest.version} exists in {self.path}: save another version, "
                f"or say overwrite=True"
            ) from None
        sync_directory(directory.parent)
        sync_directory(self.path)

    def check(self, name: str, version: int) -> Manifest:
        """The manifest, once every blob was seen to be there in full size. Reads no blob.

        Raises:
            BundleIncomplete: says which blob is missing or short.
            BundleCorrupt: a blob is too long.
        """
        manifest = self.read_manifest(name, version)
        for ref in blobs_of(manifest).values():
            try:
                status = os.stat(self._blob(ref))
            except FileNotFoundError:
                raise BundleIncomplete(
                    f"{name}/{version}: blob {ref.digest} is missing from {self.path}"
                ) from None
            except OSError as error:
                raise Unavailable(f"{self._blob(ref)} cannot be read: {error.strerror}") from None
            self._check_size(status, ref)
        return manifest

    def verify(self, name: str, version: int) -> Manifest:
        """The manifest, once every blob was read and found to have its digest.

        Hashes again what was verified before: this finds bytes that decayed on the disk.

        Raises:
            BundleIncomplete: says which blob is missing or short.
            BundleCorrupt: says which blob does not have its digest.
        """
        manifest = self.check(name, version)
        for ref in blobs_of(manifest).values():
            descriptor = self._open(ref)
            try:
                self._verify_open(descriptor, ref, again=True)
            except BundleCorrupt:
                self._stamps.forget(ref.digest)
                raise
            finally:
                os.close(descriptor)
        return manifest

    # --- a controller's state ------------------------------------------------------------------

    def put_state(self, cluster: str, term: int, seq: int, data: bytes) -> None:
        """Keep a controller's state durably; see `shards.states.States.put`."""
        self._states.put(check_name(cluster), term, seq, data)

    def latest_state(self, cluster: str) -> tuple[int, int, bytes] | None:
        """The state of the highest (term, seq), or None; see `shards.states.States.latest`."""
        return self._states.latest(check_name(cluster))

    def next_term(self, cluster: str) -> int:
        """Claim a term that nobody had; see `shards.states.States.next_term`."""
        return self._states.next_term(check_name(cluster))


def _note(progress: Progress | None, ref: BlobRef, done: int) -> None:
    if progress is not None:
        progress.note(ref.digest, done)
