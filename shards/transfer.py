"""Bundles from store to store: only what is missing, blobs first, the manifest last.

Whatever ends a transfer in the middle leaves blobs and no manifest, so that the version does not
exist there yet; the next attempt goes on from the blobs that have arrived. Every blob is verified
on its way. Does not know what kinds of stores there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from batching.errors import FailedPrecondition, InvalidArgument
from shards.archive import ArchiveStore, pack_archive
from shards.checking import blobs_of
from shards.errors import BundleCorrupt, BundleNotFound
from shards.local import LocalStore
from shards.locations import is_url
from shards.manifest import BlobRef, Manifest
from shards.progress import Progress
from shards.store import Source, Store, open_store

__all__ = ["ARCHIVE", "Transferred", "open_source", "pack", "transfer", "versions_named"]

#: How the name of an archive ends.
ARCHIVE: Final = ".tar"

_BLOBS_AT_ONCE: Final = 4


@dataclass(frozen=True, slots=True)
class Transferred:
    """What a transfer did.

    Attributes:
        versions: that the target has now.
        blobs: that were copied.
        bytes: of them.
        there: blobs that were there already.
    """

    versions: tuple[tuple[str, int], ...]
    blobs: int = 0
    bytes: int = 0
    there: int = 0


def open_source(name: str) -> Source:
    """The store, or the archive, that a name means."""
    if name.endswith(ARCHIVE) and not is_url(name):
        return ArchiveStore(name)
    return open_store(name)


def versions_named(source: Source, names: Sequence[str]) -> tuple[tuple[str, int], ...]:
    """The versions that a person means.

    Args:
        source: the store.
        names: ``NAME`` for the newest version, ``NAME:VERSION``, ``NAME:*`` for all of its
            versions; nothing for everything there is.

    Raises:
        InvalidArgument: not a name and a version.
        BundleNotFound: there is no such servable or version.
    """
    if not names:
        return tuple((name, v) for name in source.servables() for v in source.versions(name))
    return tuple(
        dict.fromkeys(version for each in names for version in _versions_named(source, each))
    )


def _versions_named(source: Source, text: str) -> list[tuple[str, int]]:
    name, colon, number = text.partition(":")
    if colon and number != "*" and not (number.isascii() and number.isdigit()):
        raise InvalidArgument(f"{text!r} is not NAME, NAME:VERSION or NAME:*")
    there = source.versions(name)
    if not there or (number.isdigit() and int(number) not in there):
        have = ", ".join(map(str, there)) or "none"
        raise BundleNotFound(f"{source.url} has no {text}; versions of {name!r}: {have}")
    if not colon:
        return [(name, there[-1])]
    return [(name, version) for version in (there if number == "*" else [int(number)])]


def pack(
    source: Source, versions: Sequence[tuple[str, int]], out: str | Path, progress: Progress
) -> Transferred:
    """Put versions into one archive, or into one directory that is a store by itself.

    Args:
        source: the store.
        versions: names and versions.
        out: a path that ends in ``.tar`` is an archive, any other a directory.
        progress: told of the bytes that arrive.

    Raises:
        FailedPrecondition: the archive is there already.
        ServingError: a bundle's own trouble.
    """
    path = Path(out)
    if path.suffix != ARCHIVE:
        return transfer(source, LocalStore(path), versions, progress)
    if path.exists():
        raise FailedPrecondition(f"{path} is there already: remove it, or name another file")
    pack_archive(source, versions, path, progress)
    blobs = {ref for each in versions for ref in blobs_of(source.read_manifest(*each)).values()}
    return Transferred(tuple(versions), len(blobs), sum(ref.size for ref in blobs))


def transfer(
    source: Source,
    target: Store,
    versions: Sequence[tuple[str, int]],
    progress: Progress,
    *,
    overwrite: bool = False,
) -> Transferred:
    """Copy versions from one store to another.

    Args:
        source: where they are.
        target: where they shall be.
        versions: names and versions.
        progress: told of the bytes that arrive; cancelling it ends the transfer.
        overwrite: replace versions of the target that are other bundles.

    Raises:
        FailedPrecondition: the target has another bundle of that name and version; nothing was
            copied.
        ServingError: a bundle's own trouble, or a store does not answer; what has arrived stays.
    """
    target.create()
    manifests = [source.read_manifest(*version) for version in versions]
    missing = [each for each in manifests if not _is_there(target, each, overwrite=overwrite)]
    # Also of versions that are there: a blob may have been lost, and this brings it back.
    refs = {ref.digest: ref for manifest in manifests for ref in blobs_of(manifest).values()}
    progress.total = sum(ref.size for ref in refs.values())

    def bring(ref: BlobRef) -> bool:
        brought = target.bring(ref, source, progress)
        progress.note(ref.digest, ref.size)
        return brought

    with ThreadPoolExecutor(_BLOBS_AT_ONCE, thread_name_prefix="transfer") as pool:
        try:
            brought = dict(zip(refs, pool.map(bring, refs.values()), strict=True))
        except BaseException:
            progress.cancel("the transfer has ended")
            pool.shutdown(cancel_futures=True)
            raise
    for manifest in missing:
        target.write_manifest(manifest, overwrite=overwrite)
    for manifest in manifests:
        target.check(manifest.name, manifest.version)
    return Transferred(
        tuple(versions),
        sum(brought.values()),
        sum(refs[digest].size for digest, is_new in brought.items() if is_new),
        len(refs) - sum(brought.values()),
    )


def _is_there(target: Store, manifest: Manifest, *, overwrite: bool) -> bool:
    try:
        found = target.read_manifest(manifest.name, manifest.version)
    except BundleNotFound:
        return False
    except (FailedPrecondition, BundleCorrupt):  # half-written or broken: there is nothing to keep
        if overwrite:
            return False
        raise
    if found == manifest or msgspec.structs.replace(found, created=manifest.created) == manifest:
        return True
    if overwrite:
        return False
    raise FailedPrecondition(
        f"{manifest.name}/{manifest.version} in {target.url} is another bundle: give this one "
        "another version, or say --overwrite"
    )
