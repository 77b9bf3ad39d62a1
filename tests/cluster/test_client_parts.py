"""The client's pure parts: what it says, how it reads what comes, when it asks again."""

from __future__ import annotations

import gzip
import itertools
import json
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batching.errors import (
    Code,
    DataLoss,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    ServingError,
    Unavailable,
)
from cluster.client import calls
from cluster.client.address import address_of, request_of
from cluster.client.calls import Options, error_in
from cluster.client.compressing import compressed, is_compressed
from cluster.client.reception import Reception, Response
from cluster.client.retrying import Budget, Lost, Retries, Tries
from cluster.forms import raw
from tests.cluster.api_support import accepted, f32, texts
from tests.cluster.client_peers import answer, refusal, response


def received(
    data: bytes, pieces: int = 1 << 20, *, ends: bool = False, most: int = 1 << 20
) -> Reception:
    """What a reception makes of bytes that come in pieces."""
    reception = Reception(most)
    while data and reception.response is None:
        room = reception.get_buffer()
        assert len(room) > 0
        size = min(len(room), len(data), pieces)
        room[:size] = data[:size]
        data = data[size:]
        reception.buffer_updated(size)
    if ends:
        reception.eof()
    return reception


# Compression


def test_only_inference_that_is_large_enough_is_compressed() -> None:
    call = calls.predict("m", {"x": np.zeros(1000, np.float32)}, Options())
    nbytes = sum(map(len, call.buffers))
    assert is_compressed(call, nbytes)
    assert not is_compressed(call, nbytes + 1)
    assert not is_compressed(call, None)
    assert not is_compressed(calls.models(), 0)


def test_a_compressed_call_is_the_same_but_for_its_body() -> None:
    call = calls.predict("m", {"x": np.zeros(1000, np.float32)}, Options())
    packed = compressed(call)
    assert gzip.decompress(b"".join(packed.buffers)) == b"".join(call.buffers)
    assert packed.headers == call.headers + "content-encoding: gzip\r\n"
    assert (packed.method, packed.path, packed.read) == (call.method, call.path, call.read)


def test_what_gets_no_smaller_is_sent_as_it_is() -> None:
    noise = np.frombuffer(np.random.default_rng(0).bytes(40_000), np.float32)
    call = calls.predict("m", {"x": noise}, Options())
    assert compressed(call) is call


# Responses


@pytest.mark.parametrize("pieces", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    ("data", "body", "keeps_open"),
    [
        (response(200, b"body"), b"body", True),
        (response(200), b"", True),
        (response(200, b"body", "connection: close\r\n"), b"body", False),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + response(200, b"body"), b"body", True),
        (
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nbo\r\n2\r\ndy\r\n0\r\n\r\n",
            b"body",
            True,
        ),
        (response(200, b"x" * 200_000), b"x" * 200_000, True),
    ],
)
def test_a_response_is_read_however_its_bytes_come(
    data: bytes, body: bytes, keeps_open: bool, pieces: int
) -> None:
    reception = received(data, pieces if len(data) < 1000 else max(pieces, 1000))
    assert reception.response is not None
    assert (reception.response.status, bytes(reception.response.body)) == (200, body)
    assert reception.keeps_open == keeps_open


def test_a_body_without_a_length_ends_with_the_connection() -> None:
    reception = received(b"HTTP/1.1 200 OK\r\n\r\nbody", ends=True)
    assert reception.response is not None
    assert bytes(reception.response.body) == b"body"
    assert not reception.keeps_open


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"HTTP/1.1 200 OK\r\ncontent-le",
        response(200, b"bod", length=4),
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nbo\r\n",
    ],
)
def test_half_a_response_is_none(data: bytes) -> None:
    assert received(data, ends=True).response is None


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        response(200, length=(1 << 20) + 1),
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n200000\r\n" + b"x" * 0x200000,
        b"HTTP/1.1 200 OK\r\n" + b"a: %b\r\n" % (b"b" * 140_000),
        response(200, b"body") + b"HTTP/1.1 200 OK\r\n",
    ],
    ids=["no HTTP", "too long", "too many chunks", "too long a head", "more than one"],
)
def test_what_is_no_response_or_too_much_is_refused(data: bytes) -> None:
    with pytest.raises(DataLoss):
        received(data)


def test_the_next_response_is_another() -> None:
    reception = Reception(1 << 20)
    for value in (1.0, 2.0):
        reception.begin()
        data = answer(value)
        reception.get_buffer()[: len(data)] = data
        reception.buffer_updated(len(data))
        found = reception.response
        assert found is not None
        assert calls.predict("m", {"x": f32([1])}, Options()).read(found)["y"] == [value]


@given(st.binary(max_size=80), st.integers(1, 9))
def test_no_bytes_raise_anything_but_a_typed_error(data: bytes, pieces: int) -> None:
    accepted(lambda: received(b"HTTP/1.1 200 OK\r\n" + data, pieces, ends=True))


def test_arrays_of_answers_are_the_callers_own() -> None:
    found = received(answer(2.0)).response
    assert found is not None
    outputs = calls.predict("m", {"x": f32([1])}, Options()).read(found)
    outputs["y"][0] = 5.0
    assert (outputs["y"].flags.aligned, outputs["y"].tolist()) == (True, [5.0])


# Requests


def said(call: Any) -> tuple[str, bytes]:
    """Head and body of a request."""
    data = b"".join(request_of(address_of("http://h:1/base/", "", None), call, 2.0))
    head, _, body = data.partition(b"\r\n\r\n")
    return head.decode(), body


def test_arrays_travel_as_they_are() -> None:
    inputs = {"x": f32([[1, 2]]), "big": np.array([1], ">i4"), "s": np.array(["é", "b"])}
    call = calls.predict("a/b", inputs, Options(version=3, signature="other", split_key="user 7"))
    head, body = said(call)
    assert head.startswith(
        "POST /base/v1/models/a%2Fb/versions/3:predict HTTP/1.1\r\nhost: h:1\r\n"
    )
    assert "x-split-key: user 7\r\n" in head
    assert "x-request-timeout-ms: 2000\r\n" in head
    [length] = [line for line in head.split("\r\n") if line.startswith("inference-header")]
    found = raw.read_request(body, int(length.split(": ")[1]))
    assert (found.signature_name, list(found.arrays)) == ("other", ["x", "big", "s"])
    assert found.arrays["big"].tolist() == [1]
    assert found.arrays["s"].tolist() == ["é".encode(), b"b"]


def test_lists_travel_as_json_and_are_answered_in_tensors() -> None:
    inputs = {"x": [[1, 2]], "y": f32([3]), "s": [b"\xff"]}
    head, body = said(calls.predict("m", inputs, Options(label="stable")))
    assert head.startswith("POST /base/v1/models/m/labels/stable:predict")
    assert "accept: application/octet-stream\r\n" in head
    assert json.loads(body) == {"inputs": {"x": [[1, 2]], "y": [3.0], "s": [{"b64": "/w=="}]}}


def test_examples_travel_as_features_or_as_tensors() -> None:
    options = Options(signature="s", criticality="sheddable")
    head, body = said(calls.classify("m", [{"x": 1}], {"c": np.int64(2)}, options))
    assert "x-request-criticality: sheddable\r\n" in head
    wanted = {"examples": [{"x": 1}], "context": {"c": 2}, "signature_name": "s"}
    assert json.loads(body) == wanted
    head, _ = said(calls.regress("m", {"x": f32([1])}, None, Options()))
    assert "content-type: application/octet-stream\r\n" in head


@pytest.mark.parametrize(
    "make",
    [
        lambda: calls.predict("m", {"x": f32([1])}, Options(version=1, label="a")),
        lambda: calls.predict("m", {"x": f32([1])}, Options(split_key="a\r\nb: c")),
        lambda: calls.predict("m", {"x": np.array([1j])}, Options()),
        lambda: calls.predict("m", {"x": texts([1, 2])}, Options()),
        lambda: calls.predict("m", {"x": object()}, Options()),
        lambda: calls.classify("m", {"x": f32([1])}, {"c": 1}, Options()),
        lambda: address_of("ftp://h", None, None),
        lambda: address_of("http://", None, None),
        lambda: address_of("http://h:port", None, None),
        lambda: address_of("http://h", "a\nb", None),
    ],
)
def test_what_cannot_be_said_is_refused_before_it_is_sent(make: Any) -> None:
    with pytest.raises(InvalidArgument):
        make()


def test_the_key_comes_from_the_environment_and_is_told_apart_from_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SHARDSERVE_KEY", "secret")
    assert "authorization: Bearer secret\r\n" in address_of("http://h", None, None).headers
    assert "authorization" not in address_of("http://h", "", None).headers


# Errors


@pytest.mark.parametrize("code", list(Code))
def test_every_code_comes_back_as_its_own_error(code: Code) -> None:
    found = received(refusal(500, code, 20)).response
    assert found is not None
    error = error_in(found)
    assert error is not None
    assert (error.code, error.message, error.retry_after_ms) == (code, "why", 20)


@pytest.mark.parametrize(
    ("status", "code"),
    [(404, Code.NOT_FOUND), (413, Code.INVALID_ARGUMENT), (502, Code.UNAVAILABLE),
     (503, Code.UNAVAILABLE), (418, Code.INTERNAL)],
)  # fmt: skip
def test_a_status_without_a_code_has_a_meaning_too(status: int, code: Code) -> None:
    error = error_in(Response(status, {"retry-after": "2"}, bytearray(b"<html>busy</html>")))
    assert error is not None
    assert (error.code, error.retry_after_ms) == (code, 2000)
    assert "busy" in error.message


# When to ask again


def tries(error: ServingError, *, is_repeatable: bool = True, **fields: Any) -> list[float]:
    """The pauses between tries that all fail alike; time stands still, the deadline is at 10."""
    retries = Retries(**fields)
    made = Tries(
        retries, Budget(retries), 10.0, is_repeatable=is_repeatable, chance=random.Random(1)
    )
    pauses: list[float] = []
    with pytest.raises(type(error)) as raised:
        pauses.extend(made.pause_s(error, 0.0) for _ in itertools.count())
    assert raised.value is error
    return pauses


def test_a_hint_of_the_server_is_kept_and_pauses_double() -> None:
    pauses = tries(ResourceExhausted("busy", 1000), pause_s=0.1)
    for pause, most in zip(pauses, (0.1, 0.2, 0.4), strict=True):
        assert 1.0 + most / 2 <= pause <= 1.0 + most


@pytest.mark.parametrize(
    ("error", "is_repeatable", "count"),
    [
        (Unavailable("away", 5), True, 3),
        (Unavailable("away", 5), False, 0),
        (Unavailable("no hint"), True, 0),
        (Lost("reset"), True, 3),
        (Lost("reset"), False, 0),
        (Lost("refused", was_sent=False), False, 3),
        (DeadlineExceeded("late", 5), True, 0),
        (InvalidArgument("wrong", 5), True, 0),
        (Internal("broken", 5), True, 0),
        (Unavailable("later than the deadline", 20_000), True, 0),
    ],
)
def test_only_what_may_pass_and_does_no_harm_is_asked_again(
    error: ServingError, is_repeatable: bool, count: int
) -> None:
    assert len(tries(error, is_repeatable=is_repeatable)) == count


def test_a_connection_that_was_closed_for_being_idle_costs_no_pause_once() -> None:
    pauses = tries(Lost("closed", was_reused=True))
    assert pauses[0] == 0.0
    assert all(pauses[1:])


def test_calls_share_a_budget_of_retries() -> None:
    retries = Retries(budget=2.0, budget_share=0.5)
    budget, error = Budget(retries), Unavailable("away", 1)
    granted = 0
    for _ in range(10):
        made = Tries(retries, budget, 10.0, is_repeatable=True, chance=random.Random(1))
        try:
            made.pause_s(error, 0.0)
            granted += 1
        except Unavailable:
            pass
    assert granted == 6  # 2, and half a retry for each call but those beyond the bound


@pytest.mark.parametrize("fields", [{"attempts_max": 0}, {"pause_s": -1.0}, {"budget": -1.0}])
def test_retries_that_mean_nothing_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="attempts_max"):
        Retries(**fields)
