"""Links from a shard to device actors, over which its rows go on without passing a router.

A device's address comes with the call, over a link whose peer has proven the cluster's secret; the
link to the device is opened with the same proof, and to the very generation that the call named.
Links are kept for the next call. What cannot be sent is told at once, and a device that could not
be reached is not dialled again for a moment: whoever asked takes the rows himself meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, NamedTuple, TypeAlias

from batching.errors import ServingError
from shards.errors import FrameRefused, LinkClosed
from shards.orders import Endpoint
from shards.transport import Link, LinkHandler
from shards.wire import CHUNK_BYTES, Buffer, CallHeader, Frame, FrameKind, Header

__all__ = ["Dial", "Forwarder"]

logger = logging.getLogger(__name__)

#: Opens a link to the process that an endpoint names.
Dial: TypeAlias = Callable[[Endpoint, LinkHandler], Awaitable[Link]]
#: Told why a frame will not arrive.
Failed: TypeAlias = Callable[[str], None]

#: Frames that a device may still refuse, remembered for each link, so that the asker can be told.
_REFUSABLE_MAX: Final = 256
#: After a dial that failed, frames for that process are refused for so long.
_REDIAL_S: Final = 1.0


class _Waiting(NamedTuple):
    """A frame whose link is being opened."""

    header: CallHeader
    buffers: Sequence[Buffer]
    failed: Failed


class _Route:
    """The way to one process of a device actor; its link's handler."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.link: Link | None = None
        self.waiting: list[_Waiting] = []
        self.waiting_bytes = 0
        self.dead_until = 0.0
        self.opening: asyncio.Task[None] | None = None
        #: large frames that were sent, newest last; links refuse no others. By identity: the link
        #: gives back the header that it was given.
        self.refusable: dict[int, tuple[CallHeader, Failed]] = {}

    def on_frame(self, link: Link, frame: Frame) -> None:
        """A device says nothing over this link that anybody needs."""

    def on_refused(self, link: Link, header: Header, error: FrameRefused) -> None:
        """The device has no room for a large frame; the link goes on."""
        _, failed = self.refusable.pop(id(header), (None, None))
        if failed is not None:
            failed(f"{self.endpoint.actor} did not take the rows: {error}")

    def sent(self, frame: _Waiting) -> None:
        """A frame left; if it is a large one, the device may still refuse it."""
        if sum(memoryview(buffer).nbytes for buffer in frame.buffers) > CHUNK_BYTES:
            self.refusable[id(frame.header)] = (frame.header, frame.failed)
            if len(self.refusable) > _REFUSABLE_MAX:
                del self.refusable[next(iter(self.refusable))]

    def on_closed(self, link: Link, error: Exception | None) -> None:
        """The next frame opens another link."""
        if self.link is link:
            self.link = None
        self.refusable.clear()


class Forwarder:
    """Sends frames of parts. Used on the loop's thread alone.

    Args:
        dial: opens links.
        loop: the loop.
        routes_max: processes that are remembered; beyond, the one not used for longest is closed.
        waiting_bytes_max: of frames that wait for one link to open.
    """

    def __init__(
        self,
        dial: Dial,
        loop: asyncio.AbstractEventLoop,
        routes_max: int = 256,
        waiting_bytes_max: int = 64 << 20,
    ) -> None:
        self._dial = dial
        self._loop = loop
        self._routes_max = routes_max
        self._waiting_bytes_max = waiting_bytes_max
        self._routes: dict[tuple[str, int], _Route] = {}

    def send(
        self,
        endpoint: Endpoint,
        header: CallHeader,
        buffers: Sequence[Buffer],
        failed: Failed,
    ) -> None:
        """Send a frame to the process that an endpoint names, now or once it is reached.

        Args:
            endpoint: of a device actor.
            header: says which joins its rows are parts of.
            buffers: the rows.
            failed: called, possibly at once, if the frame cannot be sent.
        """
        route = self._route(endpoint)
        if route.link is not None:
            self._send(route, route.link, _Waiting(header, buffers, failed))
            return
        if route.dead_until > self._loop.time():
            failed(f"{endpoint.actor} could not be reached a moment ago")
            return
        nbytes = sum(memoryview(buffer).nbytes for buffer in buffers)
        if route.waiting and route.waiting_bytes + nbytes > self._waiting_bytes_max:
            failed(f"too many rows wait for a link to {endpoint.actor}")
            return
        route.waiting.append(_Waiting(header, buffers, failed))
        route.waiting_bytes += nbytes
        if route.opening is None:
            route.opening = self._loop.create_task(self._open(route))

    def close(self) -> None:
        """Close every link."""
        for route in self._routes.values():
            _shut(route, "shutting down")
        self._routes.clear()

    def _route(self, endpoint: Endpoint) -> _Route:
        key = (endpoint.actor, endpoint.generation)
        route = self._routes.pop(key, None) or _Route(endpoint)
        self._routes[key] = route  # the last is the one used most recently
        while len(self._routes) > self._routes_max:
            _shut(self._routes.pop(next(iter(self._routes))), "not used any more")
        return route

    async def _open(self, route: _Route) -> None:
        reason = "the link closed as soon as it was open"
        try:
            link: Link | None = await self._dial(route.endpoint, route)
        except Exception as error:  # whatever it was, those who wait must hear of it
            logger.info("cannot reach %s: %s", route.endpoint.actor, error)
            link, reason = None, str(error)
            route.dead_until = self._loop.time() + _REDIAL_S
        route.opening = None
        route.link = link
        waiting, route.waiting, route.waiting_bytes = route.waiting, [], 0
        for frame in waiting:
            if route.link is None:
                frame.failed(f"{route.endpoint.actor} cannot be reached: {reason}")
            else:
                self._send(route, route.link, frame)

    def _send(self, route: _Route, link: Link, frame: _Waiting) -> None:
        try:
            link.send(FrameKind.CALL, frame.header, frame.buffers)
            route.sent(frame)
            link.flush()
        except ServingError as error:  # full, closing or unfit: only this frame suffers
            if isinstance(error, LinkClosed) and route.link is link:
                route.link = None
            frame.failed(f"rows could not be sent to {route.endpoint.actor}: {error}")


def _shut(route: _Route, reason: str) -> None:
    if route.opening is not None:
        route.opening.cancel()
    for frame in route.waiting:
        frame.failed(f"{route.endpoint.actor} was not reached: {reason}")
    route.waiting.clear()
    if route.link is not None:
        route.link.close(reason)
