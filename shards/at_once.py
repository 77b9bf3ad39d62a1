"""Frames that find the device idle: one short step, run and answered where it was decided.

The short way from a frame to its answer, for steps so short that everything around them costs more
than they do: no ticket for each item, no line, nothing that waits. Whether it may be taken is the
batcher's decision (`batching.at_once`); where it may not, nothing has happened, and the engine goes
the long way. A step that fails is taken back and goes the long way, too, on which the row whose
fault it is will be found.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import inf
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from batching import Batcher, LaneKey
from batching.allowance import priority_of
from batching.values import Ticket
from shards.executor import Executor, Step, StepDescriptor
from shards.inbound import Inbound
from shards.metering import Meter
from shards.staging import Source, StagingPool
from shards.wire import CallHeader, Item

__all__ = ["Arrival", "ShortWay"]

Array = npt.NDArray[np.generic]


class Arrival(NamedTuple):
    """A frame that was read and not yet offered.

    Attributes:
        inbound: its rows.
        header: of the call.
        items: whose rows they are, in their order.
        key: the lane that they are for.
        rows: of all items.
        at: when it came.
    """

    inbound: Inbound
    header: CallHeader
    items: Sequence[Item]
    key: LaneKey
    rows: int
    at: float


class ShortWay:
    """Runs what it may at once. Every method runs on the engine's loop thread.

    Args:
        batcher: the engine's.
        staging: likewise.
        meter: likewise.
        generation: of this process, stamped on every reply.
        short_s: steps that cost less than this run on this thread.
        clock: seconds.
    """

    def __init__(
        self,
        batcher: Batcher,
        staging: StagingPool,
        meter: Meter,
        generation: int,
        short_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._batcher = batcher
        self._staging = staging
        self._meter = meter
        self._generation = generation
        self._short_s = short_s
        self._clock = clock

    def run(self, arrived: Sequence[Arrival], executor: Executor, sequence: int) -> bool:
        """Run what has come as one batch and answer it, if it is alike and nothing is before it.

        Args:
            arrived: at least one frame.
            executor: has no step.
            sequence: of the step.

        Returns:
            Whether all of it was answered; else nothing was.
        """
        ticket = self._ticket_of(arrived)
        if ticket is None:
            return False
        batch = self._batcher.at_once.begin(ticket, self._clock())
        if batch is None:
            return False
        shape = ticket.lane.shape
        layout = arrived[0].inbound.hosted.layouts[batch.bucket, shape]
        slot = self._staging.acquire()
        assert slot is not None, "no step is in flight, and no staging slot is free"
        descriptor = StepDescriptor(sequence, ticket.lane.unit, batch.bucket, shape, slot)
        sources = [Source(each.inbound.arrays, 0, each.rows) for each in arrived]
        result = executor.run_now(Step(descriptor, self._staging.views(slot, layout), sources))
        self._staging.release(slot)
        self._meter.landed(batch)
        now = self._clock()
        if result.outputs is None:
            self._batcher.at_once.undo(batch, now)
            return False
        began = time.perf_counter()
        news = self._batcher.admission.news(ticket, now, batch.id)
        self._answer(arrived, result.outputs, news)
        self._meter.delivered(batch, result.layout_s + time.perf_counter() - began)
        self._batcher.finish(batch.id, now)
        return True

    def _ticket_of(self, arrived: Sequence[Arrival]) -> Ticket | None:
        """All rows as one ticket; None where they differ, or their step is not short."""
        first = arrived[0]
        key, header, hosted = first.key, first.header, first.inbound.hosted
        if hosted.per_request:
            return None
        rows = requests = nbytes = 0
        deadline = inf
        for each in arrived:
            if each is not first and not _are_alike(each, first):
                return None
            items = each.items
            soonest_us = min([item.remaining_us for item in items], default=0)
            if soonest_us <= 0 or min([item.rows for item in items]) < 1:
                return None
            deadline = min(deadline, each.at + soonest_us * 1e-6)
            rows += each.rows
            requests += len(items)
            for array in each.inbound.arrays:
                nbytes += array.nbytes
        ladder = hosted.sizes.batches.get(key.shape)
        if ladder is None or rows > ladder.largest:
            return None
        if hosted.costs[ladder.bucket_of(rows), key.shape] >= self._short_s:
            return None
        owner = header.owner
        priority = priority_of(self._batcher.allowance_of(owner), header.criticality)
        return Ticket(key, rows, nbytes, deadline, (first.inbound, 0, 0), owner, priority, requests)

    def _answer(
        self, arrived: Sequence[Arrival], outputs: Sequence[Array], news: tuple[int, int]
    ) -> None:
        """Send everybody's rows, a frame for each run of neighbours that may share one."""
        unit = arrived[0].key.unit
        items: list[tuple[int, int]] = []
        start = at = 0
        before = arrived[0].inbound
        for each in arrived:
            if not before.answers_with(each.inbound):
                rows = [output[start:at] for output in outputs]
                before.answer(unit, self._generation, items, rows, news)
                items, start = [], at
            before = each.inbound
            items += [(item.request, item.rows) for item in each.items]
            at += each.rows
        rows = [output[start:at] for output in outputs]
        before.answer(unit, self._generation, items, rows, news)


def _are_alike(one: Arrival, other: Arrival) -> bool:
    """Whether their rows are for the same lane, in the name of the same servable."""
    mine, its = one.header, other.header
    return (
        one.key == other.key
        and one.inbound.lengths == other.inbound.lengths
        and mine.owner == its.owner
        and mine.criticality == its.criticality
    )
