"""The direct REST door: HTTP/1.1 on a socket of our own, parsed by httptools, run by uvloop.

One connection is one object; a request is a few attributes of it. Requests that a client
pipelines are answered in order, one at a time. What is refused here, before a request exists:
bytes that are not HTTP, headers or bodies over their bounds, connections over theirs. Everything
else is the service's.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from http import HTTPStatus
from typing import cast

import httptools

from cluster.api import error_body
from cluster.doors.service import Response, Service

__all__ = ["RestDoor", "RestLimits"]

logger = logging.getLogger(__name__)


class RestLimits:
    """Bounds of the door.

    Attributes:
        body_bytes_max: largest request body.
        head_bytes_max: largest request line plus headers.
        connections_max: open connections.
        pipelined_max: requests of one connection that wait their turn.
    """

    def __init__(
        self,
        *,
        body_bytes_max: int = 64 << 20,
        head_bytes_max: int = 32 << 10,
        connections_max: int = 16384,
        pipelined_max: int = 64,
    ) -> None:
        self.body_bytes_max = body_bytes_max
        self.head_bytes_max = head_bytes_max
        self.connections_max = connections_max
        self.pipelined_max = pipelined_max


_HEADS: dict[tuple[int, str, bool], bytes] = {}


def _head(status: int, content_type: str, keep_alive: bool) -> bytes:
    """The constant part of a response head; there are few distinct ones."""
    key = (status, content_type, keep_alive)
    head = _HEADS.get(key)
    if head is None:
        connection = "" if keep_alive else "connection: close\r\n"
        head = _HEADS[key] = (
            f"HTTP/1.1 {status} {_reason(status)}\r\ncontent-type: {content_type}\r\n{connection}"
        ).encode()
    return head


def _reason(status: int) -> str:
    return "Client Closed Request" if status == 499 else HTTPStatus(status).phrase


class RestDoor:
    """Listens, and counts connections.

    Args:
        service: answers requests.
        limits: bounds.
    """

    def __init__(self, service: Service, limits: RestLimits | None = None) -> None:
        self.service = service
        self.limits = limits or RestLimits()
        self.connections: set[_Connection] = set()
        self.refused_connections = 0
        self._server: asyncio.Server | None = None

    async def open(self, host: str, port: int, *, reuse_port: bool = False) -> int:
        """Listen; returns the port, which matters where 0 was asked for.

        Raises:
            OSError: the address is taken or not ours.
        """
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _Connection(self), host, port, backlog=1024, reuse_port=reuse_port or None
        )
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self, grace_s: float = 1.0) -> None:
        """Stop listening, let requests end for a moment, then close every connection."""
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.close_when_idle()
        deadline = asyncio.get_running_loop().time() + grace_s
        while self.connections and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.01)
        for connection in list(self.connections):
            connection.abort()


class _Connection(asyncio.Protocol):
    """One client connection."""

    __slots__ = (
        "_body", "_busy", "_closing", "_door", "_head_bytes", "_headers",
        "_keep_alive", "_loop", "_parser", "_paused", "_pipelined", "_refused", "_service",
        "_transport", "_url",
    )  # fmt: skip

    def __init__(self, door: RestDoor) -> None:
        self._door = door
        self._service = door.service
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._head_bytes = 0
        self._body: bytes | bytearray = b""
        self._keep_alive = True
        self._busy = False
        self._closing = False
        self._refused = False
        self._paused = False
        self._pipelined: deque[tuple[bytes, bytes, dict[bytes, bytes], bytes, bool]] = deque()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        door = self._door
        if len(door.connections) >= door.limits.connections_max:
            door.refused_connections += 1
            self._refuse(503, "too many connections")
            return
        door.connections.add(self)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._refuse(400, "upgrade is not supported")
        except httptools.HttpParserError as error:
            # A callback's own exception comes wrapped; a refusal was answered already.
            if not self._refused:
                self._refuse(400, f"not a valid HTTP request: {error}")

    def eof_received(self) -> bool:
        # A half-closed client still wants its answer.
        self._closing = True
        return self._busy

    def connection_lost(self, exc: Exception | None) -> None:
        self._door.connections.discard(self)
        self._transport = None
        self._pipelined.clear()

    def pause_writing(self) -> None:
        # A client that does not read its answers gets no more requests parsed.
        self._paused = True
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._paused = False
        if self._transport is not None and len(self._pipelined) == 0:
            self._transport.resume_reading()

    # httptools callbacks

    def on_message_begin(self) -> None:
        self._url = b""
        self._headers = {}
        self._head_bytes = 0
        self._body = b""

    def on_url(self, url: bytes) -> None:
        self._head_bytes += len(url)
        if self._head_bytes > self._door.limits.head_bytes_max:
            self._refuse(431, "the request line is too long")
            return
        self._url = self._url + url if self._url else url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > self._door.limits.head_bytes_max:
            if not self._refused:
                self._refuse(431, "the request's headers are too large")
            return
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        headers = self._headers
        length = headers.get(b"content-length")
        if length is not None and int(length) > self._door.limits.body_bytes_max:
            self._refuse_body()
        elif b"expect" in headers and self._transport is not None and not self._refused:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        if not self._body:
            self._body = body
            return
        if isinstance(self._body, bytes):
            self._body = bytearray(self._body)
        self._body += body
        if len(self._body) > self._door.limits.body_bytes_max and not self._refused:
            self._refuse_body()

    def on_message_complete(self) -> None:
        if self._refused:
            return
        parser = self._parser
        keep_alive = parser.should_keep_alive()
        body = self._body
        if self._busy:
            request = (parser.get_method(), self._url, self._headers, bytes(body), keep_alive)
            self._pipelined.append(request)
            if len(self._pipelined) >= self._door.limits.pipelined_max and self._transport:
                self._transport.pause_reading()
            return
        self._serve(parser.get_method(), self._url, self._headers, body, keep_alive)

    # Requests and answers

    def _serve(
        self,
        method: bytes,
        url: bytes,
        headers: dict[bytes, bytes],
        body: bytes | bytearray,
        keep_alive: bool,
    ) -> None:
        self._busy = True
        self._keep_alive = keep_alive
        self._service.handle(method, url, headers, body, self.respond)

    def respond(self, response: Response) -> None:
        """Write the one answer to the request in hand, then take the next."""
        transport = self._transport
        if transport is None:
            return
        self._busy = False
        keep_alive = self._keep_alive and not self._closing
        body = response.body
        transport.write(
            b"%b%bcontent-length: %d\r\n\r\n%b"
            % (
                _head(response.status, response.content_type, keep_alive),
                response.headers,
                len(body),
                body,
            )
        )
        if not keep_alive:
            transport.close()
        elif self._pipelined:
            self._loop.call_soon(self._next)

    def _next(self) -> None:
        if self._pipelined and not self._busy and self._transport is not None:
            request = self._pipelined.popleft()
            if not self._pipelined and not self._paused:
                self._transport.resume_reading()
            self._serve(*request)

    def _refuse_body(self) -> None:
        limit = self._door.limits.body_bytes_max
        self._refuse(413, f"the request body is larger than the limit of {limit} bytes")

    def _refuse(self, status: int, reason: str) -> None:
        """Answer and close: what follows on this connection cannot be trusted to be a request."""
        self._refused = True
        transport = self._transport
        if transport is None:
            return
        self._door.service.count_refused(status)
        if self._busy:  # the request in hand gets its answer first, then the connection ends
            self._closing = True
            self._pipelined.clear()
            return
        body = error_body(reason)
        head = _head(status, "application/json", keep_alive=False)
        transport.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        transport.close()

    def close_when_idle(self) -> None:
        """Close now if no request is in hand, else after its answer."""
        self._closing = True
        if not self._busy and self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()
