"""The calling side of a link that is being opened, the same over every pipe."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from shards.handshake import NONCE_BYTES, ClientHandshake, Identity, distribution
from shards.orders import Endpoint
from shards.transport._link import Counters, Limits, Link, LinkHandler
from shards.transport._session import Session


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who opens a link, and what for: the arguments of every ``connect``."""

    name: str
    generation: int
    node: str
    secret: bytes
    handler: LinkHandler
    limits: Limits
    counters: Counters

    def __repr__(self) -> str:
        return f"<Caller {self.name}>"  # never the secret


class Opening:
    """One attempt to open a link.

    Args:
        caller: who opens it.
        endpoint: the process that must answer.
        on_lost: told when nothing of the session is left.

    Attributes:
        session: to be given a pipe.
    """

    def __init__(
        self,
        caller: Caller,
        endpoint: Endpoint,
        on_lost: Callable[[Session], None] = lambda _: None,
    ) -> None:
        loop = asyncio.get_running_loop()
        self._settled: asyncio.Future[None] = loop.create_future()
        self.session = Session(
            loop=loop,
            handshake=ClientHandshake(
                Identity(
                    name=caller.name,
                    generation=caller.generation,
                    node=caller.node,
                    distribution=distribution(),
                ),
                expected_name=endpoint.actor,
                expected_generation=endpoint.generation,
                secret=caller.secret,
                nonce=secrets.token_bytes(NONCE_BYTES),
            ),
            handler=caller.handler,
            limits=caller.limits,
            counters=caller.counters,
            on_settled=self._settle,
            on_lost=on_lost,
        )

    async def link(self) -> Link:
        """The link, once its handshake is over; the session's own timer bounds the wait.

        Raises:
            LinkClosed: the peer is gone, or does not answer in time.
            HandshakeRefused: it answers, but the two must not talk.
            FrameCorrupt: what answers does not speak frames.
        """
        try:
            await self._settled
        except asyncio.CancelledError:
            self.session.shut("the caller gave up connecting")
            raise
        return self.session

    def abandon(self, reason: str) -> None:
        """There is no pipe to be had: forget the attempt."""
        self._settled.cancel()
        self.session.shut(reason)

    def _settle(self, session: Session, error: Exception | None) -> None:
        if self._settled.done():  # cancelled by whoever waited
            return
        if error is None:
            self._settled.set_result(None)
        else:
            self._settled.set_exception(error)
