"""Which versions there are, by a list that an HTTP server keeps: the source ``http``.

    source: {name: http, options: {url: "https://registry.example/released.json"}}

The server answers ``{"servables": {"ranker": [7, 8]}}``; whoever releases a version writes it
there, and the versions themselves are in the store. One list may be for many servables: it is
fetched once for all that ask within a second, and not sent again while its ``ETag`` is the same.

Decides what is believed: a whole answer of that form, from that address, in time. Everything else
is an error, and an error unloads nothing (`cluster.ledger`). A servable that is missing from the
list, or has no version there, is an error as well: to unload it, do not declare it. Does not know
which versions are in the store, nor when it is asked.
"""

from __future__ import annotations

import http.client
import os
import ssl
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Annotated, Final, NamedTuple
from urllib.parse import SplitResult, urlsplit

import msgspec

from batching.errors import DataLoss, InvalidArgument, NotFound, Unavailable
from shards.calls import Calls
from shards.store import Store

__all__ = ["BYTES_MAX", "FRESH_S", "HttpLists", "http_source"]

#: The largest list that is read: room for every version of ten thousand servables.
BYTES_MAX: Final = 1 << 20
#: For so long an answer, or a failure, is everybody's who asks for the same list.
FRESH_S: Final = 1.0
_TIMEOUT_S: Final = 5.0
_TIMEOUT_S_MAX: Final = 30.0
_LISTS_MAX: Final = 64
_CALLS_MAX: Final = 8
_OPTIONS: Final = frozenset({"url", "timeout_s", "token"})


class _List(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The document: every servable's versions."""

    servables: dict[str, list[Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]]]


class _Answer(NamedTuple):
    """What a server said; `body` is None where it was: as before."""

    etag: str
    body: bytes | None


class _Asking(NamedTuple):
    """What the options mean."""

    url: str
    timeout_s: float
    token: str


class _Known:
    """What is known of one list, and the lock of whoever asks for it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.at: float | None = None
        self.error: Exception | None = None
        self.etag = ""
        self.found: _List | None = None


class HttpLists:
    """Lists that were asked for, by address. May be used by several threads.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._calls = Calls(_CALLS_MAX)
        self._lock = threading.Lock()
        self._known: OrderedDict[_Asking, _Known] = OrderedDict()

    def versions(
        self, servable: str, options: Mapping[str, str | int | float | bool], store: Store
    ) -> list[int]:
        """The versions that a list names for a servable. Blocks, for `timeout_s` at most.

        Args:
            servable: its name.
            options: ``url``; ``timeout_s`` (5 by default, 30 at most); ``token``, as
                ``env:NAME``, sent as a bearer token.
            store: not asked.

        Raises:
            InvalidArgument: the options cannot be meant.
            Unavailable: no answer in time, or another than 200.
            DataLoss: an answer that is no list, or too long.
            NotFound: the list names no version of this servable.
        """
        asking = _asked(options)
        found = self._current(asking).servables.get(servable)
        if not found:
            raise NotFound(f"{asking.url} names no version of {servable!r}")
        return found

    def _current(self, asking: _Asking) -> _List:
        known = self._known_of(asking)
        if not known.lock.acquire(timeout=asking.timeout_s):
            raise Unavailable(f"{asking.url}: no answer in time")
        try:
            if known.at is None or self._clock() >= known.at + FRESH_S:
                self._ask(asking, known)
                known.at = self._clock()
            if known.error is not None:
                raise known.error.with_traceback(None)
            assert known.found is not None
            return known.found
        finally:
            known.lock.release()

    def _known_of(self, asking: _Asking) -> _Known:
        with self._lock:
            known = self._known.setdefault(asking, _Known())
            self._known.move_to_end(asking)
            while len(self._known) > _LISTS_MAX:
                self._known.popitem(last=False)
            return known

    def _ask(self, asking: _Asking, known: _Known) -> None:
        known.error = None
        etag = known.etag if known.found is not None else ""
        try:
            answer = self._calls.run(
                asking.url, lambda: _fetch(asking, etag), timeout_s=asking.timeout_s
            )
            if answer.body is not None:
                known.found, known.etag = _read(asking.url, answer.body), answer.etag
        except (DataLoss, InvalidArgument, Unavailable) as error:
            known.error = error
        except (OSError, http.client.HTTPException) as error:
            known.error = Unavailable(f"{asking.url}: {type(error).__name__}: {error}")


def _asked(options: Mapping[str, str | int | float | bool]) -> _Asking:
    unknown = sorted(options.keys() - _OPTIONS)
    if unknown:
        raise InvalidArgument(f"source http: unknown option {unknown[0]!r}")
    url, timeout_s = options.get("url"), options.get("timeout_s", _TIMEOUT_S)
    if not isinstance(url, str) or not _is_address(url):
        raise InvalidArgument(f"source http: url must be an http or https address, got {url!r}")
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float):
        raise InvalidArgument(f"source http: timeout_s must be seconds, got {timeout_s!r}")
    if not 0 < timeout_s <= _TIMEOUT_S_MAX:
        raise InvalidArgument(f"source http: timeout_s is at most {_TIMEOUT_S_MAX:g}")
    return _Asking(url, float(timeout_s), _token(options.get("token", "")))


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        # What a password in an address would be shown to is the status, and everybody's log.
        return (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and parts.username is None
            and (parts.port is None or parts.port > 0)
            and url.isascii()
            and url.isprintable()
            and " " not in url
        )
    except ValueError:  # a port that is none
        return False


def _token(given: object) -> str:
    """The token, out of the environment: a declaration is kept in the store, for all to read."""
    if not given:
        return ""
    if not isinstance(given, str) or not given.startswith("env:"):
        raise InvalidArgument("source http: token names a variable of the environment, as env:NAME")
    token = os.environ.get(given[4:], "")
    if not (token and token.isascii() and token.isprintable()):
        raise InvalidArgument(f"source http: the environment has no token as {given[4:]}")
    return token


def _fetch(asking: _Asking, etag: str) -> _Answer:
    """Ask the server. May block for long; whoever calls waits no longer than it wants."""
    parts = urlsplit(asking.url)
    headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
    if etag:
        headers["If-None-Match"] = etag
    if asking.token:
        headers["Authorization"] = f"Bearer {asking.token}"
    connection = _connection(parts, asking.timeout_s)
    try:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", path, headers=headers)
        with closing(connection.getresponse()) as response:
            return _taken(asking.url, response, etag)
    finally:
        connection.close()


def _taken(url: str, response: http.client.HTTPResponse, etag: str) -> _Answer:
    if response.status == 304 and etag:
        return _Answer(etag, None)
    if response.status != 200:
        raise Unavailable(f"{url} answered {response.status} {response.reason[:64]}")
    body = response.read(BYTES_MAX + 1)
    if len(body) > BYTES_MAX:
        raise DataLoss(f"{url}: the list has more than {BYTES_MAX} bytes")
    if response.length:
        raise Unavailable(f"{url}: the answer ended {response.length} bytes early")
    return _Answer(response.headers.get("ETag", ""), body)


def _connection(parts: SplitResult, timeout_s: float) -> http.client.HTTPConnection:
    assert parts.hostname is not None
    if parts.scheme == "https":
        context = ssl.create_default_context()
        return http.client.HTTPSConnection(
            parts.hostname, parts.port, timeout=timeout_s, context=context
        )
    return http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout_s)


def _read(url: str, body: bytes) -> _List:
    try:
        return msgspec.json.decode(body, type=_List)
    except msgspec.MsgspecError as error:
        raise DataLoss(f"{url}: not a list of versions: {error}") from None


#: As `cluster.registered.Source`; one for the process.
http_source: Final = HttpLists().versions
