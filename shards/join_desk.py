"""The joins of a device actor: rows that shards send straight to it, put into their places.

The shell around `shards.joining`: it reads frames, holds the arrays that the core does not look
at, and hands an item whose rows are all here to the engine, as if it had come in one piece. A row
goes where the router said that it belongs, so the result is bit-equal to one that a router put
together. Used on the loop thread alone. It does not know lanes, batches or the device.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final, cast

import numpy as np
import numpy.typing as npt

from batching.errors import Code, Internal, InvalidArgument, ServingError
from shards.hosted import Hosted
from shards.joining import Complete, Effect, JoinBounds, Joins, Opening, Part, Place, Refused
from shards.replies import refuse
from shards.transport import Link
from shards.wire import NO_SLOT, CallHeader, Frame, Item, ItemError, Join, decode_tensors

__all__ = ["JoinDesk"]

logger = logging.getLogger(__name__)

Array = npt.NDArray[np.generic]

#: Rows are awaited for about a network's round trip. Whoever asked ends the request at its deadline
#: and says so; this only clears away what nobody will speak of again.
_SWEEP_S: Final = 0.25


class _Assembly:
    """One item, as far as its rows are here."""

    __slots__ = ("arrays", "deadline", "header", "item", "link", "places", "ruined")

    def __init__(
        self, link: Link, header: CallHeader, item: Item, arrays: list[Array], deadline: float
    ) -> None:
        self.link = link
        self.header = header
        self.item = item
        #: inputs in order; those that are awaited come to be with their first rows
        self.arrays = arrays
        self.deadline = deadline
        #: for every tensor that is awaited: the slot of each row, and the shape and dtype it gets
        self.places: dict[int, tuple[Array, tuple[int, ...], np.dtype[np.generic]]] = {}
        self.ruined = False

    def await_rows(self, join: Join, hosted: Hosted) -> int:
        """Work out what is awaited; returns the bytes that it will have.

        Raises:
            InvalidArgument: what the item says of its parts is not so.
        """
        nbytes = 0
        for tensor in {part.tensor for part in join.parts}:
            if tensor >= len(self.arrays) or len(self.arrays) != len(hosted.dtypes):
                raise InvalidArgument("a part is for a tensor that the unit does not take")
            slots, dim = self.arrays[tensor], (hosted.row_shapes[tensor] or ("",))[-1]
            if slots.dtype != np.uint16 or not isinstance(dim, int):
                raise InvalidArgument("rows of this tensor cannot come in parts")
            shape, dtype = (*slots.shape, dim), hosted.dtypes[tensor]
            flat = slots.reshape(-1)
            # Together with the count of each slot, which `place` checks, this leaves no row that
            # is in none of the parts and would silently be zero.
            promised = sum(part.rows for part in join.parts if part.tensor == tensor)
            if int(np.count_nonzero(flat != NO_SLOT)) != promised:
                raise InvalidArgument("the parts of a tensor do not add up to its rows")
            self.places[tensor] = (flat, shape, dtype)
            nbytes += flat.size * dim * dtype.itemsize
        return nbytes + sum(array.nbytes for array in self.arrays)

    def place(self, slot: int, rows: Array) -> None:
        """Put the rows of a part where they belong.

        Raises:
            ServingError: they cannot be.
        """
        assert self.item.join is not None
        tensor = self.item.join.parts[slot].tensor
        flat, shape, dtype = self.places[tensor]
        if rows.dtype != dtype or rows.shape[1:] != shape[-1:]:
            raise Internal(f"a shard sent {rows.dtype}{list(rows.shape)} for {dtype}{list(shape)}")
        where = np.flatnonzero(flat == slot)
        if len(where) != len(rows):
            raise InvalidArgument(f"slot {slot} has {len(where)} places for {len(rows)} rows")
        if len(rows) == flat.size:
            self.arrays[tensor] = rows.reshape(shape)
            return
        out = self.arrays[tensor]
        if out.dtype != dtype or out.shape != shape:
            out = self.arrays[tensor] = np.zeros(shape, dtype)
        out.reshape(-1, shape[-1])[where] = rows


class JoinDesk:
    """Takes the frames that have to do with joins.

    Args:
        loop: the loop whose thread this is.
        enter: puts a whole item into its lane: link, header of its call, item, arrays.
        generation: of this process.
        clock: seconds, on the scale of the loop's own time.
        bounds: of what is held.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        enter: Callable[[Link, CallHeader, Item, Sequence[Array]], None],
        generation: int,
        clock: Callable[[], float],
        bounds: JoinBounds | None = None,
    ) -> None:
        self._loop = loop
        self._enter = enter
        self._generation = generation
        self._clock = clock
        self._joins = Joins(bounds)
        #: join numbers of the requests of each link
        self._requests: dict[Link, dict[int, int]] = {}
        self._sweeping: asyncio.TimerHandle | None = None

    @property
    def mismatched(self) -> int:
        """Parts that were refused because they were not what was awaited."""
        return self._joins.stats.mismatched

    def on_join(self, link: Link, header: CallHeader, frame: Frame, hosted: Hosted) -> None:
        """Open a join for every item of a frame.

        Raises:
            ServingError: the frame makes no sense.
        """
        arrays = decode_tensors(header.tensors, frame.body)
        total = sum(item.rows for item in header.items)
        per_request = hosted.per_request or (False,) * len(arrays)
        if len(arrays) != len(per_request) or any(
            array.shape[:1] != (len(header.items) if per else total,)
            for array, per in zip(arrays, per_request, strict=True)
        ):
            raise InvalidArgument("the items' rows do not add up to the tensors' rows")
        now = self._clock()
        at = 0
        for number, item in enumerate(header.items):
            start, at = at, at + item.rows
            own = [
                array[number : number + 1] if per else array[start:at]
                for array, per in zip(arrays, per_request, strict=True)
            ]
            deadline = now + item.remaining_us * 1e-6
            assembly = _Assembly(link, header, item, own, deadline)
            self._open(assembly, header.epoch, hosted, now)
        self._sweep_later()

    def on_part(self, link: Link, header: CallHeader, frame: Frame) -> None:
        """Take the parts in a frame that a shard sent.

        Raises:
            ServingError: the frame makes no sense.
        """
        arrays = decode_tensors(header.tensors, frame.body)
        total = sum(item.rows for item in header.items)
        if len(arrays) != 1 or arrays[0].ndim != 2 or len(arrays[0]) != total:
            raise InvalidArgument("a frame of parts has one tensor [rows, dim]")
        if any(item.continuation is None for item in header.items):
            raise InvalidArgument("a part must say what it is a part of")
        now = self._clock()
        peer = link.peer
        at = 0
        for item in header.items:
            start, at = at, at + item.rows
            rows = arrays[0][start:at]
            assert item.continuation is not None
            part = Part(
                number=item.continuation.request,
                slot=item.continuation.slot,
                actor=peer.name,
                generation=peer.generation,
                epoch=header.epoch,
                plan=header.plan,
                rows=item.rows,
                nbytes=rows.nbytes,
                deadline=now + item.remaining_us * 1e-6,
                payload=rows,
            )
            self._carry_out(self._joins.arrive(part, now))
        self._sweep_later()

    def on_cancel(self, link: Link, request: int) -> None:
        """Nobody waits for this request any more."""
        number = self._requests.get(link, {}).get(request)
        if number is not None:
            self._forget(link, request)
            self._joins.close(number)

    def on_link_closed(self, link: Link) -> None:
        """Drop what a peer that is gone asked for; end what waits for rows from it."""
        for number in self._requests.pop(link, {}).values():
            self._joins.close(number)
        self._carry_out(self._joins.lose(link.peer.name, link.peer.generation))

    def _open(self, assembly: _Assembly, epoch: int, hosted: Hosted, now: float) -> None:
        item = assembly.item
        try:
            if item.join is None:
                raise InvalidArgument("an item of a join must say what it awaits")
            opening = Opening(
                number=item.join.request,
                epoch=epoch,
                parts=item.join.parts,
                nbytes=assembly.await_rows(item.join, hosted),
                deadline=assembly.deadline,
                owner=assembly,
            )
        except ServingError as error:
            self._refuse(assembly, error.code, error.message)
            return
        self._requests.setdefault(assembly.link, {})[item.request] = opening.number
        self._carry_out(self._joins.open(opening, now))

    def _carry_out(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            assembly = cast(_Assembly, effect.owner)
            if assembly.ruined:
                continue
            match effect:
                case Place(_, slot, payload):
                    try:
                        assembly.place(slot, cast(Array, payload))
                    except ServingError as error:
                        self._joins.close(cast(Join, assembly.item.join).request)
                        self._refuse(assembly, error.code, error.message)
                case Complete():
                    self._complete(assembly)
                case Refused(_, code, message, retry_after_ms):
                    self._refuse(assembly, code, message, retry_after_ms)

    def _complete(self, assembly: _Assembly) -> None:
        link, item = assembly.link, assembly.item
        self._forget(link, item.request)
        remaining_us = int((assembly.deadline - self._clock()) * 1e6)
        whole = Item(item.request, item.rows, remaining_us, item.trace)
        self._enter(link, assembly.header, whole, assembly.arrays)

    def _refuse(
        self, assembly: _Assembly, code: str, message: str, retry_after_ms: int = 0
    ) -> None:
        assembly.ruined = True
        link, request = assembly.link, assembly.item.request
        self._forget(link, request)
        count = self._joins.stats.refused
        if code != Code.DEADLINE_EXCEEDED and count & (count - 1) == 0:  # the log must not fill
            logger.warning("rows of look-ups could not be joined, the %d. time: %s", count, message)
        error = ItemError(request, code, message, retry_after_ms)
        refuse(link, assembly.header.unit, [error], self._generation)

    def _forget(self, link: Link, request: int) -> None:
        requests = self._requests.get(link)
        if requests is not None:
            requests.pop(request, None)
            if not requests:
                del self._requests[link]

    def _sweep_later(self) -> None:
        if self._sweeping is None and not self._joins.is_idle:
            self._sweeping = self._loop.call_later(_SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        self._sweeping = None
        self._carry_out(self._joins.poll(self._clock()))
        self._sweep_later()
