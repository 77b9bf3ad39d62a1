"""Bags of ids: how several rows become one.

A bag is a run of ids: ``offsets[i]`` to ``offsets[i + 1]`` of a flat array. Decides what pooling
means, in plain NumPy: rows are taken in 32 bits, in the order of the ids, whatever computes them.
`shards.kernels` does the same faster, and is held against this. Does not know tables.
"""

from __future__ import annotations

from typing import Any, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from shards.errors import SpecMismatch

__all__ = ["POOLED_DTYPES", "POOLS", "Partial", "check_bags", "pool_rows"]

Array: TypeAlias = npt.NDArray[np.generic]
Floats: TypeAlias = npt.NDArray[np.float32]
Offsets: TypeAlias = npt.NDArray[np.int64]

#: What a signature may want of the rows of a bag.
POOLS: Final = ("sum", "mean", "max")

#: What can be worked out from parts of a bag, and put together from these parts' answers.
Partial: TypeAlias = Literal["sum", "max"]

#: Dtypes of rows that can be pooled; the answer is float32.
POOLED_DTYPES: Final = frozenset({"float32", "float16", "bfloat16"})


def check_bags(
    ids: npt.NDArray[Any], offsets: npt.NDArray[Any], weights: Array | None, op: Partial
) -> None:
    """Hold bags that came from somebody else against what they must be.

    Raises:
        SpecMismatch: says what is wrong.
    """
    if ids.ndim != 1 or ids.dtype not in (np.int64, np.int32):
        raise SpecMismatch(f"ids of bags must be int32 or int64 [n], got {ids.dtype}{ids.shape}")
    if offsets.ndim != 1 or offsets.dtype != np.int64 or not len(offsets):
        raise SpecMismatch(f"offsets must be int64 [bags + 1], got {offsets.dtype}{offsets.shape}")
    if offsets[0] != 0 or offsets[-1] != len(ids) or (offsets[1:] < offsets[:-1]).any():
        raise SpecMismatch(f"offsets do not cut {len(ids)} ids into bags")
    if weights is not None:
        if weights.dtype != np.float32 or weights.shape != ids.shape:
            text = f"weights must be float32{ids.shape}, got {weights.dtype}{weights.shape}"
            raise SpecMismatch(text)
        if op != "sum":
            raise SpecMismatch("weights are for sums")


def pool_rows(rows: Array, offsets: Offsets, op: Partial, weights: Floats | None = None) -> Floats:
    """The sum, or the greatest, of the rows of every bag.

    Args:
        rows: ``[n, dim]``, one for each id.
        offsets: ``[bags + 1]``.
        op: ``sum`` or ``max``.
        weights: ``[n]``, for sums.

    Returns:
        ``[bags, dim]``; zeros for a bag without ids. NaN where an element of `max` has one.
    """
    values = rows.astype(np.float32)
    if weights is not None:
        values *= weights[:, None]
    lengths = np.diff(offsets)
    out = np.zeros((len(lengths), rows.shape[1]), np.float32)
    # One id of every bag after the other, so that each bag is added up from its first to its last.
    for step in range(int(lengths.max(initial=0))):
        bags = np.flatnonzero(lengths > step)
        taken = values[offsets[bags] + step]
        if op == "sum" or step == 0:
            out[bags] += taken
        else:
            out[bags] = np.maximum(out[bags], taken)
    return out
