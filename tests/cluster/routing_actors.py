"""Actors as a router sees them, played by the test: they record what comes and answer when told.

Frames are encoded and decoded by the real code, so a misaligned body or a wrong header fails here
as it would on a socket.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from batching.errors import ServingError
from shards.bags import POOL_OPS
from shards.errors import LinkClosed
from shards.handshake import PeerInfo
from shards.hosted import Hosted
from shards.join_desk import JoinDesk
from shards.manifest import MapUnit
from shards.orders import Endpoint
from shards.together import parted
from shards.transport import Link, LinkHandler
from shards.wire import (
    Buffer,
    CallHeader,
    CancelHeader,
    Frame,
    FrameKind,
    Header,
    Item,
    ItemError,
    ReplyHeader,
    encode_tensors,
)

Array = npt.NDArray[np.generic]


class Asked:
    """One item that came to a fake actor, with its own rows of the call's tensors."""

    def __init__(self, link: FakeLink, header: CallHeader, item: Item, arrays: list[Array]) -> None:
        self.link = link
        self.header = header
        self.item = item
        self.arrays = arrays

    def answer(
        self,
        *outputs: Array,
        unit: str | None = None,
        rows: int | None = None,
        plan: str | None = None,
        news: tuple[int, int] = (0, 0),
    ) -> None:
        """Send rows back, or on to the device that they are for.

        Args:
            outputs: the rows.
            unit: whose they claim to be.
            rows: how many there claim to be.
            plan: by which they claim to be cut.
            news: `wait_us` and `row_us` of the header.
        """
        plan = self.header.plan if plan is None else plan
        if self.header.reply_to is not None:
            [array] = outputs
            self._send_on(array, unit or self.header.unit, plan)
            return
        items = [(self.item.request, self.item.rows if rows is None else rows)]
        self.link.reply(items, outputs, unit or self.header.unit, plan=plan, news=news)

    def _send_on(self, rows: Array, unit: str, plan: str) -> None:
        assert self.header.reply_to is not None
        assert self.item.continuation is not None
        device = self.link.actor.others[self.header.reply_to.actor]
        if device.desk is None or device.is_away:
            self.refuse("UNJOINED", f"{device.name} cannot be reached")
            return
        tensors, buffers = encode_tensors([rows])
        header = CallHeader(self.header.epoch, unit, "part", [self.item], tensors, plan)
        body = memoryview(b"".join(bytes(buffer) for buffer in buffers))
        device.desk.on_part(DeviceSide(self.link), header, Frame(FrameKind.CALL, 0, header, body))

    def refuse(self, code: str, message: str = "no", retry_after_ms: int = 0) -> None:
        """Send an error back."""
        error = ItemError(self.item.request, code, message, retry_after_ms)
        self.link.reply([], (), self.header.unit, [error])


class DeviceSide:
    """The end of a link that a device's desk has: what it sends goes to who is at the other.

    It proves itself as the actor whose link it is, as a shard does that sends rows to a device.
    """

    def __init__(self, link: FakeLink) -> None:
        self._link = link
        self.waiting_bytes = 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DeviceSide) and other._link is self._link

    def __hash__(self) -> int:
        return hash(self._link)

    @property
    def peer(self) -> PeerInfo:
        endpoint = self._link.endpoint
        return PeerInfo(name=endpoint.actor, generation=endpoint.generation, node=endpoint.node)

    def send(
        self,
        kind: FrameKind,
        header: Header,
        buffers: Sequence[Buffer] = (),
    ) -> None:
        assert isinstance(header, ReplyHeader)
        assert not header.items, "a desk answers nothing, it only refuses"
        self._link.reply([], (), header.unit, header.errors)

    def flush(self) -> None:
        """What is sent is there at once."""

    def close(self, reason: str = "") -> None:
        raise AssertionError(reason)


class FakeLink:
    """A link whose other end is the test."""

    def __init__(self, actor: FakeActor, handler: LinkHandler, endpoint: Endpoint) -> None:
        self.actor = actor
        self.endpoint = endpoint
        self._handler = handler
        self._open = True
        self.refuses: ServingError | None = None
        self.calls: list[tuple[CallHeader, list[Array]]] = []
        self.cancelled: list[int] = []
        self.body_bytes: list[int] = []

    def is_open(self) -> bool:
        return self._open

    @property
    def peer(self) -> PeerInfo:
        raise NotImplementedError

    @property
    def waiting_bytes(self) -> int:
        return 0

    def flush(self) -> None:
        """What is sent is there at once."""

    def send(
        self,
        kind: FrameKind,
        header: msgspec.Struct | bytes,
        buffers: Sequence[Buffer] = (),
        stream: int = 0,
    ) -> None:
        if self.refuses is not None:
            raise self.refuses
        if not self._open:
            raise LinkClosed("closed")
        if isinstance(header, CancelHeader):
            assert kind is FrameKind.CANCEL
            self.cancelled += header.requests
            for request in header.requests:
                if self.actor.desk is not None:
                    self.actor.desk.on_cancel(DeviceSide(self), request)
            return
        assert kind is FrameKind.CALL
        assert isinstance(header, CallHeader)
        body = b"".join(bytes(buffer) for buffer in buffers)
        self.body_bytes.append(len(body))
        for call, arrays in parted(header, memoryview(body)):
            self.calls.append((call, arrays))
            if call.op == "join":
                self.actor.join(self, call, Frame(FrameKind.CALL, 0, call, memoryview(body)))
                return
            at = 0
            for item in call.items:
                start, at = at, at + item.rows
                rows = [array[start:at] for array in arrays]
                self.actor.asked.append(Asked(self, call, item, rows))
            assert call.op in POOL_OPS or all(len(array) == at for array in arrays)

    def close(self, reason: str = "") -> None:
        if self._open:
            self._open = False
            self.actor.forget(self)
            asyncio.get_running_loop().call_soon(self._handler.on_closed, self, None)

    def reply(
        self,
        items: list[tuple[int, int]],
        outputs: Sequence[Array],
        unit: str,
        errors: Sequence[ItemError] = (),
        plan: str = "",
        news: tuple[int, int] = (0, 0),
    ) -> None:
        """Send a REPLY frame; one that comes too late for the link is lost."""
        if not self._open:
            return
        headers, buffers = encode_tensors(outputs)
        body = memoryview(b"".join(bytes(buffer) for buffer in buffers))
        header = ReplyHeader(unit, 1, items, headers, list(errors), plan, *news)
        self._handler.on_frame(self, Frame(FrameKind.REPLY, 0, header, body))

    def break_off(self, error: Exception | None = None) -> None:
        """The actor's process dies."""
        if self._open:
            self._open = False
            self.actor.forget(self)
            self._handler.on_closed(self, error or LinkClosed("connection reset"))


class FakeActor:
    """Where a name's links lead.

    Attributes:
        asked: items that came, over whatever link, oldest first.
        links: every link there ever was.
        is_away: dialling fails.
        desk: joins rows that others send, where the actor is a device.
        dialled_at: when somebody tried.
    """

    def __init__(self, name: str, others: FakeActors) -> None:
        self.name = name
        self.others = others
        self.desk: JoinDesk | None = None
        self._hosted: dict[str, Hosted] = {}
        self.asked: list[Asked] = []
        self.links: list[FakeLink] = []
        self.is_away = False
        self.dies_at_once = False
        self.dialled_at: list[float] = []

    @property
    def link(self) -> FakeLink:
        return self.links[-1]

    def host(self, *units: MapUnit) -> None:
        """Be a device that hosts these units."""
        loop = asyncio.get_running_loop()
        self.desk = JoinDesk(loop, self._enter, 1, loop.time)
        self._hosted = {unit.id: Hosted(unit, {}) for unit in units}

    def join(self, link: FakeLink, header: CallHeader, frame: Frame) -> None:
        """Items came whose rows others will send."""
        assert self.desk is not None, f"{self.name} is no device"
        self.desk.on_join(DeviceSide(link), header, frame, self._hosted[header.unit])

    def forget(self, link: FakeLink) -> None:
        """A link is over, to this actor or from it."""
        for actor in (self, *self.others):
            if actor.desk is not None:
                actor.desk.on_link_closed(DeviceSide(link))

    def _enter(self, link: Link, header: CallHeader, item: Item, arrays: Sequence[Array]) -> None:
        assert isinstance(link, DeviceSide)
        header = CallHeader(0, header.unit, "run", [item], [])
        self.asked.append(Asked(link._link, header, item, list(arrays)))

    def take(self) -> Asked:
        """The oldest item that was not taken yet."""
        return self.asked.pop(0)


class FakeActors:
    """All actors by name; `dial` is what a router is given."""

    def __init__(self) -> None:
        self._actors: dict[str, FakeActor] = {}

    def __getitem__(self, name: str) -> FakeActor:
        return self._actors.setdefault(name, FakeActor(name, self))

    def __iter__(self) -> Iterator[FakeActor]:
        return iter(self._actors.values())

    async def dial(self, endpoint: Endpoint, handler: LinkHandler) -> Link:
        actor = self[endpoint.actor]
        actor.dialled_at.append(asyncio.get_running_loop().time())
        await asyncio.sleep(0)
        if actor.is_away:
            raise LinkClosed("nobody listens")
        link = FakeLink(actor, handler, endpoint)
        actor.links.append(link)
        if actor.dies_at_once:
            link.break_off()
        return link
