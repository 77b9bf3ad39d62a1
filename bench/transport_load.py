"""Load on one link, or on Ray actor calls: round trips in a closed loop, and their latencies.

Both kinds of contender answer the same question, `Contender.round_trips`, so that a benchmark need
not know what is below. A link's next call leaves from the callback of the last answer, as in a
router; no future or task stands between.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from bench.errors import AnswersDiffer, LoadFailed
from bench.stats import Histogram
from bench.transport_echo import ECHO, GIVE, SINK
from shards.errors import FrameRefused
from shards.transport import Link
from shards.wire import (
    Buffer,
    CallHeader,
    Frame,
    FrameKind,
    Header,
    Item,
    ReplyHeader,
    TensorHeader,
)

__all__ = ["Contender", "LinkContender", "Payload", "RayContender", "Timed"]

#: Nothing that is measured here takes so long; a link that hangs ends the run.
_TIMEOUT_S: Final = 60.0
_REMAINING_US: Final = 60_000_000

Payload = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Timed:
    """Answered round trips.

    Attributes:
        latency_us: of each.
        elapsed_s: from the first call to the last answer.
    """

    latency_us: npt.NDArray[np.float64]
    elapsed_s: float

    @property
    def rate(self) -> float:
        """Round trips a second."""
        return self.latency_us.size / self.elapsed_s

    def percentile(self, percent: float) -> float:
        """In microseconds, by nearest rank."""
        return Histogram.of(self.latency_us).percentile(percent)


class Contender(Protocol):
    """A way to an echo in another process."""

    @property
    def name(self) -> str:
        """What tables and figures call it."""

    async def round_trips(self, payload: Payload, *, duration_s: float, window: int) -> Timed:
        """Keep so many calls under way for a while.

        Raises:
            LoadFailed: an answer did not come.
            AnswersDiffer: the last of the answers is not what was sent.
        """


@dataclass(slots=True)
class _Run:
    """One closed loop: calls go out until its end, and it is over with the last answer."""

    op: str
    tensors: list[TensorHeader]
    body: list[Buffer]
    rows: int
    ends: float
    over: asyncio.Future[None]
    waiting: dict[int, float] = field(default_factory=dict)
    latencies: list[float] = field(default_factory=list)
    last: memoryview = field(default_factory=lambda: memoryview(b""))


class LinkContender:
    """A `Link` of the product, as its handler sees it.

    Args:
        name: what tables and figures call it.
        big: whether a frame of 256 MB is to be sent over it.
    """

    def __init__(self, name: str, *, big: bool) -> None:
        self.name = name
        self.big = big
        self._link: Link | None = None
        self._number = itertools.count().__next__
        self._run: _Run | None = None
        self._big: asyncio.Future[None] | None = None
        self._big_number = -1
        self._closed = asyncio.Event()

    def over(self, link: Link) -> LinkContender:
        """Take the link that this is the handler of."""
        self._link = link
        return self

    async def close(self) -> None:
        """Say goodbye, and wait until the link is gone."""
        if self._link is not None:
            self._link.close()
            await self._closed.wait()

    async def round_trips(self, payload: Payload, *, duration_s: float, window: int) -> Timed:
        """See `Contender.round_trips`."""
        run = self._begin(ECHO, payload, duration_s)
        timed = await self._finish(run, window)
        if not np.array_equal(np.frombuffer(run.last, np.uint8), payload):
            raise AnswersDiffer(f"{self.name} answered something else than what it was sent")
        return timed

    async def small_behind(self, small: Payload, big: Payload, *, outward: bool) -> Timed:
        """Small round trips, one at a time, for as long as one big frame is under way beside them.

        Args:
            small: what each of them carries.
            big: what the big frame carries.
            outward: whether the big frame is the call; else it is the answer, of as many bytes.

        Raises:
            LoadFailed: an answer did not come.
        """
        assert self._link is not None
        loop = asyncio.get_running_loop()
        self._big, self._big_number = loop.create_future(), self._number()
        item = Item(self._big_number, big.size, _REMAINING_US)
        if outward:
            tensors = [TensorHeader("uint8", big.shape, big.nbytes)]
            header = CallHeader(1, "unit", SINK, [item], tensors)
            body: list[Buffer] = [big.data]
        else:
            header, body = CallHeader(1, "unit", GIVE, [item], []), []
        run = self._begin(ECHO, small, _TIMEOUT_S)
        self._link.send(FrameKind.CALL, header, body)
        self._link.flush()
        timed = await self._finish(run, 1)
        self._big = None
        return timed

    def on_frame(self, link: Link, frame: Frame) -> None:
        """Note the answer, and send the next call."""
        now = time.perf_counter()
        header, run = frame.header, self._run
        assert isinstance(header, ReplyHeader)
        number = header.items[0][0]
        if number == self._big_number:
            assert self._big is not None
            self._big.set_result(None)
            if run is not None:
                run.ends = now  # those that wait are the last
            return
        assert run is not None
        run.latencies.append((now - run.waiting.pop(number)) * 1e6)
        # It is let go of before the next call: the next answer may need its memory.
        if now < run.ends:
            self._call(run)
            return
        run.last = frame.body
        if not run.waiting and not run.over.done():
            run.over.set_result(None)

    def on_refused(self, link: Link, header: Header, error: FrameRefused) -> None:
        """Whoever waits for the answer to it waits in vain."""
        self.on_closed(link, error)

    def on_closed(self, link: Link, error: Exception | None) -> None:
        """Whoever waits for an answer waits in vain."""
        self._closed.set()
        for future in (self._run.over if self._run else None, self._big):
            if future is not None and not future.done():
                future.set_exception(LoadFailed(f"{self.name}: the link closed: {error}"))

    def _begin(self, op: str, payload: Payload, duration_s: float) -> _Run:
        tensors = [TensorHeader("uint8", payload.shape, payload.nbytes)]
        body: list[Buffer] = [payload.data]
        ends = time.perf_counter() + duration_s
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._run = _Run(op, tensors, body, payload.size, ends, over)
        return self._run

    async def _finish(self, run: _Run, window: int) -> Timed:
        assert self._link is not None
        began = time.perf_counter()
        for _ in range(window):
            self._call(run)
        self._link.flush()
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                await run.over
                if self._big is not None:
                    await self._big
        except TimeoutError:
            raise LoadFailed(f"{self.name}: no answer within {_TIMEOUT_S:g} s") from None
        finally:
            self._run = None
        elapsed_s = time.perf_counter() - began
        return Timed(latency_us=np.asarray(run.latencies), elapsed_s=elapsed_s)

    def _call(self, run: _Run) -> None:
        assert self._link is not None
        number = self._number()
        header = CallHeader(1, "unit", run.op, [Item(number, run.rows, _REMAINING_US)], run.tensors)
        run.waiting[number] = time.perf_counter()
        self._link.send(FrameKind.CALL, header, run.body)


class RayContender:
    """Plain calls of an async Ray actor that has a method ``echo``.

    Args:
        name: what tables and figures call it.
        handle: of the actor.
    """

    def __init__(self, name: str, handle: Any) -> None:
        self.name = name
        self._handle = handle

    async def round_trips(self, payload: Payload, *, duration_s: float, window: int) -> Timed:
        """See `Contender.round_trips`."""
        began = time.perf_counter()
        ends = began + duration_s
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                runs = await asyncio.gather(*(self._calls(payload, ends) for _ in range(window)))
        except TimeoutError:
            raise LoadFailed(f"{self.name}: no answer within {_TIMEOUT_S:g} s") from None
        elapsed_s = time.perf_counter() - began
        latency_us = np.concatenate([np.asarray(run) for run in runs])
        return Timed(latency_us=latency_us, elapsed_s=elapsed_s)

    async def _calls(self, payload: Payload, ends: float) -> list[float]:
        latencies = []
        while True:
            began = time.perf_counter()
            answer = await self._handle.echo.remote(payload)
            now = time.perf_counter()
            latencies.append((now - began) * 1e6)
            if now >= ends:
                break
        if not np.array_equal(answer, payload):
            raise AnswersDiffer(f"{self.name} answered something else than what it was sent")
        return latencies
