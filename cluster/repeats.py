"""Ids that one look-up has several times, so that shards are asked for each row once.

Finds them in a few passes over the ids, without sorting (a sort takes longer than most rows that it
saves): each id leaves its index in a slot of a small table, and the one that came first stays. Two
different ids in one slot are not taken for one another: the later is then asked for by itself, as
often as it is there. Decides when that pays, by how many bytes rows have and by what was found in
the same table before. Does not know rows or requests.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Distinct", "Repeats", "distinct"]

Ids = npt.NDArray[np.int64]
Indices = npt.NDArray[np.intp]

#: Measured with shards on the same node: with fewer bytes of rows in a look-up, or narrower rows,
#: what is saved takes no longer than to look for it and to spread the rows again.
_BYTES_MIN: Final = 256 << 10
_ROW_BYTES_MIN: Final = 64
#: Rows are fetched once where at most this part of them is left; else as they come.
_LEFT_MAX: Final = 0.7
#: Look-ups in a table that are not looked at, after so many in which it did not pay: up to this.
_REST_MAX: Final = 32
#: Tables of which is known what was found; then all are forgotten.
_TABLES_MAX: Final = 256
_SPREAD: Final = np.uint64(0x9E3779B97F4A7C15)
#: Slots for each id, as a power of two: a quarter of them is in use at most.
_SLOTS_LOG2: Final = 2


class Distinct(NamedTuple):
    """What ``[n]`` ids are made of.

    Attributes:
        first: ``[m]``, ascending: which ids to ask for.
        again: ``[n]``, for each id which of these it is.
    """

    first: Indices
    again: Indices


class Repeats:
    """Looks for repeated ids where that pays."""

    def __init__(self) -> None:
        #: by table: how many look-ups are to pass by, and how many do after the next in vain
        self._rests: dict[str, tuple[int, int]] = {}

    def find(self, table: str, ids: Ids, row_bytes: int) -> Distinct | None:
        """Which of the ids to ask for; None for all as they come.

        Args:
            table: whose ids they are.
            ids: ``[n]``.
            row_bytes: of a row as it travels.
        """
        if row_bytes < _ROW_BYTES_MIN or len(ids) * row_bytes < _BYTES_MIN:
            return None
        left, next_rest = self._rests.get(table, (0, 1))
        if left:
            self._rests[table] = (left - 1, next_rest)
            return None
        found = distinct(ids, int(_LEFT_MAX * len(ids)))
        if found is not None:
            self._rests.pop(table, None)
            return found
        if len(self._rests) >= _TABLES_MAX:
            self._rests.clear()
        self._rests[table] = (next_rest, min(2 * next_rest, _REST_MAX))
        return None


def distinct(ids: Ids, most: int) -> Distinct | None:
    """Which ids to ask for; None where that would be more than `most`."""
    count = len(ids)
    shift = np.uint64(64 - _SLOTS_LOG2 - count.bit_length())
    slots = ((ids.view(np.uint64) * _SPREAD) >> shift).view(np.int64)
    own = np.arange(count)
    # What is not written here is not read. Of several for one slot the last to be written stays.
    owners = np.empty(1 << (_SLOTS_LOG2 + count.bit_length()), np.intp)
    owners[slots[::-1]] = own[::-1]
    owner = owners[slots]
    is_first = owner == own
    is_first |= ids[owner] != ids  # another id has the slot
    first = np.flatnonzero(is_first)
    if len(first) > most:
        return None
    numbers = np.cumsum(is_first)
    numbers -= 1
    return Distinct(first, numbers[np.where(is_first, own, owner)])
