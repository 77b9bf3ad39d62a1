"""Where a client's requests go, and what each of them says. Pure but for the environment's key."""

from __future__ import annotations

import os
import ssl
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from batching.errors import InvalidArgument
from cluster.client.calls import Call, header_value
from cluster.forms import ENCODINGS
from cluster.forms.values import Buffer

__all__ = ["BODY_BYTES_MAX", "Address", "address_of", "request_of"]

#: A longer answer is refused, unless a client is told to take it.
BODY_BYTES_MAX: Final = 1 << 30
_KEY: Final = "SHARDSERVE_KEY"
#: The longest that a door takes.
_TIMEOUT_MS_MAX: Final = 3_600_000


class Address(NamedTuple):
    """A door.

    Attributes:
        host: name or address.
        port: its port.
        tls: for HTTPS, else None.
        prefix: before every path; empty but behind a proxy.
        headers: complete header lines of every request.
    """

    host: str
    port: int
    tls: ssl.SSLContext | None
    prefix: str
    headers: str

    def __str__(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.host}:{self.port}"


def address_of(
    url: str, key: str | None, tls: ssl.SSLContext | None, accept_encoding: str = ""
) -> Address:
    """The door at a URL.

    Args:
        url: ``http://`` or ``https://``, perhaps with a path.
        key: an API key; None takes that of ``SHARDSERVE_KEY``, where it is set.
        tls: how to trust an HTTPS door; None trusts what OpenSSL does.
        accept_encoding: how answers may be compressed; empty for not at all.

    Raises:
        InvalidArgument: it is no such URL, the key cannot stand in a header, or there is no such
            encoding.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:  # a port that is not one
        host, port = None, None
    if not host or parts.scheme not in ("http", "https"):
        raise InvalidArgument(f"{url!r} is not an http:// or https:// URL")
    is_https = parts.scheme == "https"
    if port is None:
        port = 443 if is_https else 80
    named = f"[{host}]" if ":" in host else host
    headers = f"host: {header_value('host', named)}:{port}\r\n"
    if key is None:
        key = os.environ.get(_KEY, "")
    if key:
        headers += f"authorization: Bearer {header_value('the key', key)}\r\n"
    if accept_encoding:
        if accept_encoding not in ENCODINGS:
            raise InvalidArgument(f"accept_encoding is one of {', '.join(ENCODINGS)}")
        headers += f"accept-encoding: {accept_encoding}\r\n"
    context = (tls or ssl.create_default_context()) if is_https else None
    return Address(host, port, context, header_value("url", parts.path.rstrip("/")), headers)


def request_of(address: Address, call: Call[Any], left_s: float) -> list[Buffer]:
    """The bytes of a request.

    Args:
        address: where it goes.
        call: what is asked.
        left_s: seconds until the caller's deadline, as the server is told.
    """
    # Rounded up: so that the same time-out is the same head, which a door then knows by its bytes.
    timeout_ms = min(max(-int(-left_s * 1000 // 1), 1), _TIMEOUT_MS_MAX)
    nbytes = sum(map(len, call.buffers))
    length = f"content-length: {nbytes}\r\n" if call.method != "GET" else ""
    head = (
        f"{call.method} {address.prefix}{call.path} HTTP/1.1\r\n{address.headers}{call.headers}"
        f"x-request-timeout-ms: {timeout_ms}\r\n{length}\r\n"
    ).encode("latin-1")
    return [head, *call.buffers]
