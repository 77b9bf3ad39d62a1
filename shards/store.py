"""Stores: where bundles and blobs are kept, whatever keeps them.

Decides which kind of store a name means: a path or ``file://`` is a directory (`shards.local`), a
URL a prefix in a bucket (`shards.remote`). What is where in either is in `shards.layout`. Does not
know JAX, nor what blobs mean.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt

from batching.errors import FailedPrecondition, InvalidArgument
from shards.drafts import Draft
from shards.errors import BundleNotFound
from shards.files import Bytes
from shards.layout import Buffer, check_name
from shards.local import LocalStore
from shards.locations import is_url, parse_location
from shards.manifest import BlobRef, Manifest
from shards.progress import Progress
from shards.shelves import Shelf

if TYPE_CHECKING:
    from shards.cache import NodeCache

__all__ = [
    "Buffer",
    "LocalStore",
    "Source",
    "Store",
    "check_name",
    "new_version",
    "open_store",
    "read",
]


class Source(Protocol):
    """What may be read from a store, or from an archive.

    One that does not answer raises `Unavailable`, and is never taken for an empty one.
    """

    @property
    def url(self) -> str:
        """How people name it. Holds no secret."""

    def fetch(self, ref: BlobRef, descriptor: int, progress: Progress | None = None) -> None:
        """Write a blob's verified bytes into an empty file."""

    def map(self, ref: BlobRef, progress: Progress | None = None) -> Buffer:
        """A blob as read-only memory whose bytes were verified."""

    def servables(self) -> tuple[str, ...]:
        """Names that have at least one version."""

    def versions(self, name: str) -> tuple[int, ...]:
        """Versions that have a manifest, ascending."""

    def read_manifest(self, name: str, version: int) -> Manifest:
        """The manifest of a version."""


class Store(Source, Protocol):
    """What the rest of the system asks of a store; `LocalStore` says what each promises.

    `open_store` takes its `url` to open it again.
    """

    @property
    def shelf(self) -> Shelf:
        """The small files of the store."""

    def open(self, ref: BlobRef, progress: Progress | None = None) -> int:
        """A blob as a descriptor to read from, whose bytes were verified; the caller closes it."""

    def create(self) -> None:
        """Make the store exist; one that exists stays as it is."""

    def put(self, data: Bytes | npt.NDArray[np.generic] | Iterable[Bytes]) -> BlobRef:
        """Keep bytes; the same bytes are kept once."""

    def draft(self, size: int) -> AbstractContextManager[Draft]:
        """A file that may become a sparse blob; refused where files have no holes."""

    def bring(self, ref: BlobRef, source: Source, progress: Progress | None = None) -> bool:
        """Copy a blob from another store; False where it was here already."""

    def write_manifest(self, manifest: Manifest, *, overwrite: bool = False) -> None:
        """Make a version exist."""

    def check(self, name: str, version: int) -> Manifest:
        """The manifest, once every blob was seen to be there in full size."""

    def verify(self, name: str, version: int) -> Manifest:
        """The manifest, once every blob was read and has its digest."""

    def put_state(self, cluster: str, term: int, seq: int, data: bytes) -> None:
        """Keep a controller's state."""

    def latest_state(self, cluster: str) -> tuple[int, int, bytes] | None:
        """The state of the highest (term, seq)."""

    def next_term(self, cluster: str) -> int:
        """A term that nobody had."""


def open_store(store: str | Path | Store, cache: NodeCache | None = None) -> Store:
    """The store that a name means; a store is returned as it is. Connects to nothing.

    Args:
        store: a path, ``file:///path``, ``s3://bucket/prefix?region=...`` or ``gs://...``.
        cache: where blobs of a bucket are kept on this node; the user's own if there is none.

    Raises:
        Unimplemented: a kind of store that this version does not know.
        InvalidArgument: a URL that says something else than where the store is.
    """
    if isinstance(store, Path):
        return LocalStore(store)
    if not isinstance(store, str):
        return store
    if not is_url(store):
        return LocalStore(store)
    scheme, _, rest = store.partition("://")
    if scheme == "file":
        return LocalStore(unquote(rest))
    # Its client library takes a while to load, and most stores are directories.
    from shards.remote import open_remote

    return open_remote(parse_location(store), cache)


def read(store: str | Path | Store, name: str, version: int | None = None) -> Manifest:
    """The manifest of a servable's version.

    Args:
        store: the store or its path.
        name: the servable.
        version: None for the highest.

    Raises:
        BundleNotFound: no such servable or version.
        BundleIncomplete: the version has no manifest.
        BundleForeign: its manifest is not ours or too new.
        BundleCorrupt: its manifest is broken.
    """
    opened = open_store(store)
    if version is None:
        versions = opened.versions(name)
        if not versions:
            raise BundleNotFound(f"{opened.url} has no servable {name!r}")
        version = versions[-1]
    return opened.read_manifest(name, version)


def new_version(store: Store, name: str, version: int | None, *, overwrite: bool) -> int:
    """The number of a version that is to be written; None for one more than the highest.

    Raises:
        InvalidArgument: it may not be used.
        FailedPrecondition: the version exists, and `overwrite` is false.
    """
    existing = store.versions(name)
    if version is None:
        version = max(existing, default=0) + 1
    if version < 1:
        raise InvalidArgument(f"version {version} is not a positive integer")
    if version in existing and not overwrite:
        # Said again, and then for certain, when the manifest is written: but an export may
        # take hours, and most who ask for a version that exists should be told before.
        raise FailedPrecondition(
            f"{name}/{version} exists in {store.url}: save another version, or say overwrite=True"
        )
    return version
