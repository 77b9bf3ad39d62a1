"""Look-ups in rows that are mapped into memory, by compiled code on a few threads.

Decides how partitions and what lies over them are told to `shards.kernels`, and which look-ups are
worth several threads. It keeps alive what the kernels are given the addresses of. Importing this
module compiles the kernels, or reads them from disk: whoever serves imports it ahead of serving.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from shards import kernels
from shards.crew import Crew
from shards.errors import PartitionNotHeld
from shards.kernels import SCALED
from shards.overlays import Patch
from shards.pooling import Partial

__all__ = ["SCALED", "Crew", "Held", "Resident"]

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
    """

    def __init__(self, held: Sequence[Held], crew: Crew, dim: int, element: str) -> None:
        self._held = tuple(held)
        self._crew = crew
        rows = held[0].rows
        assert all(part.rows.flags.c_contiguous and len(part.rows) for part in held)
        self._row_bytes = rows.shape[1] * rows.itemsize
        self._dim = dim
        self._element = kernels.ELEMENTS.get(element, -1)
        firsts = np.array([part.first for part in held], np.int64)
        stops = firsts + np.array([len(part.rows) for part in held], np.int64)
        bases = np.array([part.rows.ctypes.data for part in held], np.int64)
        patches = np.zeros((len(held), kernels.PATCH_COLUMNS), np.int64)
        for index, part in enumerate(held):
            if part.patch is not None:
                patches[index] = part.patch.addresses
        self._table = (firsts, stops, bases, patches)

    def rows(self, ids: Ids) -> Array:
        """Stored rows of ``ids`` ``[n]``, in their order.

        Raises:
            PartitionNotHeld: an id lies in no partition held here.
        """
        like = self._held[0].rows
        out = np.empty((len(ids), like.shape[1]), like.dtype)
        table, flat = self._table, out.view(np.uint8).reshape(len(ids), self._row_bytes)
        claimed = np.zeros(1, np.int64)
        step = self._step(len(ids), len(ids))
        wrong = self._share(lambda: kernels.copy(ids, *table, claimed, step, flat), step < len(ids))
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
        """As `shards.pooling.pool_rows` of the rows of these ids.

        Args:
            ids: ``[n]``.
            offsets: ``[bags + 1]``, checked.
            op: ``sum`` or ``max``.
            weights: ``[n]``, for sums.

        Raises:
            PartitionNotHeld: an id lies in no partition held here.
        """
        assert self._element >= 0, "rows of this dtype are not pooled"
        bags = len(offsets) - 1
        out = np.empty((bags, self._dim), np.float32)
        given = _NO_WEIGHTS if weights is None else weights
        table, code = self._table, _OPS[op]
        row_bytes, element = self._row_bytes, self._element
        claimed = np.zeros(1, np.int64)
        step = self._step(len(ids), bags)
        wrong = self._share(
            lambda: kernels.pool(
                ids, *table, offsets, given, claimed, step, row_bytes, element, code, out
            ),
            step < bags,
        )
        if wrong >= 0:
            raise _not_held(int(ids[wrong]))
        return out

    def _step(self, ids: int, count: int) -> int:
        """How many of some pieces of work are done at once: all, where sharing is not worth it."""
        if self._crew.threads == 1 or ids * self._row_bytes < _SHARED_BYTES_MIN:
            return max(count, 1)
        return max(count * _STEP_IDS // ids, 1) if ids else count

    def _share(self, work: Callable[[], int], is_shared: bool) -> int:
        return self._crew.run(work) if is_shared else work()


def _not_held(ident: int) -> PartitionNotHeld:
    return PartitionNotHeld(f"id {ident} is in no partition held by this shard")
