"""A table look-up spread over shards: ids out, rows back in their places.

Who is asked for which rows, what a missing one is filled with, and in which order rows lie in the
answer are decided here. A shard that timed out is an error, never a missing row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from cluster.hot_rows import HotRows, Key
from cluster.locating import default_row, locate
from cluster.repeats import Repeats
from cluster.routes import PlannedNode
from shards.errors import SpecMismatch
from shards.specs import dtype_of
from shards.tables import split_ids
from shards.wire import NO_SLOT

__all__ = ["Gather", "Thrift"]

Array = npt.NDArray[np.generic]
Indices = npt.NDArray[np.intp]

#: Rows of one look-up that are kept at a router at most: to keep one takes as long as to ask a
#: shard for some.
_KEPT_MAX: Final = 128


class Thrift:
    """How a router asks shards for fewer rows than it is asked for.

    Attributes:
        repeats: finds what one look-up wants several times.
        hot: rows that are kept here, where that is declared.
    """

    def __init__(self) -> None:
        self.repeats = Repeats()
        self.hot: HotRows | None = None


class Gather:
    """One look-up.

    Args:
        node: a planned table node.
        ids: integers of any shape; or text, where that is what the table's keys are.

    Attributes:
        missing: how many ids are not in the table.

    Raises:
        SpecMismatch: ids are not of such a dtype.
        InvalidArgument: an id is missing and the table's policy is ``error``.
    """

    def __init__(self, node: PlannedNode, ids: Array) -> None:
        assert node.table is not None
        assert node.first_rows is not None
        table = self._table = node.table
        self._shape = ids.shape
        flat = ids.reshape(-1)
        found = locate(table, flat, in_bags=False)
        self._ids = found.places.astype(np.int64, copy=False)
        self._known, self._lost = found.at, found.lost
        self.missing = len(found.lost)
        if found.at is not None:
            self._ids = np.zeros(len(flat), np.int64)
            self._ids[found.at] = found.places
        self._first_rows = node.first_rows
        self._dim = table.dim
        self._dtype = dtype_of(table.dtype)
        self._hot: HotRows | None = None
        self._key: Key | None = None
        self._out: Array | None = None
        self._left = len(self._ids) - self.missing
        #: where rows come once: which of them each id has that exists; and where these ids are
        self._again: Indices | None = None
        self._at: Indices | None = None

    @property
    def is_complete(self) -> bool:
        """Whether every row that exists is here."""
        return self._left == 0

    @property
    def fills(self) -> bool:
        """Whether rows that are missing are not zeros."""
        return self.missing > 0 and self._table.default != ()

    @property
    def nbytes(self) -> int:
        """Bytes that the rows have, missing ones included."""
        return len(self._ids) * self._dim * self._dtype.itemsize

    def outline(self) -> Array:
        """What looks like `rows` to a check of shape and dtype, without their bytes."""
        return np.broadcast_to(np.zeros((), self._dtype), (*self._shape, self._dim))

    def slots(self, split: Sequence[Indices], first: int) -> npt.NDArray[np.uint16]:
        """Which part holds each row, for whoever puts the parts together.

        Args:
            split: the positions of each part.
            first: number of the first part.

        Returns:
            Shaped like the ids; `NO_SLOT` where a row is missing.
        """
        slots = np.full(len(self._ids), NO_SLOT, np.uint16)
        for slot, positions in enumerate(split, first):
            slots[positions] = slot
        return slots.reshape(self._shape)

    def save(self, thrift: Thrift) -> None:
        """Ask for fewer rows, where that pays; before `split`, and not where rows go to a device.

        What is asked for several times comes once, and is one row to everything until `rows`.
        """
        self._take_once(thrift.repeats)
        if thrift.hot is not None:
            self._take_hot(thrift.hot)

    def _take_once(self, repeats: Repeats) -> None:
        known = self._known
        places = self._ids if known is None else self._ids[known]
        found = repeats.find(self._table.id, places, self._dim * self._dtype.itemsize)
        if found is None:
            return
        self._ids, self._again = places[found.first], found.again
        self._at, self._known = known, None
        self._left = len(self._ids)

    def _take_hot(self, hot: HotRows) -> None:
        """Take the rows that are kept here, and keep those that come."""
        if not self._left:
            return
        known = self._known
        places = self._ids if known is None else self._ids[known]
        key = hot.key_of(self._table, self._first_rows, places)
        found = hot.find(self._table, key)
        self._hot = hot
        if found is None and known is None:
            self._key = key
            return
        # By position, as parts are; what lies at those of missing ids is never read.
        tokens, positions = np.zeros(len(self._ids), np.uint64), np.zeros(len(self._ids), np.int64)
        at = np.arange(len(self._ids)) if known is None else known
        tokens[at], positions[at] = key
        self._key = Key(tokens, positions)
        if found is None:
            return
        here, rows = found
        self._out = np.zeros((len(self._ids), self._dim), self._dtype)
        self._out[at[here]] = rows
        self._known = np.delete(at, here)
        self._left -= len(here)

    def split(self, holders: Sequence[str]) -> dict[str, Indices]:
        """Which positions to ask of whom, given the chosen holder of every partition."""
        if self._known is None or not len(self._known):
            return split_ids(self._ids, self._first_rows, holders) if self._left else {}
        found = split_ids(self._ids[self._known], self._first_rows, holders)
        return {name: self._known[positions] for name, positions in found.items() if len(positions)}

    def ids_at(self, positions: Indices) -> npt.NDArray[np.int64]:
        """The ids to send for these positions."""
        return self._ids[positions] if len(positions) != len(self._ids) else self._ids

    def put(self, positions: Indices, rows: Array) -> None:
        """Take one shard's rows, in the order of its positions.

        Raises:
            SpecMismatch: the rows are not of the table's shape or dtype.
        """
        if rows.shape != (len(positions), self._dim) or rows.dtype != self._dtype:
            raise SpecMismatch(f"a shard answered {rows.dtype}{list(rows.shape)} for a look-up")
        self._left -= len(positions)
        if len(positions) == len(self._ids):
            self._out = rows
            return
        if self._out is None:
            self._out = np.zeros((len(self._ids), self._dim), self._dtype)
        self._out[positions] = rows

    def rows(self) -> Array:
        """The rows, shaped like the ids plus the row dimension. Missing ones are filled."""
        assert self.is_complete
        out = self._out
        if out is None:
            out = np.zeros((len(self._ids), self._dim), self._dtype)
        if self._hot is not None:
            self._keep(self._hot, out)
        if self._again is not None:
            out = self._repeated(out, self._again)
        if self.fills:
            out[self._lost] = default_row(self._table)  # type: ignore[assignment]
        return out.reshape(*self._shape, self._dim)

    def _repeated(self, once: Array, again: Indices) -> Array:
        """Each row as often as it was asked for; zeros for missing ones."""
        if self._at is None:
            return once.take(again, axis=0)
        out = np.zeros((len(self._at) + self.missing, self._dim), self._dtype)
        out[self._at] = once[again]
        return out

    def _keep(self, hot: HotRows, out: Array) -> None:
        """Keep some of the rows that shards were asked for."""
        assert self._key is not None
        asked = np.arange(len(self._ids)) if self._known is None else self._known
        # What is asked for often comes again: a few of many will do.
        some = asked[:: -(-len(asked) // _KEPT_MAX) or 1]
        hot.keep(self._table, self._key.at(some), out[some])
