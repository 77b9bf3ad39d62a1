"""Warm-up requests of a bundle: written into it, added to it, read back to be replayed.

Decides whether recorded requests are such that a version could answer them, so that a file that
cannot be replayed is refused where it is written. Does not know who replays them
(`cluster.rehearsing`), nor how a file looks inside (`shards.recorded`).
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

import msgspec

from batching.errors import InvalidArgument
from shards.converting import rows_of
from shards.errors import BundleCorrupt, SpecMismatch
from shards.manifest import SCHEMA, BlobRef, Manifest, Warmups
from shards.recorded import Recorded, encode_requests, read_requests
from shards.specs import check
from shards.store import Source, Store

__all__ = ["add_warmups", "check_requests", "put_warmups", "read_warmups"]


def put_warmups(
    store: Store, requests: Sequence[Recorded], where: str, kept: Sequence[Recorded] = ()
) -> Warmups | None:
    """Write a file of warm-up requests; None where there are none.

    Args:
        store: that takes it.
        requests: in the order in which they are to be replayed.
        where: how error messages name the bundle.
        kept: requests that come before these.

    Raises:
        InvalidArgument: there are more requests, or bytes, than a file may have.
    """
    together = [*kept, *requests]
    if not together:
        return None
    blob = store.put(encode_requests(together, where))
    return Warmups(requests=len(together), blob=blob)


def read_warmups(source: Source, manifest: Manifest) -> list[Recorded]:
    """The warm-up requests of a version, each of which fits its signature.

    Raises:
        BundleCorrupt: the file is broken, or has other requests than the manifest says.
        BundleForeign: the file is of a newer schema.
        ServingError: it is missing, or the store does not answer.
    """
    warmups = manifest.warmups
    if warmups is None:
        return []
    where = f"warm-up requests of {manifest.name}/{manifest.version}"
    requests = read_requests(_fetched(source, warmups.blob), where)
    if len(requests) != warmups.requests:
        raise BundleCorrupt(f"{where}: {len(requests)}, the manifest says {warmups.requests}")
    try:
        check_requests(manifest, requests, where)
    except InvalidArgument as error:
        raise BundleCorrupt(error.message) from None
    return requests


def check_requests(manifest: Manifest, requests: Sequence[Recorded], where: str) -> None:
    """Hold requests against the signatures of a version.

    Raises:
        InvalidArgument: one is for no signature of the version, or does not fit it; says which.
    """
    for number, request in enumerate(requests, start=1):
        signature = manifest.signatures.get(request.signature)
        if signature is None:
            raise InvalidArgument(
                f"{where}: request {number} is for signature {request.signature!r}, which "
                f"{manifest.name}/{manifest.version} does not have"
            )
        try:
            rows = rows_of(signature.inputs, check(signature.inputs, request.inputs))
        except SpecMismatch as error:
            text = f"{where}: request {number} ({request.signature}): {error.message}"
            raise InvalidArgument(text) from None
        if rows < 1:
            raise InvalidArgument(f"{where}: request {number} ({request.signature}) has no rows")


def add_warmups(
    store: Store, name: str, version: int, requests: Sequence[Recorded], *, replace: bool = False
) -> Manifest:
    """Give a version that exists warm-up requests. Who serves it replays them at its next load.

    Args:
        store: that has it.
        name: of the servable.
        version: of the servable.
        requests: come after those that it has.
        replace: instead of those that it has.

    Returns:
        The manifest that was written.

    Raises:
        InvalidArgument: a request does not fit the version, or there are too many.
        ServingError: there is no such version, or the store does not answer.
    """
    manifest = store.read_manifest(name, version)
    where = f"warm-up requests for {name}/{version}"
    check_requests(manifest, requests, where)
    kept = [] if replace else read_warmups(store, manifest)
    warmups = put_warmups(store, requests, where, kept)
    changed = msgspec.structs.replace(manifest, schema=SCHEMA, warmups=warmups)
    store.write_manifest(changed, overwrite=True)
    return changed


def _fetched(source: Source, ref: BlobRef) -> memoryview:
    """A blob's verified bytes, in memory of our own: a bucket's need no place on the disk."""
    if not ref.size:
        return memoryview(b"")
    descriptor = os.memfd_create("warmups", os.MFD_CLOEXEC)
    try:
        source.fetch(ref, descriptor)
        return memoryview(mmap.mmap(descriptor, ref.size, prot=mmap.PROT_READ))
    finally:
        os.close(descriptor)
