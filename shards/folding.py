"""Compaction ahead of time: what is served keeps its overlays, what is saved next needs them not.

    blobs/folded/<partition>     which blob holds the rows of a partition with its overlays

A *fold* is a new base for a partition: its rows with the overlays written over them, one blob. It
belongs to the content, not to a version: to a base and the overlays upon it. No manifest is
changed, so what serves keeps its identity, and nobody loads anything anew. The next delta that
changes rows of such a partition (`shards.delta`) begins its chain at the fold instead.

Everything here can be ended at any step. A blob without its record is swept like any that nobody
refers to; a record without its blob means nothing. ``gc`` keeps a fold for as long as a version has
the partition that it was made of. Decides which partitions are folded and which fold a delta may
build upon. Does not know who asks for it, nor when.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

import msgspec
import numpy as np

from batching.errors import InvalidArgument
from shards.errors import BundleCorrupt, BundleIncomplete
from shards.identity import table_identity
from shards.manifest import BlobRef, Manifest, Partition, TableUnit
from shards.overlays import read_overlay, rows_of_partition
from shards.progress import Progress
from shards.shelves import Shelf
from shards.sparse import write_rows
from shards.store import Store

__all__ = ["FOLDED", "Fold", "Folds", "fold", "folded", "longest_chain", "put_folded"]

logger = logging.getLogger(__name__)

FOLDED: Final = "blobs/folded"
_RECORD_BYTES_MAX: Final = 64 << 10


class Fold(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A partition's base with overlays written over it.

    Attributes:
        base: digest of the base that it was made of.
        overlays: digests of the overlays, of which the later win.
        blob: every row of the partition.
    """

    base: str
    overlays: tuple[str, ...]
    blob: BlobRef

    @property
    def sources(self) -> frozenset[str]:
        """What it was made of."""
        return frozenset((self.base, *self.overlays))


def longest_chain(manifest: Manifest) -> int:
    """The most overlays that any partition of a version has."""
    return max((len(part.overlays) for _, _, part in _partitions(manifest)), default=0)


def fold(
    store: Store, manifest: Manifest, overlays_min: int = 1, progress: Progress | None = None
) -> int:
    """Write the partitions with so many overlays anew, without them, for deltas to come.

    Args:
        store: has the version.
        manifest: of it; it stays as it is.
        overlays_min: partitions with fewer are left alone.
        progress: told of every piece, and asked whether to go on.

    Returns:
        How many partitions were written; those that had been before are not.

    Raises:
        InvalidArgument: `overlays_min` is less than 1.
        Cancelled: `progress` says so.
        ServingError: a blob is missing or corrupt, or the store does not answer.
    """
    if overlays_min < 1:
        raise InvalidArgument(f"at least {overlays_min} overlays is every partition: say 1 or more")
    folds = Folds(store)
    todo = [
        (unit, index, part)
        for unit, index, part in _partitions(manifest)
        if len(part.overlays) >= overlays_min and folds.base_of(unit, part).overlays
    ]
    if progress is not None:
        progress.total = sum(part.blob.size for _, _, part in todo)
    for unit, index, part in todo:
        blob = put_folded(store, unit, index, progress)
        record = Fold(
            base=part.blob.digest,
            overlays=tuple(each.blob.digest for each in part.overlays),
            blob=blob,
        )
        # Last: who reads it may rely on the blob.
        store.shelf.write(_path(unit, part), msgspec.json.encode(record))
    return len(todo)


def put_folded(
    store: Store, unit: TableUnit, index: int, progress: Progress | None = None
) -> BlobRef:
    """Write a partition with its overlays written over it; a sparse one keeps its holes.

    Raises:
        Cancelled: `progress` says so.
        ServingError: a blob is missing or corrupt, or the store does not answer.
    """
    part = unit.partitions[index]
    if part.blob.data is None:
        return store.put(_pieces_of(store, unit, index, progress))
    with store.draft(part.blob.size) as draft:
        store.fetch(part.blob, draft.descriptor, progress)
        for each in part.overlays:
            write_rows(draft.descriptor, *read_overlay(unit, index, each, store.map(each.blob)))
        return draft.keep()


def _pieces_of(
    store: Store, unit: TableUnit, index: int, progress: Progress | None = None
) -> Iterator[memoryview]:
    """The bytes of a partition with its overlays written over it, in pieces."""
    done = 0
    for rows in rows_of_partition(store, unit, index):
        yield rows.reshape(-1).view(np.uint8).data
        done += rows.nbytes
        if progress is not None:
            progress.note(f"{unit.id}/{index}", done)


#: Made before there are threads; see `shards.checking`.
_FOLDS: Final = msgspec.json.Decoder(Fold)


class Folds:
    """The folds of a store, as they were when this was made.

    Args:
        store: whose.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        # One listing instead of a look for every partition and every number of overlays.
        found, _ = store.shelf.list(FOLDED, recursive=False)
        self._paths = frozenset(each.path for each in found)

    def base_of(self, unit: TableUnit, part: Partition) -> Partition:
        """The same rows with as few overlays as there is a fold for. Its blob is touched.

        Raises:
            Unavailable: the store does not answer.
        """
        for count in range(len(part.overlays), 0, -1):
            first = msgspec.structs.replace(part, overlays=part.overlays[:count])
            path = _path(unit, first)
            if path not in self._paths:
                continue
            record = _read(self._store.shelf, path)
            if record is not None and self._is_sound(record, first):
                return msgspec.structs.replace(
                    part, blob=record.blob, overlays=part.overlays[count:]
                )
        return part

    def _is_sound(self, record: Fold, part: Partition) -> bool:
        made_of = (part.blob.digest, *(each.blob.digest for each in part.overlays))
        if made_of != (record.base, *record.overlays) or record.blob.size != part.blob.size:
            return False
        try:
            # As if written now: a sweep beside this must not take away what is relied upon.
            self._store.bring(record.blob, self._store)
        except (BundleIncomplete, BundleCorrupt) as error:
            logger.warning("a partition that was compacted is not used: %s", error)
            return False
        return True


def folded(shelf: Shelf) -> Mapping[str, Fold | None]:
    """Every record by its path; None for one that does not parse.

    Raises:
        Unavailable: the store does not answer.
    """
    found, _ = shelf.list(FOLDED, recursive=False)
    return {each.path: _read(shelf, each.path) for each in found}


def _read(shelf: Shelf, path: str) -> Fold | None:
    try:
        return _FOLDS.decode(shelf.read(path, _RECORD_BYTES_MAX))
    except (FileNotFoundError, InvalidArgument, msgspec.DecodeError):
        return None  # swept meanwhile, or cut off with the machine: as if it were not there


def _path(unit: TableUnit, part: Partition) -> str:
    return f"{FOLDED}/{table_identity(unit.dtype, unit.dim, (part,), unit.stored)}"


def _partitions(manifest: Manifest) -> Iterable[tuple[TableUnit, int, Partition]]:
    for unit in manifest.units.values():
        if isinstance(unit, TableUnit):
            for index, part in enumerate(unit.partitions):
                yield unit, index, part
