"""The direct REST door: HTTP/1.1 on a socket of our own, run by uvloop.

It listens, with or without TLS, counts connections, and writes answers turn by turn. One
connection is one object, `cluster.doors.connection.Connection`; there is no task for a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from typing import Any, Final

from cluster.doors.connection import Connection
from cluster.doors.heads import KnownHead
from cluster.doors.service import Service
from cluster.doors.settings import DoorLimits

__all__ = ["RestDoor"]

#: So many bytes of answers wait for the end of the turn.
_OUTBOX_BYTES_MAX: Final = 256 << 10
_BACKLOG: Final = 1024


class RestDoor:
    """Listens, and counts connections.

    Args:
        service: answers requests.
        limits: bounds.
    """

    def __init__(self, service: Service, limits: DoorLimits | None = None) -> None:
        self.service = service
        self.limits = limits or DoorLimits()
        self.connections: set[Connection] = set()
        self.refused_connections = 0
        self.known_heads: dict[bytes, KnownHead] = {}
        self._loop = asyncio.get_running_loop()
        self._outbox: list[tuple[asyncio.Transport, bytes]] = []
        self._outbox_bytes = 0
        self._servers: list[asyncio.Server] = []
        self._renewing: asyncio.Task[None] | None = None
        self._gone = asyncio.Event()

    async def open(self, host: str, port: int, *, context: ssl.SSLContext | None = None) -> int:
        """Listen; returns the port, which matters where 0 was asked for.

        Args:
            host: interface.
            port: 0 takes a free one.
            context: makes it HTTPS.

        Raises:
            OSError: the address is taken or not ours.
        """
        server = await self._loop.create_server(
            self._connect, host, port, backlog=_BACKLOG, **self._tls(context)
        )
        self._servers = [server]
        return int(server.sockets[0].getsockname()[1])

    def use_certificates(self, context: ssl.SSLContext) -> None:
        """Show these to clients that connect from now on; open connections stay as they are."""
        self._renewing = self._loop.create_task(self._renew(context))

    async def _renew(self, context: ssl.SSLContext) -> None:
        # The context of a server cannot be changed, so another one takes the same sockets over;
        # connections that wait in their backlog are accepted by either.
        made: list[asyncio.Server] = []
        try:
            for old in self._servers:
                for listening in old.sockets:
                    same = socket.socket(fileno=os.dup(listening.fileno()))
                    made.append(
                        await self._loop.create_server(
                            self._connect, sock=same, backlog=_BACKLOG, **self._tls(context)
                        )
                    )
        except BaseException:
            for server in made:
                server.close()
            raise
        before, self._servers = self._servers, made
        for old in before:
            old.close()

    def _tls(self, context: ssl.SSLContext | None) -> dict[str, Any]:
        if context is None:
            return {}
        return {"ssl": context, "ssl_handshake_timeout": self.limits.head_s}

    def _connect(self) -> Connection:
        return Connection(self)

    async def close(self, grace_s: float = 1.0) -> None:
        """Stop listening, let requests end for a moment, then close every connection."""
        if self._renewing is not None:
            self._renewing.cancel()
        for server in self._servers:
            server.close()
        for connection in list(self.connections):
            connection.close_when_idle()
        if self.connections:
            self._gone.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._gone.wait(), grace_s)
        for connection in list(self.connections):
            connection.abort()

    def write_soon(self, transport: asyncio.Transport, data: bytes) -> None:
        """Write an answer at the end of this turn, back to back with the others of the turn.

        One reply frame answers many connections. Written one by one between the printing of the
        answers, each write would wake a client that had gone to sleep since the last (measured at
        32 connections: a third of the router's time).
        """
        outbox = self._outbox
        if not outbox:
            self._loop.call_soon(self.flush)
        outbox.append((transport, data))
        self._outbox_bytes += len(data)
        if self._outbox_bytes > _OUTBOX_BYTES_MAX:
            self.flush()  # a client that does not read is noticed when it is written to

    def flush(self) -> None:
        """Write the answers that wait for the end of the turn."""
        outbox, self._outbox = self._outbox, []
        self._outbox_bytes = 0
        for transport, data in outbox:
            if not transport.is_closing():
                transport.write(data)

    def forget(self, connection: Connection) -> None:
        """A connection is over."""
        self.connections.discard(connection)
        if not self.connections:
            self._gone.set()
