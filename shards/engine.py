"""What a device actor does with frames: rows into lanes, batches onto the device, rows back.

The engine is the shell around `batching.Batcher`: it owns the queue of everything that waits for
one device, on the loop thread. It turns the items of a CALL frame into tickets, hands formed
batches to the executor as steps, and turns finished steps into REPLY frames. Which rows run next,
in which bucket and which are dropped is the batcher's decision.

It does not know Ray, models or versions: units are named by identity, so rows of every servable
that uses a unit share its lane.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from batching import Batcher, LaneKey, bucketize
from batching.allowance import priority_of
from batching.errors import (
    DeadlineExceeded,
    Internal,
    ResourceExhausted,
    ServingError,
)
from batching.values import (
    Batch,
    Effect,
    Expired,
    Failed,
    Run,
    Shed,
    Ticket,
    TicketState,
)
from shards.at_once import Arrival, ShortWay
from shards.awake import FEW, Awake
from shards.errors import DeviceLost, NotHosted
from shards.executor import Executor, Step, StepDescriptor, StepResult
from shards.faults import end_process
from shards.hosted import Hosted
from shards.inbound import Inbound, payload_of, sources_of
from shards.join_desk import JoinDesk
from shards.lanes import UnitLanes
from shards.metering import Meter
from shards.questions import STATISTICS, answer
from shards.replies import code_of, refuse, refuse_all
from shards.staging import StagingPool
from shards.transport import Link
from shards.watchdog import Watchdog
from shards.wire import LATER, CallHeader, Frame, Item, ItemError, decode_tensors

__all__ = ["DeviceEngine"]

Array = npt.NDArray[np.generic]


#: Reading a member off an enum class costs more than the comparison that it is for.
_RUNNING: Final = TicketState.RUNNING
#: A step that takes so many times what it took when it was warmed is not slow, but stuck: it may
#: share the device with the steps before it, and the machine with others.
_SLOWER_MAX: Final = 20.0
_SHED: Final = "the device is too busy to answer by the deadline"
_EVICTED: Final = "more critical requests have taken this one's place in line"
_WAITING: Final = TicketState.WAITING


class DeviceEngine:
    """Serves the map units of one device. Every method runs on the loop thread.

    Attributes:
        meter: what is counted.

    Args:
        loop: the loop whose thread this is.
        executor: runs steps; its results must be passed to `results` (any thread).
        batcher: decides; nobody else may drive it.
        generation: of this process, stamped on every reply.
        in_flight_max: steps on the device at once; the staging pool has one slot more, so that
            the next batch can be laid out while the device is busy.
        run_now_s: steps that cost less than this run on the loop's own thread while the
            executor has none: for a program of 30 us, two thread switches each way cost more than
            the program (measured on a CPU). 0 where launching is not running.
        clock: seconds, on the scale of the loop's own time.
        awake_s: while this thread runs the steps, its loop looks for more for so long
            (`shards.awake`). While another has one it does not, as the two share Python's lock.
        step_s_max: a step that is on the device for longer, and for much longer than its like took
            when it was warmed, will not come back.
        on_lost: told, once or more, why the device is of no use any more. It should end the
            process, so that another one can have the device; rows that are still here then fail.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        batcher: Batcher,
        generation: int,
        in_flight_max: int = 2,
        run_now_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        step_s_max: float = 60.0,
        on_lost: Callable[[str], None] = end_process,
        awake_s: float = 0.0,
    ) -> None:
        self._loop = loop
        self._step_s_max = step_s_max
        self._on_lost = on_lost
        self._watchdog = Watchdog(loop, step_s_max / 4, self._stuck_step, on_lost)
        self._clock = clock
        self._executor: Executor | None = None
        self._batcher = batcher
        self._generation = generation
        self._desk = JoinDesk(loop, self._enter_joined, generation, clock)
        self._staging = StagingPool(in_flight_max + 1)
        self.meter = Meter(batcher, clock)
        self.meter.staging_bytes = lambda: self._staging.nbytes
        self._lanes = UnitLanes(loop, batcher, self._staging, self.meter.units, self._offer_arrived)
        self._units = self._lanes.units
        self._running: dict[int, Batch] = {}
        self._sequence = 0
        self._tickets: dict[Link, dict[int, Ticket]] = {}
        self._results: deque[StepResult] = deque()
        #: outputs of tickets that were split over batches: (first row of the part, its rows)
        self._pieces: dict[Ticket, list[tuple[int, list[Array]]]] = {}
        self._wakeup: asyncio.TimerHandle | None = None
        self._wakeup_at = 0.0
        self._pumping = False
        self._run_now_s = run_now_s
        self._awake = Awake(loop, awake_s, clock)
        self._pump_is_due = False
        #: frames that are offered when the batcher is next asked
        self._arrived: list[Arrival] = []
        self._short_way = ShortWay(batcher, self._staging, self.meter, generation, run_now_s, clock)
        #: steps that the executor thread has; a short step runs here only while it has none
        self._away: set[int] = set()

    def attach(self, executor: Executor) -> None:
        """Set the executor; it needs `results`, so it is made after the engine."""
        self._executor = executor
        self._lanes.attach(executor)

    @property
    def staging_bytes(self) -> int:
        """Memory held for laying out batches."""
        return self._staging.nbytes

    @property
    def lanes(self) -> UnitLanes:
        """The units that are served, to install, resize and remove them."""
        return self._lanes

    @property
    def parts_mismatched(self) -> int:
        """Parts of joins that were refused because they were not what was awaited."""
        return self._desk.mismatched

    # Frames

    def on_call(self, link: Link, frame: Frame) -> None:
        """Offer every item of a frame to its lane; refuse those that cannot wait there."""
        header = frame.header
        assert isinstance(header, CallHeader)
        try:
            if header.op == "part":
                self._desk.on_part(link, header, frame)
            elif header.op == "join":
                self._desk.on_join(link, header, frame, self._hosted(header.unit))
            elif header.op == STATISTICS:
                answer(link, header, self._generation, self.meter.encoded())
                return
            else:
                arrays = decode_tensors(header.tensors, frame.body)
                self._enter(link, header, header.items, arrays)
        except ServingError as error:
            code = code_of(error)
            refuse_all(link, header.unit, header.items, code, error.message, self._generation)
            return
        if self._run_now_s:
            self._pump_soon()
            if not self._away and len(header.items) <= FEW:
                self._awake.heard()
        else:
            self._pump()

    def _hosted(self, unit: str) -> Hosted:
        hosted = self._units.get(unit)
        if hosted is None:
            raise NotHosted("the unit is not hosted here")
        return hosted

    def _enter_joined(
        self, link: Link, header: CallHeader, item: Item, arrays: Sequence[Array]
    ) -> None:
        """Rows of an item that came in parts are all here."""
        try:
            self._enter(link, header, [item], arrays)
        except ServingError as error:
            code = code_of(error)
            refuse_all(link, header.unit, [item], code, error.message, self._generation)

    def _enter(
        self, link: Link, header: CallHeader, items: Sequence[Item], arrays: Sequence[Array]
    ) -> None:
        """Offer the rows of items to the lane of their shape.

        Raises:
            ServingError: they are not rows of a unit that is hosted here.
        """
        hosted = self._hosted(header.unit)
        rows = sum([item.rows for item in items])
        sizes = hosted.bind(arrays, rows, len(items))
        key = LaneKey(header.unit, bucketize(sizes, hosted.ladders))
        lengths = tuple([sizes[symbol] for symbol in hosted.symbols])
        inbound = Inbound(link, hosted, arrays, lengths, items, needs_cut=lengths != key.shape)
        arrival = Arrival(inbound, header, items, key, rows, self._clock())
        if self._run_now_s:
            # Frames that came in one read are offered together before anything runs.
            self._arrived.append(arrival)
        else:
            self._offer(arrival)

    def _offer_arrived(self) -> None:
        arrived, self._arrived = self._arrived, []
        for arrival in arrived:
            self._offer(arrival)

    def _offer(self, arrival: Arrival) -> None:
        inbound, header, items, key, _, now = arrival
        link = inbound.link
        row_bytes, own_bytes = inbound.hosted.bytes_of(inbound.arrays)
        tickets = self._tickets.setdefault(link, {})
        owner = header.owner
        priority = priority_of(self._batcher.allowance_of(owner), header.criticality)
        is_later = header.op == LATER
        offered: list[Ticket] = []
        at = 0
        for item in items:
            rows = item.rows
            payload = (inbound, item.request, at)
            at += rows
            deadline = now + item.remaining_us * 1e-6
            nbytes = rows * row_bytes + own_bytes
            ticket = Ticket(key, rows, nbytes, deadline, payload, owner, priority)
            tickets[item.request] = ticket
            offered.append(ticket)
        refused = self._batcher.offer_all(offered, now, is_later=is_later) if offered else ()
        if refused:
            errors: list[ItemError] = []
            for ticket, error in refused:
                _, request, _ = payload_of(ticket)
                if tickets.get(request) is ticket:
                    del tickets[request]
                errors.append(ItemError(request, error.code, error.message, error.retry_after_ms))
            refuse(link, key.unit, errors, self._generation)

    def on_cancel(self, link: Link, requests: Sequence[int]) -> None:
        """Drop rows whose answer nobody wants."""
        self._offer_arrived()
        tickets = self._tickets.get(link, {})
        now = self._clock()
        for request in requests:
            ticket = tickets.pop(request, None)
            if ticket is not None:
                self._batcher.cancel(ticket, now)
                self._pieces.pop(ticket, None)
            else:
                self._desk.on_cancel(link, request)
        self._pump()

    def on_link_closed(self, link: Link) -> None:
        """Drop every row of a peer that is gone."""
        self._desk.on_link_closed(link)
        self._offer_arrived()
        now = self._clock()
        for ticket in self._tickets.pop(link, {}).values():
            self._batcher.cancel(ticket, now)
            self._pieces.pop(ticket, None)
        self._pump()

    # Steps

    def _pump(self) -> None:
        """Carry out whatever the batcher has decided by now."""
        if self._arrived and not self._take_arrived():
            return
        now = self._clock()
        effects = self.meter.poll(now)
        if effects:
            self._carry_out(effects)
        if self._results:
            self._take_results()
            if self._batcher.has_waiting:
                self._pump_soon()
        wakeup = self._batcher.next_wakeup()
        if wakeup is not None and (self._wakeup is None or wakeup < self._wakeup_at):
            # A wake-up that turns out too early re-arms itself; deadlines far away cost nothing.
            if self._wakeup is not None:
                self._wakeup.cancel()
            self._wakeup_at = wakeup
            self._wakeup = self._loop.call_at(wakeup, self._on_wakeup)
        if self._lanes.is_settling:
            self._lanes.settle()

    def _take_arrived(self) -> bool:
        """Run what has come, or offer it; whether there is something for the batcher to decide."""
        if not self._running and not self._lanes.is_settling:
            assert self._executor is not None
            self._sequence += 1
            if self._short_way.run(self._arrived, self._executor, self._sequence):
                self._arrived = []
                return False
        self._offer_arrived()
        return True

    def _pump_soon(self) -> None:
        """Pump in a turn of its own, so that sockets are read between short steps."""
        if not self._pump_is_due:
            self._pump_is_due = True
            self._loop.call_soon(self._on_pump_due)

    def _on_pump_due(self) -> None:
        self._pump_is_due = False
        self._pump()

    def _on_wakeup(self) -> None:
        self._wakeup = None
        self._pump()

    def _carry_out(self, effects: Sequence[Effect]) -> None:
        errors: dict[tuple[Link, str], list[ItemError]] = {}
        for effect in effects:
            match effect:
                case Run(batch):
                    self._run(batch)
                case Expired(ticket):
                    text = "the deadline passed while rows waited for the device"
                    self._ended(ticket, DeadlineExceeded(text), errors)
                case Shed(ticket, evicted=is_evicted, retry_after_ms=wait_ms):
                    text = _EVICTED if is_evicted else _SHED
                    self._ended(ticket, ResourceExhausted(text, wait_ms), errors)
                case Failed(ticket, error):
                    reason = error if isinstance(error, ServingError) else Internal(str(error))
                    self._ended(ticket, reason, errors)
        for (link, unit), refused in errors.items():
            refuse(link, unit, refused, self._generation)

    def _run(self, batch: Batch) -> None:
        assert self._executor is not None
        slot = self._staging.acquire()
        assert slot is not None, "more steps in flight than staging slots"
        key = batch.lane
        hosted, bucket, sources = sources_of(batch)
        layout = hosted.layouts[bucket]
        self._sequence += 1
        descriptor = StepDescriptor(self._sequence, key.unit, *bucket, slot)
        self._running[self._sequence] = batch
        step = Step(descriptor, self._staging.views(slot, layout), sources)
        if hosted.costs[bucket] < self._run_now_s and not self._away:
            self._results.append(self._executor.run_now(step))
        else:
            self._away.add(self._sequence)
            self._executor.submit(step)
            self._awake.rest()
            self._watchdog.start()

    def _stuck_step(self) -> str | None:
        """A step that the device will not give back, "" if there is none, None without steps."""
        now = self._clock()
        for sequence in self._away:
            batch = self._running[sequence]
            hosted = payload_of(batch.parts[0][0])[0].hosted
            usual_s = hosted.costs_of(batch.lane)[batch.bucket]
            since_s = now - batch.formed_at
            if since_s > self._step_s_max + _SLOWER_MAX * usual_s:
                return f"a step that takes {usual_s:g} s has not ended for {since_s:.0f} s"
        return "" if self._away else None

    def results(self, result: StepResult) -> None:
        """Take a step's end, on any thread."""
        self._results.append(result)
        if not self._pumping:
            self._pumping = True
            self._loop.call_soon_threadsafe(self._on_results)

    def _on_results(self) -> None:
        # Cleared first: a result that comes from here on schedules its own turn.
        self._pumping = False
        self._take_results()
        self._pump()

    def _take_results(self) -> None:
        while self._results:
            result = self._results.popleft()
            sequence = result.descriptor.sequence
            batch = self._running.pop(sequence)
            self._away.discard(sequence)
            self._staging.release(result.descriptor.slot)
            now = self._clock()
            self.meter.landed(batch)
            if result.outputs is None:
                assert result.error is not None
                is_lost = isinstance(result.error, DeviceLost)
                if is_lost:
                    self._on_lost(str(result.error))
                self._carry_out(self._batcher.fail(batch.id, result.error, now, fatal=is_lost))
            else:
                began = time.perf_counter()
                self._deliver(batch, result.outputs)
                host_s = result.layout_s + time.perf_counter() - began
                self.meter.delivered(batch, host_s)
                self._finished(self._batcher.finish(batch.id, now))

    # Answers

    def _deliver(self, batch: Batch, outputs: Sequence[Array]) -> None:
        """Send the rows of whole tickets, a frame per run of neighbours; keep parts of others."""
        unit = batch.lane.unit
        news_of = self._batcher.admission.news
        now = self._clock()
        at = 0
        run: list[tuple[int, int]] = []
        run_start = run_stop = 0
        run_of: Inbound | None = None
        first = batch.parts[0][0]
        for ticket, start, stop in batch.parts:
            begin, at = at, at + stop - start
            state = ticket.state
            if state is not _RUNNING and state is not _WAITING:
                continue  # cancelled, or failed with another part: nobody waits for these rows
            if stop - start != ticket.rows:
                rows = [output[begin:at] for output in outputs]
                self._pieces.setdefault(ticket, []).append((start, rows))
                continue
            inbound, request, _ = payload_of(ticket)
            if run_of is None or run_stop != begin or not run_of.answers_with(inbound):
                if run_of is not None:
                    part = [output[run_start:run_stop] for output in outputs]
                    run_of.answer(unit, self._generation, run, part, news_of(first, now, batch.id))
                run, run_start, run_of, first = [], begin, inbound, ticket
            run.append((request, ticket.rows))
            run_stop = at
        if run_of is not None:
            part = [output[run_start:run_stop] for output in outputs]
            run_of.answer(unit, self._generation, run, part, news_of(first, now, batch.id))

    def _finished(self, finished: Sequence[Ticket]) -> None:
        """Forget tickets whose last row is back; send those that came back in several parts."""
        link: Link | None = None
        tickets: dict[int, Ticket] = {}
        for ticket in finished:
            inbound, request, _ = payload_of(ticket)
            if inbound.link is not link:
                link = inbound.link
                tickets = self._tickets.get(link, {})
            tickets.pop(request, None)
            pieces = self._pieces.pop(ticket, None) if self._pieces else None
            if pieces is not None:
                pieces.sort(key=lambda piece: piece[0])
                columns = zip(*(rows for _, rows in pieces), strict=True)
                outputs = [np.concatenate(column) for column in columns]
                items = [(request, ticket.rows)]
                inbound.answer(ticket.lane.unit, self._generation, items, outputs)

    def _ended(
        self,
        ticket: Ticket,
        error: ServingError,
        errors: dict[tuple[Link, str], list[ItemError]],
    ) -> None:
        inbound, request = self._forget(ticket)
        refusals = errors.setdefault((inbound.link, ticket.lane.unit), [])
        refusals.append(ItemError(request, error.code, error.message, error.retry_after_ms))
        self._pieces.pop(ticket, None)

    def _forget(self, ticket: Ticket) -> tuple[Inbound, int]:
        inbound, request, _ = payload_of(ticket)
        tickets = self._tickets.get(inbound.link)
        if tickets is not None:
            tickets.pop(request, None)
        return inbound, request
