"""Which way rows of floats are read: by compiled code where that was made ready, else by msgspec.

Compiling takes seconds, and reading what was compiled half of one. So a process says when it has
the time (`make_ready`, before a door opens); until then, and where there is no compiler for this
processor, everything is read as it always was. Decides nothing else.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Final, TypeAlias, cast

import numpy as np

from cluster.api.values import Array

__all__ = ["ReadRows", "make_ready", "ready", "reads_rows"]

logger = logging.getLogger(__name__)

#: From a body into rows of numbers of at most this magnitude; whether it could
#: (`cluster.api.float_rows`).
ReadRows: TypeAlias = Callable[[bytes, Array, float], bool]
_MODULE: Final = "cluster.api.float_rows"
_LARGEST: Final = {dtype: float(np.finfo(dtype).max) for dtype in ("float32", "float64")}

_ready: list[ReadRows] = []


def make_ready() -> None:
    """Compile what reads rows, or read it from disk. Takes up to seconds; may be called again."""
    if _ready:
        return
    try:
        module = importlib.import_module(_MODULE)
    except Exception as error:  # it is not there, or not for this processor: numba says which
        logger.warning("rows are read by Python, which is slower: %s", error)
        return
    _ready.append(cast(ReadRows, module.read_rows))


def ready() -> ReadRows | None:
    """What was made ready, if it was."""
    return _ready[0] if _ready else None


def reads_rows(size: int, dtype: str) -> Callable[[bytes], Array | None] | None:
    """What reads bodies of rows of so many numbers, or None where nothing can.

    What it returns takes a body and gives its rows ``[rows, size]``, or None where another reading
    must decide.
    """
    read, most = ready(), _LARGEST.get(dtype)
    if read is None or most is None or size < 1:
        return None
    return _reader(read, size, np.dtype(dtype), most)


def _reader(
    read: ReadRows, size: int, dtype: np.dtype[np.generic], most: float
) -> Callable[[bytes], Array | None]:
    one = (1, size)
    # The least that a body of a row has: its numbers, what is between them, and its brackets.
    row_bytes_min = 2 * size
    empty = np.empty

    def rows_of(body: bytes) -> Array | None:
        if len(body) < row_bytes_min:
            return None
        count = body.count(b"[") - 1
        if count == 1:
            rows = empty(one, dtype)
        elif count > 1 and count * row_bytes_min <= len(body):
            rows = empty((count, size), dtype)
        else:
            return None
        return rows if read(body, rows, most) else None

    return rows_of
