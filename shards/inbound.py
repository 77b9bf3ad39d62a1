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
from shards.hosted import Hosted, cut
from shards.replies import answers, send_answers
from shards.staging import Source
from shards.transport import Link

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
    """

    __slots__ = ("arrays", "hosted", "lengths", "link", "needs_cut")

    def __init__(
        self,
        link: Link,
        hosted: Hosted,
        arrays: Sequence[Array],
        lengths: tuple[int, ...],
        *,
        needs_cut: bool,
    ) -> None:
        self.link = link
        self.hosted = hosted
        self.arrays = arrays
        self.lengths = lengths
        self.needs_cut = needs_cut

    def answers_with(self, other: Inbound) -> bool:
        """Whether answers to both may share a frame."""
        return self is other or (self.link is other.link and self.lengths == other.lengths)

    def answer(
        self,
        unit: str,
        generation: int,
        items: list[tuple[int, int]],
        outputs: Sequence[Array],
    ) -> None:
        """Send rows back.

        Args:
            unit: the unit's id.
            generation: of this process.
            items: ``(request, rows)`` in the order of the rows.
            outputs: of the unit, these rows of them.
        """
        if self.needs_cut:
            outputs = [
                cut(output, cuts, self.lengths)
                for output, cuts in zip(outputs, self.hosted.cuts, strict=True)
            ]
        send_answers(self.link, unit, generation, answers(items, outputs))


#: A ticket's payload: whose frame its rows are in, under which request, from which row on.
Payload: TypeAlias = tuple[Inbound, int, int]


def payload_of(ticket: Ticket) -> Payload:
    """The payload of a ticket that the engine made."""
    payload: Payload = ticket.payload  # type: ignore[assignment]
    return payload


def sources_of(batch: Batch) -> tuple[Hosted, list[Source]]:
    """The unit of a batch, and where its rows are to be copied from, in their order."""
    sources: list[Source] = []
    hosted: Hosted | None = None
    for ticket, start, stop in batch.parts:
        inbound, _, first = payload_of(ticket)
        hosted = inbound.hosted
        begin, end = first + start, first + stop
        if sources and sources[-1].arrays is inbound.arrays and sources[-1].stop == begin:
            # Neighbours in a frame are copied as one run.
            sources[-1] = Source(inbound.arrays, sources[-1].start, end)
        else:
            sources.append(Source(inbound.arrays, begin, end))
    assert hosted is not None, "a batch without rows"
    return hosted, sources
