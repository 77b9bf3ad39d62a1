"""How rows of a table lie in its blobs, where that is not how they are used.

A table that is stored as ``int8`` has, for each row, one float32 scale and ``dim`` int8 numbers: a
row is 4 + dim bytes instead of 4 x dim, and each of its values is the number times the scale, in
32 bits. Whoever looks rows up gets float32. Blobs, overlays and whatever copies them know stored
rows alone: an array ``[n, 4 + dim]`` of bytes. Any other table lies as it is used. Decides what is
lost when rows are stored, and what cannot be. Does not know blobs.
"""

from __future__ import annotations

from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt

from shards.errors import SpecMismatch
from shards.manifest import Stored, TableUnit
from shards.specs import DTYPES, dtype_of

__all__ = ["SCALE_BYTES", "converted", "decoded", "encoded", "row_bytes", "viewed"]

Array = npt.NDArray[np.generic]

#: Of the scale, which comes before the numbers of a row.
SCALE_BYTES: Final = 4
_MOST: Final = 127
_FLOATS: Final = frozenset({"float64", "float32", "float16", "bfloat16"})
#: What rows of floats can be made into.
_MADE: Final = _FLOATS - {"float64"}


def row_bytes(unit: TableUnit) -> int:
    """Bytes of a row in a blob."""
    if unit.stored is not None:
        return SCALE_BYTES + unit.dim
    return unit.dim * dtype_of(unit.dtype).itemsize


def viewed(unit: TableUnit, raw: npt.NDArray[Any]) -> Array:
    """Stored rows ``[n, ...]`` where they lie, given their bytes."""
    if unit.stored is not None:
        return raw.reshape(-1, SCALE_BYTES + unit.dim)
    return raw.view(dtype_of(unit.dtype)).reshape(-1, unit.dim)


def encoded(stored: Stored | None, rows: Array) -> Array:
    """Rows ``[n, dim]`` as they are stored.

    The scale of a row is a 127th of its greatest absolute value, so no value is off by more than
    half of that.

    Raises:
        SpecMismatch: a value is infinite or NaN, for which there is no number.
    """
    if stored is None:
        return rows
    values = rows.astype(np.float32)
    if not np.isfinite(values).all():
        raise SpecMismatch("rows with infinities or NaN cannot be stored in int8")
    scales = np.abs(values).max(axis=1, keepdims=True) / np.float32(_MOST)
    # Of a row that is all zeros, or so small that its scale is, every number is zero.
    scaled = np.divide(values, scales, out=np.zeros_like(values), where=scales > 0)
    numbers = np.clip(np.rint(scaled), -_MOST, _MOST).astype(np.int8)
    return np.concatenate((scales.view(np.uint8), numbers.view(np.uint8)), axis=1)


def decoded(stored: Stored | None, rows: Array) -> Array:
    """Stored rows as they are used: ``[n, dim]``."""
    if stored is None:
        return rows
    scales = np.ascontiguousarray(rows[:, :SCALE_BYTES]).view(np.float32)
    return scales * rows[:, SCALE_BYTES:].view(np.int8)


def converted(table: str, rows: Array, have: str, want: str) -> tuple[Array, str, Stored | None]:
    """Rows that are given in one dtype and to be saved in another.

    Args:
        table: its name, for messages.
        rows: ``[n, dim]``.
        have: their dtype.
        want: as `Bundle.table` is told.

    Returns:
        The rows as they are stored, and what `TableUnit` says of them.

    Raises:
        SpecMismatch: rows of this dtype cannot be saved so, or a value is too large for it.
    """
    if want not in DTYPES:
        raise SpecMismatch(f"table {table!r}: unknown dtype {want!r}")
    if have == want:
        return rows, have, None
    if have not in _FLOATS or want not in _MADE | {"int8"}:
        raise SpecMismatch(f"table {table!r}: rows of {have} cannot be saved as {want}")
    if want == "int8":
        return encoded("int8", rows), "float32", "int8"
    with np.errstate(over="ignore"):
        found = rows.astype(ml_dtypes.bfloat16 if want == "bfloat16" else want)
    if not np.array_equal(np.isfinite(found), np.isfinite(rows)):
        raise SpecMismatch(f"table {table!r}: a value is too large for {want}")
    return found, want, None
