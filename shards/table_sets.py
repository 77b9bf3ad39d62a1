"""Bags of ids in several tables, asked in one call and answered as one: rows of all their bags.

Which tables these are the call says; an actor that serves them all answers, whatever they are made
of, and in one compiled look-up where all of them have those. Decides what such a call may be. Does
not know frames, threads or time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from batching.errors import InvalidArgument
from shards.bags import offsets_of
from shards.errors import SpecMismatch
from shards.pooling import Partial, check_bags
from shards.tables import HostedTable

__all__ = ["TableSet"]

Array = npt.NDArray[np.generic]


class TableSet:
    """Hosted tables, whose rows have as many elements each.

    Args:
        tables: in the order of the calls; at least one.

    Raises:
        InvalidArgument: their rows differ in size.
    """

    def __init__(self, tables: Sequence[HostedTable]) -> None:
        if any(table.dim != tables[0].dim for table in tables):
            raise InvalidArgument("tables whose rows differ in size are not asked in one call")
        self._tables = tuple(tables)
        self._dim = tables[0].dim
        self._can_pool = all(table.can_pool for table in tables)
        self._together: Any = None
        residents = [table.resident for table in tables if table.resident is not None]
        if len(residents) == len(tables) and len(tables) > 1:
            from shards.resident import Residents

            self._together = Residents(residents)

    def pool(
        self,
        bags: npt.NDArray[np.int64],
        counts: Array,
        ids: Array,
        op: Partial,
        weights: Array | None = None,
    ) -> npt.NDArray[np.float32]:
        """The rows of every bag of ids as one row, see `shards.pooling`.

        Args:
            bags: int64 ``[items, tables]``: how many bags each item has in each table; they add up
                to those that there are.
            counts: int32 ``[bags]``: how many ids each has.
            ids: int32 or int64 ``[n]``.
            op: ``sum`` or ``max``.
            weights: float32 ``[n]``, for sums.

        Returns:
            ``[bags, dim]``, in the order of the bags.

        Raises:
            SpecMismatch: these are no such bags, or rows of these tables cannot be pooled.
            PartitionNotHeld: an id lies in no partition held here.
        """
        offsets = offsets_of(counts)
        if len(self._tables) == 1:
            return self._tables[0].pool(ids, offsets, op, weights)
        if not self._can_pool:
            raise SpecMismatch("rows of these tables cannot be pooled")
        check_bags(ids, offsets, weights, op)
        edges = np.zeros(bags.size + 1, np.int64)
        bags.cumsum(out=edges[1:])
        if self._together is not None:
            found: npt.NDArray[np.float32] = self._together.pool(ids, edges, offsets, op, weights)
            return found
        out = np.empty((len(counts), self._dim), np.float32)
        for run, (start, stop) in enumerate(zip(edges.tolist(), edges[1:].tolist(), strict=False)):
            first, last = offsets[start], offsets[stop]
            table = self._tables[run % len(self._tables)]
            own = None if weights is None else weights[first:last]
            cut = offsets[start : stop + 1] - first
            out[start:stop] = table.pool(ids[first:last], cut, op, own)
        return out
