"""The classify and regress APIs' request bodies: examples to a signature's input arrays.

An example is a set of named features, each a scalar or a flat list of one kind: integers (bools
count as 1 and 0), floats, or strings. Features of the request's context belong to every example;
an example's own feature of the same name wins. A feature feeds the input of its name; features
that no input has are ignored. An input that is per request is fed from the context alone.

This file does not know servables, versions or epochs: it gets one version's signatures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final, Literal, NamedTuple, cast

import orjson

from batching.errors import InvalidArgument
from cluster.api.jsontext import clip, load, type_name
from cluster.api.predict import signature_name_of
from cluster.api.replies import classified, regressed, render_classify, render_regress
from cluster.api.tensors import array_of, decode_base64, is_base64, tensorflow_name
from cluster.api.values import DEFAULT_SIGNATURE, Array, Buffer, Parsed
from shards.manifest import Signature
from shards.specs import STRING, Spec, check

__all__ = ["ExamplesCodec", "ExamplesParser"]

Method = Literal["classify", "regress"]
_Kind = Literal["int64", "float", "bytes"]

_TITLES: Final[Mapping[Method, str]] = MappingProxyType(
    {"classify": "classification", "regress": "regression"}
)
_INT64: Final = range(-(2**63), 2**63)
_UINT64_MAX: Final = 2**64 - 1


class _Feature(NamedTuple):
    kind: _Kind | None
    values: Sequence[object]


_Example = Mapping[str, _Feature]


class ExamplesCodec:
    """Reads and writes the classify or regress bodies of one signature. Immutable.

    Args:
        signature: must have the method that the codec is for.
        method: the API.
        name: under which the manifest has the signature.

    Raises:
        InvalidArgument: the signature is of another method.
    """

    def __init__(self, signature: Signature, method: Method, name: str = DEFAULT_SIGNATURE) -> None:
        if signature.method != method:
            raise InvalidArgument(
                f"Expected {_TITLES[method]} signature method_name to be "
                f"tensorflow/serving/{method}. Was: tensorflow/serving/{signature.method}"
            )
        self.signature = signature
        self.method = method
        self.name = name
        self._labels = [orjson.dumps(label) for label in signature.labels]

    def parse_document(self, document: Mapping[str, object]) -> Parsed:
        """The request in a body that was read as JSON.

        Raises:
            InvalidArgument: in TensorFlow Serving's words, or a `SpecMismatch` that names the
                input.
        """
        context, own = _examples_of(document)
        examples = [{**context, **example} for example in own]
        specs = self.signature.inputs
        arrays = {
            name: _of_context(name, spec, context, own)
            if spec.per_request
            else _input(name, spec, examples)
            for name, spec in specs.items()
        }
        check(specs, arrays)
        return Parsed(signature_name=self.name, arrays=arrays, rows=len(examples))

    def render(self, outputs: Mapping[str, Array], rows: int) -> bytes:
        """The body of the answer to a request of `rows` examples.

        Raises:
            InvalidArgument: the outputs are not what the method promises.
        """
        if self.method == "classify":
            return render_classify(outputs, rows, self._labels)
        return render_regress(outputs, rows)

    def tensors(self, outputs: Mapping[str, Array], rows: int) -> dict[str, Array]:
        """The answer to a request of `rows` examples, as tensors.

        Returns:
            For classify ``scores`` [b, k] and ``classes`` [b, k], strings; for regress ``outputs``
            [b].

        Raises:
            InvalidArgument: as for `render`.
        """
        if self.method == "classify":
            return classified(outputs, rows, self.signature.labels)
        return {"outputs": regressed(outputs, rows)[1].reshape(rows)}


class ExamplesParser:
    """Reads the classify or regress bodies of one version, whichever signature they are for."""

    def __init__(self, signatures: Mapping[str, Signature], method: Method) -> None:
        self._signatures = dict(signatures)
        self._method: Method = method
        self.codecs: Mapping[str, ExamplesCodec] = MappingProxyType(
            {
                name: ExamplesCodec(signature, method, name)
                for name, signature in signatures.items()
                if signature.method == method
            }
        )

    def parse(self, body: Buffer) -> Parsed:
        """The request in a body.

        Raises:
            InvalidArgument: it is not a request of this method, there is no such signature, or
                the features do not fit it.
        """
        document = load(body)
        return self.codec_of(signature_name_of(document)).parse_document(document)

    def codec_of(self, name: str) -> ExamplesCodec:
        """The codec of a signature.

        Raises:
            InvalidArgument: there is none of this name, or it has another method.
        """
        codec = self.codecs.get(name)
        if codec is None:
            if name not in self._signatures:
                raise InvalidArgument(f"No signature was found with the name: {name}")
            # Raises, and says which method the signature has.
            codec = ExamplesCodec(self._signatures[name], self._method, name)
        return codec


def _examples_of(document: Mapping[str, object]) -> tuple[_Example, list[_Example]]:
    """The context, and the examples without it."""
    context: _Example = {}
    if "context" in document:
        context = _features(document["context"])
    if "examples" not in document:
        raise InvalidArgument(
            f"JSON Value: {clip(document)} When method is classify, "
            "key 'examples' is expected and was not found"
        )
    examples = document["examples"]
    if not isinstance(examples, list):
        raise InvalidArgument(
            f"JSON Value: {clip(document)} Expecting 'examples' value to be an list/array"
        )
    if not examples:
        raise InvalidArgument(f"JSON Value: {clip(document)} 'examples' value is an empty array")
    return context, [_features(example) for example in examples]


def _features(example: object) -> _Example:
    if not isinstance(example, dict):
        raise InvalidArgument(f"Example must be JSON object but got JSON {type_name(example)}")
    return {
        name: _feature(name, content if isinstance(content, list) else [content])
        for name, content in example.items()
    }


def _feature(name: str, values: list[object]) -> _Feature:
    types = set(map(type, values))
    if types == {float}:
        return _Feature("float", values)
    if types == {str}:
        return _Feature("bytes", values)
    if types == {int}:
        integers = cast(list[int], values)
        if min(integers) in _INT64 and max(integers) in _INT64:
            return _Feature("int64", values)
    kind: _Kind | None = None
    converted: list[object] = []
    for value in values:
        found, plain = _element(name, value)
        if kind is not None and found != kind:
            raise InvalidArgument(
                f"Unexpected element type in feature: {name} expecting type: {kind}"
            )
        kind = found
        converted.append(plain)
    return _Feature(kind, converted)


def _element(name: str, value: object) -> tuple[_Kind, object]:
    if isinstance(value, bool):
        return "int64", int(value)
    if isinstance(value, int):
        if value in _INT64:
            return "int64", value
        if 0 < value <= _UINT64_MAX:
            raise InvalidArgument(f"Feature: {name} has uint64 element. Only int64_t is supported.")
        # A JSON reader with 64-bit integers sees a double here.
        return "float", value
    if isinstance(value, float):
        return "float", value
    if isinstance(value, str):
        return "bytes", value
    if is_base64(value):
        return "bytes", decode_base64(value)
    raise InvalidArgument(
        f"Feature: {name} has element with unexpected JSON type: {type_name(value)}"
    )


def _of_context(name: str, spec: Spec, context: _Example, own: Sequence[_Example]) -> Array:
    """One input that is per request."""
    if name not in context:
        raise InvalidArgument(
            f"Feature: {name} (data type: {tensorflow_name(spec.dtype)}) is per request, required "
            f"in 'context' and could not be found there"
        )
    for index, example in enumerate(own):
        if name in example:
            raise InvalidArgument(
                f"Feature: {name} is per request, and example {index} has one of its own"
            )
    return _input(name, spec, [context])


def _input(name: str, spec: Spec, examples: Sequence[_Example]) -> Array:
    """One input from the features of its name: ``[b]``, or ``[b, ...]`` in row-major order."""
    if spec.batch is None:
        raise InvalidArgument(
            f"input {name!r} has no batch dimension and cannot be fed from examples"
        )
    leaves: list[object] = []
    size: int | None = None
    symbols = [each for each in spec.row_shape if isinstance(each, str)]
    if not symbols:
        size = math.prod(each for each in spec.row_shape if isinstance(each, int))
    elif len(spec.row_shape) > 1:
        raise InvalidArgument(
            f"input {name!r} has several dimensions, one of them symbolic, and cannot be fed from "
            "flat features; use the predict API"
        )
    for index, example in enumerate(examples):
        feature = example.get(name)
        if feature is None:
            raise InvalidArgument(
                f"Feature: {name} (data type: {tensorflow_name(spec.dtype)}) is required "
                f"but could not be found in example {index}"
            )
        if size is None:
            size = len(feature.values)
        if len(feature.values) != size:
            raise InvalidArgument(
                f"Feature: {name} has {len(feature.values)} values in example {index}, "
                f"expected {size}"
            )
        leaves += _converted(name, spec.dtype, feature)
    row_shape = (size or 0,) if symbols else spec.row_shape
    shape = (len(examples), *(int(each) for each in row_shape))
    return array_of(leaves, shape, spec.dtype)


def _converted(name: str, dtype: str, feature: _Feature) -> Sequence[object]:
    """The feature's values as leaves of `dtype`; integers serve as floats, 0 and 1 as bools."""
    kind, values = feature
    if kind is None:
        return values
    if dtype == STRING:
        fits = kind == "bytes"
    elif dtype == "bool":
        fits = kind == "int64" and set(values) <= {0, 1}
    elif "float" in dtype:
        fits = kind != "bytes"
    else:
        fits = kind == "int64"
    if not fits:
        raise InvalidArgument(
            f"Feature: {name}: data types don't match. "
            f"Got {kind} but expected {tensorflow_name(dtype)}"
        )
    return values
