"""Rows that came in one frame: where they lie until they run, and how their answers go back.

Rows of several frames may run together, and rows of one frame apart. Decides which of them are
copied as one run and which answers may share a frame. Does not know when anything runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from batching.values import Batch, Ticket
from shards.executor import Bucket
from shards.hosted import Hosted, cut
from shards.replies import answers, send_answers
from shards.staging import Source
from shards.transport import Link
from shards.wire import Item

__all__ = ["Inbound", "Payload", "payload_of", "sources_of"]

Array = npt.NDArray[np.generic]


class Inbound:
    """The rows of one CALL frame; shared by the tickets of its items.

    Attributes:
        link: whence they came.
        hosted: the unit that they are for.
        arrays: the unit's inputs in order, rows of all items.
        lengths: sizes of the unit's symbols in these arrays.
        needs_cut: whether the bucket is larger than they are, so that answers must be cut.
        requests: where inputs are per request: the row of these inputs that belongs to the item
            that begins with a row.
    """

    __slots__ = ("arrays", "hosted", "lengths", "link", "needs_cut", "requests")

    def __init__(
        self,
        link: Link,
        hosted: Hosted,
        arrays: Sequence[Array],
        lengths: tuple[int, ...],
        items: Sequence[Item],
        *,
        needs_cut: bool,
    ) -> None:
        self.link = link
        self.hosted = hosted
        self.arrays = arrays
        self.lengths = lengths
        self.needs_cut = needs_cut
        self.requests: dict[int, int] = {}
        if hosted.per_request:
            at = 0
            for number, item in enumerate(items):
                self.requests[at] = number
                at += item.rows

    def answers_with(self, other: Inbound) -> bool:
        """Whether answers to both may share a frame."""
        return self is other or (self.link is other.link and self.lengths == other.lengths)

    def answer(
        self,
        unit: str,
        generation: int,
        items: list[tuple[int, int]],
        outputs: Sequence[Array],
        news: tuple[int, int] = (0, 0),
    ) -> None:
        """Send rows back.

        Args:
            unit: the unit's id.
            generation: of this process.
            items: ``(request, rows)`` in the order of the rows.
            outputs: of the unit, these rows of them.
            news: of the device, see `shards.replies.send_answers`.
        """
        if self.needs_cut:
            outputs = [
                cut(output, cuts, self.lengths)
                for output, cuts in zip(outputs, self.hosted.cuts, strict=True)
            ]
        send_answers(self.link, unit, generation, answers(items, outputs), news=news)


#: A ticket's payload: whose frame its rows are in, under which request, from which row on.
Payload: TypeAlias = tuple[Inbound, int, int]


def payload_of(ticket: Ticket) -> Payload:
    """The payload of a ticket that the engine made."""
    payload: Payload = ticket.payload  # type: ignore[assignment]
    return payload


def sources_of(batch: Batch) -> tuple[Hosted, Bucket, list[Source]]:
    """The unit of a batch, its bucket, and where its rows are copied from, in their order."""
    sources: list[Source] = []
    run_of: Inbound | None = None
    run_start = run_stop = requests = 0
    owners: list[tuple[int, int]] = []
    for ticket, start, stop in batch.parts:
        inbound, _, first = payload_of(ticket)
        if inbound is not run_of or first + start != run_stop:
            # Neighbours in a frame are copied as one run.
            if run_of is not None:
                sources.append(Source(run_of.arrays, run_start, run_stop, tuple(owners)))
                owners = []
            run_of = inbound
            run_start = first + start
        run_stop = first + stop
        if inbound.requests:
            # A part of a request takes its row along, whatever batch its other parts are in.
            owners.append((inbound.requests[first], stop - start))
            requests += 1
    assert run_of is not None, "a batch without rows"
    sources.append(Source(run_of.arrays, run_start, run_stop, tuple(owners)))
    hosted = run_of.hosted
    return hosted, hosted.bucket_for(batch.bucket, batch.lane.shape, requests), sources
