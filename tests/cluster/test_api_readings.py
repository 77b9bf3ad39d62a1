"""The typed and the complete reading of predict bodies, held together on generated requests."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from cluster.api import PredictCodec, RequestParser
from cluster.api.jsontext import load
from shards.errors import SpecMismatch
from shards.specs import DTYPES, STRING, Spec, check
from tests.cluster.api_support import accepted, assert_same_arrays, signature

TEXT = signature({"s": Spec(("b",), STRING)})
SHAPES = st.lists(st.one_of(st.integers(0, 3), st.sampled_from(["t", "u"])), max_size=3)
NAMES = st.sampled_from(["x", "y", "b64", "a b", "ü"])


@st.composite
def spec_maps(draw: st.DrawFn) -> dict[str, Spec]:
    # An object of the one key "b64" is bytes, whatever an input is called.
    names = draw(
        st.lists(NAMES.filter(lambda name: name != "b64"), min_size=1, max_size=3, unique=True)
    )
    specs = {}
    for name in names:
        rest = tuple(draw(SHAPES))
        shape = ("b", *rest) if draw(st.booleans()) or len(names) == 1 else rest
        specs[name] = Spec(shape, draw(st.sampled_from(sorted(DTYPES))))
    for name in names[1:]:
        # The first keeps the rows.
        if specs[names[0]].batch == specs[name].batch == "b" and draw(st.booleans()):
            specs[name] = replace(specs[name], per="request")
    return specs


def leaves(dtype: str) -> st.SearchStrategy[Any]:
    if dtype == STRING:
        return st.text(max_size=4)
    if dtype == "bool":
        return st.booleans()
    if "float" in dtype:
        return st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers())
    limits = np.iinfo(dtype)
    return st.integers(int(limits.min), int(limits.max))


@st.composite
def requests(draw: st.DrawFn) -> tuple[dict[str, Spec], dict[str, Any]]:
    """Specs and a document that fits them, in one of the formats."""
    specs = draw(spec_maps())
    sizes = {"b": draw(st.integers(1, 3)), "t": draw(st.integers(1, 3)), "u": 2}

    def value(dtype: str, shape: tuple[int | str, ...]) -> Any:
        if not shape:
            return draw(leaves(dtype))
        size = shape[0] if isinstance(shape[0], int) else sizes[shape[0]]
        return [value(dtype, shape[1:]) for _ in range(size)]

    named = len(specs) > 1 or draw(st.booleans())
    rowwise = {name: spec for name, spec in specs.items() if not spec.per_request}
    if all(spec.batch == "b" for spec in specs.values()) and draw(st.booleans()):
        rows = [
            {name: value(spec.dtype, spec.shape[1:]) for name, spec in rowwise.items()}
            for _ in range(sizes["b"])
        ]
        named = len(rowwise) > 1 or draw(st.booleans())
        document: dict[str, Any] = {
            "instances": rows if named else [next(iter(row.values())) for row in rows]
        }
        if once := {n: value(s.dtype, s.row_shape) for n, s in specs.items() if s.per_request}:
            document["context"] = once
        return specs, document
    columns = {
        name: value(spec.dtype, spec.row_shape if spec.per_request else spec.shape)
        for name, spec in specs.items()
    }
    return specs, {"inputs": columns if named else next(iter(columns.values()))}


@settings(max_examples=300, deadline=None)
@given(requests(), st.booleans(), st.sampled_from([None, "", "serving_default"]))
def test_both_readings_agree_bit_by_bit_on_every_request_that_fits(
    request_of: tuple[dict[str, Spec], dict[str, Any]], compact: bool, name: str | None
) -> None:
    specs, document = request_of
    if name is not None:
        document = {"signature_name": name, **document}
    body = json.dumps(document, separators=(",", ":") if compact else None).encode()
    codec = PredictCodec(signature(specs))
    try:
        complete = codec.parse_document(load(body))
    except SpecMismatch:
        # A list of size 0 hides the dimensions inside it.
        assert codec.parse_usual(body) is None
        return
    check(specs, complete.arrays)
    usual = codec.parse_usual(body)
    if usual is None:
        # Only an ambiguous name or a list of size 0 is left to the complete reading.
        assert "b64" in specs or any(0 in array.shape for array in complete.arrays.values())
        return
    assert_same_arrays(usual.arrays, complete.arrays)
    assert (usual.rows, usual.columnar) == (complete.rows, complete.columnar)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["x", "y", "b64"]), inner, max_size=2)
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(
    spec_maps(),
    st.dictionaries(
        st.sampled_from(["instances", "inputs", "context", "signature_name", "other"]), JSON_VALUES
    ),
)
def test_what_the_typed_reading_accepts_the_complete_one_accepts_too(
    specs: dict[str, Spec], document: dict[str, Any]
) -> None:
    body = json.dumps(document).encode()
    codec = PredictCodec(signature(specs))
    usual = codec.parse_usual(body)
    if usual is not None:
        assert_same_arrays(usual.arrays, codec.parse_document(load(body)).arrays)
    elif (complete := accepted(lambda: codec.parse(body))) is not None:
        check(specs, complete.arrays)


@settings(max_examples=300, deadline=None)
@given(spec_maps(), st.binary(max_size=60), st.integers(0, 60), st.data())
def test_no_bytes_raise_anything_but_a_serving_error(
    specs: dict[str, Spec], noise: bytes, place: int, data: st.DataObject
) -> None:
    parser = RequestParser({"serving_default": signature(specs), "text": TEXT})
    good = data.draw(
        st.sampled_from(
            [
                b'{"signature_name":"text","instances":["abc",{"b64":"aGk="}]}',
                b'{"instances":[{"x":[1.0,-2e3],"y":null}]}',
                b'{"inputs":{"x":[[NaN,1]],"y":"\\ud83d\\ude00"}}',
            ]
        )
    )
    for body in (noise, good[:place] + noise + good[place + len(noise) :], good[:place]):
        parsed = accepted(lambda body=body: parser.parse(body))  # type: ignore[misc]
        assert parsed is None or parsed.rows >= 0
