"""The router core: takes a request through its plan and gives one answer or one error.

It pins the request to the current epoch, sends each unit's rows to an actor that holds the unit,
fans table look-ups out over their partitions, puts the parts together in order, and ends every
request exactly once: with outputs, with the first error, or at its deadline. It is hosted twice,
in the per-node router actor and in the Ray Serve replica, and knows neither HTTP nor Ray.

Everything happens on one event-loop thread, in callbacks: there is no task, future or lock for a
request. Time comes from the loop's clock.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from batching.errors import (
    DeadlineExceeded,
    Internal,
    NotFound,
    ResourceExhausted,
    ServingError,
    Unavailable,
    error_of,
)
from cluster.deadlines import DeadlineWheel
from cluster.epochs import Epoch
from cluster.peers import Dial, Peer
from cluster.routes import REQUEST, PlannedNode, Routes, SignaturePlan
from cluster.tables import Gather
from shards.replies import STALE
from shards.specs import check
from shards.wire import Frame, Item, ReplyHeader, decode_tensors

__all__ = ["Router", "RouterStats", "Sink"]

logger = logging.getLogger(__name__)

Array = npt.NDArray[np.generic]

_MICROSECOND = 1e6


class Sink(Protocol):
    """Who asked. Exactly one of the two is called, once, on the loop thread."""

    def done(self, outputs: Mapping[str, Array], frame: Sequence[Array] | None) -> None:
        """The answer.

        Args:
            outputs: the signature's outputs by name.
            frame: where the outputs are rows of one reply frame, that frame's tensors: the same
                object for every request answered by the frame, so that a check of all its rows
                can be made once.
        """

    def failed(self, error: ServingError) -> None:
        """The one error."""


class RouterStats(msgspec.Struct):
    """Counts since the start."""

    accepted: int = 0
    answered: int = 0
    failed: int = 0
    expired: int = 0
    refused: int = 0
    retried: int = 0
    late_replies: int = 0


class _Execution:
    """One accepted request on its way through its plan."""

    __slots__ = (
        "calls", "deadline", "inputs", "plan", "retried", "routes", "rows", "sink", "slot",
        "trace", "values", "waiting",
    )  # fmt: skip

    def __init__(
        self,
        routes: Routes,
        plan: SignaturePlan,
        inputs: Mapping[str, Array],
        rows: int,
        deadline: float,
        sink: Sink,
        trace: bytes,
    ) -> None:
        self.routes = routes
        self.plan = plan
        self.inputs = inputs
        self.rows = rows
        self.deadline = deadline
        self.sink = sink
        self.trace = trace
        self.slot = 0
        self.retried = False
        #: numbers of the calls that are under way
        self.calls: set[int] = set()
        #: outputs of finished nodes
        self.values: dict[int, Mapping[str, Array]] = {}
        #: for every node, how many of its needs are not there yet
        self.waiting: list[int] = []


class _Call:
    """One item sent to one actor."""

    __slots__ = ("execution", "gather", "node", "peer", "positions")

    def __init__(
        self,
        execution: _Execution,
        node: PlannedNode,
        peer: Peer,
        gather: Gather | None = None,
        positions: npt.NDArray[np.intp] | None = None,
    ) -> None:
        self.execution = execution
        self.node = node
        self.peer = peer
        self.gather = gather
        self.positions = positions


class Router:
    """Routes requests over one epoch at a time.

    Args:
        loop: the loop whose thread everything runs on.
        dial: opens a link to an endpoint.
        in_flight_max: accepted requests at one time; beyond, `submit` refuses.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, dial: Dial, in_flight_max: int = 16384
    ) -> None:
        self.stats = RouterStats()
        self._loop = loop
        self._clock: Callable[[], float] = time.monotonic
        self._dial = dial
        self._in_flight_max = in_flight_max
        self._routes = Routes(Epoch(term=0, number=0))
        self._old_routes: list[Routes] = []
        self._peers: dict[str, Peer] = {}
        self._calls: dict[int, _Call] = {}
        self._next_call = 1
        self._wheel: DeadlineWheel[_Execution] = DeadlineWheel()
        self._timer: asyncio.TimerHandle | None = None
        self._armed_for = math.inf
        self._in_flight = 0

    # Epochs

    @property
    def routes(self) -> Routes:
        """The current routing table."""
        return self._routes

    @property
    def in_flight(self) -> int:
        """Accepted requests that have not ended."""
        return self._in_flight

    def oldest_live_epoch(self) -> int:
        """The lowest epoch number to which a request is still pinned, or the current one."""
        self._old_routes = [routes for routes in self._old_routes if routes.live]
        return self._old_routes[0].number if self._old_routes else self._routes.number

    async def adopt(self, epoch: Epoch, timeout_s: float = 5.0) -> None:
        """Make an epoch current, once its actors are connected.

        New requests are pinned to it from then on; older ones end on theirs. An epoch that is not
        newer than the current one is ignored. An actor that cannot be reached in time does not
        hold the epoch back: its calls fail until it can.
        """
        if (epoch.term, epoch.number) <= (self._routes.epoch.term, self._routes.number):
            return
        routes = Routes(epoch)
        fresh: list[Peer] = []
        for name, endpoint in epoch.endpoints.items():
            peer = self._peers.get(name)
            if peer is None or peer.endpoint != endpoint:
                if peer is not None:
                    peer.retire()
                peer = self._peers[name] = Peer(endpoint, self, self._dial, self._loop)
                fresh.append(peer)
        if fresh:
            await asyncio.gather(*(peer.wait_up(timeout_s) for peer in fresh))
        if (epoch.term, epoch.number) <= (self._routes.epoch.term, self._routes.number):
            return
        self._old_routes.append(self._routes)
        self._routes = routes
        for name in [name for name in self._peers if name not in epoch.endpoints]:
            self._peers.pop(name).retire()

    def close(self) -> None:
        """Close every link and fail what is under way."""
        if self._timer is not None:
            self._timer.cancel()
        for peer in self._peers.values():
            peer.retire()
        self._peers.clear()
        for call in list(self._calls.values()):
            self._fail(call.execution, Unavailable("the router is shutting down"))

    # Requests

    def submit(
        self,
        plan: SignaturePlan,
        inputs: Mapping[str, Array],
        rows: int,
        deadline: float,
        sink: Sink,
        trace: bytes = b"",
    ) -> None:
        """Take a request; its sink is called exactly once, possibly before this returns.

        Args:
            plan: from the current `routes`.
            inputs: the signature's inputs, already checked against their specs.
            rows: size of the batch dimension.
            deadline: instant on the loop's clock after which the answer is worthless.
            sink: who gets the answer.
            trace: opaque trace context, passed on.
        """
        stats = self.stats
        if self._in_flight >= self._in_flight_max:
            stats.refused += 1
            sink.failed(
                ResourceExhausted(f"{self._in_flight} requests are in flight, the limit", 100)
            )
            return
        routes = self._routes
        execution = _Execution(routes, plan, inputs, rows, deadline, sink, trace)
        stats.accepted += 1
        routes.live += 1
        self._in_flight += 1
        execution.slot = self._wheel.add(execution, deadline)
        if deadline < self._armed_for:
            self._arm()
        self._start(execution)

    def _start(self, execution: _Execution) -> None:
        plan = execution.plan
        try:
            if plan.direct is not None:
                self._send_rows(execution, plan.direct)
                return
            execution.waiting = [len(node.needs) for node in plan.nodes]
            for index in plan.roots:
                self._begin(execution, plan.nodes[index])
        except ServingError as error:
            self._fail(execution, error)

    def _begin(self, execution: _Execution, node: PlannedNode) -> None:
        if node.table is None:
            self._send_rows(execution, node)
        else:
            self._send_ids(execution, node)

    def _send_rows(self, execution: _Execution, node: PlannedNode) -> None:
        values = execution.values
        inputs = execution.inputs
        arrays = tuple(
            [inputs[name] if at == REQUEST else values[at][name] for _, (at, name) in node.inputs]
        )
        if execution.plan.direct is None:
            check(
                node.specs,
                {name: array for (name, _), array in zip(node.inputs, arrays, strict=True)},
                node.limits,
            )
        peer = self._choose(node.holders[0], node)
        self._send(_Call(execution, node, peer), "run", execution.rows, arrays)

    def _send_ids(self, execution: _Execution, node: PlannedNode) -> None:
        [(_, (at, name))] = node.inputs
        ids = execution.inputs[name] if at == REQUEST else execution.values[at][name]
        holders = [self._choose(names, node).endpoint.actor for names in node.holders]
        gather = Gather(node, ids)
        for holder, positions in gather.split(holders).items():
            call = _Call(execution, node, self._peers[holder], gather, positions)
            self._send(call, "rows", len(positions), (gather.ids_at(positions),))
        if gather.is_complete:  # nothing to ask: no ids, or none that exist
            self._arrived(execution, node, {"rows": gather.rows()})

    def _choose(self, names: Sequence[str], node: PlannedNode) -> Peer:
        best: Peer | None = None
        for name in names:
            peer = self._peers.get(name)
            if (
                peer is not None
                and peer.is_up
                and (best is None or peer.in_flight < best.in_flight)
            ):
                best = peer
        if best is None:
            raise Unavailable(
                f"no actor that holds unit {node.unit[:12]} can be reached "
                f"({', '.join(names) or 'none is up'})",
                1000,
            )
        return best

    def _send(self, call: _Call, op: str, rows: int, arrays: tuple[Array, ...]) -> None:
        execution, node = call.execution, call.node
        number = self._next_call
        self._next_call = number + 1
        remaining_us = int((execution.deadline - self._clock()) * _MICROSECOND)
        item = Item(number, rows, remaining_us, execution.trace)
        call.peer.send(node.unit, op, execution.plan.epoch, item, arrays, merge=node.merge)
        call.peer.in_flight += 1
        self._calls[number] = call
        execution.calls.add(number)

    # Replies

    def on_reply(self, peer: Peer, frame: Frame) -> None:
        """Give every answered or refused item of a frame to its request."""
        header = frame.header
        assert isinstance(header, ReplyHeader)
        tensors = decode_tensors(header.tensors, frame.body)
        at = 0
        for number, rows in header.items:
            start, at = at, at + rows
            call = self._calls.pop(number, None)
            if call is None:
                self.stats.late_replies += 1
                continue
            peer.in_flight -= 1
            call.execution.calls.discard(number)
            if header.unit != call.node.unit:
                # Another unit's rows must never be merged into this answer.
                self._fail(call.execution, Internal("an actor answered for another unit"))
                continue
            parts = [tensor[start:at] for tensor in tensors]
            self._on_part(call, parts, tensors)
        for failure in header.errors:
            call = self._calls.pop(failure.request, None)
            if call is None:
                continue
            peer.in_flight -= 1
            call.execution.calls.discard(failure.request)
            if failure.code == STALE:
                self._retry(call.execution, Unavailable(failure.message, 100))
            else:
                error = error_of(failure.code, failure.message, failure.retry_after_ms)
                self._fail(call.execution, error)

    def on_unsent(self, peer: Peer, requests: list[int], error: Exception) -> None:
        """End requests whose frame could not be sent."""
        for number in requests:
            call = self._calls.pop(number, None)
            if call is not None:
                peer.in_flight -= 1
                call.execution.calls.discard(number)
                self._fail(call.execution, _as_serving(error))

    def on_peer_lost(self, peer: Peer, error: Exception) -> None:
        """Retry elsewhere, or end, what was asked over a broken link."""
        lost = [number for number, call in self._calls.items() if call.peer is peer]
        peer.in_flight = 0
        for number in lost:
            call = self._calls.pop(number, None)
            if call is not None:  # an earlier one of these may have ended its whole request
                call.execution.calls.discard(number)
                reason = f"actor {peer.endpoint.actor} was lost: {error}"
                self._retry(call.execution, Unavailable(reason, 1000))

    def _on_part(self, call: _Call, parts: list[Array], frame: Sequence[Array]) -> None:
        execution, node = call.execution, call.node
        if len(parts) != len(node.outputs):
            self._fail(execution, Internal("an actor answered with another number of tensors"))
            return
        if node is execution.plan.direct:
            values = dict(zip(node.outputs, parts, strict=True))
            outputs = {name: values[source] for name, (_, source) in execution.plan.returns}
            self._finish(execution, outputs, frame)
            return
        try:
            if call.gather is None:
                self._arrived(execution, node, dict(zip(node.outputs, parts, strict=True)))
            else:
                assert call.positions is not None
                call.gather.put(call.positions, parts[0])
                if call.gather.is_complete:
                    self._arrived(execution, node, {"rows": call.gather.rows()})
        except ServingError as error:
            self._fail(execution, error)

    def _arrived(
        self, execution: _Execution, node: PlannedNode, outputs: Mapping[str, Array]
    ) -> None:
        execution.values[node.index] = outputs
        for index in node.feeds:
            execution.waiting[index] -= 1
            if execution.waiting[index] == 0:
                self._begin(execution, execution.plan.nodes[index])
        if len(execution.values) == len(execution.plan.nodes):
            values = execution.values
            answer = {
                name: execution.inputs[source] if at == REQUEST else values[at][source]
                for name, (at, source) in execution.plan.returns
            }
            self._finish(execution, answer, None)

    # Ends

    def _retry(self, execution: _Execution, error: ServingError) -> None:
        """Run the whole request once more on the current epoch, or end it.

        Inference has no side effects, so running it twice is safe. The retry starts from the
        beginning: parts of two epochs are never merged.
        """
        if execution.retried or execution.slot < 0:
            self._fail(execution, error)
            return
        self._abandon(execution)
        plan = execution.plan
        try:
            served = self._routes.find(plan.servable, plan.version)
        except NotFound:
            self._fail(execution, error)
            return
        execution.retried = True
        self.stats.retried += 1
        execution.routes.live -= 1
        execution.routes = self._routes
        execution.routes.live += 1
        execution.plan = served.plans[plan.name]
        execution.values = {}
        self._start(execution)

    def _finish(
        self, execution: _Execution, outputs: Mapping[str, Array], frame: Sequence[Array] | None
    ) -> None:
        self._end(execution)
        self.stats.answered += 1
        execution.sink.done(outputs, frame)

    def _fail(self, execution: _Execution, error: ServingError) -> None:
        if execution.slot < 0:
            return
        self._abandon(execution)
        self._end(execution)
        self.stats.failed += 1
        execution.sink.failed(error)

    def _end(self, execution: _Execution) -> None:
        assert execution.slot >= 0, "a request ended twice"
        self._wheel.remove(execution, execution.slot)
        execution.slot = -1
        execution.routes.live -= 1
        self._in_flight -= 1

    def _abandon(self, execution: _Execution) -> None:
        for number in execution.calls:
            call = self._calls.pop(number, None)
            if call is not None:
                call.peer.in_flight -= 1
                call.peer.cancel(number)
        execution.calls.clear()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._armed_for = math.inf
        wakeup = self._wheel.next_wakeup()
        if wakeup is not None:
            self._armed_for = wakeup
            self._timer = self._loop.call_at(wakeup, self._on_timer)

    def _on_timer(self) -> None:
        for execution in self._wheel.expired(self._clock()):
            self.stats.expired += 1
            self._fail(execution, DeadlineExceeded("the deadline passed before the answer came"))
        self._arm()


def _as_serving(error: Exception) -> ServingError:
    return error if isinstance(error, ServingError) else Unavailable(str(error), 1000)
