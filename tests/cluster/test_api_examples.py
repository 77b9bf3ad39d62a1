"""Classify and regress: TensorFlow Serving's table C."""

from __future__ import annotations

import json
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batching.errors import InvalidArgument
from cluster.api import ExamplesCodec, ExamplesParser, Parsed, render_classify, render_regress
from shards.errors import SpecMismatch
from shards.specs import DTYPES, STRING, Spec
from tests.cluster.api_support import accepted, assert_same_array, f32, signature, texts

F32 = np.float32
CLASSIFY = {"serving_default": signature({"x": Spec(("b",))}, method="classify")}


def parse(
    specs: dict[str, Spec], body: str, method: Literal["classify", "regress"] = "classify"
) -> Parsed:
    parser = ExamplesParser({"serving_default": signature(specs, method=method)}, method)
    return parser.parse(body.encode())


def examples(*each: str) -> str:
    return '{"examples":[' + ",".join(each) + "]}"


@pytest.mark.parametrize("method", ["classify", "regress"])
def test_c1_c3_half_plus_two_over_examples(method: Literal["classify", "regress"]) -> None:
    name = f"{method}_x_to_y"
    parser = ExamplesParser({name: signature({"x": Spec(("b",))}, method=method)}, method)
    body = '{"signature_name":"%s","examples":[{"x":2.0},{"x":[20]},{"x":80}]}' % name  # noqa: UP031
    parsed = parser.parse(body.encode())
    assert parsed.signature_name == name
    assert parsed.rows == 3
    y: Any = parsed.arrays["x"]
    y = y / f32(2) + f32(2)
    if method == "classify":
        body = '{"results":[[["",3.0]],[["",12.0]],[["",42.0]]]}'
        assert parser.codecs[name].render({"scores": y[:, None]}, 3).decode() == body
    else:
        body = '{"results":[3.0,12.0,42.0]}'
        assert parser.codecs[name].render({"outputs": y}, 3).decode() == body
        assert parser.codecs[name].render({"outputs": y[:, None]}, 3).decode() == body


@pytest.mark.parametrize(
    ("spec", "feature", "values"),
    [
        pytest.param(Spec(("b",)), "2.5", f32([2.5]), id="C4-scalar"),
        pytest.param(Spec(("b",)), "[2.5]", f32([2.5]), id="C4-list of one"),
        pytest.param(Spec(("b", 1)), "2.5", f32([[2.5]]), id="C4-scalar for a column"),
        pytest.param(Spec(("b", 2)), "[1,2]", f32([[1, 2]]), id="C4-ints for floats"),
        pytest.param(Spec(("b", "k")), "[1.0,2.0]", f32([[1, 2]]), id="C4-any number"),
        pytest.param(Spec(("b", 2, 2)), "[1,2,3,4]", f32([[[1, 2], [3, 4]]]), id="C4-row-major"),
        pytest.param(
            Spec(("b", 3), "int64"),
            "[1,true,false]",
            np.array([[1, 1, 0]], np.int64),
            id="C4-bools and ints",
        ),
        pytest.param(
            Spec(("b", 2), "bool"), "[true,0]", np.array([[True, False]]), id="C4-bools of ints"
        ),
        pytest.param(
            Spec(("b", 2), STRING),
            '["a",{"b64":"aGk="}]',
            texts([[b"a", b"hi"]]),
            id="C4-b64 in a list",
        ),
        pytest.param(Spec(("b", 2), STRING), '["a","b"]', texts([[b"a", b"b"]]), id="s"),
        pytest.param(Spec(("b", "k")), "[]", np.empty((1, 0), F32), id="no values"),
        pytest.param(Spec(("b", 2)), "[NaN,1e999]", f32([[np.nan, np.inf]]), id="non-finite"),
        pytest.param(Spec(("b",)), "1" + "0" * 400, f32([np.inf]), id="an endless integer"),
    ],
)
def test_a_feature_is_the_tensor_it_means(spec: Spec, feature: str, values: Any) -> None:
    parsed = parse({"x": spec}, examples('{"x":' + feature + "}"))
    assert_same_array(parsed.arrays["x"], values)


def test_c4_c5_the_context_belongs_to_every_example_and_an_examples_own_feature_wins() -> None:
    specs = {"uno": Spec(("b",)), "dos": Spec(("b",), "int64")}
    body = """{"context": {"uno": 1.5, "dos": 2},
               "examples": [{}, {"uno": 3, "dos": 4}, {"dos": 5, "ignored": "x"}]}"""
    parsed = parse(specs, body)
    assert parsed.arrays["uno"].tolist() == [1.5, 3.0, 1.5]
    assert parsed.arrays["dos"].tolist() == [2, 4, 5]
    assert (parsed.rows, parsed.columnar) == (3, False)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        pytest.param('{"examples":{}}', "Expecting 'examples' value to be an list/array", id="C6"),
        pytest.param(
            '{"examples":[[1]]}',
            "Example must be JSON object but got JSON Array",
            id="C6-list of lists",
        ),
        pytest.param(
            '{"context":5,"examples":[{}]}', "Example must be JSON object", id="C6-context"
        ),
        pytest.param("{}", "key 'examples' is expected and was not found", id="C6-missing"),
        pytest.param('{"examples":[]}', "'examples' value is an empty array", id="C6-empty"),
        pytest.param(
            examples('{"names":[10,null]}'),
            "names has element with unexpected JSON type: Null",
            id="C7-null",
        ),
        pytest.param(
            examples('{"names":[10,{"test":10}]}'),
            "names has element with unexpected JSON type: Object",
            id="C7-object",
        ),
        pytest.param(
            examples('{"names":[[10],20]}'),
            "names has element with unexpected JSON type: Array",
            id="C7-array",
        ),
        pytest.param(
            examples('{"names":[10,10.0]}'), "feature: names expecting type: int64", id="C8"
        ),
        pytest.param(
            examples('{"names":[10.0,10]}'), "feature: names expecting type: float", id="C8-float"
        ),
        pytest.param(
            examples('{"names":["a",true]}'), "feature: names expecting type: bytes", id="C8-bytes"
        ),
        pytest.param(
            examples('{"names":18446744073709551603}'), "Only int64_t is supported", id="C9"
        ),
        pytest.param(
            examples('{"names":[1,18446744073709551603]}'),
            "Only int64_t is supported",
            id="C9-list",
        ),
        pytest.param(
            '{"signature_name":"nope","examples":[{}]}',
            "No signature was found with the name: nope",
            id="C10",
        ),
        pytest.param('{"signature_name":1}', "'signature_name' key must be a string", id="B4"),
        pytest.param("", "JSON Parse error: The document is empty", id="B1"),
        pytest.param(
            examples("{}"),
            "Feature: x (data type: float) is required but could not be found in example 0",
            id="missing feature",
        ),
        pytest.param(
            examples('{"x":[1,2]}'), "x has 2 values in example 0, expected 1", id="too many"
        ),
        pytest.param(examples('{"x":[]}'), "x has 0 values in example 0, expected 1", id="none"),
        pytest.param(examples('{"x":"a"}'), "Got bytes but expected float", id="wrong kind"),
        pytest.param(examples('{"x":{"b64":"?"}}'), "Unable to base64 decode", id="base64"),
    ],
)
def test_a_bad_request_is_refused_in_tensorflow_servings_words(body: str, words: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        ExamplesParser(CLASSIFY, "classify").parse(body.encode())
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "feature", "words"),
    [
        (Spec(("b",), "int64"), "1.0", "Got float but expected int64"),
        (Spec(("b",), "bool"), "2", "Got int64 but expected bool"),
        (Spec(("b",), STRING), "1", "Got int64 but expected string"),
        (Spec(("b",), "int32"), "2147483648", "is not of expected type: int32"),
        (Spec((4,)), "[1,2,3,4]", "has no batch dimension"),
        (Spec(("b", "t", 2)), "[1,2]", "use the predict API"),
    ],
)
def test_a_feature_that_does_not_fit_its_input_is_refused(
    spec: Spec, feature: str, words: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse({"x": spec}, examples('{"x":' + feature + "}"))
    assert words in str(caught.value)


def test_features_of_a_symbolic_size_must_agree_across_examples_and_inputs() -> None:
    with pytest.raises(InvalidArgument, match="x has 1 values in example 1, expected 2"):
        parse({"x": Spec(("b", "k"))}, examples('{"x":[1,2]}', '{"x":[1]}'))
    specs = {"x": Spec(("b", "k")), "y": Spec(("b", "k"))}
    with pytest.raises(SpecMismatch, match="input 'y' must have shape"):
        parse(specs, examples('{"x":[1,2],"y":[1]}'))


def test_a_signature_of_another_method_is_refused() -> None:
    signatures = {"serving_default": signature({"x": Spec(("b",))}, method="predict")}
    with pytest.raises(InvalidArgument) as caught:
        ExamplesParser(signatures, "regress").parse(b'{"examples":[{"x":1}]}')
    assert str(caught.value) == (
        "Expected regression signature method_name to be tensorflow/serving/regress. "
        "Was: tensorflow/serving/predict"
    )


SCORES = f32([[0.25, 0.75], [0.5, 0.5]])
CLASSES = texts([[b"cat", b"dog"], [b"dog", b"cat"]])


@pytest.mark.parametrize(
    ("outputs", "labels", "results"),
    [
        pytest.param(
            {"scores": SCORES, "classes": CLASSES},
            (),
            [[["cat", 0.25], ["dog", 0.75]], [["dog", 0.5], ["cat", 0.5]]],
            id="both",
        ),
        pytest.param(
            {"scores": SCORES},
            ("no", 'y"es'),
            [[["no", 0.25], ['y"es', 0.75]], [["no", 0.5], ['y"es', 0.5]]],
            id="labels of the signature",
        ),
        pytest.param(
            {"scores": SCORES, "classes": CLASSES},
            ("no", "yes"),
            [[["cat", 0.25], ["dog", 0.75]], [["dog", 0.5], ["cat", 0.5]]],
            id="classes before labels",
        ),
        pytest.param(
            {"scores": SCORES},
            (),
            [[["", 0.25], ["", 0.75]], [["", 0.5], ["", 0.5]]],
            id="C15-only scores",
        ),
        pytest.param(
            {"classes": CLASSES},
            (),
            [[["cat", 0.0], ["dog", 0.0]], [["dog", 0.0], ["cat", 0.0]]],
            id="C15-only classes",
        ),
        pytest.param(
            {"scores": f32([[0], [0]])}, (), [[["", 0.0]], [["", 0.0]]], id="C15-zero scores"
        ),
        pytest.param(
            {"scores": SCORES.astype(DTYPES["bfloat16"])},
            (),
            [[["", 0.25], ["", 0.75]], [["", 0.5], ["", 0.5]]],
            id="bfloat16",
        ),
        pytest.param({"scores": np.empty((2, 0), F32)}, (), [[], []], id="no classes"),
    ],
)
def test_classifications_pair_labels_with_scores(
    outputs: dict[str, Any], labels: tuple[str, ...], results: list[Any]
) -> None:
    served = signature({"x": Spec(("b",))}, method="classify", labels=labels)
    body = ExamplesCodec(served, "classify").render(outputs, 2)
    assert json.loads(body) == {"results": results}


def test_scores_and_values_follow_the_number_rule() -> None:
    values = f32([9e6, np.nan, 3e-5, 1])
    assert render_regress({"outputs": values}, 4) == b'{"results":[9e+06,NaN,3e-05,1.0]}'
    assert render_classify({"scores": values[:1, None]}, 1) == b'{"results":[[["",9e+06]]]}'


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        pytest.param({"scores": SCORES[:1]}, "batch size to be 2. Was: 1", id="C12-scores"),
        pytest.param({"classes": CLASSES[:1]}, "batch size to be 2. Was: 1", id="C12-classes"),
        pytest.param(
            {"scores": np.zeros((2, 2), np.int32)},
            "Expected scores Tensor of DT_FLOAT. Was: int32",
            id="C13-scores",
        ),
        pytest.param(
            {"classes": SCORES}, "Expected classes Tensor of DT_STRING. Was: float32", id="C13"
        ),
        pytest.param(
            {"scores": SCORES[:, :1], "classes": CLASSES},
            "Tensors class and score should match in dim_size(1). Was: 2 classes and 1 scores",
            id="C14",
        ),
        pytest.param({"scores": SCORES[:, 0]}, "to be [batch_size num_classes]", id="rank"),
        pytest.param({"other": SCORES}, "at least one of 'classes' and 'scores'", id="neither"),
    ],
)
def test_classification_outputs_that_break_the_promise_are_refused(
    outputs: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        render_classify(outputs, 2)
    assert words in str(caught.value)


def test_c14_labels_of_another_number_than_scores_are_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"should match in dim_size\(1\)"):
        render_classify({"scores": SCORES}, 2, [b'"a"', b'"b"', b'"c"'])


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        pytest.param({"outputs": f32([1, 2, 3])}, "batch size to be 2. Was: 3", id="C12"),
        pytest.param(
            {"outputs": np.zeros(2, np.int64)},
            "Expected outputs Tensor of DT_FLOAT. Was: int64",
            id="C13",
        ),
        pytest.param({"outputs": SCORES}, "either [batch_size] or [batch_size, 1]", id="width"),
        pytest.param({"outputs": f32(1.0)}, "either [batch_size] or [batch_size, 1]", id="scalar"),
        pytest.param({"a": SCORES, "b": SCORES}, "to contain 'outputs'", id="no such output"),
        pytest.param({}, "to contain 'outputs'", id="no output"),
    ],
)
def test_regression_outputs_that_break_the_promise_are_refused(
    outputs: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        render_regress(outputs, 2)
    assert words in str(caught.value)


def test_a_single_regression_output_may_have_any_name() -> None:
    assert render_regress({"y": f32([1])}, 1) == b'{"results":[1.0]}'


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.just("b64"), inner),
    max_leaves=4,
)
FEATURES = st.dictionaries(st.sampled_from(["x", "y"]), VALUES)


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["x", "y"]),
        st.builds(
            Spec,
            st.sampled_from(
                [("b",), ("b", 1), ("b", 2), ("b", "k"), ("b", 0), (2,), ("b", "k", 2)]
            ),
            st.sampled_from(sorted(DTYPES)),
        ),
        min_size=1,
    ),
    st.lists(FEATURES | VALUES, max_size=3),
    FEATURES | VALUES,
    st.binary(max_size=20),
)
def test_no_examples_raise_anything_but_a_serving_error(
    specs: dict[str, Spec], each: list[Any], context: Any, noise: bytes
) -> None:
    parser = ExamplesParser({"serving_default": signature(specs, method="regress")}, "regress")
    document = {"examples": each, "context": context}
    for body in (json.dumps({"examples": each}).encode(), json.dumps(document).encode(), noise):
        parsed = accepted(lambda body=body: parser.parse(body))  # type: ignore[misc]
        if parsed is not None:
            assert parsed.rows == len(each)
            assert all(array.shape[0] == len(each) for array in parsed.arrays.values())
