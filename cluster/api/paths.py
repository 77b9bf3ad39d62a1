"""From the request line to the call it means.

    POST /v1/models/NAME[/versions/N | /labels/L]:(predict|classify|regress)
    GET  /v1/models/NAME[/versions/N | /labels/L]              status
    GET  /v1/models/NAME[/versions/N | /labels/L]/metadata     metadata
    GET  /v1/models                                            list (TensorFlow Serving refuses it)

The words of a path match in any case; names and labels are percent-decoded after the match, so an
escaped slash belongs to a name. This file does not know which servables exist: a name, a version
or a label that nothing has is refused by whoever holds the routing epoch.
"""

from __future__ import annotations

import re
from enum import StrEnum
from functools import lru_cache
from typing import Final
from urllib.parse import unquote_to_bytes

import msgspec

from batching.errors import InvalidArgument

__all__ = ["Call", "Verb", "parse_path"]

_WHICH: Final = rb"(?:/versions/([0-9]+)|/labels/([^/:]+))?"
_POST: Final = re.compile(
    rb"/v1/models/([^/:]+)" + _WHICH + rb":(classify|regress|predict)", re.IGNORECASE | re.DOTALL
)
_GET: Final = re.compile(
    rb"/v1/models(?:/([^/:]+))?" + _WHICH + rb"(?:/(metadata))?", re.IGNORECASE | re.DOTALL
)

_VERSION_MAX: Final = 2**63 - 1
#: Longer paths are parsed each time, so that the cache's bytes are bounded, not only its entries.
_CACHED_BYTES_MAX: Final = 256


class Verb(StrEnum):
    """What a client asks for."""

    PREDICT = "predict"
    CLASSIFY = "classify"
    REGRESS = "regress"
    STATUS = "status"
    METADATA = "metadata"
    LIST = "list"


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """A request line understood. At most one of `version` and `label` is set.

    Attributes:
        servable: the name, decoded; empty for `Verb.LIST` alone.
    """

    verb: Verb
    servable: str = ""
    version: int | None = None
    label: str | None = None

    @property
    def names_one(self) -> bool:
        """Whether it says which version is meant."""
        return self.version is not None or self.label is not None


def parse_path(method: bytes, path: bytes) -> Call | None:
    """The call that a request line means; None outside ``/v1/``, where other rooms may answer.

    Args:
        method: as on the wire, e.g. ``b"POST"``.
        path: as on the wire: percent-encoded, perhaps with a query, which is ignored.

    Raises:
        InvalidArgument: ``/v1/`` holds no such path, or not for this method.
    """
    if len(path) <= _CACHED_BYTES_MAX:
        return _parse_cached(method, path)
    return _parse(method, path)


def _parse(method: bytes, path: bytes) -> Call | None:
    path = path.partition(b"?")[0]
    if path[:4].lower() != b"/v1/":
        return None
    if method == b"POST" and (match := _POST.fullmatch(path)):
        verb = Verb(match[4].lower().decode())
    elif method == b"GET" and (match := _GET.fullmatch(path)):
        verb = Verb.METADATA if match[4] else Verb.STATUS
    else:
        line = b"%b %b" % (method, path)
        raise InvalidArgument(f"Malformed request: {line.decode('utf-8', 'replace')}")
    name, version, label = match.group(1, 2, 3)
    if name is None:
        if version is None and label is None and verb is Verb.STATUS:
            return Call(verb=Verb.LIST)
        raise InvalidArgument("Missing model name in request.")
    return Call(
        verb=verb,
        servable=_decoded(name, "model name"),
        version=None if version is None else _version(version),
        label=None if label is None else _decoded(label, "model version label"),
    )


_parse_cached = lru_cache(maxsize=1024)(_parse)


def _decoded(text: bytes, what: str) -> str:
    try:
        return unquote_to_bytes(text).decode("utf-8")
    except UnicodeDecodeError:
        shown = text.decode("utf-8", "replace")
        raise InvalidArgument(f"Failed to decode {what}: {shown}") from None


def _version(text: bytes) -> int:
    # The length is looked at first because Python refuses to read very long integers.
    if len(text.lstrip(b"0")) <= 19 and (version := int(text[-20:])) <= _VERSION_MAX:
        return version
    raise InvalidArgument(f"Failed to convert version: {text.decode()} to numeric.")
