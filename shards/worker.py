"""What shard and host actors do with frames: run a function per call on a worker thread.

Table look-ups may fault in cold pages and host units run user Python; neither may hold the loop
thread that answers everyone else, so both run on a worker thread, first come first served, behind
a queue that is bounded in bytes. What waits for a disk holds up nobody but itself (`shards.lines`).
Deadlines are checked when work leaves the queue:
late work is dropped, not done. Look-ups in tables that are locked in memory wait for no disk: few
rows of them are looked up at once, on the loop thread, as long as nothing else is under way. (Two
switches of threads each way cost more than the rows: 1.24 ms for 26 tables over four actors that
share two processors, and 1.85 with them.)

Calls that came in one frame (`shards.together`) are done one after the other and answered in one
frame, unless the first answers would wait for long, or a thread of its own has some of them. A call
of several tables is one call: where one of them has a thread of its own, the call gets another.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from batching.errors import Code, Internal, InvalidArgument, ResourceExhausted, ServingError
from shards.bags import POOL_OPS, cut_bags
from shards.errors import SpecMismatch
from shards.faults import end_process
from shards.forwarding import Forwarder
from shards.lines import Line, Lines, waits_for_disk
from shards.orders import Endpoint
from shards.questions import STATISTICS, answer
from shards.replies import (
    UNJOINED,
    Answer,
    UnitAnswer,
    answers,
    code_of,
    refuse,
    refuse_all,
    send_together,
)
from shards.together import TOGETHER_BYTES_MAX, parted
from shards.transport import Link
from shards.watchdog import Watchdog
from shards.wire import CallHeader, Frame, Item, ItemError
from shards.worker_units import Handler, Units, WorkerUnit, arguments_of, pooling

if TYPE_CHECKING:
    from shards.tables import HostedTable

__all__ = ["Handler", "WorkerEngine"]

logger = logging.getLogger(__name__)

Array = npt.NDArray[np.generic]

#: What a unit's own code may raise; a host function that calls `sys.exit` ends nothing but itself.
_FAULTS = (Exception, SystemExit)

#: What a peer whose call did not fit is told to wait; how long look-ups take is not measured.
_RETRY_MS = 100
#: A call that goes on for so long after the last of its requests has ended will not come back:
#: long enough for a cold disk or a machine that is busy with other things.
_STUCK_S = 60.0
_LOOK_S = 15.0
#: Answers wait no longer than this for those of other calls of their frame: what holds these up is
#: a cold page, and none of their concern.
_WAIT_S = 0.002
#: Rows of so many bytes are looked up on the loop thread: some tens of microseconds.
_NOW_BYTES_MAX = 256 << 10


class _Job(NamedTuple):
    link: Link
    header: CallHeader
    arrays: Sequence[Array]
    unit: WorkerUnit
    handler: Handler
    nbytes: int
    deadlines: list[float]

    @property
    def of(self) -> str:
        return self.header.unit

    @property
    def own_line(self) -> bool:
        return self.unit.own_thread

    @property
    def may_wait(self) -> bool:
        return self.unit.is_table


class _Done(NamedTuple):
    job: _Job
    frames: list[Answer]
    errors: list[ItemError]

    @property
    def nbytes(self) -> int:
        """Of the answers' tensors."""
        return sum([tensor.nbytes for _, tensors, _ in self.frames for tensor in tensors])


class WorkerEngine:
    """Serves units whose work is a host function. Called on the loop thread.

    Args:
        loop: the loop whose thread this is.
        generation: of this process, stamped on every reply.
        waiting_bytes_max: inputs and expected outputs that may wait; beyond, calls are refused.
        clock: seconds; read on both threads.
        waits: whether a worker thread is held up by a disk.
        on_stuck: told, once or more, of a call that does not come back. It should end the process:
            nothing else on its thread will ever run.
        forwarder: sends answers on to where their continuation says; None where no unit's answers
            have any.

    Attributes:
        statistics: what whoever asks the actor itself is told, in msgpack; None for nothing.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        generation: int,
        waiting_bytes_max: int = 512 << 20,
        clock: Callable[[], float] = time.monotonic,
        forwarder: Forwarder | None = None,
        on_stuck: Callable[[str], None] = end_process,
        waits: Callable[[threading.Thread], bool] = waits_for_disk,
    ) -> None:
        self.statistics: Callable[[], bytes] | None = None
        self._loop = loop
        self._clock = clock
        self._forwarder = forwarder
        self._generation = generation
        self._waiting_bytes_max = waiting_bytes_max
        self._waiting_bytes = 0
        self._units = Units()
        self._running: dict[str, int] = {}
        #: units that take no more calls, until the last of each is answered
        self._draining: dict[str, asyncio.Future[None]] = {}
        self._cancelled: set[tuple[Link, int]] = set()
        self._open: dict[Link, set[int]] = {}
        self._finished: deque[list[_Done]] = deque()
        self._watchdog = Watchdog(loop, _LOOK_S, self._stuck_call, on_stuck)
        self._lines: Lines[_Job, _Done] = Lines(loop, self._run_all, self._hand_over, clock, waits)

    def install(
        self,
        unit_id: str,
        handler: Handler,
        row_bytes: int = 0,
        plan: str = "",
        table: HostedTable | None = None,
        *,
        own_thread: bool = False,
        never_waits: bool = False,
    ) -> None:
        """Serve a unit, from now on so.

        Args:
            unit_id: its id.
            handler: answers calls.
            row_bytes: of an answer's row.
            plan: hash of how it is cut.
            table: answers calls of bags (`shards.bags`), alone or with others.
            own_thread: whether its calls are to hold up those of no other unit. One that has a
                thread keeps it until it is removed.
            never_waits: whether a call takes no longer than its arithmetic: it is a table's, and
                all that it reads is in memory to stay.
        """
        self._units.install(unit_id, handler, row_bytes, plan, table, own_thread, never_waits)
        if own_thread:
            self._lines.own(unit_id)
        self._lines.end_all_but(self._units)

    async def remove(self, unit_id: str) -> None:
        """Take no more calls for a unit and finish those it has."""
        self._units.remove(unit_id)
        if unit_id in self._running:
            if unit_id not in self._draining:
                self._draining[unit_id] = self._loop.create_future()
            await asyncio.shield(self._draining[unit_id])
        self._lines.end_all_but(self._units)

    @property
    def plans_mismatched(self) -> int:
        """Calls refused because they meant another sharding plan."""
        return self._units.plans_mismatched

    def close(self) -> None:
        """End the worker threads after what is queued."""
        self._lines.close()

    def on_call(self, link: Link, frame: Frame) -> None:
        """Queue the calls of a frame, or refuse them, each by itself."""
        header = frame.header
        assert isinstance(header, CallHeader)
        if header.op == STATISTICS and self.statistics is not None:
            answer(link, header, self._generation, self.statistics())
            return
        try:
            calls = parted(header, frame.body)
        except ServingError as error:
            for each in (header, *header.also):
                self._refuse(link, each, code_of(error), error.message, error.retry_after_ms)
            return
        now = self._clock()
        is_idle = not self._running
        jobs: list[_Job] = []
        for each, arrays in calls:
            try:
                jobs.append(self._take(link, each, arrays, now))
            except ServingError as error:
                self._refuse(link, each, code_of(error), error.message, error.retry_after_ms)
        if is_idle and _is_quick(jobs):
            self._finished.append([self._run(job, now) for job in jobs])
            self._deliver()
        elif jobs:
            self._lines.put(jobs)
            self._watchdog.start()

    def _take(self, link: Link, header: CallHeader, arrays: Sequence[Array], now: float) -> _Job:
        unit = self._units.find(header, arrays)
        if header.reply_to is not None and (
            self._forwarder is None or any(item.continuation is None for item in header.items)
        ):
            raise InvalidArgument("answers of these items cannot be sent on")
        nbytes = sum(item.rows for item in header.items) * unit.row_bytes
        nbytes += sum([tensor.nbytes for tensor in header.tensors])
        if self._waiting_bytes + nbytes > self._waiting_bytes_max:
            raise ResourceExhausted(
                f"a call of {nbytes} bytes does not fit: {self._waiting_bytes} bytes of calls "
                f"wait, the bound is {self._waiting_bytes_max}",
                _RETRY_MS,
            )
        deadlines = [now + item.remaining_us * 1e-6 for item in header.items]
        self._waiting_bytes += nbytes
        for name in unit.names:
            self._running[name] = self._running.get(name, 0) + 1
        self._open.setdefault(link, set()).update(item.request for item in header.items)
        handler = unit.handler
        if header.op in POOL_OPS:
            assert unit.tables is not None
            handler = pooling(unit.tables, header.op)
        assert handler is not None
        return _Job(link, header, arguments_of(header, arrays), unit, handler, nbytes, deadlines)

    def _stuck_call(self) -> str | None:
        """A call that nobody has waited for for long, "" if there is none, None without calls."""
        for line in self._lines:
            job = line.at
            if job is None:
                continue
            late_s = self._clock() - max(job.deadlines, default=math.inf)
            if late_s > _STUCK_S:
                return f"a call of unit {job.header.unit[:12]} is {late_s:.0f} s past its deadline"
        return "" if self._running else None

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

    # A worker thread

    def _run_all(self, line: Line[_Job, _Done]) -> None:
        """The calls of one frame; their answers leave together as far as none waits for long."""
        nbytes = 0
        since = self._clock()
        todo = line.todo
        while todo:
            now = self._clock()
            if line.done and (nbytes >= TOGETHER_BYTES_MAX or now - since > _WAIT_S):
                self._hand_over(line)
                nbytes, since = 0, now
            try:
                job = todo.popleft()
            except IndexError:  # it was taken away, since the call before it held up the line
                break
            line.since = now
            line.at = job
            done = self._run(job, now)
            line.done.append(done)
            nbytes += done.nbytes
        self._hand_over(line)

    def _hand_over(self, line: Line[_Job, _Done]) -> None:
        """Have answers sent; also on the loop thread, for a line whose thread is held up."""
        done: list[_Done] = []
        while line.done:
            try:
                done.append(line.done.popleft())
            except IndexError:  # the other thread was quicker
                break
        if done:
            self._finished.append(done)
            self._loop.call_soon_threadsafe(self._deliver)

    def _run(self, job: _Job, now: float) -> _Done:
        errors: list[ItemError] = []
        wanted: list[tuple[int, int, int, int]] = []
        at = 0
        for number, (item, deadline) in enumerate(
            zip(job.header.items, job.deadlines, strict=True)
        ):
            start, at = at, at + item.rows
            if (job.link, item.request) in self._cancelled:
                continue
            if deadline <= now:
                text = "the deadline passed while the call waited for a worker"
                errors.append(ItemError(item.request, Code.DEADLINE_EXCEEDED, text))
                continue
            wanted.append((number, item.request, start, at))
        if wanted and len(wanted) == len(job.header.items):
            items = [(request, stop - start) for _, request, start, stop in wanted]
            try:
                return _Done(job, _call(job.handler, job.arrays, items), errors)
            except _FAULTS as error:
                if len(wanted) == 1:
                    errors.append(_item_error(wanted[0][1], error))
                    return _Done(job, [], errors)
                logger.debug("a call of several requests is tried one by one: %s", error)
        return self._run_singly(job, wanted, errors)

    def _run_singly(
        self, job: _Job, wanted: list[tuple[int, int, int, int]], errors: list[ItemError]
    ) -> _Done:
        """One request at a time: what one does wrong, or no longer wants, costs no other."""
        frames: list[Answer] = []
        for number, request, start, stop in wanted:
            try:
                if job.header.op in POOL_OPS:
                    bags = job.arrays[0][number : number + 1]
                    arrays = [bags, *cut_bags(job.arrays[1:], start, stop)]
                else:
                    arrays = [array[start:stop] for array in job.arrays]
                frames += _call(job.handler, arrays, [(request, stop - start)])
            except _FAULTS as error:
                errors.append(_item_error(request, error))
        return _Done(job, frames, errors)

    # Back on the loop thread

    def _deliver(self) -> None:
        while self._finished:
            done = self._finished.popleft()
            found: list[UnitAnswer] = []
            for job, frames, _ in done:
                self._forget(job)
                if job.header.reply_to is None:
                    found += [UnitAnswer(job.header.unit, job.unit.plan, each) for each in frames]
                else:
                    self._forward(job, job.header.reply_to, frames)
            if found:
                send_together(done[0].job.link, self._generation, found)
            for job, _, errors in done:
                refuse(job.link, job.header.unit, errors, self._generation)

    def _forget(self, job: _Job) -> None:
        link = job.link
        self._waiting_bytes -= job.nbytes
        # A confused peer may have used a request's number twice: it is forgotten once.
        open_requests = self._open.get(link, set())
        for item in job.header.items:
            open_requests.discard(item.request)
            self._cancelled.discard((link, item.request))
        if not open_requests:
            self._open.pop(link, None)
        for name in job.unit.names:
            self._running[name] -= 1
            if not self._running[name]:
                del self._running[name]
                if name in self._draining:
                    self._draining.pop(name).set_result(None)

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


def _is_quick(jobs: Sequence[_Job]) -> bool:
    """Whether calls are done in less time than it takes to wake a thread."""
    nbytes = 0
    for job in jobs:
        if not job.unit.never_waits:
            return False
        # No id is shorter than four bytes.
        ids = sum([tensor.nbytes for tensor in job.header.tensors]) // 4
        nbytes += ids * job.unit.row_bytes
    return 0 < nbytes <= _NOW_BYTES_MAX


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
