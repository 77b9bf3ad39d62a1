"""Partitions of a table, as an actor hosts them, and the look-up of rows by id.

Rows are read from mapped blobs where they lie, or through `shards.cold_rows`. Ids are global row
numbers; an actor is asked only for ids inside the partitions it holds, so an id outside them means
that the asker's epoch is out of date, not a missing row (what that means is the router's to decide
before it fans out).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from shards.cold_rows import ColdRows
from shards.errors import PartitionNotHeld, SpecMismatch
from shards.manifest import TableUnit
from shards.overlays import Patch
from shards.pitches import partitions_of
from shards.pooling import POOLED_DTYPES, Partial, check_bags, pool_rows
from shards.specs import dtype_of
from shards.stored_rows import decoded, viewed

if TYPE_CHECKING:
    from shards.resident import Crew, Resident

__all__ = ["HostedTable", "plan_of", "split_ids"]

Array = npt.NDArray[np.generic]
Ids = npt.NDArray[np.int64]


class HostedTable:
    """Some partitions of one table.

    Args:
        unit: the table.
        partitions: partition index to the stored rows of its base (`shards.stored_rows`), in memory
            or on disk.
        patches: partition index to what lies over the base, for partitions that have overlays.
        crew: threads for compiled look-ups; None for NumPy's.

    Attributes:
        partitions: the indices of those held.
        can_pool: whether rows of this dtype can be pooled.
        dim: elements of a row.
        resident: its compiled look-ups; None for NumPy's.
    """

    def __init__(
        self,
        unit: TableUnit,
        partitions: Mapping[int, Array | ColdRows],
        patches: Mapping[int, Patch] | None = None,
        crew: Crew | None = None,
    ) -> None:
        self._unit = unit
        self._dtype, self.dim, self._stored = dtype_of(unit.dtype), unit.dim, unit.stored
        held = sorted((unit.partitions[index].first_row, index) for index in partitions)
        self._first = np.array([first for first, _ in held], np.int64)
        self._rows = [partitions[index] for _, index in held]
        self._patches = [(patches or {}).get(index) for _, index in held]
        self._stop = np.array(
            [first + unit.partitions[index].rows for first, index in held], np.int64
        )
        self.partitions = frozenset(partitions)
        self.can_pool = unit.dtype in POOLED_DTYPES
        self.resident: Resident | None = None
        in_memory = [rows for rows in self._rows if not isinstance(rows, ColdRows)]
        # Compiled look-ups are given addresses.
        if crew is not None and len(in_memory) == len(self._rows):
            from shards.resident import SCALED, Held, Resident

            parts = zip(self._first.tolist(), in_memory, self._patches, strict=True)
            found = [Held(*part) for part in parts if len(part[1])]
            element = unit.dtype if unit.stored is None else SCALED
            self.resident = Resident(found, crew, unit.dim, element) if found else None

    @property
    def nbytes(self) -> int:
        """Bytes of the partitions held, of one on disk those in memory."""
        return sum(rows.nbytes for rows in self._rows)

    def rows(self, ids: Ids) -> Array:
        """Rows of ``ids`` ``[n]`` as ``[n, dim]``, in their order.

        Raises:
            PartitionNotHeld: an id lies in no partition held here.
        """
        if not len(ids):
            return np.empty((0, self.dim), self._dtype)
        found = self._found(ids) if self.resident is None else self.resident.rows(ids)
        return decoded(self._stored, found)

    def _found(self, ids: Ids) -> Array:
        """Stored rows of at least one id."""
        part = np.searchsorted(self._first, ids, side="right") - 1
        # An actor may hold no partition at all: then there is no last one for -1 to mean.
        stop = self._stop[part] if self._rows else part
        outside = (part < 0) | (ids >= stop)
        if outside.any():
            raise PartitionNotHeld(f"id {ids[outside][0]} is in no partition held by this shard")
        if len(self._rows) == 1:
            at = ids - self._first[0]
            out = self._taken(self._rows[0], at)
            if (patch := self._patches[0]) is not None:
                patch.apply(at, out)
            return out
        parts: list[tuple[npt.NDArray[np.intp], Array]] = []
        for index in np.unique(part):
            where = np.flatnonzero(part == index)
            at = ids[where] - self._first[index]
            found = self._taken(self._rows[index], at)
            if (patch := self._patches[index]) is not None:
                patch.apply(at, found)
            parts.append((where, found))
        first = parts[0][1]
        out = np.empty((len(ids), first.shape[1]), first.dtype)
        for where, found in parts:
            out[where] = found
        return out

    def _taken(self, rows: Array | ColdRows, at: Ids) -> Array:
        """Stored rows at these positions, all of them inside."""
        if isinstance(rows, ColdRows):
            return viewed(self._unit, rows.take(at).reshape(-1))
        # mode="clip" skips a bounds check that was just made: half the time (measured).
        return np.take(rows, at, axis=0, mode="clip")

    def pool(
        self,
        ids: Array,
        offsets: Array,
        op: Partial,
        weights: Array | None = None,
    ) -> npt.NDArray[np.float32]:
        """The rows of every bag of ids as one row, see `shards.pooling`.

        Args:
            ids: int32 or int64 ``[n]``.
            offsets: int64 ``[bags + 1]``: where each bag begins, and where the last one ends.
            op: ``sum`` or ``max``.
            weights: float32 ``[n]``, for sums.

        Returns:
            ``[bags, dim]``, zeros for a bag without ids.

        Raises:
            SpecMismatch: these are no such bags, or rows of this dtype cannot be pooled.
            PartitionNotHeld: an id lies in no partition held here.
        """
        if not self.can_pool:
            raise SpecMismatch(f"rows of {self._dtype} cannot be pooled")
        check_bags(ids, offsets, weights, op)
        if self.resident is not None:
            return self.resident.pool(ids, offsets, op, weights)  # type: ignore[arg-type]
        rows = self.rows(ids.astype(np.int64))
        return pool_rows(rows, offsets, op, weights)  # type: ignore[arg-type]


def plan_of(unit: TableUnit) -> str:
    """Hash of how a table is cut: equal where two parties mean the same rows by the same ids.

    Routers and shards work it out each by themselves; frames carry it, and what is cut otherwise
    is refused.
    """
    digest = hashlib.blake2b(f"{unit.id} {unit.dtype} {unit.dim}".encode(), digest_size=8)
    edges = [(part.first_row, part.rows) for part in unit.partitions]
    digest.update(np.array(edges, "<i8").tobytes())
    return digest.hexdigest()


def split_ids(
    ids: Ids | npt.NDArray[np.int32], first_rows: npt.NDArray[np.int64], holders: Sequence[str]
) -> dict[str, npt.NDArray[np.intp]]:
    """Which positions of ``ids`` go to which holder.

    Args:
        ids: ``[n]``, each inside the table.
        first_rows: first row of every partition, ascending.
        holders: who is asked for each partition.

    Returns:
        Holder to positions in ``ids``, ascending; holders without ids are absent.
    """
    if not len(ids):
        return {}
    by_holder: dict[str, list[int]] = {}
    for index, holder in enumerate(holders):
        by_holder.setdefault(holder, []).append(index)
    if len(by_holder) == 1:
        return {holders[0]: np.arange(len(ids))}
    part = partitions_of(ids, first_rows)
    codes = np.empty(len(holders), np.intp)
    names = list(by_holder)
    for code, name in enumerate(names):
        codes[by_holder[name]] = code
    owner = codes[part]
    split = {name: np.flatnonzero(owner == code) for code, name in enumerate(names)}
    return {name: positions for name, positions in split.items() if len(positions)}
