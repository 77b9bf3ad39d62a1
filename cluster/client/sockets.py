"""Connections of the client that blocks: a pool that threads share, and sockets with time-outs.

One connection serves one call at a time. Knows bytes and responses; what they mean is `calls`'.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from typing import Final

from batching.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, Unavailable
from cluster.client.address import Address
from cluster.client.reception import Reception, Response
from cluster.client.retrying import Lost
from cluster.forms.values import Buffer

__all__ = ["SocketConnection", "SocketPool"]

#: Bodies up to here leave with their head, in one piece.
_JOINED_BYTES_MAX: Final = 64 << 10


class SocketPool:
    """Connections that wait, and how many there are.

    Args:
        address: where they go.
        connections_max: open at one time.
        body_bytes_max: of an answer.
    """

    def __init__(self, address: Address, connections_max: int, body_bytes_max: int) -> None:
        if connections_max < 1:
            raise InvalidArgument("a client needs a connection")
        self._address = address
        self._max = connections_max
        self._body_bytes_max = body_bytes_max
        self._idle: list[SocketConnection] = []
        self._busy: set[SocketConnection] = set()
        self._is_closed = False
        self._changed = threading.Condition()

    def take(self, deadline: float) -> SocketConnection:
        """A connection that waits, or a new one.

        Raises:
            DeadlineExceeded: all are busy until then.
            Lost: none can be made.
            Unavailable: the client is closed.
        """
        with self._changed:
            while True:
                if self._is_closed:
                    raise Unavailable("the client is closed")
                while self._idle:
                    # The last one first: those that are not needed then go stale.
                    connection = self._idle.pop()
                    if connection.is_quiet():
                        self._busy.add(connection)
                        return connection
                    connection.close()
                if len(self._busy) < self._max:
                    connection = SocketConnection(self._address, self._body_bytes_max)
                    self._busy.add(connection)
                    break
                left_s = deadline - time.monotonic()
                if left_s <= 0 or not self._changed.wait(left_s):
                    raise DeadlineExceeded(f"all {self._max} connections are busy")
        try:
            connection.open(deadline)
        except BaseException:
            self.give_back(connection)
            raise
        return connection

    def give_back(self, connection: SocketConnection) -> None:
        """A call is over; whoever waits may have its connection, or its place."""
        with self._changed:
            self._busy.discard(connection)
            if connection.is_reusable and not self._is_closed:
                self._idle.append(connection)
            else:
                connection.close()
            self._changed.notify()

    def close(self) -> None:
        """Close every connection, those of calls under way too."""
        with self._changed:
            self._is_closed = True
            for connection in (*self._idle, *self._busy):
                connection.close()
            self._idle.clear()
            self._changed.notify_all()


class SocketConnection:
    """A socket to the door, and the response that comes on it.

    Args:
        address: of the door.
        body_bytes_max: of an answer.
    """

    def __init__(self, address: Address, body_bytes_max: int) -> None:
        self._address = address
        self._socket: socket.socket | None = None
        self._reception = Reception(body_bytes_max)
        self._served = 0
        #: whether it is between two calls, and stays open
        self.is_reusable = False

    def open(self, deadline: float) -> None:
        """Connect.

        Raises:
            Lost: nobody listens, or the certificate is not trusted.
            DeadlineExceeded: it takes too long.
        """
        address = self._address
        try:
            plain = socket.create_connection((address.host, address.port), _left(deadline))
            self._socket = plain
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if address.tls is not None:
                self._socket = address.tls.wrap_socket(plain, server_hostname=address.host)
        except TimeoutError:
            raise DeadlineExceeded(f"no connection to {address} in time") from None
        except ssl.SSLCertVerificationError as error:
            raise FailedPrecondition(f"{address} is not trusted: {error}") from None
        except OSError as error:
            raise Lost(f"nothing answers at {address}: {error}", was_sent=False) from None

    def is_quiet(self) -> bool:
        """Whether nothing has come since the last answer: the other side may have closed."""
        if self._socket is None:
            return False
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return not poll.poll(0)

    def ask(self, request: Sequence[Buffer], deadline: float) -> Response:
        """Send a request and wait for its response.

        Raises:
            Lost: the connection broke.
            DeadlineExceeded: the response does not come in time.
            DataLoss: what comes is no response.
        """
        self.is_reusable = False
        reception = self._reception
        reception.begin()
        was_reused, self._served = self._served > 0, self._served + 1
        try:
            broken = self._send(request, deadline)
            self._receive(deadline)
        except TimeoutError:
            raise DeadlineExceeded("the answer did not come in time") from None
        except OSError as error:
            broken = error
        response = reception.response
        if response is None:
            why = "closed" if broken is None else str(broken)
            raise Lost(
                f"the connection to {self._address} was lost: {why}",
                was_reused=was_reused and not reception.has_begun,
            )
        self.is_reusable = reception.keeps_open and broken is None
        return response

    def _send(self, request: Sequence[Buffer], deadline: float) -> OSError | None:
        """Send all, or as much as the server takes; what broke it is not an end yet."""
        sock = self._open_socket()
        sock.settimeout(_left(deadline))
        if sum(map(len, request)) <= _JOINED_BYTES_MAX:
            request = [b"".join(request)]
        try:
            for buffer in request:
                sock.sendall(buffer)
        except TimeoutError:
            raise
        except OSError as error:
            return error  # a server that refuses a body may have said why before it closed
        return None

    def _receive(self, deadline: float) -> None:
        sock, reception = self._open_socket(), self._reception
        while reception.response is None:
            sock.settimeout(_left(deadline))
            nbytes = sock.recv_into(reception.get_buffer())
            if not nbytes:
                reception.eof()
                return
            reception.buffer_updated(nbytes)

    def _open_socket(self) -> socket.socket:
        if self._socket is None:
            raise OSError("the client is closed")
        return self._socket

    def close(self) -> None:
        """Close at once; a thread that waits for it is woken."""
        sock, self._socket = self._socket, None
        self.is_reusable = False
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits for it
            sock.close()


def _left(deadline: float) -> float:
    """Seconds until then.

    Raises:
        TimeoutError: none are left.
    """
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    return left_s
