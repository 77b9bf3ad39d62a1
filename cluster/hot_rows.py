"""Rows that were asked for often, kept at a router so that no shard is asked for them again.

Exact: a row is known by the content of its partition (base and overlays, by digest) and where in it
it lies, so a version that has other rows has other keys, and one that shares a partition shares its
rows. Nothing is ever invalidated; what is not asked for any more is replaced.

For each width of row there is one cache of four ways in arrays that are made once; a place whose
row was found since the hand passed it is spared once (CLOCK), so rows that are asked for once do
not drive out those that are asked for again. Decides what is kept, within a bound of bytes. Does
not know requests.
"""

from __future__ import annotations

import hashlib
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from shards.manifest import Partition, TableUnit
from shards.specs import dtype_of

__all__ = ["HotRows", "Key", "resized"]

Array = npt.NDArray[np.generic]
Words = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.int64]
Indices = npt.NDArray[np.intp]

_WAYS: Final = 4
_WAY: Final = np.arange(_WAYS)
#: Of a row besides its bytes: token, position, whether it was found; its part of a hand.
_ROW_EXTRA_BYTES: Final = 18
#: Rows of further widths are not kept: the bound is shared out evenly between widths.
_WIDTHS_MAX: Final = 8
#: Tables whose partitions' tokens are remembered; then all are worked out again.
_TABLES_MAX: Final = 256
_SPREAD: Final = np.uint64(0x9E3779B97F4A7C15)
_SHIFT: Final = np.uint64(32)


class Key(NamedTuple):
    """What rows ``[n]`` are known by: their partitions' tokens, and their places in these."""

    tokens: Words
    positions: Numbers

    def at(self, indices: Indices) -> Key:
        """Those of some of the rows."""
        return Key(self.tokens[indices], self.positions[indices])


class HotRows:
    """The rows that a router keeps.

    Args:
        bytes_max: of everything that is kept.

    Attributes:
        found: rows that were looked for and were here.
        missed: rows that were looked for and were not.
    """

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.found = 0
        self.missed = 0
        self._caches: dict[int, _Cache | None] = {}
        #: by content of a partition; a number is never given twice
        self._numbers: dict[bytes, int] = {}
        self._next_number = 1
        self._tokens: dict[str, Words] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays; never above the bound."""
        return sum(cache.nbytes for cache in self._caches.values() if cache is not None)

    def key_of(self, table: TableUnit, first_rows: Numbers, places: Numbers) -> Key:
        """What the rows at these places of a table are known by."""
        tokens = self._tokens.get(table.id)
        if tokens is None:
            tokens = self._tokens[table.id] = self._tokens_of(table)
        part = np.searchsorted(first_rows, places, side="right") - 1
        return Key(tokens[part], places - first_rows[part])

    def find(self, table: TableUnit, key: Key) -> tuple[Indices, Array] | None:
        """Which of these rows are kept, and the rows ``[found, dim]``; None if none is."""
        cache = self._cache_of(table)
        found = None if cache is None else cache.find(key)
        if found is None:
            self.missed += len(key.positions)
            return None
        at, rows = found
        self.found += len(at)
        self.missed += len(key.positions) - len(at)
        return at, rows.view(dtype_of(table.dtype))

    def keep(self, table: TableUnit, key: Key, rows: Array) -> None:
        """Keep some of these rows ``[n, dim]``, of which one may be there several times."""
        cache = self._cache_of(table)
        if cache is not None and len(rows):
            plain = np.ascontiguousarray(rows)
            cache.keep(key, plain.view(np.uint8).reshape(len(plain), -1))

    def _tokens_of(self, table: TableUnit) -> Words:
        """A number for the content of each partition."""
        if len(self._tokens) >= _TABLES_MAX:
            # What was kept under numbers that are forgotten is not found again, and is replaced.
            self._tokens.clear()
            self._numbers.clear()
        tokens = np.empty(len(table.partitions), np.uint64)
        for at, part in enumerate(table.partitions):
            content = _content(table, part)
            number = self._numbers.get(content)
            if number is None:
                number = self._numbers[content] = self._next_number
                self._next_number += 1
            tokens[at] = number
        # Multiplied by an odd number: still one for each, and no longer close to positions.
        return tokens * _SPREAD

    def _cache_of(self, table: TableUnit) -> _Cache | None:
        row_bytes = table.dim * dtype_of(table.dtype).itemsize
        if row_bytes not in self._caches:
            if len(self._caches) == _WIDTHS_MAX:
                return None
            # Seldom: a width is new where a version is. All begin anew with what each has now.
            widths = (*self._caches, row_bytes)
            share = self.bytes_max // len(widths)
            self._caches.clear()
            self._caches.update((width, _made(share, width)) for width in widths)
        return self._caches[row_bytes]


def resized(hot: HotRows | None, bytes_max: int) -> HotRows | None:
    """The same where its bound is the same; else a new one, none for a bound of 0."""
    if hot is not None and hot.bytes_max == bytes_max:
        return hot
    return HotRows(bytes_max) if bytes_max else None


class _Cache:
    """Rows of one width.

    Args:
        sets: a power of two; each has four places.
        row_bytes: of a row.
    """

    def __init__(self, sets: int, row_bytes: int) -> None:
        places = sets * _WAYS
        self._mask = np.uint64(sets - 1)
        self._tokens = np.zeros(places, np.uint64)
        self._positions = np.full(places, -1, np.int64)  # no row lies there
        self._was_found = np.zeros(places, bool)
        self._hands = np.zeros(sets, np.uint8)
        self._rows = np.zeros((places, row_bytes), np.uint8)

    @property
    def nbytes(self) -> int:
        arrays = (self._tokens, self._positions, self._was_found, self._hands, self._rows)
        return sum(array.nbytes for array in arrays)

    def find(self, key: Key) -> tuple[Indices, npt.NDArray[np.uint8]] | None:
        _, places, match = self._look(key)
        at = np.flatnonzero(match.any(axis=1))
        if not len(at):
            return None
        where = places[at, match[at].argmax(axis=1)]
        self._was_found[where] = True
        return at, self._rows[where]

    def keep(self, key: Key, rows: npt.NDArray[np.uint8]) -> None:
        sets, _, match = self._look(key)
        fresh = np.flatnonzero(~match.any(axis=1))
        # One row for each set at a time, so that none is written twice: another comes next time.
        chosen, first = np.unique(sets[fresh], return_index=True)
        mine = fresh[first]
        at = np.arange(len(mine))
        order = (self._hands[chosen][:, None] + _WAY) % _WAYS
        places = chosen[:, None] * _WAYS + order
        spared = self._was_found[places]
        turn = (~spared).argmax(axis=1)  # the hand's own, where all are spared
        passed = np.less(_WAY, turn[:, None]) | spared.all(axis=1, keepdims=True)
        self._was_found[places[passed]] = False
        where = places[at, turn]
        self._hands[chosen] = (order[at, turn] + 1) % _WAYS
        self._tokens[where] = key.tokens[mine]
        self._positions[where] = key.positions[mine]
        self._was_found[where] = False
        self._rows[where] = rows[mine]

    def _look(self, key: Key) -> tuple[Indices, Indices, npt.NDArray[np.bool_]]:
        """Of each row its set, the places of that, and in which of them the row is."""
        words = (key.tokens ^ key.positions.astype(np.uint64)) * _SPREAD
        sets = ((words ^ (words >> _SHIFT)) & self._mask).astype(np.intp)
        places = sets[:, None] * _WAYS + _WAY
        match = self._tokens[places] == key.tokens[:, None]
        match &= self._positions[places] == key.positions[:, None]
        return sets, places, match


def _made(bytes_max: int, row_bytes: int) -> _Cache | None:
    sets = bytes_max // (_WAYS * (row_bytes + _ROW_EXTRA_BYTES))
    return _Cache(1 << (sets.bit_length() - 1), row_bytes) if sets else None


def _content(table: TableUnit, part: Partition) -> bytes:
    """Equal only for partitions with the same rows, of the same type."""
    digests = " ".join(blob.digest for blob in part.blobs)
    text = f"{table.dtype} {table.dim} {table.stored} {part.rows} {digests}"
    return hashlib.blake2b(text.encode(), digest_size=32).digest()
