"""By which plane a router reaches an actor: sockets, or Ray calls where no port can be reached.

Ray calls cost most of a millisecond each where a socket costs some microseconds, so they are for
who asks for them, and for actors whose ports were never open to this router: two attempts without
an answer. What was reached one way is reached that way again as long as the process lives; which
process that is, its generation says. So an actor that answered on its port and no longer does is
taken for dead, not looked for elsewhere. A refused handshake is an answer, too.

Does not know how either plane is opened, nor when to try again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from typing import Final, TypeAlias

from cluster.specs import Transport
from shards.errors import LinkClosed
from shards.orders import Endpoint
from shards.transport import Link, LinkHandler

__all__ = ["Dial", "Dialing"]

logger = logging.getLogger(__name__)

Dial: TypeAlias = Callable[[Endpoint, LinkHandler], Awaitable[Link]]

_ATTEMPTS: Final = 2


class Dialing:
    """Opens links; `dial` is a `Dial`.

    Args:
        transport: which planes may be used.
        sockets: opens a link over sockets.
        calls: opens a link over Ray calls.
    """

    def __init__(self, transport: Transport, sockets: Dial, calls: Dial) -> None:
        self._transport = transport
        self._sockets = sockets
        self._calls = calls
        # By the name of an actor: its generation, and how many attempts are left to its port. None
        # are once it was reached by Ray calls; endless ones are once the port has answered.
        self._left: dict[str, tuple[int, float]] = {}
        self._told = False

    async def dial(self, endpoint: Endpoint, handler: LinkHandler) -> Link:
        """Open a link to the very process that an endpoint names.

        Raises:
            LinkClosed: it cannot be reached.
            HandshakeRefused: it answers, but the two must not talk.
            FrameCorrupt: what answers does not speak frames.
        """
        if self._transport == "ray":
            return await self._calls(endpoint, handler)
        if self._transport == "sockets":
            return await self._sockets(endpoint, handler)
        name, process = endpoint.actor, endpoint.generation
        generation, left = self._left.get(name, (process, _ATTEMPTS))
        if generation != process:
            left = _ATTEMPTS
        if left <= 0:
            return await self._calls(endpoint, handler)
        try:
            link = await self._sockets(endpoint, handler)
        except LinkClosed as error:
            if left > 1:
                self._left[name] = (process, left - 1)
                raise
            link = await self._calls(endpoint, handler)
            self._left[name] = (process, 0)
            self._tell(error)
        else:
            self._left[name] = (process, math.inf)
        return link

    def _tell(self, error: LinkClosed) -> None:
        level = logging.INFO if self._told else logging.WARNING
        self._told = True
        logger.log(
            level,
            "%s; it is reached by Ray calls instead, which are slower: open the port, or set "
            "transport: ray to stop looking for it",
            error,
        )
