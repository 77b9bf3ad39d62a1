"""From the digits of a decimal number to the nearest double, in compiled code.

The digits are an integer of 64 bits and a power of ten. Where both are exact as doubles one
operation rounds correctly; else their product is worked out to 128 bits, of which so many are right
that the nearest double is known (D. Lemire, "Number parsing at a gigabyte per second", 2021).
Whatever neither can decide is `UNSURE`: the caller has slower ways.

Used by `cluster.api.float_rows`. Knows no text.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

__all__ = ["DIGITS_MAX", "OPTIONS", "UNSURE", "double_of_decimal"]

#: Decimal digits that fit 64 bits, whatever they are.
DIGITS_MAX: Final = 19
#: No magnitude is this.
UNSURE: Final = -1.0
OPTIONS: Final[dict[str, Any]] = {"error_model": "numpy", "boundscheck": False}

#: Powers of ten that the table has; what lies beyond is rare in numbers of models.
_LEAST: Final = -80
_MOST: Final = 40
_WORD: Final = ir.IntType(64)
_DOUBLE_WORD: Final = ir.IntType(128)
_U: Final = np.uint64


def _powers_of_five() -> np.ndarray[Any, np.dtype[np.uint64]]:
    """The highest 128 bits of each power of five, as two words.

    Reciprocals of up to 5**27 are rounded up, so that products which are exact are seen to be; the
    proof for all others is of values that are cut off.
    """
    found: list[tuple[int, int]] = []
    for power in range(_LEAST, _MOST + 1):
        five = 5 ** abs(power)
        if power >= 0:
            shift = 128 - five.bit_length()
            bits = five << shift if shift >= 0 else five >> -shift
        else:
            bits = (1 << (five.bit_length() + 127)) // five + (power >= -27)
        found.append((bits >> 64, bits & (2**64 - 1)))
    return np.array(found, np.uint64)


_FIVES: Final = _powers_of_five()
_TENS: Final = np.array([10.0**power for power in range(23)])


@intrinsic  # type: ignore[untyped-decorator]
def _high_product(context: Any, one: Any, other: Any) -> Any:
    """The higher word of a product of two words."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        factors = [builder.zext(each, _DOUBLE_WORD) for each in arguments]
        return builder.trunc(builder.lshr(builder.mul(*factors), _DOUBLE_WORD(64)), _WORD)

    return types.uint64(types.uint64, types.uint64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _leading_zeros(context: Any, word: Any) -> Any:
    """How many of the highest bits are 0; of 0 itself nothing is said."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctlz(arguments[0], ir.IntType(1)(1))

    return types.uint64(types.uint64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _double_of_bits(context: Any, bits: Any) -> Any:
    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.DoubleType())

    return types.float64(types.uint64), generate


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def double_of_decimal(digits: Any, power: Any) -> Any:
    """The double nearest to ``digits * 10**power``.

    Args:
        digits: uint64.
        power: int64.

    Returns:
        float64, or `UNSURE`.
    """
    if digits == _U(0):
        return 0.0
    if digits <= _U(1 << 53) and -22 <= power <= 22:
        exact = float(digits)
        return exact * _TENS[power] if power >= 0 else exact / _TENS[-power]
    if power < _LEAST or power > _MOST:
        return UNSURE
    zeros = _leading_zeros(digits)
    word = digits << zeros
    five = _FIVES[power - _LEAST, 0]
    low, high = word * five, _high_product(word, five)
    if (high & _U(0x1FF)) == _U(0x1FF):  # what follows may carry into the bits that count
        more = low + _high_product(word, _FIVES[power - _LEAST, 1])
        if more < low:
            high += _U(1)
        low = more
    top = high >> _U(63)
    shift = top + _U(9)
    mantissa = high >> shift  # one bit more than is kept
    exponent = ((217706 * power) >> 16) + 63 + np.int64(top) - np.int64(zeros) + 1023
    if exponent <= 0:
        return UNSURE  # subnormal
    is_half_way = low <= _U(1) and (mantissa & _U(3)) == _U(1) and (mantissa << shift) == high
    if is_half_way and -4 <= power <= 23:  # to the even one
        mantissa &= ~_U(1)
    mantissa = (mantissa + (mantissa & _U(1))) >> _U(1)
    if mantissa >= _U(1 << 53):
        mantissa = _U(1 << 52)
        exponent += 1
    if exponent >= 2047:
        return UNSURE
    return _double_of_bits((mantissa & _U((1 << 52) - 1)) | (_U(exponent) << _U(52)))
