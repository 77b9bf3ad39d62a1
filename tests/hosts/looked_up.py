"""A servable whose answer needs every host: a table over the shard actors, summed on a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

import shards

__all__ = ["IDS", "answer", "save"]

_ROWS: Final = 64
_DIM: Final = 4
_TABLE: Final = np.arange(_ROWS * _DIM, dtype=np.float32).reshape(_ROWS, _DIM)
#: Requests whose rows lie in every partition of the table.
IDS: Final = [[0, 16, 32, 48], [63, 1, 47, 17], [5, 20, 40, 60]]


def save(store: Path, name: str, version: int) -> None:
    """Save the sum of the rows that the ids name, times the version."""

    def total(params: Any, rows: Any) -> Any:
        return rows.sum(axis=1) * params["times"][None, :]

    with shards.Bundle.create(store, name, version) as bundle:
        table = bundle.table("table", _TABLE, partitions=4)
        pool = bundle.unit(
            "pool",
            total,
            {"times": np.full(_DIM, version, np.float32)},
            inputs={"rows": shards.Spec(("b", "t", _DIM))},
            batch_buckets=(1, 8),
            length_buckets={"t": (4,)},
        )

        @bundle.signature("serving_default", inputs={"ids": shards.Spec(("b", "t"), "int32")})
        def look_up(ids: Any) -> Mapping[str, Any]:
            return {"total": pool(table.rows(ids))}


def answer(ids: Sequence[Sequence[int]], version: int) -> list[list[float]]:
    """What a version answers."""
    return [[float(x) for x in _TABLE[list(row)].sum(axis=0) * version] for row in ids]
