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
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from batching.allowance import CRITICAL
from batching.errors import (
    Cancelled,
    Code,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    ServingError,
    Unavailable,
    error_of,
)
from cluster.asking import Asking
from cluster.deadlines import DeadlineWheel
from cluster.dialing import Dial
from cluster.epochs import Epoch
from cluster.hot_rows import HotRows, resized
from cluster.peers import Peer
from cluster.pending import Call, Execution, RouterStats, Sink
from cluster.roster import Roster
from cluster.routes import REQUEST, PlannedNode, Routes, SignaturePlan
from shards.awake import FEW, Awake
from shards.replies import STALE, UNJOINED
from shards.together import parted
from shards.wire import Frame, ItemError, ReplyHeader, decode_tensors

__all__ = ["Execution", "Router", "RouterStats", "Sink"]

logger = logging.getLogger(__name__)

Array = npt.NDArray[np.generic]


class Router:
    """Routes requests over one epoch at a time.

    Args:
        loop: the loop whose thread everything runs on.
        dial: opens a link to an endpoint.
        in_flight_max: accepted requests at one time; beyond, `submit` refuses.
        clock: the loop's, or one that agrees with it; a loop may tell the time only once a turn.
        nonce: distinct for every router process; None takes a random one.
        awake_s: for so long after a device's answer the loop looks for more (`shards.awake`).
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        dial: Dial,
        in_flight_max: int = 16384,
        clock: Callable[[], float] = time.monotonic,
        nonce: int | None = None,
        awake_s: float = 0.0,
    ) -> None:
        self.stats = RouterStats()
        self._loop = loop
        self._clock = clock
        self._in_flight_max = in_flight_max
        self._routes = Routes(Epoch(term=0, number=0))
        self._old_routes: list[Routes] = []
        #: the epoch whose actors are being connected
        self._incoming: Epoch | None = None
        self._roster = Roster(self, dial, loop)
        self._asking = Asking(
            self._roster,
            self.stats,
            clock,
            secrets.randbits(31) if nonce is None else nonce,
            loop.call_at,
        )
        self._wheel: DeadlineWheel[Execution] = DeadlineWheel()
        self._timer: asyncio.TimerHandle | None = None
        self._armed_for = math.inf
        self._in_flight = 0
        self._awake = Awake(loop, awake_s, clock)

    # Epochs

    @property
    def routes(self) -> Routes:
        """The current routing table."""
        return self._routes

    @property
    def peers(self) -> Iterable[Peer]:
        """The actors that some epoch in use names."""
        return self._roster

    @property
    def hot_rows(self) -> HotRows | None:
        """Rows of tables that are kept here, where that is declared."""
        return self._asking.thrift.hot

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
        routes = Routes(epoch, self._routes)
        self._incoming = epoch
        await self._roster.connect(epoch.endpoints, timeout_s)
        if (epoch.term, epoch.number) <= (self._routes.epoch.term, self._routes.number):
            return
        self._old_routes.append(self._routes)
        self._routes = routes
        thrift = self._asking.thrift
        thrift.hot = resized(thrift.hot, epoch.hot_rows_bytes)
        self._retire_unrouted()

    def close(self) -> None:
        """Close every link and fail what is under way."""
        if self._timer is not None:
            self._timer.cancel()
        self._asking.close()
        self._roster.retain(())
        for call in list(self._asking.calls.values()):
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
        criticality: int = CRITICAL,
    ) -> Execution | None:
        """Take a request; its sink is called exactly once, possibly before this returns.

        Args:
            plan: from the current `routes`.
            inputs: the signature's inputs, already checked against their specs.
            rows: size of the batch dimension.
            deadline: instant on the loop's clock after which the answer is worthless.
            sink: who gets the answer.
            trace: opaque trace context, passed on.
            criticality: the most that its rows may have; the servable may be allowed less.

        Returns:
            What `cancel` wants; None for a request that has ended already.
        """
        stats = self.stats
        if rows < 1:
            stats.refused += 1
            sink.failed(InvalidArgument("a request needs at least one row"))
            return None
        if self._in_flight >= self._in_flight_max:
            stats.refused += 1
            sink.failed(
                ResourceExhausted(f"{self._in_flight} requests are in flight, the limit", 100)
            )
            return None
        routes = self._routes
        execution = Execution(routes, plan, inputs, rows, deadline, sink, trace, criticality)
        stats.accepted += 1
        routes.live += 1
        self._in_flight += 1
        execution.slot = self._wheel.add(execution, deadline)
        if deadline < self._armed_for:
            self._arm()
        self._start(execution)
        return execution if execution.slot >= 0 else None

    def cancel(self, request: Execution) -> None:
        """End a request whose asker has gone: its rows leave lanes, its sink hears `Cancelled`.

        One that has ended is left as it is. What a device is already working on is finished
        there, and its answer dropped.
        """
        if request.slot >= 0:
            self.stats.cancelled += 1
            self._fail(request, Cancelled("the client has gone"))

    def _start(self, execution: Execution) -> None:
        plan = execution.plan
        try:
            if plan.direct is not None:
                self._asking.send_direct(execution, plan.direct)
                return
            self._asking.check_in_time(execution)
            execution.values = {}
            execution.waiting = [len(node.needs) for node in plan.nodes]
            for index in plan.roots:
                self._begin(execution, plan.nodes[index])
            if not plan.nodes:  # the signature returns its inputs
                self._complete(execution)
        except ServingError as error:
            self._fail(execution, error)
        except Exception:
            # Whatever it is, the request must end, and once.
            logger.exception("a request could not be started")
            self._fail(execution, Internal("internal error"))

    def _begin(self, execution: Execution, node: PlannedNode) -> None:
        for ready, outputs in self._asking.begin(execution, node):
            if execution.slot >= 0:
                self._arrived(execution, ready, outputs)

    # Replies

    def on_reply(self, peer: Peer, frame: Frame) -> None:
        """Give every answered or refused item of a frame to its request."""
        header = frame.header
        assert isinstance(header, ReplyHeader)
        if header.also:
            for each, parts in parted(header, frame.body):
                self._on_answer(peer, each, parts)
        else:
            self._on_answer(peer, header, decode_tensors(header.tensors, frame.body))

    def _on_answer(self, peer: Peer, header: ReplyHeader, tensors: list[Array]) -> None:
        at = 0
        total = (sum([rows for _, rows in header.items]),)
        fits = all([tensor.shape[:1] == total for tensor in tensors])
        if header.row_us:
            if self._in_flight <= FEW:
                self._awake.heard()
            self._asking.answered(peer, header)
        take, unit, cut = self._asking.take, header.unit, header.plan
        for number, rows in header.items:
            start, at = at, at + rows
            call = take(number)
            if call is None:
                self.stats.late_replies += 1
                continue
            node = call.node
            if (
                unit != call.address
                or cut != node.plan
                or rows != call.rows
                or call.onward is not None
                or not fits
            ):
                # Another unit's rows, or another number of them, must never get into an answer.
                self.stats.mismatched += 1
                text = f"actor {peer.endpoint.actor} answered something else than it was asked"
                self._fail(call.execution, Internal(text))
                continue
            execution = call.execution
            plan = execution.plan
            if plan.direct is node and len(tensors) == len(node.outputs):
                answer = {}
                for name, place in plan.direct_returns:
                    answer[name] = tensors[place][start:at]
                self._finish(execution, answer, tensors)
            else:
                self._on_part(call, [tensor[start:at] for tensor in tensors])
        for failure in header.errors:
            call = self._asking.take(failure.request)
            if call is None:
                self.stats.late_replies += 1
                continue
            if failure.code == UNJOINED:
                self._asking.detour(call)
            if failure.code in (STALE, UNJOINED):
                self._retry(call.execution, Unavailable(failure.message, 100))
                continue
            reason = self._reason(call, failure)
            is_busy = failure.code == Code.RESOURCE_EXHAUSTED and failure.retry_after_ms
            is_away = failure.code == Code.UNAVAILABLE
            # A part's time ends before its request's, if other units follow: some may be left.
            was_late = failure.code == Code.DEADLINE_EXCEEDED
            if not (
                (is_busy and self._asking.ask_elsewhere(call))
                or self._asking.goes_on(call, anew=is_away or was_late or bool(is_busy))
            ):
                self._fail(call.execution, reason)

    def _reason(self, call: Call, failure: ItemError) -> ServingError:
        """Why an actor did not answer, as the request's asker is told."""
        if failure.code == Code.RESOURCE_EXHAUSTED and failure.retry_after_ms:
            self._asking.refused(call, failure.retry_after_ms)
        elif failure.code == Code.DEADLINE_EXCEEDED and call.due < call.execution.deadline:
            # Its unit's time is up, not the request's: the rest is needed for the units after it.
            text = f"actor {call.peer.endpoint.actor} left too little time for the units after its"
            return ResourceExhausted(text, 1)
        return error_of(failure.code, failure.message, failure.retry_after_ms)

    def on_unsent(self, peer: Peer, requests: list[int], error: ServingError) -> None:
        """Retry elsewhere, or end, requests whose frame could not be sent."""
        for number in requests:
            call = self._asking.take(number)
            if call is not None:  # an earlier one of these may have ended its whole request
                is_away = isinstance(error, Unavailable)
                if self._asking.goes_on(call, anew=is_away):
                    continue
                if is_away:
                    self._retry(call.execution, error)
                else:
                    self._fail(call.execution, error)

    def on_peer_lost(self, peer: Peer, error: Exception) -> None:
        """Retry elsewhere, or end, what was asked over a broken link."""
        lost = [number for number, call in self._asking.calls.items() if call.peer is peer]
        for number in lost:
            call = self._asking.take(number)
            # An earlier one of these may have ended its whole request.
            if call is not None and not self._asking.goes_on(call, anew=True):
                reason = f"actor {peer.endpoint.actor} was lost: {error}"
                self._retry(call.execution, Unavailable(reason, 1000))

    def _on_part(self, call: Call, parts: list[Array]) -> None:
        execution, node = call.execution, call.node
        self._asking.settle(call)
        if len(parts) != len(node.outputs):
            self._fail(execution, Internal("an actor answered with another number of tensors"))
            return
        try:
            if call.gather is not None:
                assert call.positions is not None
                call.gather.put(call.positions, parts[0])
                if call.gather.is_complete:
                    self._arrived(execution, node, {"rows": call.gather.rows()})
            elif call.partials is not None:
                call.partials.put(call.partition, parts)
                if call.partials.is_complete:
                    for ready, outputs in call.partials.outputs(call.rows):
                        if execution.slot >= 0:
                            self._arrived(execution, ready, outputs)
            else:
                self._arrived(execution, node, dict(zip(node.outputs, parts, strict=True)))
        except ServingError as error:
            self._fail(execution, error)

    def _arrived(
        self, execution: Execution, node: PlannedNode, outputs: Mapping[str, Array]
    ) -> None:
        execution.values[node.index] = outputs
        for index in node.feeds:
            execution.waiting[index] -= 1
            if execution.waiting[index] == 0:
                self._begin(execution, execution.plan.nodes[index])
        # A look-up with nothing to ask arrives at once, inside the loop, and may be the last.
        if execution.slot >= 0 and len(execution.values) == len(execution.plan.nodes):
            self._complete(execution)

    def _complete(self, execution: Execution) -> None:
        values = execution.values
        answer = {
            name: execution.inputs[source] if at == REQUEST else values[at][source]
            for name, (at, source) in execution.plan.returns
        }
        self._finish(execution, answer, None)

    # Ends

    def _retry(self, execution: Execution, error: ServingError) -> None:
        """Run the whole request once more on the current epoch, or end it.

        Inference has no side effects, so running it twice is safe. The retry starts from the
        beginning: parts of two epochs are never merged.
        """
        if execution.retried or execution.slot < 0:
            self._fail(execution, error)
            return
        self._asking.abandon(execution)
        plan = execution.plan
        try:
            served = self._routes.find(plan.servable, plan.version)
        except NotFound:
            self._fail(execution, error)
            return
        execution.retried = True
        self.stats.retried += 1
        before, execution.routes = execution.routes, self._routes
        execution.routes.live += 1
        self._unpin(before)
        execution.plan = served.plans[plan.name]
        self._start(execution)

    def _finish(
        self, execution: Execution, outputs: Mapping[str, Array], frame: Sequence[Array] | None
    ) -> None:
        # `_end`, written out: every answered request passes here.
        slot = execution.slot
        assert slot >= 0, "a request ended twice"
        self._wheel.remove(execution, slot)
        execution.slot = -1
        self._in_flight -= 1
        routes = execution.routes
        if routes is self._routes:
            routes.live -= 1
        else:
            self._unpin(routes)
        self.stats.answered += 1
        try:
            execution.sink.done(outputs, frame)
        except Exception:  # the requests that share its frame must not suffer
            logger.exception("a sink failed over an answer")

    def _fail(self, execution: Execution, error: ServingError) -> None:
        if execution.slot < 0:
            return
        self._asking.abandon(execution)
        self._end(execution)
        self.stats.failed += 1
        try:
            execution.sink.failed(error)
        except Exception:  # those that fail for the same reason must hear of it, too
            logger.exception("a sink failed over an error")

    def _end(self, execution: Execution) -> None:
        assert execution.slot >= 0, "a request ended twice"
        self._wheel.remove(execution, execution.slot)
        execution.slot = -1
        self._in_flight -= 1
        self._unpin(execution.routes)

    def _unpin(self, routes: Routes) -> None:
        routes.live -= 1
        if not routes.live and routes is not self._routes:
            self._retire_unrouted()

    def _retire_unrouted(self) -> None:
        """Close the links that no epoch uses to which new or old requests are pinned."""
        self._old_routes = [routes for routes in self._old_routes if routes.live]
        named = set(self._routes.epoch.endpoints)
        named.update(*(routes.epoch.endpoints for routes in self._old_routes))
        if self._incoming is not None:
            named.update(self._incoming.endpoints)
        self._roster.retain(named)

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
            calls = [self._asking.calls[number] for number in execution.calls]
            owing = ", ".join(sorted({call.peer.endpoint.actor for call in calls}))
            text = f"the deadline passed before the answer came (of {owing or 'nobody'})"
            self._fail(execution, DeadlineExceeded(text))
        self._arm()
