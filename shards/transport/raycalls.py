"""Links over Ray actor calls: the reference, and the fallback where no port is open.

An actor owns a `RayPlane` and delegates two async methods to it::

    async def plane_send(self, link_id: str, number: int, data: bytes) -> None
    async def plane_receive(self, link_id: str) -> bytes | None

A caller holds the actor's handle and opens links with `connect_actor`. The bytes are the frames and
the handshake of the other planes. A caller has one `plane_send` under way at a time and numbers
them, so that order does not depend on Ray; what is sent meanwhile goes with the next. It has one
`plane_receive` under way at all times, which answers as soon as there are bytes.

A call costs most of a millisecond where a socket costs some microseconds, and each link occupies
one of the actor's concurrent calls. Ray pickles calls: they are for peers that passed Ray's own
authentication. This file does not know frames, and of Ray no more than how a method is called.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from typing import Any, Final

from batching.errors import ResourceExhausted
from shards.errors import LinkClosed
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
from shards.wire import Buffer

__all__ = ["RayPlane", "connect_actor"]

#: One call carries so many bytes, or one buffer that is larger.
_CALL_BYTES_MAX: Final = 4 << 20
#: A poll without bytes ends after this, so that a caller that is gone leaves no call behind.
_POLL_S: Final = 10.0


class _Outbox:
    """The pipe of a session: bytes in order, until a call fetches them.

    Args:
        session: told when a closed outbox has been emptied.
    """

    __slots__ = ("_bytes", "_closed", "_pending", "_session", "_wake")

    def __init__(self, session: Session) -> None:
        self._session = session
        self._pending: list[Buffer] = []
        self._bytes = 0
        self._closed = False
        self._wake = asyncio.Event()

    def write(self, data: Buffer) -> None:
        if not self._closed:
            self._pending.append(data)
            self._bytes += len(data)
            self._wake.set()

    def writelines(self, list_of_data: Sequence[Buffer]) -> None:
        for data in list_of_data:
            self.write(data)

    def get_write_buffer_size(self) -> int:
        return self._bytes

    def close(self) -> None:
        self._closed = True
        self._wake.set()
        if not self._pending:
            # As with a socket, the owner hears of it in a later turn, never from its own call.
            asyncio.get_running_loop().call_soon(self._session.lost, None)

    def abort(self) -> None:
        self._pending, self._bytes = [], 0
        self.close()

    @property
    def finished(self) -> bool:
        """Whether all has been taken, and no more will come."""
        return self._closed and not self._pending

    async def take(self) -> bytes | None:
        """The next bytes, once there are some; None when there will be no more."""
        while not self._pending:
            if self._closed:
                self._session.lost(None)
                return None
            self._wake.clear()
            await self._wake.wait()
        count = size = 0
        while count < len(self._pending) and (not count or size < _CALL_BYTES_MAX):
            size += len(self._pending[count])
            count += 1
        data = b"".join(self._pending[:count])
        del self._pending[:count]
        self._bytes -= size
        # In a turn of its own, as a socket does: what it writes goes with the next call.
        asyncio.get_running_loop().call_soon(self._session.resume_writing)
        return data


class _Entry:
    """One link of a plane, and the number of the call that is due on it."""

    __slots__ = ("due", "outbox", "over", "session")

    def __init__(self, session: Session) -> None:
        self.session = session
        self.outbox = _Outbox(session)
        self.due = 0
        self.over = asyncio.Event()


class RayPlane:
    """The listening side, inside the actor. All its methods run on the actor's event loop.

    Args:
        name: of the actor.
        generation: distinct for every process that bears the name.
        node: Ray's node id.
        secret: the cluster's.
        handler: of every link.
        limits: of every link; None takes the defaults.

    Attributes:
        counters: of all its links, closed ones included.
    """

    def __init__(
        self,
        *,
        name: str,
        generation: int,
        node: str,
        secret: bytes,
        handler: LinkHandler,
        limits: Limits | None = None,
    ) -> None:
        self.counters = Counters()
        self._identity = Identity(
            name=name, generation=generation, node=node, distribution=distribution()
        )
        self._secret = secret
        self._handler = handler
        self._limits = limits or Limits()
        self._entries: dict[str, _Entry] = {}
        self._closed = False

    async def send(self, link_id: str, number: int, data: bytes) -> None:
        """What the actor's ``plane_send`` does: take these bytes from the caller.

        Args:
            link_id: chosen by the caller, at random.
            number: 0 opens the link, then one more each time.
            data: the next bytes.

        Raises:
            LinkClosed: there is no such link, or a call was lost.
            ResourceExhausted: no more links are taken.
        """
        entry = self._entries.get(link_id)
        if entry is None:
            if number != 0 or self._closed:
                raise LinkClosed(f"{self._identity.name} has no such link")
            entry = self._open(link_id)
        if number != entry.due:
            entry.session.fail(LinkClosed(f"call {number} came where {entry.due} was due"))
            raise LinkClosed("a call was lost")
        entry.due += 1
        entry.session.feed(data)

    async def receive(self, link_id: str) -> bytes | None:
        """What the actor's ``plane_receive`` does: the next bytes for the caller.

        Returns:
            b"" when there were none for a while, None when there will be no more.
        """
        entry = self._entries.get(link_id)
        if entry is None:
            return None
        try:
            data = await asyncio.wait_for(entry.outbox.take(), _POLL_S)
        except TimeoutError:
            return b""
        if entry.outbox.finished:  # the caller, told goodbye, may never ask again
            entry.session.lost(None)
        return data

    async def close(self, reason: str = "shutting down") -> None:
        """Accept no more, say goodbye on every link, and wait until all are closed."""
        self._closed = True
        for entry in tuple(self._entries.values()):
            entry.session.shut(reason)
        # The close timeout of each session bounds this wait.
        while self._entries:
            entry = next(iter(self._entries.values()))
            await entry.over.wait()

    def _open(self, link_id: str) -> _Entry:
        if len(self._entries) >= self._limits.links_max:
            self.counters.handshakes_refused += 1
            raise ResourceExhausted(
                f"{self._limits.links_max} links are the most {self._identity.name} takes"
            )

        def settled(session: Session, error: Exception | None) -> None:
            log_refusal(self.counters, self._identity.name, error)

        def lost(session: Session) -> None:
            self._entries.pop(link_id).over.set()

        session = Session(
            loop=asyncio.get_running_loop(),
            handshake=ServerHandshake(
                self._identity, secret=self._secret, nonce=secrets.token_bytes(NONCE_BYTES)
            ),
            handler=self._handler,
            limits=self._limits,
            counters=self.counters,
            on_settled=settled,
            on_lost=lost,
        )
        entry = self._entries[link_id] = _Entry(session)
        session.begin(entry.outbox)
        return entry


class _Calls:
    """The calling side of one link: two tasks for its whole life, none per frame."""

    def __init__(self, handle: Any, session: Session) -> None:
        self._handle = handle
        self._session = session
        self._link_id = secrets.token_hex(16)
        self._outbox = _Outbox(session)
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._session.begin(self._outbox)
        self._tasks.append(asyncio.create_task(self._sending()))

    def stop(self) -> None:
        """The session is over. One of the tasks may be the one that says so: it ends by itself."""
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()

    async def _sending(self) -> None:
        number = 0
        while (data := await self._outbox.take()) is not None:
            try:
                await self._handle.plane_send.remote(self._link_id, number, data)
            except Exception as error:
                self._session.lost(_in_one_line(error))
                return
            if number == 0:  # before this there was no link to receive from
                self._tasks.append(asyncio.create_task(self._receiving()))
            number += 1

    async def _receiving(self) -> None:
        while True:
            try:
                data = await self._handle.plane_receive.remote(self._link_id)
            except Exception as error:
                self._session.lost(_in_one_line(error))
                return
            if data is None:
                self._session.lost(None)
                return
            self._session.feed(data)


async def connect_actor(
    handle: Any,
    endpoint: Endpoint,
    *,
    name: str,
    node: str,
    secret: bytes,
    handler: LinkHandler,
    generation: int = 0,
    limits: Limits | None = None,
    counters: Counters | None = None,
) -> Link:
    """Open a link to the very process that an endpoint names, over calls of its actor.

    Args:
        handle: of the actor; it has the methods ``plane_send`` and ``plane_receive``.
        endpoint: which actor, and which generation of it, is meant; where it listens is ignored.
        name: of the caller.
        node: of the caller, as Ray knows it.
        secret: the cluster's.
        handler: of this link. Frames may come before this function returns.
        generation: of the caller, 0 if nobody connects to it.
        limits: of this link; None takes the defaults.
        counters: to count into; None counts into its own.

    Raises:
        LinkClosed: the actor is gone, or does not answer in time.
        HandshakeRefused: it answers, but the two must not talk.
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
    opening = Opening(caller, endpoint, on_lost=lambda _: calls.stop())
    calls = _Calls(handle, opening.session)
    calls.start()
    return await opening.link()


def _in_one_line(error: Exception) -> ConnectionError:
    """Ray's errors are pages long: what names the cause is enough."""
    lines = str(error).strip().splitlines()
    return ConnectionError(f"{type(error).__name__}: {lines[-1] if lines else ''}")
