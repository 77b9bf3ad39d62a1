"""The client of ``faults``: asks at instants drawn beforehand, and writes down every end.

A request leaves when its instant has come, whatever became of those before it. A connection that
breaks or cannot be made is followed by another attempt, as any client would; an answer or a typed
error is the end. The client runs on a loop and a thread of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Final, NamedTuple, Self, cast
from urllib.parse import urlsplit

import httptools
import orjson
import uvloop

from bench.errors import LoadFailed
from bench.faults_ledger import Attempt, Bounds, Ending
from bench.faults_model import NUMBERS, SERVABLES, read_answer, request

__all__ = ["Client", "Door", "Reply", "judge"]

#: Statuses that a fault may end a request with.
_TYPED: Final[Mapping[int, str]] = {
    429: "RESOURCE_EXHAUSTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
_AGAIN_S: Final = 0.1
_LINGER_S: Final = 0.01
#: Beyond the patience of the last request.
_OVER_S: Final = 1.0
#: A request that found no end in so many attempts is left to the books as it is.
_ATTEMPTS_MAX: Final = 400
#: Requests under way at a time; an open loop at our rates stays far below.
_UNDER_WAY_MAX: Final = 4096


class Door(NamedTuple):
    """Where requests go.

    Attributes:
        name: in the books.
        url: scheme, host and port.
        rate: requests a second.
        is_proxied: whether a server that is not ours stands before it and may answer for itself.
    """

    name: str
    url: str
    rate: float
    is_proxied: bool = False


class Reply(NamedTuple):
    """What came back."""

    status: int
    body: bytes
    version: int


class Client:
    """Asks all doors for as long as the context lasts.

    Args:
        doors: with the rate of each.
        bounds: the deadline that requests carry, and when they are late.
        seed: of the arrivals and of what is asked.
        network: entered by the client's thread, if it is to be on another network than ours.
    """

    def __init__(
        self,
        doors: Sequence[Door],
        bounds: Bounds,
        *,
        seed: int,
        network: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self.attempts: list[Attempt] = []
        #: answers that came over a connection on which nothing was asked
        self.unasked = 0
        #: requests that were still without any end when everything had to be over
        self.unfinished = 0
        self._doors = doors
        self._bounds = bounds
        #: A silent attempt is given up well after it counts as late.
        self._patience_s = bounds.late_s + bounds.deadline_s
        self._network = network
        self._random = random.Random(seed)
        self._next = 1
        self._ended = asyncio.Event()
        self._idle: dict[str, list[_Connection]] = {door.name: [] for door in doors}
        self._failure: BaseException | None = None
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._main, name="faults-client", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with contextlib.suppress(RuntimeError):  # it has ended by itself, and says why below
            self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()
        if self._failure is not None and error is None:
            raise LoadFailed(f"the client failed: {self._failure!r}") from self._failure

    def bad_since(self, instant: float) -> bool:
        """Whether anything but right answers ended since an instant, or nothing did."""
        recent = [each for each in self.attempts[-2000:] if each.ended >= instant]
        doors = {each.door for each in recent}
        return len(doors) < len(self._doors) or any(
            each.ending is not Ending.ANSWER for each in recent
        )

    def _main(self) -> None:
        try:
            with self._network():
                self._loop.run_until_complete(self._run())
        except BaseException as error:
            self._failure = error
        finally:
            self._loop.close()

    async def _run(self) -> None:
        under_way: set[asyncio.Task[None]] = set()
        await asyncio.gather(*(self._feed(door, under_way) for door in self._doors))
        # Everything that was asked gets its end; what takes longer than any bound never does.
        if under_way:
            await asyncio.wait(under_way, timeout=self._patience_s + _OVER_S)
        self.unfinished = len(under_way)
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
        for connections in self._idle.values():
            for connection in connections:
                connection.close()
        # Transports let go of their sockets in turns of their own.
        await asyncio.sleep(_LINGER_S)

    async def _feed(self, door: Door, under_way: set[asyncio.Task[None]]) -> None:
        """Let a door's requests leave at the instants of a Poisson process."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while not self._ended.is_set():
            due += self._random.expovariate(door.rate)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), max(0.0, due - loop.time()))
            if self._ended.is_set():
                return
            if len(under_way) >= _UNDER_WAY_MAX or self._next >= NUMBERS:
                raise LoadFailed("more requests under way, or in all, than the books are made for")
            number, self._next = self._next, self._next + 1
            task = loop.create_task(self._ask(door, self._random.choice(SERVABLES), number))
            under_way.add(task)
            task.add_done_callback(under_way.discard)

    async def _ask(self, door: Door, servable: str, number: int) -> None:
        """Ask until there is an answer or a typed error."""
        address = urlsplit(door.url)
        wire = request(servable, number).wire(
            address.netloc, {"x-request-timeout-ms": str(round(self._bounds.deadline_s * 1000))}
        )
        for _ in range(_ATTEMPTS_MAX):
            attempt = await self._attempt(door, servable, number, wire)
            self.attempts.append(attempt)
            over = attempt.ending in (Ending.ANSWER, Ending.ERROR, Ending.WRONG)
            if over or self._ended.is_set():
                return
            await asyncio.sleep(_AGAIN_S)

    async def _attempt(self, door: Door, servable: str, number: int, wire: bytes) -> Attempt:
        sent = time.monotonic()

        def ends(ending: Ending, detail: str = "") -> Attempt:
            return Attempt(
                request=number,
                door=door.name,
                sent=sent,
                ended=time.monotonic(),
                ending=ending,
                detail=detail,
            )

        patience_s = self._patience_s
        try:
            connection = await asyncio.wait_for(self._connection(door), patience_s)
        except (OSError, TimeoutError) as error:
            return ends(Ending.REFUSED, type(error).__name__)
        try:
            reply = await asyncio.wait_for(connection.ask(wire), patience_s)
        except TimeoutError:
            connection.close()
            return ends(Ending.SILENT)
        except ConnectionError as error:
            return ends(Ending.RESET, str(error))
        except asyncio.CancelledError:
            connection.close()
            raise
        if not connection.is_closing:
            self._idle[door.name].append(connection)
        return judge(door, servable, number, reply, sent=sent, ended=time.monotonic())

    async def _connection(self, door: Door) -> _Connection:
        idle = self._idle[door.name]
        while idle:
            connection = idle.pop()
            if not connection.is_closing:
                return connection
        address = urlsplit(door.url)
        loop = asyncio.get_running_loop()
        _, made = await loop.create_connection(
            lambda: _Connection(self), address.hostname or "", address.port or 80
        )
        return made


def judge(
    door: Door, servable: str, number: int, reply: Reply, *, sent: float, ended: float
) -> Attempt:
    """What a reply means for the request that it came for."""

    def ends(ending: Ending, detail: str = "") -> Attempt:
        return Attempt(
            request=number, door=door.name, sent=sent, ended=ended, ending=ending, detail=detail
        )

    if reply.status == 200:
        try:
            reading = read_answer(servable, reply.body)
        except ValueError as error:
            return ends(Ending.WRONG, str(error))
        return Attempt(
            request=number,
            door=door.name,
            sent=sent,
            ended=ended,
            ending=Ending.ANSWER if reading.number == number else Ending.WRONG,
            detail="" if reading.number == number else f"the answer to {reading.number}",
            told=reading.number,
            versions=(*reading.versions, reply.version),
            life=reading.life,
        )
    if not _is_ours(reply.body):
        # HAProxy's page, or Serve's line: the request never reached a router of ours.
        told = f"{reply.status}: {reply.body[:80]!r}"
        return ends(Ending.REFUSED if door.is_proxied else Ending.WRONG, told)
    code = _TYPED.get(reply.status)
    if code is None:
        return ends(Ending.WRONG, f"{reply.status}: {reply.body[:200]!r}")
    return ends(Ending.ERROR, code)


def _is_ours(body: bytes) -> bool:
    try:
        return isinstance(orjson.loads(body)["error"], str)
    except (KeyError, TypeError, orjson.JSONDecodeError):
        return False


class _Connection(asyncio.Protocol):
    """One connection, one request at a time; its parser's callbacks are this object's methods."""

    def __init__(self, owner: Client) -> None:
        self._owner = owner
        self._parser = httptools.HttpResponseParser(self)
        self._body: list[bytes] = []
        self._version = 0
        self._waiter: asyncio.Future[Reply] | None = None

    @property
    def is_closing(self) -> bool:
        """Whether nothing more can be asked here."""
        return self._transport.is_closing()

    async def ask(self, wire: bytes) -> Reply:
        """Send a request and wait for what comes back.

        Raises:
            ConnectionError: the connection broke first.
        """
        assert self._waiter is None
        waiter = self._waiter = asyncio.get_running_loop().create_future()
        self._transport.write(wire)
        try:
            reply: Reply = await waiter
            return reply
        finally:
            self._waiter = None

    def close(self) -> None:
        """Close it at once."""
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.abort()

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"x-servable-version":
            self._version = int(value)

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        reply = Reply(self._parser.get_status_code(), b"".join(self._body), self._version)
        self._body.clear()
        self._version = 0
        if self._waiter is None or self._waiter.done():
            self._owner.unasked += 1
        else:
            self._waiter.set_result(reply)
        if not self._parser.should_keep_alive():
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(ConnectionResetError(repr(exc) if exc else "closed"))
