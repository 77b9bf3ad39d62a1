"""Look-ups in compiled code: rows copied or pooled from where they lie in memory, with prefetch.

Random rows of a large table are bound by the latency of memory, so the address of every row is
worked out some ids ahead and its cache lines are asked for before they are needed. Rows of a bag
are added in 32 bits in the order of its ids: the same ids give the same bits, whoever adds them.

Importing this module compiles everything, for these types of arguments and no others, so that
nothing is compiled when it is called. That is kept on disk beside this file (or in the user's
cache, where that cannot be written), as Python keeps bytecode. The interpreter's lock is free while
a kernel runs. This file knows addresses: who calls sees to it that they are valid, and that what is
behind them stays. It does not know units or threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final, TypeVar, cast

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = ["ELEMENTS", "MAX", "PATCH_COLUMNS", "SUM", "copy", "pool"]

#: What is done with the rows of a bag.
SUM: Final = 0
MAX: Final = 1

#: What can be pooled: dtype of the elements to how the kernel knows it.
ELEMENTS: Final = {"float32": 0, "float16": 1, "bfloat16": 2}

#: Of a partition: how many rows are replaced, then addresses of their positions, of where each is
#: among all overlays' rows (0 where there is one overlay), of the first row of every overlay among
#: these, of the addresses of their rows; and how many overlays there are.
PATCH_COLUMNS: Final = 6

#: Rows that are asked for ahead; 8 to 48 were tried, and made little difference.
_AHEAD: Final = 12
#: Addresses that are kept: a power of two, over `_AHEAD` and the rows that are added at once.
_RING: Final = 32
_LINE: Final = 64

_F = TypeVar("_F", bound=Callable[..., Any])


def _njit(signatures: Any, fn: _F) -> _F:
    """`numba.njit`, with executables kept on disk where there is a place for them."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False}
    try:
        return cast(_F, njit(signatures, cache=True, **options)(fn))
    except RuntimeError:  # no folder that could be written: it is compiled in every process
        return cast(_F, njit(signatures, **options)(fn))


def _compiled(fn: _F) -> _F:
    """What only compiled code calls.

    It is given addresses instead of arrays where it is called for every row: the references to an
    array are counted, atomically, and for five of them that took 20 ns, four times the adding.
    """
    return cast(_F, njit(nogil=True, error_model="numpy", boundscheck=False)(fn))


def _pointer(element: types.Type, bits: ir.Type) -> Any:
    """A function of compiled code from an address to a pointer to such elements."""

    @intrinsic  # type: ignore[untyped-decorator]
    def pointer(context: Any, address: Any) -> Any:
        def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], bits.as_pointer())

        return types.CPointer(element)(types.int64), generate

    return pointer


_floats = _pointer(types.float32, ir.FloatType())
_words = _pointer(types.int64, ir.IntType(64))
_halves = _pointer(types.uint16, ir.IntType(16))
_bytes = _pointer(types.uint8, ir.IntType(8))


@intrinsic  # type: ignore[untyped-decorator]
def _prefetch(context: Any, address: Any) -> Any:
    """Ask for the cache line of an address, for reading, in every cache."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        line = builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [line.type, word, word, word])
        fn = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(fn, [line, word(0), word(3), word(1)])

    return types.void(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _float_of_bits(context: Any, bits: Any) -> Any:
    """The 32-bit float that has these bits."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@_compiled
def _of_half(bits: Any) -> Any:
    """A 16-bit float in 32 bits, exactly; no instruction that only some processors have."""
    wide = np.uint32(bits)
    sign = np.uint32((wide & np.uint32(0x8000)) << np.uint32(16))
    low = np.uint32((wide & np.uint32(0x7FFF)) << np.uint32(13))
    if (wide & np.uint32(0x7C00)) == np.uint32(0x7C00):  # infinities and NaN
        return _float_of_bits(np.uint32(sign | low | np.uint32(0x7F800000)))
    # As if it were a float of the wider exponent, then scaled: right for subnormal ones, too.
    magnitude = _float_of_bits(low) * _float_of_bits(np.uint32(0x77800000))
    return -magnitude if sign else magnitude


@_compiled
def _of_bfloat(bits: Any) -> Any:
    return _float_of_bits(np.uint32(np.uint32(bits) << np.uint32(16)))


@_compiled
def _replaced(where: Any, position: Any, row_bytes: Any) -> Any:
    """Where the row lies that replaces the one at this position; 0 if none does."""
    patch = carray(_words(where), PATCH_COLUMNS)
    count = patch[0]
    positions = carray(_words(patch[1]), count)
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
    firsts = carray(_words(patch[3]), overlays)
    bases = carray(_words(patch[4]), overlays)
    at = low
    if patch[2]:
        at = carray(_words(patch[2]), count)[low]
    overlay = overlays - 1
    while firsts[overlay] > at:
        overlay -= 1
    return bases[overlay] + (at - firsts[overlay]) * row_bytes


@_compiled
def _address(
    ident: Any, parts: Any, firsts: Any, stops: Any, bases: Any, patches: Any, row_bytes: Any
) -> Any:
    """Where the row of an id lies; 0 if no partition has it. The four in the middle: addresses."""
    first = carray(_words(firsts), parts)
    part, width = 0, parts
    while width > 1:
        half = width >> 1
        if first[part + half] <= ident:
            part += half
        width -= half
    if ident < first[part] or ident >= carray(_words(stops), parts)[part]:
        return 0
    position = ident - first[part]
    patch = patches + part * 8 * PATCH_COLUMNS
    if carray(_words(patch), 1)[0]:
        found = _replaced(patch, position, row_bytes)
        if found:
            return found
    return carray(_words(bases), parts)[part] + position * row_bytes


@_compiled
def _add(out: Any, address: Any, element: Any, weight: Any) -> None:
    """Add one row; a weight of 1 changes no bit of it."""
    dim = len(out)
    if element == 0:
        row = carray(_floats(address), dim)
        for d in range(dim):
            out[d] += weight * row[d]
    elif element == 1:
        half = carray(_halves(address), dim)
        for d in range(dim):
            out[d] += weight * _of_half(half[d])
    else:
        half = carray(_halves(address), dim)
        for d in range(dim):
            out[d] += weight * _of_bfloat(half[d])


@_compiled
def _raise_to(out: Any, address: Any, element: Any, is_first: Any) -> None:
    """Take the greater of every two elements; NaN where either is."""
    for d in range(len(out)):
        if element == 0:
            value = carray(_floats(address), len(out))[d]
        elif element == 1:
            value = _of_half(carray(_halves(address), len(out))[d])
        else:
            value = _of_bfloat(carray(_halves(address), len(out))[d])
        if is_first or value > out[d] or value != value:
            out[d] = value


@_compiled
def _add_four(out: Any, ring: Any, at: Any) -> None:
    """Add four rows, one after the other, while each element of the sum is in a register."""
    dim = len(out)
    one = carray(_floats(ring[at & (_RING - 1)]), dim)
    two = carray(_floats(ring[(at + 1) & (_RING - 1)]), dim)
    three = carray(_floats(ring[(at + 2) & (_RING - 1)]), dim)
    four = carray(_floats(ring[(at + 3) & (_RING - 1)]), dim)
    for d in range(dim):
        out[d] = (((out[d] + one[d]) + two[d]) + three[d]) + four[d]


_IDS: Final = types.Array(types.int64, 1, "C", readonly=True)
_SHORT_IDS: Final = types.Array(types.int32, 1, "C", readonly=True)
_WORDS: Final = types.Array(types.int64, 1, "C", readonly=True)
_TABLE: Final = (_WORDS, _WORDS, _WORDS, types.Array(types.int64, 2, "C", readonly=True))
_WEIGHTS: Final = types.Array(types.float32, 1, "C", readonly=True)
_COPIED: Final = types.Array(types.uint8, 2, "C")
_POOLED: Final = types.Array(types.float32, 2, "C")
_COUNT: Final = types.int64


def _entry(*signatures: Any) -> Callable[[_F], _F]:
    """What Python calls: compiled for these signatures and, later, for no other."""
    return functools.partial(_njit, list(signatures))


@_entry(types.int64(_IDS, *_TABLE, _COUNT, _COUNT, _COPIED))
def copy(
    ids: Any, firsts: Any, stops: Any, bases: Any, patches: Any, start: Any, stop: Any, out: Any
) -> Any:
    """Copy the rows of some ids.

    Args:
        ids: int64 ``[n]``.
        firsts: int64 ``[p]``: first id of every partition, ascending, ``p >= 1``.
        stops: int64 ``[p]``: after the last id of each.
        bases: int64 ``[p]``: where its rows lie.
        patches: int64 ``[p, PATCH_COLUMNS]``.
        start: the first id to copy the row of.
        stop: after the last.
        out: uint8 ``[n, bytes of a row]``.

    Returns:
        -1, or the place of an id that is in no partition.
    """
    row_bytes = out.shape[1]
    parts, first, after = len(firsts), firsts.ctypes.data, stops.ctypes.data
    base, patch = bases.ctypes.data, patches.ctypes.data
    ring = np.empty(_RING, np.int64)
    ahead = start
    for at in range(start, stop):
        until = min(stop, at + _AHEAD)
        while ahead < until:
            found = _address(ids[ahead], parts, first, after, base, patch, row_bytes)
            if found == 0:
                return ahead
            ring[ahead & (_RING - 1)] = found
            for line in range(0, row_bytes, _LINE):
                _prefetch(found + line)
            ahead += 1
        source = carray(_bytes(ring[at & (_RING - 1)]), row_bytes)
        row = out[at]
        for index in range(row_bytes):
            row[index] = source[index]
    return -1


@_entry(
    *[
        types.int64(ids, *_TABLE, _WORDS, _WEIGHTS, *[_COUNT] * 5, _POOLED)
        for ids in (_IDS, _SHORT_IDS)
    ]
)
def pool(
    ids: Any,
    firsts: Any,
    stops: Any,
    bases: Any,
    patches: Any,
    offsets: Any,
    weights: Any,
    start: Any,
    stop: Any,
    row_bytes: Any,
    element: Any,
    op: Any,
    out: Any,
) -> Any:
    """Add up, or take the greatest of, the rows of some bags; nothing of a bag without ids is 0.

    Args:
        ids: int32 or int64 ``[n]``.
        firsts: as in `copy`.
        stops: as in `copy`.
        bases: as in `copy`.
        patches: as in `copy`.
        offsets: int64 ``[bags + 1]``: where each bag's ids begin, and where the last one's end.
        weights: float32 ``[n]`` for `SUM`, or ``[0]`` for none.
        start: the first bag to do.
        stop: after the last.
        row_bytes: of a row in memory.
        element: one of `ELEMENTS`.
        op: `SUM` or `MAX`.
        out: float32 ``[bags, dim]``.

    Returns:
        -1, or the place of an id that is in no partition.
    """
    parts, first, after = len(firsts), firsts.ctypes.data, stops.ctypes.data
    base, patch = bases.ctypes.data, patches.ctypes.data
    ring = np.empty(_RING, np.int64)
    last = offsets[stop]
    ahead = offsets[start]
    for bag in range(start, stop):
        row = out[bag]
        at, end = offsets[bag], offsets[bag + 1]
        row[:] = 0
        while at < end:
            until = min(last, at + _AHEAD)
            while ahead < until:
                found = _address(ids[ahead], parts, first, after, base, patch, row_bytes)
                if found == 0:
                    return ahead
                ring[ahead & (_RING - 1)] = found
                for line in range(0, row_bytes, _LINE):
                    _prefetch(found + line)
                ahead += 1
            if op == MAX:
                _raise_to(row, ring[at & (_RING - 1)], element, at == offsets[bag])
                at += 1
            elif len(weights) or element or at + 4 > end:
                weight = weights[at] if len(weights) else np.float32(1)
                _add(row, ring[at & (_RING - 1)], element, weight)
                at += 1
            else:
                _add_four(row, ring, at)
                at += 4
    return -1
