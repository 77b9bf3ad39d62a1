"""From the ids of a request to where their rows lie in the table, and which of them have none.

The one place in which a router knows keys, spreading and missing ids; who is then asked for which
place is the look-up's own (`cluster.tables`, `cluster.pooled`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from batching.errors import InvalidArgument
from shards.bags import NO_ID
from shards.errors import SpecMismatch
from shards.keys import hashed_rows, places_of
from shards.manifest import TableUnit

__all__ = ["Located", "default_row", "locate", "locate_all"]

Array = npt.NDArray[np.generic]
Indices = npt.NDArray[np.intp]

_NONE: Final = np.empty(0, np.intp)
#: Fills the place of a key that a bag does not have.
_NO_KEY: Final = b""


class Located(NamedTuple):
    """What became of ids ``[n]``.

    Attributes:
        places: int32 or int64, where the rows lie of those that have one, in their order.
        at: which of the ids these are; None for all.
        lost: which ids are missing.
    """

    places: npt.NDArray[np.int32] | npt.NDArray[np.int64]
    at: Indices | None
    lost: Indices


def locate(table: TableUnit, ids: Array, *, in_bags: bool) -> Located:
    """Find ids in a table.

    Args:
        table: the table.
        ids: ``[n]``.
        in_bags: whether `NO_ID`, or an empty key, is none, and so neither found nor missing.

    Raises:
        SpecMismatch: they are no integers, or no text where the table's keys are.
        InvalidArgument: an id is missing and the table's policy is ``error``.
    """
    if table.keys != "rows":
        return _hashed(table, ids, in_bags)
    if ids.dtype.kind not in "iu":
        raise SpecMismatch(f"ids of table {table.id[:12]} must be integers, got {ids.dtype}")
    if ids.dtype != np.int32:
        ids = ids.astype(np.int64, copy=False)
    at: Indices | None = None
    lost = _NONE
    # The least and the greatest take a third of the time that a look at each takes.
    if len(ids) and not (ids.min() >= 0 and ids.max() < table.rows):
        known = (ids >= 0) & (ids < table.rows)  # type: ignore[operator]
        at = np.flatnonzero(known)
        lost = np.flatnonzero(~known & (ids != NO_ID) if in_bags else ~known)
        if len(lost) and table.missing == "error":
            raise InvalidArgument(f"id {ids[lost[0]]} is not in a table of {table.rows} rows")
        ids = ids[at]
    return Located(_placed(table, ids), at, lost)


def locate_all(
    tables: Sequence[TableUnit], rows: npt.NDArray[np.int64], ids: Array, edges: Indices
) -> Located:
    """Find the ids of bags in several tables, whose rows are known by number, in one pass.

    Args:
        tables: at least one.
        rows: ``[tables]``, of each.
        ids: int32 or int64 ``[n]``, those of one table after those of another.
        edges: ``[tables + 1]``: where those of each begin, and where the last ones end.

    Raises:
        InvalidArgument: an id is missing and its table's policy is ``error``.
    """
    starts = edges[:-1]
    if (edges[1:] > starts).all():
        # As numbers without a sign, negative ones are greater than any row.
        unsigned = ids.view(np.uint32 if ids.dtype == np.int32 else np.uint64)
        if (np.maximum.reduceat(unsigned, starts) < rows.view(np.uint64)).all():
            return Located(ids, None, _NONE)  # type: ignore[arg-type]
    owner = np.repeat(np.arange(len(tables)), np.diff(edges))
    known = (ids >= 0) & (ids < rows[owner])  # type: ignore[operator]
    at = np.flatnonzero(known)
    lost = np.flatnonzero(~known & (ids != NO_ID))
    if len(lost):
        is_error = np.array([table.missing == "error" for table in tables])
        wrong = lost[is_error[owner[lost]]]
        if len(wrong):
            count = tables[owner[wrong[0]]].rows
            raise InvalidArgument(f"id {ids[wrong[0]]} is not in a table of {count} rows")
    return Located(ids[at], at, lost)  # type: ignore[arg-type]


def default_row(table: TableUnit) -> Array | None:
    """The row of what is missing, where it is not zeros: float64 ``[dim]``."""
    return np.array(table.default) if table.default else None


def _hashed(table: TableUnit, keys: Array, in_bags: bool) -> Located:
    is_text = table.keys == "string"
    if keys.dtype.kind not in ("O" if is_text else "iu"):
        what = "text" if is_text else "integers"
        raise SpecMismatch(f"keys of table {table.id[:12]} must be {what}, got {keys.dtype}")
    at: Indices | None = None
    if in_bags:
        given = keys != _NO_KEY if is_text else keys.astype(np.int64, copy=False) != NO_ID
        if not given.all():
            at = np.flatnonzero(given)
            keys = keys[at]
    return Located(_placed(table, hashed_rows(keys, table.rows)), at, _NONE)


def _placed(table: TableUnit, numbers: Array) -> npt.NDArray[np.int32] | npt.NDArray[np.int64]:
    if table.scheme == "hash":
        return places_of(numbers, table.rows)
    return numbers  # type: ignore[return-value]
