"""The actors a router talks to: one link each, kept open, and what waits to be sent.

Rows that different requests send to the same unit in one turn of the event loop leave in one
frame, and so do look-ups in several tables of one actor: waking an actor costs it more than the
rows of ten small requests do (measured at 32 connections: 32 us of its CPU a request with frames
of 8, 23 us with frames of a turn). A peer that is away refuses at once; nothing is queued for it,
since its rows would only grow old.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from batching.allowance import CRITICAL
from batching.busyness import Busyness
from batching.errors import ServingError, Unavailable
from cluster.dialing import Dial
from cluster.pace import Pace
from shards.errors import FrameRefused, LinkClosed
from shards.orders import Endpoint
from shards.together import SHAREABLE_OPS, TOGETHER_BYTES_MAX, TOGETHER_MAX, joined
from shards.transport import Link
from shards.wire import (
    ALIGNMENT,
    Buffer,
    CallHeader,
    CancelHeader,
    Frame,
    FrameKind,
    Header,
    Item,
    ReplyHeader,
    TableRef,
    TensorHeader,
    encode_tensors,
    requests_of,
)

__all__ = ["Peer", "PeerOwner"]

logger = logging.getLogger(__name__)

Array = npt.NDArray[np.generic]

#: The rows of one frame are no more than this, so that a frame is a few hundred microseconds of
#: work; a request that has more travels alone.
_FRAME_BYTES_MAX = 1 << 20
#: So many items leave without waiting for the end of the turn: the actor has enough to do.
_FRAME_ITEMS_MAX = 64
#: Copying a small array costs less than a view of it.
_COPY_BYTES_MAX = 4096
_RECONNECT_FIRST_S = 0.05
_RECONNECT_MAX_S = 2.0


class PeerOwner(Protocol):
    """Who a peer reports to: the router."""

    def on_reply(self, peer: Peer, frame: Frame) -> None:
        """A REPLY frame came."""

    def on_unsent(self, peer: Peer, requests: list[int], error: ServingError) -> None:
        """These requests could not be sent."""

    def on_peer_lost(self, peer: Peer, error: Exception) -> None:
        """The link broke; whatever was asked over it will not be answered."""


class _Group:
    """Rows for one unit that will share a frame."""

    __slots__ = (
        "arrays", "criticality", "epoch", "items", "nbytes", "op", "owner", "plan", "reply_to",
        "tables", "unit",
    )  # fmt: skip

    def __init__(
        self,
        owner: str,
        unit: str,
        op: str,
        epoch: int,
        plan: str,
        reply_to: Endpoint | None,
        criticality: int,
        tables: tuple[TableRef, ...],
    ) -> None:
        self.owner = owner
        self.tables = tables
        self.unit = unit
        self.op = op
        self.epoch = epoch
        self.plan = plan
        self.reply_to = reply_to
        self.criticality = criticality
        self.items: list[Item] = []
        self.arrays: list[tuple[Array, ...]] = []
        self.nbytes = 0


class Peer:
    """One actor, as a router sees it. Everything happens on the loop thread.

    Attributes:
        endpoint: where it is.
        in_flight: calls that are under way.
        busyness: what it said of itself.
        pace: how quickly it answers parts of look-ups.
        sent_bytes: of the tensors of calls.
        received_bytes: of the tensors of answers.
    """

    def __init__(
        self, endpoint: Endpoint, owner: PeerOwner, dial: Dial, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.endpoint = endpoint
        self.in_flight = 0
        self.busyness = Busyness()
        self.pace = Pace()
        self.sent_bytes = self.received_bytes = 0
        self._owner = owner
        self._dial = dial
        self._loop = loop
        self._link: Link | None = None
        self._groups: dict[object, _Group] = {}
        self._cancels: list[int] = []
        self._flushing = False
        self._retired = False
        self._stillborn: Link | None = None
        #: who waits for what the actor says of itself
        self._question: Callable[[Frame | None], None] | None = None
        self._task = loop.create_task(self._connect())

    @property
    def is_up(self) -> bool:
        """Whether the link is open."""
        return self._link is not None

    async def wait_up(self, timeout_s: float) -> bool:
        """Wait for the first connection; False if it did not come in time."""
        done, _ = await asyncio.wait({self._task}, timeout=timeout_s)
        return bool(done) and self.is_up

    def send(
        self,
        owner: str,
        unit: str,
        op: str,
        epoch: int,
        item: Item,
        arrays: tuple[Array, ...],
        key: tuple[object, ...] | None,
        plan: str = "",
        reply_to: Endpoint | None = None,
        criticality: int = CRITICAL,
        tables: tuple[TableRef, ...] = (),
    ) -> None:
        """Put an item's rows into a frame that leaves at the end of this turn, or at once.

        What cannot be sent is reported to the owner, which must know the request by now.

        Args:
            owner: name of the servable that the request asks.
            unit: the unit's id.
            op: ``run``, ``later``, ``rows`` or ``join``; items of different ones share no frame.
            epoch: the request's epoch.
            item: request number, rows and remaining time.
            arrays: the unit's inputs in order, the item's rows first.
            key: names the frame: items of equal keys have rows of the same unit and shape. None
                for an item that shares a frame with none. Items of one key have one plan, and go
                on to one actor.
            plan: hash of how the unit is cut, "" where it is whole.
            reply_to: who gets the rows that the item asks for, None for this process.
            criticality: the most that the rows may have; items of different ones share no frame.
            tables: that the unit stands for, where these are several.

        Raises:
            Unavailable: the peer is away.
        """
        if self._link is None:
            raise Unavailable(f"actor {self.endpoint.actor} is away", 1000)
        nbytes = 0
        for array in arrays:
            nbytes += array.nbytes
        name: object = item if key is None else (epoch, owner, op, criticality, key)
        group = self._groups.get(name)
        if group is not None and group.nbytes + nbytes > _FRAME_BYTES_MAX:
            self._send_groups([self._groups.pop(name)])
            group = None
        if group is None:
            group = self._groups[name] = _Group(
                owner, unit, op, epoch, plan, reply_to, criticality, tables
            )
        group.items.append(item)
        group.arrays.append(arrays)
        group.nbytes += nbytes
        if len(group.items) >= _FRAME_ITEMS_MAX:
            self._send_groups([self._groups.pop(name)])
        elif not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def cancel(self, request: int) -> None:
        """Tell the peer that an answer is no longer wanted."""
        if self._link is not None:
            self._cancels.append(request)
            if not self._flushing:
                self._flushing = True
                self._loop.call_soon(self._flush)

    def ask(self, header: CallHeader, then: Callable[[Frame | None], None]) -> bool:
        """Ask the actor itself: a call for no unit. One question at a time.

        Args:
            header: the question.
            then: told the reply, or None if the link was lost; perhaps never.

        Returns:
            Whether it was sent; not while the actor is away or owes the last answer.
        """
        link = self._link
        if link is None or self._question is not None:
            return False
        try:
            link.send(FrameKind.CALL, header)
            link.flush()
        except ServingError:  # full or closing
            return False
        self._question = then
        return True

    def retire(self) -> None:
        """The epoch no longer names this actor: close, and do not come back."""
        self._retired = True
        self._task.cancel()
        if self._link is not None:
            self._link.close("no longer routed to")

    # LinkHandler

    def on_frame(self, link: Link, frame: Frame) -> None:
        """Pass replies on; anything else from an actor is ignored."""
        if frame.kind == FrameKind.REPLY:
            if self._question is not None and _is_answer(frame):
                question, self._question = self._question, None
                question(frame)
                return
            self.pace.late_until = 0.0
            self.received_bytes += _nbytes_of(frame)
            self._owner.on_reply(self, frame)

    def on_refused(self, link: Link, header: Header, error: FrameRefused) -> None:
        """Report the requests of a call that the actor does not take."""
        if isinstance(header, CallHeader):
            self._owner.on_unsent(self, sorted(requests_of(header)), error)

    def on_closed(self, link: Link, error: Exception | None) -> None:
        """Report the loss, then try to come back unless retired."""
        self._link = None
        question, self._question = self._question, None
        if question is not None:
            question(None)
        self._groups.clear()
        self._cancels.clear()
        reason = error or LinkClosed("closed by the peer")
        logger.info("the link to %s is closed: %s", self.endpoint.actor, reason)
        self._owner.on_peer_lost(self, reason)
        if not self._task.done():
            self._stillborn = link  # it closed before the dial's outcome was looked at
        elif not self._retired:
            self._task = self._loop.create_task(self._connect())

    async def _connect(self) -> None:
        delay_s = _RECONNECT_FIRST_S
        while not self._retired:
            try:
                link = await self._dial(self.endpoint, self)
            except Exception as error:  # whatever it was, the next try may find the peer back
                logger.info("cannot reach %s: %s", self.endpoint.actor, error)
            else:
                if link is not self._stillborn:
                    self._link = link
                    return
                self._stillborn = None
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, _RECONNECT_MAX_S)

    def _flush(self) -> None:
        self._flushing = False
        groups = list(self._groups.values())
        self._groups.clear()
        if len(groups) == 1:
            self._send_groups(groups)
        else:
            for some in _together(groups):
                self._send_groups(some)
        if self._cancels:
            requests, self._cancels = self._cancels, []
            if self._link is not None:
                with contextlib.suppress(ServingError):  # answers that nobody wants cost no more
                    self._link.send(FrameKind.CANCEL, CancelHeader(requests=requests))

    def _send_groups(self, groups: list[_Group]) -> None:
        """Send these in one frame."""
        link = self._link
        if link is None:
            return  # lost in this very turn; `on_peer_lost` has told its requests
        try:
            if len(groups) == 1:
                header, buffers = _call_of(groups[0])
            else:
                header, buffers = joined([_call_of(group) for group in groups])
            link.send(FrameKind.CALL, header, buffers)
            link.flush()
            for group in groups:
                self.sent_bytes += group.nbytes
        except ServingError as error:  # full, closing or unfit: only this frame's requests suffer
            if isinstance(error, LinkClosed):
                self._link = None  # `on_closed` follows; who is retried must not come here
            # Told in a turn of its own: a request may be in the middle of sending its other parts.
            requests = [item.request for group in groups for item in group.items]
            self._loop.call_soon(self._owner.on_unsent, self, requests, error)


def _is_answer(frame: Frame) -> bool:
    """Whether the frame answers a question to the actor itself."""
    header = frame.header
    return isinstance(header, ReplyHeader) and not header.unit


def _together(groups: list[_Group]) -> list[list[_Group]]:
    """Which groups share a frame: look-ups, as long as no frame grows too large."""
    frames: list[list[_Group]] = []
    shared: list[_Group] = []
    nbytes = 0
    for group in groups:
        if group.op not in SHAREABLE_OPS:
            frames.append([group])
            continue
        if shared and (nbytes + group.nbytes > TOGETHER_BYTES_MAX or len(shared) >= TOGETHER_MAX):
            frames.append(shared)
            shared, nbytes = [], 0
        shared.append(group)
        nbytes += group.nbytes
    if shared:
        frames.append(shared)
    return frames


def _call_of(group: _Group) -> tuple[CallHeader, list[Buffer]]:
    tensors, buffers = _tensors_of(group)
    header = CallHeader(
        group.epoch, group.unit, group.op, group.items, tensors, group.plan, group.reply_to,
        group.owner, group.criticality, (), group.tables,
    )  # fmt: skip
    return header, buffers


def _nbytes_of(reply: Frame) -> int:
    """Bytes of the tensors of a reply, without what lies between them."""
    header = reply.header
    assert isinstance(header, ReplyHeader)
    nbytes = 0
    for tensor in header.tensors:
        nbytes += tensor.nbytes
    for each in header.also:
        nbytes += sum([tensor.nbytes for tensor in each.tensors])
    return nbytes


def _tensors_of(group: _Group) -> tuple[list[TensorHeader], list[Buffer]]:
    """The rows of all items, tensor by tensor, as `shards.wire` lays them out."""
    first = group.arrays[0]
    if len(group.arrays) == 1:
        return encode_tensors(first)
    tensors: list[TensorHeader] = []
    buffers: list[Buffer] = []
    at = 0
    for index, array in enumerate(first):
        if gap := -at % ALIGNMENT:
            buffers.append(bytes(gap))
            at += gap
        pieces = [_bytes_of(arrays[index]) for arrays in group.arrays]
        # Not always the items' rows: of what is per request each item has one.
        shape = (sum([len(arrays[index]) for arrays in group.arrays]), *array.shape[1:])
        nbytes = sum(map(len, pieces))
        tensors.append(TensorHeader(_name_of(array.dtype), shape, nbytes))
        buffers.extend(pieces)
        at += nbytes
    return tensors, buffers


@lru_cache(maxsize=64)
def _name_of(dtype: np.dtype[np.generic]) -> str:
    """NumPy makes the name anew each time that it is asked."""
    return dtype.name


def _bytes_of(array: Array) -> Buffer:
    if array.nbytes < _COPY_BYTES_MAX:
        return array.tobytes()
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
