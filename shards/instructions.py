"""What compiled look-ups need and Python has no words for: addresses, prefetches, vectors, claims.

Each is a piece of LLVM's language that `numba` puts where it is called. Sums are kept in registers
of sixteen floats; a processor that has narrower ones takes several. Nothing here checks an address.
"""

from __future__ import annotations

from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = [
    "RING",
    "add_rows",
    "bytes_at",
    "claim",
    "float_of_bits",
    "floats_at",
    "halves_at",
    "numbers_at",
    "prefetch",
    "words_at",
]

#: Addresses of rows that are kept: a power of two.
RING: Final = 64
_LINE: Final = 64
_LANES: Final = 16
#: Vectors of a block of columns: their sums stay in registers while rows are added.
_VECTORS: Final = 4

_WORD: Final = ir.IntType(64)
_FLOAT: Final = ir.FloatType()
_VECTOR: Final = ir.VectorType(_FLOAT, _LANES)


def _pointer(element: types.Type, bits: ir.Type) -> Any:
    """A function of compiled code from an address to a pointer to such elements."""

    @intrinsic  # type: ignore[untyped-decorator]
    def pointer(context: Any, address: Any) -> Any:
        def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], bits.as_pointer())

        return types.CPointer(element)(types.int64), generate

    return pointer


floats_at = _pointer(types.float32, _FLOAT)
words_at = _pointer(types.int64, _WORD)
halves_at = _pointer(types.uint16, ir.IntType(16))
bytes_at = _pointer(types.uint8, ir.IntType(8))
numbers_at = _pointer(types.int8, ir.IntType(8))


def _prefetch(builder: Any, address: Any) -> None:
    """Ask for a cache line, into the second cache and not the first.

    The first can wait for a dozen or two lines at once, the second for several times as many: that
    many are what hides the latency of memory. From there a row is a few nanoseconds away.
    """
    word = ir.IntType(32)
    line = builder.inttoptr(address, ir.IntType(8).as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [line.type, word, word, word])
    fn = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(fn, [line, word(0), word(2), word(1)])


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(context: Any, address: Any) -> Any:
    """Ask for the cache line of an address, for reading."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _prefetch(builder, arguments[0])

    return types.void(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def float_of_bits(context: Any, bits: Any) -> Any:
    """The 32-bit float that has these bits."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _FLOAT)

    return types.float32(types.uint32), generate


@intrinsic  # type: ignore[untyped-decorator]
def claim(context: Any, address: Any, count: Any) -> Any:
    """Add to the number at an address, before any other thread does; what it was."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = builder.inttoptr(arguments[0], _WORD.as_pointer())
        return builder.atomic_rmw("add", number, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def add_rows(context: Any, out: Any, ring: Any, at: Any, count: Any, ahead: Any, dim: Any) -> Any:
    """Add rows of floats to one, in their order, and ask for what lies some rows ahead of each.

    Args of compiled code, all int64: the address of the sum; of a ring of `RING` addresses of rows;
    the number of the first row; how many; how far ahead rows are asked for; floats of a row.
    """

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        dim = arguments[5]
        wide = builder.and_(dim, _WORD(-_VECTORS * _LANES))
        narrow = builder.and_(dim, _WORD(-_LANES))
        for start, stop, kind, count in (
            (_WORD(0), wide, _VECTOR, _VECTORS),
            (wide, narrow, _VECTOR, 1),
            (narrow, dim, _FLOAT, 1),
        ):
            step = _WORD(count * (_LANES if kind is _VECTOR else 1))
            with cgutils.for_range_slice(builder, start, stop, step, _WORD) as (column, _):
                _add_columns(builder, arguments, column, kind, count)

    return types.void(*[types.int64] * 6), generate


def _add_columns(builder: Any, arguments: Any, column: Any, kind: ir.Type, count: int) -> None:
    """Add some columns of the rows: ``count`` elements of a kind, each in a register."""
    out, ring, at, rows, ahead, _ = arguments
    start = builder.shl(column, _WORD(2))
    step = 4 * (_LANES if kind is _VECTOR else 1)
    # Single floats are in one line: it is asked for with the first of every sixteen.
    asks = None if kind is _VECTOR else builder.and_(column, _WORD(_LANES - 1))

    def place(row: Any, index: int) -> Any:
        address = builder.add(builder.add(row, start), _WORD(step * index))
        return builder.inttoptr(address, kind.as_pointer())

    def load(row: Any, index: int) -> Any:
        found = builder.load(place(row, index))
        found.align = 4
        return found

    def row_of(number: Any) -> Any:
        slot = builder.shl(builder.and_(number, _WORD(RING - 1)), _WORD(3))
        return builder.load(builder.inttoptr(builder.add(ring, slot), _WORD.as_pointer()))

    sums = [cgutils.alloca_once(builder, kind) for _ in range(count)]
    for index, each in enumerate(sums):
        builder.store(load(out, index), each)
    with cgutils.for_range(builder, rows) as loop:
        number = builder.add(at, loop.index)
        later = builder.add(row_of(builder.add(number, ahead)), start)
        if asks is None:
            for index in range(count):
                _prefetch(builder, builder.add(later, _WORD(_LINE * index)))
        else:
            with builder.if_then(builder.icmp_signed("==", asks, _WORD(0))):
                _prefetch(builder, later)
        row = row_of(number)
        for index, each in enumerate(sums):
            builder.store(builder.fadd(builder.load(each), load(row, index)), each)
    for index, each in enumerate(sums):
        stored = builder.store(builder.load(each), place(out, index))
        stored.align = 4
