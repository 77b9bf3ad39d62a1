"""Predict requests: TensorFlow Serving's tables A and B, and the two readings held together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from batching.errors import InvalidArgument
from cluster.api import Parsed, PredictCodec, RequestParser
from shards.errors import SpecMismatch
from shards.specs import DTYPES, STRING, Spec
from tests.cluster.api_support import assert_same_arrays, f32, f64, i32, signature, texts

X = {"x": Spec(("b",))}
X2 = {"x": Spec(("b", "k"))}
INT2 = {"x": Spec(("b", "k"), "int32")}
TWO = {"a": Spec(("b", 2)), "b": Spec(("b",), "int64")}
DEEP = 500_000


def parse(specs: dict[str, Spec], body: str | bytes) -> Parsed:
    data = body.encode() if isinstance(body, str) else body
    return RequestParser({"serving_default": signature(specs)}).parse(data)


def refusal(specs: dict[str, Spec], body: str) -> str:
    with pytest.raises(InvalidArgument) as caught:
        parse(specs, body)
    return str(caught.value)


GOOD: list[tuple[str, dict[str, Spec], str, dict[str, Any], bool]] = [
    ("A1", X, '{"instances":[2.0,3.0,4.0]}', {"x": f32([2, 3, 4])}, False),
    ("A2", X, '{"inputs":[2.0,3.0,4.0]}', {"x": f32([2, 3, 4])}, True),
    ("A3", X2, '{"instances":[[1.0,2.0],[3.0,4.0]]}', {"x": f32([[1, 2], [3, 4]])}, False),
    ("A4", X, '{"instances":[1.0,2.0]}', {"x": f32([1, 2])}, False),
    (
        "A6",
        X,
        '{"signature_name":"serving_default","instances":[3.0,4.0]}',
        {"x": f32([3, 4])},
        False,
    ),
    ("A6-empty name", X, '{"signature_name":"","instances":[3.0]}', {"x": f32([3])}, False),
    (
        "A7",
        X,
        '{"instances":[1,2.0,3,4,5.003,0.007,0.0]}',
        {"x": f32([1, 2, 3, 4, 5.003, 0.007, 0])},
        False,
    ),
    ("A8", X, '{"instances":[1435774380]}', {"x": f32([1435774380])}, False),
    ("A9-large", X, '{"instances":[1.797e308,-1.797e308]}', {"x": f32([np.inf, -np.inf])}, False),
    ("A9-small", X, '{"instances":[2.2e-308,-2.2e-308]}', {"x": f32([0.0, -0.0])}, False),
    ("A9-larger than a double", X, '{"instances":[1e999]}', {"x": f32([np.inf])}, False),
    (
        "A9-integers of any length",
        {"x": Spec(("b",), "bfloat16")},
        '{"instances":[1' + "0" * 5000 + ",-1" + "0" * 400 + ",7]}",
        {"x": np.array([np.inf, -np.inf, 7], DTYPES["bfloat16"])},
        False,
    ),
    (
        "A10",
        {"s": Spec(("b",), STRING)},
        '{"instances":[{"b64":"aGVsbG8="},{"b64":"d29ybGQ="}]}',
        {"s": texts([b"hello", b"world"])},
        False,
    ),
    (
        "A11",
        {"s": Spec(("b", 1), STRING)},
        '{"instances":[[{"b64":"aGVsbG8="}],[{"b64":"d29ybGQ="}]]}',
        {"s": texts([[b"hello"], [b"world"]])},
        False,
    ),
    (
        "A12",
        {"default": Spec(("b", 2, 1), STRING)},
        '{"instances":[{"default":[[{"b64":"aGVsbG8="}],[{"b64":"d29ybGQ="}]]}]}',
        {"default": texts([[[b"hello"], [b"world"]]])},
        False,
    ),
    (
        "A13",
        {
            "int_tensor": Spec(("b", 3, 2), "int32"),
            "str_tensor": Spec(("b",), STRING),
            "flt_tensor": Spec(("b", 2)),
            "dbl_tensor": Spec(("b",), "float64"),
        },
        """{"instances":[
            {"int_tensor":[[1,2],[3,4],[5,6]],"str_tensor":"foo","flt_tensor":[NaN,Infinity],
             "dbl_tensor":1.5},
            {"int_tensor":[[7,8],[9,0],[1,2]],"str_tensor":"bar","flt_tensor":[2.0,-Infinity],
             "dbl_tensor":10}]}""",
        {
            "int_tensor": i32([[[1, 2], [3, 4], [5, 6]], [[7, 8], [9, 0], [1, 2]]]),
            "str_tensor": texts([b"foo", b"bar"]),
            "flt_tensor": f32([[np.nan, np.inf], [2, -np.inf]]),
            "dbl_tensor": f64([1.5, 10]),
        },
        False,
    ),
    (
        "A14-named",
        {"int_tensor": Spec(("b", 3, 2), "int32")},
        '{"inputs":{"int_tensor":[[[1,2],[3,4],[5,6]]]}}',
        {"int_tensor": i32([[[1, 2], [3, 4], [5, 6]]])},
        True,
    ),
    (
        "A14-unnamed",
        {"int_tensor": Spec(("b", 3, 2), "int32")},
        '{"inputs":[[[1,2],[3,4],[5,6]]]}',
        {"int_tensor": i32([[[1, 2], [3, 4], [5, 6]]])},
        True,
    ),
    (
        "A15",
        {"bin_tensor": Spec((), STRING), "x": Spec(("b",))},
        '{"inputs":{"bin_tensor":{"b64":"aGVsbG8="},"x":[1,2]}}',
        {"bin_tensor": texts(b"hello"), "x": f32([1, 2])},
        True,
    ),
    (
        "A15-unnamed",
        {"bin_tensor": Spec((), STRING)},
        '{"inputs":{"b64":"aGVsbG8="}}',
        {"bin_tensor": texts(b"hello")},
        True,
    ),
    ("A15-number", {"x": Spec(())}, '{"inputs":2.5}', {"x": f32(2.5)}, True),
    (
        "A23",
        X,
        '{"junk":' + "[" * DEEP + "]" * DEEP + ',"instances":[1.0]}',
        {"x": f32([1])},
        False,
    ),
    ("text", {"s": Spec(("b",), STRING)}, '{"instances":["ä","\\ud83d\\ude00"]}',
     {"s": texts(["ä".encode(), "😀".encode()])}, False),
    ("named row", X, '{"instances":[{"x":1.0},{"x":2}]}', {"x": f32([1, 2])}, False),
    ("named column", X, '{"inputs":{"x":[1,2]}}', {"x": f32([1, 2])}, True),
    ("column with a key too many", X, '{"inputs":{"x":[1,2],"y":3}}', {"x": f32([1, 2])}, True),
    ("no rows", X, '{"inputs":[]}', {"x": f32([])}, True),
    ("bools", {"x": Spec(("b",), "bool")}, '{"instances":[true,false]}',
     {"x": np.array([True, False])}, False),
    ("an input called b64", {"b64": Spec(("b",), STRING)}, '{"instances":[{"b64":"aGk="}]}',
     {"b64": texts([b"hi"])}, False),
    ("a name no field can have", {'"': Spec(("b",))}, '{"instances":[{"\\"":1}]}',
     {'"': f32([1])}, False),
    ("base64 without padding", {"s": Spec(("b",), STRING)}, '{"instances":[{"b64":"aGk"}]}',
     {"s": texts([b"hi"])}, False),
]  # fmt: skip


@pytest.mark.parametrize(
    ("specs", "body", "arrays", "columnar"),
    [case[1:] for case in GOOD],
    ids=[case[0] for case in GOOD],
)
def test_a_good_request_is_the_arrays_it_means(
    specs: dict[str, Spec], body: str, arrays: dict[str, Any], columnar: bool
) -> None:
    parsed = parse(specs, body)
    assert_same_arrays(parsed.arrays, arrays)
    assert parsed.columnar is columnar
    assert parsed.signature_name == "serving_default"
    batched = [array.shape[0] for name, array in arrays.items() if specs[name].batch]
    assert parsed.rows == (batched[0] if batched else 1)


def test_a16_a_body_is_read_by_its_length_and_from_any_buffer() -> None:
    text = b'{"instances":[1.0]}'
    parser = RequestParser({"serving_default": signature(X)})
    for body in (text, bytearray(text), memoryview(b"#" + text + b"]junk")[1:-5]):
        assert parser.parse(body).arrays["x"].tolist() == [1.0]
    named = memoryview(b'{"signature_name":"other","inputs":[NaN]}#')[:-1]
    parser = RequestParser({"serving_default": signature(X), "other": signature(X)})
    assert parser.parse(named).signature_name == "other"


BAD: list[tuple[str, dict[str, Spec], str, str]] = [
    ("B1", X, "", "JSON Parse error: The document is empty"),
    ("B2", X, "instances = [1, 2]", "JSON Parse error: Invalid value. at offset: 0"),
    (
        "B3",
        X,
        '{"instances":["x","y"]}',
        'JSON Value: "x" Type: String is not of expected type: float',
    ),
    (
        "B3-place",
        X,
        '{"instances":[1,"y"]}',
        "Failed to process element: 1 of 'instances' list. Error: INVALID_ARGUMENT: JSON Value",
    ),
    ("B4", X, '{"signature_name":100}', "'signature_name' key must be a string value."),
    ("B8", X, '{"instances":[1],"inputs":[1]}', "Not formatted correctly"),
    ("B9", X2, '{"instances":[[1,2],[3,4],[5,6,7]]}', "Expecting tensor size: 2 but got: 3"),
    (
        "B10-deeper",
        X2,
        '{"instances":[[1,2],[3,4],[[5,6]]]}',
        "Expecting shape [2] but got: [1,2]",
    ),
    ("B10-scalar", X, '{"instances":[1,[1]]}', "Expecting shape [] but got: [1]"),
    (
        "B11",
        INT2,
        '{"instances":[[1,2],["a","b"]]}',
        'Value: "a" Type: String is not of expected type: int32',
    ),
    (
        "B12-size",
        TWO,
        '{"instances":[{"a":[1,2],"b":1},{"a":[1],"b":1}]}',
        "element: 1 key: a of 'instances' list. Error: INVALID_ARGUMENT: Expecting tensor size",
    ),
    (
        "B12-shape",
        TWO,
        '{"instances":[{"a":[1,2],"b":1},{"a":[[1,2]],"b":1}]}',
        "Expecting shape [2] but got: [1,2]",
    ),
    (
        "B13-list",
        X,
        '{"instances":[{"x":1},2]}',
        "Expecting object but got list at item 1 of input list",
    ),
    (
        "B13-object among texts",
        {"s": Spec(("b",), STRING)},
        '{"instances":["a",{"s":"b"}]}',
        "Expecting value/list but got object at item 1 of input list",
    ),
    (
        "B13-object among lists",
        X2,
        '{"instances":[[1],{"x":[2]}]}',
        "Expecting value/list but got object at item 1 of input list",
    ),
    (
        "B13-list among named lists",
        X2,
        '{"instances":[{"x":[2]},[1]]}',
        "Expecting object but got list at item 1 of input list",
    ),
    (
        "B13-object",
        X,
        '{"instances":[1,{"x":2}]}',
        "Expecting value/list but got object at item 1 of input list",
    ),
    ("B14", X, "{}", "Missing 'inputs' or 'instances' key"),
    ("B15-scalar", X, '{"instances":5}', "Expecting 'instances' to be an list/array"),
    ("B15-empty", X, '{"instances":[]}', "No values in 'instances' array"),
    ("B16-missing", TWO, '{"instances":[{"a":[1,2]}]}', "keys must be equal to: a,b"),
    (
        "B16-unknown",
        TWO,
        '{"instances":[{"a":[1,2],"b":1,"c":1}]}',
        'does not have named input: "c"; keys must be equal to: a,b',
    ),
    ("B17", TWO, '{"inputs":{"a":[[1,2]]}}', "Missing named input: b in 'inputs' object."),
    (
        "B18",
        {"s": Spec(("b",), STRING)},
        '{"instances":[{"b64":"?"}]}',
        "Unable to base64 decode",
    ),
    (
        "B18-length",
        {"s": Spec(("b",), STRING)},
        '{"instances":[{"b64":"aGVsb"}]}',
        "Unable to base64 decode",
    ),
    (
        "B18-object",
        {"s": Spec(("b", 1), STRING)},
        '{"instances":[[{"b46":"aGk="}]]}',
        "not formatted correctly for base64 data",
    ),
    (
        "B19",
        X,
        '{"signature_name":"x","instances":[1]}',
        'Serving signature name: "x" not found in signature def',
    ),
    (
        "B20",
        X,
        '{"signature_name":' + "[" * DEEP + "]" * DEEP + ',"instances":[1]}',
        "key must be a string value",
    ),
    ("B20-instances", X, '{"instances":' + "[" * 9999 + "]" * 9999 + "}", "unexpected level"),
    ("B20-unclosed", X, '{"instances":' + "[" * 9999, "JSON Parse error: Invalid value."),
    ("object for a float", X2, '{"instances":[[{"y":1}]]}', "not of expected type: float"),
    ("b64 for a float", X, '{"instances":[{"b64":"aGk="}]}', "not of expected type: float"),
    ("bool for a float", X, '{"instances":[true]}', "Type: True is not of expected type: float"),
    ("null for a float", X, '{"instances":[null]}', "Type: Null is not of expected type: float"),
    ("float for an int", INT2, '{"instances":[[1.0]]}', "not of expected type: int32"),
    ("bool for an int", INT2, '{"instances":[[true]]}', "not of expected type: int32"),
    (
        "int out of range",
        INT2,
        '{"instances":[[1,2147483648]]}',
        "JSON Value: 2147483648 Type: Number is not of expected type: int32",
    ),
    (
        "negative for unsigned",
        {"x": Spec(("b",), "uint64")},
        '{"instances":[-1]}',
        "JSON Value: -1 Type: Number is not of expected type: uint64",
    ),
    (
        "int for a bool",
        {"x": Spec(("b",), "bool")},
        '{"instances":[1]}',
        "not of expected type: bool",
    ),
    (
        "number for a string",
        {"x": Spec(("b",), STRING)},
        '{"instances":[1]}',
        "not of expected type: string",
    ),
    (
        "half a surrogate pair",
        {"x": Spec(("b",), STRING)},
        '{"instances":["\\ud800"]}',
        "The surrogate pair in string is invalid.",
    ),
    ("scalar too early", X2, '{"instances":[[[1],2]]}', "found at incorrect level: 2"),
    ("list too deep", X2, '{"instances":[[1,[2]]]}', "Encountered list at unexpected level: 1"),
    (
        "ragged inside a row",
        {"x": Spec(("b", "k", "l"))},
        '{"instances":[[[1,2],[3]]]}',
        "Encountered list at unexpected size: 1 at level: 1 expected size: 2",
    ),
    (
        "ragged column",
        X2,
        '{"inputs":[[1,2],[3]]}',
        "Encountered list at unexpected size: 1 at level: 1 expected size: 2",
    ),
    ("several inputs, plain rows", TWO, '{"instances":[[1,2]]}', "expecting list of objects"),
    ("several inputs, plain columns", TWO, '{"inputs":[[1,2]]}', "expecting an object as"),
    ("no inputs", {}, '{"instances":[1]}', "Failed to get input map for signature"),
]


@pytest.mark.parametrize(
    ("specs", "body", "words"), [case[1:] for case in BAD], ids=[case[0] for case in BAD]
)
def test_a_bad_request_is_refused_in_tensorflow_servings_words(
    specs: dict[str, Spec], body: str, words: str
) -> None:
    message = refusal(specs, body)
    assert words in message
    assert len(message) < 1000, "a message must not echo a whole body"


@pytest.mark.parametrize(
    ("specs", "body", "name"),
    [
        ({"pixels": Spec(("b", 64))}, '{"instances":[[1,2]]}', "pixels"),
        ({"pixels": Spec(("b", 64))}, '{"instances":[1,2]}', "pixels"),
        ({"n": Spec(())}, '{"instances":[{"n":1}]}', "n"),
        (
            {"ids": Spec(("b", "t")), "mask": Spec(("b", "t"))},
            '{"inputs":{"ids":[[1,2]],"mask":[[1]]}}',
            "mask",
        ),
        ({"a": Spec(("b",)), "b": Spec(("b",))}, '{"inputs":{"a":[1,2],"b":[1]}}', "b"),
        ({"square": Spec(("b", "t", "t"))}, '{"instances":[[[1,2]]]}', "square"),
    ],
)
def test_a_tensor_of_another_shape_is_refused_by_name(
    specs: dict[str, Spec], body: str, name: str
) -> None:
    with pytest.raises(SpecMismatch, match=f"input '{name}' must have shape"):
        parse(specs, body)


SIGNATURES = {
    "serving_default": signature(X2),
    "text": signature({"s": Spec(("b",), STRING)}, method="classify"),
}


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ('{"instances":[[1,2]]}', "serving_default"),
        ('{"signature_name":"text","instances":["a"]}', "text"),
        ('{"instances":["a"], "signature_name" : "text"}', "text"),
        ('{"signature_name":"te\\u0078t","instances":["a"]}', "text"),
        ('{"signature_name":"text","inputs":{"s":[{"b64":"aGk="}]}}', "text"),
        # The words inside a value name nothing.
        ('{"instances":[[1]],"note":{"signature_name":"text"}}', "serving_default"),
        ('{"note":"\\"signature_name\\":","signature_name":"text","instances":["a"]}', "text"),
    ],
)
def test_the_body_chooses_the_signature(body: str, name: str) -> None:
    assert RequestParser(SIGNATURES).parse(body.encode()).signature_name == name


def test_a_codec_reads_only_bodies_for_its_own_signature() -> None:
    codec = PredictCodec(SIGNATURES["text"], "text")
    assert codec.parse(b'{"signature_name":"text","instances":["a"]}').rows == 1
    with pytest.raises(InvalidArgument, match='"serving_default" not found'):
        codec.parse(b'{"instances":["a"]}')


def test_without_a_default_signature_a_request_must_name_one() -> None:
    parser = RequestParser({"text": SIGNATURES["text"]})
    assert parser.parse(b'{"signature_name":"text","instances":["a"]}').rows == 1
    with pytest.raises(InvalidArgument, match='"serving_default" not found in signature def'):
        parser.parse(b'{"instances":["a"]}')


@pytest.mark.parametrize(
    ("specs", "body"),
    [
        (X, '{"instances":[1,2.5]}'),
        (X2, '{"instances":[[1.0,2.0]]}'),
        (X2, '{"instances":[[1.0],[2.0]],"signature_name":"serving_default"}'),
        (X2, '{"instances":[{"x":[1.0]}]}'),
        (X2, '{"inputs":[[1.0,2.0]]}'),
        (X2, '{"inputs":{"x":[[1.0,2.0]]}}'),
        (INT2, '{"instances":[[1,2]]}'),
        ({"s": Spec(("b",), STRING)}, '{"instances":["a","b"]}'),
        ({"s": Spec(("b",), "bool")}, '{"instances":[true]}'),
        (TWO, '{"instances":[{"a":[1,2],"b":1}]}'),
        (TWO, '{"inputs":{"a":[[1,2]],"b":[1]}}'),
        ({"n": Spec(()), "x": Spec(("b",))}, '{"inputs":{"n":1.5,"x":[1]}}'),
    ],
)
def test_the_usual_formats_take_the_typed_reading(specs: dict[str, Spec], body: str) -> None:
    assert PredictCodec(signature(specs)).parse_usual(body.encode()) is not None


@pytest.mark.parametrize(
    "body",
    [
        '{"instances":[NaN]}',
        '{"instances":[1],"extra":1}',
        '{"instances":[1],"signature_name":"other"}',
        '{"instances":["a"]}',
        '{"instances":[1],"inputs":[1]}',
        "{}",
        "",
        '{"instances":' + "[" * 9999,
    ],
)
def test_the_typed_reading_leaves_all_doubt_to_the_complete_one(body: str) -> None:
    assert PredictCodec(signature(X)).parse_usual(body.encode()) is None
