"""Overlays: rows that replace some of a partition's, without the partition being written again.

One overlay is one blob: ``int64`` positions inside the partition, strictly ascending, padding to 64
bytes, then one row for each position. A partition has a base and a list of overlays, of which the
later win. Decides how an overlay is laid out, which row of several wins, and what a look-up does
about it: one binary search in all replaced positions, however many overlays there are. A partition
without overlays never comes here. Does not know stores' kinds, versions, nor who holds what.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from shards.checking import overlay_offset
from shards.errors import BundleCorrupt
from shards.layout import Buffer
from shards.manifest import Overlay, Partition, TableUnit
from shards.store import Store
from shards.stored_rows import row_bytes, viewed

__all__ = [
    "Patch",
    "Replaced",
    "index_bytes",
    "merged",
    "put_overlay",
    "read_overlay",
    "rows_of_partition",
    "view_rows",
]

Array = npt.NDArray[np.generic]
Positions = npt.NDArray[np.int64]

_CHUNK_BYTES: Final = 16 << 20


class Replaced(NamedTuple):
    """What an overlay says: ``positions`` ``[n]``, strictly ascending, ``rows`` ``[n, dim]``."""

    positions: Positions
    rows: Array


class Patch:
    """Puts replaced rows over those of the base.

    Args:
        overlays: of one partition, at least one, of which the later win.
    """

    __slots__ = ("_at", "_bases", "_first", "_positions", "_rows")

    def __init__(self, overlays: Sequence[Replaced]) -> None:
        self._rows = [each.rows for each in overlays]
        self._at: Positions | None = None
        lengths = [len(each.rows) for each in overlays]
        self._first = np.cumsum([0, *lengths[:-1]], dtype=np.int64)
        self._bases = np.array([rows.ctypes.data for rows in self._rows], np.int64)
        if len(overlays) == 1:
            self._positions = overlays[0].positions  # where they lie, not copied
        else:
            self._positions, self._at = _latest(overlays)

    @property
    def nbytes(self) -> int:
        """Bytes that are not in the overlays' blobs."""
        return 0 if self._at is None else self._positions.nbytes + self._at.nbytes

    @property
    def addresses(self) -> tuple[int, ...]:
        """As `shards.kernels.PATCH_COLUMNS` says, valid as long as this is."""
        return (
            len(self._positions),
            self._positions.ctypes.data,
            0 if self._at is None else self._at.ctypes.data,
            self._first.ctypes.data,
            self._bases.ctypes.data,
            len(self._rows),
        )

    def apply(self, positions: Positions, out: Array) -> None:
        """Put the replaced ones among these rows in their places.

        Args:
            positions: ``[n]`` inside the partition, in any order.
            out: ``[n, dim]``, the base's rows at these positions.
        """
        at = np.searchsorted(self._positions, positions)
        # What is larger than all finds the last, which is another.
        np.minimum(at, len(self._positions) - 1, out=at)
        hit = np.flatnonzero(self._positions[at] == positions)
        if not len(hit):
            return
        found = at[hit]
        if self._at is None:
            out[hit] = self._rows[0][found]
            return
        found = self._at[found]
        source = np.searchsorted(self._first, found, side="right") - 1
        for index in np.unique(source):
            mine = np.flatnonzero(source == index)
            out[hit[mine]] = self._rows[index][found[mine] - self._first[index]]


def index_bytes(partition: Partition) -> int:
    """The most that the `Patch` of a partition takes beside the blobs."""
    overlays = partition.overlays
    return 16 * sum(each.rows for each in overlays) if len(overlays) > 1 else 0


def merged(overlays: Sequence[Replaced]) -> Replaced:
    """Several overlays, of which the later win, as one."""
    if len(overlays) == 1:
        return overlays[0]
    positions, at = _latest(overlays)
    rows = np.empty((len(positions), overlays[0].rows.shape[1]), overlays[0].rows.dtype)
    first = 0
    for each in overlays:
        # One overlay after the other: several of them need not fit into memory twice.
        mine = np.flatnonzero((at >= first) & (at < first + len(each.rows)))
        rows[mine] = each.rows[at[mine] - first]
        first += len(each.rows)
    return Replaced(positions, rows)


def _latest(overlays: Sequence[Replaced]) -> tuple[Positions, Positions]:
    """Every position once, ascending, and where its row is in all overlays' rows in a row."""
    positions = np.concatenate([each.positions for each in overlays])
    # Stable: among equal positions the latest overlay's is the last.
    order = np.argsort(positions, kind="stable")
    ordered = positions[order]
    is_last = np.append(ordered[1:] != ordered[:-1], True)
    return ordered[is_last], order[is_last]


def put_overlay(store: Store, replaced: Replaced) -> Overlay:
    """Write an overlay."""
    positions = np.ascontiguousarray(replaced.positions, "<i8")
    rows = np.ascontiguousarray(replaced.rows)
    padding = bytes(overlay_offset(len(positions)) - positions.nbytes)
    pieces = (positions.view(np.uint8).data, padding, rows.reshape(-1).view(np.uint8).data)
    return Overlay(rows=len(positions), blob=store.put(iter(pieces)))


def read_overlay(unit: TableUnit, partition: int, overlay: Overlay, raw: Buffer) -> Replaced:
    """An overlay where it lies in memory.

    Raises:
        BundleCorrupt: its positions are not ascending, or outside the partition: whoever wrote it
            did not know the format, and a search in it would find wrong rows.
    """
    if unit.columns:
        unit, partition = unit.piece(partition), 0
    start = overlay_offset(overlay.rows)
    plain = raw.view(np.ndarray)
    positions = plain[: 8 * overlay.rows].view("<i8")
    stop = unit.partitions[partition].rows
    ascending = bool((positions[1:] > positions[:-1]).all())
    if not ascending or positions[0] < 0 or positions[-1] >= stop:
        raise BundleCorrupt(
            f"overlay {overlay.blob.digest}: its positions are not ascending inside the {stop} "
            f"rows of partition {partition}"
        )
    return Replaced(positions, viewed(unit, plain[start:]))


def view_rows(unit: TableUnit, raw: Buffer) -> Array:
    """The rows of a base where they lie in memory, as `shards.stored_rows` says."""
    # The plain view drops np.memmap, whose every slice copies attributes.
    return viewed(unit, raw.view(np.ndarray))


def rows_of_partition(store: Store, unit: TableUnit, partition: int) -> Iterator[Array]:
    """All stored rows of a partition, overlays over them, in pieces that fit into memory.

    A partition without overlays is one piece, where it lies.

    Raises:
        ServingError: a blob is missing or corrupt, or the store does not answer.
    """
    if unit.columns:
        unit, partition = unit.piece(partition), 0
    part = unit.partitions[partition]
    base = view_rows(unit, store.map(part.blob))
    if not part.overlays:
        yield base
        return
    patch = Patch(
        [read_overlay(unit, partition, each, store.map(each.blob)) for each in part.overlays]
    )
    step = max(_CHUNK_BYTES // row_bytes(unit), 1)
    for start in range(0, part.rows, step):
        rows = base[start : start + step].copy()
        patch.apply(np.arange(start, start + len(rows)), rows)
        yield rows
