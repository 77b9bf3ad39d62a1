"""TensorFlow Serving's black-box cases over real HTTP: door, router and device in one process.

The case ids are those of its tests, by table: A predict, B its errors, C classify and regress.
What its JSON reader and printer do with each value is held in `test_api_*`; here the whole path
answers. One deviation is meant: B25, listing all models, is answered instead of refused.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.cluster.half_plus_two import MODEL, PREDICT
from tests.cluster.serving import Answer, Cluster, request

CLASSIFY = {"signature_name": "classify_x_to_y"}
REGRESS = {"signature_name": "regress_x_to_y"}


@pytest.fixture
def cluster(half_plus_two_cluster: Cluster) -> Cluster:
    return half_plus_two_cluster


def check(answer: Answer, wanted: Any) -> None:
    assert (answer.status, answer.json) == (200, wanted)
    assert answer.headers["content-type"] == "application/json"


def case(name: str, *values: object) -> Any:
    return pytest.param(*values, id=name)


# A. Predict


@pytest.mark.parametrize(
    ("path", "body", "wanted"),
    [
        case("A1", PREDICT, {"instances": [2.0, 3.0, 4.0]}, {"predictions": [3.0, 3.5, 4.0]}),
        case("A2", PREDICT, {"inputs": [2.0, 3.0, 4.0]}, {"outputs": [3.0, 3.5, 4.0]}),
        case(
            "A4", f"{MODEL}/versions/123:predict", {"instances": [1.0, 2.0]},
            {"predictions": [2.5, 3.0]},
        ),
        case(
            "A4-other", f"{MODEL}/versions/100:predict", {"instances": [1.0]},
            {"predictions": [3.5]},
        ),
        case(
            "A5", f"{MODEL}/labels/stable:predict", {"instances": [1.0, 2.0]},
            {"predictions": [2.5, 3.0]},
        ),
        case(
            "A5-other", f"{MODEL}/labels/old:predict", {"instances": [1.0]}, {"predictions": [3.5]}
        ),
        case(
            "A6", PREDICT, {"signature_name": "serving_default", "instances": [3.0, 4.0]},
            {"predictions": [3.5, 4.0]},
        ),
        case("A7", PREDICT, {"instances": [1, 2.0, 3, 4]}, {"predictions": [2.5, 3.0, 3.5, 4.0]}),
        case("A8", PREDICT, {"instances": [1435774380]}, {"predictions": [717887170.0]}),
        case(
            "A10", PREDICT,
            {"signature_name": "text", "instances": [{"b64": "aGVsbG8="}, {"b64": "d29ybGQ="}]},
            {"predictions": [{"b64": "aGVsbG8="}, {"b64": "d29ybGQ="}]},
        ),
        case("named", PREDICT, {"instances": [{"x": 2.0}, {"x": 4}]}, {"predictions": [3.0, 4.0]}),
        case("more rows than any bucket", PREDICT, {"instances": [2.0] * 50},
             {"predictions": [3.0] * 50}),
    ],
)  # fmt: skip
def test_predict(cluster: Cluster, path: str, body: Any, wanted: Any) -> None:
    check(cluster.ask(path, json.dumps(body)), wanted)


def test_overflow_is_an_infinity_and_underflow_a_zero__A9(cluster: Cluster) -> None:
    answer = cluster.ask(PREDICT, '{"instances":[1.797e308,-1.797e308,2.2e-308]}')
    assert answer.body == b'{"predictions":[Infinity,-Infinity,2.0]}'


def test_several_outputs_by_row__A17_A21(cluster: Cluster) -> None:
    body = '{"signature_name":"pairs","instances":[[1,2],[3,4]]}'
    answer = cluster.ask(PREDICT, body)
    assert answer.status == 200
    assert answer.body == (
        b'{"predictions":[{"sum":3.0,"nan":NaN,"same":[1.0,2.0]},'
        b'{"sum":7.0,"nan":NaN,"same":[3.0,4.0]}]}'
    )


def test_several_outputs_by_column__A18(cluster: Cluster) -> None:
    answer = cluster.ask(PREDICT, '{"signature_name":"pairs","inputs":{"x":[[1,2],[3,4]]}}')
    assert answer.status == 200
    assert answer.body == (
        b'{"outputs":{"sum":[3.0,7.0],"nan":[NaN,NaN],"same":[[1.0,2.0],[3.0,4.0]]}}'
    )


def test_floats_print_as_tensorflow_serving_prints_them__A20(cluster: Cluster) -> None:
    answer = cluster.ask(PREDICT, '{"instances":[17999996, 1999994, 1111111]}')
    assert answer.body == b'{"predictions":[9e+06,999999.0,555557.5]}'


def test_deep_nesting_under_an_unknown_key_is_harmless__A23(cluster: Cluster) -> None:
    deep = "[" * 500_000 + "]" * 500_000
    answer = cluster.ask(PREDICT, f'{{"unknown":{deep},"instances":[2.0]}}')
    assert answer.status == 200


# B. Errors of predict


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        case("B1", PREDICT, "", 400, "JSON Parse error: The document is empty"),
        case("B2", PREDICT, "instances = [1, 2]", 400, "JSON Parse error: Invalid value"),
        case("B3", PREDICT, '{"instances":["x","y"]}', 400, "not of expected type: float"),
        case(
            "B4", PREDICT, '{"signature_name":100,"instances":[1]}', 400,
            "'signature_name' key must be a string value.",
        ),
        case(
            "B5", f"{MODEL}/labels/nonexistent:predict", '{"instances":[1]}', 400,
            "Unrecognized servable version label",
        ),
        case(
            "B6", "/v1/models/foo:predict", '{"instances":[1]}', 404,
            "Servable not found for request: Latest(foo)",
        ),
        case(
            "B7-model", "/v1/models/foo/versions/50:predict", '{"instances":[1]}', 404,
            "Servable not found for request: Specific(foo, 50)",
        ),
        case(
            "B7-version", f"{MODEL}/versions/50:predict", '{"instances":[1]}', 404,
            "Servable not found for request: Specific(half_plus_two, 50)",
        ),
        case("B8", PREDICT, '{"instances":[1],"inputs":[1]}', 400, "Not formatted correctly"),
        case(
            "B9", PREDICT, '{"signature_name":"pairs","instances":[[1,2],[3,4],[5,6,7]]}', 400,
            "Expecting tensor size",
        ),
        case(
            "B10", PREDICT, '{"signature_name":"pairs","instances":[[1,2],[3,4],[[5,6]]]}', 400,
            "Expecting shape",
        ),
        case(
            "B11", PREDICT, '{"signature_name":"pairs","instances":[[1,2],["a","b"]]}', 400,
            "not of expected type",
        ),
        case(
            "B12", PREDICT, '{"signature_name":"pairs","instances":[{"x":[1,2]},{"x":[1]}]}', 400,
            "Expecting tensor size",
        ),
        case("B13", PREDICT, '{"instances":[{"x":1},2]}', 400, "Expecting object but got list"),
        case(
            "B13-other", PREDICT, '{"instances":[1,{"x":2}]}', 400,
            "Expecting value/list but got object",
        ),
        case("B14", PREDICT, '{"other":1}', 400, "Missing 'inputs' or 'instances' key"),
        case(
            "B15", PREDICT, '{"instances":5}', 400, "Expecting 'instances' to be an list/array"
        ),
        case("B15-empty", PREDICT, '{"instances":[]}', 400, "No values in 'instances' array"),
        case("B16", PREDICT, '{"instances":[{"z":1}]}', 400, "keys must be equal to: x"),
        case(
            "B17", PREDICT, '{"inputs":{"z":[1]}}', 400,
            "Missing named input: x in 'inputs' object.",
        ),
        case(
            "B18", PREDICT, '{"signature_name":"text","instances":[{"b64":"?"}]}', 400,
            "Unable to base64 decode",
        ),
        case(
            "B19", PREDICT, '{"signature_name":"x","instances":[1]}', 400,
            'Serving signature name: "x" not found in signature def',
        ),
        case(
            "B20", PREDICT,
            '{"signature_name":' + "[" * 500_000 + "]" * 500_000 + ',"instances":[1]}', 400,
            "key must be a string value",
        ),
        case(
            "B26", f"{MODEL}/versions/18446744073709551615:regress", "{}", 400,
            "Failed to convert version",
        ),
        case("no rows", PREDICT, '{"inputs":[]}', 400, "at least one row"),
        case("a shape of another rank", PREDICT, '{"instances":[[1,2]]}', 400, "must have shape"),
    ],
)  # fmt: skip
def test_predict_errors(cluster: Cluster, path: str, body: str, status: int, text: str) -> None:
    answer = cluster.ask(path, body)
    assert (answer.status, text in answer.error) == (status, True), answer.body[:500]
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/foo"),
        ("POST", "/v1/foo"),
        ("GET", "/v1/models/debug/model_name"),
        ("POST", "/v1/models"),
        ("GET", "/v1/models/foo:predict"),
        ("GET", "/v1/models/foo/version/50"),
        ("POST", "/v1/models/foo/version/50:predict"),
        ("POST", "/v1/models/foo/versions/HELLO:predict"),
        ("POST", "/v1/models/foo/label/x:predict"),
        ("POST", "/v1/models/foo/versions/50/labels/x:predict"),
        ("POST", f"{MODEL}/metadata"),
    ],
)
def test_malformed_paths__B24(cluster: Cluster, method: str, path: str) -> None:
    answer = request(cluster.port, method, path, "{}" if method == "POST" else None)
    assert (answer.status, "Malformed request" in answer.error) == (400, True)


def test_listing_all_models_is_answered_and_not_refused__B25(cluster: Cluster) -> None:
    check(
        cluster.ask("/v1/models"),
        {
            "models": [
                {
                    "name": "half_plus_two",
                    "versions": [
                        {"version": "123", "state": "AVAILABLE"},
                        {"version": "100", "state": "AVAILABLE"},
                        {"version": "99", "state": "END"},
                    ],
                }
            ]
        },
    )


@pytest.mark.parametrize("path", ["/", "/v2/models/half_plus_two", "/favicon.ico"])
def test_paths_outside_v1_are_not_found__B27(cluster: Cluster, path: str) -> None:
    assert cluster.ask(path).status == 404


def test_quotes_in_an_error_are_escaped__B28(cluster: Cluster) -> None:
    answer = cluster.ask(PREDICT, '{"signature_name":"a\\"b","instances":[1]}')
    assert answer.error == 'Serving signature name: "a"b" not found in signature def'


# C. Classify and regress


@pytest.mark.parametrize(
    ("path", "body", "wanted"),
    [
        case(
            "C1", f"{MODEL}:classify", {**CLASSIFY, "examples": [{"x": 2.0}]},
            {"results": [[["", 3.0]]]},
        ),
        case(
            "C2", f"{MODEL}:classify", {**CLASSIFY, "examples": [{"x": 20}]},
            {"results": [[["", 12.0]]]},
        ),
        case(
            "C2-label", f"{MODEL}/labels/stable:classify",
            {**CLASSIFY, "examples": [{"x": 10}]},
            {"results": [[["", 7.0]]]},
        ),
        case(
            "C3", f"{MODEL}:regress", {**REGRESS, "examples": [{"x": 2.0}]},
            {"results": [3.0]},
        ),
        case(
            "C3-80", f"{MODEL}:regress", {**REGRESS, "examples": [{"x": 80}]},
            {"results": [42.0]},
        ),
        case(
            "C3-version", f"{MODEL}/versions/123:regress",
            {**REGRESS, "examples": [{"x": 80.0}]}, {"results": [42.0]},
        ),
        case(
            "C3-label", f"{MODEL}/labels/stable:regress",
            {**REGRESS, "examples": [{"x": 80.0}]}, {"results": [42.0]},
        ),
        case(
            "C4-list", f"{MODEL}:regress",
            {**REGRESS, "examples": [{"x": [2]}, {"x": True}]},
            {"results": [3.0, 2.5]},
        ),
        case(
            "C4-context", f"{MODEL}:regress",
            {**REGRESS, "context": {"x": 4.0}, "examples": [{}, {"y": 1}]},
            {"results": [4.0, 4.0]},
        ),
        case(
            "C5", f"{MODEL}:regress",
            {**REGRESS, "context": {"x": 4.0}, "examples": [{}, {"x": 2.0}]},
            {"results": [4.0, 3.0]},
        ),
    ],
)  # fmt: skip
def test_classify_and_regress(cluster: Cluster, path: str, body: Any, wanted: Any) -> None:
    check(cluster.ask(path, json.dumps(body)), wanted)


@pytest.mark.parametrize("method", ["classify", "regress"])
@pytest.mark.parametrize(
    ("examples", "text"),
    [
        case("C6-object", '"examples":{"x":1}', "list/array"),
        case("C6-lists", '"examples":[[1]]', "Example must be JSON object"),
        case("C6-missing", '"other":1', "key 'examples' is expected and was not found"),
        case("C6-empty", '"examples":[]', "is an empty array"),
        case("C7-null", '"examples":[{"names":[10,null]}]', "unexpected JSON type: Null"),
        case("C7-object", '"examples":[{"names":[10,{"test":10}]}]', "JSON type: Object"),
        case("C7-array", '"examples":[{"names":[[10],20]}]', "unexpected JSON type: Array"),
        case("C8", '"examples":[{"names":[10,10.0]}]', "feature: names expecting type: int64"),
        case("C9", '"examples":[{"x":18446744073709551603}]', "Only int64_t is supported"),
        case("feature missing", '"examples":[{"y":1}]', "Feature: x"),
    ],
)
def test_example_errors(cluster: Cluster, method: str, examples: str, text: str) -> None:
    body = f'{{"signature_name":"{method}_x_to_y",{examples}}}'
    answer = cluster.ask(f"{MODEL}:{method}", body)
    assert (answer.status, text in answer.error) == (400, True), answer.body


@pytest.mark.parametrize("method", ["classify", "regress"])
def test_a_signature_that_is_missing_or_of_another_method__C10(
    cluster: Cluster, method: str
) -> None:
    path = f"{MODEL}:{method}"
    missing = cluster.ask(path, '{"signature_name":"nope","examples":[{"x":1}]}')
    assert (missing.status, missing.error) == (
        400, "No signature was found with the name: nope",
    )  # fmt: skip
    other = cluster.ask(path, '{"examples":[{"x":1}]}')
    assert (other.status, "signature method_name to be" in other.error) == (400, True)
