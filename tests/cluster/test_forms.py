"""Bodies without JSON: what is read is what was written, and what is wrong is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batching.errors import InvalidArgument
from cluster.api import ColumnsParser, ExamplesParser
from cluster.forms import Columns, Form, Forms, Written, forms_of, packed, raw
from cluster.forms.memory import array_of
from shards.specs import DTYPES, Spec
from tests.cluster.api_support import (
    accepted,
    assert_same_array,
    assert_same_arrays,
    f32,
    i32,
    signature,
    texts,
)

EVERY_DTYPE = {
    name: texts([[b"", b"\x00\xff"], [b"word", b"\xc3\xa9"]])
    if name == "string"
    else np.array([[0, 1], [1, 0]]).astype(dtype)
    for name, dtype in DTYPES.items()
}


def joined(written: Written) -> bytes:
    return b"".join(written.buffers)


def through_raw(columns: Columns) -> Columns:
    written = raw.write_request(columns)
    return raw.read_request(joined(written), written.head_bytes)


def through_packed(columns: Columns) -> Columns:
    return packed.read_request(joined(packed.write_request(columns)))


def through_packed_head(columns: Columns) -> Columns:
    """Raw buffers behind a head in msgpack."""
    written = raw.write_request(columns)
    body = joined(written)
    document = msgspec.json.decode(body[: written.head_bytes])
    head = msgspec.msgpack.encode(document)
    return raw.read_request(head + body[written.head_bytes :], len(head))


THROUGH = pytest.mark.parametrize("through", [through_raw, through_packed, through_packed_head])


@THROUGH
@pytest.mark.parametrize(
    "arrays",
    [
        EVERY_DTYPE,
        {"no rows": np.zeros((0, 5), np.int64), "no strings": texts([]).reshape(0, 3)},
        {"a number": np.array(3.5), "a word": texts(b"x")},
        {"every other": np.arange(12, dtype=np.int32).reshape(3, 4)[:, ::2]},
        {"turned": np.asfortranarray(np.arange(6.0).reshape(2, 3))},
        {"large": np.arange(100_000, dtype=np.float32), "é": f32([1])},
        {},
    ],
    ids=["every dtype", "empty", "scalars", "strided", "by column", "large", "nothing"],
)
def test_what_was_written_is_read(
    through: Callable[[Columns], Columns], arrays: dict[str, Any]
) -> None:
    found = through(Columns(arrays, "some signature"))
    assert found.signature_name == "some signature"
    assert_same_arrays(found.arrays, arrays)


@THROUGH
def test_numbers_are_not_copied(through: Callable[[Columns], Columns]) -> None:
    found = through(Columns({"x": f32([1, 2, 3])})).arrays["x"]
    assert isinstance(found.base, memoryview | np.ndarray | bytes)
    assert not found.flags.owndata


def test_nans_and_halves_keep_every_bit() -> None:
    bits = np.array([0x7FC1, 0xFF80, 0x0001], np.uint16)
    for dtype in (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)):
        array = bits.view(dtype)
        assert_same_array(through_raw(Columns({"x": array})).arrays["x"], array)


@pytest.mark.parametrize("write_read", [(raw, True), (packed, False)])
def test_answers_are_read_as_they_were_written(write_read: tuple[Any, bool]) -> None:
    module, has_head = write_read
    for outputs in (EVERY_DTYPE, {"y": f32([[1, 2]])}, {"y": texts([b"a"])}):
        written = module.write_answer(outputs)
        more = (written.head_bytes,) if has_head else ()
        assert_same_arrays(module.read_answer(joined(written), *more), outputs)


def test_the_first_buffer_is_aligned() -> None:
    for name in ("y", "a longer name of an output"):
        assert raw.write_answer({name: f32([1])}).head_bytes % 64 == 0
        assert raw.write_request(Columns({name: f32([1])})).head_bytes % 64 == 0


def test_large_tensors_are_sent_from_where_they_are() -> None:
    array = np.zeros(1 << 16, np.float32)
    _, buffer = raw.write_answer({"y": array}).buffers
    assert np.shares_memory(np.frombuffer(buffer, np.uint8), array)


@pytest.mark.parametrize("array", [np.array([1 + 2j]), np.array(["text"]), texts(["text"])])
def test_what_does_not_travel_is_refused_by_name(array: Any) -> None:
    for write in (raw.write_answer, packed.write_answer):
        with pytest.raises(InvalidArgument, match="'odd'"):
            write({"odd": array})


# What is wrong


@pytest.mark.parametrize(
    ("dtype", "shape", "data", "words"),
    [
        ("float33", [1], b"1234", "'float33' is not a dtype"),
        ("float32", [2], b"1234", "has 8 bytes, got 4"),
        ("float32", [1], b"12345678", "has 4 bytes, got 8"),
        ("float32", [-1], b"", "no array has the shape"),
        ("float32", [1] * 33, b"1234", "no array has the shape"),
        ("float32", [0, 1 << 39, 1 << 39], b"", "too much of nothing"),
        ("int64", [1 << 30, 0], b"", "too much of nothing"),
        ("int64", [64, 0, 65], b"", "too much of nothing"),
        ("string", [1 << 30, 0], b"", "too much of nothing"),
        ("float32", [1 << 62, 4], b"", "no array has the shape"),
        ("bool", [2], b"\x01\x02", "neither 0 nor 1"),
        ("string", [1 << 39], b"", "strings in 0 bytes"),
        ("string", [2], b"\0\0\0\0", "2 strings in 4 bytes"),
        ("string", [1], b"\5\0\0\0abcd", "1 strings with their lengths are not 8 bytes"),
        ("string", [1], b"\0\0\0\0more", "1 strings with their lengths are not 8 bytes"),
        ("string", [2], b"\4\0\0\0abcd", "2 strings with their lengths are not 8 bytes"),
        ("string", [1], b"\xff\xff\xff\xff", "1 strings with their lengths are not 4 bytes"),
    ],
)
def test_bytes_that_are_not_the_tensor_are_refused_by_name(
    dtype: str, shape: list[int], data: bytes, words: str
) -> None:
    with pytest.raises(InvalidArgument, match="tensor 'x'") as caught:
        array_of("x", dtype, shape, data)
    assert words in str(caught.value)


def test_a_dtype_that_nobody_wants_is_refused_before_its_bytes_are_looked_at() -> None:
    with pytest.raises(InvalidArgument, match="tensor 'x': no input is string"):
        array_of("x", "string", [1 << 20], b"", frozenset({"float32"}))


def raw_body(head: object, data: bytes = b"") -> tuple[bytes, int]:
    text = head if isinstance(head, bytes) else msgspec.json.encode(head)
    return text + data, len(text)


X: dict[str, Any] = {"name": "x", "dtype": "float32", "shape": [1]}
S: dict[str, Any] = {"name": "s", "dtype": "string", "shape": [0]}


@pytest.mark.parametrize(
    ("head", "data", "words"),
    [
        (b"", b"", "the head of a body of 0 bytes"),
        (b"{", b"", "the body's head: "),
        (b"\xc1", b"", "the body's head: "),
        ({"inputs": {}}, b"", "Expected `array`"),
        ({"inputs": [], "more": 1}, b"", "unknown field `more`"),
        ({"inputs": [{**X, "shape": [1] * 33}]}, b"", "length <= 32"),
        ({"inputs": [X] * 1025}, b"", "length <= 1024"),
        ({"inputs": [X, X]}, b"12345678", "'x' is there twice"),
        ({"inputs": [X]}, b"123", "4 bytes from byte"),
        ({"inputs": [X]}, b"12345", "the tensors end at byte"),
        ({"inputs": [{**X, "nbytes": 5}]}, b"1234", "'x' has 4 bytes, not 5"),
        ({"inputs": [S]}, b"", "'s': strings must say their nbytes"),
        ({"inputs": [{**S, "nbytes": -1}]}, b"", "'s': -1 bytes"),
        ({"inputs": [{**S, "nbytes": 1 << 70}]}, b"", ""),
        (b'{"inputs":[{"name":"x","dtype":"int8","shape":[1e400]}]}', b"", "the body's head: "),
        (b'{"inputs":[{"name":"\\ud800","dtype":"?","shape":[]}]}', b"", ""),
    ],
)
def test_heads_that_say_something_else_are_refused(head: object, data: bytes, words: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        raw.read_request(*raw_body(head, data))
    assert words in str(caught.value)


def test_a_head_may_not_be_longer_than_the_body_or_the_bound() -> None:
    for body, head_bytes in ((b"{}", 3), (b" " * (1 << 19), raw.HEAD_BYTES_MAX + 1), (b"{}", 0)):
        with pytest.raises(InvalidArgument, match="the head of a body"):
            raw.read_request(body, head_bytes)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not a request in msgpack"),
        (b"\x80", "missing required field `inputs`"),
        (msgspec.msgpack.encode({"inputs": {}, "more": 1}), "unknown field `more`"),
        (msgspec.msgpack.encode({"inputs": {"x": [1.0]}}), "Expected `object`"),
        # A billion tensors, or sizes, are refused from their number alone.
        (b"\x81\xa6inputs\xdf\x40\x00\x00\x00", "length <= 1024"),
        (b"\x81\xa6inputs\x81\xa1x\x81\xa5shape\xdd\x40\x00\x00\x00", "length <= 32"),
    ],
)
def test_msgpack_that_says_something_else_is_refused(body: bytes, words: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        packed.read_request(body)
    assert words in str(caught.value)


GOOD = Columns({"x": f32([1, 2]), "s": texts([b"a", b""]), "b": np.array([True])}, "name")
GOOD_RAW, GOOD_PACKED = raw.write_request(GOOD), joined(packed.write_request(GOOD))


@st.composite
def damaged(draw: st.DrawFn, body: bytes) -> bytes:
    """A body with a few bytes changed, cut or put in."""
    data = bytearray(body)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(data)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_bytes_raise_anything_but_a_typed_error(data: st.DataObject) -> None:
    body = data.draw(st.binary(max_size=64) | damaged(joined(GOOD_RAW)) | damaged(GOOD_PACKED))
    head_bytes = data.draw(st.sampled_from([0, 1, GOOD_RAW.head_bytes, len(body)]))
    accepted(partial(packed.read_request, body))
    accepted(partial(packed.read_answer, body))
    accepted(partial(raw.read_request, body, head_bytes))
    accepted(partial(raw.read_answer, body, head_bytes))


# Which form


@pytest.mark.parametrize(
    ("headers", "wanted"),
    [
        ({}, None),
        ({b"content-type": b"application/x-www-form-urlencoded", b"accept": b"*/*"}, None),
        ({b"content-type": b"application/octet-stream"}, None),
        ({b"content-type": b"application/json", b"accept": b"application/json"}, None),
        ({b"content-type": b"application/x-msgpack"}, Forms(Form.MSGPACK, Form.MSGPACK)),
        ({b"content-type": b"Application/MsgPack; a=b"}, Forms(Form.MSGPACK, Form.MSGPACK)),
        ({b"inference-header-content-length": b"12"}, Forms(Form.RAW, Form.RAW, 12)),
        ({b"accept": b"application/x-msgpack"}, Forms(Form.JSON, Form.MSGPACK)),
        (
            {b"accept": b"application/json;q=0.5, application/octet-stream"},
            Forms(Form.JSON, Form.RAW),
        ),
        ({b"accept": b"text/html, application/msgpack;q=0"}, None),
        ({b"accept": b"application/x-msgpack;q=what"}, None),
        (
            {b"content-type": b"application/x-msgpack", b"accept": b"application/json, */*"},
            Forms(Form.MSGPACK, Form.JSON),
        ),
        ({b"accept": b"application/x-msgpack" + b" " * 300}, Forms(Form.JSON, Form.MSGPACK)),
    ],
)
def test_headers_say_which_form(headers: dict[bytes, bytes], wanted: Forms | None) -> None:
    assert forms_of(headers) == wanted


@pytest.mark.parametrize("text", [b"-1", b"1.5", b"many", b"1, 1", b"1234567890", b"\xb2"])
def test_the_length_of_a_head_must_be_a_number(text: bytes) -> None:
    with pytest.raises(InvalidArgument, match="must be a number of bytes"):
        forms_of({b"inference-header-content-length": text})


# What a signature makes of it


def test_tensors_become_the_request_of_a_signature() -> None:
    inputs = {"user": Spec(("b", 2), per="request"), "item": Spec(("b",), "int32")}
    parser = ColumnsParser({"serving_default": signature(inputs), "other": signature({})})
    for user in (f32([[1, 2]]), f32([1, 2])):
        written = raw.write_request(Columns({"item": i32([7, 8, 9]), "user": user}))
        for _ in range(2):  # the second time its head is known
            found = parser.parse(joined(written), Forms(Form.RAW, Form.RAW, written.head_bytes))
            assert (found.signature_name, found.rows) == ("serving_default", 3)
            wanted = {"user": f32([[1, 2]]), "item": i32([7, 8, 9])}
            assert_same_arrays(found.arrays, wanted)


def test_a_known_head_over_another_body_is_looked_at_again() -> None:
    parser = ColumnsParser({"serving_default": signature({"x": Spec(("b",))})})
    written = raw.write_request(Columns({"x": f32([1, 2])}))
    forms, body = Forms(Form.RAW, Form.RAW, written.head_bytes), joined(written)
    parser.parse(body, forms)
    for other in (body[:-1], body + b"1234", body[:10]):
        with pytest.raises(InvalidArgument):
            parser.parse(other, forms)
    found = parser.parse(body[:-4] + f32([5]).tobytes(), forms)
    assert_same_arrays(found.arrays, {"x": f32([1, 5])})


@pytest.mark.parametrize("name", ["", "other"])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_msgpack_is_known_by_what_stands_around_its_numbers(name: str, kind: Any) -> None:
    inputs = {"x": Spec(("b", 2))}
    parser = ColumnsParser({each: signature(inputs) for each in ("serving_default", "other")})
    forms = Forms(Form.MSGPACK, Form.MSGPACK)
    for rows in (f32([[1, 2]]), f32([[3, 4]]), f32([[5, 6], [7, 8]]), f32([[9, 0]])):
        body = joined(packed.write_request(Columns({"x": rows}, name)))
        found = parser.parse(kind(body), forms)
        assert (found.signature_name, found.rows) == (name or "serving_default", len(rows))
        assert_same_arrays(found.arrays, {"x": rows})


def test_msgpack_of_a_known_size_that_says_something_else_is_looked_at_again() -> None:
    specs = {"x": Spec(("b",)), "y": Spec(("b",))}
    both = {"serving_default": signature({"x": specs["x"]}), "other": signature({"x": specs["x"]})}
    parser = ColumnsParser(both)
    forms = Forms(Form.MSGPACK, Form.MSGPACK)
    body = joined(packed.write_request(Columns({"x": f32([1, 2])}, "other")))
    assert parser.parse(body, forms).signature_name == "other"
    with pytest.raises(InvalidArgument, match=r"Sent extra: \{y\}"):
        parser.parse(joined(packed.write_request(Columns({"y": f32([1, 2])}, "other"))), forms)
    with pytest.raises(InvalidArgument, match='"tothe" not found'):
        parser.parse(body.replace(b"other", b"tothe"), forms)
    with pytest.raises(InvalidArgument, match="no input is int32"):
        # As many bytes, of which fewer are the name and more the dtype.
        parser.parse(joined(packed.write_request(Columns({"x": i32([1, 2])}, "other12"))), forms)
    assert parser.parse(body, forms).signature_name == "other"


@pytest.mark.parametrize(
    ("arrays", "name", "words"),
    [
        ({"x": f32([1])}, "nothing", '"nothing" not found in signature def'),
        ({}, "", "Missing but required: {x}"),
        ({"x": f32([1]), "z": f32([1])}, "", "Sent extra: {z}"),
        ({"x": f32([[1]])}, "", "'x' must have shape [b], got [1,1]"),
        ({"x": i32([1])}, "", "'x': no input is int32"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    arrays: dict[str, Any], name: str, words: str
) -> None:
    parser = ColumnsParser({"serving_default": signature({"x": Spec(("b",))})})
    body = joined(packed.write_request(Columns(arrays, name)))
    with pytest.raises(InvalidArgument) as caught:
        parser.parse(body, Forms(Form.MSGPACK, Form.MSGPACK))
    assert words in str(caught.value)


def test_classify_takes_tensors_for_its_own_signatures_only() -> None:
    signatures = {
        "serving_default": signature({"x": Spec(("b",))}),
        "classes": signature({"x": Spec(("b",))}, method="classify", labels=("no", "yes")),
    }
    examples = ExamplesParser(signatures, "classify")
    parser = ColumnsParser(signatures, examples)
    forms = Forms(Form.MSGPACK, Form.MSGPACK)
    body = joined(packed.write_request(Columns({"x": f32([1, 2])}, "classes")))
    assert parser.parse(body, forms).rows == 2
    with pytest.raises(InvalidArgument, match="Expected classification signature"):
        parser.parse(joined(packed.write_request(Columns({"x": f32([1])}))), forms)
    outputs = examples.codecs["classes"].tensors({"scores": f32([[0.5, 2], [1, 3]])}, 2)
    assert_same_array(outputs["scores"], f32([[0.5, 2], [1, 3]]))
    assert outputs["classes"].tolist() == [[b"no", b"yes"]] * 2
