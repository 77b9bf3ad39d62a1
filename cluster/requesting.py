"""One request to a REST door, for the command line."""

from __future__ import annotations

import http.client
import json
import re
from urllib.parse import quote, urlsplit

from batching.errors import InvalidArgument, ServingError, Unavailable

__all__ = ["parse_target", "send"]

_TARGET = re.compile(r"([^:@]+)(?::(\d+)|@([^:@]+))?")
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

    Raises:
        InvalidArgument: the method or the target is not one.
        Unavailable: nothing answers at the URL.
        ServingError: the server's refusal, in its words.
    """
    if method not in _METHODS:
        raise InvalidArgument(f"{method!r} is not one of {', '.join(_METHODS)}")
    host, port = _address(url)
    connection = http.client.HTTPConnection(host, port, timeout=timeout_ms / 1000 + 5.0)
    headers = {"content-type": "application/json", "x-request-timeout-ms": str(timeout_ms)}
    path = f"{parse_target(target)}:{method}"
    try:
        connection.request("POST", path, body, headers)
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


def _address(url: str) -> tuple[str, int]:
    try:
        parts = urlsplit(url)
        if parts.scheme == "http" and parts.hostname:
            return parts.hostname, parts.port or 80
    except ValueError:  # a port that is not one
        pass
    raise InvalidArgument(f"{url!r} is not an http:// URL")


def _message(answer: str) -> str:
    try:
        return str(json.loads(answer)["error"])
    except (ValueError, KeyError, TypeError):
        return answer[:500]
