"""Requests to a REST door, for the command line."""

from __future__ import annotations

import http.client
import json
import os
import re
import ssl
from urllib.parse import quote, urlsplit

from batching.errors import InvalidArgument, ServingError, Unavailable

__all__ = ["fetch", "parse_target", "send"]

_TARGET = re.compile(r"([^:@]+)(?::(\d+)|@([^:@]+))?")
_KEY = "SHARDSERVE_KEY"
_METHODS = ("predict", "classify", "regress")


def parse_target(target: str) -> str:
    """The path of ``NAME``, ``NAME:VERSION`` or ``NAME@LABEL``.

    Raises:
        InvalidArgument: it is none of these.
    """
    match = _TARGET.fullmatch(target)
    if match is None:
        raise InvalidArgument(f"{target!r} is not NAME, NAME:VERSION or NAME@LABEL")
    name, version, label = match.groups()
    path = f"/v1/models/{quote(name, safe='')}"
    if version is not None:
        return f"{path}/versions/{version}"
    return path if label is None else f"{path}/labels/{quote(label, safe='')}"


def send(url: str, target: str, method: str, body: bytes, timeout_ms: int) -> str:
    """Send a body and return the answer's.

    The environment variable ``SHARDSERVE_KEY`` is the key, where the door needs one. A certificate
    must be signed by an authority that OpenSSL trusts; ``SSL_CERT_FILE`` names others.

    Raises:
        InvalidArgument: the method or the target is not one.
        Unavailable: nothing answers at the URL.
        ServingError: the server's refusal, in its words.
    """
    if method not in _METHODS:
        raise InvalidArgument(f"{method!r} is not one of {', '.join(_METHODS)}")
    headers = {"content-type": "application/json", "x-request-timeout-ms": str(timeout_ms)}
    path = f"{parse_target(target)}:{method}"
    return _ask(url, "POST", path, body, headers, timeout_ms / 1000 + 5.0)


def fetch(url: str, path: str, timeout_s: float) -> str:
    """Get a page of a door.

    Raises:
        InvalidArgument: the URL is none.
        Unavailable: nothing answers there.
        ServingError: the server's refusal, in its words.
    """
    return _ask(url, "GET", path, b"", {}, timeout_s)


def _ask(
    url: str, verb: str, path: str, body: bytes, headers: dict[str, str], timeout_s: float
) -> str:
    connection = _connection(url, timeout_s)
    if key := os.environ.get(_KEY):
        headers["authorization"] = f"Bearer {key}"
    try:
        connection.request(verb, path, body, headers)
        response = connection.getresponse()
        answer = response.read().decode("utf-8", "replace")
    except OSError as error:
        raise Unavailable(f"nothing answers at {url} ({error}): is the cluster up?") from error
    except http.client.HTTPException as error:
        name = type(error).__name__
        raise Unavailable(f"what answers at {url} is no REST door ({name})") from error
    finally:
        connection.close()
    if response.status != 200:
        raise ServingError(f"{response.status}: {_message(answer)}")
    return answer


def _connection(url: str, timeout_s: float) -> http.client.HTTPConnection:
    try:
        parts = urlsplit(url)
        if parts.scheme == "http" and parts.hostname:
            return http.client.HTTPConnection(parts.hostname, parts.port or 80, timeout=timeout_s)
        if parts.scheme == "https" and parts.hostname:
            return http.client.HTTPSConnection(
                parts.hostname,
                parts.port or 443,
                timeout=timeout_s,
                context=ssl.create_default_context(),
            )
    except ValueError:  # a port that is not one
        pass
    raise InvalidArgument(f"{url!r} is not an http:// or https:// URL")


def _message(answer: str) -> str:
    try:
        return str(json.loads(answer)["error"])
    except (ValueError, KeyError, TypeError):
        return answer[:500]
