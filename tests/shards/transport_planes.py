"""The planes under the conformance suite: one way to serve, call and misbehave on each of them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import secrets
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

import msgspec
import uvloop

from shards.errors import FrameRefused
from shards.handshake import NONCE_BYTES, PROTOCOL, ClientHandshake, Identity, distribution
from shards.orders import Endpoint
from shards.transport import (
    Counters,
    Limits,
    Link,
    LinkHandler,
    Listener,
    TlsContexts,
    connect,
    listen,
)
from shards.transport.raycalls import RayPlane, connect_actor
from shards.wire import (
    CallHeader,
    Frame,
    FrameKind,
    FrameReader,
    Header,
    Item,
    ReplyHeader,
    encode_frame,
)
from tests.shards.certificates import Authority

SECRET = b"a secret that no message may show"
NODE = "node-a"
GENERATION = 7
CLUSTER = Authority()
PLANES = ("unix", "tcp", "tls", "unix on the standard loop", "unix unshared", "ray calls")


def call(*requests: int) -> CallHeader:
    """A header that asks something for these requests."""
    items = [Item(request, 1, 5_000) for request in requests]
    return CallHeader(1, "unit", "predict", items, [])


class Recorder:
    """A handler that keeps what it is told; with ``echo`` it answers each call with its body."""

    def __init__(self, *, echo: bool = False) -> None:
        self.echo = echo
        self.frames: list[Frame] = []
        self.links: list[Link] = []
        self.closed: list[tuple[Link, Exception | None]] = []
        self.refused: list[tuple[Header, FrameRefused]] = []
        self.hook: Callable[[Link, Frame], None] = lambda link, frame: None

    def on_frame(self, link: Link, frame: Frame) -> None:
        assert all(link is not gone for gone, _ in self.closed), "a frame after the end"
        if link not in self.links:
            self.links.append(link)
        self.frames.append(frame)
        self.hook(link, frame)
        if self.echo and isinstance(frame.header, CallHeader):
            rows = [(item.request, item.rows) for item in frame.header.items]
            header = ReplyHeader(frame.header.unit, GENERATION, rows, frame.header.tensors)
            link.send(FrameKind.REPLY, header, [frame.body])

    def on_refused(self, link: Link, header: Header, error: FrameRefused) -> None:
        self.refused.append((header, error))

    def on_closed(self, link: Link, error: Exception | None) -> None:
        self.closed.append((link, error))

    @property
    def errors(self) -> list[Exception | None]:
        return [error for _, error in self.closed]


class RawPeer(Protocol):
    """Somebody who writes whatever bytes they like."""

    async def send(self, data: bytes) -> None: ...

    async def receive(self) -> bytes:
        """The next bytes; none when the other side has closed."""
        ...

    async def vanish(self) -> None:
        """Die without a word."""
        ...


class Plane(Protocol):
    """A server on one kind of transport, and the ways to it."""

    endpoint: Endpoint
    counters: Counters

    async def connect(self, handler: LinkHandler, **changes: Any) -> Link: ...

    async def raw(self) -> RawPeer: ...

    def kill(self) -> None:
        """The server's process dies."""
        ...

    async def close(self) -> None: ...


class SocketPlane:
    def __init__(self, listener: Listener, node: str, tls: TlsContexts | None = None) -> None:
        self._listener = listener
        self._node = node
        self._tls = tls
        self._peers: list[RawPeer] = []
        self.endpoint = listener.endpoint
        self.counters = listener.counters

    async def connect(self, handler: LinkHandler, **changes: Any) -> Link:
        endpoint = changes.pop("endpoint", self.endpoint)
        arguments: dict[str, Any] = {"name": "caller", "node": self._node, "secret": SECRET}
        arguments |= {"tls": self._tls} | changes
        return await connect(endpoint, handler=handler, **arguments)

    async def raw(self) -> RawPeer:
        peer: RawPeer
        if self._tls is not None:
            peer = await _RawTls.open(self.endpoint, self._tls)
        else:
            peer = await _RawSocket.open(self.endpoint, unix=self._node == NODE)
        self._peers.append(peer)
        return peer

    def kill(self) -> None:
        for session in tuple(self._listener._sessions):
            assert session._pipe is not None
            session._pipe.abort()

    async def close(self) -> None:
        for peer in self._peers:
            await peer.vanish()
        await self._listener.close()


class _RawSocket:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    @classmethod
    async def open(cls, endpoint: Endpoint, *, unix: bool) -> _RawSocket:
        address: Any = endpoint.path if unix else (endpoint.host, endpoint.port)
        sock = socket.socket(socket.AF_UNIX if unix else socket.AF_INET)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, address)
        return cls(sock)

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._sock, data)

    async def receive(self) -> bytes:
        try:
            return await asyncio.get_running_loop().sock_recv(self._sock, 65536)
        except ConnectionError:
            return b""

    async def vanish(self) -> None:
        self._sock.close()


class _RawTls:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, endpoint: Endpoint, tls: TlsContexts) -> _RawTls:
        streams = await asyncio.open_connection(endpoint.host, endpoint.port, ssl=tls.client())
        return cls(*streams)

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def receive(self) -> bytes:
        try:
            return await self._reader.read(65536)
        except ConnectionError:
            return b""

    async def vanish(self) -> None:
        self._writer.transport.abort()


class ActorDied(Exception):
    """Stands for Ray's error of this meaning."""


class FakeHandle:
    """What an actor handle looks like to a caller: calls that can be awaited, until it dies."""

    def __init__(self, plane: RayPlane) -> None:
        self._died: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.plane_send = _FakeMethod(plane.send, self._died)
        self.plane_receive = _FakeMethod(plane.receive, self._died)

    def kill(self) -> None:
        if not self._died.done():
            self._died.set_result(None)


class _FakeMethod:
    def __init__(self, method: Callable[..., Awaitable[Any]], died: asyncio.Future[None]) -> None:
        self._method = method
        self._died = died

    def remote(self, *arguments: Any) -> asyncio.Future[Any]:
        return asyncio.ensure_future(self._call(*arguments))

    async def _call(self, *arguments: Any) -> Any:
        running = asyncio.ensure_future(self._method(*arguments))
        try:
            await asyncio.wait((running, self._died), return_when=asyncio.FIRST_COMPLETED)
            if self._died.done():
                raise ActorDied("Ray says\nover many lines\nthat the actor died")
            return await running
        finally:
            running.cancel()


class RayCallPlane:
    def __init__(self, plane: RayPlane) -> None:
        self._plane = plane
        self.handle = FakeHandle(plane)
        self.endpoint = Endpoint(actor="server", generation=GENERATION, node=NODE)
        self.counters = plane.counters

    async def connect(self, handler: LinkHandler, **changes: Any) -> Link:
        endpoint = changes.pop("endpoint", self.endpoint)
        arguments = {"name": "caller", "node": NODE, "secret": SECRET} | changes
        return await connect_actor(self.handle, endpoint, handler=handler, **arguments)

    async def raw(self) -> RawPeer:
        return RawCaller(self._plane)

    def kill(self) -> None:
        self.handle.kill()

    async def close(self) -> None:
        await self._plane.close()


class RawCaller:
    def __init__(self, plane: RayPlane) -> None:
        self._plane = plane
        self._id = secrets.token_hex(8)
        self._number = 0

    async def send(self, data: bytes) -> None:
        number, self._number = self._number, self._number + 1
        await self._plane.send(self._id, number, data)

    async def receive(self) -> bytes:
        return await self._plane.receive(self._id) or b""

    async def vanish(self) -> None:
        pass  # it makes no further call


_to_close: list[Listener] = []


def closed_at_the_end(listener: Listener) -> Listener:
    """The listener, to be closed by `run` even if the scenario fails."""
    _to_close.append(listener)
    return listener


@contextlib.asynccontextmanager
async def serving(
    plane: str, handler: LinkHandler, limits: Limits | None = None
) -> AsyncIterator[Plane]:
    """A server on this plane for the length of the block."""
    limits = limits or Limits(close_timeout_s=0.5)
    arguments: dict[str, Any] = {
        "name": "server",
        "generation": GENERATION,
        "node": NODE,
        "secret": SECRET,
        "handler": handler,
        "limits": limits,
    }
    served: Plane
    if plane == "unix unshared":  # neither lends, and what the caller offers is not taken up
        arguments["limits"] = dataclasses.replace(limits, shared_bytes_max=0)
    with tempfile.TemporaryDirectory(prefix="links") as directory:
        if plane == "ray calls":
            served = RayCallPlane(RayPlane(**arguments))
        elif plane == "tls":
            tls = TlsContexts(CLUSTER.files("node"))
            listener = await listen(**arguments, tcp_host="127.0.0.1", tls=tls)
            served = SocketPlane(listener, "another-node", tls)
        elif plane == "tcp":
            listener = await listen(**arguments, tcp_host="127.0.0.1")
            served = SocketPlane(listener, "another-node")
        else:
            listener = await listen(**arguments, directory=directory)
            served = SocketPlane(listener, NODE)
        try:
            yield served
        finally:
            await served.close()


def run(
    plane: str,
    scenario: Callable[[list[dict[str, Any]]], Awaitable[None]],
    timeout_s: float = 30,
) -> None:
    """Run on the plane's kind of loop; fails if the loop met an error that nobody took.

    Args:
        scenario: gets the list of such errors, to take those it provoked.
        timeout_s: the deadline of everything it waits for.
    """
    untaken: list[dict[str, Any]] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, what: untaken.append(what))
        try:
            async with asyncio.timeout(timeout_s):
                await scenario(untaken)
        finally:
            # uvloop never returns from closing a loop with an open server when warnings are
            # errors: without this a test that fails would hang instead.
            while _to_close:
                await _to_close.pop().close()

    factory = None if "standard" in plane else uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())
    assert untaken == []


async def until(condition: Callable[[], bool]) -> None:
    """Wait until it holds; the scenario's deadline is the bound."""
    while not condition():  # noqa: ASYNC110 -- what is waited for is not an event of ours
        await asyncio.sleep(0.001)


def client_handshake(**changes: Any) -> ClientHandshake:
    """A caller's side that would be let in, unless changed."""
    said = {
        "name": "raw",
        "generation": 0,
        "node": NODE,
        "distribution": distribution(),
        "protocol": PROTOCOL,
    }
    arguments = {
        "expected_name": "server",
        "expected_generation": GENERATION,
        "secret": SECRET,
        "nonce": secrets.token_bytes(NONCE_BYTES),
    }
    assert changes.keys() <= said.keys() | arguments.keys()
    mine: Any = {name: changes.get(name, value) for name, value in said.items()}
    rest: Any = {name: changes.get(name, value) for name, value in arguments.items()}
    return ClientHandshake(Identity(**mine), **rest)


async def prove(peer: RawPeer, handshake: ClientHandshake | None = None) -> None:
    """Go through a handshake by hand; raises what the handshake does, EOFError if cut off."""
    handshake = handshake or client_handshake()
    reader = FrameReader()
    for kind, header in handshake.start():
        await peer.send(b"".join(encode_frame(kind, 0, header)))
    while handshake.peer is None:
        data = await peer.receive()
        if not data:
            raise EOFError
        for frame in reader.feed(data):
            assert isinstance(frame.header, bytes)
            for kind, header in handshake.receive(frame.kind, frame.header):
                await peer.send(b"".join(encode_frame(kind, 0, header)))


def frame_bytes(kind: FrameKind, header: msgspec.Struct | bytes, body: bytes = b"") -> bytes:
    """One frame, joined."""
    data = header if isinstance(header, bytes) else msgspec.msgpack.encode(header)
    return b"".join(encode_frame(kind, 0, data, [body]))
