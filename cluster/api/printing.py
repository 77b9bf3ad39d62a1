"""From arrays to JSON text, number by number as TensorFlow Serving prints them.

A float always shows that it is one: it has a point or an exponent. It is written as C's ``%.6g``
would write it if that uses an exponent and reads back as the same number, else as the shortest
decimal that does. NaN and infinities are bare words, which is not standard JSON. Halves of both
kinds are printed as the single-precision numbers they are.

orjson prints the shortest decimal too and differs from this only below 1e-4, from 1e6 and for
non-finite numbers. `plain_floats` tells whether an array keeps clear of all that, and can then be
given to orjson whole.
"""

from __future__ import annotations

import base64
import math
from typing import Final

import ml_dtypes
import numpy as np
import orjson

from batching.errors import InvalidArgument
from cluster.api.values import Array

__all__ = ["array_text", "dump_plain", "plain_floats", "row_texts", "tokens"]

_AS_NUMPY: Final = orjson.OPT_SERIALIZE_NUMPY
_HALVES: Final = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
_SINGLE: Final = np.dtype("<f4")
#: The last byte of a number in single precision: its sign, and all of its exponent but for the last
#: bit. These are the bytes of the numbers in [2**-13, 2**19), which lies in [1e-4, 1e6), and of
#: their negatives.
_USUAL: Final = bytes([sign | byte for sign in (0x00, 0x80) for byte in range(57, 73)])
#: Names that end so hold bytes, which are printed in base64; other strings are text.
_BYTES_SUFFIX: Final = "_bytes"


def plain_floats(array: Array) -> bool:
    """Whether orjson prints the whole array exactly as the rule asks.

    True for integers and bools, False for text. The answer holds for every part of the array, so a
    reply to many requests need be asked about only once.
    """
    kind = array.dtype.kind
    if kind in "iub":
        return True
    if kind != "f" or array.dtype.itemsize not in (4, 8):
        return False
    if array.dtype == _SINGLE and not _unusual(array):
        return True
    sizes = np.abs(array)
    # Nothing but zeros may stand outside of [1e-4, 1e6). NaN fails every comparison.
    usual = (sizes >= 1e-4) & (sizes < 1e6)
    return bool(usual.all() or (usual | (sizes == 0)).all())


def _unusual(array: Array) -> bytes:
    """The last bytes of single-precision numbers of which these do not say that they are usual.

    Three small passes over bytes, where NumPy's five over numbers cost 14 us a reply whatever its
    size: between two replies their code leaves the processor's caches (with this, 2 us).
    """
    return array.tobytes()[3::4].translate(None, _USUAL)


def dump_plain(array: Array) -> bytes:
    """The text of an array for which `plain_floats` is true and which has a dimension."""
    try:
        return orjson.dumps(array, option=_AS_NUMPY)
    except orjson.JSONEncodeError:  # not contiguous; asking first would cost every answer 0.1 us
        return orjson.dumps(np.ascontiguousarray(array), option=_AS_NUMPY)


def array_text(name: str, array: Array) -> bytes:
    """The JSON text of a tensor of any rank."""
    if array.ndim and array.size and plain_floats(array):
        return dump_plain(array)
    return _nested(tokens(name, array), array.shape)


def row_texts(name: str, array: Array) -> list[bytes]:
    """The JSON text of every row along the first dimension."""
    texts = tokens(name, array)
    rows = array.shape[0]
    if array.ndim == 1:
        return texts
    size = math.prod(array.shape[1:])
    return [_nested(texts[row * size : (row + 1) * size], array.shape[1:]) for row in range(rows)]


def tokens(name: str, array: Array) -> list[bytes]:
    """The JSON text of every element in row-major order.

    Raises:
        InvalidArgument: the dtype has no JSON form, or a string is not text. It names the tensor.
    """
    kind = array.dtype.kind
    if array.dtype in _HALVES:
        array, kind = array.astype(np.float32), "f"
    flat = np.ascontiguousarray(array).reshape(-1)
    if not flat.size:
        return []
    if kind == "O":
        return [_string_token(name, item) for item in flat]
    if kind not in "iubf" or flat.dtype.itemsize > 8:
        raise InvalidArgument(
            f"Tensor name: {name} Failed to write JSON value for tensor type: {flat.dtype.name}"
        )
    texts = orjson.dumps(flat, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].split(b",")
    if kind == "f":
        sizes = np.abs(flat)
        odd = np.flatnonzero(~(((sizes >= 1e-4) & (sizes < 1e6)) | (sizes == 0)))
        for index in odd.tolist():
            texts[index] = _float_token(float(flat[index]), flat.dtype, texts[index])
    return texts


def _float_token(value: float, dtype: np.dtype[np.generic], shortest: bytes) -> bytes:
    if math.isnan(value):
        return b"NaN"
    if math.isinf(value):
        return b"Infinity" if value > 0 else b"-Infinity"
    short = f"{value:.6g}"
    if "e" in short and dtype.type(float(short)) == value:
        return short.encode()
    return shortest


def _string_token(name: str, item: object) -> bytes:
    if not isinstance(item, bytes):
        raise InvalidArgument(
            f"Tensor name: {name} Failed to write JSON value for tensor type: {type(item).__name__}"
        )
    if name.endswith(_BYTES_SUFFIX):
        return b'{"b64":"' + base64.b64encode(item) + b'"}'
    try:
        return orjson.dumps(item.decode("utf-8"))
    except UnicodeDecodeError:
        raise InvalidArgument(
            f"Tensor name: {name} holds bytes that are not UTF-8 text; an output of bytes must "
            f"have a name that ends in {_BYTES_SUFFIX!r}"
        ) from None


def _nested(texts: list[bytes], shape: tuple[int, ...]) -> bytes:
    for axis in range(len(shape) - 1, -1, -1):
        size = shape[axis]
        lists = math.prod(shape[:axis])
        texts = [
            b"[" + b",".join(texts[index * size : (index + 1) * size]) + b"]"
            for index in range(lists)
        ]
    return texts[0]
