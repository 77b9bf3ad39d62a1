"""The tables of ``terabyte``: rows that tell their ids, at ids drawn over all of a table.

A row holds its id, so that a row of another id is seen, and numbers that follow from id and
version, so that bytes of another page or version are seen. Every row given is unlike the zeros of
a hole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

__all__ = ["DIM", "ROW_BYTES", "draw_ids", "rows_of", "save", "save_delta", "save_dense"]

Ids = npt.NDArray[np.int64]
Rows = npt.NDArray[np.float32]

DIM: Final = 256
ROW_BYTES: Final = 4 * DIM
_CHUNK: Final = 1 << 15
#: Whole numbers below this are exact in float32.
_EXACT: Final = 1 << 24


def rows_of(ids: Ids, version: int) -> Rows:
    """The rows of these ids ``[n]`` in a version, ``[n, DIM]``."""
    mixed = (ids * 2_654_435_761 + version * 40_503) % _EXACT
    rows = ((mixed[:, None] + np.arange(DIM)) % _EXACT + 1).astype(np.float32)
    rows[:, 0] = ids % (1 << 20) + 1
    rows[:, 1] = ids >> 20
    return rows


def draw_ids(rows: int, count: int, partitions: int, seed: int) -> Ids:
    """So many different ids of a table, ascending, some of each partition."""
    drawn = np.random.default_rng(seed)
    each = rows // partitions
    firsts = np.arange(partitions, dtype=np.int64) * each
    found = np.unique(np.concatenate([firsts, drawn.integers(rows, size=count)]))
    while len(found) < count:
        found = np.unique(np.concatenate([found, drawn.integers(rows, size=count - len(found))]))
    return found


def save(store: Path, servable: str, *, rows: int, ids: Ids, partitions: int) -> None:
    """Save version 1 of a servable that looks rows up, and nothing else."""
    # Here, since it imports what only whoever saves needs.
    import shards

    table = shards.SparseRows(rows=rows, dim=DIM, given=_given(ids, version=1))
    with shards.Bundle.create(store, servable, 1) as bundle:
        users = bundle.table("rows", table, partitions=partitions)

        @bundle.signature("serving_default", inputs={"ids": shards.Spec(("b",), "int64")})
        def look_up(ids: Any) -> Mapping[str, Any]:
            return {"rows": users.rows(ids)}


def save_dense(store: Path, servable: str, *, rows: int, partitions: int) -> None:
    """Save version 1 of a servable that looks rows up, all of which are written."""
    import shards

    each = rows // partitions
    edges = [each * index for index in range(partitions)] + [rows]

    def chunks(partition: int) -> Iterator[Rows]:
        for start in range(edges[partition], edges[partition + 1], _CHUNK):
            yield rows_of(np.arange(start, min(start + _CHUNK, edges[partition + 1])), 1)

    with shards.Bundle.create(store, servable, 1) as bundle:
        users = bundle.table("rows", chunks, partitions=partitions)

        @bundle.signature("serving_default", inputs={"ids": shards.Spec(("b",), "int64")})
        def look_up(ids: Any) -> Mapping[str, Any]:
            return {"rows": users.rows(ids)}


def save_delta(store: Path, servable: str, ids: Ids) -> None:
    """Save version 2, in which the rows of these ids are others."""
    import shards

    with shards.Bundle.delta(store, servable, 1, 2) as delta:
        for part, rows in _given(ids, version=2):
            delta.update_rows("rows", part, rows)


def _given(ids: Ids, version: int) -> Iterator[tuple[Ids, Rows]]:
    for start in range(0, len(ids), _CHUNK):
        part = ids[start : start + _CHUNK]
        yield part, rows_of(part, version)
