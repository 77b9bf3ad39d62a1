"""The typed first reading of a predict body: quick, strict and silent.

For each signature msgspec compiles a decoder for the four usual formats (rows or columns, named or
not) in which every leaf already has its type. Whatever such a decoder refuses, and whatever it
accepts but does not fit the specs, yields None: the complete reading then decides and explains.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType

from batching.errors import ServingError
from cluster.api.reading_rows import reads_rows
from cluster.api.tensors import array_of, flatten, typecode
from cluster.api.values import DEFAULT_SIGNATURE, Array, Buffer, Parsed
from shards.specs import DTYPES, STRING, Spec, check

__all__ = ["FastPath"]


class _Body(Protocol):
    """What a compiled decoder returns."""

    signature_name: str
    instances: list[object] | UnsetType
    inputs: object | UnsetType
    context: object | UnsetType


class _Input:
    """What the hot path needs to know of one input.

    What is per request is read as most write it: without the dimension of its only row.
    """

    def __init__(self, name: str, spec: Spec, field: str) -> None:
        self.name = name
        self.field = field
        self.dtype = spec.dtype
        self.per_request = spec.per_request
        written = spec.row_shape if spec.per_request else spec.shape
        self.rank = len(written)
        self.has_batch = spec.batch is not None and not spec.per_request
        self.sizes = tuple(
            (axis, size) for axis, size in enumerate(written) if isinstance(size, int)
        )
        self._more = (1,) if spec.per_request else ()

    def array(self, value: object) -> Array | None:
        """The array of a typed value of this input's rank, or None if it does not fit."""
        if not self.rank:
            return array_of([value], self._more, self.dtype)
        gathered = flatten(cast(list[object], value), self.rank)
        if gathered is None:
            return None
        leaves, shape = gathered
        for axis, size in self.sizes:
            if shape[axis] != size:
                return None
        return array_of(leaves, (*self._more, *shape), self.dtype)


class _Vector:
    """The only input, where a row of it is a flat list of numbers."""

    __slots__ = ("_dtype", "_pack", "_shape", "_size", "name", "rows")

    def __init__(self, name: str, size: int, code: str, dtype: np.dtype[np.generic]) -> None:
        self.name = name
        self._size = size
        # Half of the time of `array.array`, which asks each number for its value by name.
        self._pack = struct.Struct(f"{size}{code}").pack
        self._dtype = dtype
        self._shape = (1, size)
        #: reads a whole body of nothing but rows, where that was made ready
        self.rows = reads_rows(size, dtype.name)

    @classmethod
    def of(cls, inputs: tuple[_Input, ...]) -> _Vector | None:
        """The vector of these inputs, or None if they are something else."""
        if len(inputs) != 1 or inputs[0].rank != 2 or not inputs[0].has_batch:
            return None
        [one] = inputs
        code = typecode(one.dtype)
        if code is None or len(one.sizes) != 1:
            return None
        return cls(one.name, one.sizes[0][1], code, DTYPES[one.dtype])

    def row(self, row: object) -> Array | None:
        """One row as ``[1, size]``, or None if it is not a list of that many numbers."""
        if type(row) is not list or len(row) != self._size:
            return None
        try:
            return np.ndarray(self._shape, self._dtype, self._pack(*row))
        except struct.error:  # an integer out of range: the complete reading knows the words
            return None


class FastPath:
    """The compiled reading of one signature's bodies."""

    def __init__(
        self,
        name: str,
        specs: Mapping[str, Spec],
        inputs: tuple[_Input, ...],
        row: type[msgspec.Struct],
        decode: Callable[[Buffer], _Body],
    ) -> None:
        self._name = name
        self._specs = specs
        self._inputs = inputs
        self._rowwise = tuple(i for i in inputs if not i.per_request)
        self._once = tuple(i for i in inputs if i.per_request)
        self._row = row
        self._decode = decode
        self._names = (name, "") if name == DEFAULT_SIGNATURE else (name,)
        # Dtypes, ranks and declared sizes hold by construction; only a symbol that stands in two
        # places is left to be checked.
        symbols = [s for spec in specs.values() for s in spec.shape if isinstance(s, str)]
        self._needs_check = len(set(symbols)) < len(symbols)
        self._batched = next((i.name for i in inputs if i.has_batch), None)
        self._vector = _Vector.of(inputs)
        self._read_rows = None
        if self._vector is not None and name == DEFAULT_SIGNATURE:
            self._read_rows = self._vector.rows

    @classmethod
    def of(cls, specs: Mapping[str, Spec], name: str) -> FastPath | None:
        """The fast path of a signature, or None where its inputs allow none."""
        # A lone input called "b64" would make {"b64": ...} mean two things.
        if not specs or (len(specs) == 1 and "b64" in specs):
            return None
        inputs = tuple(
            _Input(input_name, spec, f"f{index}")
            for index, (input_name, spec) in enumerate(specs.items())
        )
        try:
            rowwise = tuple(i for i in inputs if not i.per_request)
            row = _named_struct("Row", rowwise, depth_less=1)
            decode = _decoder(inputs, row)
        except ValueError:
            # An input's name that msgspec does not take as a field's; the complete reading will.
            return None
        return cls(name, specs, inputs, row, decode)

    def parse(self, body: Buffer) -> Parsed | None:
        """The request, or None where the complete reading must decide."""
        if self._read_rows is not None and type(body) is bytes:
            array = self._read_rows(body)
            if array is not None:
                assert self._vector is not None
                return Parsed(
                    signature_name=self._name, arrays={self._vector.name: array}, rows=len(array)
                )
        try:
            document = self._decode(body)
            if document.signature_name not in self._names:
                return None
            instances, columns = document.instances, document.inputs
            context = document.context if self._once else UNSET
            if instances is UNSET:
                if columns is UNSET or context is not UNSET:
                    return None
                arrays = self._columnar(columns)
            elif columns is UNSET and instances:
                if self._vector is not None and len(instances) == 1:
                    # Most requests by far: one row of numbers.
                    first = self._vector.row(instances[0])
                    if first is not None:
                        return Parsed(
                            signature_name=self._name, arrays={self._vector.name: first}, rows=1
                        )
                arrays = self._rows(instances, context)
            else:
                return None
            if arrays is None:
                return None
            if self._needs_check:
                check(self._specs, arrays)
        except (ValueError, RecursionError, AttributeError, OverflowError, ServingError):
            # AttributeError: plain elements among named ones.
            return None
        rows = 1 if self._batched is None else arrays[self._batched].shape[0]
        return Parsed(
            signature_name=self._name, arrays=arrays, rows=rows, columnar=columns is not UNSET
        )

    def _rows(self, instances: list[object], context: object) -> dict[str, Array] | None:
        if self._row in map(type, instances):
            values: list[tuple[_Input, object]] = [
                (i, [getattr(row, i.field) for row in instances]) for i in self._rowwise
            ]
        else:
            values = [(self._rowwise[0], instances)]
        if not self._once:
            return _complete(values)
        # AttributeError where there is no context.
        arrays = _complete([*values, *((i, getattr(context, i.field)) for i in self._once)])
        return None if arrays is None else {i.name: arrays[i.name] for i in self._inputs}

    def _columnar(self, inputs: object) -> dict[str, Array] | None:
        if not isinstance(inputs, msgspec.Struct):
            return _single(self._inputs[0], inputs)
        return _complete([(i, getattr(inputs, i.field)) for i in self._inputs])


def _single(one: _Input, value: object) -> dict[str, Array] | None:
    array = one.array(value)
    return None if array is None else {one.name: array}


def _complete(values: list[tuple[_Input, object]]) -> dict[str, Array] | None:
    arrays: dict[str, Array] = {}
    for one, value in values:
        array = one.array(value)
        if array is None:
            return None
        arrays[one.name] = array
    return arrays


def _leaf_type(dtype: str) -> type:
    if dtype == STRING:
        return str
    if dtype == "bool":
        return bool
    return float if "float" in dtype else int


def _nested_type(dtype: str, depth: int) -> Any:
    kind: Any = _leaf_type(dtype)
    for _ in range(depth):
        kind = list[kind]
    return kind


def _named_struct(title: str, inputs: tuple[_Input, ...], depth_less: int) -> type[msgspec.Struct]:
    """A struct with one field per input, each a list nested `depth_less` short of its rank."""
    return msgspec.defstruct(
        title,
        [(i.field, _nested_type(i.dtype, i.rank - depth_less)) for i in inputs],
        rename={i.field: i.name for i in inputs},
        forbid_unknown_fields=True,
    )


def _decoder(inputs: tuple[_Input, ...], row: type[msgspec.Struct]) -> Callable[[Buffer], _Body]:
    columns = _named_struct("Columns", inputs, depth_less=0)
    rowwise = tuple(i for i in inputs if not i.per_request)
    instance: Any = row
    column: Any = columns
    if len(rowwise) == 1:
        instance = _nested_type(rowwise[0].dtype, rowwise[0].rank - 1) | row
    if len(inputs) == 1:
        column = _nested_type(inputs[0].dtype, inputs[0].rank) | columns
    fields: list[Any] = [("signature_name", str, ""), ("inputs", column | UnsetType, UNSET)]
    if len(rowwise) < len(inputs):
        once = tuple(i for i in inputs if i.per_request)
        context: Any = _named_struct("Context", once, depth_less=0)
        fields.append(("context", context | UnsetType, UNSET))
    if all(i.rank for i in rowwise):
        fields.append(("instances", list[instance] | UnsetType, UNSET))
    else:
        # A tensor without dimensions cannot be cut into rows.
        fields.append(("instances", UnsetType, UNSET))
    body = msgspec.defstruct("Body", fields, forbid_unknown_fields=True)
    return cast(Callable[[Buffer], _Body], msgspec.json.Decoder(body).decode)
