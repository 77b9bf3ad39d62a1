"""Answers as an Arrow IPC stream: a schema, one record batch, the end.

A row of one dimension is a FixedSizeList, of more a FixedShapeTensor over one; strings are Binary.
What depends on names, dtypes and shapes alone is made once, so an answer of numbers costs little
more than its bytes. No pyarrow; see `cluster.forms.arrow`.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Final, TypeVar

import flatbuffers
import numpy as np

from batching.errors import InvalidArgument
from cluster.forms.arrow import BFLOAT16, EXTENSION, EXTENSION_DATA, TENSOR, Kind
from cluster.forms.memory import bytes_of, dtype_name
from cluster.forms.values import Array, Buffer, Written
from shards.specs import STRING

__all__ = ["write_answer"]

_HEAD: Final = struct.Struct("<Ii")
_END: Final = _HEAD.pack(0xFFFF_FFFF, 0)
_VERSION: Final = 4
_SCHEMA, _BATCH = 1, 3
_ALIGNMENT: Final = 8
#: Bytes of all strings of a column, as their offsets have four bytes.
_STRINGS_MAX: Final = (1 << 31) - 1
_PRECISIONS: Final = {"float16": 0, "float32": 1, "float64": 2}

T = TypeVar("T")

#: Name, dtype, sizes of a row.
_Column = tuple[str, str, tuple[int, ...]]


def write_answer(outputs: Mapping[str, Array]) -> Written:
    """The body of an answer. An output that has one row beside others with more is repeated.

    Raises:
        InvalidArgument: the outputs are no columns of one table.
    """
    if any(not array.ndim for array in outputs.values()):
        raise InvalidArgument("an output without rows is no column of an Arrow table")
    rows = max((len(array) for array in outputs.values()), default=0)
    columns: list[_Column] = []
    buffers: list[Buffer] = []
    for name, array in outputs.items():
        if len(array) == 1 < rows:
            array = np.broadcast_to(array, (rows, *array.shape[1:]))
        if len(array) != rows:
            raise InvalidArgument(f"output {name!r} has {len(array)} rows, another {rows}")
        dtype = dtype_name(name, array)
        columns.append((name, dtype, array.shape[1:]))
        if dtype == STRING:
            buffers += _strings(name, array)
        elif dtype == "bool":
            buffers.append(np.packbits(array.reshape(-1).view(np.uint8), bitorder="little").data)
        else:
            buffers.append(bytes_of(name, array))
    head = _head(tuple(columns), rows, tuple(map(len, buffers)))
    pieces: list[Buffer] = [head]
    for buffer in buffers:
        pieces.append(buffer)
        if short := -len(buffer) % _ALIGNMENT:
            pieces.append(bytes(short))
    pieces.append(_END)
    return Written([b"".join(pieces)])


def _strings(name: str, array: Array) -> list[Buffer]:
    """Offsets and bytes."""
    values = array.reshape(-1).tolist()
    if not all(type(value) is bytes for value in values):
        raise InvalidArgument(f"output {name!r} holds something that is not bytes")
    ends = np.zeros(len(values) + 1, np.int64)
    np.cumsum([len(value) for value in values], out=ends[1:])
    if ends[-1] > _STRINGS_MAX:
        raise InvalidArgument(f"output {name!r} holds more than {_STRINGS_MAX} bytes")
    return [ends.astype("<i4").tobytes(), b"".join(values)]


@lru_cache(maxsize=256)
def _head(columns: tuple[_Column, ...], rows: int, sizes: tuple[int, ...]) -> bytes:
    """Everything before the buffers: two messages, the second without its body."""
    return _schema(columns) + _batch(columns, rows, sizes)


@lru_cache(maxsize=256)
def _schema(columns: tuple[_Column, ...]) -> bytes:
    builder = flatbuffers.Builder(1024)
    fields = _references(builder, [_field(builder, *column) for column in columns])
    builder.StartObject(4)
    builder.PrependUOffsetTRelativeSlot(1, fields, 0)
    return _message(builder, _SCHEMA, builder.EndObject(), 0)


def _field(builder: flatbuffers.Builder, name: str, dtype: str, inner: tuple[int, ...]) -> int:
    if not inner:
        said = {EXTENSION: BFLOAT16} if dtype == "bfloat16" else {}
        kind, declared = _type(builder, dtype)
        return _field_of(builder, name, kind, declared, [], said)
    item = _field(builder, "item", dtype, ())
    said = {}
    if len(inner) > 1:
        shape = json.dumps({"shape": inner}, separators=(",", ":"))
        said = {EXTENSION: TENSOR, EXTENSION_DATA: shape}
    builder.StartObject(1)
    builder.PrependInt32Slot(0, math.prod(inner), 0)
    declared = builder.EndObject()
    return _field_of(builder, name, Kind.FIXED_LIST, declared, [item], said)


def _field_of(
    builder: flatbuffers.Builder,
    name: str,
    kind: int,
    declared: int,
    children: Sequence[int],
    said: Mapping[str, str],
) -> int:
    texts = [
        (builder.CreateString(key), builder.CreateString(value)) for key, value in said.items()
    ]
    pairs: list[int] = []
    for key, value in texts:
        builder.StartObject(2)
        builder.PrependUOffsetTRelativeSlot(0, key, 0)
        builder.PrependUOffsetTRelativeSlot(1, value, 0)
        pairs.append(builder.EndObject())
    metadata = _references(builder, pairs) if pairs else 0
    inside = _references(builder, children)
    called = builder.CreateString(name)
    builder.StartObject(7)
    builder.PrependUOffsetTRelativeSlot(0, called, 0)
    builder.PrependUint8Slot(2, kind, 0)
    builder.PrependUOffsetTRelativeSlot(3, declared, 0)
    builder.PrependUOffsetTRelativeSlot(5, inside, 0)
    builder.PrependUOffsetTRelativeSlot(6, metadata, 0)
    return int(builder.EndObject())


def _type(builder: flatbuffers.Builder, dtype: str) -> tuple[int, int]:
    if dtype == STRING or dtype == "bool":
        builder.StartObject(0)
        return (Kind.BINARY if dtype == STRING else Kind.BOOL), builder.EndObject()
    if dtype in _PRECISIONS:
        builder.StartObject(1)
        builder.PrependInt16Slot(0, _PRECISIONS[dtype], 0)
        return Kind.FLOAT, builder.EndObject()
    name = "uint16" if dtype == "bfloat16" else dtype
    builder.StartObject(2)
    builder.PrependInt32Slot(0, int(name.lstrip("uint")), 0)
    builder.PrependBoolSlot(1, not name.startswith("u"), False)
    return Kind.INT, builder.EndObject()


def _batch(columns: Sequence[_Column], rows: int, sizes: Sequence[int]) -> bytes:
    nodes: list[tuple[int, int]] = []
    places: list[tuple[int, int]] = []
    at = 0
    left = iter(sizes)
    for _, dtype, inner in columns:
        for length in (rows, rows * math.prod(inner))[: 2 if inner else 1]:
            nodes.append((length, 0))
            places.append((at, 0))  # which are null: none
        for _ in range(2 if dtype == STRING else 1):
            size = next(left)
            places.append((at, size))
            at += size + -size % _ALIGNMENT
    builder = flatbuffers.Builder(1024)
    buffers, lengths = _pairs(builder, places), _pairs(builder, nodes)
    builder.StartObject(5)
    builder.PrependInt64Slot(0, rows, 0)
    builder.PrependUOffsetTRelativeSlot(1, lengths, 0)
    builder.PrependUOffsetTRelativeSlot(2, buffers, 0)
    return _message(builder, _BATCH, builder.EndObject(), at)


def _message(builder: flatbuffers.Builder, kind: int, header: int, nbytes: int) -> bytes:
    builder.StartObject(5)
    builder.PrependInt16Slot(0, _VERSION, 0)
    builder.PrependUint8Slot(1, kind, 0)
    builder.PrependUOffsetTRelativeSlot(2, header, 0)
    builder.PrependInt64Slot(3, nbytes, 0)
    builder.Finish(builder.EndObject())
    metadata = bytes(builder.Output())
    metadata += bytes(-len(metadata) % _ALIGNMENT)
    return _HEAD.pack(0xFFFF_FFFF, len(metadata)) + metadata


def _references(builder: flatbuffers.Builder, places: Sequence[int]) -> int:
    return _vector(builder, 4, places, builder.PrependUOffsetTRelative)


def _pairs(builder: flatbuffers.Builder, pairs: Sequence[tuple[int, int]]) -> int:
    def add(pair: tuple[int, int]) -> None:
        builder.PrependInt64(pair[1])
        builder.PrependInt64(pair[0])

    return _vector(builder, 16, pairs, add)


def _vector(
    builder: flatbuffers.Builder, nbytes: int, values: Sequence[T], add: Callable[[T], None]
) -> int:
    builder.StartVector(nbytes, len(values), min(nbytes, 8))
    for value in reversed(values):
        add(value)
    return int(builder.EndVector())
