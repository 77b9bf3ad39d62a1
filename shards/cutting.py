"""Rows of a table, cut into partitions and checked to be alike while they stream into a store.

Decides where the cuts are. Does not know stores, nor how partitions are spread over shards.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from batching.errors import InvalidArgument
from shards.errors import SpecMismatch
from shards.leaves import Array, dtype_name
from shards.manifest import Stored
from shards.stored_rows import converted

__all__ = ["Rows", "Width", "cut"]

#: Rows of a table: an array ``[rows, dim]`` (NumPy, JAX, memory-mapped), or a callable from a
#: partition's index to an array, or to an iterable of arrays for what does not fit into memory.
Rows = Any | Callable[[int], Any]


def cut(rows: Rows, partitions: int) -> Iterator[Iterable[Array]]:
    """The pieces of every partition; an array is cut into ranges that differ by one row at most."""
    if callable(rows):
        for index in range(partitions):
            part = rows(index)
            # What has a shape is one array, although it could be iterated as several.
            yield [part] if hasattr(part, "shape") else part
        return
    array = rows if hasattr(rows, "shape") else np.asarray(rows)
    count = array.shape[0] if array.ndim else 0
    edges = [count * index // partitions for index in range(partitions + 1)]
    for start, stop in itertools.pairwise(edges):
        yield [array[start:stop]]


class Width:
    """What the rows of a table have in common.

    Args:
        table: its name, for messages.
        dtype: what rows are saved as; None for what they are.

    Attributes:
        stored: as of `TableUnit`.
        rows: rows seen so far.
    """

    def __init__(self, table: str, dtype: str | None = None) -> None:
        self._table = table
        self._dtype = dtype
        self.stored: Stored | None = None
        self._kind: tuple[str, int] | None = None
        self.rows = 0

    @property
    def kind(self) -> tuple[str, int]:
        """Dtype and dim.

        Raises:
            InvalidArgument: no rows were seen.
        """
        if self._kind is None:
            raise InvalidArgument(f"table {self._table!r} was given no array, so it has no width")
        return self._kind

    def checked(self, pieces: Iterable[Array]) -> Iterator[memoryview]:
        """The bytes of one piece after the other.

        Raises:
            SpecMismatch: a piece is not ``[rows, dim]``, or unlike the others.
        """
        for piece in pieces:
            array = np.asarray(piece)
            if array.ndim != 2 or array.shape[1] < 1:
                raise SpecMismatch(
                    f"table {self._table!r}: rows must be [rows, dim], got {list(array.shape)}"
                )
            dtype, dim = dtype_name(array.dtype), int(array.shape[1])
            if self._dtype is not None:
                array, dtype, self.stored = converted(self._table, array, dtype, self._dtype)
            kind = (dtype, dim)
            if self._kind not in (None, kind):
                raise SpecMismatch(
                    f"table {self._table!r}: rows of {kind} after rows of {self._kind}"
                )
            self._kind = kind
            self.rows += len(array)
            yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
