"""A batcher served by an imagined device, in virtual time: what would happen, without it happening.

The very objects that decide in a device actor decide here; only the clock, the device and the
requests are made up. Everything follows from a seed: the same run gives the same report.

The device runs one batch after the other. A batch takes what the cost model says, times a noise of
mean one, and, as on a real device, batches queue behind each other when several are in flight. Time
that the host needs to decide is not simulated. Does not know where workloads come from.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from random import Random
from typing import Final, NamedTuple, TypeAlias

from batching.batcher import LEAD_S, Batcher
from batching.buckets import Ladder
from batching.errors import InvalidArgument, ServingError
from batching.policy import Policy
from batching.values import Effect, Expired, Failed, Finished, LaneKey, Run, Shed, Ticket

__all__ = ["Arrival", "CostModel", "Outcome", "Report", "SimulatedLane", "simulate"]

#: Device seconds of a batch, by lane and bucket.
CostModel: TypeAlias = Callable[[LaneKey, int], float]


class Arrival(NamedTuple):
    """A request of some rows.

    Attributes:
        at: when it comes, in seconds; arrivals are in this order.
        lane: where its rows wait.
        owner: whose share they use.
        rows: how many.
        budget_s: seconds until its deadline; `inf` for none.
    """

    at: float
    lane: LaneKey
    owner: str
    rows: int = 1
    budget_s: float = inf


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedLane:
    """A lane of the device.

    Attributes:
        key: its name.
        ladder: its compiled sizes.
        rows_max: the most rows of an owner in line.
    """

    key: LaneKey
    ladder: Ladder
    rows_max: int = 4096


@dataclass(slots=True)
class Outcome:
    """What became of one owner's requests.

    Attributes:
        offered: requests that came.
        good: answered by their deadline.
        late: answered after it.
        refused: turned away when they came.
        expired: waited past their deadline.
        shed: given up before it.
        latencies_s: of answered requests, in the order of their answers.
    """

    offered: int = 0
    good: int = 0
    late: int = 0
    refused: int = 0
    expired: int = 0
    shed: int = 0
    latencies_s: list[float] = field(default_factory=list)

    @property
    def attainment(self) -> float:
        """Share of the requests that were answered in time; 1 where none came."""
        return self.good / self.offered if self.offered else 1.0

    def percentile(self, percent: float) -> float:
        """Latency in seconds below which this share of the answers lies; nan without answers."""
        ordered = sorted(self.latencies_s)
        if not ordered:
            return float("nan")
        return ordered[min(int(len(ordered) * percent / 100), len(ordered) - 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a run came to.

    Attributes:
        owners: outcome by owner.
        seconds: virtual time from the first arrival to the last end.
        busy_s: of it, the device was at work.
        batches: that ran.
        rows: real rows in them.
        padded_rows: padding in them.
    """

    owners: dict[str, Outcome]
    seconds: float
    busy_s: float
    batches: int
    rows: int
    padded_rows: int

    @property
    def goodput(self) -> float:
        """Requests answered in time, a second."""
        return sum(each.good for each in self.owners.values()) / max(self.seconds, 1e-9)


class _Request(NamedTuple):
    arrival: Arrival
    outcome: Outcome


class _Run:
    """One simulation under way."""

    def __init__(self, batcher: Batcher, costs: CostModel, noise: float, random: Random) -> None:
        self.batcher: Final = batcher
        self.owners: dict[str, Outcome] = {}
        self.now = self.busy_s = 0.0
        self._costs = costs
        self._noise = noise
        self._random = random
        self._free_at = 0.0
        #: batches on the device: (when it comes back, number)
        self._landing: list[tuple[float, int]] = []

    @property
    def next_landing(self) -> float:
        return self._landing[0][0] if self._landing else inf

    def arrive(self, arrival: Arrival) -> None:
        outcome = self.owners.setdefault(arrival.owner, Outcome())
        outcome.offered += 1
        ticket = Ticket(
            arrival.lane,
            arrival.rows,
            0,
            arrival.at + arrival.budget_s,
            _Request(arrival, outcome),
            arrival.owner,
        )
        try:
            self.batcher.offer(ticket, self.now)
        except ServingError:
            outcome.refused += 1

    def land(self) -> None:
        _, number = heapq.heappop(self._landing)
        self.carry_out(self.batcher.complete(number, self.now))

    def carry_out(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case Run(batch):
                    seconds = self._costs(batch.lane, batch.bucket)
                    if self._noise:
                        shape = 1.0 / self._noise**2
                        seconds *= self._random.gammavariate(shape, 1.0 / shape)
                    self._free_at = max(self._free_at, self.now) + seconds
                    self.busy_s += seconds
                    heapq.heappush(self._landing, (self._free_at, batch.id))
                case Finished(ticket):
                    self._answer(ticket)
                case Expired(ticket):
                    _of(ticket).outcome.expired += 1
                case Shed(ticket):
                    _of(ticket).outcome.shed += 1
                case Failed():
                    raise AssertionError("the imagined device does not fail")

    def _answer(self, ticket: Ticket) -> None:
        arrival, outcome = _of(ticket)
        latency_s = self.now - arrival.at
        outcome.latencies_s.append(latency_s)
        if latency_s <= arrival.budget_s:
            outcome.good += 1
        else:
            outcome.late += 1


def simulate(
    policy: Policy,
    lanes: Sequence[SimulatedLane],
    arrivals: Iterable[Arrival],
    costs: CostModel,
    *,
    in_flight_max: int = 2,
    credit_s: float | None = None,
    lead_s: float = LEAD_S,
    noise: float = 0.0,
    seed: int = 0,
) -> Report:
    """Serve a workload.

    Args:
        policy: chooses batches.
        lanes: of the device.
        arrivals: in order of time; taken one at a time, so that they may be many.
        costs: what each batch takes. Estimates begin with these, as after a warm-up.
        in_flight_max: credits.
        credit_s: of the shares, see `Batcher`.
        lead_s: see `Batcher`.
        noise: coefficient of variation of a batch's time; 0 for none.
        seed: of the noise.

    Raises:
        InvalidArgument: arrivals are out of order, or of a lane that is not there.
    """
    batcher = Batcher(policy, in_flight_max, credit_s=credit_s, lead_s=lead_s)
    for lane in lanes:
        seeds = {size: costs(lane.key, size) for size in lane.ladder.sizes}
        batcher.add_lane(lane.key, lane.ladder, lane.rows_max, 1 << 62, seeds)
    keys = {lane.key for lane in lanes}
    run = _Run(batcher, costs, noise, Random(seed))
    coming = _checked(arrivals, keys)
    following = next(coming, None)
    first_at = following.at if following is not None else 0.0
    while True:
        at = following.at if following is not None else inf
        wakeup = batcher.next_wakeup()
        run.now = max(run.now, min(at, run.next_landing, inf if wakeup is None else wakeup))
        if run.now == inf:
            break
        if run.next_landing <= run.now:
            run.land()
        elif following is not None and at <= run.now:
            run.arrive(following)
            following = next(coming, None)
        run.carry_out(batcher.poll(run.now))
        if following is None and run.next_landing == inf and not batcher.has_waiting:
            break
    stats = batcher.stats().lanes.values()
    return Report(
        owners=run.owners,
        seconds=run.now - first_at,
        busy_s=run.busy_s,
        batches=sum(lane.batches for lane in stats),
        rows=sum(lane.rows_run for lane in stats),
        padded_rows=sum(lane.padded_rows for lane in stats),
    )


def _checked(arrivals: Iterable[Arrival], keys: set[LaneKey]) -> Iterator[Arrival]:
    before = -inf
    for arrival in arrivals:
        if arrival.at < before:
            raise InvalidArgument(f"an arrival at {arrival.at} comes after one at {before}")
        if arrival.lane not in keys:
            raise InvalidArgument(f"there is no lane {arrival.lane}")
        before = arrival.at
        yield arrival


def _of(ticket: Ticket) -> _Request:
    request = ticket.payload
    assert isinstance(request, _Request)
    return request
