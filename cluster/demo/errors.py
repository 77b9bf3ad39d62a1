"""Errors of the demo.

ServingError (batching.errors)
├── FailedPrecondition
│   └── FilesMissing         a package that carries a model or its data is not installed
├── Unavailable
│   └── ServerUnreachable    nothing answers at the address, or it hung up
└── Internal
    ├── RequestRefused       the server answered with an HTTP error
    └── BadReply             the server answered with something that is not an answer
"""

from __future__ import annotations

from batching.errors import FailedPrecondition, Internal, Unavailable

__all__ = ["BadReply", "FilesMissing", "RequestRefused", "ServerUnreachable"]


class FilesMissing(FailedPrecondition):
    """A package that carries a model or its data is not installed, or is not what we expect."""


class ServerUnreachable(Unavailable):
    """Nothing answers at the address, or it hung up in the middle of an answer."""


class RequestRefused(Internal):
    """The server answered with an HTTP error; the message holds its status and its words."""


class BadReply(Internal):
    """The server answered 200 with something that is not an answer to the request."""
