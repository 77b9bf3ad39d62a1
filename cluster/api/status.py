"""From a typed error to what an HTTP client sees: status number, body, `Retry-After`.

This is the only place in the project where a code becomes a number. It does not know why an
error arose or which door prints it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import orjson

from batching.errors import Code, ServingError

__all__ = ["CONTENT_TYPE", "HTTP_STATUS", "error_body", "http_status", "retry_after"]

#: The content type of every body this package makes, errors included.
CONTENT_TYPE: Final = "application/json"

#: Code to HTTP status. 499 is nginx's "client closed request", which TensorFlow Serving uses too.
HTTP_STATUS: Final[Mapping[Code, int]] = MappingProxyType(
    {
        Code.INVALID_ARGUMENT: 400,
        Code.FAILED_PRECONDITION: 400,
        Code.UNAUTHENTICATED: 401,
        Code.PERMISSION_DENIED: 403,
        Code.NOT_FOUND: 404,
        Code.RESOURCE_EXHAUSTED: 429,
        Code.CANCELLED: 499,
        Code.INTERNAL: 500,
        Code.DATA_LOSS: 500,
        Code.UNIMPLEMENTED: 501,
        Code.UNAVAILABLE: 503,
        Code.DEADLINE_EXCEEDED: 504,
    }
)

_COME_BACK: Final = frozenset({Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE})


def http_status(code: Code) -> int:
    """The HTTP status of a code."""
    return HTTP_STATUS[code]


def retry_after(error: ServingError) -> str | None:
    """The value of a `Retry-After` header, or None for no such header.

    Only an error that another try may mend carries one (429 and 503), and only if whoever raised
    it gave a hint. HTTP counts in whole seconds, so the hint is rounded up: a client that comes
    back too early finds the same full queue.
    """
    if error.code not in _COME_BACK or error.retry_after_ms <= 0:
        return None
    return str(-(-error.retry_after_ms // 1000))


def error_body(message: str) -> bytes:
    """The JSON body of an error: ``{"error": message}``."""
    # A lone surrogate can come out of a client's JSON escape and cannot be encoded as UTF-8.
    text = message.encode("utf-8", "replace").decode("utf-8")
    return orjson.dumps({"error": text})
