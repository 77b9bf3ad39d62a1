"""``{"instances": [[numbers], ...]}`` straight into an array, in compiled code.

Most requests are rows of floats. Read from the text into the array that is sent, with no Python
numbers in between, a row of 512 takes 9 us of a router, and took 25; one of 64, 2.1 and 2.8.
Numbers are rounded as everywhere: to the nearest double, then to the nearest float. What is not
such a body, or holds a number that needs more care, is left to the reading that knows all of JSON.

Importing this module compiles everything, or reads it from the user's cache
(`shards.kernel_cache`): nothing is compiled when a request comes. It does not know signatures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from cluster.api import decimals
from cluster.api.decimals import DIGITS_MAX, OPTIONS, UNSURE, double_of_decimal
from shards import instructions
from shards.compiling.cache import ProgramCache
from shards.instructions import bytes_at
from shards.kernel_cache import compiled
from shards.remote import user_cache_directory

__all__ = ["read_rows"]

_U: Final = np.uint64
_NAME: Final = np.frombuffer(b'"instances"', np.uint8)
_EXPONENT_DIGITS_MAX: Final = 4
_TAB, _LINE_FEED, _RETURN, _SPACE, _PLUS, _COMMA, _MINUS, _POINT, _ZERO, _COLON, _OPEN, _CLOSE = (
    b"\t\n\r +,-.0:[]"
)
_BEGIN, _END, _EXPONENT = b"{}e"

#: What follows a text of which nothing can be made.
_NOWHERE: Final = -1


@intrinsic  # type: ignore[untyped-decorator]
def _address_of(context: Any, body: Any) -> Any:
    """Where the bytes are: references to what holds them are counted, and that for every call."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        buffer = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.ptrtoint(buffer.data, ir.IntType(64))

    return types.int64(body), generate


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _next(text: Any, stop: Any, at: Any) -> Any:
    """Where the next byte is that is no space; the end if there is none."""
    while at < stop:
        byte = text[at]
        if byte > _SPACE or byte not in (_SPACE, _LINE_FEED, _RETURN, _TAB):
            break
        at += 1
    return at


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _after(text: Any, stop: Any, at: Any, mark: Any) -> Any:
    """Behind the mark that comes next, or `_NOWHERE`."""
    at = _next(text, stop, at)
    return at + 1 if at < stop and text[at] == mark else _NOWHERE


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _opening(text: Any, stop: Any) -> Any:
    """Behind ``{"instances": [``, or `_NOWHERE`."""
    at = _after(text, stop, 0, _BEGIN)
    if at < 0:
        return _NOWHERE
    at = _next(text, stop, at)
    if at + len(_NAME) > stop:
        return _NOWHERE
    for index in range(len(_NAME)):
        if text[at + index] != _NAME[index]:
            return _NOWHERE
    at = _after(text, stop, at + len(_NAME), _COLON)
    return _NOWHERE if at < 0 else _after(text, stop, at, _OPEN)


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _digits(text: Any, stop: Any, at: Any, found: Any) -> Any:
    """Behind the digits from here on, and the number that they continue, if it is not too large."""
    while at < stop:
        digit = _U(text[at]) - _U(_ZERO)
        if digit > _U(9):
            break
        found = found * _U(10) + digit
        at += 1
    return at, found


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _power(text: Any, stop: Any, at: Any) -> Any:
    """Behind an exponent, and what it says; `_NOWHERE` if that is nothing or too much."""
    is_negative = at < stop and text[at] == _MINUS
    if at < stop and (text[at] == _MINUS or text[at] == _PLUS):
        at += 1
    behind, found = _digits(text, stop, at, _U(0))
    if not 0 < behind - at <= _EXPONENT_DIGITS_MAX:
        return _NOWHERE, 0
    return behind, -np.int64(found) if is_negative else np.int64(found)


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _magnitude(text: Any, stop: Any, at: Any) -> Any:
    """Behind a number without its sign, and the number; `UNSURE` if it is not one, or not sure."""
    behind, found = _digits(text, stop, at, _U(0))
    if behind == at or (behind > at + 1 and text[at] == _ZERO):
        return at, UNSURE
    first, power = at, 0
    at = behind
    if at < stop and text[at] == _POINT:
        at += 1
        behind, found = _digits(text, stop, at, found)
        if behind == at:
            return at, UNSURE
        power = at - behind
        at = behind
    if at - first > DIGITS_MAX:  # perhaps too many; zeros in front do not count
        count = at - first - (1 if power else 0)
        while count and (text[first] == _ZERO or text[first] == _POINT):
            count -= text[first] == _ZERO
            first += 1
        if count > DIGITS_MAX:
            return at, UNSURE
    if at < stop and (text[at] | 0x20) == _EXPONENT:
        at, more = _power(text, stop, at + 1)
        if at < 0:
            return 0, UNSURE
        power += more
    return at, double_of_decimal(found, power)


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _row(text: Any, stop: Any, at: Any, row: Any, most: Any) -> Any:
    """Behind a row whose list is open, or `_NOWHERE`."""
    size = len(row)
    for column in range(size):
        at = _next(text, stop, at)
        is_negative = at < stop and text[at] == _MINUS
        first = at + 1 if is_negative else at
        at, found = _magnitude(text, stop, first)
        if found < 0 or found > most:
            return _NOWHERE
        if is_negative and found == 0 and at == first + 1:
            return _NOWHERE  # -0 is an integer, which has no such zero
        row[column] = -found if is_negative else found
        at = _after(text, stop, at, _COMMA if column + 1 < size else _CLOSE)
        if at < 0:
            return _NOWHERE
    return at


def _read_rows(body: Any, rows: Any, most: Any) -> Any:
    """Read a body of so many rows.

    Args:
        body: bytes.
        rows: float32 or float64 ``[rows, size]``, at least one of each; what they hold if the body
            is not read is left open.
        most: the largest magnitude that they can hold.

    Returns:
        whether the body was that, and the rows are read.
    """
    text, stop = bytes_at(_address_of(body)), len(body)
    at = _opening(text, stop)
    for index in range(len(rows)):
        if at < 0:
            return False
        at = _after(text, stop, at, _OPEN)
        if at < 0:
            return False
        at = _row(text, stop, at, rows[index], most)
        if at < 0:
            return False
        at = _after(text, stop, at, _COMMA if index + 1 < len(rows) else _CLOSE)
    if at < 0:
        return False
    at = _after(text, stop, at, _END)
    return at >= 0 and _next(text, stop, at) == stop


_TEXT: Final = types.Bytes(types.uint8, 1, "C", readonly=True)

#: See `_read_rows`.
read_rows: Final = compiled(
    _read_rows,
    [
        types.boolean(_TEXT, types.Array(kind, 2, "C"), types.float64)
        for kind in (types.float32, types.float64)
    ],
    ProgramCache(user_cache_directory(), "kernels"),
    [Path(__file__), Path(decimals.__file__), Path(instructions.__file__)],
    **OPTIONS,
)
