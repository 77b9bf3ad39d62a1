"""Look-ups in compiled code: rows copied or pooled from where they lie in memory, with prefetch.

Random rows of a large table are bound by the latency of memory, so the address of every row is
worked out some ids ahead and its cache lines are asked for before they are needed. Rows of a bag
are added in 32 bits in the order of its ids: the same ids give the same bits, whoever adds them.

Importing this module compiles everything, for these types of arguments and no others, so that
nothing is compiled when it is called. That is kept in the user's cache, see `shards.kernel_cache`.
The interpreter's lock is free while a kernel runs. This file knows addresses: who calls sees to it
that they are valid, and that what is behind them stays. It does not know units or threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import numpy as np
from numba import carray, njit, types

from shards import instructions
from shards.compiling.cache import ProgramCache
from shards.instructions import (
    RING,
    add_rows,
    bytes_at,
    claim,
    float_of_bits,
    floats_at,
    halves_at,
    numbers_at,
    prefetch,
    words_at,
)
from shards.kernel_cache import compiled
from shards.remote import user_cache_directory
from shards.stored_rows import SCALE_BYTES

__all__ = ["ELEMENTS", "MAX", "PATCH_COLUMNS", "SCALED", "SUM", "TABLE_COLUMNS", "copy", "pool"]

#: What is done with the rows of a bag.
SUM: Final = 0
MAX: Final = 1

#: What can be pooled: dtype of the elements to how the kernel knows it.
ELEMENTS: Final = {"float32": 0, "float16": 1, "bfloat16": 2, "scaled int8": 3}
#: Rows of int8 behind a float32 scale (`shards.stored_rows`).
SCALED: Final = "scaled int8"

#: Of a partition: how many rows are replaced, then addresses of their positions, of where each is
#: among all overlays' rows (0 where there is one overlay), of the first row of every overlay among
#: these, of the addresses of their rows; and how many overlays there are.
PATCH_COLUMNS: Final = 6

#: Of a table: how many partitions are held; addresses of the first id of each (ascending; then of
#: the greatest number that there is), of the one after its last, of where its rows lie, of its
#: patch (0 if there is none in all of them); bytes of a row; one of `ELEMENTS`, or -1 for rows that
#: are never pooled; the pitch of its partitions (`shards.pitches`), or 0.
TABLE_COLUMNS: Final = 8

#: Rows that are asked for ahead: 24 and 32 were as good as each other, 12 and 16 worse.
_AHEAD: Final = 24
#: Rows that are added at once.
_RUN: Final = 8
assert _AHEAD + _RUN <= RING
_LINE: Final = 64

_OPTIONS: Final[dict[str, Any]] = {
    "nogil": True,
    "error_model": "numpy",
    "boundscheck": False,
}

_F = TypeVar("_F", bound=Callable[..., Any])


def _compiled(fn: _F) -> _F:
    """What only compiled code calls.

    It is given addresses instead of arrays where it is called for every row: the references to an
    array are counted, atomically, and for five of them that took 20 ns, four times the adding.
    """
    return cast(_F, njit(**_OPTIONS)(fn))


@_compiled
def _of_half(bits: Any) -> Any:
    """A 16-bit float in 32 bits, exactly; no instruction that only some processors have."""
    wide = np.uint32(bits)
    sign = np.uint32((wide & np.uint32(0x8000)) << np.uint32(16))
    low = np.uint32((wide & np.uint32(0x7FFF)) << np.uint32(13))
    if (wide & np.uint32(0x7C00)) == np.uint32(0x7C00):  # infinities and NaN
        return float_of_bits(np.uint32(sign | low | np.uint32(0x7F800000)))
    # As if it were a float of the wider exponent, then scaled: right for subnormal ones, too.
    magnitude = float_of_bits(low) * float_of_bits(np.uint32(0x77800000))
    return -magnitude if sign else magnitude


@_compiled
def _of_bfloat(bits: Any) -> Any:
    return float_of_bits(np.uint32(np.uint32(bits) << np.uint32(16)))


@_compiled
def _replaced(where: Any, position: Any, row_bytes: Any) -> Any:
    """Where the row lies that replaces the one at this position; 0 if none does."""
    patch = carray(words_at(where), PATCH_COLUMNS)
    count = patch[0]
    positions = carray(words_at(patch[1]), count)
    low, high = 0, count
    while low < high:
        middle = (low + high) >> 1
        if positions[middle] < position:
            low = middle + 1
        else:
            high = middle
    if low == count or positions[low] != position:
        return 0
    overlays = patch[5]
    firsts = carray(words_at(patch[3]), overlays)
    bases = carray(words_at(patch[4]), overlays)
    at = low
    if patch[2]:
        at = carray(words_at(patch[2]), count)[low]
    overlay = overlays - 1
    while firsts[overlay] > at:
        overlay -= 1
    return bases[overlay] + (at - firsts[overlay]) * row_bytes


@_compiled
def _part_of(ident: Any, parts: Any, firsts: Any, pitch: Any) -> Any:
    """The partition of an id that is not before the first one, nor behind the last."""
    first = carray(words_at(firsts), parts + 1)
    if pitch:
        guess = np.int64(np.float64(ident - first[0]) * (1.0 / np.float64(pitch)))
        return guess + np.int64(first[guess + 1] <= ident)
    part, width = 0, parts
    while width > 1:
        half = width >> 1
        if first[part + half] <= ident:
            part += half
        width -= half
    return part


@_compiled
def _address(
    ident: Any, parts: Any, firsts: Any, stops: Any, bases: Any, patches: Any, pitch: Any,
    row_bytes: Any,
) -> Any:  # fmt: skip
    """Where the row of an id lies; 0 if no partition has it. As in `TABLE_COLUMNS`."""
    first, stop = carray(words_at(firsts), parts), carray(words_at(stops), parts)
    if ident < first[0] or ident >= stop[parts - 1]:
        return 0
    part = _part_of(ident, parts, firsts, pitch)
    if ident >= stop[part]:
        return 0
    position = ident - first[part]
    if patches:
        patch = patches + part * 8 * PATCH_COLUMNS
        if carray(words_at(patch), 1)[0]:
            found = _replaced(patch, position, row_bytes)
            if found:
                return found
    return carray(words_at(bases), parts)[part] + position * row_bytes


@_compiled
def _add(out: Any, address: Any, element: Any, weight: Any) -> None:
    """Add one row; a weight of 1 changes no bit of it."""
    dim = len(out)
    if element == 0:
        row = carray(floats_at(address), dim)
        for d in range(dim):
            out[d] += weight * row[d]
    elif element == 1:
        half = carray(halves_at(address), dim)
        for d in range(dim):
            out[d] += weight * _of_half(half[d])
    elif element == 2:
        half = carray(halves_at(address), dim)
        for d in range(dim):
            out[d] += weight * _of_bfloat(half[d])
    else:
        scale = carray(floats_at(address), 1)[0]
        number = carray(numbers_at(address + SCALE_BYTES), dim)
        for d in range(dim):
            out[d] += weight * (scale * np.float32(number[d]))


@_compiled
def _raise_to(out: Any, address: Any, element: Any, is_first: Any) -> None:
    """Take the greater of every two elements; NaN where either is."""
    for d in range(len(out)):
        if element == 0:
            value = carray(floats_at(address), len(out))[d]
        elif element == 1:
            value = _of_half(carray(halves_at(address), len(out))[d])
        elif element == 2:
            value = _of_bfloat(carray(halves_at(address), len(out))[d])
        else:
            number = carray(numbers_at(address + SCALE_BYTES), len(out))[d]
            value = carray(floats_at(address), 1)[0] * np.float32(number)
        if is_first or value > out[d] or value != value:
            out[d] = value


@_compiled
def _resolve(
    ids: Any, parts: Any, firsts: Any, stops: Any, bases: Any, patches: Any, pitch: Any,
    row_bytes: Any, start: Any, stop: Any, slots: Any,
) -> Any:  # fmt: skip
    """Put addresses of the rows of some ids on the ring; -1, or the place of an unknown id."""
    if parts == 1 and patches == 0:
        base, first = carray(words_at(bases), 1)[0], carray(words_at(firsts), 1)[0]
        rows = carray(words_at(stops), 1)[0] - first
        for at in range(start, stop):
            position = np.int64(ids[at]) - first
            if position < 0 or position >= rows:
                return at
            slots[at & (RING - 1)] = base + position * row_bytes
        return -1
    for at in range(start, stop):
        ident = np.int64(ids[at])
        found = _address(ident, parts, firsts, stops, bases, patches, pitch, row_bytes)
        if found == 0:
            return at
        slots[at & (RING - 1)] = found
    return -1


@_compiled
def _ask(ring: Any, start: Any, stop: Any, row_bytes: Any) -> None:
    """Prefetch some rows of the ring."""
    slots = carray(words_at(ring), RING)
    for at in range(start, stop):
        for line in range(0, row_bytes, _LINE):
            prefetch(slots[at & (RING - 1)] + line)


_IDS: Final = types.Array(types.int64, 1, "C", readonly=True)
_SHORT_IDS: Final = types.Array(types.int32, 1, "C", readonly=True)
_WORDS: Final = types.Array(types.int64, 1, "C", readonly=True)
_TABLES: Final = types.Array(types.int64, 2, "C", readonly=True)
_WEIGHTS: Final = types.Array(types.float32, 1, "C", readonly=True)
_CLAIMED: Final = types.Array(types.int64, 1, "C")
_COPIED: Final = types.Array(types.uint8, 2, "C")
_POOLED: Final = types.Array(types.float32, 2, "C")
_COUNT: Final = types.int64


def _entry(*signatures: Any) -> Callable[[_F], _F]:
    """What Python calls: compiled for these signatures and, later, for no other."""
    cache = ProgramCache(user_cache_directory(), "kernels")
    sources = [Path(__file__), Path(instructions.__file__)]
    return functools.partial(
        compiled, signatures=signatures, cache=cache, sources=sources, **_OPTIONS
    )


@_compiled
def _copy_range(ids: Any, table: Any, start: Any, stop: Any, out: Any) -> Any:
    parts, firsts, stops, bases, patches = table[0], table[1], table[2], table[3], table[4]
    row_bytes, pitch = out.shape[1], table[7]
    slots = np.zeros(RING, np.int64)
    ring = slots.ctypes.data
    ahead, asked = start, start
    for at in range(start, stop):
        if at + _AHEAD >= ahead and ahead < stop:
            until = min(stop, at + _AHEAD + _RUN)
            wrong = _resolve(
                ids, parts, firsts, stops, bases, patches, pitch, row_bytes, ahead, until, slots
            )
            if wrong >= 0:
                return wrong
            ahead = until
        until = min(ahead, at + _AHEAD + 1)
        _ask(ring, asked, until, row_bytes)
        asked = until
        source = carray(bytes_at(slots[at & (RING - 1)]), row_bytes)
        row = out[at]
        for index in range(row_bytes):
            row[index] = source[index]
    return -1


@_entry(types.int64(_IDS, _TABLES, _CLAIMED, _COUNT, _COPIED))
def copy(ids: Any, tables: Any, claimed: Any, step: Any, out: Any) -> Any:
    """Copy the rows of ids, some at a time, until all have been claimed by who calls this.

    Args:
        ids: int64 ``[n]``.
        tables: int64 ``[1, TABLE_COLUMNS]``.
        claimed: int64 ``[1]``: how many are done, or being done; shared by all who do them.
        step: how many ids are claimed at once.
        out: uint8 ``[n, bytes of a row]``.

    Returns:
        -1, or the place of an id that is in no partition.
    """
    while True:
        start = claim(claimed.ctypes.data, step)
        if start >= len(ids):
            return -1
        stop = min(len(ids), start + step)
        wrong = _copy_range(ids, tables[0], start, stop, out)
        if wrong >= 0:
            return wrong


@_compiled
def _pool_range(
    ids: Any, table: Any, offsets: Any, weights: Any, start: Any, stop: Any, op: Any,
    slots: Any, out: Any,
) -> Any:  # fmt: skip
    parts, firsts, stops, bases, patches = table[0], table[1], table[2], table[3], table[4]
    row_bytes, element, pitch = table[5], table[6], table[7]
    ring = slots.ctypes.data
    dim = out.shape[1]
    last = offsets[stop]
    ahead, asked = offsets[start], offsets[start]
    simple = op == SUM and element == 0 and len(weights) == 0
    for bag in range(start, stop):
        row = out[bag]
        at, end = offsets[bag], offsets[bag + 1]
        row[:] = 0
        while at < end:
            count = min(_RUN, end - at)
            until = min(last, at + count + _AHEAD)
            wrong = _resolve(
                ids, parts, firsts, stops, bases, patches, pitch, row_bytes, ahead, until, slots
            )
            if wrong >= 0:
                return wrong
            ahead = until
            if simple:
                # Rows are asked for while others are added; before the first ones nothing is.
                if asked == offsets[start]:
                    asked = min(ahead, at + _AHEAD)
                    _ask(ring, at, asked, row_bytes)
                add_rows(out.ctypes.data + bag * dim * 4, ring, at, count, _AHEAD, dim)
                at += count
                continue
            _ask(ring, asked, ahead, row_bytes)
            asked = ahead
            for each in range(at, at + count):
                address = slots[each & (RING - 1)]
                if op == MAX:
                    _raise_to(row, address, element, each == offsets[bag])
                else:
                    weight = weights[each] if len(weights) else np.float32(1)
                    _add(row, address, element, weight)
            at += count
    return -1


@_compiled
def _run_of(edges: Any, bag: Any) -> Any:
    """The last run of bags that begins at this one, or before."""
    low, high = 0, len(edges) - 1
    while high - low > 1:
        middle = (low + high) >> 1
        if edges[middle] <= bag:
            low = middle
        else:
            high = middle
    return low


@_entry(
    *[
        types.int64(ids, _TABLES, _WORDS, _WORDS, _WEIGHTS, _CLAIMED, _COUNT, _COUNT, _POOLED)
        for ids in (_IDS, _SHORT_IDS)
    ]
)
def pool(
    ids: Any, tables: Any, edges: Any, offsets: Any, weights: Any, claimed: Any, step: Any,
    op: Any, out: Any,
) -> Any:  # fmt: skip
    """Add up, or take the greatest of, the rows of bags; nothing of a bag without ids is 0.

    Args:
        ids: int32 or int64 ``[n]``.
        tables: int64 ``[t, TABLE_COLUMNS]``, whose rows have as many elements.
        edges: int64 ``[runs + 1]``: where each run of bags begins, and where the last one ends. The
            first is of the first table, the next of the next one, and after the last it begins
            again; a run may be empty.
        offsets: int64 ``[bags + 1]``: where each bag's ids begin, and where the last one's end.
        weights: float32 ``[n]`` for `SUM`, or ``[0]`` for none.
        claimed: as in `copy`, of bags.
        step: how many bags are claimed at once.
        op: `SUM` or `MAX`.
        out: float32 ``[bags, dim]``.

    Returns:
        -1, or the place of an id that is in no partition of its table.
    """
    slots = np.zeros(RING, np.int64)
    while True:
        start = claim(claimed.ctypes.data, step)
        if start >= len(out):
            return -1
        stop = min(len(out), start + step)
        run = _run_of(edges, start)
        while start < stop:
            until = min(stop, edges[run + 1])
            if until > start:
                table = tables[run % len(tables)]
                wrong = _pool_range(ids, table, offsets, weights, start, until, op, slots, out)
                if wrong >= 0:
                    return wrong
                start = until
            run += 1
