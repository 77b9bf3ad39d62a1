"""Requests without JSON: whole tensors by name, held against a signature.

What `cluster.forms` reads from a body is here made the request that a signature takes, and what
classify and regress promise of their answers is held for tensors as it is for JSON. For predict the
tensors are the inputs of any signature; for classify and regress those of one that has the method,
one row an example. What is per request may leave its leading 1 out.

This file does not know servables, versions or epochs: it gets one version's signatures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, NamedTuple

import numpy as np

from batching.errors import InvalidArgument
from cluster.api.examples import ExamplesParser
from cluster.api.values import DEFAULT_SIGNATURE, Array, Buffer, Parsed
from cluster.forms import Columns, Form, Forms, arrow, packed, raw
from shards.manifest import Signature
from shards.specs import DTYPES, STRING, check

__all__ = ["ColumnsParser"]

Method = Literal["predict", "classify", "regress"]

#: Heads of bodies that are remembered for a version, of each form, and how long one may be.
_LAYOUTS_MAX: Final = 256
_LAYOUT_BYTES_MAX: Final = 2048
#: Dtypes of which any bytes are values.
_ANY_BYTES: Final = frozenset(DTYPES) - {STRING, "bool"}


class _Place(NamedTuple):
    """Where a tensor lies in a body of raw buffers."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    at: int


class _Layout(NamedTuple):
    """What a head of raw buffers was found to mean. Bodies of this size with it are requests."""

    places: tuple[_Place, ...]
    nbytes: int
    signature_name: str
    rows: int


class _Frame(NamedTuple):
    """What stands around the one tensor of a body in msgpack, and what the whole is then.

    A body of the same size with the same bytes around its numbers differs in these alone.
    """

    head: bytes
    tail: bytes
    place: _Place
    signature_name: str
    rows: int


class ColumnsParser:
    """Reads the bodies without JSON of one version and one API.

    Args:
        signatures: of the version, by name.
        examples: where the API is classify or regress, what reads its JSON.
    """

    def __init__(
        self, signatures: Mapping[str, Signature], examples: ExamplesParser | None = None
    ) -> None:
        self._signatures = dict(signatures)
        self._examples = examples
        self._layouts: dict[bytes, _Layout] = {}
        #: by size of the body
        self._frames: dict[int, _Frame] = {}
        self._dtypes = frozenset(
            spec.dtype for signature in signatures.values() for spec in signature.inputs.values()
        )
        #: whether the time that a body takes to read grows with it
        self.is_slow = not self._dtypes <= _ANY_BYTES

    def parse(self, body: Buffer, forms: Forms) -> Parsed:
        """The request in a body, whose arrays are views of it where they hold numbers.

        Raises:
            InvalidArgument: it is not in its form, there is no such signature of this method, or
                the tensors do not fit it.
        """
        if forms.request is Form.MSGPACK:
            return self._framed(body) or self._unpacked(body)
        if forms.request is Form.ARROW:
            return self._fitted(arrow.read_request(body, self._dtypes), is_table=True)
        head_bytes = forms.head_bytes
        head = bytes(body[:head_bytes]) if head_bytes <= _LAYOUT_BYTES_MAX else b""
        layout = self._layouts.get(head)
        if layout is not None and layout.nbytes == len(body):
            arrays: dict[str, Array] = {
                place.name: np.ndarray(place.shape, place.dtype, body, place.at)
                for place in layout.places
            }
            return Parsed(
                signature_name=layout.signature_name,
                arrays=arrays,
                rows=layout.rows,
                columnar=True,
            )
        columns = raw.read_request(body, head_bytes, self._dtypes)
        parsed = self._fitted(columns)
        if head:
            self._learn(head, columns, parsed, len(body))
        return parsed

    def _learn(self, head: bytes, columns: Columns, parsed: Parsed, nbytes: int) -> None:
        """Remember a head that needs to be understood only once."""
        inputs = self._signatures[parsed.signature_name].inputs
        if any(spec.dtype not in _ANY_BYTES for spec in inputs.values()):
            return
        at, ends = len(head), dict[str, int]()
        for name, array in columns.arrays.items():
            ends[name], at = at, at + array.nbytes
        places = tuple(
            _Place(name, array.shape, array.dtype, ends[name])
            for name, array in parsed.arrays.items()
        )
        if len(self._layouts) >= _LAYOUTS_MAX:
            self._layouts.clear()
        self._layouts[head] = _Layout(places, nbytes, parsed.signature_name, parsed.rows)

    def _framed(self, body: Buffer) -> Parsed | None:
        """The request in a body in msgpack like one before, else None."""
        frame = self._frames.get(len(body))
        if frame is None:
            return None
        head, tail, place, signature_name, rows = frame
        if body[: place.at] != head or (tail and body[-len(tail) :] != tail):
            return None
        array: Array = np.ndarray(place.shape, place.dtype, body, place.at)
        return Parsed(
            signature_name=signature_name, arrays={place.name: array}, rows=rows, columnar=True
        )

    def _unpacked(self, body: Buffer) -> Parsed:
        """The request in a body in msgpack, which is remembered where it has one tensor."""
        parsed = self._fitted(packed.read_request(body, self._dtypes))
        if len(parsed.arrays) > 1 or len(body) in self._frames:
            return parsed
        for name, array in parsed.arrays.items():
            spec = self._signatures[parsed.signature_name].inputs[name]
            if spec.dtype not in _ANY_BYTES or not array.nbytes:
                break
            at = array.ctypes.data - np.frombuffer(body, np.uint8).ctypes.data
            head, tail = bytes(body[:at]), bytes(body[at + array.nbytes :])
            if len(head) + len(tail) > _LAYOUT_BYTES_MAX:
                break
            if len(self._frames) >= _LAYOUTS_MAX:
                self._frames.clear()
            place = _Place(name, array.shape, array.dtype, at)
            self._frames[len(body)] = _Frame(head, tail, place, parsed.signature_name, parsed.rows)
        return parsed

    def may_take_long(self, body: Buffer, form: Form) -> bool:
        """Whether the time that a body takes to read grows with its size."""
        return self.is_slow or (form is Form.ARROW and not arrow.is_quick(body))

    def _fitted(self, columns: Columns, *, is_table: bool = False) -> Parsed:
        name = columns.signature_name or DEFAULT_SIGNATURE
        if self._examples is not None:
            signature = self._examples.codec_of(name).signature
        elif name in self._signatures:
            signature = self._signatures[name]
        else:
            raise InvalidArgument(f'Serving signature name: "{name}" not found in signature def')
        specs, given = signature.inputs, columns.arrays
        if given.keys() != specs.keys():
            check(specs, given)
        arrays: dict[str, Array] = {}
        rows = 1
        for each, spec in specs.items():
            array = given[each]
            if spec.per_request and array.ndim == len(spec.shape) - 1:
                array = array[None]
            elif is_table and spec.per_request and len(array) > 1:
                array = _once(each, array)
            arrays[each] = array
        check(specs, arrays)
        for each, spec in specs.items():
            if spec.batch is not None and not spec.per_request:
                rows = arrays[each].shape[0]
                break
        return Parsed(signature_name=name, arrays=arrays, rows=rows, columnar=True)


def _once(name: str, array: Array) -> Array:
    """The only row of what is per request, which a table has to repeat in every row."""
    if array.dtype == np.dtype(object):
        is_same = bool((array[1:] == array[:1]).all())
    else:
        rows = np.ascontiguousarray(array).reshape(len(array), -1).view(np.uint8)
        is_same = bool((rows[1:] == rows[:1]).all())
    if not is_same:
        raise InvalidArgument(f"input {name!r} is per request, and its rows differ")
    return array[:1]
