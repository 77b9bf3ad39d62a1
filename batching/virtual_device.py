"""An imagined device actor: the real batcher, an event loop and a device that take their time.

What happens in which order is what `shards.engine` does: a frame's rows are offered on the event
loop, batches go to the device one behind the other, and what comes back waits for the loop to
deliver it. How long each takes is given. Does not know who sends rows, nor what they are for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from math import inf
from random import Random
from typing import Final, NamedTuple, Protocol, TypeAlias

from batching.batcher import Batcher
from batching.buckets import Ladder
from batching.costs import SizeCost
from batching.errors import ServingError
from batching.outcomes import DeviceReport
from batching.values import Batch, Effect, Expired, Failed, Finished, LaneKey, Run, Shed, Ticket
from batching.virtual import Serial, VirtualTime

__all__ = [
    "Call",
    "CostModel",
    "Durations",
    "End",
    "HostCosts",
    "Sender",
    "SimulatedLane",
    "Told",
    "VirtualDevice",
]

#: Mean device seconds of a batch, by lane and bucket.
CostModel: TypeAlias = Callable[[LaneKey, int], float]
#: Device seconds of one batch: drawn anew for each.
Durations: TypeAlias = Callable[[LaneKey, int, Random], float]

#: Checking everything after every event would take most of a run.
_CHECK_EVERY: Final = 512
_NO_NEWS: Final = (0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedLane:
    """A lane of a device.

    Attributes:
        key: its name.
        ladder: its compiled sizes.
        rows_max: the most rows of an owner in line.
        known: what the device has measured of it when the run begins. None: the mean of every size,
            as after a warm-up.
    """

    key: LaneKey
    ladder: Ladder
    rows_max: int = 4096
    known: Mapping[int, SizeCost] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HostCosts:
    """Seconds that a device actor needs around its batches.

    Attributes:
        frame_s: of its event loop, for a frame that comes.
        request_s: of its event loop, for each request in it.
        batch_s: of its event loop, for a batch that comes back.
        answer_s: of its event loop, for each request that is answered.
        hop_s: until another thread goes on with what it was handed.
        shares_core: whether the event loop and the device run on one core, so that the device
            stands still while the loop works.
    """

    frame_s: float = 0.0
    request_s: float = 0.0
    batch_s: float = 0.0
    answer_s: float = 0.0
    hop_s: float = 0.0
    shares_core: bool = False


class Call:
    """Rows of one request that were sent to a device.

    Attributes:
        owner: whose share they use.
        lane: where they wait.
        rows: how many.
        remaining_s: seconds to the deadline when they were sent. As in the real thing the device
            counts them from when it reads the call, so the way there is not deducted.
        priority: of the request.
        is_later: a device has worked for the request before.
        sender: hears of their end.
        ticket: of the device, once it took them.
    """

    __slots__ = (
        "is_later", "lane", "owner", "priority", "remaining_s", "rows", "sender", "ticket",
    )  # fmt: skip

    def __init__(
        self,
        owner: str,
        lane: LaneKey,
        rows: int,
        remaining_s: float,
        priority: int,
        sender: Sender,
        *,
        is_later: bool = False,
    ) -> None:
        self.is_later: Final = is_later
        self.owner: Final = owner
        self.lane: Final = lane
        self.rows: Final = rows
        self.remaining_s = remaining_s
        self.priority: Final = priority
        self.sender: Final = sender
        self.ticket: Ticket | None = None


class End(Enum):
    """How a call ends."""

    ANSWERED = "answered"
    REFUSED = "refused"
    EXPIRED = "expired"
    SHED = "shed"


class Told(NamedTuple):
    """How a call ended, and after how many milliseconds to come back; 0 for nothing to say."""

    call: Call
    end: End
    retry_ms: int = 0


class Sender(Protocol):
    """Who hears how calls ended."""

    def on_reply(self, ends: Sequence[Told], news: tuple[int, int]) -> None:
        """These ended, and the device tells so in one frame.

        Args:
            ends: at least one.
            news: of `batching.admission` with answers; two zeros with nothing to say.
        """


class _Step:
    """A batch on the device, and when that is done with it."""

    __slots__ = ("batch", "done_at")

    def __init__(self, batch: Batch, done_at: float) -> None:
        self.batch = batch
        self.done_at = done_at


class VirtualDevice:
    """One device actor.

    Args:
        time: everybody's.
        batcher: decides; belongs to this device alone.
        lanes: that it serves.
        means: what batches take on average; estimates begin with these.
        durations: what each batch really takes.
        host: what is needed around them.
        random: for the durations.
    """

    def __init__(
        self,
        time: VirtualTime,
        batcher: Batcher,
        lanes: Iterable[SimulatedLane],
        means: CostModel,
        durations: Durations,
        host: HostCosts,
        random: Random,
    ) -> None:
        self._time: Final = time
        self._batcher: Final = batcher
        self._durations: Final = durations
        self._costs: Final = host
        self._random: Final = random
        self._loop: Final = Serial(time)
        self._steps: Final[deque[_Step]] = deque()
        self._is_armed = False
        self._free_at = self._busy_s = 0.0
        self._wakeup_at = inf
        self._pumps = 0
        for lane in lanes:
            seeds = {size: means(lane.key, size) for size in lane.ladder.sizes}
            batcher.add_lane(lane.key, lane.ladder, lane.rows_max, 1 << 62, seeds)
            if lane.known is not None:
                batcher.costs[lane.key].restore(lane.known)

    # The event loop

    def on_calls(self, calls: Sequence[Call]) -> None:
        """Rows came, in one frame."""
        costs = self._costs
        seconds = costs.frame_s + costs.request_s * len(calls)
        if seconds or self._loop.free_at > self._time.now:
            self._work(seconds, partial(self._offer, calls))
        else:
            self._offer(calls)

    def on_cancel(self, call: Call) -> bool:
        """The caller gave up; whether the call ended by this, so that no reply comes."""
        if call.ticket is None or not self._batcher.cancel(call.ticket, self._time.now):
            return False
        self._pump()
        return True

    def _offer(self, calls: Sequence[Call]) -> None:
        now = self._time.now
        refused: list[Told] = []
        for call in calls:
            deadline = now + call.remaining_s
            ticket = Ticket(call.lane, call.rows, 0, deadline, call, call.owner, call.priority)
            try:
                self._batcher.offer(ticket, now, is_later=call.is_later)
            except ServingError as error:
                refused.append(Told(call, End.REFUSED, error.retry_after_ms))
            else:
                call.ticket = ticket
        if refused:
            self._tell(refused)
        self._pump()

    def _pump(self) -> None:
        effects = self._batcher.poll(self._time.now)
        if effects:
            self._carry_out(effects)
        wakeup = self._batcher.next_wakeup()
        if wakeup is not None and wakeup < self._wakeup_at:
            self._wakeup_at = wakeup
            self._time.at(wakeup, self._on_wakeup)
        self._pumps += 1
        if self._pumps % _CHECK_EVERY == 0:
            self._batcher.check_invariants()

    def _on_wakeup(self) -> None:
        self._wakeup_at = inf
        self._pump()

    def _carry_out(self, effects: Iterable[Effect], news: tuple[int, int] = _NO_NEWS) -> None:
        ends: list[Told] = []
        for effect in effects:
            if type(effect) is Finished:  # the usual effect, and a `match` takes its time
                ends.append(Told(_call_of(effect.ticket), End.ANSWERED))
                continue
            match effect:
                case Run(batch):
                    self._launch(batch)
                case Expired(ticket):
                    ends.append(Told(_call_of(ticket), End.EXPIRED))
                case Shed(ticket, retry_after_ms=retry_ms):
                    ends.append(Told(_call_of(ticket), End.SHED, retry_ms))
                case Failed():
                    raise AssertionError("the imagined device does not fail")
        if ends:
            self._tell(ends, news)

    def _tell(self, ends: Sequence[Told], news: tuple[int, int] = _NO_NEWS) -> None:
        """Each sender hears of its own in one frame."""
        by_sender: dict[int, list[Told]] = {}
        for told in ends:
            by_sender.setdefault(id(told.call.sender), []).append(told)
        for group in by_sender.values():
            group[0].call.sender.on_reply(group, news)

    def _work(self, seconds: float, then: Callable[[], None]) -> None:
        if self._costs.shares_core and seconds:
            for step in self._steps:
                step.done_at += seconds
            self._free_at += seconds
        self._loop.work(seconds, then)

    # The device

    def _launch(self, batch: Batch) -> None:
        seconds = self._durations(batch.lane, batch.bucket, self._random)
        self._busy_s += seconds
        self._free_at = max(self._free_at, self._time.now + self._costs.hop_s) + seconds
        self._steps.append(_Step(batch, self._free_at))
        self._arm()

    def _arm(self) -> None:
        if self._steps and not self._is_armed:
            self._is_armed = True
            self._time.at(self._steps[0].done_at, self._on_done)

    def _on_done(self) -> None:
        self._is_armed = False
        # What the loop did meanwhile may have held the device up: then it is not done yet.
        if self._steps[0].done_at <= self._time.now:
            batch = self._steps.popleft().batch
            self._arm()
            if self._costs.hop_s:
                self._time.at(self._time.now + self._costs.hop_s, partial(self._land, batch))
            else:
                self._land(batch)
        else:
            self._arm()

    def _land(self, batch: Batch) -> None:
        seconds = self._costs.batch_s + self._costs.answer_s * len(batch.parts)
        self._work(seconds, partial(self._complete, batch))

    def _complete(self, batch: Batch) -> None:
        now = self._time.now
        # As the real one, it says how busy it is before the batcher hears of the batch's end.
        news = self._batcher.admission.news(batch.parts[0][0], now, batch.id)
        self._carry_out(self._batcher.complete(batch.id, now), news)
        self._pump()

    # Views

    def check_idle(self) -> None:
        """Hold that nothing waits, runs or is owed, and that the books are right."""
        self._batcher.check_invariants()
        stats = self._batcher.stats()
        assert not stats.in_flight, stats
        assert not stats.waiting, stats
        assert not self._steps

    def report(self) -> DeviceReport:
        """What it did."""
        lanes = self._batcher.stats().lanes.values()
        return DeviceReport(
            busy_s=self._busy_s,
            host_s=self._loop.busy_s,
            batches=sum(lane.batches for lane in lanes),
            rows=sum(lane.rows_run for lane in lanes),
            padded_rows=sum(lane.padded_rows for lane in lanes),
        )


def _call_of(ticket: Ticket) -> Call:
    call = ticket.payload
    assert isinstance(call, Call)
    return call
