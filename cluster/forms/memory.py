"""One tensor and its bytes: little-endian, in row-major order, nothing between elements.

A bool is a byte, 0 or 1. A string is a length of four bytes and its bytes, one string after the
other. What comes is held against what it says it is before memory is set apart for it, and a
refusal names the tensor. Large tensors of numbers are never copied.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Container, Sequence
from typing import Final

import numpy as np

from batching.errors import InvalidArgument
from cluster.forms.values import DIMENSIONS_MAX, Array, Buffer
from shards.specs import DTYPES, STRING

__all__ = ["array_of", "bytes_of", "dtype_name", "size_of"]

_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH: Final = struct.Struct("<I")
_STRING_BYTES_MAX: Final = 0xFFFF_FFFF
#: More elements than any body can have.
_ELEMENTS_MAX: Final = 1 << 40
#: What has no bytes can claim any number of rows, and each is work for whoever answers it.
_EMPTIES_MAX: Final = 1 << 12
#: Up to here a copy costs less than a view.
_COPIED_BYTES_MAX: Final = 16 << 10
_SHOWN: Final = 64


def size_of(name: str, dtype: str, shape: Sequence[int]) -> int | None:
    """How many bytes a tensor has; None for strings, whose sizes are their own.

    Raises:
        InvalidArgument: there is no such dtype, or no array has this shape.
    """
    known = DTYPES.get(dtype)
    if known is None:
        raise InvalidArgument(f"tensor {_shown(name)}: {_shown(dtype)} is not a dtype")
    if len(shape) > DIMENSIONS_MAX or any(not 0 <= size <= _ELEMENTS_MAX for size in shape):
        raise InvalidArgument(f"tensor {_shown(name)}: no array has the shape {list(shape)[:64]}")
    count = math.prod(shape)
    if count > _ELEMENTS_MAX:
        raise InvalidArgument(f"tensor {_shown(name)}: no array has the shape {list(shape)}")
    if not count and math.prod(size or 1 for size in shape) > _EMPTIES_MAX:
        raise InvalidArgument(f"tensor {_shown(name)}: {list(shape)} is too much of nothing")
    return None if dtype == STRING else count * known.itemsize


def array_of(
    name: str,
    dtype: str,
    shape: Sequence[int],
    data: Buffer,
    dtypes: Container[str] = DTYPES,
) -> Array:
    """The tensor in these bytes, as a view of them where it holds numbers.

    Args:
        name: what refusals call it.
        dtype: a key of `shards.specs.DTYPES`.
        shape: any sizes; nothing is believed.
        data: all of its bytes, and no others.
        dtypes: those that are wanted. Others are refused before their bytes are looked at.

    Raises:
        InvalidArgument: the bytes are not such a tensor.
    """
    nbytes = size_of(name, dtype, shape)
    if dtype not in dtypes:
        raise InvalidArgument(f"tensor {_shown(name)}: no input is {dtype}")
    if nbytes is None:
        return _strings(name, math.prod(shape), memoryview(data)).reshape(shape)
    if nbytes != len(data):
        raise InvalidArgument(
            f"tensor {_shown(name)}: {dtype} of shape {list(shape)} has {nbytes} bytes, "
            f"got {len(data)}"
        )
    array: Array = np.ndarray(tuple(shape), DTYPES[dtype], data)
    if dtype == "bool" and (array.view(np.uint8) > 1).any():
        raise InvalidArgument(f"tensor {_shown(name)}: a bool is neither 0 nor 1")
    return array


def dtype_name(name: str, array: Array) -> str:
    """What a tensor's dtype is called.

    Raises:
        InvalidArgument: it is none that travels.
    """
    found = _NAMES.get(array.dtype)
    if found is None:
        raise InvalidArgument(f"tensor {_shown(name)}: an array of {array.dtype} cannot be sent")
    return found


def bytes_of(name: str, array: Array) -> Buffer:
    """The bytes of a tensor; a large contiguous one of numbers is not copied.

    Raises:
        InvalidArgument: its dtype is none that travels, or it holds objects that are no bytes.
    """
    if dtype_name(name, array) != STRING:
        if array.nbytes <= _COPIED_BYTES_MAX:
            return array.tobytes()
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    pieces: list[bytes] = []
    for value in array.reshape(-1).tolist():
        if not isinstance(value, bytes) or len(value) > _STRING_BYTES_MAX:
            raise InvalidArgument(f"tensor {_shown(name)}: holds something that is not bytes")
        pieces += (_LENGTH.pack(len(value)), value)
    return b"".join(pieces)


def _strings(name: str, count: int, data: memoryview) -> Array:
    # Every string takes its length at least, so this bounds what is set apart.
    if _LENGTH.size * count > len(data):
        raise InvalidArgument(f"tensor {_shown(name)}: {count} strings in {len(data)} bytes")
    found: list[bytes] = []
    at = 0
    for _ in range(count):
        start = at + _LENGTH.size
        if start > len(data):
            break
        at = start + _LENGTH.unpack_from(data, start - _LENGTH.size)[0]
        found.append(bytes(data[start:at]))
    if at != len(data) or len(found) != count:
        raise InvalidArgument(
            f"tensor {_shown(name)}: {count} strings with their lengths are not {len(data)} bytes"
        )
    array = np.empty(count, object)
    array[:] = found
    return array


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")
