"""Which form a request's body has, and which its answer gets.

A body is JSON unless its head says otherwise: what is not known, or not said, is JSON, as
it always was. An answer has the form that ``accept`` prefers among those there are, else that of
the request. Errors are JSON whatever was asked for, so that people and proxies can read them.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from functools import lru_cache
from typing import Final, NamedTuple

from batching.errors import InvalidArgument
from cluster.forms.inflating import encoding_of

__all__ = ["HEAD_LENGTH", "Form", "Forms", "forms_of", "forms_said"]

#: The header that says how many bytes of a body of raw buffers are its head.
HEAD_LENGTH: Final = b"inference-header-content-length"
_CONTENT_TYPE: Final = b"content-type"
_ACCEPT: Final = b"accept"
_ENCODING: Final = b"content-encoding"
#: Longer ones are looked at each time, so that the cache's bytes are bounded, not only its entries.
_CACHED_BYTES_MAX: Final = 256


class Form(Enum):
    """The forms of a body, each with its media type."""

    JSON = "application/json"
    MSGPACK = "application/x-msgpack"
    RAW = "application/octet-stream"


class Forms(NamedTuple):
    """What a request's head says of its body and its answer.

    Attributes:
        request: the form of the body.
        answer: the form of the answer.
        head_bytes: of a body of raw buffers, else 0.
        encoding: what the body is compressed with; empty where it is not.
    """

    request: Form
    answer: Form
    head_bytes: int = 0
    encoding: str = ""


_BY_NAME: Final[Mapping[bytes, Form]] = {
    **{form.value.encode(): form for form in Form},
    b"application/msgpack": Form.MSGPACK,
    b"application/vnd.msgpack": Form.MSGPACK,
}


def forms_of(headers: Mapping[bytes, bytes]) -> Forms | None:
    """The forms of a request and its answer; None where both are JSON.

    Args:
        headers: by name in small letters.

    Raises:
        InvalidArgument: the length of the head is no number.
        UnknownEncoding: the body is compressed with something else.
    """
    kind = headers.get(_CONTENT_TYPE, b"")
    accept = headers.get(_ACCEPT, b"")
    length = headers.get(HEAD_LENGTH, b"")
    encoding = headers.get(_ENCODING, b"")
    if len(kind) + len(accept) + len(length) + len(encoding) > _CACHED_BYTES_MAX:
        return forms_said(kind, accept, length, encoding)
    return _said_before(kind, accept, length, encoding)


def forms_said(kind: bytes, accept: bytes, length: bytes, encoding: bytes) -> Forms | None:
    """The forms that four headers say, each empty where it is not there.

    Args:
        kind: the content type.
        accept: what the client takes.
        length: of the head.
        encoding: how the body is compressed.

    Raises:
        InvalidArgument: the length is no number.
        UnknownEncoding: the body is compressed with something else.
    """
    inside = encoding_of(encoding)
    request = _BY_NAME.get(_media_type(kind), Form.JSON)
    head_bytes = 0
    if length:
        if len(length) > 9 or not length.isdigit():
            raise InvalidArgument(f"{HEAD_LENGTH.decode()} must be a number of bytes")
        request, head_bytes = Form.RAW, int(length)
    elif request is Form.RAW:
        request = Form.JSON  # many send JSON so; raw buffers have a head
    answer = _preferred(accept) or request
    if request is answer is Form.JSON and not inside:
        return None
    return Forms(request, answer, head_bytes, inside)


_said_before = lru_cache(maxsize=512)(forms_said)


def _media_type(text: bytes) -> bytes:
    return text.partition(b";")[0].strip().lower()


def _preferred(accept: bytes) -> Form | None:
    """The first of the forms that the client likes best; None where it names none."""
    best: Form | None = None
    best_quality = 0.0
    for each in accept.split(b","):
        form = _BY_NAME.get(_media_type(each))
        quality = _quality(each)
        if form is not None and quality > best_quality:
            best, best_quality = form, quality
    return best


def _quality(text: bytes) -> float:
    for parameter in text.split(b";")[1:]:
        name, _, value = parameter.partition(b"=")
        if name.strip().lower() == b"q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0
