"""Where rows are cut into partitions of nearly one size, a division tells which one has an id.

A binary search waits for each of its comparisons, and takes longer than adding the row up where all
is in cache. So a *pitch* is found once for a table: rows of a partition, such that the quotient of
an id is its partition or the one before. `shards.kernels` divides in the same way, to the bit.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

__all__ = ["guessed", "partitions_of", "pitch_of"]

#: Ids for which it pays to find a pitch (20 us).
_IDS_MIN: Final = 1 << 14


def pitch_of(firsts: npt.NDArray[np.int64], stop: int) -> int:
    """The pitch of partitions, or 0 where no division is within one of all of them.

    Args:
        firsts: first id of each, ascending; at least one.
        stop: the id after the last one's.
    """
    edges = np.append(firsts[1:], stop)
    numbers = np.arange(1, len(edges) + 1)
    # No partition may end behind as many pitches: then no quotient is too large.
    pitch = max(int((-(-(edges - firsts[0]) // numbers)).max()), 1)
    # It never falls as ids grow, so it is right everywhere if it is at the ends of each partition.
    is_low = guessed(firsts, firsts[0], pitch) >= numbers - 2
    is_high = guessed(edges - 1, firsts[0], pitch) < numbers
    return pitch if (is_low & is_high).all() else 0


def guessed(ids: npt.NDArray[Any], first: int, pitch: int) -> npt.NDArray[np.int64]:
    """The partition of each id, or the one before.

    Args:
        ids: integers ``[n]``, all of them of partitions.
        first: of the partitions' ids.
        pitch: of the partitions, not 0.
    """
    return ((ids - first).astype(np.float64) * (1.0 / pitch)).astype(np.int64)


def partitions_of(ids: npt.NDArray[Any], firsts: npt.NDArray[np.int64]) -> npt.NDArray[np.intp]:
    """The partition of each id: the last one that begins at it, or before.

    Args:
        ids: integers ``[n]``, none of them before the first partition.
        firsts: first id of each partition, ascending; at least one.
    """
    last = len(firsts) - 1
    # Of the last partition nothing is asked: who is found behind it is in it.
    pitch = pitch_of(firsts, int(firsts[last]) + 1) if len(ids) >= _IDS_MIN else 0
    if not pitch:
        return np.searchsorted(firsts, ids, side="right") - 1
    parts = np.minimum(guessed(ids, int(firsts[0]), pitch), last)
    parts += np.append(firsts[1:], np.iinfo(np.int64).max).take(parts) <= ids
    return parts
