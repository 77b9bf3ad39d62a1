"""The tolerant JSON reader: the C parser and the one without recursion read the same."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batching.errors import InvalidArgument
from cluster.api import jsontext
from cluster.api.jsontext import clip, load, type_name

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)

COMMA_OBJECT = "Missing a comma or } after an object member."
COMMA_ARRAY = "Missing a comma or ] after an array element."
BROKEN = [
    ("  \n", "The document is empty.", 3),
    ("instances = [1, 2]", "Invalid value.", 0),
    ('{"a":}', "Invalid value.", 5),
    ('{"a":nul}', "Invalid value.", 5),
    ('{"a":[1,]}', "Invalid value.", 8),
    ('{"a":[1', COMMA_ARRAY, 7),
    ('{"a":[1 2]}', COMMA_ARRAY, 8),
    ('{"a":[1,"ä" 2]}', COMMA_ARRAY, 13),
    ('{"a":["]}{[" 2]}', COMMA_ARRAY, 13),
    ('{"a":1 "b":2}', COMMA_OBJECT, 7),
    ('{"a":{"b":[]]}', COMMA_OBJECT, 12),
    ('{"a":1,}', "Missing a name for object member.", 7),
    ("{a:1}", "Missing a name for object member.", 1),
    ("{", "Missing a name for object member.", 1),
    ('{"a" 1}', "Missing a colon after a name of object member.", 5),
    ('{"a":1}}', "The document root must not be followed by other values.", 7),
    ('{"a":"b}', "Missing a closing quotation mark in string.", 5),
    ('{"a":"\\x"}', "Invalid escape character in string.", 6),
    ('{"a":"\\u12g4"}', "Incorrect hex digit after \\u escape in string.", 6),
    ('{"a":"\n"}', "Invalid encoding in string.", 6),
]


@pytest.mark.parametrize(("text", "words", "offset"), BROKEN, ids=[case[0] for case in BROKEN])
def test_broken_json_is_refused_in_rapidjsons_words(text: str, words: str, offset: int) -> None:
    with pytest.raises(InvalidArgument) as caught:
        load(text.encode())
    message = str(caught.value)
    prefix = f"JSON Parse error: {words} at offset: "
    assert message.startswith(prefix)
    # The standard library's idea of the place moved a little between Python's releases.
    assert abs(int(message.removeprefix(prefix)) - offset) <= 1


@pytest.mark.parametrize(
    ("text", "words"), [case[:2] for case in BROKEN[1:]], ids=[case[0] for case in BROKEN[1:]]
)
def test_broken_json_inside_deep_nesting_is_refused_in_the_same_words(
    text: str, words: str
) -> None:
    deep = '{"deep":' + "[" * 5000 + "]" * 5000 + ","
    deep += text[1:] if text.startswith("{") else '"rest":' + text
    with pytest.raises(InvalidArgument) as caught:
        load(deep.encode())
    assert str(caught.value).startswith(f"JSON Parse error: {words} at offset: ")


def test_invalid_utf8_is_refused_with_its_place() -> None:
    with pytest.raises(InvalidArgument, match=r"Invalid encoding in string\. at offset: 6"):
        load(b'{"a":"\xff"}')


def test_a_byte_order_mark_is_skipped() -> None:
    assert load(b'\xef\xbb\xbf{"a":1}') == {"a": 1}


@pytest.mark.parametrize("text", ["[1]", "5", '"a"', "null", "NaN", "[" * 100_000 + "]" * 100_000])
def test_the_root_must_be_an_object(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"JSON Value: .* Is not object"):
        load(text.encode())


def test_bare_words_for_non_finite_numbers_are_read() -> None:
    assert load(b'{"a":[Infinity,-Infinity]}') == {"a": [math.inf, -math.inf]}
    (nan,) = load(b'{"a":NaN}').values()
    assert isinstance(nan, float)
    assert math.isnan(nan)


def test_a_number_beyond_a_double_is_an_infinity() -> None:
    long = b"1" * 5000
    assert load(b'{"a":1e400,"b":-1e400}') == {"a": math.inf, "b": -math.inf}
    assert load(b'{"a":%b,"b":-%b}' % (long, long)) == {"a": math.inf, "b": -math.inf}


def test_of_equal_names_the_last_counts_in_both_readers() -> None:
    text = '{"a":1,"a":2}'
    assert load(text.encode()) == jsontext._load_without_recursion(text) == {"a": 2}


@given(JSON_VALUES)
def test_the_reader_without_recursion_reads_what_the_c_parser_reads(value: object) -> None:
    text = json.dumps(value)
    # Compared as text, since NaN differs from itself.
    expected = json.dumps(_as_double(json.loads(text)))
    assert json.dumps(_as_double(jsontext._load_without_recursion(text))) == expected


@given(st.text(alphabet='[]{},:"ab1.-eNI \\u', max_size=24))
def test_both_readers_refuse_the_same_texts(text: str) -> None:
    try:
        expected = json.loads(text)
    except ValueError:
        with pytest.raises(InvalidArgument):
            jsontext._load_without_recursion(text)
    else:
        found = jsontext._load_without_recursion(text)
        assert json.dumps(found) == json.dumps(_as_double(expected))


def test_a_deep_document_is_read_and_one_that_is_also_huge_refused() -> None:
    depth = 100_000
    assert list(load(b'{"a":' + b"[" * depth + b"]" * depth + b"}")) == ["a"]
    filler = b" " * jsontext.DEEP_CHARS_MAX
    with pytest.raises(InvalidArgument, match="must not be nested deeply"):
        load(b'{"a":' + b"[" * depth + b"]" * depth + filler + b"}")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": [1, 2.5, {"b": None}], "c": "d"}, '{"a":[1,2.5,{"b":null}],"c":"d"}'),
        ([], "[]"),
        ([[], {}, [True]], "[[],{},[true]]"),
        ("x" * 300, '"' + "x" * 255 + "..."),
        ("\ud800", '"?"'),
        (float("nan"), "NaN"),
    ],
)
def test_a_value_is_shown_as_json_and_cut_off(value: object, text: str) -> None:
    assert clip(value) == text


def test_a_huge_or_deep_value_is_shown_without_being_walked() -> None:
    class Bomb(list[object]):
        def __iter__(self):  # type: ignore[no-untyped-def]
            yield from [1] * 200
            raise AssertionError("walked too far")

    assert len(clip(Bomb())) == 256 + len("...")
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert clip(deep) == "[" * 256 + "..."


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (None, "Null"),
        (True, "True"),
        (False, "False"),
        (1, "Number"),
        (1.5, "Number"),
        ("a", "String"),
        ({}, "Object"),
        ([], "Array"),
    ],
)
def test_types_have_rapidjsons_names(value: object, name: str) -> None:
    assert type_name(value) == name


def _as_double(value: object) -> object:
    """Long integers are doubles to the reader without recursion, and to a tensor in any case."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int) and len(str(abs(value))) > 20:
        return float(value)
    if isinstance(value, list):
        return [_as_double(each) for each in value]
    if isinstance(value, dict):
        return {name: _as_double(each) for name, each in value.items()}
    return value
