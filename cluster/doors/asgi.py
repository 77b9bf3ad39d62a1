"""The ASGI door: what Ray Serve's replica (or any ASGI server) calls.

The same service as the direct port answers; here one request is one coroutine, which is ASGI's
price. The router lives as long as the application's lifespan, on the server's own loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from contextlib import AbstractAsyncContextManager
from typing import Any

from cluster.api import error_body
from cluster.doors.service import Response, Service

__all__ = ["AsgiDoor"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class AsgiDoor:
    """An ASGI application over a `Service`.

    Args:
        opening: entered at the lifespan's start; yields the service, and closes it at the end.
        body_bytes_max: the largest request body, once the application is open.
    """

    def __init__(
        self,
        opening: Callable[[], AbstractAsyncContextManager[Service]],
        body_bytes_max: Callable[[], int],
    ) -> None:
        self._opening = opening
        self._body_bytes_max_now = body_bytes_max
        self._body_bytes_max = 0
        self._service: Service | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1003})

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        phase = "startup"
        try:
            async with self._opening() as service:
                self._service = service
                self._body_bytes_max = self._body_bytes_max_now()
                await send({"type": "lifespan.startup.complete"})
                phase = "shutdown"
                await receive()
        except Exception as error:
            await send({"type": f"lifespan.{phase}.failed", "message": str(error)})
            raise
        finally:
            self._service = None
        await send({"type": "lifespan.shutdown.complete"})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await self._body(receive) if self._service is not None else None
        except _ClientGone:
            return
        if self._service is None:
            response = _plain_error(503, "the router is not up")
        elif body is None:
            limit = self._body_bytes_max
            response = _plain_error(413, f"the request body is larger than {limit} bytes")
        else:
            response = await self._answer(self._service, scope, body)
        headers = [
            (b"content-type", response.content_type.encode()),
            (b"content-length", b"%d" % len(response.body)),
            *_pairs(response.headers),
        ]
        await send({"type": "http.response.start", "status": response.status, "headers": headers})
        await send({"type": "http.response.body", "body": response.body})

    async def _body(self, receive: Receive) -> bytes | None:
        message = await _next_of(receive)
        body: bytes = message.get("body", b"")
        if not message.get("more_body", False):
            return body if len(body) <= self._body_bytes_max else None
        pieces = bytearray(body)
        while message.get("more_body", False):
            if len(pieces) > self._body_bytes_max:
                return None
            message = await _next_of(receive)
            pieces += message.get("body", b"")
        return bytes(pieces) if len(pieces) <= self._body_bytes_max else None

    async def _answer(self, service: Service, scope: Scope, body: bytes) -> Response:
        answered: asyncio.Future[Response] = asyncio.get_running_loop().create_future()

        def respond(response: Response) -> None:
            if not answered.done():  # the server cancels us when its client goes away
                answered.set_result(response)

        path: bytes = scope.get("raw_path") or scope["path"].encode()
        if query := scope.get("query_string"):
            path = path.partition(b"?")[0] + b"?" + query
        headers = _headers_of(scope["headers"])
        request = service.handle(scope["method"].encode(), path, headers, body, respond)
        try:
            return await answered
        except asyncio.CancelledError:
            if request is not None:
                service.cancel(request)
            raise


class _ClientGone(Exception):
    """The client went away before its request was whole."""


async def _next_of(receive: Receive) -> Message:
    message = await receive()
    if message["type"] == "http.disconnect":
        raise _ClientGone
    return message


def _headers_of(pairs: Iterable[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """By name; a header given twice is one list, as the standard has it."""
    headers: dict[bytes, bytes] = {}
    for name, value in pairs:
        given = headers.get(name)
        headers[name] = value if given is None else b"%b, %b" % (given, value)
    return headers


def _pairs(lines: bytes) -> list[tuple[bytes, bytes]]:
    pairs = (line.split(b": ", 1) for line in lines.split(b"\r\n") if line)
    return [(name, value) for name, value in pairs]


def _plain_error(status: int, message: str) -> Response:
    return Response(status, "application/json", b"", error_body(message))
