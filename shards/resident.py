"""Look-ups in rows that are mapped into memory, by compiled code on a few threads.

Decides how partitions and what lies over them are told to `shards.kernels`, and which look-ups are
worth several threads. It keeps alive what the kernels are given the addresses of. Importing this
module compiles the kernels, or reads them from disk: whoever serves imports it ahead of serving.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from shards import kernels
from shards.crew import Crew
from shards.errors import PartitionNotHeld
from shards.kernels import SCALED
from shards.overlays import Patch
from shards.pitches import pitch_of
from shards.pooling import Partial

__all__ = ["SCALED", "Crew", "Held", "Resident", "Residents"]

Array = npt.NDArray[np.generic]
Ids = npt.NDArray[np.int64] | npt.NDArray[np.int32]

#: Rows of so many bytes are looked up by all threads together: to wake one takes as long as some
#: hundred kilobytes.
_SHARED_BYTES_MIN: Final = 1 << 20
#: Ids that a thread takes at once: of so few that both end together, of so many that it is nothing
#: to take some (and the first rows of each have not been asked for long enough ahead).
_STEP_IDS: Final = 2048
_OPS: Final[dict[Partial, int]] = {"sum": kernels.SUM, "max": kernels.MAX}
_NO_WEIGHTS: Final = np.empty(0, np.float32)


class Held(NamedTuple):
    """A partition: its ids are ``[first, first + len(rows))``."""

    first: int
    rows: Array
    patch: Patch | None


class Resident:
    """Partitions of one table.

    Args:
        held: the partitions, none of them without rows, by first id ascending; at least one.
        crew: who looks up.
        dim: elements of a row.
        element: their dtype, or `SCALED`.

    Attributes:
        crew: as given.
        dim: as given.
        row_bytes: of a stored row.
        address: what `kernels.TABLE_COLUMNS` says, int64; valid as long as this is.
    """

    def __init__(self, held: Sequence[Held], crew: Crew, dim: int, element: str) -> None:
        self._held = tuple(held)
        rows = held[0].rows
        assert all(part.rows.flags.c_contiguous and len(part.rows) for part in held)
        self.crew, self.dim = crew, dim
        self.row_bytes = rows.shape[1] * rows.itemsize
        firsts = np.array([part.first for part in held], np.int64)
        stops = firsts + np.array([len(part.rows) for part in held], np.int64)
        pitch = pitch_of(firsts, int(stops[-1]))
        firsts = np.append(firsts, np.iinfo(np.int64).max)
        bases = np.array([part.rows.ctypes.data for part in held], np.int64)
        patches = np.zeros((len(held), kernels.PATCH_COLUMNS), np.int64)
        for index, part in enumerate(held):
            if part.patch is not None:
                patches[index] = part.patch.addresses
        self._arrays = (firsts, stops, bases, patches)
        places = [array.ctypes.data for array in self._arrays[:-1]]
        places.append(patches.ctypes.data if patches.any() else 0)
        element_code = kernels.ELEMENTS.get(element, -1)
        known = [len(held), *places, self.row_bytes, element_code, pitch]
        self.address = np.array(known, np.int64)
        assert len(self.address) == kernels.TABLE_COLUMNS
        self._alone = Residents([self])

    def rows(self, ids: Ids) -> Array:
        """Stored rows of ``ids`` ``[n]``, in their order.

        Raises:
            PartitionNotHeld: an id lies in no partition held here.
        """
        like = self._held[0].rows
        out = np.empty((len(ids), like.shape[1]), like.dtype)
        table = self.address.reshape(1, -1)
        flat = out.view(np.uint8).reshape(len(ids), self.row_bytes)
        claimed = np.zeros(1, np.int64)
        step = _step(self.crew, self.row_bytes, len(ids), len(ids))
        if step < len(ids):
            wrong = self.crew.run(lambda: kernels.copy(ids, table, claimed, step, flat))
        else:
            wrong = kernels.copy(ids, table, claimed, step, flat)
        if wrong >= 0:
            raise _not_held(int(ids[wrong]))
        return out

    def pool(
        self,
        ids: Ids,
        offsets: npt.NDArray[np.int64],
        op: Partial,
        weights: npt.NDArray[np.float32] | None,
    ) -> npt.NDArray[np.float32]:
        """As `Residents.pool` of this table alone."""
        edges = np.array((0, len(offsets) - 1), np.int64)
        return self._alone.pool(ids, edges, offsets, op, weights)


class Residents:
    """Several tables that are asked at once.

    Args:
        tables: of one crew, with rows of as many elements; at least one.
    """

    def __init__(self, tables: Sequence[Resident]) -> None:
        first = tables[0]
        assert all(table.dim == first.dim and table.crew is first.crew for table in tables)
        # A table has one of these of itself: what has the addresses keeps alive what is there.
        self._kept = [table._arrays for table in tables], [table._held for table in tables]
        self._addresses = np.array([table.address for table in tables], np.int64)
        self._crew, self._dim = first.crew, first.dim
        self._row_bytes = max(table.row_bytes for table in tables)

    def pool(
        self,
        ids: Ids,
        edges: npt.NDArray[np.int64],
        offsets: npt.NDArray[np.int64],
        op: Partial,
        weights: npt.NDArray[np.float32] | None,
    ) -> npt.NDArray[np.float32]:
        """As `shards.pooling.pool_rows` of the rows of these ids.

        Args:
            ids: ``[n]``.
            edges: ``[runs + 1]``: bags of which table, as `shards.kernels.pool` says.
            offsets: ``[bags + 1]``, checked.
            op: ``sum`` or ``max``.
            weights: ``[n]``, for sums.

        Raises:
            PartitionNotHeld: an id lies in no partition held here.
        """
        bags = len(offsets) - 1
        out = np.empty((bags, self._dim), np.float32)
        given = _NO_WEIGHTS if weights is None else weights
        tables, code = self._addresses, _OPS[op]
        claimed = np.zeros(1, np.int64)
        step = _step(self._crew, self._row_bytes, len(ids), bags)
        if step < bags:
            wrong = self._crew.run(
                lambda: kernels.pool(ids, tables, edges, offsets, given, claimed, step, code, out)
            )
        else:
            wrong = kernels.pool(ids, tables, edges, offsets, given, claimed, step, code, out)
        if wrong >= 0:
            raise _not_held(int(ids[wrong]))
        return out


def _step(crew: Crew, row_bytes: int, ids: int, count: int) -> int:
    """How many of some pieces of work are done at once: all, where sharing is not worth it."""
    if crew.threads == 1 or ids * row_bytes < _SHARED_BYTES_MIN:
        return max(count, 1)
    return max(count * _STEP_IDS // ids, 1) if ids else count


def _not_held(ident: int) -> PartitionNotHeld:
    return PartitionNotHeld(f"id {ident} is in no partition held by this shard")
