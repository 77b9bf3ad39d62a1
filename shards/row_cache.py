"""Rows of a large file that were asked for lately, in fixed arrays.

A row may lie in one of the few places of its set, and which set that is follows from its position:
so a look-up compares a few numbers, and no row has an object of its own. Which row gives way is
decided by the set's clock: its hand passes over what was asked for again since it came, once. A row
that is asked for but once makes room for the next such, so a scan leaves what is popular alone.

Decides which rows are kept, in how many bytes. Does not know files, tables, threads or time;
whoever shares a cache between threads lets in one at a time.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

__all__ = ["RowCache"]

Positions = npt.NDArray[np.int64]
Slots = npt.NDArray[np.int64]
RawRows = npt.NDArray[np.uint8]

_WAYS: Final = 8
#: Of a row beside its own bytes: its position and whether it was asked for again.
_BESIDE: Final = 8 + 1
#: An odd number whose upper bits spread neighbours over all sets: 2^64 by the golden ratio.
_SPREAD: Final = np.uint64(0x9E3779B97F4A7C15)
_NOBODY: Final = -1


class RowCache:
    """As many rows as fit into a number of bytes, with all that it takes to find them.

    Args:
        budget_bytes: the most that it may take; of too little it keeps nothing.
        row_bytes: of a row.
    """

    def __init__(self, budget_bytes: int, row_bytes: int) -> None:
        self._sets = max(budget_bytes, 0) // (_WAYS * (row_bytes + _BESIDE) + 1)
        # Memory is taken where a row is first put, not before.
        self._rows = np.empty((self._sets * _WAYS, row_bytes), np.uint8)
        self._positions = np.full((self._sets, _WAYS), _NOBODY, np.int64)
        self._again = np.zeros((self._sets, _WAYS), np.uint8)
        self._hands = np.zeros(self._sets, np.uint8)
        self._kept = 0

    @property
    def capacity(self) -> int:
        """The most rows that it may keep."""
        return self._sets * _WAYS

    @property
    def nbytes(self) -> int:
        """Bytes of all that it has, once every place is taken."""
        arrays = (self._rows, self._positions, self._again, self._hands)
        return sum(array.nbytes for array in arrays)

    @property
    def used(self) -> int:
        """Bytes of the rows that it keeps now."""
        return self._kept * self._rows.shape[1]

    def find(self, positions: Positions) -> Slots:
        """Where rows lie, and note that they were asked for.

        Args:
            positions: ``[n]``, not negative; in any order, one may come twice.

        Returns:
            For each its slot, for `read`, or -1; valid until the next `put`.
        """
        if not self._sets:
            return np.full(len(positions), -1, np.int64)
        sets = self._sets_of(positions)
        is_it = self._positions[sets] == positions[:, None]
        ways = is_it.argmax(axis=1)
        slots: Slots = sets * _WAYS + ways
        slots[~is_it[np.arange(len(positions)), ways]] = -1
        self._again.reshape(-1)[slots[slots >= 0]] = 1
        return slots

    def read(self, slots: Slots) -> RawRows:
        """The rows of slots ``[n]`` that `find` has found, as ``[n, row_bytes]``."""
        # mode="clip" skips a bounds check.
        return np.take(self._rows, slots, axis=0, mode="clip")

    def put(self, positions: Positions, rows: RawRows) -> None:
        """Keep rows, in the place of others.

        Args:
            positions: ``[n]``, each once, of rows that are not here.
            rows: ``[n, row_bytes]``. More of one set than it has places are not kept.
        """
        if not self._sets or not len(positions):
            return
        sets = self._sets_of(positions)
        order = np.argsort(sets, kind="stable")
        ordered = sets[order]
        is_first = np.append(True, ordered[1:] != ordered[:-1])
        places = np.arange(len(order))
        turn = places - np.maximum.accumulate(np.where(is_first, places, 0))
        # In each turn at most one row comes to a set.
        for now in range(min(int(turn.max()) + 1, _WAYS)):
            mine = order[turn == now]
            self._put_apart(sets[mine], positions[mine], rows[mine])

    def _put_apart(self, sets: Slots, positions: Positions, rows: RawRows) -> None:
        """Keep one row in each of some sets."""
        steps = np.arange(_WAYS)
        all_sets = sets[:, None]
        ways = (self._hands[sets][:, None] + steps) % _WAYS
        again = self._again[all_sets, ways]
        is_free = again == 0
        # Where all were asked for again, the hand comes round to where it was.
        taken = is_free.argmax(axis=1)
        went_round = ~is_free.any(axis=1)
        again[(steps < taken[:, None]) | went_round[:, None]] = 0
        self._again[all_sets, ways] = again
        way = ways[np.arange(len(sets)), taken]
        self._kept += int((self._positions[sets, way] == _NOBODY).sum())
        self._positions[sets, way] = positions
        self._rows[sets * _WAYS + way] = rows
        self._hands[sets] = (way + 1) % _WAYS

    def _sets_of(self, positions: Positions) -> Slots:
        spread = (positions.view(np.uint64) * _SPREAD) >> np.uint64(32)
        return (spread % np.uint64(self._sets)).view(np.int64)
