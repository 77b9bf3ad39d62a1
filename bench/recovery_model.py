"""The tables of ``recovery``: one partition of 100 GB each, of which few rows are written.

Which rows are written hangs on the name, too: equal tables would be one, and lie on one actor.
Every request asks for rows that were written, which tell their ids, so that an answer with rows of
another page, or with the zeros of a hole, is not taken for one.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Final
from zlib import crc32

import numpy as np
import orjson

from bench.load import Request
from bench.terabyte_model import ROW_BYTES, Ids, draw_ids, rows_of, save
from bench.traffic import Asked

__all__ = ["LOGICAL_BYTES", "ids_of", "kinds", "read", "save_table"]

LOGICAL_BYTES: Final = 100_000_000_000
_ROWS: Final = LOGICAL_BYTES // ROW_BYTES
_GIVEN: Final = 2048
_IDS: Final = 2
_KINDS: Final = 8
_VERSION: Final = 1


def ids_of(servable: str, seed: int) -> Ids:
    """The ids that are written, over all of the partition."""
    return draw_ids(_ROWS, _GIVEN, 1, crc32(servable.encode(), seed))


def save_table(store: Path, servable: str, seed: int) -> None:
    """Save a servable that looks up rows of a table of one partition."""
    save(store, servable, rows=_ROWS, ids=ids_of(servable, seed), partitions=1)


def kinds(servable: str, seed: int, deadline_s: float) -> list[Asked]:
    """Requests for written rows of a servable, each with a deadline."""
    given = ids_of(servable, seed)
    drawn = np.random.default_rng(seed).choice(given, (_KINDS, _IDS), replace=False)
    return [
        Asked(servable, _request(servable, ids, deadline_s), partial(read, ids)) for ids in drawn
    ]


def _request(servable: str, ids: Ids, deadline_s: float) -> Request:
    return Request(
        path=f"/v1/models/{servable}:predict",
        body=orjson.dumps({"instances": ids.tolist()}),
        headers={"x-request-timeout-ms": str(round(deadline_s * 1e3))},
    )


def read(ids: Ids, body: bytes) -> tuple[int, ...]:
    """The version that every row came from.

    Raises:
        ValueError: these are not the rows of these ids.
    """
    try:
        rows = np.asarray(orjson.loads(body)["predictions"], np.float32)
    except (KeyError, TypeError, orjson.JSONDecodeError) as error:
        raise ValueError(f"not an answer: {body[:200]!r}") from error
    if not np.array_equal(rows, rows_of(ids, _VERSION)):
        raise ValueError(f"not the rows of {ids.tolist()}: {body[:200]!r}")
    return (_VERSION,)
