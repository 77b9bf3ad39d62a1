"""What shard and host actors do with frames: run a function per call on one worker thread.

Table look-ups may fault in cold pages and host units run user Python; neither may hold the loop
thread that answers everyone else, so both run on a worker thread, first come first served, behind
a queue that is bounded in bytes. Deadlines are checked when work leaves the queue: late work is
dropped, not done.
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from batching.errors import Code, Internal, InvalidArgument, ResourceExhausted, ServingError
from shards.bags import POOL_OPS, cut_bags
from shards.errors import NotHosted, SpecMismatch
from shards.faults import end_process
from shards.forwarding import Forwarder
from shards.orders import Endpoint
from shards.replies import (
    UNJOINED,
    Answer,
    answers,
    code_of,
    refuse,
    refuse_all,
    send_answers,
)
from shards.transport import Link
from shards.watchdog import Watchdog
from shards.wire import CallHeader, Frame, Item, ItemError, decode_tensors

__all__ = ["Handler", "WorkerEngine"]

logger = logging.getLogger(__name__)

Array = npt.NDArray[np.generic]
#: A unit's inputs to its outputs, in declared order.
Handler = Callable[[Sequence[Array]], Sequence[Array]]
_NO_POOLS: Final[Mapping[str, Handler]] = {}

#: What a unit's own code may raise; a host function that calls `sys.exit` ends nothing but itself.
_FAULTS = (Exception, SystemExit)

#: What a peer whose call did not fit is told to wait; how long look-ups take is not measured.
_RETRY_MS = 100
#: A call that goes on for so long after the last of its requests has ended will not come back:
#: long enough for a cold disk or a machine that is busy with other things.
_STUCK_S = 60.0
_LOOK_S = 15.0


class _Unit(NamedTuple):
    handler: Handler
    #: what answers other ops than that of the handler, by op
    pools: Mapping[str, Handler]
    #: bytes of answer for a row of input, for the queue's bound
    row_bytes: int
    #: hash of the sharding plan, of a unit that has one
    plan: str


class _Job(NamedTuple):
    link: Link
    header: CallHeader
    arrays: Sequence[Array]
    unit: _Unit
    handler: Handler
    nbytes: int
    deadlines: list[float]


class _Done(NamedTuple):
    job: _Job
    frames: list[Answer]
    errors: list[ItemError]


class WorkerEngine:
    """Serves units whose work is a host function. Called on the loop thread.

    Args:
        loop: the loop whose thread this is.
        generation: of this process, stamped on every reply.
        waiting_bytes_max: inputs and expected outputs that may wait; beyond, calls are refused.
        clock: seconds; read on both threads.
        on_stuck: told, once or more, of a call that does not come back. It should end the process:
            nothing else on the worker thread will ever run.
        forwarder: sends answers on to where their continuation says; None where no unit's answers
            have any.

    Attributes:
        plans_mismatched: calls refused because they meant another sharding plan.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        generation: int,
        waiting_bytes_max: int = 512 << 20,
        clock: Callable[[], float] = time.monotonic,
        forwarder: Forwarder | None = None,
        on_stuck: Callable[[str], None] = end_process,
    ) -> None:
        self.plans_mismatched = 0
        self._loop = loop
        self._clock = clock
        self._forwarder = forwarder
        self._generation = generation
        self._waiting_bytes_max = waiting_bytes_max
        self._waiting_bytes = 0
        self._units: dict[str, _Unit] = {}
        self._running: dict[str, int] = {}
        #: units that take no more calls, until the last of each is answered
        self._draining: dict[str, asyncio.Future[None]] = {}
        self._cancelled: set[tuple[Link, int]] = set()
        self._open: dict[Link, set[int]] = {}
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._finished: deque[_Done] = deque()
        #: what the worker thread is at; written there, read on the loop thread
        self._at: _Job | None = None
        self._watchdog = Watchdog(loop, _LOOK_S, self._stuck_call, on_stuck)
        self._thread = threading.Thread(target=self._work, name="worker", daemon=True)
        self._thread.start()

    def install(
        self,
        unit_id: str,
        handler: Handler,
        row_bytes: int = 0,
        plan: str = "",
        pools: Mapping[str, Handler] = _NO_POOLS,
    ) -> None:
        """Serve a unit.

        Args:
            unit_id: its id.
            handler: answers calls.
            row_bytes: of an answer's row.
            plan: hash of how it is cut.
            pools: answer calls of bags (`shards.bags`), by op.
        """
        self._units[unit_id] = _Unit(handler, pools, row_bytes, plan)

    async def remove(self, unit_id: str) -> None:
        """Take no more calls for a unit and finish those it has."""
        self._units.pop(unit_id, None)
        if unit_id in self._running:
            if unit_id not in self._draining:
                self._draining[unit_id] = self._loop.create_future()
            await asyncio.shield(self._draining[unit_id])

    def close(self) -> None:
        """End the worker thread after what is queued."""
        self._jobs.put(None)
        self._thread.join(5.0)

    def on_call(self, link: Link, frame: Frame) -> None:
        """Queue a call, or refuse it."""
        header = frame.header
        assert isinstance(header, CallHeader)
        try:
            unit, handler, arrays = self._read(header, frame)
            nbytes = len(frame.body) + sum(item.rows for item in header.items) * unit.row_bytes
            if self._waiting_bytes + nbytes > self._waiting_bytes_max:
                raise ResourceExhausted(
                    f"a call of {nbytes} bytes does not fit: {self._waiting_bytes} bytes of calls "
                    f"wait, the bound is {self._waiting_bytes_max}",
                    _RETRY_MS,
                )
        except ServingError as error:
            self._refuse(link, header, code_of(error), error.message, error.retry_after_ms)
            return
        now = self._clock()
        deadlines = [now + item.remaining_us * 1e-6 for item in header.items]
        self._waiting_bytes += nbytes
        self._running[header.unit] = self._running.get(header.unit, 0) + 1
        self._open.setdefault(link, set()).update(item.request for item in header.items)
        self._jobs.put(_Job(link, header, arrays, unit, handler, nbytes, deadlines))
        self._watchdog.start()

    def _stuck_call(self) -> str | None:
        """A call that nobody has waited for for long, "" if there is none, None without calls."""
        job = self._at
        if job is not None:
            late_s = self._clock() - max(job.deadlines, default=math.inf)
            if late_s > _STUCK_S:
                return f"a call of unit {job.header.unit[:12]} is {late_s:.0f} s past its deadline"
        return "" if self._running else None

    def _read(self, header: CallHeader, frame: Frame) -> tuple[_Unit, Handler, Sequence[Array]]:
        unit = self._units.get(header.unit)
        if unit is None:
            raise NotHosted("the unit is not hosted here")
        if header.plan and header.plan != unit.plan:
            self.plans_mismatched += 1
            raise NotHosted(f"the unit is cut by plan {unit.plan} here, not by {header.plan}")
        if header.reply_to is not None and (
            self._forwarder is None or any(item.continuation is None for item in header.items)
        ):
            raise InvalidArgument("answers of these items cannot be sent on")
        arrays = decode_tensors(header.tensors, frame.body)
        rows = sum(item.rows for item in header.items)
        is_pool = header.op in POOL_OPS
        # Of bags the first tensor alone has a row for each: the others have one for each id.
        if any(array.shape[:1] != (rows,) for array in arrays[: 1 if is_pool else None]):
            raise InvalidArgument("the items' rows do not add up to the tensors' rows")
        if not is_pool:
            return unit, unit.handler, arrays
        handler = unit.pools.get(header.op)
        if handler is None or len(arrays) not in (2, 3):
            raise InvalidArgument(f"this is no {header.op} of bags that the unit can answer")
        return unit, handler, arrays

    def _refuse(
        self, link: Link, header: CallHeader, code: str, message: str, retry_ms: int = 0
    ) -> None:
        unit, items = header.unit, header.items
        refuse_all(link, unit, items, code, message, self._generation, retry_ms)

    def on_cancel(self, link: Link, requests: Sequence[int]) -> None:
        """Skip these if they have not begun."""
        open_requests = self._open.get(link, set())
        for request in requests:
            if request in open_requests:
                self._cancelled.add((link, request))

    def on_link_closed(self, link: Link) -> None:
        """Skip whatever a peer that is gone still waits for."""
        for request in self._open.get(link, ()):
            self._cancelled.add((link, request))

    # The worker thread

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._at = job
            self._finished.append(self._run(job))
            # An idle worker keeps neither a call's tensors nor a removed unit alive.
            self._at = None
            del job
            self._loop.call_soon_threadsafe(self._deliver)

    def _run(self, job: _Job) -> _Done:
        now = self._clock()
        errors: list[ItemError] = []
        wanted: list[tuple[int, int, int]] = []
        at = 0
        for item, deadline in zip(job.header.items, job.deadlines, strict=True):
            start, at = at, at + item.rows
            if (job.link, item.request) in self._cancelled:
                continue
            if deadline <= now:
                text = "the deadline passed while the call waited for a worker"
                errors.append(ItemError(item.request, Code.DEADLINE_EXCEEDED, text))
                continue
            wanted.append((item.request, start, at))
        if len(wanted) > 1 and len(wanted) == len(job.header.items):
            items = [(request, stop - start) for request, start, stop in wanted]
            try:
                return _Done(job, _call(job.handler, job.arrays, items), errors)
            except _FAULTS as error:
                logger.debug("a call of several requests is tried one by one: %s", error)
        return self._run_singly(job, wanted, errors)

    def _run_singly(
        self, job: _Job, wanted: list[tuple[int, int, int]], errors: list[ItemError]
    ) -> _Done:
        """One request at a time: what one does wrong, or no longer wants, costs no other."""
        frames: list[Answer] = []
        for request, start, stop in wanted:
            try:
                if job.header.op in POOL_OPS:
                    arrays = cut_bags(job.arrays, start, stop)
                else:
                    arrays = [array[start:stop] for array in job.arrays]
                frames += _call(job.handler, arrays, [(request, stop - start)])
            except _FAULTS as error:
                errors.append(_item_error(request, error))
        return _Done(job, frames, errors)

    # Back on the loop thread

    def _deliver(self) -> None:
        while self._finished:
            job, frames, errors = self._finished.popleft()
            link, unit_id = job.link, job.header.unit
            self._waiting_bytes -= job.nbytes
            # A confused peer may have used a request's number twice: it is forgotten once.
            open_requests = self._open.get(link, set())
            for item in job.header.items:
                open_requests.discard(item.request)
                self._cancelled.discard((link, item.request))
            if not open_requests:
                self._open.pop(link, None)
            self._running[unit_id] -= 1
            if not self._running[unit_id]:
                del self._running[unit_id]
                if unit_id in self._draining:
                    self._draining.pop(unit_id).set_result(None)
            if job.header.reply_to is None:
                send_answers(link, unit_id, self._generation, frames, job.unit.plan)
            else:
                self._forward(job, job.header.reply_to, frames)
            refuse(link, unit_id, errors, self._generation)

    def _forward(self, job: _Job, endpoint: Endpoint, frames: list[Answer]) -> None:
        """Send answers on; the asker hears only of those that cannot be."""
        assert self._forwarder is not None
        now = self._clock()
        asked = {item.request: at for at, item in enumerate(job.header.items)}
        for rows_of, tensors, buffers in frames:
            items: list[Item] = []
            for request, rows in rows_of:
                at = asked[request]
                item = job.header.items[at]
                remaining_us = int((job.deadlines[at] - now) * 1e6)
                items.append(Item(request, rows, remaining_us, item.trace, item.continuation))
            header = CallHeader(
                job.header.epoch, job.header.unit, "part", items, tensors, job.unit.plan
            )
            self._forwarder.send(endpoint, header, buffers, partial(self._lost, job.link, header))

    def _lost(self, link: Link, header: CallHeader, reason: str) -> None:
        """Parts did not get to where they belong."""
        self._refuse(link, header, UNJOINED, reason)


def _call(handler: Handler, arrays: Sequence[Array], items: list[tuple[int, int]]) -> list[Answer]:
    rows = sum(rows for _, rows in items)
    outputs = handler(arrays)
    for output in outputs:
        if output.shape[:1] != (rows,):
            raise Internal(f"the unit answered {list(output.shape)} for {rows} rows")
    try:
        return answers(items, outputs)
    except SpecMismatch as error:
        # What the unit does wrong is not the request's fault.
        raise Internal(f"what the unit answered cannot be sent: {error}") from error


def _item_error(request: int, error: BaseException) -> ItemError:
    if isinstance(error, ServingError):
        return ItemError(request, code_of(error), error.message, error.retry_after_ms)
    logger.warning("a host function failed", exc_info=error)
    first_line = (str(error).splitlines() or [""])[0]
    return ItemError(request, Code.INTERNAL, f"{type(error).__name__}: {first_line}"[:512])
