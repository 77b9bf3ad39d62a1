"""Clients of a REST door that say exactly the bytes they mean, and a service that says when."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, NamedTuple, cast

import uvloop

from cluster.doors.rest import RestDoor
from cluster.doors.service import Respond, Response, Service
from cluster.doors.settings import DoorLimits

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "uvloop": uvloop.new_event_loop,
    "asyncio": asyncio.new_event_loop,
}


def run_on(loop: str, scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a scenario on a loop by name; what a callback raises fails it."""
    broken: list[dict[str, Any]] = []

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: broken.append(context))
        await asyncio.wait_for(scenario(), 20.0)

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(run())
    assert not broken, broken


class FakeService:
    """Answers by path: ``/echo`` at once, ``/later`` when told, ``/big`` with a megabyte."""

    def __init__(self) -> None:
        self.paths: list[bytes] = []
        self.waiting: list[Respond] = []
        self.refused: list[int] = []
        self.cancelled: list[object] = []

    def handle(
        self,
        method: bytes,
        path: bytes,
        headers: Mapping[bytes, bytes],
        body: bytes | bytearray,
        respond: Respond,
    ) -> object:
        """Returns the path where the request can be cancelled, as the router returns a request."""
        self.paths.append(path)
        if path.startswith(b"/later"):
            self.waiting.append(respond)
            return path
        elif path.startswith(b"/big"):
            respond(Response(200, "text/plain", b"", b"x" * (1 << 20)))
        else:
            respond(echo(method, path, headers, body))
        return None

    def cancel(self, request: object) -> None:
        self.cancelled.append(request)

    def count_refused(self, status: int) -> None:
        self.refused.append(status)

    def answer_one(self) -> None:
        """Answer the oldest request that waits."""
        self.waiting.pop(0)(Response(200, "application/json", b"x-late: yes\r\n", b'"late"'))


def echo(
    method: bytes, path: bytes, headers: Mapping[bytes, bytes], body: bytes | bytearray
) -> Response:
    seen = {
        "method": method.decode(),
        "path": path.decode(),
        "headers": {name.decode(): value.decode() for name, value in headers.items()},
        "body": body.decode("latin-1"),
    }
    return Response(200, "application/json", b"", json.dumps(seen).encode())


class Reply(NamedTuple):
    """One HTTP response."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """One connection to a door."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, data: bytes | str) -> None:
        self._writer.write(data.encode() if isinstance(data, str) else data)

    async def drain(self) -> None:
        await self._writer.drain()

    def half_close(self) -> None:
        self._writer.write_eof()

    async def reply(self, *, has_body: bool = True) -> Reply:
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.rstrip().split("\r\n")
        version, status, _ = first.split(" ", 2)
        assert version == "HTTP/1.1"
        headers = dict(line.split(": ", 1) for line in lines)
        body = b""
        if has_body and status != "100":
            body = await self._reader.readexactly(int(headers["content-length"]))
        return Reply(int(status), headers, body)

    async def rest(self) -> bytes:
        """Everything until the door closes."""
        return await self._reader.read()

    async def reset(self) -> None:
        """Vanish: the door's next write finds nobody."""
        sock = self._writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await self.close()

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


class DoorScene:
    """An open door over a `FakeService`."""

    def __init__(self, door: RestDoor, service: FakeService, port: int) -> None:
        self.door = door
        self.service = service
        self.port = port
        self._clients: list[Client] = []

    async def client(self) -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port))
        self._clients.append(client)
        return client

    async def ask(self, request: str | bytes, *, has_body: bool = True) -> Reply:
        """One request on a connection of its own."""
        client = await self.client()
        client.send(request)
        return await client.reply(has_body=has_body)

    async def round_trip(self) -> None:
        """Whatever the door could do by now, it has done after this."""
        assert (await self.ask(get("/echo"))).status == 200

    async def close_clients(self) -> None:
        for client in self._clients:
            await client.close()


@contextlib.asynccontextmanager
async def door_open(**limits: float) -> AsyncIterator[DoorScene]:
    service = FakeService()
    door = RestDoor(cast(Service, service), DoorLimits(**cast(Any, limits)))
    scene = DoorScene(door, service, await door.open("127.0.0.1", 0))
    try:
        yield scene
    finally:
        await scene.close_clients()
        await door.close(grace_s=0.1)


async def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Poll, with a deadline."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    while not condition():
        assert loop.time() < deadline, "it did not come true in time"
        await asyncio.sleep(0.002)


def get(path: str, *lines: str, version: str = "1.1") -> str:
    return "\r\n".join([f"GET {path} HTTP/{version}", "Host: x", *lines, "", ""])


def post(path: str, body: str = "", *lines: str) -> str:
    head = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *lines, "", ""]
    return "\r\n".join(head) + body


def chunked(path: str, *pieces: str, end: str = "0\r\n\r\n") -> str:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + "".join(f"{len(piece):x}\r\n{piece}\r\n" for piece in pieces) + end
