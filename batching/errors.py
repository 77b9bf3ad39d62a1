"""The errors a client can see, by code. Every layer's errors descend from `ServingError`.

    ServingError
    ├── InvalidArgument      the request is wrong, whoever gets it
    ├── NotFound             no such servable, version, signature
    ├── FailedPrecondition   right request, wrong state
    ├── ResourceExhausted    a bound was hit; come back later
    ├── DeadlineExceeded     the answer would come too late
    ├── Unavailable          a part is away; another try may succeed
    ├── Unimplemented        understood, but not offered
    ├── Unauthenticated      who are you
    ├── PermissionDenied     you may not
    ├── Cancelled            the caller gave up
    ├── DataLoss             stored or received bytes are not what they claim to be
    └── Internal             our own fault

A code is a word of gRPC's canonical vocabulary. Only a door turns a code into a status number.
Errors are plain: positional data, text in `__str__`, and they round-trip through pickle because
Ray carries them between control-plane processes.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

__all__ = [
    "Cancelled",
    "Code",
    "DataLoss",
    "DeadlineExceeded",
    "FailedPrecondition",
    "Internal",
    "InvalidArgument",
    "NotFound",
    "PermissionDenied",
    "ResourceExhausted",
    "ServingError",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "error_of",
]


class Code(StrEnum):
    """Canonical status words."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    NOT_FOUND = "NOT_FOUND"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    UNAVAILABLE = "UNAVAILABLE"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    CANCELLED = "CANCELLED"
    DATA_LOSS = "DATA_LOSS"
    INTERNAL = "INTERNAL"


class ServingError(Exception):
    """Base of every error that may reach a client. Raise a subclass.

    Args:
        message: what is wrong and, where it helps, what to do; shown to the client.
        retry_after_ms: a hint when another try makes sense, 0 where it does not.
    """

    code: ClassVar[Code] = Code.INTERNAL

    def __init__(self, message: str, retry_after_ms: int = 0) -> None:
        super().__init__(message, retry_after_ms)
        self.message = message
        self.retry_after_ms = retry_after_ms

    def __str__(self) -> str:
        return self.message


class InvalidArgument(ServingError):
    """The request is wrong, whoever gets it."""

    code = Code.INVALID_ARGUMENT


class NotFound(ServingError):
    """No such servable, version or signature."""

    code = Code.NOT_FOUND


class FailedPrecondition(ServingError):
    """A right request in the wrong state."""

    code = Code.FAILED_PRECONDITION


class ResourceExhausted(ServingError):
    """A bound was hit; `retry_after_ms` says when to come back."""

    code = Code.RESOURCE_EXHAUSTED


class DeadlineExceeded(ServingError):
    """The answer would come, or came, too late."""

    code = Code.DEADLINE_EXCEEDED


class Unavailable(ServingError):
    """A part of the cluster is away; another try may succeed."""

    code = Code.UNAVAILABLE


class Unimplemented(ServingError):
    """Understood, but not offered."""

    code = Code.UNIMPLEMENTED


class Unauthenticated(ServingError):
    """The peer did not prove who it is."""

    code = Code.UNAUTHENTICATED


class PermissionDenied(ServingError):
    """It is known who asks, and they may not."""

    code = Code.PERMISSION_DENIED


class Cancelled(ServingError):
    """The caller gave up."""

    code = Code.CANCELLED


class DataLoss(ServingError):
    """Stored or received bytes are not what they claim to be."""

    code = Code.DATA_LOSS


class Internal(ServingError):
    """Our own fault."""

    code = Code.INTERNAL


_BY_CODE: dict[Code, type[ServingError]] = {
    kind.code: kind
    for kind in (
        InvalidArgument,
        NotFound,
        FailedPrecondition,
        ResourceExhausted,
        DeadlineExceeded,
        Unavailable,
        Unimplemented,
        Unauthenticated,
        PermissionDenied,
        Cancelled,
        DataLoss,
        Internal,
    )
}


def error_of(code: str, message: str, retry_after_ms: int = 0) -> ServingError:
    """The error for a code that came over the wire; an unknown code is `Internal`."""
    try:
        kind = _BY_CODE[Code(code)]
    except ValueError:
        return Internal(f"{code}: {message}")
    return kind(message, retry_after_ms)
