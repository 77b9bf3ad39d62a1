"""The predict API's request bodies: JSON to a signature's input arrays.

A body is read twice at most. The first reading is typed: a decoder that was compiled for the
signature takes only what such a request nearly always looks like, and complains about nothing. Any
doubt leads to the second reading, which is complete, tolerant and slow, and finds the words for
what is wrong. Where both accept a body they agree on every bit.

Inputs that are per request have one value: beside the others in ``inputs``; beside ``instances``,
which are the rows, in ``context``, as classify and regress have it. It may be written with or
without the leading dimension of 1.

This file does not know servables, versions or epochs: it gets one version's signatures.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Set
from types import MappingProxyType
from typing import Final

from batching.errors import InvalidArgument
from cluster.api.bags import Bags
from cluster.api.fastpath import FastPath
from cluster.api.jsontext import clip, load
from cluster.api.replies import render_predictions
from cluster.api.tensors import array_of, gather, is_base64
from cluster.api.values import DEFAULT_SIGNATURE, Array, Buffer, Parsed
from shards.manifest import Signature
from shards.specs import Spec, check

__all__ = [
    "PredictCodec",
    "RequestParser",
    "signature_name_of",
]

_NAMES_SIGNATURE: Final = re.compile(rb'"signature_name"\s*:\s*"([^"\\]*)"')


class PredictCodec:
    """Reads and writes the bodies of one signature. Immutable; make one and keep it.

    Args:
        signature: of any method: a classify or regress signature can also be called by predict,
            with its declared inputs and outputs.
        name: under which the manifest has it.
    """

    def __init__(self, signature: Signature, name: str = DEFAULT_SIGNATURE) -> None:
        self.signature = signature
        self.name = name
        self._specs = signature.inputs
        self._rows = {name: s for name, s in signature.inputs.items() if not s.per_request}
        self._once = signature.inputs.keys() - self._rows.keys()
        self._bags = Bags(signature)
        self._fast = FastPath.of(signature.inputs, name)

    def parse(self, body: Buffer) -> Parsed:
        """The request in a body that is for this signature.

        Raises:
            InvalidArgument: in TensorFlow Serving's words, or a `SpecMismatch` that names the
                input.
        """
        parsed = self.parse_usual(body)
        return self.parse_document(load(body)) if parsed is None else parsed

    @property
    def usual(self) -> Callable[[Buffer], Parsed | None] | None:
        """The reading of bodies that look as most do, or None where the inputs allow none."""
        return None if self._fast is None else self._fast.parse

    def parse_usual(self, body: Buffer) -> Parsed | None:
        """The request if the body looks as most do and is for this signature, else None."""
        return None if self._fast is None else self._fast.parse(body)

    def parse_document(self, document: Mapping[str, object]) -> Parsed:
        """The request in a body that was read as JSON, by the complete rules.

        Raises:
            InvalidArgument: as for `parse`.
        """
        signature_name = signature_name_of(document)
        if signature_name != self.name:
            raise _no_signature(signature_name)
        if not self._specs:
            raise InvalidArgument(f"Failed to get input map for signature: {self.name}")
        columnar = "inputs" in document
        if "instances" in document:
            if columnar:
                raise InvalidArgument(
                    f"JSON Value: {clip(document)} Not formatted correctly expecting only one of "
                    "'inputs' or 'instances' keys to exist"
                )
            document = self._with_even_bags(document)
            arrays = _row_arrays(document, self._rows, self._once)
            if self._once:
                arrays = _with_context(document, self._specs, arrays)
        elif columnar:
            if self._once and "context" in document:
                raise InvalidArgument("'context' goes with 'instances'; 'inputs' has every input")
            document = self._with_even_bags(document)
            arrays = _columnar_arrays(document["inputs"], self._specs)
        else:
            raise InvalidArgument("Missing 'inputs' or 'instances' key")
        check(self._specs, arrays)
        return Parsed(
            signature_name=self.name,
            arrays=arrays,
            rows=_rows_of(self._specs, arrays),
            columnar=columnar,
        )

    def _with_even_bags(self, document: Mapping[str, object]) -> Mapping[str, object]:
        """The request with bags of one length; as it is where nothing has to be filled."""
        if not self._bags:
            return document
        changed: dict[str, object] = {}
        if isinstance(columns := document.get("inputs"), dict) and not is_base64(columns):
            if found := self._bags.filled(columns):
                changed["inputs"] = columns | found
        elif "inputs" in document and len(self._specs) == 1:
            if found := self._bags.filled(dict.fromkeys(self._specs, columns)):
                (changed["inputs"],) = found.values()
        elif isinstance(rows := document.get("instances"), list) and rows:
            if all(isinstance(row, dict) and row.keys() == self._rows.keys() for row in rows):
                found = self._bags.filled({name: [r[name] for r in rows] for name in self._rows})
                if found:
                    changed["instances"] = [
                        row | {name: bags[at] for name, bags in found.items()}
                        for at, row in enumerate(rows)
                    ]
            elif len(self._rows) == 1 and (
                found := self._bags.filled(dict.fromkeys(self._rows, rows))
            ):
                (changed["instances"],) = found.values()
        if isinstance(context := document.get("context"), dict):
            changed["context"] = context | self._bags.filled(context)
        return {**document, **changed} if changed else document

    def render(self, outputs: Mapping[str, Array], columnar: bool) -> bytes:
        """The body of the answer; see `render_predictions`."""
        return render_predictions(outputs, columnar)


class RequestParser:
    """Reads the predict bodies of one version, whichever of its signatures they are for.

    The codecs are made once, here. `codecs` maps signature name to codec.
    """

    def __init__(self, signatures: Mapping[str, Signature]) -> None:
        self.codecs: Mapping[str, PredictCodec] = MappingProxyType(
            {name: PredictCodec(signature, name) for name, signature in signatures.items()}
        )
        self._default = self.codecs.get(DEFAULT_SIGNATURE)
        self._has_others = len(self.codecs) > (self._default is not None)
        self._usual = None if self._default is None else self._default.usual

    def parse(self, body: Buffer) -> Parsed:
        """The request in a body.

        Raises:
            InvalidArgument: it is not a predict request, there is no such signature, or the
                tensors do not fit it.
        """
        # `parse_usual`, as far as it goes for nearly all: a call less.
        parsed = None if self._usual is None else self._usual(body)
        if parsed is None and self._has_others:
            parsed = self._parse_named(body)
        if parsed is not None:
            return parsed
        document = load(body)
        name = signature_name_of(document)
        codec = self.codecs.get(name)
        if codec is None:
            raise _no_signature(name)
        return codec.parse_document(document)

    def parse_usual(self, body: Buffer) -> Parsed | None:
        """The request in a body that looks as most do, else None; quick, whatever the body is."""
        if self._usual is not None:
            parsed = self._usual(body)
            if parsed is not None:
                return parsed
        return self._parse_named(body) if self._has_others else None

    def _parse_named(self, body: Buffer) -> Parsed | None:
        """Try the signature that the body seems to name; the codec itself makes sure."""
        match = _NAMES_SIGNATURE.search(body)
        if match is None:
            return None
        codec = self.codecs.get(match[1].decode("utf-8", "replace"))
        return None if codec is None else codec.parse_usual(body)


def signature_name_of(document: Mapping[str, object]) -> str:
    """The signature that a request is for.

    Raises:
        InvalidArgument: ``signature_name`` is not a string.
    """
    name = document.get("signature_name", "")
    if not isinstance(name, str):
        raise InvalidArgument(
            f"JSON Value: {clip(document)} not formatted correctly. "
            "'signature_name' key must be a string value."
        )
    return name or DEFAULT_SIGNATURE


def _row_arrays(
    document: Mapping[str, object], specs: Mapping[str, Spec], once: Set[str]
) -> dict[str, Array]:
    instances = document["instances"]
    if not isinstance(instances, list):
        raise InvalidArgument(
            f"JSON Value: {clip(document)} Expecting 'instances' to be an list/array"
        )
    if not instances:
        raise InvalidArgument(f"JSON Value: {clip(document)} No values in 'instances' array")
    named = _is_named(instances[0])
    if not named and len(specs) > 1:
        raise InvalidArgument(
            "instances is a plain list, but expecting list of objects as multiple "
            "input tensors required as per tensorinfo_map"
        )
    for index, element in enumerate(instances):
        if _is_named(element) != named:
            wanted, got = ("object", "list") if named else ("value/list", "object")
            raise InvalidArgument(f"Expecting {wanted} but got {got} at item {index} of input list")
        if named:
            _check_names(element, specs, once, index)
    if named:
        return {
            name: _column([each[name] for each in instances], spec.dtype, f" key: {name}")
            for name, spec in specs.items()
        }
    ((name, spec),) = specs.items()
    return {name: _column(instances, spec.dtype)}


def _is_named(element: object) -> bool:
    return isinstance(element, dict) and not is_base64(element)


def _check_names(
    element: Mapping[str, object], specs: Mapping[str, Spec], once: Set[str], index: int
) -> None:
    if element.keys() == specs.keys():
        return
    if misplaced := sorted(element.keys() & once):
        raise InvalidArgument(
            f"Failed to process element: {index} of 'instances' list. "
            f"input {clip(misplaced[0])} is per request: give it once, in 'context'"
        )
    unknown = sorted(element.keys() - specs.keys())
    detail = f" does not have named input: {clip(unknown[0])};" if unknown else ""
    raise InvalidArgument(
        f"Failed to process element: {index} of 'instances' list. "
        f"JSON object: {clip(element)}{detail} keys must be equal to: {','.join(sorted(specs))}"
    )


def _column(values: list[object], dtype: str, key: str = "") -> Array:
    """One input's values of all instances, which must be of one shape."""
    try:
        leaves, shape = gather(values, dtype)
    except InvalidArgument:
        _complain(values, dtype, key)
        raise
    return array_of(leaves, shape, dtype)


def _complain(values: list[object], dtype: str, key: str) -> None:
    """Find the first instance that is wrong in itself or unlike the first one, and say so."""
    size = -1
    wanted: tuple[int, ...] = ()
    for index, value in enumerate(values):
        try:
            leaves, shape = gather(value, dtype)
            if not index:
                size, wanted = len(leaves), shape
            if len(leaves) != size:
                raise InvalidArgument(f"Expecting tensor size: {size} but got: {len(leaves)}")
            if shape != wanted:
                raise InvalidArgument(
                    f"Expecting shape {_shape_text(wanted)} but got: {_shape_text(shape)}"
                )
        except InvalidArgument as error:
            raise InvalidArgument(
                f"Failed to process element: {index}{key} of 'instances' list. "
                f"Error: {error.code}: {error.message}"
            ) from None


def _with_context(
    document: Mapping[str, object], specs: Mapping[str, Spec], rows: Mapping[str, Array]
) -> dict[str, Array]:
    """The arrays of the rows and, from ``context``, what is per request, as they are declared."""
    context = document.get("context", {})
    if not isinstance(context, dict):
        raise InvalidArgument(f"JSON Value: {clip(document)} Expecting 'context' to be an object")
    if unknown := sorted(context.keys() - (specs.keys() - rows.keys())):
        raise InvalidArgument(f"'context' object has {clip(unknown[0])}, no input per request")
    arrays: dict[str, Array] = {}
    for name, spec in specs.items():
        if name in rows:
            arrays[name] = rows[name]
        elif name in context:
            arrays[name] = _whole(context[name], spec)
        else:
            raise InvalidArgument(f"Missing named input: {name} in 'context' object.")
    return arrays


def _columnar_arrays(inputs: object, specs: Mapping[str, Spec]) -> dict[str, Array]:
    if not isinstance(inputs, dict) or is_base64(inputs):
        if len(specs) > 1:
            raise InvalidArgument(
                "inputs is a plain value/list, but expecting an object as multiple "
                "input tensors required as per tensorinfo_map"
            )
        inputs = dict.fromkeys(specs, inputs)
    arrays: dict[str, Array] = {}
    for name, spec in specs.items():
        if name not in inputs:
            raise InvalidArgument(f"Missing named input: {name} in 'inputs' object.")
        arrays[name] = _whole(inputs[name], spec)
    return arrays


def _whole(value: object, spec: Spec) -> Array:
    """One input; what is per request may leave its only row's dimension out."""
    leaves, shape = gather(value, spec.dtype)
    if spec.per_request and len(shape) == len(spec.shape) - 1:
        shape = (1, *shape)
    return array_of(leaves, shape, spec.dtype)


def _rows_of(specs: Mapping[str, Spec], arrays: Mapping[str, Array]) -> int:
    for name, spec in specs.items():
        if spec.batch is not None and not spec.per_request:
            return int(arrays[name].shape[0])
    return 1


def _shape_text(shape: tuple[int, ...]) -> str:
    return "[" + ",".join(map(str, shape)) + "]"


def _no_signature(name: str) -> InvalidArgument:
    return InvalidArgument(f'Serving signature name: "{name}" not found in signature def')
