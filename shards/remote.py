"""A store in a bucket: the same files as in a directory, reached through `pyarrow.fs`.

Manifests are written last. Nothing is renamed, which object stores cannot do; blobs are named by
what they hold, so one that is there with its size needs not be written again. Blobs are read
through the node's cache (`shards.cache`), verified while they come. A bucket that does not answer
raises `Unavailable` within a bounded time. Does not know JAX, nor what blobs mean.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from batching.errors import FailedPrecondition, InvalidArgument
from shards.cache import NodeCache
from shards.checking import blobs_of, decode_manifest, encode_manifest
from shards.drafts import Draft, refuse_sparse
from shards.errors import BundleCorrupt, BundleIncomplete, BundleNotFound
from shards.files import Bytes, Hasher, digest_of, flat_view
from shards.ingest import STREAMS, Gate
from shards.ingest import fetch as fetch_ranges
from shards.layout import (
    MANIFEST,
    Buffer,
    blob_path,
    check_name,
    is_name,
    manifest_path,
    version_of,
)
from shards.locations import Location
from shards.manifest import BlobRef, Manifest
from shards.objects import Objects, Reading, connect
from shards.progress import Progress
from shards.shelves import Shelf
from shards.states import States
from shards.store import Source
from shards.touching import is_there

__all__ = ["RemoteStore", "open_remote", "user_cache_directory"]

_MANIFEST_BYTES_MAX: Final = 256 << 20
#: A range that has not come by then is given up: 8 MiB at 280 KiB/s.
_RANGE_S: Final = 30.0


def open_remote(location: Location, cache: NodeCache | None = None) -> RemoteStore:
    """The store at a location; connects to nothing yet."""
    objects = Objects(location.url, connect(location), location.root)
    return RemoteStore(objects, cache or NodeCache(user_cache_directory() / "blobs"))


def user_cache_directory() -> Path:
    """Where this user's caches of this software are."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "shardserve"


class RemoteStore:
    """A store in a bucket. Safe to use from several threads and processes at once.

    Args:
        objects: of the bucket, under the store's prefix.
        cache: keeps blobs on this node.
    """

    def __init__(self, objects: Objects, cache: NodeCache) -> None:
        self._objects = objects
        self._cache = cache
        self._states = States(objects)
        self._gate = Gate(2 * STREAMS)

    @property
    def url(self) -> str:
        """The URL; holds no secret."""
        return self._objects.url

    @property
    def shelf(self) -> Shelf:
        """The small files of the store."""
        return self._objects

    def create(self) -> None:
        """See that the bucket is there; its owner makes it.

        Raises:
            Unavailable: it is not, or does not answer.
        """
        self._objects.create()

    # --- blobs -----------------------------------------------------------------------------------

    def put(self, data: Bytes | npt.NDArray[np.generic] | Iterable[Bytes]) -> BlobRef:
        """Keep bytes under their digest.

        Args:
            data: a buffer, an array, or an iterable of buffers; the last goes through a temporary
                file, since an object cannot be renamed once its digest is known.

        Raises:
            Unavailable: the bucket does not answer.
        """
        if isinstance(data, np.ndarray):
            data = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        if isinstance(data, bytes | bytearray | memoryview):
            with flat_view(data) as flat:
                ref = BlobRef(digest=digest_of(flat), size=len(flat))
                self._keep(ref, flat)
            return ref
        hasher = Hasher()
        with tempfile.TemporaryFile() as file:
            for piece in data:
                hasher.update(piece)
                with flat_view(piece) as flat:
                    file.write(flat)
            file.flush()
            ref = BlobRef(digest=hasher.hexdigest(), size=hasher.size)
            self._keep(ref, _mapped(file.fileno(), ref.size))
        return ref

    def draft(self, size: int) -> AbstractContextManager[Draft]:
        """Refused: what was never written would be uploaded as zeros.

        Raises:
            FailedPrecondition: always.
        """
        raise FailedPrecondition(
            f"{self.url} cannot keep a sparse blob of {size} bytes: save it to a directory"
        )

    def bring(self, ref: BlobRef, source: Source, progress: Progress | None = None) -> bool:
        """Copy a blob from another store.

        Returns:
            Whether it had to be copied; one that is there in full size stays.

        Raises:
            ServingError: the other store does not have it, or not with these bytes; or this one
                does not answer.
        """
        refuse_sparse(ref, self.url)
        if self._is_there(ref):
            return False
        self._write(ref, source.map(ref).data, progress)
        return True

    def fetch(self, ref: BlobRef, descriptor: int, progress: Progress | None = None) -> None:
        """Write a blob's verified bytes into an empty file.

        Raises:
            BundleIncomplete: the blob is missing or short.
            BundleCorrupt: it does not have its digest.
            Unavailable: the bucket does not answer, or too slowly.
            OSError: the file cannot be written.
        """
        self._fetch(ref, descriptor, progress)

    def map(self, ref: BlobRef, progress: Progress | None = None) -> Buffer:
        """A blob as read-only memory, from the node's cache.

        Raises:
            BundleIncomplete: the blob is missing or short.
            BundleCorrupt: it does not have its digest.
            CacheFull: there is no room for it on this node.
            Unavailable: the bucket does not answer, or too slowly.
        """
        return self._cache.map(ref, lambda file: self._fetch(ref, file, progress), progress)

    def open(self, ref: BlobRef, progress: Progress | None = None) -> int:
        """A blob as a descriptor to read from, in the node's cache; refused as `map` does."""
        return self._cache.open(ref, lambda file: self._fetch(ref, file, progress), progress)

    def _fetch(self, ref: BlobRef, descriptor: int | None, progress: Progress | None) -> None:
        refuse_sparse(ref, self.url)
        fetch_ranges(
            self._open(ref),
            ref,
            descriptor,
            gate=self._gate,
            timeout_s=_RANGE_S,
            progress=progress,
        )

    def _open(self, ref: BlobRef) -> Reading:
        try:
            return self._objects.open(blob_path(ref))
        except FileNotFoundError:
            raise BundleIncomplete(f"blob {ref.digest} is missing from {self.url}") from None

    def _keep(self, ref: BlobRef, data: Bytes) -> None:
        if not self._is_there(ref):
            self._write(ref, data, None)

    def _write(self, ref: BlobRef, data: Bytes, progress: Progress | None) -> None:
        def wrote(done: int) -> None:
            if progress is not None:
                progress.note(ref.digest, done)

        self._objects.write(blob_path(ref), data, wrote)

    def _is_there(self, ref: BlobRef) -> bool:
        """Whether the blob needs not be written, and will not be swept away meanwhile."""

        def look() -> bool:
            found = self._objects.stat(blob_path(ref))
            return found is not None and found.size == ref.size

        return is_there(self._objects, ref.digest, look)

    # --- servables -------------------------------------------------------------------------------

    def servables(self) -> tuple[str, ...]:
        """Names with at least one version, in order.

        Raises:
            Unavailable: the bucket does not answer, or is not there.
        """
        _, folders = self._objects.list("", recursive=False)
        return tuple(name for name in folders if is_name(name) and self.versions(name))

    def versions(self, name: str) -> tuple[int, ...]:
        """Versions of a servable that have a manifest, ascending; none of an unknown servable.

        Raises:
            Unavailable: the bucket does not answer, or is not there.
        """
        return tuple(sorted(self._manifests(name)))

    def _manifests(self, name: str) -> dict[int, str]:
        """Paths of manifests by version; a plain number wins over leading zeros."""
        found, _ = self._objects.list(check_name(name))
        parts = [(each.path, each.path.split("/")) for each in found]
        return {
            version: path
            for path, (_, folder, file) in sorted(
                ((path, part) for path, part in parts if len(part) == 3),
                key=lambda each: len(each[1][1]),
                reverse=True,
            )
            if file == MANIFEST and (version := version_of(folder)) is not None
        }

    def read_manifest(self, name: str, version: int) -> Manifest:
        """The manifest of a version; name and version are those of its path.

        Raises:
            BundleNotFound: no such servable or version.
            BundleForeign: not ours, or too new.
            BundleCorrupt: broken.
            Unavailable: the bucket does not answer.
        """
        where = f"{check_name(name)}/{version}"
        try:
            data = self._read_manifest(name, version)
        except FileNotFoundError:
            have = ", ".join(map(str, self.versions(name))) or "none"
            raise BundleNotFound(
                f"{self.url} has no {where}; versions of {name!r}: {have}"
            ) from None
        except InvalidArgument as error:
            raise BundleCorrupt(f"{where}: {error}") from None
        manifest = decode_manifest(data, where)
        if (manifest.name, manifest.version) == (name, version):
            return manifest
        return msgspec.structs.replace(manifest, name=name, version=version)

    def _read_manifest(self, name: str, version: int) -> bytes:
        try:
            return self._objects.read(manifest_path(name, version), _MANIFEST_BYTES_MAX)
        except FileNotFoundError:
            path = self._manifests(name).get(version)
            if path is None:
                raise
            return self._objects.read(path, _MANIFEST_BYTES_MAX)

    def write_manifest(self, manifest: Manifest, *, overwrite: bool = False) -> None:
        """Make a version exist: the last step of a save.

        Raises:
            FailedPrecondition: the version exists, or somebody else writes it at this moment, and
                `overwrite` is false.
            InvalidArgument: the name or version may not be used.
            Unavailable: the bucket does not answer; the version may exist or not.
        """
        if manifest.version < 1:
            raise InvalidArgument(f"version {manifest.version} is not a positive integer")
        name, version = check_name(manifest.name), manifest.version
        path = self._manifests(name).get(version)
        if overwrite:
            self._objects.write(path or manifest_path(name, version), encode_manifest(manifest))
            return
        try:
            if path is not None:
                raise FileExistsError(path)
            self._objects.create_exclusively(
                manifest_path(name, version), encode_manifest(manifest)
            )
        except FileExistsError:
            raise FailedPrecondition(
                f"{name}/{version} exists in {self.url}: save another version, or say "
                f"overwrite=True"
            ) from None

    def check(self, name: str, version: int) -> Manifest:
        """The manifest, once every blob was seen to be there in full size. Reads no blob.

        Raises:
            BundleIncomplete: says which blob is missing or short.
            BundleCorrupt: a blob is too long.
        """
        manifest = self.read_manifest(name, version)
        for ref in blobs_of(manifest).values():
            found = self._objects.stat(blob_path(ref))
            if found is None or found.size != ref.size:
                size = 0 if found is None else found.size
                kind = BundleCorrupt if size > ref.size else BundleIncomplete
                raise kind(
                    f"{name}/{version}: blob {ref.digest} in {self.url} has {size} of {ref.size} "
                    f"bytes"
                )
        return manifest

    def verify(self, name: str, version: int) -> Manifest:
        """The manifest, once every blob was read from the bucket and found to have its digest.

        Raises:
            BundleIncomplete: says which blob is missing or short.
            BundleCorrupt: says which blob does not have its digest.
        """
        manifest = self.read_manifest(name, version)
        for ref in blobs_of(manifest).values():
            self._fetch(ref, None, None)
        return manifest

    # --- a controller's state --------------------------------------------------------------------

    def put_state(self, cluster: str, term: int, seq: int, data: bytes) -> None:
        """Keep a controller's state durably; see `shards.states.States.put`."""
        self._states.put(check_name(cluster), term, seq, data)

    def latest_state(self, cluster: str) -> tuple[int, int, bytes] | None:
        """The state of the highest (term, seq), or None; see `shards.states.States.latest`."""
        return self._states.latest(check_name(cluster))

    def next_term(self, cluster: str) -> int:
        """Claim a term that nobody had; see `shards.states.States.next_term`."""
        return self._states.next_term(check_name(cluster))


def _mapped(descriptor: int, size: int) -> Bytes:
    if not size:
        return b""
    with os.fdopen(os.dup(descriptor), "rb") as file:
        return np.memmap(file, np.uint8, "r", shape=(size,)).data
