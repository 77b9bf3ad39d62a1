"""What shard and host actors do with frames: run a function per call on one worker thread.

Table look-ups may fault in cold pages and host units run user Python; neither may hold the loop
thread that answers everyone else, so both run on a worker thread, first come first served, behind
a queue that is bounded in bytes. Deadlines are checked when work leaves the queue: late work is
dropped, not done.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from batching.errors import Code, ServingError
from shards.replies import STALE, refuse, refuse_all, send_reply
from shards.transport import Link
from shards.wire import CallHeader, Frame, ItemError, ReplyHeader, decode_tensors, encode_tensors

__all__ = ["Handler", "WorkerEngine"]

logger = logging.getLogger(__name__)

Array = npt.NDArray[np.generic]
#: A unit's inputs to its outputs, in declared order.
Handler = Callable[[Sequence[Array]], Sequence[Array]]


class _Unit(NamedTuple):
    handler: Handler
    #: bytes of answer for a row of input, for the queue's bound
    row_bytes: int


class _Job(NamedTuple):
    link: Link
    header: CallHeader
    arrays: Sequence[Array]
    unit: _Unit
    nbytes: int
    deadlines: list[float]


class _Done(NamedTuple):
    job: _Job
    outputs: Sequence[Array]
    items: list[tuple[int, int]]
    errors: list[ItemError]


class WorkerEngine:
    """Serves units whose work is a host function. Called on the loop thread.

    Args:
        loop: the loop whose thread this is.
        generation: of this process, stamped on every reply.
        waiting_bytes_max: inputs and expected outputs that may wait; beyond, calls are refused.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        generation: int,
        waiting_bytes_max: int = 512 << 20,
    ) -> None:
        self._loop = loop
        self._clock = time.monotonic
        self._generation = generation
        self._waiting_bytes_max = waiting_bytes_max
        self._waiting_bytes = 0
        self._units: dict[str, _Unit] = {}
        self._running: dict[str, int] = {}
        self._cancelled: set[tuple[Link, int]] = set()
        self._open: dict[Link, set[int]] = {}
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._finished: deque[_Done] = deque()
        self._thread = threading.Thread(target=self._work, name="worker", daemon=True)
        self._thread.start()

    def install(self, unit_id: str, handler: Handler, row_bytes: int = 0) -> None:
        """Serve a unit."""
        self._units[unit_id] = _Unit(handler, row_bytes)
        self._running.setdefault(unit_id, 0)

    async def remove(self, unit_id: str, poll_s: float = 0.01) -> None:
        """Take no more calls for a unit, finish those it has, and forget it."""
        if self._units.pop(unit_id, None) is None:
            return
        while self._running[unit_id]:
            await asyncio.sleep(poll_s)
        del self._running[unit_id]

    def close(self) -> None:
        """End the worker thread after what is queued."""
        self._jobs.put(None)
        self._thread.join(5.0)

    def on_call(self, link: Link, frame: Frame) -> None:
        """Queue a call, or refuse it."""
        header = frame.header
        assert isinstance(header, CallHeader)
        unit = self._units.get(header.unit)
        if unit is None:
            refuse_all(link, header, STALE, "the unit is not hosted here", self._generation)
            return
        try:
            arrays = decode_tensors(header.tensors, frame.body)
        except ServingError as error:
            refuse_all(link, header, error.code, error.message, self._generation)
            return
        rows = sum(item.rows for item in header.items)
        if any(len(array) != rows for array in arrays):
            text = "the items' rows do not add up to the tensors' rows"
            refuse_all(link, header, Code.INVALID_ARGUMENT, text, self._generation)
            return
        nbytes = len(frame.body) + rows * unit.row_bytes
        if self._waiting_bytes + nbytes > self._waiting_bytes_max:
            text = f"{self._waiting_bytes} bytes of calls are waiting, the limit"
            refuse_all(link, header, Code.RESOURCE_EXHAUSTED, text, self._generation)
            return
        now = self._clock()
        deadlines = [now + item.remaining_us * 1e-6 for item in header.items]
        self._waiting_bytes += nbytes
        self._running[header.unit] += 1
        self._open.setdefault(link, set()).update(item.request for item in header.items)
        self._jobs.put(_Job(link, header, arrays, unit, nbytes, deadlines))

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
            try:
                done = self._run(job)
            except Exception as error:  # outputs that do not fit together: the unit's own fault
                items = job.header.items
                done = _Done(job, (), [], [_item_error(item.request, error) for item in items])
            self._finished.append(done)
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
        if not wanted:
            return _Done(job, (), [], errors)
        if len(wanted) == len(job.header.items):
            try:
                outputs = job.unit.handler(job.arrays)
            except Exception as error:
                if len(wanted) == 1:
                    errors.append(_item_error(wanted[0][0], error))
                    return _Done(job, (), [], errors)
            else:
                items = [(request, stop - start) for request, start, stop in wanted]
                return _Done(job, outputs, items, errors)
        return self._run_singly(job, wanted, errors)

    def _run_singly(
        self, job: _Job, wanted: list[tuple[int, int, int]], errors: list[ItemError]
    ) -> _Done:
        """One request at a time: what one does wrong, or no longer wants, costs no other."""
        items: list[tuple[int, int]] = []
        pieces: list[Sequence[Array]] = []
        for request, start, stop in wanted:
            try:
                pieces.append(job.unit.handler([array[start:stop] for array in job.arrays]))
                items.append((request, stop - start))
            except Exception as error:
                errors.append(_item_error(request, error))
        outputs = [np.concatenate(column) for column in zip(*pieces, strict=True)]
        return _Done(job, outputs, items, errors)

    # Back on the loop thread

    def _deliver(self) -> None:
        while self._finished:
            job, outputs, items, errors = self._finished.popleft()
            self._waiting_bytes -= job.nbytes
            self._running[job.header.unit] -= 1
            open_requests = self._open[job.link]
            for item in job.header.items:
                open_requests.discard(item.request)
                self._cancelled.discard((job.link, item.request))
            if not open_requests:
                del self._open[job.link]
            if items:
                headers, buffers = encode_tensors(outputs)
                reply = ReplyHeader(job.header.unit, self._generation, items, headers, errors)
                send_reply(job.link, reply, buffers)
            elif errors:
                refuse(job.link, job.header.unit, errors, self._generation)


def _item_error(request: int, error: Exception) -> ItemError:
    if isinstance(error, ServingError):
        return ItemError(request, error.code, error.message, error.retry_after_ms)
    logger.warning("a host function failed", exc_info=error)
    first_line = (str(error).splitlines() or [""])[0]
    return ItemError(request, Code.INTERNAL, f"{type(error).__name__}: {first_line}"[:512])
