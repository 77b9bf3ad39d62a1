"""Mutual TLS for links between nodes: certificates from files, and the accepting side.

Both sides show a certificate and hold the other's against one CA, TLS 1.3 alone. A certificate says
that a process belongs to the cluster, not which one it is: names and generations are proven inside,
by the same handshake as without TLS. Files are read again when they have changed, so certificates
may be renewed under a running cluster.

Connections are accepted here and not by the loop's own server, which tells nobody why a TLS
handshake failed. This file does not know frames.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from collections.abc import Callable
from typing import Final

from batching.errors import FailedPrecondition
from shards.errors import HandshakeRefused
from shards.orders import TlsFiles

__all__ = ["TlsAcceptor", "TlsContexts", "refused"]

_BACKLOG: Final = 512
#: A process that has no descriptors left accepts again after so long.
_PAUSE_S: Final = 0.2
_ENVIRONMENT: Final = "env:"


class TlsContexts:
    """What both sides of TLS need, kept as long as the files stay the same.

    Args:
        files: where certificate, key and CA are.

    Raises:
        FailedPrecondition: one of them cannot be read, or is none. The message names it, and tells
            nothing of what it holds.
    """

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._stamps: tuple[tuple[int, int], ...] = ()
        self._contexts = self._read()

    def server(self) -> ssl.SSLContext:
        """For whoever accepts."""
        self._refresh()
        return self._contexts[0]

    def client(self) -> ssl.SSLContext:
        """For whoever connects."""
        self._refresh()
        return self._contexts[1]

    def _refresh(self) -> None:
        if self._stamp() != self._stamps:
            self._contexts = self._read()

    def _read(self) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        # The stamps first: what changes while it is read is read again.
        self._stamps = self._stamp()
        server = self._context(ssl.PROTOCOL_TLS_SERVER)
        server.num_tickets = 0  # a link is opened once: there is nothing to resume
        client = self._context(ssl.PROTOCOL_TLS_CLIENT)
        # Nodes come and go under addresses that no certificate could name.
        client.check_hostname = False
        return server, client

    def _context(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        files = self._files
        with _Readable(files.certificate) as certificate, _Readable(files.key) as key:
            try:
                # A key that wants a password would otherwise ask for it on a terminal.
                context.load_cert_chain(certificate, key, password="")
            except (OSError, ValueError) as error:
                raise FailedPrecondition(
                    f"the data plane's certificate {files.certificate} with the key {files.key}: "
                    f"{_reason(error)}"
                ) from None
        with _Readable(files.ca) as ca:
            try:
                context.load_verify_locations(ca)
            except (OSError, ValueError) as error:
                raise FailedPrecondition(
                    f"the data plane's CA {files.ca}: {_reason(error)}"
                ) from None
        return context

    def _stamp(self) -> tuple[tuple[int, int], ...]:
        stamps = []
        for name in (self._files.certificate, self._files.key, self._files.ca):
            if not name.startswith(_ENVIRONMENT):
                try:
                    status = os.stat(name)
                except OSError as error:
                    raise FailedPrecondition(f"the data plane's {name}: {_reason(error)}") from None
                stamps.append((status.st_mtime_ns, status.st_ino))
        return tuple(stamps)


class _Readable:
    """A path that can be opened, for PEM text that is in a file or, by ``env:NAME``, in a variable.

    OpenSSL takes a key from a file alone; text of a variable goes into memory that looks like one.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._descriptor = -1

    def __enter__(self) -> str:
        if not self._name.startswith(_ENVIRONMENT):
            return self._name
        variable = self._name.removeprefix(_ENVIRONMENT)
        text = os.environ.get(variable)
        if not text:
            raise FailedPrecondition(f"the data plane's TLS: the variable {variable} is not set")
        self._descriptor = os.memfd_create(variable, os.MFD_CLOEXEC)
        with os.fdopen(os.dup(self._descriptor), "w") as file:
            file.write(text)
        return f"/proc/self/fd/{self._descriptor}"

    def __exit__(self, *_: object) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


class TlsAcceptor:
    """Accepts TCP connections and hands over those whose TLS handshake was good.

    Args:
        contexts: of this side.
        factory: makes the protocol of a connection.
        on_refused: told why one was not handed over.
        timeout_s: for the TLS handshake.
        handshakes_max: that may be under way; what connects beyond is closed.
    """

    def __init__(
        self,
        contexts: TlsContexts,
        factory: Callable[[], asyncio.BaseProtocol],
        on_refused: Callable[[Exception], None],
        *,
        timeout_s: float,
        handshakes_max: int,
    ) -> None:
        self._contexts = contexts
        self._factory = factory
        self._on_refused = on_refused
        self._timeout_s = timeout_s
        self._handshakes_max = handshakes_max
        self._socket: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._upgrades: set[asyncio.Task[None]] = set()

    def listen(self, host: str, port: int) -> int:
        """Begin to accept; returns the port.

        Raises:
            OSError: the address is not to be had.
        """
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        self._socket.setblocking(False)
        self._accepting = asyncio.get_running_loop().create_task(self._accept())
        bound: int = self._socket.getsockname()[1]
        return bound

    async def close(self) -> None:
        """Accept no more, and give up the handshakes that are under way."""
        tasks = [*self._upgrades, *([self._accepting] if self._accepting is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._socket is not None:
            self._socket.close()

    async def _accept(self) -> None:
        assert self._socket is not None
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._socket)
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    await asyncio.sleep(_PAUSE_S)
                continue  # any other error is of the connection that is gone again
            if len(self._upgrades) >= self._handshakes_max:
                connection.close()
                self._on_refused(HandshakeRefused("too many TLS handshakes are under way"))
                continue
            task = loop.create_task(self._upgrade(connection))
            self._upgrades.add(task)
            task.add_done_callback(self._upgrades.discard)

    async def _upgrade(self, connection: socket.socket) -> None:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().connect_accepted_socket(
                self._factory,
                connection,
                ssl=self._contexts.server(),
                ssl_handshake_timeout=self._timeout_s,
            )
        except (OSError, FailedPrecondition) as error:
            connection.close()
            self._on_refused(refused(error))
        except asyncio.CancelledError:
            connection.close()
            raise


def refused(error: Exception) -> HandshakeRefused:
    """What an error of a TLS handshake means."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return HandshakeRefused(
            f"the peer's certificate is not one of this cluster's CA: {error.verify_message}"
        )
    return HandshakeRefused(f"no TLS with the peer: {_reason(error)}")


def _reason(error: Exception) -> str:
    """In words: OpenSSL's, or the system's. Neither holds any of the files' text."""
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.lower().replace("_", " ")
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
