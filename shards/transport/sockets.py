"""Links over sockets: a Unix socket on the same node, TCP between nodes.

A Unix socket is 0600 and both ends ask the kernel whose process the other is; then, as over TCP,
the handshake decides. TCP carries the same bytes, in the clear or within mutual TLS; in the clear,
the network between the nodes is trusted not to change them. Works on any asyncio loop; uvloop is
the one it is fast on.

This file does not know frames or what a link is used for.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import re
import secrets
import socket
import ssl
import stat
import struct
from collections.abc import Awaitable, Callable, Iterator
from typing import Final, TypeAlias, cast

import msgspec

from batching.errors import FailedPrecondition, InvalidArgument
from shards.errors import HandshakeRefused, LinkClosed
from shards.handshake import (
    NONCE_BYTES,
    Identity,
    ServerHandshake,
    distribution,
)
from shards.orders import Endpoint
from shards.transport._link import Counters, Limits, Link, LinkHandler
from shards.transport._opening import Caller, Opening
from shards.transport._pipe import log_refusal
from shards.transport._session import Session
from shards.transport._writing import PIECES_MARK_BYTES
from shards.transport.tls import TlsAcceptor, TlsContexts, refused
from shards.wire import CHUNK_BYTES

__all__ = ["Listener", "connect", "listen"]

#: What `sockaddr_un` holds, less the terminating zero.
_UNIX_PATH_BYTES_MAX: Final = 107
_BACKLOG: Final = 512
_UCRED: Final = struct.Struct("3i")  # pid, uid, gid
#: A host that acknowledges nothing for so long is cut off: what was asked of it is better asked of
#: another than waited for until its deadline. An idle link notices by probes of the kernel.
_SILENT_S: Final = 3
_TCP_OPTIONS: Final = (
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _SILENT_S * 1000),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _SILENT_S),
    # And it keeps megabytes that were not read yet (measured on loopback, beside 256 MB: p99 1.3 to
    # 3.4 ms, without this 15 to 35). Enough for 1 GB/s where a round trip takes 0.25 ms.
    (socket.SOL_SOCKET, socket.SO_RCVBUF, 256 << 10),
    # The kernel takes megabytes that it cannot send yet, and what is small would wait behind them
    # (measured on loopback, beside 256 MB: p50 1.4 ms, without this 2 to 3 ms, and no less a rate).
    (socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, PIECES_MARK_BYTES),
)


class Listener:
    """Accepts links; made by `listen`.

    Attributes:
        endpoint: where, in the form that `connect` takes.
        counters: of all its links, closed ones included.
    """

    def __init__(
        self, identity: Identity, secret: bytes, handler: LinkHandler, limits: Limits
    ) -> None:
        self.endpoint = Endpoint(
            actor=identity.name, generation=identity.generation, node=identity.node
        )
        self.counters = Counters()
        self._identity = identity
        self._secret = secret
        self._handler = handler
        self._limits = limits
        self._sessions: set[Session] = set()
        self._servers: list[asyncio.AbstractServer] = []
        self._acceptor: TlsAcceptor | None = None
        self._closed = False
        self._idle = asyncio.Event()
        self._idle.set()

    def __repr__(self) -> str:
        return f"<Listener {self.endpoint}>"

    @property
    def links(self) -> tuple[Link, ...]:
        """The open ones."""
        return tuple(session for session in self._sessions if session.is_open)

    async def close(self, reason: str = "shutting down") -> None:
        """Accept no more, say goodbye on every link, and wait until all are closed."""
        self._closed = True
        for server in self._servers:
            server.close()
        if self.endpoint.path:
            with contextlib.suppress(OSError):
                os.unlink(self.endpoint.path)
        if self._acceptor is not None:
            await self._acceptor.close()
        for session in tuple(self._sessions):
            session.shut(reason)
        # The close timeout of each session bounds this wait.
        await self._idle.wait()

    async def _listen_unix(self, directory: str | os.PathLike[str]) -> None:
        path = _socket_path(directory, self._identity.name, self._identity.generation)
        bound = _bind_unix(path)
        self.endpoint = msgspec.structs.replace(self.endpoint, path=path)
        server = await asyncio.get_running_loop().create_unix_server(
            self._accept, sock=bound, backlog=_BACKLOG
        )
        self._servers.append(server)

    def _listen_tls(self, host: str, port: int, tls: TlsContexts) -> None:
        self._acceptor = TlsAcceptor(
            tls,
            self._accept,
            self._refused,
            timeout_s=self._limits.handshake_timeout_s,
            handshakes_max=self._limits.links_max,
        )
        port = self._acceptor.listen(host, port)
        self.endpoint = msgspec.structs.replace(self.endpoint, host=host, port=port)

    async def _listen_tcp(self, host: str, port: int) -> None:
        server = await asyncio.get_running_loop().create_server(
            self._accept, host, port, backlog=_BACKLOG
        )
        self._servers.append(server)
        port = server.sockets[0].getsockname()[1]
        self.endpoint = msgspec.structs.replace(self.endpoint, host=host, port=port)

    def _accept(self) -> _SocketProtocol:
        session = Session(
            loop=asyncio.get_running_loop(),
            handshake=ServerHandshake(
                self._identity, secret=self._secret, nonce=secrets.token_bytes(NONCE_BYTES)
            ),
            handler=self._handler,
            limits=self._limits,
            counters=self.counters,
            on_settled=self._settled,
            on_lost=self._forget,
        )
        return _SocketProtocol(session, self._admit)

    def _admit(self, session: Session) -> str:
        """Take a session whose connection is there; says why if it is not welcome."""
        count = len(self._sessions)
        self._sessions.add(session)
        self._idle.clear()
        if self._closed:
            return "this listener is shutting down"
        if count >= self._limits.links_max:
            return f"{self._limits.links_max} links are the most this listener takes"
        return ""

    def _refused(self, error: Exception) -> None:
        """A connection that never had a session."""
        self.counters.handshakes_refused += 1
        log_refusal(self.counters, self._identity.name, error)

    def _settled(self, session: Session, error: Exception | None) -> None:
        log_refusal(self.counters, self._identity.name, error)

    def _forget(self, session: Session) -> None:
        self._sessions.discard(session)
        if not self._sessions:
            self._idle.set()


async def listen(
    *,
    name: str,
    generation: int,
    node: str,
    secret: bytes,
    handler: LinkHandler,
    directory: str | os.PathLike[str] | None = None,
    tcp_host: str | None = None,
    tcp_port: int = 0,
    tls: TlsContexts | None = None,
    limits: Limits | None = None,
) -> Listener:
    """Listen on a Unix socket, on TCP, or on both.

    Args:
        name: of this actor.
        generation: distinct for every process that bears the name.
        node: Ray's node id.
        secret: the cluster's.
        handler: of every link that connects.
        directory: where the Unix socket goes; made if it is not there. None: no Unix socket.
        tcp_host: address to listen on, and to be reached at. None: no TCP.
        tcp_port: 0 takes a free one.
        tls: for TCP: both sides show certificates. None: in the clear.
        limits: of every link that connects; None takes the defaults.

    Raises:
        InvalidArgument: neither a directory nor a host is given.
        FailedPrecondition: another live listener holds the path or the port.
    """
    if directory is None and tcp_host is None:
        raise InvalidArgument("a listener needs a directory, a host, or both")
    identity = Identity(name=name, generation=generation, node=node, distribution=distribution())
    listener = Listener(identity, secret, handler, limits or Limits())
    try:
        if directory is not None:
            await listener._listen_unix(directory)
        if tcp_host is not None and tls is not None:
            listener._listen_tls(tcp_host, tcp_port, tls)
        elif tcp_host is not None:
            await listener._listen_tcp(tcp_host, tcp_port)
    except OSError as error:
        await listener.close()
        raise FailedPrecondition(f"{name} cannot listen: {error}") from error
    return listener


async def connect(
    endpoint: Endpoint,
    *,
    name: str,
    node: str,
    secret: bytes,
    handler: LinkHandler,
    generation: int = 0,
    tls: TlsContexts | None = None,
    limits: Limits | None = None,
    counters: Counters | None = None,
) -> Link:
    """Open a link to the very process that an endpoint names.

    A peer on the same node is reached over its Unix socket, or over TCP where that is not there
    (two containers may share a node); any other over TCP.

    Args:
        endpoint: where the peer listens, and which generation of it is meant.
        name: of the caller.
        node: of the caller, as Ray knows it.
        secret: the cluster's.
        handler: of this link. Frames may come before this function returns.
        generation: of the caller, 0 if nobody connects to it.
        tls: for TCP: both sides show certificates. None: in the clear.
        limits: of this link; None takes the defaults.
        counters: to count into; None counts into its own.

    Raises:
        LinkClosed: nobody answers, or not in time.
        HandshakeRefused: somebody does, but the two must not talk: certificates included.
        FrameCorrupt: what answers does not speak frames.
    """
    caller = Caller(
        name=name,
        generation=generation,
        node=node,
        secret=secret,
        handler=handler,
        limits=limits or Limits(),
        counters=counters or Counters(),
    )
    errors: list[str] = []
    for way in _ways(endpoint, node, tls):
        opening = Opening(caller, endpoint)
        try:
            async with asyncio.timeout(caller.limits.handshake_timeout_s):
                await way(opening.session)
        except TimeoutError:
            errors.append(f"no answer within {caller.limits.handshake_timeout_s:g} s")
        except ssl.SSLError as error:
            opening.abandon(str(error))
            raise HandshakeRefused(f"{endpoint.actor}: {refused(error).message}") from None
        except OSError as error:
            errors.append(str(error))
        else:
            return await opening.link()
        opening.abandon(errors[-1])
    raise LinkClosed(
        f"{endpoint.actor} cannot be reached: {'; '.join(errors) or 'it listens nowhere'}"
    )


#: Gives a session a connection.
_Way: TypeAlias = Callable[[Session], Awaitable[None]]


def _ways(endpoint: Endpoint, node: str, tls: TlsContexts | None) -> Iterator[_Way]:
    loop = asyncio.get_running_loop()

    async def unix(session: Session) -> None:
        with _bindable(endpoint.path) as path:
            await loop.create_unix_connection(lambda: _SocketProtocol(session), path)

    async def tcp(session: Session) -> None:
        await loop.create_connection(
            lambda: _SocketProtocol(session),
            endpoint.host,
            endpoint.port,
            ssl=tls.client() if tls is not None else None,
        )

    if endpoint.path and endpoint.node == node:
        yield unix
    if endpoint.host:
        yield tcp


#: So much is read of one connection, then the others have a turn: by itself, libuv reads up to 32
#: buffers in a row of one that never runs dry, and the answers of all wait for milliseconds.
_TURN_BYTES_MAX: Final = 4 * CHUNK_BYTES


class _SocketProtocol(asyncio.BufferedProtocol):
    """Carries a session on an asyncio transport.

    Args:
        admit: asked once the connection is there; why it must be closed at once, or "".
    """

    __slots__ = ("_admit", "_read_bytes", "_session", "_transport")

    def __init__(self, session: Session, admit: Callable[[Session], str] = lambda _: "") -> None:
        self._session = session
        self._admit = admit
        self._transport: asyncio.Transport | None = None
        self._read_bytes = 0  # since another connection had a turn for sure

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not subclasses of asyncio's, so this is said, not asked.
        whole = self._transport = cast(asyncio.Transport, transport)
        whole.set_write_buffer_limits(high=PIECES_MARK_BYTES)
        self._session.begin(whole)
        refusal = self._admit(self._session)
        sock = transport.get_extra_info("socket")
        if sock.family != socket.AF_UNIX:
            for level, option, value in _TCP_OPTIONS:
                sock.setsockopt(level, option, value)
        if sock.family == socket.AF_UNIX and not refusal:
            pid, refusal = _peer_process(sock)
            self._session.share_memory(pid)
        if refusal:
            self._session.fail(HandshakeRefused(refusal))

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._session.get_buffer(sizehint)

    def buffer_updated(self, nbytes: int) -> None:
        self._session.buffer_updated(nbytes)
        self._read_bytes += nbytes
        if self._read_bytes > _TURN_BYTES_MAX:
            self._read_bytes = 0
            self._give_way()

    def _give_way(self) -> None:
        assert self._transport is not None
        if not self._transport.is_closing():
            self._transport.pause_reading()
            asyncio.get_running_loop().call_soon(self._read_on)

    def _read_on(self) -> None:
        assert self._transport is not None
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def resume_writing(self) -> None:
        self._session.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        if isinstance(exc, ssl.SSLError) and not self._session.is_open:
            # The peer's verdict on our certificate comes after our own handshake was over.
            self._session.fail(refused(exc))
        self._session.lost(exc)


def _peer_process(sock: socket.socket) -> tuple[int, str]:
    """The process at the other end of a Unix socket, and why it is not one of ours, or ""."""
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, _ = _UCRED.unpack(data)
    return pid, "" if uid == os.geteuid() else f"the peer is a process of user {uid}"


def _socket_path(directory: str | os.PathLike[str], name: str, generation: int) -> str:
    os.makedirs(directory, mode=0o700, exist_ok=True)
    # The digest keeps apart what shortening a name, or replacing its odd characters, would join.
    digest = hashlib.sha256(f"{generation} {name}".encode()).hexdigest()[:12]
    label = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:32]
    return os.path.abspath(os.path.join(directory, f"{label}-{digest}.sock"))


@contextlib.contextmanager
def _bindable(path: str) -> Iterator[str]:
    """A name for the path that fits a socket address, however long the path is."""
    if len(os.fsencode(path)) <= _UNIX_PATH_BYTES_MAX:
        yield path
        return
    directory, name = os.path.split(path)
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{name}"
    finally:
        os.close(descriptor)


def _bind_unix(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _bindable(path) as short:
            try:
                sock.bind(short)
            except OSError as error:
                if error.errno != errno.EADDRINUSE or not _is_left_over(path, short):
                    raise
                os.unlink(path)
                sock.bind(short)
        # Nobody can connect until it listens, so there is no moment of wider permissions.
        os.chmod(path, 0o600)
    except BaseException:
        sock.close()
        raise
    return sock


def _is_left_over(path: str, short: str) -> bool:
    """Whether the path is a socket that nobody listens on."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(short)
        except ConnectionRefusedError:
            return True
        except BlockingIOError:  # its backlog is full
            return False
    return False
