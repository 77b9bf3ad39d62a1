"""Connections of the client for an event loop: a pool, and protocols.

One connection serves one call at a time. Time-outs are those of the tasks that call. Knows bytes
and responses; what they mean is `calls`'.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Sequence
from typing import cast

from batching.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    ServingError,
    Unavailable,
)
from cluster.client.address import Address
from cluster.client.reception import Reception, Response
from cluster.client.retrying import Lost
from cluster.forms.values import Buffer

__all__ = ["StreamConnection", "StreamPool"]


class StreamPool:
    """Connections that wait, how many there are, and who waits for one.

    Args:
        address: where they go.
        connections_max: open at one time.
        body_bytes_max: of an answer.
    """

    def __init__(self, address: Address, connections_max: int, body_bytes_max: int) -> None:
        if connections_max < 1:
            raise InvalidArgument("a client needs a connection")
        self._address = address
        self._body_bytes_max = body_bytes_max
        self._idle: list[StreamConnection] = []
        self._busy: set[StreamConnection] = set()
        self._places = connections_max
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._is_closed = False

    async def take(self) -> StreamConnection:
        """A connection that waits, or a new one.

        Raises:
            Lost: none can be made.
            Unavailable: the client is closed.
        """
        if not self._places:
            place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(place)
            try:
                await place
            except asyncio.CancelledError:
                if place.done() and not place.cancelled():
                    self._free_place()
                raise
        else:
            self._places -= 1
        try:
            if self._is_closed:
                raise Unavailable("the client is closed")
            while self._idle:
                connection = self._idle.pop()
                if connection.is_reusable:
                    break
                connection.close()
            else:
                connection = await self._connected()
        except BaseException:
            self._free_place()
            raise
        self._busy.add(connection)
        return connection

    async def _connected(self) -> StreamConnection:
        address, loop = self._address, asyncio.get_running_loop()
        try:
            _, protocol = await loop.create_connection(
                lambda: StreamConnection(address, self._body_bytes_max),
                address.host,
                address.port,
                ssl=address.tls,
            )
        except TimeoutError:
            raise
        except ssl.SSLCertVerificationError as error:
            raise FailedPrecondition(f"{address} is not trusted: {error}") from None
        except OSError as error:
            raise Lost(f"nothing answers at {address}: {error}", was_sent=False) from None
        return protocol

    def _free_place(self) -> None:
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                return
        self._places += 1

    def give_back(self, connection: StreamConnection) -> None:
        """A call is over; whoever waits may have its connection, or its place."""
        self._busy.discard(connection)
        if connection.is_reusable and not self._is_closed:
            self._idle.append(connection)
        else:
            connection.close()
        self._free_place()

    async def close(self) -> None:
        """Close every connection, those of calls under way too."""
        self._is_closed = True
        closing = [*self._idle, *self._busy]
        self._idle.clear()
        for connection in closing:
            connection.close()
        for connection in closing:
            await connection.closed


class StreamConnection(asyncio.BufferedProtocol):
    """A transport to the door, and the response that comes on it.

    Args:
        address: of the door.
        body_bytes_max: of an answer.

    Attributes:
        closed: done when the transport has gone.
    """

    def __init__(self, address: Address, body_bytes_max: int) -> None:
        loop = asyncio.get_running_loop()
        self._address = address
        self._transport: asyncio.Transport | None = None
        self._reception = Reception(body_bytes_max)
        self._waiter: asyncio.Future[Response] | None = None
        self._served = 0
        self.closed: asyncio.Future[None] = loop.create_future()

    @property
    def is_reusable(self) -> bool:
        """Whether it is between two calls, and stays open."""
        transport = self._transport
        if transport is None or transport.is_closing() or self._waiter is not None:
            return False
        return not self._served or self._reception.keeps_open

    async def ask(self, request: Sequence[Buffer]) -> Response:
        """Send a request and wait for its response.

        Raises:
            Lost: the connection broke.
            DataLoss: what comes is no response.
        """
        self._reception.begin()
        self._waiter = asyncio.get_running_loop().create_future()
        self._served += 1
        if self._transport is None:
            raise self._lost(None)
        self._transport.writelines(request)
        response = await self._waiter
        self._waiter = None
        return response

    def close(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    def _lost(self, error: Exception | None) -> Lost:
        why = "closed" if error is None else str(error)
        return Lost(
            f"the connection to {self._address} was lost: {why}",
            was_reused=self._served > 1 and not self._reception.has_begun,
        )

    def _end(self, outcome: Response | ServingError) -> None:
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        if isinstance(outcome, ServingError):
            waiter.set_exception(outcome)
        else:
            waiter.set_result(outcome)

    # asyncio.BufferedProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go."""
        return self._reception.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        """Take bytes."""
        reception = self._reception
        if self._waiter is None:
            self.close()  # nothing was asked: what comes is not for a later call
            return
        try:
            reception.buffer_updated(nbytes)
        except DataLoss as error:
            self._end(error)
            self.close()
            return
        if reception.response is not None:
            self._end(reception.response)

    def eof_received(self) -> bool:
        """The end of a body without a length, perhaps."""
        self._reception.eof()
        if self._reception.response is not None:
            self._end(self._reception.response)
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """End the call under way."""
        self._transport = None
        self._end(self._lost(exc))
        if not self.closed.done():
            self.closed.set_result(None)
