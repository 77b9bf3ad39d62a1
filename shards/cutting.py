"""Rows of a table, cut into partitions and checked to be alike while they stream into a store.

Decides where the cuts are. Does not know stores, nor how partitions are spread over shards.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import numpy as np

from batching.errors import InvalidArgument
from shards.errors import SpecMismatch
from shards.keys import numbers_at, places_of
from shards.leaves import Array, dtype_name
from shards.manifest import Scheme, Stored, TableUnit
from shards.stored_rows import converted

__all__ = ["Rows", "Width", "column_edges", "cut", "in_order"]

#: Of rows that are put together anew, at a time.
_CHUNK_BYTES: Final = 16 << 20

#: Rows of a table: an array ``[rows, dim]`` (NumPy, JAX, memory-mapped), or a callable from a
#: partition's index to an array, or to an iterable of arrays for what does not fit into memory.
Rows = Any | Callable[[int], Any]


def cut(rows: Rows, partitions: int, scheme: Scheme = "range") -> Iterator[Iterable[Array]]:
    """The pieces of every partition, in the order in which rows lie in it.

    An array is cut into ranges that differ by one row, or one column, at most.

    Raises:
        InvalidArgument: rows come by partition, but which rows a partition has is not known before
            all of them are; or there are more partitions than columns.
        SpecMismatch: columns of what is not ``[rows, dim]``.
    """
    if callable(rows):
        if scheme != "range":
            raise InvalidArgument(
                f"rows that are given partition by partition cannot be cut by {scheme}: give an "
                f"array (one that is mapped need not fit into memory)"
            )
        for index in range(partitions):
            part = rows(index)
            # What has a shape is one array, although it could be iterated as several.
            yield [part] if hasattr(part, "shape") else part
        return
    array = rows if hasattr(rows, "shape") else np.asarray(rows)
    if scheme == "columns":
        edges = column_edges(array, partitions)
        yield from (_columns(array, *edge) for edge in itertools.pairwise(edges))
        return
    count = array.shape[0] if array.ndim else 0
    edges = [count * index // partitions for index in range(partitions + 1)]
    for start, stop in itertools.pairwise(edges):
        yield [array[start:stop]] if scheme == "range" else _spread(np.asarray(array), start, stop)


def column_edges(array: Any, partitions: int) -> list[int]:
    """Where the columns of each partition begin, and where the last ones end.

    Raises:
        SpecMismatch: this is no table of rows.
        InvalidArgument: there are fewer columns than partitions, or no rows.
    """
    if array.ndim != 2:
        raise SpecMismatch(f"rows must be [rows, dim], got {list(array.shape)}")
    if not len(array) or array.shape[1] < partitions:
        raise InvalidArgument(f"{list(array.shape)} cannot be cut into {partitions} by columns")
    return [array.shape[1] * index // partitions for index in range(partitions + 1)]


def in_order(unit: TableUnit, partitions: Iterable[Iterable[Array]]) -> Iterator[Array]:
    """The rows of a table in the order of their numbers, in pieces: `cut` the other way round.

    Args:
        unit: the table.
        partitions: for each its rows, in the order in which they lie there.
    """
    if unit.scheme == "range":
        yield from itertools.chain.from_iterable(partitions)
        return
    whole = [np.concatenate(list(pieces)) for pieces in partitions]
    if unit.scheme == "columns":
        yield np.concatenate(whole, axis=1)
    else:
        yield np.concatenate(whole)[places_of(np.arange(unit.rows), unit.rows)]


def _columns(array: Any, start: int, stop: int) -> Iterator[Array]:
    step = _step(array)
    for at in range(0, len(array), step):
        yield np.asarray(array[at : at + step, start:stop])


def _spread(array: Array, start: int, stop: int) -> Iterator[Array]:
    """The rows that lie in these places, of a table that is spread by hash."""
    step = _step(array)
    # A partition without rows still says how wide they are.
    for at in range(start, max(stop, start + 1), step):
        yield array[numbers_at(np.arange(at, min(at + step, stop)), len(array))]


def _step(array: Any) -> int:
    return max(_CHUNK_BYTES // max(int(array[:1].nbytes), 1), 1)


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
