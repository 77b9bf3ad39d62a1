"""From a tree of JSON values to dense arrays, by TensorFlow Serving's rules and in its words.

A leaf must have the type of the tensor: integers count as floats, nothing else is converted. A
number too large for its float type is an infinity, one too small a zero. The first element of
every list gives the shape; what differs from it is refused.
"""

from __future__ import annotations

import binascii
from array import array
from collections.abc import Sequence
from itertools import chain
from typing import Final, cast

import numpy as np

from batching.errors import InvalidArgument
from cluster.api.jsontext import clip, type_name
from cluster.api.values import Array
from shards.specs import DTYPES, STRING

__all__ = [
    "Gathered",
    "array_of",
    "decode_base64",
    "flatten",
    "gather",
    "is_base64",
    "tensorflow_name",
    "typecode",
]

#: As many dimensions as a NumPy array can have.
RANK_MAX: Final = 64

#: `array.array` takes a list of Python numbers faster than NumPy does, refuses integers that are
#: out of range and lets floats overflow to infinity without a warning.
_TYPECODES: Final = {
    "int8": "b", "uint8": "B", "int16": "h", "uint16": "H", "int32": "i", "uint32": "I",
    "int64": "q", "uint64": "Q", "float32": "f", "float64": "d",
}  # fmt: skip

_FLOATS: Final = frozenset({"float16", "bfloat16", "float32", "float64"})

_TENSORFLOW_NAMES: Final = {"float16": "half", "float32": "float", "float64": "double"}

#: Leaves of one tensor in row-major order, and its shape.
Gathered = tuple[list[object], tuple[int, ...]]


def typecode(dtype: str) -> str | None:
    """The code by which `array.array` knows a dtype, or None."""
    return _TYPECODES.get(dtype)


def tensorflow_name(dtype: str) -> str:
    """TensorFlow's word for a dtype, as its messages print it."""
    return _TENSORFLOW_NAMES.get(dtype, dtype)


def is_base64(value: object) -> bool:
    """Whether the value is ``{"b64": text}`` and nothing more."""
    return isinstance(value, dict) and len(value) == 1 and isinstance(value.get("b64"), str)


def decode_base64(value: object) -> bytes:
    """The bytes of a ``{"b64": text}`` object; padding may be left out."""
    if not (isinstance(value, dict) and is_base64(value)):
        raise InvalidArgument(f"JSON Value: {clip(value)} not formatted correctly for base64 data")
    text: str = value["b64"]
    stripped = text.rstrip("=")
    if len(text) - len(stripped) <= 2 and len(stripped) % 4 != 1:
        try:
            padded = stripped + "=" * (-len(stripped) % 4)
            return binascii.a2b_base64(padded, strict_mode=True)
        except ValueError:
            pass
    raise InvalidArgument("Unable to base64 decode")


def gather(value: object, dtype: str) -> Gathered:
    """The leaves and the shape of one JSON value: a scalar, a list, a list of lists...

    Raises:
        InvalidArgument: a leaf is not of type `dtype`, or the lists are ragged.
    """
    shape: list[int] = []
    first = value
    while isinstance(first, list):
        shape.append(len(first))
        if len(shape) > RANK_MAX:
            raise InvalidArgument(
                f"Encountered list at unexpected level: {RANK_MAX} expected < {RANK_MAX}"
            )
        if not first:
            break
        first = first[0]
    leaves: list[object] = []
    _fill(value, 0, shape, dtype, leaves)
    return leaves, tuple(shape)


def _fill(value: object, level: int, shape: list[int], dtype: str, leaves: list[object]) -> None:
    rank = len(shape)
    if not isinstance(value, list):
        if level != rank:
            raise InvalidArgument(
                f"JSON Value: {clip(value)} found at incorrect level: {level + 1} "
                f"in the JSON DOM. Expected at level: {rank}"
            )
        leaves.append(_leaf(value, dtype))
        return
    if level >= rank:
        raise InvalidArgument(f"Encountered list at unexpected level: {level} expected < {rank}")
    if len(value) != shape[level]:
        raise InvalidArgument(
            f"Encountered list at unexpected size: {len(value)} at level: {level} "
            f"expected size: {shape[level]}"
        )
    if level == rank - 1 and set(map(type, value)) <= _types_of(dtype):
        leaves.extend(value)
        return
    for item in value:
        _fill(item, level + 1, shape, dtype, leaves)


def _types_of(dtype: str) -> frozenset[type]:
    if dtype in _FLOATS:
        return _NUMBERS
    if dtype == "bool":
        return _BOOLS
    return _STRINGS if dtype == STRING else _INTS


_NUMBERS: Final[frozenset[type]] = frozenset({int, float})
_INTS: Final[frozenset[type]] = frozenset({int})
_BOOLS: Final[frozenset[type]] = frozenset({bool})
_STRINGS: Final[frozenset[type]] = frozenset({str})


def _leaf(value: object, dtype: str) -> object:
    if type(value) in _types_of(dtype):
        return value
    if isinstance(value, dict) and dtype == STRING:
        return decode_base64(value)
    raise _type_error(value, dtype)


def _type_error(value: object, dtype: str) -> InvalidArgument:
    return InvalidArgument(
        f"JSON Value: {clip(value)} Type: {type_name(value)} "
        f"is not of expected type: {tensorflow_name(dtype)}"
    )


def array_of(leaves: Sequence[object], shape: tuple[int, ...], dtype: str) -> Array:
    """The array of leaves whose types were checked.

    Raises:
        InvalidArgument: an integer is out of the range of `dtype`, or a text is not Unicode.
    """
    code = _TYPECODES.get(dtype)
    if code is not None:
        numbers = cast(Sequence[float], leaves)
        try:
            return np.ndarray(shape, DTYPES[dtype], array(code, numbers))
        except OverflowError:
            return np.ndarray(shape, DTYPES[dtype], _packed_again(numbers, dtype, code))
    if dtype == STRING:
        texts = np.empty(len(leaves), dtype=object)
        texts[:] = [leaf if isinstance(leaf, bytes) else _utf8(str(leaf)) for leaf in leaves]
        return texts.reshape(shape)
    if dtype == "bool":
        return np.array(leaves, dtype=np.bool_).reshape(shape)
    with np.errstate(all="ignore"):
        return array_of(leaves, shape, "float64").astype(DTYPES[dtype])


def _packed_again(numbers: Sequence[float], dtype: str, code: str) -> array[float]:
    """What to do about an integer that did not fit: complain, or take it for an infinity."""
    if dtype in _FLOATS:
        return array(code, map(_double, numbers))
    limits = np.iinfo(dtype)
    offender = next(each for each in numbers if not limits.min <= each <= limits.max)
    raise _type_error(offender, dtype)


def _double(number: float) -> float:
    try:
        return float(number)
    except OverflowError:
        return float("inf") if number > 0 else float("-inf")


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise InvalidArgument(
            "JSON Parse error: The surrogate pair in string is invalid."
        ) from None


def flatten(value: list[object], rank: int) -> Gathered | None:
    """Leaves and shape of lists nested exactly `rank` deep; None if ragged or of unknown shape.

    The caller knows that every list is `rank` deep and that every leaf has the right type.
    """
    if rank == 2 and len(value) == 1:
        # One row of features is what a request is nearly always.
        only = cast(list[object], value[0])
        return only, (1, len(only))
    shape = [len(value)]
    for _ in range(rank - 1):
        lists = cast(list[list[object]], value)
        if not lists:
            return None
        size = len(lists[0])
        if any(len(each) != size for each in lists):
            return None
        value = list(chain.from_iterable(lists))
        shape.append(size)
    return value, tuple(shape)
