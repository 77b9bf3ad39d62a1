"""Requests at drawn instants through the product's router, and what became of each.

The generator never waits for an answer: arrivals are drawn beforehand, a request's deadline and its
latency count from the instant at which it was meant to leave, and how late the generator itself was
is told (`Outcome.behind_s`). It plays a router: rows that leave in one turn of the loop share a
frame. This file does not know which policy is measured, nor what is made of the counts.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from batching.errors import ServingError
from batching.simulation import Arrival
from bench.errors import LoadFailed
from cluster.router import Router
from cluster.routes import SignaturePlan

__all__ = ["OpenLoop", "Outcome", "OwnerOutcome"]

#: A timer of the loop may come a millisecond late, so the last stretch before a departure is slept
#: in small pieces, between which answers are read.
_TIMER_S: Final = 0.002
_NAP_S: Final = 0.0002
#: So many leave in one turn before answers are read again.
_TURN_MAX: Final = 64
#: After the last departure requests end by their deadlines; a bound for those that do not.
_END_S: Final = 30.0
#: An answer that comes after its deadline is worthless, but the router waits for it a little.
_NEVER_S: Final = 60.0

Inputs = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnerOutcome:
    """What became of one owner's requests.

    Attributes:
        offered: that were meant to leave after the warm-up.
        good: of these, answered within their budget, counted from the intended departure.
        latencies_s: of the answered ones, in order of departure.
        errors: of the others, by code.
    """

    offered: int
    good: int
    latencies_s: npt.NDArray[np.float64]
    errors: Mapping[str, int]

    @property
    def attainment(self) -> float:
        """The part that was answered in time; of no requests, all."""
        return self.good / self.offered if self.offered else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a workload.

    Attributes:
        seconds: in which the counted requests were meant to leave.
        owners: by name.
        behind_s: 99th percentile of how late the generator was.
    """

    seconds: float
    owners: Mapping[str, OwnerOutcome]
    behind_s: float

    @property
    def goodput(self) -> float:
        """Requests a second that were answered in time."""
        return sum(owner.good for owner in self.owners.values()) / self.seconds

    @property
    def attainment(self) -> float:
        """The part of all requests that was answered in time."""
        offered = sum(owner.offered for owner in self.owners.values())
        return sum(owner.good for owner in self.owners.values()) / offered

    def percentile_s(self, percent: float) -> float:
        """Of the latencies of all answered requests; NaN where none was."""
        every = np.concatenate([owner.latencies_s for owner in self.owners.values()])
        return float(np.percentile(every, percent, method="higher")) if every.size else nan


class OpenLoop:
    """Sends requests through a router. Use it on the router's loop.

    Args:
        router: has adopted an epoch with every owner.
        inputs: rows to ask for, in turn.
        signature: of every owner, which is asked.
    """

    def __init__(
        self, router: Router, inputs: Sequence[Inputs], *, signature: str = "serving_default"
    ) -> None:
        self._router = router
        self._inputs = inputs
        self._signature = signature

    def plan(self, owner: str) -> SignaturePlan:
        """What a request of this servable takes."""
        return self._router.routes.find(owner).plans[self._signature]

    async def ask(self, owner: str, inputs: Inputs) -> Mapping[str, Any]:
        """One request, and its answer."""
        sink = _Waiting()
        self._router.submit(self.plan(owner), inputs, 1, time.monotonic() + _NEVER_S, sink)
        return await sink.answer

    async def offer(self, arrivals: Sequence[Arrival], *, warm_s: float) -> Outcome:
        """Send a workload, and wait until every request of it has ended.

        Args:
            arrivals: in order of time.
            warm_s: requests that are meant to leave before are sent and not counted.

        Raises:
            LoadFailed: requests did not end.
        """
        plans = {owner: self.plan(owner) for owner in {arrival.owner for arrival in arrivals}}
        run = _Run(self._router, plans, self._inputs, arrivals)
        gc.collect()
        gc.disable()  # a collection here would hold up requests for no fault of the device
        try:
            await run.done()
        finally:
            gc.enable()
        return run.outcome(warm_s)

    async def saturate(self, owner: str, seconds: float, *, window: int, warm_s: float) -> float:
        """Answers a second with so many requests always under way."""
        plan, inputs = self.plan(owner), self._inputs[0]
        load = _Saturation(self._router, plan, inputs)
        for _ in range(window):
            load.send()
        await asyncio.sleep(warm_s)
        before, began = load.answered, time.monotonic()
        await asyncio.sleep(seconds)
        rate = (load.answered - before) / (time.monotonic() - began)
        await load.stop()
        return rate

    async def alone(self, owners: Sequence[str], count: int) -> npt.NDArray[np.float64]:
        """Seconds of so many requests, one at a time, of each owner in turn."""
        latencies = np.empty(count)
        for number in range(count):
            began = time.monotonic()
            await self.ask(owners[number % len(owners)], self._inputs[0])
            latencies[number] = time.monotonic() - began
        return latencies


class _Waiting:
    """Takes one answer."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.answer: asyncio.Future[Mapping[str, Any]] = loop.create_future()

    def done(self, outputs: Mapping[str, Any], frame: Sequence[Any] | None) -> None:
        self.answer.set_result(outputs)

    def failed(self, error: ServingError) -> None:
        self.answer.set_exception(error)


class _Saturation:
    """Sends a request for every answer."""

    def __init__(self, router: Router, plan: SignaturePlan, inputs: Inputs) -> None:
        self._router = router
        self._plan = plan
        self._inputs = inputs
        self._stopped: asyncio.Future[None] | None = None
        self._under_way = 0
        self.answered = 0

    def send(self) -> None:
        self._under_way += 1
        deadline = time.monotonic() + _NEVER_S
        self._router.submit(self._plan, self._inputs, 1, deadline, self)

    def done(self, outputs: Mapping[str, Any], frame: Sequence[Any] | None) -> None:
        self._under_way -= 1
        self.answered += 1
        if self._stopped is None:
            self.send()
        elif not self._under_way and not self._stopped.done():
            self._stopped.set_result(None)

    def failed(self, error: ServingError) -> None:
        self._under_way -= 1
        if self._stopped is None:
            self._stopped = asyncio.get_running_loop().create_future()
        if not self._stopped.done():
            self._stopped.set_exception(LoadFailed(f"a request failed: {error}"))

    async def stop(self) -> None:
        if self._stopped is None:
            self._stopped = asyncio.get_running_loop().create_future()
        await asyncio.wait_for(self._stopped, _END_S)


class _Sink:
    """One request's end."""

    __slots__ = ("_number", "_run")

    def __init__(self, run: _Run, number: int) -> None:
        self._run = run
        self._number = number

    def done(self, outputs: Mapping[str, Any], frame: Sequence[Any] | None) -> None:
        self._run.ended(self._number, "")

    def failed(self, error: ServingError) -> None:
        self._run.ended(self._number, error.code)


class _Run:
    """One workload on its way."""

    def __init__(
        self,
        router: Router,
        plans: Mapping[str, SignaturePlan],
        inputs: Sequence[Inputs],
        arrivals: Sequence[Arrival],
    ) -> None:
        self._router = router
        self._plans = plans
        self._inputs = inputs
        self._arrivals = arrivals
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._next = 0
        self._left = len(arrivals)
        self._behind: list[float] = []
        self._latencies = [nan] * len(arrivals)
        self._codes = [""] * len(arrivals)
        self._began = 0.0

    async def done(self) -> None:
        """Send everything and see it end."""
        # A little ahead, so that the first ones leave in time, too.
        self._began = time.monotonic() + 0.01
        self._send_due()
        last = self._arrivals[-1].at if self._arrivals else 0.0
        try:
            await asyncio.wait_for(self._ended, last + _END_S)
        except TimeoutError as error:
            raise LoadFailed(f"{self._left} requests did not end") from error

    def _send_due(self) -> None:
        arrivals, behind = self._arrivals, self._behind
        submit, plans, inputs = self._router.submit, self._plans, self._inputs
        clock = time.monotonic
        at, stop = self._next, min(self._next + _TURN_MAX, len(arrivals))
        since = clock() - self._began
        while at < stop and arrivals[at].at <= since:
            arrival = arrivals[at]
            leaves_at = self._began + arrival.at
            behind.append(since - arrival.at)
            submit(
                plans[arrival.owner],
                inputs[at % len(inputs)],
                arrival.rows,
                leaves_at + arrival.budget_s,
                _Sink(self, at),
            )
            at += 1
            since = clock() - self._began
        self._next = at
        if at < len(arrivals):
            wait_s = arrivals[at].at - since
            if wait_s > _TIMER_S:
                self._loop.call_later(wait_s - _TIMER_S / 2, self._send_due)
                return
            if wait_s > 0:
                # Not a spin: the actor's event loop may have this processor, too.
                time.sleep(min(wait_s, _NAP_S))
            self._loop.call_soon(self._send_due)

    def ended(self, number: int, code: str) -> None:
        self._latencies[number] = time.monotonic() - self._began - self._arrivals[number].at
        self._codes[number] = code
        self._left -= 1
        if not self._left:
            self._ended.set_result(None)

    def outcome(self, warm_s: float) -> Outcome:
        """Counts of what was meant to leave after the warm-up."""
        arrivals = self._arrivals
        first = next((n for n, each in enumerate(arrivals) if each.at >= warm_s), len(arrivals))
        numbers: dict[str, list[int]] = {}
        for number in range(first, len(arrivals)):
            numbers.setdefault(arrivals[number].owner, []).append(number)
        return Outcome(
            seconds=arrivals[-1].at - warm_s,
            owners={owner: self._of(found) for owner, found in sorted(numbers.items())},
            behind_s=float(np.percentile(self._behind[first:], 99)),
        )

    def _of(self, numbers: Sequence[int]) -> OwnerOutcome:
        answered = [number for number in numbers if not self._codes[number]]
        latencies = [self._latencies[number] for number in answered]
        budgets = [self._arrivals[number].budget_s for number in answered]
        return OwnerOutcome(
            offered=len(numbers),
            good=sum(latency <= budget for latency, budget in zip(latencies, budgets, strict=True)),
            latencies_s=np.array(latencies, np.float64),
            errors=Counter(self._codes[number] for number in numbers if self._codes[number]),
        )
