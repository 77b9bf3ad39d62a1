"""The direct REST door: HTTP/1.1 on a socket of our own, run by uvloop.

It listens, with or without TLS, counts connections, and writes answers turn by turn. One
connection is one object, `cluster.doors.connection.Connection`; there is no task for a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import socket
import ssl
from typing import Any, Final

from cluster.doors.connection import Connection
from cluster.doors.heads import KnownHead
from cluster.doors.patience import Phase
from cluster.doors.service import Service
from cluster.doors.settings import DoorLimits
from cluster.doors.stats import DoorStats

__all__ = ["RestDoor"]

logger = logging.getLogger(__name__)

#: So many bytes of answers wait for the end of the turn.
_OUTBOX_BYTES_MAX: Final = 256 << 10
_BACKLOG: Final = 1024
_LINGERING_MAX: Final = 256
#: Seconds between two looks after all connections, and how many are looked after in one turn.
_LOOK_S: Final = 1.0
_LOOKS_A_TURN: Final = 256
#: Files that a router needs beside connections: links, sockets, logs.
_FILES_KEPT: Final = 512


class RestDoor:
    """Listens, and counts connections.

    Args:
        service: answers requests.
        limits: bounds and time-outs.
        stats: where it counts.
    """

    def __init__(
        self,
        service: Service,
        limits: DoorLimits | None = None,
        stats: DoorStats | None = None,
    ) -> None:
        self.service = service
        self.limits = limits or DoorLimits()
        self.stats = stats or DoorStats()
        self.connections: set[Connection] = set()
        #: refused, and read from for a moment more
        self._lingering: set[Connection] = set()
        self._connections_max = min(self.limits.connections_max, _files_max())
        #: bytes of requests that are not whole yet, or wait
        self._kept_bytes = 0
        #: answers that clients do not take: the one that keeps its own waiting the longest first
        self._unread: dict[Connection, int] = {}
        self._unread_bytes = 0
        self.known_heads: dict[bytes, KnownHead] = {}
        self._loop = asyncio.get_running_loop()
        self._outbox: list[tuple[asyncio.Transport, bytes]] = []
        self._outbox_bytes = 0
        self._servers: list[asyncio.Server] = []
        self._renewing: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._gone = asyncio.Event()

    async def open(
        self,
        host: str,
        port: int,
        *,
        context: ssl.SSLContext | None = None,
        shared: bool = False,
    ) -> int:
        """Listen; returns the port, which matters where 0 was asked for.

        Args:
            host: interface.
            port: 0 takes a free one.
            context: makes it HTTPS.
            shared: other processes may listen on it, too; see `cluster.doors.sharing`.

        Raises:
            OSError: the address is taken or not ours.
        """
        server = await self._loop.create_server(
            self._connect,
            host,
            port,
            backlog=_BACKLOG,
            reuse_port=shared or None,
            **self._tls(context),
        )
        self._servers = [server]
        self._looking = self._loop.create_task(self._look())
        if self._connections_max < self.limits.connections_max:
            logger.warning(
                "at most %d connections: the process may not open more files (ulimit -n)",
                self._connections_max,
            )
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
        if self._looking is not None:
            self._looking.cancel()
        for connection in [*self.connections, *self._lingering]:
            connection.abort()

    async def _look(self) -> None:
        """Look after slow clients for ever, some at a time."""
        limits = self.limits
        shortest_s = min(limits.head_s, limits.body_s, limits.read_s, limits.idle_s)
        while True:
            await asyncio.sleep(min(_LOOK_S, shortest_s / 4))
            for index, connection in enumerate(list(self.connections)):
                if index % _LOOKS_A_TURN == 0:
                    await asyncio.sleep(0)
                connection.look(self._loop.time())

    # What connections ask of their door

    def admit(self, connection: Connection) -> bool:
        """Give a new connection its place, if there is one."""
        if len(self.connections) >= self._connections_max:
            self.stats.refused += 1
            return False
        self.connections.add(connection)
        self.stats.accepted += 1
        self.stats.open += 1
        return True

    def may_linger(self, connection: Connection) -> bool:
        """Whether a refused client may go on sending for a moment, to read why."""
        if connection in self.connections:
            return True
        if len(self._lingering) < _LINGERING_MAX:
            self._lingering.add(connection)
            return True
        return False

    def may_keep(self, nbytes: int) -> bool:
        """Keep so many more bytes of unfinished requests; whether they are within the bound."""
        self._kept_bytes += nbytes
        return self._kept_bytes <= self.limits.bodies_bytes_max

    def leave_unread(self, connection: Connection, nbytes: int) -> None:
        """So many more bytes of answers wait for a client that does not take them."""
        self._unread[connection] = self._unread.get(connection, 0) + nbytes
        self._unread_bytes += nbytes
        while self._unread_bytes > self.limits.unread_bytes_max:
            slowest = next(iter(self._unread))
            self.was_read(slowest)
            self.stats.cut += 1
            slowest.abort()

    def was_read(self, connection: Connection) -> None:
        """A client has taken its answers, or has gone."""
        self._unread_bytes -= self._unread.pop(connection, 0)

    def count_timed_out(self, phase: Phase) -> None:
        """A client kept the door waiting for too long."""
        name = f"timed_out_{phase}"
        setattr(self.stats, name, getattr(self.stats, name) + 1)

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
        self.stats.bytes_written += self._outbox_bytes
        self._outbox_bytes = 0
        for transport, data in outbox:
            if not transport.is_closing():
                transport.write(data)

    def forget(self, connection: Connection) -> None:
        """A connection is over."""
        self.was_read(connection)
        self._lingering.discard(connection)
        if connection in self.connections:
            self.connections.remove(connection)
            self.stats.open -= 1
        if not self.connections:
            self._gone.set()


def _files_max() -> int:
    """How many connections the process can open files for, with some left for everything else."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 30 if soft == resource.RLIM_INFINITY else max(soft - _FILES_KEPT, soft // 2)
