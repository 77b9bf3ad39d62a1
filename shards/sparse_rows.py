"""Tables of which some rows are given, and all others are zeros.

    users = shards.SparseRows(rows=1 << 30, dim=256, dtype="float32", given=chunks())
    bundle.table("users", users, partitions=64)

Decides which partition a given row is written to. What is not given takes no room: not on the disk,
not in the time that a save, a copy or a load takes. Does not know how files keep holes.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from batching.errors import InvalidArgument
from shards.drafts import Draft
from shards.errors import SpecMismatch
from shards.identity import table_identity
from shards.keys import places_of
from shards.leaves import dtype_name
from shards.manifest import Missing, Partition, Scheme, TableUnit
from shards.sparse import write_rows
from shards.specs import STRING, dtype_of
from shards.store import Store

__all__ = ["SparseRows", "put_sparse_table"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseRows:
    """A table of a declared shape, with the rows that are not zeros.

    Attributes:
        rows: of the whole table.
        dim: elements of a row.
        given: pairs of ids ``[n]``, integers, and rows ``[n, dim]`` of `dtype`; consumed once. Ids
            may be in any order; where one is given again, the later row counts. A few million
            bytes or more at a time are written fastest.
        dtype: of the elements.

    Raises:
        InvalidArgument: no rows, or rows of nothing.
        SpecMismatch: a dtype that no table has.
    """

    rows: int
    dim: int
    given: Iterable[tuple[Any, Any]]
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.rows < 1 or self.dim < 1:
            raise InvalidArgument(f"a sparse table of {self.rows} rows of {self.dim}")
        if dtype_of(self.dtype).kind == "O":
            raise SpecMismatch(f"rows of {STRING} are not in tables")


def put_sparse_table(
    store: Store,
    name: str,
    table: SparseRows,
    partitions: int,
    missing: Missing,
    scheme: Scheme = "range",
) -> TableUnit:
    """Write a sparse table.

    Args:
        store: where; in a directory.
        name: of the unit, for messages.
        table: what.
        partitions: ranges of where rows lie, which differ by one row at most.
        missing: as of `TableUnit`.
        scheme: likewise; ``range`` or ``hash``.

    Raises:
        FailedPrecondition: the store cannot keep holes.
        InvalidArgument: an id is outside the table, or there are more partitions than rows.
        SpecMismatch: given rows have another shape or dtype.
    """
    if partitions > table.rows:
        raise InvalidArgument(f"table {name!r}: {partitions} partitions of {table.rows} rows")
    edges = [table.rows * index // partitions for index in range(partitions + 1)]
    row_bytes = table.dim * dtype_of(table.dtype).itemsize
    with contextlib.ExitStack() as stack:
        drafts = [
            stack.enter_context(store.draft((stop - start) * row_bytes))
            for start, stop in itertools.pairwise(edges)
        ]
        for ids, rows in table.given:
            where = _checked(name, table, np.asarray(ids), rows := np.asarray(rows))
            if scheme == "hash":
                where = places_of(where, table.rows)
            _write(edges, drafts, where, rows)
        parts = tuple(
            Partition(first_row=start, rows=stop - start, blob=draft.keep())
            for draft, (start, stop) in zip(drafts, itertools.pairwise(edges), strict=True)
        )
    return TableUnit(
        id=table_identity(table.dtype, table.dim, parts),
        dtype=table.dtype,
        dim=table.dim,
        rows=table.rows,
        partitions=parts,
        missing=missing,
        scheme=scheme,
    )


def _checked(name: str, table: SparseRows, ids: Any, rows: Any) -> Any:
    """Ids as int64, which are inside the table and have rows like its."""
    if ids.ndim != 1 or (ids.dtype.kind not in "iu" and ids.size):
        raise SpecMismatch(f"table {name!r}: ids must be [n] integers, got {ids.dtype}{ids.shape}")
    if rows.shape != (len(ids), table.dim) or dtype_name(rows.dtype) != table.dtype:
        raise SpecMismatch(
            f"table {name!r}: rows for {len(ids)} ids must be {table.dtype}[{len(ids)}, "
            f"{table.dim}], got {rows.dtype}{list(rows.shape)}"
        )
    where = ids.astype(np.int64)
    outside = (where < 0) | (where >= table.rows)
    if outside.any():
        raise InvalidArgument(
            f"table {name!r}: id {ids[outside][0]} is not in a table of {table.rows} rows"
        )
    return where


def _write(edges: list[int], drafts: list[Draft], where: Any, rows: Any) -> None:
    order = np.argsort(where, kind="stable")
    ordered = where[order]
    # Stable: of those that give one row the latest is the last.
    order = order[np.append(ordered[1:] != ordered[:-1], True)[: len(ordered)]]
    ordered = where[order]
    cuts = np.searchsorted(ordered, edges).tolist()
    for index, draft in enumerate(drafts):
        mine = slice(cuts[index], cuts[index + 1])
        write_rows(draft.descriptor, ordered[mine] - edges[index], rows[order[mine]])
