"""Tensors as the body of a frame, and back.

Public as `shards.wire`, whose docstring holds the layout. Whatever a peer announces is held against
the bytes that came; nothing is copied but strings and what is not contiguous. This file does not
know frames or links.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from shards._headers import Buffer, TensorHeader
from shards.errors import FrameCorrupt, SpecMismatch
from shards.specs import DTYPES, STRING

#: Every tensor starts at a multiple of this in the body, and so does the memory of a large body:
#: a device transfer can then take the bytes where they lie.
ALIGNMENT: Final = 64

_DIMENSIONS_MAX: Final = 32
_STRING_BYTES_MAX: Final = 0xFFFF_FFFF
_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
_PADDING: Final = bytes(ALIGNMENT)


def encode_tensors(
    arrays: Sequence[npt.NDArray[np.generic]],
) -> tuple[list[TensorHeader], list[Buffer]]:
    """Headers of the arrays, and the buffers that make up a body. Contiguous arrays are not copied.

    Raises:
        SpecMismatch: an array has a dtype that does not travel, or holds objects that are not
            bytes.
    """
    headers: list[TensorHeader] = []
    buffers: list[Buffer] = []
    at = 0
    for array in arrays:
        name = _NAMES.get(array.dtype)
        if name is None:
            raise SpecMismatch(f"an array of {array.dtype} cannot be sent")
        if at % ALIGNMENT:
            gap = ALIGNMENT - at % ALIGNMENT
            buffers.append(_PADDING[:gap])
            at += gap
        flat = np.ascontiguousarray(array).reshape(-1)
        data = _encode_strings(flat) if name == STRING else flat.view(np.uint8).data
        nbytes = len(data)
        headers.append(TensorHeader(name, array.shape, nbytes))
        buffers.append(data)
        at += nbytes
    return headers, buffers


def decode_tensors(
    headers: Sequence[TensorHeader], body: memoryview
) -> list[npt.NDArray[np.generic]]:
    """The tensors of a body, as read-only views of it; strings become object arrays of bytes.

    Raises:
        FrameCorrupt: the headers do not describe this body.
    """
    arrays: list[npt.NDArray[np.generic]] = []
    at = 0
    for header in headers:
        dtype = DTYPES.get(header.dtype)
        if dtype is None or len(header.shape) > _DIMENSIONS_MAX:
            raise FrameCorrupt(
                f"a tensor of dtype {header.dtype[:32]!r} with {len(header.shape)} dimensions"
            )
        at += -at % ALIGNMENT
        count = 1
        for size in header.shape:
            count *= size
        if at + header.nbytes > len(body):
            raise FrameCorrupt(f"tensors end at byte {at + header.nbytes} of {len(body)}")
        if header.dtype == STRING:
            flat = _decode_strings(body[at : at + header.nbytes], count)
            arrays.append(_shaped(flat, header.shape))
        elif count * dtype.itemsize != header.nbytes:
            raise FrameCorrupt(
                f"a tensor of {count} {header.dtype} announces {header.nbytes} bytes"
            )
        elif count and type(body.obj) is bytes:
            # In one step for small bodies. Such an array holds on to the bytes, and not to a body
            # that lies in another array: memory that is shared would be given back at once.
            arrays.append(np.ndarray(header.shape, dtype, body, at))
        else:
            flat = np.frombuffer(body, dtype, count, at) if count else np.empty(0, dtype)
            arrays.append(_shaped(flat, header.shape))
        at += header.nbytes
    if at != len(body):
        raise FrameCorrupt(f"tensors end at byte {at}, the body at {len(body)}")
    return arrays


def _shaped(flat: npt.NDArray[np.generic], shape: tuple[int, ...]) -> npt.NDArray[np.generic]:
    try:
        array = flat.reshape(shape)
    except ValueError:  # an empty tensor whose other sizes no array can have
        raise FrameCorrupt(f"no array has the shape {shape}") from None
    array.flags.writeable = False
    return array


def _encode_strings(flat: npt.NDArray[np.generic]) -> bytes:
    values = flat.tolist()
    if not all(isinstance(value, bytes) for value in values):
        raise SpecMismatch("a tensor of strings holds something that is not bytes")
    offsets = np.zeros(len(values) + 1, np.uint64)
    np.cumsum([len(value) for value in values], out=offsets[1:], dtype=np.uint64)
    if int(offsets[-1]) > _STRING_BYTES_MAX:
        raise SpecMismatch(f"a tensor of strings holds {int(offsets[-1])} bytes")
    return b"".join((offsets.astype("<u4").tobytes(), *values))


def _decode_strings(data: memoryview, count: int) -> npt.NDArray[np.generic]:
    head = 4 * (count + 1)
    if head > len(data):
        raise FrameCorrupt(f"{count} strings in {len(data)} bytes")
    offsets = np.frombuffer(data, "<u4", count + 1)
    text = bytes(data[head:])
    if offsets[0] != 0 or offsets[-1] != len(text) or (offsets[1:] < offsets[:-1]).any():
        raise FrameCorrupt("the offsets of a tensor of strings do not fit its bytes")
    ends = offsets.tolist()
    flat = np.empty(count, object)
    flat[:] = [text[a:b] for a, b in itertools.pairwise(ends)]
    return flat
