"""Errors as HTTP shows them."""

from __future__ import annotations

import json

import pytest

from batching.errors import Code, InvalidArgument, ServingError, error_of
from cluster.api import CONTENT_TYPE, HTTP_STATUS, error_body, http_status, retry_after


def test_every_code_has_a_status() -> None:
    assert set(HTTP_STATUS) == set(Code)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (Code.INVALID_ARGUMENT, 400),
        (Code.FAILED_PRECONDITION, 400),
        (Code.UNAUTHENTICATED, 401),
        (Code.PERMISSION_DENIED, 403),
        (Code.NOT_FOUND, 404),
        (Code.RESOURCE_EXHAUSTED, 429),
        (Code.CANCELLED, 499),
        (Code.INTERNAL, 500),
        (Code.DATA_LOSS, 500),
        (Code.UNIMPLEMENTED, 501),
        (Code.UNAVAILABLE, 503),
        (Code.DEADLINE_EXCEEDED, 504),
    ],
)
def test_status_is_the_one_tensorflow_serving_gives(code: Code, status: int) -> None:
    assert http_status(code) == status


@pytest.mark.parametrize(
    ("code", "hint_ms", "header"),
    [
        (Code.RESOURCE_EXHAUSTED, 1, "1"),
        (Code.RESOURCE_EXHAUSTED, 1000, "1"),
        (Code.RESOURCE_EXHAUSTED, 1001, "2"),
        (Code.UNAVAILABLE, 2500, "3"),
        (Code.UNAVAILABLE, 0, None),
        (Code.INVALID_ARGUMENT, 1000, None),
        (Code.DEADLINE_EXCEEDED, 1000, None),
    ],
)
def test_retry_after_is_whole_seconds_rounded_up_where_another_try_helps(
    code: Code, hint_ms: int, header: str | None
) -> None:
    assert retry_after(error_of(code, "no", hint_ms)) == header


def test_a_code_that_another_try_mends_is_the_only_one_with_a_header() -> None:
    with_header = {code for code in Code if retry_after(error_of(code, "no", 1))}
    assert with_header == {Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE}


@pytest.mark.parametrize(
    ("message", "body"),
    [
        pytest.param('Bad key: "key"', rb'{"error":"Bad key: \"key\""}', id="B28-quotes"),
        pytest.param("a\nb\\", rb'{"error":"a\nb\\"}', id="control and backslash"),
        pytest.param("", b'{"error":""}', id="empty"),
    ],
)
def test_an_error_body_is_escaped(message: str, body: bytes) -> None:
    assert error_body(message) == body


def test_an_error_body_is_valid_for_text_that_is_not_unicode() -> None:
    assert json.loads(error_body("a\ud800b")) == {"error": "a?b"}


def test_an_error_body_says_what_the_error_says() -> None:
    error: ServingError = InvalidArgument("ünknown")
    assert json.loads(error_body(str(error)))["error"] == "ünknown"
    assert CONTENT_TYPE == "application/json"
