"""What the REST door says and keeps of message heads: values and a small cache.

Which request gets which head is the door's to decide. This file knows no socket.
"""

from __future__ import annotations

from functools import lru_cache
from http import HTTPStatus
from typing import Final, NamedTuple

__all__ = [
    "CLOSES",
    "STAYS",
    "STAYS_OPEN",
    "KnownHead",
    "Request",
    "learn",
    "response_head",
]

#: What a response says about its connection; HTTP/1.0 has to be told that it stays open.
STAYS: Final = b""
STAYS_OPEN: Final = b"connection: keep-alive\r\n"
CLOSES: Final = b"connection: close\r\n"

_KNOWN_MAX: Final = 1024
_KNOWN_BYTES_MAX: Final = 2048
#: A request that says one of these is left to the parser each time.
_UNUSUAL: Final = frozenset({b"transfer-encoding", b"expect", b"upgrade", b"connection"})


@lru_cache(maxsize=256)
def response_head(status: int, content_type: str, connection: bytes) -> bytes:
    """The constant part of a response head; there are few distinct ones."""
    first = f"HTTP/1.1 {status} {_reason(status)}\r\ncontent-type: {content_type}\r\n"
    return first.encode() + connection


def _reason(status: int) -> str:
    return "Client Closed Request" if status == 499 else HTTPStatus(status).phrase


class Request(NamedTuple):
    """A request that waits for its turn on its connection."""

    method: bytes
    url: bytes
    headers: dict[bytes, bytes]
    body: bytes | bytearray
    connection: bytes


class KnownHead(NamedTuple):
    """What the parser made of a request head that came before, byte for byte.

    The clients of a door say the same few heads over and over; a dictionary knows them by their
    bytes in a tenth of the time that parsing takes. Only a plain head gets here: a body whose
    length is stated, and a connection that stays.
    """

    length: int
    method: bytes
    url: bytes
    headers: dict[bytes, bytes]


def learn(
    known: dict[bytes, KnownHead],
    data: bytes,
    method: bytes,
    url: bytes,
    headers: dict[bytes, bytes],
) -> None:
    """Keep what was made of a head, if this was one whole plain request and nothing else.

    Args:
        known: what was learned so far; bounded here.
        data: the bytes that the request came in.
        method: what the parser made of them.
        url: the same.
        headers: the same.
    """
    length = headers.get(b"content-length")
    end = data.find(b"\r\n\r\n") + 4
    if (
        length is None
        or end + int(length) != len(data)
        or end > _KNOWN_BYTES_MAX
        or method == b"HEAD"
        or not _UNUSUAL.isdisjoint(headers)
    ):
        return
    if len(known) >= _KNOWN_MAX:
        known.clear()
    known[data[:end]] = KnownHead(int(length), method, url, headers)
