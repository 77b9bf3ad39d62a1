"""A pooled look-up spread over shards: bags of ids out, one row for each bag back.

Every shard is asked only for the bags that have ids in its partitions, and answers with what it can
work out alone: a sum or a greatest. Which shard that is, what a missing id does to its bag, and how
parts become one row are decided here. Parts are added in the order of the partitions, whichever
came first, so that the same placement gives the same bits. A bag in which all ids are missing, or
none is, is a row of zeros; a shard that timed out is an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cluster.locating import default_row, locate
from cluster.routes import PlannedNode
from shards.bags import ID32_ROWS_MAX
from shards.errors import SpecMismatch
from shards.tables import split_ids

__all__ = ["BagPart", "Pool"]

Array = npt.NDArray[np.generic]
Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32] | npt.NDArray[np.int64]


class BagPart(NamedTuple):
    """What one shard is asked.

    Attributes:
        holder: its name.
        bags: which of the look-up's bags these are, ascending.
        arrays: as `shards.bags` says.
    """

    holder: str
    bags: npt.NDArray[np.intp]
    arrays: tuple[Array, ...]


class Pool:
    """One pooled look-up.

    Args:
        node: a planned table node that pools.
        ids: integers or text ``[..., length]``; -1 or "" where a bag has none.
        weights: float32 of the same shape, or None.

    Attributes:
        missing: ids that are not in the table.

    Raises:
        SpecMismatch: ids or weights are not of such a shape or dtype.
        InvalidArgument: an id is missing and the table's policy is ``error``.
    """

    def __init__(self, node: PlannedNode, ids: Array, weights: Array | None = None) -> None:
        assert node.table is not None
        table, name = node.table, node.unit[:12]
        if not ids.ndim:
            raise SpecMismatch(f"ids of table {name} must be bags, got one {ids.dtype}")
        if weights is not None and (weights.dtype != np.float32 or weights.shape != ids.shape):
            raise SpecMismatch(
                f"weights of table {name} must be float32{list(ids.shape)}, got "
                f"{weights.dtype}{list(weights.shape)}"
            )
        self._node, self._table = node, table
        self._unit, self._how, self._dim = node.unit, node.pool, table.dim
        self._shape, self._length = ids.shape[:-1], ids.shape[-1]
        self._bags = math.prod(self._shape)
        found = locate(table, ids.reshape(-1), in_bags=True)
        #: where the ids are that exist, None if all do; and where those are that are missing
        self._at, self._lost = found.at, found.lost
        self.missing = len(found.lost)
        wire = np.int32 if table.rows <= ID32_ROWS_MAX else np.int64
        self._ids: Ids = found.places.astype(wire, copy=False)  # type: ignore[assignment]
        self._weights: Array | None = None
        self._lost_weights: Array | None = None
        if weights is not None:
            given = weights.reshape(-1)
            self._weights = given if self._at is None else given[self._at]
            self._lost_weights = given[self._lost]
        self._asked: list[npt.NDArray[np.intp]] = []
        self._parts: list[Floats | None] = []

    def split(self, holders: Sequence[str]) -> list[BagPart]:
        """What to ask of whom, given the chosen holder of every partition.

        A part's place in the list is its number for `put`.
        """
        first_rows = self._node.first_rows
        assert first_rows is not None
        parts: list[BagPart] = []
        for holder, found in split_ids(self._ids, first_rows, holders).items():
            is_all = len(found) == len(self._ids)
            if is_all and self._at is None:
                bags, counts = _whole(self._bags, self._length)
            else:
                places = found if self._at is None else self._at[found]
                per_bag = np.bincount(places // self._length, minlength=self._bags)
                bags = np.flatnonzero(per_bag)
                counts = per_bag[bags].astype(np.int32)
            arrays: list[Array] = [counts, self._ids if is_all else self._ids[found]]
            if self._weights is not None:
                arrays.append(self._weights if is_all else self._weights[found])
            parts.append(BagPart(holder, bags, tuple(arrays)))
        self._asked = [part.bags for part in parts]
        self._parts = [None] * len(parts)
        return parts

    def address(self, partition: int) -> str:
        """What a shard is asked for: the table, whichever partitions it has."""
        return self._unit

    @property
    def is_complete(self) -> bool:
        """Whether every shard that was asked has answered."""
        return all(part is not None for part in self._parts)

    def put(self, partition: int, tensors: Sequence[Array]) -> None:
        """Take a shard's answer.

        Args:
            partition: the part's number.
            tensors: one, ``[bags of the part, dim]``.

        Raises:
            SpecMismatch: it is not of that shape or dtype.
        """
        [rows] = tensors
        if rows.dtype != np.float32 or rows.shape != (len(self._asked[partition]), self._dim):
            raise SpecMismatch(f"a shard answered {rows.dtype}{list(rows.shape)} for bags")
        self._parts[partition] = rows  # type: ignore[assignment]

    def outputs(self, rows: int) -> Mapping[str, Array]:
        """The row of every bag, shaped like the ids with the row dimension for the last one.

        Args:
            rows: not needed: of a part's call.
        """
        merged = self._greatest() if self._how == "max" else self._total()
        if self._how == "mean":
            counts = self._counts()
            merged = merged / np.maximum(counts, 1).astype(np.float32)[:, None]
        return {"rows": merged.reshape(*self._shape, self._dim)}

    def _total(self) -> Floats:
        default = default_row(self._table) if self.missing else None
        if default is None and len(self._parts) == 1 and len(self._asked[0]) == self._bags:
            [only] = self._parts
            assert only is not None
            return only
        out = np.zeros((self._bags, self._dim), np.float32)
        for bags, part in zip(self._asked, self._parts, strict=True):
            assert part is not None, "asked before all shards have answered"
            out[bags] += part
        if default is not None:
            rows = np.broadcast_to(default.astype(np.float32), (self.missing, self._dim))
            if self._lost_weights is not None:
                rows = rows * self._lost_weights[:, None]  # type: ignore[operator]
            np.add.at(out, self._lost // self._length, rows)
        return out

    def _greatest(self) -> Floats:
        out = np.full((self._bags, self._dim), -np.inf, np.float32)
        touched = np.zeros(self._bags, bool)
        for bags, part in zip(self._asked, self._parts, strict=True):
            assert part is not None, "asked before all shards have answered"
            out[bags] = np.maximum(out[bags], part)
            touched[bags] = True
        if self.missing:
            # What a missing id yields is a row, which takes part like any other.
            default = default_row(self._table)
            filled = np.float32(0) if default is None else default.astype(np.float32)
            lost = self._lost // self._length
            out[lost] = np.maximum(out[lost], filled)
            touched[lost] = True
        out[~touched] = 0
        return out

    def _counts(self) -> npt.NDArray[np.intp]:
        """How many ids each bag has, missing ones included."""
        if self._at is None:
            return np.full(self._bags, self._length)
        places = np.concatenate((self._at, self._lost)) if self.missing else self._at
        return np.bincount(places // self._length, minlength=self._bags)


@lru_cache(maxsize=64)
def _whole(bags: int, length: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.int32]]:
    """All of some bags, and their counts where every one is full."""
    numbers, counts = np.arange(bags), np.full(bags, length, np.int32)
    numbers.flags.writeable = counts.flags.writeable = False
    return numbers, counts
