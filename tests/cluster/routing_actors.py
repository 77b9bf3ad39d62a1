"""Actors as a router sees them, played by the test: they record what comes and answer when told.

Frames are encoded and decoded by the real code, so a misaligned body or a wrong header fails here
as it would on a socket.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from batching.errors import ServingError
from shards.errors import LinkClosed
from shards.handshake import PeerInfo
from shards.orders import Endpoint
from shards.transport import Link, LinkHandler
from shards.wire import (
    Buffer,
    CallHeader,
    CancelHeader,
    Frame,
    FrameKind,
    Item,
    ItemError,
    ReplyHeader,
    decode_tensors,
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

    def answer(self, *outputs: Array, unit: str | None = None, rows: int | None = None) -> None:
        """Send rows back."""
        count = self.item.rows if rows is None else rows
        self.link.reply([(self.item.request, count)], outputs, unit or self.header.unit)

    def refuse(self, code: str, message: str = "no", retry_after_ms: int = 0) -> None:
        """Send an error back."""
        error = ItemError(self.item.request, code, message, retry_after_ms)
        self.link.reply([], (), self.header.unit, [error])


class FakeLink:
    """A link whose other end is the test."""

    def __init__(self, actor: FakeActor, handler: LinkHandler) -> None:
        self.actor = actor
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
            return
        assert kind is FrameKind.CALL
        assert isinstance(header, CallHeader)
        body = b"".join(bytes(buffer) for buffer in buffers)
        arrays = decode_tensors(header.tensors, memoryview(body))
        self.calls.append((header, arrays))
        self.body_bytes.append(len(body))
        at = 0
        for item in header.items:
            start, at = at, at + item.rows
            rows = [array[start:at] for array in arrays]
            self.actor.asked.append(Asked(self, header, item, rows))
        assert all(len(array) == at for array in arrays)

    def close(self, reason: str = "") -> None:
        if self._open:
            self._open = False
            asyncio.get_running_loop().call_soon(self._handler.on_closed, self, None)

    def reply(
        self,
        items: list[tuple[int, int]],
        outputs: Sequence[Array],
        unit: str,
        errors: Sequence[ItemError] = (),
    ) -> None:
        """Send a REPLY frame; one that comes too late for the link is lost."""
        if not self._open:
            return
        headers, buffers = encode_tensors(outputs)
        body = memoryview(b"".join(bytes(buffer) for buffer in buffers))
        header = ReplyHeader(unit, 1, items, headers, list(errors))
        self._handler.on_frame(self, Frame(FrameKind.REPLY, 0, header, body))

    def break_off(self, error: Exception | None = None) -> None:
        """The actor's process dies."""
        if self._open:
            self._open = False
            self._handler.on_closed(self, error or LinkClosed("connection reset"))


class FakeActor:
    """Where a name's links lead.

    Attributes:
        asked: items that came, over whatever link, oldest first.
        links: every link there ever was.
        is_away: dialling fails.
        dialled_at: when somebody tried.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.asked: list[Asked] = []
        self.links: list[FakeLink] = []
        self.is_away = False
        self.dies_at_once = False
        self.dialled_at: list[float] = []

    @property
    def link(self) -> FakeLink:
        return self.links[-1]

    def take(self) -> Asked:
        """The oldest item that was not taken yet."""
        return self.asked.pop(0)


class FakeActors:
    """All actors by name; `dial` is what a router is given."""

    def __init__(self) -> None:
        self._actors: dict[str, FakeActor] = {}

    def __getitem__(self, name: str) -> FakeActor:
        return self._actors.setdefault(name, FakeActor(name))

    async def dial(self, endpoint: Endpoint, handler: LinkHandler) -> Link:
        actor = self[endpoint.actor]
        actor.dialled_at.append(asyncio.get_running_loop().time())
        await asyncio.sleep(0)
        if actor.is_away:
            raise LinkClosed("nobody listens")
        link = FakeLink(actor, handler)
        actor.links.append(link)
        if actor.dies_at_once:
            link.break_off()
        return link
