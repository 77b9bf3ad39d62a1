"""Answers to predict: TensorFlow Serving's rows A17 to A22, B21 to B23, and its number rule."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from batching.errors import Internal, InvalidArgument
from cluster.api import (
    PredictCodec,
    plain_floats,
    render_predictions,
    render_rows_plain,
)
from cluster.api.printing import tokens
from shards.specs import DTYPES, Spec
from tests.cluster.api_support import f32, f64, i32, signature, texts

F32, F64, I32 = np.float32, np.float64, np.int32
BF16 = ml_dtypes.bfloat16


@pytest.mark.parametrize(
    ("outputs", "columnar", "body"),
    [
        pytest.param({"y": f32([3, 3.5, 4])}, False, '{"predictions":[3.0,3.5,4.0]}', id="A1"),
        pytest.param({"y": f32([3, 3.5, 4])}, True, '{"outputs":[3.0,3.5,4.0]}', id="A2"),
        pytest.param(
            {"y": f32([[2.5, 3], [3.5, 4]])},
            False,
            '{"predictions":[[2.5,3.0],[3.5,4.0]]}',
            id="A3",
        ),
        pytest.param(
            {"a": i32([1, 2]), "b_bytes": texts([b"\xff", b"hi"]), "c": texts([b"x", b"y"])},
            False,
            '{"predictions":[{"a":1,"b_bytes":{"b64":"/w=="},"c":"x"},'
            '{"a":2,"b_bytes":{"b64":"aGk="},"c":"y"}]}',
            id="A17",
        ),
        pytest.param(
            {"a": f32([[1, 2], [3, 4]]), "b": i32([5, 6])},
            False,
            '{"predictions":[{"a":[1.0,2.0],"b":5},{"a":[3.0,4.0],"b":6}]}',
            id="A17-shapes",
        ),
        pytest.param(
            {"a": i32([1, 2]), "b": f32([[1], [2], [3]])},
            True,
            '{"outputs":{"a":[1,2],"b":[[1.0],[2.0],[3.0]]}}',
            id="A18",
        ),
        pytest.param(
            {"y": np.arange(12, dtype=I32).reshape(2, 3, 2)},
            False,
            '{"predictions":[[[0,1],[2,3],[4,5]],[[6,7],[8,9],[10,11]]]}',
            id="A19",
        ),
        pytest.param(
            {"y": f32([9000000, 999999, 0.5, 0.0003, 0.00003, 555557.5])},
            False,
            '{"predictions":[9e+06,999999.0,0.5,0.0003,3e-05,555557.5]}',
            id="A20",
        ),
        pytest.param(
            {"y": f32([np.nan, np.inf, -np.inf])},
            False,
            '{"predictions":[NaN,Infinity,-Infinity]}',
            id="A21",
        ),
        pytest.param(
            {"y": f64([[np.nan, 1], [2, -np.inf]])},
            True,
            '{"outputs":[[NaN,1.0],[2.0,-Infinity]]}',
            id="A21-double",
        ),
        pytest.param({"y": np.empty((0, 2), F32)}, False, '{"predictions":[]}', id="A22-one"),
        pytest.param(
            {"a": np.empty((0, 2), F32), "b": np.empty(0, I32)},
            False,
            '{"predictions":[]}',
            id="A22-many",
        ),
        pytest.param({"y": np.empty((2, 0), F32)}, False, '{"predictions":[[],[]]}', id="empty"),
        pytest.param(
            {"y": np.empty((2, 0, 3), F32)}, True, '{"outputs":[[],[]]}', id="empty inside"
        ),
        pytest.param({"y": f32(2)}, True, '{"outputs":2.0}', id="scalar"),
        pytest.param({"y": texts([b'a"\n'])}, False, '{"predictions":["a\\"\\n"]}', id="text"),
        pytest.param(
            {"y_bytes": texts([b"hi"])}, False, '{"predictions":[{"b64":"aGk="}]}', id="bytes"
        ),
        pytest.param(
            {"y": np.array([True, False])}, False, '{"predictions":[true,false]}', id="bool"
        ),
        pytest.param(
            {"y": np.array([2**64 - 1], np.uint64)},
            False,
            '{"predictions":[18446744073709551615]}',
            id="uint64",
        ),
        pytest.param(
            {"y": np.array([0.5, 3], np.float16)}, False, '{"predictions":[0.5,3.0]}', id="half"
        ),
        pytest.param(
            {"y": np.array([0.5, 9e6], BF16)}, False, '{"predictions":[0.5,8978432.0]}', id="bf16"
        ),
        pytest.param({'a"': f32([1]), "b": f32([2])}, True, None, id="a name to be escaped"),
    ],
)
def test_outputs_are_printed_as_tensorflow_serving_prints_them(
    outputs: dict[str, Any], columnar: bool, body: str | None
) -> None:
    rendered = PredictCodec(signature({"x": Spec(("b",))})).render(outputs, columnar)
    if body is None:
        assert json.loads(rendered) == {"outputs": {'a"': [1.0], "b": [2.0]}}
    else:
        assert rendered.decode() == body


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        pytest.param(
            {"a": f32([1, 2]), "b": f32([1])},
            "Tensor name: b has inconsistent batch size: 1 expecting: 2",
            id="B21",
        ),
        pytest.param(
            {"a": f32([]), "b": f32([1])},
            "Tensor name: b has inconsistent batch size: 1 expecting: 0",
            id="B21-zero",
        ),
        pytest.param({"y": f32(1)}, "Tensor name: y has no shape information", id="B22"),
        pytest.param(
            {"y": np.array([1j], np.complex64)},
            "Failed to write JSON value for tensor type: complex64",
            id="B23",
        ),
        pytest.param(
            {"y": texts(["not bytes"])}, "for tensor type: str", id="string of a wrong type"
        ),
        pytest.param({"y": texts([b"\xff"])}, "Tensor name: y holds bytes", id="not text"),
    ],
)
def test_outputs_without_a_json_form_are_refused_by_name(
    outputs: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        render_predictions(outputs, columnar=False)
    assert words in str(caught.value)


def test_no_outputs_at_all_are_our_own_fault() -> None:
    with pytest.raises(Internal, match="Cannot convert empty tensor map"):
        render_predictions({}, columnar=True)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.0"),
        (-0.0, "-0.0"),
        (1e-4, "0.0001"),
        (9.9999e-5, "9.9999e-05"),
        (1.2345678e-5, "0.000012345678"),
        (999999.94, "999999.94"),
        (1e6, "1e+06"),
        (1234560.0, "1.23456e+06"),
        (1234567.0, "1234567.0"),
        (3.4028235e38, "3.4028235e+38"),
        (1e-45, "1.4013e-45"),
        (16777216.0, "16777216.0"),
        (1e20, "1e+20"),
    ],
)
def test_an_exponent_stands_where_six_digits_have_one_and_suffice(value: float, text: str) -> None:
    assert render_predictions({"y": f32([value])}, False) == b'{"predictions":[%b]}' % text.encode()


def test_a_part_of_a_larger_array_is_printed_whatever_its_strides() -> None:
    table = np.arange(12, dtype=F32).reshape(4, 3)
    assert render_rows_plain(table[1:3]) == b'{"predictions":[[3.0,4.0,5.0],[6.0,7.0,8.0]]}'
    assert render_rows_plain(table[:2, 1]) == b'{"predictions":[1.0,4.0]}'
    assert render_predictions({"y": table.T[:1]}, False) == b'{"predictions":[[0.0,3.0,6.0,9.0]]}'


@pytest.mark.parametrize(
    ("array", "plain"),
    [
        (f32([0, -0.0, 1e-4, 999999.9, -5]), True),
        (f32([9.9e-5]), False),
        (f32([1e6]), False),
        (f64([-1e6]), False),
        (f64([np.nan]), False),
        (f32([np.inf]), False),
        (i32([2**31 - 1]), True),
        (np.array([True]), True),
        (np.array([1], np.float16), False),
        (np.array([1], BF16), False),
        (np.array([b"a"], object), False),
        (np.array([1], np.complex64), False),
        (np.empty((0, 3), F32), True),
    ],
)
def test_plain_is_what_orjson_may_print_whole(array: Any, plain: bool) -> None:
    assert plain_floats(array) is plain


@pytest.mark.parametrize("last_byte", range(256))
def test_numbers_of_any_bits_are_plain_only_in_the_range_that_orjson_prints_so(
    last_byte: int,
) -> None:
    first = last_byte << 24
    ends = np.array([first, first | 1, first | 0x00FF_FFFE, first | 0x00FF_FFFF], np.uint32)
    array = ends.view(F32)
    sizes = np.abs(array.astype(np.float64))
    assert (
        plain_floats(array) == (((sizes >= np.float32(1e-4)) & (sizes < 1e6)) | (sizes == 0)).all()
    )


# Properties.

ANY_SHAPE = hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4)
USUAL = st.floats(-1e7, 1e7, width=32) | st.sampled_from([0.0, 1e-4, 1e6, 5e-5, 999999.0])


@given(
    st.sampled_from([F32, F64]).flatmap(
        lambda dtype: hnp.arrays(
            dtype, ANY_SHAPE, elements=st.floats(width=32 if dtype is F32 else 64) | USUAL
        )
    ),
    st.booleans(),
)
def test_printed_floats_read_back_as_the_same_bits(array: Any, columnar: bool) -> None:
    body = render_predictions({"y": array}, columnar)
    found = json.loads(body)["outputs" if columnar else "predictions"]
    with np.errstate(over="ignore"):
        back = np.array(found, dtype=array.dtype)
    if 0 in array.shape:
        assert back.size == 0
        assert len(found) == array.shape[0]
        return
    assert back.shape == array.shape
    ordinary = ~np.isnan(array)
    assert (np.isnan(back) == ~ordinary).all()
    assert back[ordinary].tobytes() == array[ordinary].tobytes()


@given(hnp.arrays(F32, st.integers(1, 8), elements=st.floats(width=32) | USUAL))
def test_every_float_token_shows_that_it_is_a_float_and_follows_the_rule(array: Any) -> None:
    for value, token in zip(array, tokens("y", array), strict=True):
        text = token.decode()
        if not math.isfinite(value):
            assert text in ("NaN", "Infinity", "-Infinity")
            continue
        assert re.fullmatch(r"-?[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?", text)
        assert "." in text or "e" in text
        short = f"{float(value):.6g}"
        with np.errstate(over="ignore"):
            if "e" in short and f32(float(short)) == value:
                assert text == short
            # Never more digits than the shortest decimal that reads back as the same number.
            digits = re.sub(r"e.*|[^0-9]", "", text).strip("0")
            shortest = np.format_float_scientific(value, unique=True, trim="-")
            assert len(digits) <= max(len(re.sub(r"e.*|[^0-9]", "", shortest).strip("0")), 6)


@given(
    st.sampled_from([F32, F64]).flatmap(lambda dtype: hnp.arrays(dtype, ANY_SHAPE, elements=USUAL))
)
def test_what_is_plain_is_printed_the_same_in_both_ways(array: Any) -> None:
    if plain_floats(array) and array.shape[0]:
        row = render_predictions({"y": array, "z": array}, columnar=False)
        assert (
            json.loads(row)["predictions"][0]["y"]
            == json.loads(render_rows_plain(array))["predictions"][0]
        )
        assert render_rows_plain(array) == render_predictions({"y": array}, columnar=False)
        if array.ndim == 1:
            assert render_rows_plain(array) == b'{"predictions":[%b]}' % b",".join(
                tokens("y", array)
            )


@given(st.sampled_from(sorted(set(DTYPES) - {"string"})), st.data())
def test_every_dtype_is_printed_as_its_values(dtype: str, data: st.DataObject) -> None:
    wide = data.draw(hnp.arrays(np.int8, st.integers(1, 4), elements=st.integers(0, 100)))
    array = wide.astype(DTYPES[dtype])
    found = json.loads(render_predictions({"y": array}, columnar=False))["predictions"]
    assert found == [each.item() for each in array]
    assert {type(each) for each in found} == {type(array[0].item())}
