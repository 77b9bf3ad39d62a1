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
from cluster.forms.deflating import Packing, packing_asked
from cluster.forms.inflating import encoding_of
from cluster.forms.preferences import media_type, preferences

__all__ = ["HEAD_LENGTH", "Form", "Forms", "forms_of", "forms_said"]

#: The header that says how many bytes of a body of raw buffers are its head.
HEAD_LENGTH: Final = b"inference-header-content-length"
_CONTENT_TYPE: Final = b"content-type"
_ACCEPT: Final = b"accept"
_ENCODING: Final = b"content-encoding"
_TAKEN: Final = b"accept-encoding"
#: Longer ones are looked at each time, so that the cache's bytes are bounded, not only its entries.
_CACHED_BYTES_MAX: Final = 256


class Form(Enum):
    """The forms of a body, each with its media type."""

    JSON = "application/json"
    MSGPACK = "application/x-msgpack"
    RAW = "application/octet-stream"
    ARROW = "application/vnd.apache.arrow.stream"


class Forms(NamedTuple):
    """What a request's head says of its body and its answer.

    Attributes:
        request: the form of the body.
        answer: the form of the answer.
        head_bytes: of a body of raw buffers, else 0.
        encoding: what the body is compressed with; empty where it is not.
        packing: how the answer is to be compressed, if it is.
    """

    request: Form
    answer: Form
    head_bytes: int = 0
    encoding: str = ""
    packing: Packing | None = None


_BY_NAME: Final[Mapping[bytes, Form]] = {
    **{form.value.encode(): form for form in Form},
    b"application/msgpack": Form.MSGPACK,
    b"application/vnd.msgpack": Form.MSGPACK,
}


def forms_of(headers: Mapping[bytes, bytes]) -> Forms | None:
    """The forms of a request and its answer; None where both are JSON as it is.

    Args:
        headers: by name in small letters.

    Raises:
        InvalidArgument: the length of the head is no number.
        UnknownEncoding: the body is compressed with something else.
        NotAcceptable: no answer can be given so that the client takes it.
    """
    kind = headers.get(_CONTENT_TYPE, b"")
    accept = headers.get(_ACCEPT, b"")
    length = headers.get(HEAD_LENGTH, b"")
    encoding = headers.get(_ENCODING, b"")
    taken = headers.get(_TAKEN, b"")
    if len(kind) + len(accept) + len(length) + len(encoding) + len(taken) > _CACHED_BYTES_MAX:
        return forms_said(kind, accept, length, encoding, taken)
    return _said_before(kind, accept, length, encoding, taken)


def forms_said(
    kind: bytes, accept: bytes, length: bytes, encoding: bytes, taken: bytes
) -> Forms | None:
    """The forms that five headers say, each empty where it is not there.

    Args:
        kind: the content type.
        accept: what the client takes.
        length: of the head.
        encoding: how the body is compressed.
        taken: how the answer may be.

    Raises:
        InvalidArgument: as `forms_of`, like the others.
    """
    inside = encoding_of(encoding)
    request = _BY_NAME.get(media_type(kind), Form.JSON)
    head_bytes = 0
    if length:
        if len(length) > 9 or not length.isdigit():
            raise InvalidArgument(f"{HEAD_LENGTH.decode()} must be a number of bytes")
        request, head_bytes = Form.RAW, int(length)
    elif request is Form.RAW:
        request = Form.JSON  # many send JSON so; raw buffers have a head
    answer = _preferred(accept) or request
    packing = packing_asked(taken)
    if request is answer is Form.JSON and not inside and packing is None:
        return None
    return Forms(request, answer, head_bytes, inside, packing)


_said_before = lru_cache(maxsize=512)(forms_said)


def _preferred(accept: bytes) -> Form | None:
    """The first of the forms that the client likes best; None where it names none."""
    best: Form | None = None
    best_weight = 0.0
    for name, weight in preferences(accept):
        form = _BY_NAME.get(name)
        if form is not None and weight > best_weight:
            best, best_weight = form, weight
    return best
