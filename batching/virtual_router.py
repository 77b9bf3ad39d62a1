"""Imagined routers: turns, frames over a network that takes its time, and a choice of devices.

What a router does is what `cluster.router` does: everything that came while it was busy is done in
the next turn, rows for one unit of one device leave in one frame, a request's units follow each
other, and a request ends at its deadline whatever its device does. Which device is asked, and who
is turned away because none would be in time, is decided by the same code (`batching.busyness`).
Does not know batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from random import Random
from typing import Final

from batching.busyness import Busyness, Whose, soonest
from batching.errors import ResourceExhausted
from batching.outcomes import Arrival, Outcome
from batching.reply_times import ReplyTimes
from batching.values import LaneKey
from batching.virtual import Serial, VirtualTime, varied
from batching.virtual_device import Call, End, Told, VirtualDevice

__all__ = ["Network", "VirtualRouter"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Seconds that routers, and the ways between them and devices, take.

    Attributes:
        turn_s: of a router, for each turn of its loop.
        request_s: of a router, for each request or answer in the turn.
        delay_s: mean seconds that a frame is under way.
        delay_cv: coefficient of variation of that. Frames of one way do not overtake each other.
    """

    turn_s: float = 0.0
    request_s: float = 0.0
    delay_s: float = 0.0
    delay_cv: float = 0.0


class _Way:
    """Frames from one to another, in order."""

    __slots__ = ("_last_at", "_network", "_random", "_time")

    def __init__(self, time: VirtualTime, network: Network, random: Random) -> None:
        self._time: Final = time
        self._network: Final = network
        self._random: Final = random
        self._last_at = 0.0

    def send(self, then: Callable[[], None]) -> None:
        network = self._network
        if not network.delay_s:
            then()
            return
        delay_s = network.delay_s * varied(network.delay_cv, self._random)
        self._last_at = max(self._last_at, self._time.now + delay_s)
        self._time.at(self._last_at, then)


class _Peer:
    """A device as a router sees it: calls under way, what it says, the ways there and back."""

    __slots__ = ("back", "busyness", "device", "in_flight", "there")

    def __init__(self, device: VirtualDevice, there: _Way, back: _Way) -> None:
        self.device: Final = device
        self.there: Final = there
        self.back: Final = back
        self.busyness: Final = Busyness()
        self.in_flight = 0


class _Request:
    """A request under way: where it is, by when that unit is due, and whether it has ended."""

    __slots__ = ("arrival", "call", "due", "has_ended", "outcome", "peer", "sent_at", "stage")

    def __init__(self, arrival: Arrival, outcome: Outcome) -> None:
        self.arrival: Final = arrival
        self.outcome: Final = outcome
        self.stage = 0
        self.due = self.sent_at = 0.0
        self.has_ended = False
        self.call: Call | None = None
        self.peer: _Peer | None = None

    @property
    def lane(self) -> LaneKey:
        return self.arrival.then[self.stage - 1] if self.stage else self.arrival.lane

    @property
    def deadline(self) -> float:
        return self.arrival.at + self.arrival.budget_s


class VirtualRouter:
    """One router.

    Attributes:
        ended_at: when the last request that has ended did.

    Args:
        time: everybody's.
        network: what it and its ways take.
        holders: devices by the lanes that they serve.
        outcomes: by owner and priority; shared by all routers.
        random: of the delays.
        counts_from: requests that come before are served and not counted.
        keeps_deadlines: whether a request ends at its deadline, is turned away where no device
            would be in time, and leaves later units what they need. Without, late answers are
            counted as such.
    """

    def __init__(
        self,
        time: VirtualTime,
        network: Network,
        holders: Mapping[LaneKey, Sequence[VirtualDevice]],
        outcomes: dict[tuple[str, int], Outcome],
        random: Random,
        counts_from: float,
        *,
        keeps_deadlines: bool,
    ) -> None:
        self._time: Final = time
        self._network: Final = network
        self._outcomes: Final = outcomes
        self._counts_from: Final = counts_from
        self._uncounted: Final = Outcome()
        self._keeps_deadlines: Final = keeps_deadlines
        self._loop: Final = Serial(time)
        #: a router that takes no time has no turns
        self._is_instant: Final = not (network.turn_s or network.request_s)
        self._inbox: list[Callable[[], None]] = []
        self._is_turning = False
        self._frames: dict[tuple[int, LaneKey, str], tuple[_Peer, list[Call]]] = {}
        self._requests: Final[dict[Call, _Request]] = {}
        self._times: Final = ReplyTimes()
        self.ended_at = 0.0
        peers: dict[int, _Peer] = {}
        self._holders: Final[dict[LaneKey, list[_Peer]]] = {}
        for lane, devices in holders.items():
            for device in devices:
                if id(device) not in peers:
                    ways = (_Way(time, network, random), _Way(time, network, random))
                    peers[id(device)] = _Peer(device, *ways)
            self._holders[lane] = [peers[id(device)] for device in devices]

    def on_arrival(self, arrival: Arrival) -> None:
        """A client asks."""
        outcome = self._uncounted
        if arrival.at >= self._counts_from:
            outcome = self._outcomes.setdefault((arrival.owner, arrival.priority), Outcome())
        outcome.offered += 1
        request = _Request(arrival, outcome)
        if self._keeps_deadlines and arrival.budget_s < inf:
            self._time.at(request.deadline, partial(self._on_deadline, request))
        if self._is_instant:
            self._ask(request)
            self._flush()
        else:
            self._enter(partial(self._ask, request))

    def on_reply(self, ends: Sequence[Told], news: tuple[int, int]) -> None:
        """A device tells how calls ended; see `Sender`."""
        peer = self._requests[ends[0].call].peer
        assert peer is not None
        peer.back.send(partial(self._on_frame, peer, ends, news))

    def _on_frame(self, peer: _Peer, ends: Sequence[Told], news: tuple[int, int]) -> None:
        if news[1]:
            peer.busyness.answered(_whose(ends[0].call), *news, self._time.now)
        for told in ends:
            if self._is_instant:
                self._on_end(told)
            else:
                self._enter(partial(self._on_end, told))
        if self._is_instant:
            self._flush()

    # Turns

    def _enter(self, work: Callable[[], None]) -> None:
        """Do this in the next turn, together with all that comes until then."""
        self._inbox.append(work)
        if not self._is_turning:
            self._is_turning = True
            self._time.at(self._loop.free_at, self._turn)

    def _turn(self) -> None:
        works, self._inbox = self._inbox, []
        seconds = self._network.turn_s + self._network.request_s * len(works)
        self._loop.work(seconds, partial(self._finish_turn, works))

    def _finish_turn(self, works: Sequence[Callable[[], None]]) -> None:
        for work in works:
            work()
        self._flush()
        self._is_turning = bool(self._inbox)
        if self._inbox:
            self._time.at(self._time.now, self._turn)

    def _flush(self) -> None:
        if not self._frames:
            return
        frames, self._frames = self._frames, {}
        for peer, calls in frames.values():
            peer.there.send(partial(peer.device.on_calls, calls))

    # Requests

    def _ask(self, request: _Request) -> None:
        if request.has_ended:
            return
        arrival, lane = request.arrival, request.lane
        now = request.sent_at = self._time.now
        request.due = request.deadline
        if self._keeps_deadlines and request.stage < len(arrival.then):
            later = arrival.then[request.stage :]
            later_s = sum([self._times.least_s(each.unit) for each in later])
            request.due = self._times.due(request.deadline, later_s, now)
        is_later = request.stage > 0
        call = Call(
            arrival.owner, lane, arrival.rows, request.due - now, arrival.priority, self,
            is_later=is_later,
        )  # fmt: skip
        try:
            peer = soonest(
                self._holders[lane],
                _whose(call),
                arrival.rows,
                request.due,
                now,
                asks_anyway=is_later or not self._keeps_deadlines,
            )
        except ResourceExhausted:
            self._end(request)
            request.outcome.refused += 1
            return
        assert peer is not None, "a lane without a device"
        request.call, request.peer = call, peer
        self._requests[call] = request
        peer.in_flight += 1
        key = (id(peer), lane, arrival.owner)
        self._frames.setdefault(key, (peer, []))[1].append(call)

    def _on_end(self, told: Told) -> None:
        call, end, retry_ms = told
        request = self._requests.pop(call)
        assert request.peer is not None
        request.peer.in_flight -= 1
        if retry_ms:
            now = self._time.now
            request.peer.busyness.refused(_whose(call), request.due, retry_ms, now)
        if request.has_ended:
            return
        if end is End.ANSWERED and request.arrival.then:
            self._times.observe(call.lane.unit, self._time.now - request.sent_at)
        if end is End.ANSWERED and request.stage < len(request.arrival.then):
            request.stage += 1
            self._ask(request)
            return
        self._end(request)
        outcome = request.outcome
        match end:
            case End.ANSWERED:
                latency_s = self._time.now - request.arrival.at
                outcome.latencies_s.append(latency_s)
                if latency_s <= request.arrival.budget_s:
                    outcome.good += 1
                else:
                    outcome.late += 1
            case End.REFUSED:
                outcome.refused += 1
            case End.EXPIRED:
                outcome.expired += 1
            case End.SHED:
                outcome.shed += 1

    def _end(self, request: _Request) -> None:
        assert not request.has_ended, "a request ended twice"
        request.has_ended = True
        self.ended_at = self._time.now

    def _on_deadline(self, request: _Request) -> None:
        if request.has_ended:
            return
        self._end(request)
        request.outcome.expired += 1
        call, peer = request.call, request.peer
        if call is not None and call in self._requests:
            assert peer is not None
            peer.there.send(partial(self._cancel, peer, call))

    def _cancel(self, peer: _Peer, call: Call) -> None:
        """The device hears that nobody wants the answer any more."""
        if peer.device.on_cancel(call) and call in self._requests:
            # What was cancelled is answered by nobody.
            del self._requests[call]
            peer.in_flight -= 1

    # Views

    def check_idle(self) -> None:
        """Hold that no request is under way."""
        assert not self._requests, self._requests
        assert not self._inbox
        assert not self._frames
        assert self._uncounted.ended == self._uncounted.offered
        assert all(peer.in_flight == 0 for peers in self._holders.values() for peer in peers)


def _whose(call: Call) -> Whose:
    return (call.lane.unit, call.owner, call.priority)
