"""Request lines, TensorFlow Serving's table B24 to B27 among them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batching.errors import InvalidArgument
from cluster.api import Call, Verb, parse_path
from tests.cluster.api_support import accepted

PREDICT, CLASSIFY, REGRESS = Verb.PREDICT, Verb.CLASSIFY, Verb.REGRESS
STATUS, METADATA, LIST = Verb.STATUS, Verb.METADATA, Verb.LIST


@pytest.mark.parametrize(
    ("line", "call"),
    [
        ("POST /v1/models/mlp:predict", Call(verb=PREDICT, servable="mlp")),
        ("POST /v1/models/mlp:classify", Call(verb=CLASSIFY, servable="mlp")),
        ("POST /v1/models/mlp:regress", Call(verb=REGRESS, servable="mlp")),
        (
            "POST /v1/models/mlp/versions/123:predict",
            Call(verb=PREDICT, servable="mlp", version=123),
        ),
        (
            "POST /v1/models/mlp/labels/canary:predict",
            Call(verb=PREDICT, servable="mlp", label="canary"),
        ),
        ("POST /V1/Models/mlp:PREDICT", Call(verb=PREDICT, servable="mlp")),
        (
            "POST /v1/models/MLP/VERSIONS/1:Classify",
            Call(verb=CLASSIFY, servable="MLP", version=1),
        ),
        ("POST /v1/models/a%2Fb%3Ac%20d:predict", Call(verb=PREDICT, servable="a/b:c d")),
        ("POST /v1/models/m/labels/a%2fb:regress", Call(verb=REGRESS, servable="m", label="a/b")),
        ("POST /v1/models/m%C3%BCller:predict", Call(verb=PREDICT, servable="müller")),
        ("POST /v1/models/a+b:predict", Call(verb=PREDICT, servable="a+b")),
        ("POST /v1/models/mlp:predict?trace=1", Call(verb=PREDICT, servable="mlp")),
        (
            "POST /v1/models/m/versions/9223372036854775807:predict",
            Call(verb=PREDICT, servable="m", version=2**63 - 1),
        ),
        (
            "POST /v1/models/m/versions/000000000000000000000000012:predict",
            Call(verb=PREDICT, servable="m", version=12),
        ),
        ("GET /v1/models/mlp", Call(verb=STATUS, servable="mlp")),
        ("GET /v1/models/mlp/versions/7", Call(verb=STATUS, servable="mlp", version=7)),
        ("GET /v1/models/mlp/labels/stable", Call(verb=STATUS, servable="mlp", label="stable")),
        ("GET /v1/models/mlp/metadata", Call(verb=METADATA, servable="mlp")),
        ("GET /v1/models/mlp/METADATA", Call(verb=METADATA, servable="mlp")),
        (
            "GET /v1/models/mlp/versions/7/metadata",
            Call(verb=METADATA, servable="mlp", version=7),
        ),
        (
            "GET /v1/models/mlp/labels/stable/metadata",
            Call(verb=METADATA, servable="mlp", label="stable"),
        ),
        # TensorFlow Serving answers "Missing model name" (B25); we list.
        ("GET /v1/models", Call(verb=LIST)),
        ("GET /v1/models?limit=1", Call(verb=LIST)),
    ],
)
def test_a_known_path_is_the_call_it_means(line: str, call: Call) -> None:
    method, _, path = line.encode().partition(b" ")
    assert parse_path(method, path) == call


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(line, id=f"B24-{line}")
        for line in (
            "GET /v1/foo",
            "POST /v1/foo",
            "GET /v1/models/debug/model_name",
            "POST /v1/models",
            "GET /v1/models/foo:predict",
            "POST /v1/models/foo/version/50:predict",
            "GET /v1/models/foo/version/50",
            "POST /v1/models/foo/versions/HELLO:predict",
            "GET /v1/models/foo/versions/HELLO",
            "POST /v1/models/foo/label/x:predict",
            "POST /v1/models/foo/versions/50/labels/x:predict",
            "POST /v1/models/foo/metadata",
            "POST /v1/models/foo/versions/50/metadata",
            "PUT /v1/models/foo:predict",
            "DELETE /v1/models/foo",
            "POST /v1/models/foo:explain",
            "POST /v1/models/foo:predict/",
            "POST /v1/models/:predict",
            "GET /v1/models/",
            "GET /v1/",
        )
    ],
)
def test_another_path_under_v1_is_malformed(line: str) -> None:
    method, _, path = line.encode().partition(b" ")
    with pytest.raises(InvalidArgument) as caught:
        parse_path(method, path)
    assert str(caught.value) == f"Malformed request: {line}"


@pytest.mark.parametrize(
    "line", ["GET /v1/models/versions/1/metadata", "GET /v1/models/labels/x/metadata"]
)
def test_b25_a_path_without_a_name_is_told_so(line: str) -> None:
    method, _, path = line.encode().partition(b" ")
    with pytest.raises(InvalidArgument, match="Missing model name in request"):
        parse_path(method, path)


@pytest.mark.parametrize("digits", ["9223372036854775808", "18446744073709551615", "9" * 5000])
@pytest.mark.parametrize("tail", [":regress", ""])
def test_b26_a_version_that_is_no_int64_cannot_be_converted(digits: str, tail: str) -> None:
    path = f"/v1/models/foo/versions/{digits}{tail}".encode()
    with pytest.raises(InvalidArgument) as caught:
        parse_path(b"POST" if tail else b"GET", path)
    assert str(caught.value) == f"Failed to convert version: {digits} to numeric."


@pytest.mark.parametrize(
    ("path", "what"),
    [
        (b"/v1/models/%ff:predict", "model name: %ff"),
        (b"/v1/models/m/labels/%C3:predict", "model version label: %C3"),
    ],
)
def test_a_name_that_is_not_utf8_is_refused(path: bytes, what: str) -> None:
    with pytest.raises(InvalidArgument, match=f"Failed to decode {what}"):
        parse_path(b"POST", path)


@pytest.mark.parametrize("path", [b"/", b"", b"/v1", b"/v2/models/m", b"/healthz", b"/xv1/models"])
def test_b27_a_path_outside_v1_is_not_ours(path: bytes) -> None:
    assert parse_path(b"GET", path) is None


def test_a_long_path_means_what_a_short_one_does() -> None:
    name = "n" * 1000
    assert parse_path(b"GET", b"/v1/models/" + name.encode()) == Call(verb=STATUS, servable=name)


@given(st.sampled_from([b"GET", b"POST"]), st.binary(max_size=400))
def test_no_path_raises_anything_but_a_serving_error(method: bytes, tail: bytes) -> None:
    for path in (tail, b"/v1/models/" + tail, b"/v1/models/" + tail + b":predict"):
        call = accepted(lambda path=path: parse_path(method, path))  # type: ignore[misc]
        assert call is None or call.verb is LIST or call.servable
