"""Bodies that are an Arrow IPC stream: `application/vnd.apache.arrow.stream`. Reading.

Columns are inputs, rows are rows. A row of several numbers is a FixedSizeList, a FixedShapeTensor
(``arrow.fixed_shape_tensor``), or a List all of whose rows have one length; strings are Utf8,
Binary or their large kinds; bfloat16, for which Arrow has no type, is a uint16 that is named
``shardserve.bfloat16``. The schema's metadata may have a ``signature_name``. What a table can hold
and a tensor cannot is refused: nulls, dictionaries, other types; so are compressed buffers, since
whole bodies may be compressed.

Read here and not by pyarrow: that takes 0.6 s and 60 MB to import, and would trust what it reads.
Every length is held against the bytes that are there, and numbers of one record batch are views.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Container, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from batching.errors import InvalidArgument
from cluster.forms.flat import Table, root_of
from cluster.forms.memory import size_of
from cluster.forms.values import DIMENSIONS_MAX, TENSORS_MAX, Array, Buffer, Columns
from shards.specs import DTYPES, STRING

__all__ = [
    "BFLOAT16",
    "EXTENSION",
    "EXTENSION_DATA",
    "TENSOR",
    "Kind",
    "is_quick",
    "read_request",
]

#: Metadata of fields: the name of an extension type, and what it says.
EXTENSION: Final = "ARROW:extension:name"
EXTENSION_DATA: Final = "ARROW:extension:metadata"
TENSOR: Final = "arrow.fixed_shape_tensor"
BFLOAT16: Final = "shardserve.bfloat16"
_SIGNATURE: Final = "signature_name"

_BATCHES_MAX: Final = 1024
#: Of all columns together: lists may be the same bytes, so that a few name many.
_LEVELS_MAX: Final = 2048
_METADATA_MAX: Final = 64
#: Longer schemas are read each time.
_KEPT_BYTES_MAX: Final = 4096
#: They are a bit each on the way, and a byte each here.
_BOOLS_MAX: Final = 64 << 20
#: Of a schema or a record batch: some 300 columns.
_QUICK_METADATA_BYTES: Final = 16 << 10
_HEAD: Final = struct.Struct("<Ii")
_CONTINUES: Final = 0xFFFF_FFFF
_PAIR: Final = struct.Struct("<qq")
_SCHEMA, _BATCH = 1, 3
_VERSIONS: Final = (3, 4)
_PRECISIONS: Final = {0: "float16", 1: "float32", 2: "float64"}


class Kind:
    """Numbers of types in Arrow's schemas."""

    INT: Final = 2
    FLOAT: Final = 3
    BINARY: Final = 4
    UTF8: Final = 5
    BOOL: Final = 6
    LIST: Final = 12
    FIXED_LIST: Final = 16
    LARGE_BINARY: Final = 19
    LARGE_UTF8: Final = 20
    LARGE_LIST: Final = 21


_OFFSETS: Final[Mapping[int, np.dtype[np.signedinteger[Any]]]] = {
    Kind.LIST: np.dtype("<i4"), Kind.LARGE_LIST: np.dtype("<i8"),
    Kind.UTF8: np.dtype("<i4"), Kind.LARGE_UTF8: np.dtype("<i8"),
    Kind.BINARY: np.dtype("<i4"), Kind.LARGE_BINARY: np.dtype("<i8"),
}  # fmt: skip
_Offsets = npt.NDArray[np.signedinteger[Any]]
_LISTS: Final = (Kind.FIXED_LIST, Kind.LIST, Kind.LARGE_LIST)


class _Column(NamedTuple):
    """A column as the schema declares it.

    Attributes:
        name: of the input.
        levels: lists around a value, the outermost first: their kind and, if fixed, their size.
        dtype: of a value.
        kind: Arrow's number of it.
        shape: of a row, where the column says more than its lists do.
    """

    name: str
    levels: tuple[tuple[int, int], ...]
    dtype: str
    kind: int
    shape: tuple[int, ...] | None


class _Schema(NamedTuple):
    columns: tuple[_Column, ...]
    signature_name: str


class _Message(NamedTuple):
    kind: int
    header: Table
    #: the flatbuffer that the header is in
    metadata: memoryview
    body: memoryview


def read_request(body: Buffer, dtypes: Container[str] = DTYPES) -> Columns:
    """The request in a body; numbers of a single record batch are views of it.

    Args:
        body: all of it.
        dtypes: those that are wanted. Others are refused before their bytes are looked at.

    Raises:
        InvalidArgument: it is no such stream, or holds what no tensor does.
    """
    try:
        return _columns_of(body, dtypes)
    except InvalidArgument as error:
        raise InvalidArgument(f"not a request in Arrow: {error.message}") from None


def _columns_of(body: Buffer, dtypes: Container[str]) -> Columns:
    messages = _messages(memoryview(body))
    first = next(messages, None)
    if first is None or first.kind != _SCHEMA:
        raise InvalidArgument("the stream does not begin with a schema")
    is_short = len(first.metadata) <= _KEPT_BYTES_MAX
    # The clients of a servable say the same few schemas over and over.
    schema = (_schema_before if is_short else _schema)(bytes(first.metadata))
    for column in schema.columns:
        if column.dtype not in dtypes:
            raise InvalidArgument(f"column {column.name[:64]!r}: no input is {column.dtype}")
    batches: list[list[Array]] = []
    bools_left = _BOOLS_MAX
    for message in messages:
        if message.kind != _BATCH:
            raise InvalidArgument("the stream holds a message that is no record batch")
        batch = _Batch(message, bools_left)
        batches.append(batch.arrays(schema.columns))
        bools_left = batch.bools_left
        if len(batches) > _BATCHES_MAX:
            raise InvalidArgument(f"more than {_BATCHES_MAX} record batches")
    if not batches:
        raise InvalidArgument("the stream has no record batch")
    arrays: dict[str, Array] = {}
    for column, parts in zip(schema.columns, zip(*batches, strict=True), strict=True):
        if len({part.shape[1:] for part in parts}) > 1:
            raise InvalidArgument(f"column {column.name[:64]!r} has rows of several shapes")
        arrays[column.name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return Columns(arrays, schema.signature_name)


def is_quick(body: Buffer) -> bool:
    """Whether a stream has one batch at most, of few columns, so that its size costs no time."""
    try:
        for count, message in enumerate(_messages(memoryview(body)), 1):
            if count > 2 or len(message.metadata) > _QUICK_METADATA_BYTES:
                return False
    except InvalidArgument:
        pass  # it is refused as quickly
    return True


def _messages(data: memoryview) -> Iterator[_Message]:
    at = 0
    while at < len(data):
        if at + _HEAD.size > len(data):
            raise InvalidArgument("the stream ends within a message")
        mark, size = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        if mark != _CONTINUES:
            raise InvalidArgument(f"no message begins at byte {at - _HEAD.size}")
        if size == 0:
            if at != len(data):
                raise InvalidArgument("the body goes on after the end of its stream")
            return
        if not 0 < size <= len(data) - at:
            raise InvalidArgument("the stream ends within a message")
        metadata = data[at : at + size]
        at += size
        root = root_of(metadata)
        header, nbytes = root.table(2), root.long(3)
        if root.short(0) not in _VERSIONS or header is None:
            raise InvalidArgument("a message of an unknown version, or without a header")
        if not 0 <= nbytes <= len(data) - at:
            raise InvalidArgument("the stream ends within a message")
        yield _Message(root.flag(1), header, metadata, data[at : at + nbytes])
        at += nbytes


# The schema


def _schema(metadata: bytes) -> _Schema:
    schema = root_of(memoryview(metadata)).table(2)
    assert schema is not None, "it was asked what kind of message this is"
    if schema.short(0):
        raise InvalidArgument("the stream is big-endian")
    left = _LEVELS_MAX
    found: dict[str, _Column] = {}
    for field in schema.tables(1, TENSORS_MAX):
        column = _column(field)
        left -= 1 + len(column.levels)
        if left < 0:
            raise InvalidArgument(f"more than {_LEVELS_MAX} columns and lists")
        if column.name in found:
            raise InvalidArgument(f"column {column.name[:64]!r} is there twice")
        found[column.name] = column
    return _Schema(tuple(found.values()), _said(schema, 2).get(_SIGNATURE, ""))


_schema_before = lru_cache(maxsize=256)(_schema)


def _column(field: Table) -> _Column:
    name = field.text(0)
    shown = f"column {name[:64]!r}"
    levels: list[tuple[int, int]] = []
    shape: tuple[int, ...] | None = None
    while True:
        if field.table(4) is not None:
            raise InvalidArgument(f"{shown} is a dictionary; send its values")
        kind, said = field.flag(2), _said(field, 6)
        extension = said.get(EXTENSION, "")
        if extension == TENSOR and not levels:
            shape = _shape(shown, said.get(EXTENSION_DATA, ""))
        elif extension not in ("", BFLOAT16):
            raise InvalidArgument(f"{shown} is of the extension type {extension[:64]!r}")
        if kind not in _LISTS:
            break
        children = field.tables(5, 1)
        if len(children) != 1 or len(levels) == DIMENSIONS_MAX - 1:
            raise InvalidArgument(f"{shown} has no list of one kind of value, or too deep a one")
        declared = field.table(3)
        size = declared.integer(0) if kind == Kind.FIXED_LIST and declared is not None else 0
        if size < 0:
            raise InvalidArgument(f"{shown}: a list of {size}")
        levels.append((kind, size))
        field = children[0]
    if shape is not None and not levels:
        raise InvalidArgument(f"{shown} has tensors that are no lists")
    return _Column(name, tuple(levels), _dtype(shown, field, extension), kind, shape)


def _dtype(shown: str, field: Table, extension: str) -> str:
    kind, declared = field.flag(2), field.table(3)
    if kind == Kind.BOOL:
        return "bool"
    if kind in (Kind.UTF8, Kind.BINARY, Kind.LARGE_UTF8, Kind.LARGE_BINARY):
        return STRING
    dtype = ""
    if kind == Kind.INT and declared is not None:
        dtype = f"{'' if declared.flag(1) else 'u'}int{declared.integer(0)}"
        if extension == BFLOAT16:
            dtype = "bfloat16" if dtype == "uint16" else ""
    elif kind == Kind.FLOAT:
        dtype = _PRECISIONS.get(0 if declared is None else declared.short(0), "")
    if dtype not in DTYPES:
        raise InvalidArgument(f"{shown} is of a type (Arrow's number {kind}) that no tensor has")
    return dtype


def _shape(shown: str, text: str) -> tuple[int, ...]:
    try:
        said = json.loads(text)
        shape = tuple(said["shape"])
        turned = said.get("permutation") or list(range(len(shape)))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InvalidArgument(f"{shown} does not say the shape of its tensors") from None
    is_shape = all(type(size) is int and size >= 0 for size in shape)
    if not is_shape or len(shape) >= DIMENSIONS_MAX or turned != list(range(len(shape))):
        raise InvalidArgument(f"{shown} has tensors of no shape, or permuted ones")
    return shape


def _said(table: Table, field: int) -> dict[str, str]:
    return {each.text(0): each.text(1) for each in table.tables(field, _METADATA_MAX)}


# Record batches


class _Batch:
    """One record batch: its nodes and buffers, taken in the order of the columns.

    Attributes:
        bools_left: how many more there may be.

    Raises:
        InvalidArgument: it is not what the schema said, or claims bytes that are not there; so do
            all methods.
    """

    def __init__(self, message: _Message, bools_left: int) -> None:
        self.bools_left = bools_left
        header, self._body = message.header, message.body
        if header.table(3) is not None:
            raise InvalidArgument("compressed buffers; compress the whole body instead")
        self._rows = header.long(0)
        self._nodes = _pairs(message.metadata, header, 1)
        self._buffers = _pairs(message.metadata, header, 2)
        #: of the body, that no buffer had yet: two cannot have the same
        self._left = len(self._body)

    def arrays(self, columns: Sequence[_Column]) -> list[Array]:
        """One array for each column."""
        found = [self._array(column) for column in columns]
        if next(self._nodes, None) or next(self._buffers, None):
            raise InvalidArgument("a record batch holds more than the schema says")
        return found

    def _array(self, column: _Column) -> Array:
        shown = f"column {column.name[:64]!r}"
        start, count, shape = 0, self._rows, [self._rows]
        for kind, declared in column.levels:
            start, count, size = self._inside(shown, kind, declared, start, count)
            shape.append(size)
        if column.shape is not None:
            if math.prod(column.shape) != shape[1] or len(shape) != 2:
                raise InvalidArgument(f"{shown}: tensors of {list(column.shape)} are not so many")
            shape = [self._rows, *column.shape]
        size_of(column.name, column.dtype, shape)
        return self._values(shown, column, start, count).reshape(shape)

    def _inside(
        self, shown: str, kind: int, size: int, start: int, count: int
    ) -> tuple[int, int, int]:
        """Which values some lists hold: the first, how many, how many each."""
        self._node(shown, start + count)
        if kind == Kind.FIXED_LIST:
            return start * size, count * size, size
        offsets = self._offsets(shown, kind, start, count)
        if not count:
            return 0, 0, 0
        sizes = np.diff(offsets)
        if (sizes != sizes[0]).any():
            raise InvalidArgument(f"{shown} has lists of several lengths")
        return int(offsets[0]), count * int(sizes[0]), int(sizes[0])

    def _values(self, shown: str, column: _Column, start: int, count: int) -> Array:
        self._node(shown, start + count)
        if column.dtype == STRING:
            offsets = self._offsets(shown, column.kind, start, count)
            data = self._buffer()
            if count and offsets[-1] > len(data):
                raise InvalidArgument(f"{shown}: strings that are not there")
            texts = np.empty(count, object)
            ends = offsets.tolist()
            texts[:] = [bytes(data[a:b]) for a, b in pairwise(ends)]
            return texts
        data = self._buffer()
        end = start + count
        if column.dtype == "bool":
            if end > 8 * len(data):
                raise InvalidArgument(f"{shown}: {end} values in {len(data)} bytes")
            self.bools_left -= count
            if self.bools_left < 0:
                raise InvalidArgument(f"more than {_BOOLS_MAX} bools")
            some = np.frombuffer(data[start // 8 : -(-end // 8)], np.uint8)
            bits = np.unpackbits(some, bitorder="little")
            return bits[start % 8 : start % 8 + count].view(np.bool_)
        dtype = DTYPES[column.dtype]
        if end * dtype.itemsize > len(data):
            raise InvalidArgument(f"{shown}: {end} values in {len(data)} bytes")
        return np.ndarray((count,), dtype, data, start * dtype.itemsize)

    def _offsets(self, shown: str, kind: int, start: int, count: int) -> _Offsets:
        data, dtype = self._buffer(), _OFFSETS[kind]
        if not count:
            return np.zeros(1, dtype)
        if (start + count + 1) * dtype.itemsize > len(data):
            raise InvalidArgument(f"{shown}: offsets of {count} lists in {len(data)} bytes")
        offsets: _Offsets = np.ndarray((count + 1,), dtype, data, start * dtype.itemsize)
        if offsets[0] < 0 or (offsets[1:] < offsets[:-1]).any():
            raise InvalidArgument(f"{shown}: offsets that go back")
        return offsets

    def _node(self, shown: str, least: int) -> None:
        length, nulls = next(self._nodes, (-1, 0))
        if not 0 <= least <= length:
            raise InvalidArgument(f"{shown}: {least} values where there are {length}")
        if nulls:
            raise InvalidArgument(f"{shown} has nulls")
        self._buffer()  # which values are null: none

    def _buffer(self) -> memoryview:
        offset, size = next(self._buffers, (-1, 0))
        if offset < 0 or not 0 <= size <= len(self._body) - offset:
            raise InvalidArgument("a buffer that is not in its record batch")
        self._left -= size
        if self._left < 0:
            raise InvalidArgument("buffers that have the same bytes")
        return self._body[offset : offset + size]


def _pairs(metadata: memoryview, header: Table, field: int) -> Iterator[tuple[int, int]]:
    start, count = header.vector(field, _PAIR.size)
    return _PAIR.iter_unpack(metadata[start : start + count * _PAIR.size])
