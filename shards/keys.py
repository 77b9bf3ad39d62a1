"""From what a request names a row by to where that row lies in its table.

Two steps, each optional, both pure functions of the table's number of rows, so that a router and
whoever writes the table work them out alike and nothing is kept:

* a *key* becomes a row number: an integer's 64 bits through the finaliser of SplitMix64, a text's
  UTF-8 bytes through XXH3-64 with seed 0, either modulo the rows. **Two keys may have one row**: of
  n keys over r rows each shares its row with others with probability 1 - exp(-(n - 1) / r).
* a row number becomes a *place*: its own, or, where rows are spread by hash, one of a fixed
  permutation of ``[0, rows)``. Partitions are ranges of places, so neighbours in number land in
  any of them, and partitions are as even as ranges are.

The permutation is a Feistel network of three rounds over the numbers ``left * side + right``, where
``side`` is the square root of the rows, rounded up; what it takes outside the rows goes through it
again, which happens to fewer than one number in ``side / 2``. These functions are part of the
format: saved tables depend on them, and they never change. Does not know partitions or shards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash

from batching.errors import InvalidArgument
from shards.errors import SpecMismatch

__all__ = ["hashed_rows", "numbers_at", "places_of"]

Words: TypeAlias = npt.NDArray[np.uint64]
Numbers: TypeAlias = npt.NDArray[np.int64]

#: Of SplitMix64's finaliser: shift, multiply, shift, multiply, shift.
_MIX_1: Final = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2: Final = np.uint64(0x94D049BB133111EB)
#: One for each round of the permutation: the first digits of the fraction of pi.
_ROUNDS: Final = tuple(
    np.uint64(key) for key in (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0)
)
_HALF: Final = np.uint64(32)


def hashed_rows(keys: Any, rows: int) -> Numbers:
    """The rows that keys have in a table of so many: what ``keys="hashed"`` and ``"string"`` mean.

    Args:
        keys: integers of any dtype (of 64 bits, whatever their sign) or ``str`` or ``bytes``; an
            array or a sequence of any shape.
        rows: of the table.

    Returns:
        int64, shaped like the keys.

    Raises:
        SpecMismatch: keys are neither integers nor text.
        InvalidArgument: a table without rows.
    """
    if rows < 1:
        raise InvalidArgument("a table without rows has none for any key")
    array = keys if isinstance(keys, np.ndarray) else np.asarray(keys)
    if array.dtype.kind in "US":
        array = np.asarray(keys, object)  # NumPy's own text drops zeros at its end
    if array.dtype.kind == "O":
        words = _text_words(array.reshape(-1).tolist())
    elif array.dtype.kind in "iu":
        # Wraps negative ones: a key is its bits, so the same one may come as int64 or as uint64.
        words = _mixed(array.reshape(-1).astype(np.uint64))
    else:
        raise SpecMismatch(f"keys must be integers or text, got {array.dtype}")
    return (words % np.uint64(rows)).astype(np.int64).reshape(array.shape)


def places_of(numbers: npt.NDArray[Any], rows: int) -> Numbers:
    """Where rows lie that are spread by hash.

    Args:
        numbers: integers in ``[0, rows)``, ``[n]``.
        rows: of the table.

    Returns:
        Distinct for distinct numbers, likewise in ``[0, rows)``.
    """
    side = _side(rows)
    places = _forward(numbers.astype(np.uint64), side)
    outside = np.flatnonzero(places >= rows)
    while len(outside):
        places[outside] = again = _forward(places[outside], side)
        outside = outside[again >= rows]
    return places.view(np.int64)


def numbers_at(places: npt.NDArray[Any], rows: int) -> Numbers:
    """Which rows lie at these places: `places_of` the other way round."""
    side = _side(rows)
    numbers = _backward(places.astype(np.uint64), side)
    outside = np.flatnonzero(numbers >= rows)
    while len(outside):
        numbers[outside] = again = _backward(numbers[outside], side)
        outside = outside[again >= rows]
    return numbers.view(np.int64)


def _side(rows: int) -> np.uint64:
    return np.uint64(math.isqrt(max(rows, 1) - 1) + 1)


def _forward(numbers: Words, side: np.uint64) -> Words:
    left, right = np.divmod(numbers, side)
    for key in _ROUNDS:
        left, right = right, (left + _tossed(right, key)) % side
    return left * side + right


def _backward(places: Words, side: np.uint64) -> Words:
    left, right = np.divmod(places, side)
    for key in reversed(_ROUNDS):
        left, right = (right + side - _tossed(left, key) % side) % side, left
    return left * side + right


def _tossed(words: Words, key: np.uint64) -> Words:
    """A number below 2**32 for each word."""
    found = (words + key) * _MIX_1
    found ^= found >> _HALF
    found *= _MIX_2
    found >>= _HALF
    return found


def _mixed(words: Words) -> Words:
    words = (words ^ (words >> np.uint64(30))) * _MIX_1
    words = (words ^ (words >> np.uint64(27))) * _MIX_2
    return words ^ (words >> np.uint64(31))


def _text_words(keys: Sequence[object]) -> Words:
    digest = xxhash.xxh3_64_intdigest
    # Text arrives as bytes at a router and as str from people.
    raw = (key.encode() if isinstance(key, str) else key for key in keys)
    try:
        return np.fromiter((digest(key) for key in raw), np.uint64, len(keys))  # type: ignore[arg-type]
    except TypeError:
        raise SpecMismatch("keys must be integers or text") from None
