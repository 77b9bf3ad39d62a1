"""Writing a table: what is declared of it is held together, then its partitions are written.

Decides which declarations fit together. How rows are cut is `shards.cutting`'s; what becomes of an
id is `shards.keys`'s.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple, get_args

import numpy as np

from batching.errors import InvalidArgument
from shards.cutting import Rows, Width, column_edges, cut
from shards.errors import SpecMismatch
from shards.identity import table_identity
from shards.manifest import Keys, Missing, Partition, Scheme, TableUnit
from shards.sparse_rows import SparseRows, put_sparse_table
from shards.specs import dtype_of
from shards.store import Store

__all__ = ["TableForm", "put_table"]


class TableForm(NamedTuple):
    """What is declared of a table, as `Bundle.table` is told."""

    scheme: Scheme = "range"
    partitions: int = 1
    keys: Keys = "rows"
    missing: Missing = "error"
    default: Any = None
    dtype: str | None = None


def put_table(store: Store, name: str, rows: Rows | SparseRows, form: TableForm) -> TableUnit:
    """Write a table.

    Args:
        store: where.
        name: of the unit, for messages.
        rows: as `Bundle.table` is given.
        form: what is declared of it.

    Raises:
        InvalidArgument: declarations do not fit together, or there is nothing to cut.
        FailedPrecondition: the rows are sparse, and the store cannot keep holes.
        SpecMismatch: rows of different widths or dtypes, or of a dtype that cannot be saved.
    """
    _check(name, form)
    if form.partitions == 1:
        form = form._replace(scheme="range")  # there is nothing to spread or cut
    if isinstance(rows, SparseRows):
        if form.dtype not in (None, rows.dtype):
            raise InvalidArgument(f"table {name!r}: sparse rows are saved as {rows.dtype}")
        if form.scheme == "columns":
            raise InvalidArgument(f"table {name!r}: sparse rows cannot be cut by columns")
        unit = put_sparse_table(store, name, rows, form.partitions, form.missing, form.scheme)
    elif form.scheme == "columns":
        unit = _put_columns(store, name, rows, form)
    else:
        unit = _put_rows(store, name, rows, form)
    if form.keys != "rows" and not unit.rows:
        raise InvalidArgument(f"table {name!r}: keys need at least one row")
    default = _default_row(name, form.default, unit)
    # What a router alone goes by is no part of what a table is.
    return TableUnit(
        id=unit.id,
        dtype=unit.dtype,
        dim=unit.dim,
        rows=unit.rows,
        partitions=unit.partitions,
        missing=form.missing,
        stored=unit.stored,
        scheme=form.scheme,
        columns=unit.columns,
        keys=form.keys,
        default=default,
    )


def _check(name: str, form: TableForm) -> None:
    where = f"table {name!r}"
    if form.partitions < 1:
        raise InvalidArgument(f"{where}: {form.partitions} partitions")
    for said, value, kinds in (
        ("partition", form.scheme, Scheme),
        ("keys", form.keys, Keys),
        ("missing", form.missing, Missing),
    ):
        if value not in get_args(kinds):
            known = ", ".join(map(repr, get_args(kinds)))
            raise InvalidArgument(f"{where}: {said}={value!r} is not one of {known}")
    if (form.missing == "default") != (form.default is not None):
        raise InvalidArgument(f"{where}: missing='default' and a default row belong together")
    if form.keys != "rows" and form.missing != "error":
        raise InvalidArgument(f"{where}: of {form.keys} keys none is ever missing")


def _put_rows(store: Store, name: str, rows: Rows, form: TableForm) -> TableUnit:
    width = Width(name, form.dtype)
    parts: list[Partition] = []
    for pieces in cut(rows, form.partitions, form.scheme):
        first = width.rows
        blob = store.put(width.checked(pieces))
        parts.append(Partition(first_row=first, rows=width.rows - first, blob=blob))
    kind, dim = width.kind
    return TableUnit(
        id=table_identity(kind, dim, parts, width.stored),
        dtype=kind,
        dim=dim,
        rows=width.rows,
        partitions=tuple(parts),
        stored=width.stored,
    )


def _put_columns(store: Store, name: str, rows: Rows, form: TableForm) -> TableUnit:
    array = rows if callable(rows) or hasattr(rows, "shape") else np.asarray(rows)
    parts: list[Partition] = []
    for pieces in cut(array, form.partitions, "columns"):
        # Of its own: pieces need not be of one width, and an int8 row has a scale in each.
        width = Width(name, form.dtype)
        blob = store.put(width.checked(pieces))
        parts.append(Partition(first_row=0, rows=width.rows, blob=blob))
    edges = column_edges(array, form.partitions)
    kind, _ = width.kind
    return TableUnit(
        id=table_identity(kind, edges[-1], parts, width.stored),
        dtype=kind,
        dim=edges[-1],
        rows=width.rows,
        partitions=tuple(parts),
        stored=width.stored,
        columns=tuple(stop - start for start, stop in itertools.pairwise(edges)),
    )


def _default_row(name: str, default: Any, unit: TableUnit) -> tuple[float, ...]:
    if default is None:
        return ()
    given = np.asarray(default)
    if given.shape != (unit.dim,) or given.dtype.kind not in "fiub":
        raise SpecMismatch(
            f"table {name!r}: the default row must be numbers [{unit.dim}], got "
            f"{given.dtype}{list(given.shape)}"
        )
    row = given.astype(dtype_of(unit.dtype))
    kept = row.astype(np.float64)
    # The manifest is JSON: a number of it is a double, and finite.
    is_exact = row.dtype.kind not in "iub" or np.array_equal(kept.astype(row.dtype), given)
    if not np.isfinite(kept).all() or not is_exact:
        raise SpecMismatch(f"table {name!r}: the default row is not one of {unit.dtype}")
    return tuple(kept.tolist())
