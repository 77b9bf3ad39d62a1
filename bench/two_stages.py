"""Requests that pass a trunk, then a head, on an imagined device: what `bench prefix` predicts.

The batcher and the policy are those of a device actor, in virtual time (`batching.simulation` does
the same for requests of one unit). Between the two units a request takes a constant time, as it
does through a router. The time that the device's host needs for a batch and for a row is part of
what a batch costs here, since the two share a processor.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from math import inf
from typing import Final, NamedTuple

from batching import Batcher, Finished, Ladder, LaneKey, Run, Ticket
from batching.errors import ServingError
from batching.policy import Policy
from batching.simulation import Arrival

__all__ = ["Costs", "attainment"]

#: Device seconds of a batch of each size.
Costs = Mapping[int, float]


class _Stage(NamedTuple):
    """A ticket's payload: when its request came, and the lane that comes next."""

    arrival: Arrival
    then: LaneKey | None


class _Device:
    """A device that runs one batch after another, and the requests between its units."""

    def __init__(self, batcher: Batcher, costs: Mapping[LaneKey, Costs], hop_s: float) -> None:
        self.batcher: Final = batcher
        self.good = 0
        self._costs = costs
        self._hop_s = hop_s
        self._free_at = 0.0
        self._events: list[tuple[float, int, int | _Stage]] = []
        self._number = 0

    @property
    def next_event(self) -> float:
        return self._events[0][0] if self._events else inf

    def enter(self, stage: _Stage, lane: LaneKey, now: float) -> None:
        arrival = stage.arrival
        deadline = arrival.at + arrival.budget_s
        try:
            self.batcher.offer(Ticket(lane, 1, 0, deadline, stage, arrival.owner), now)
        except ServingError:
            return  # it has missed its objective, by whatever name

    def happen(self) -> float:
        now, _, what = heapq.heappop(self._events)
        if isinstance(what, int):
            for effect in self.batcher.complete(what, now):
                assert isinstance(effect, Finished)
                self._finished(effect.ticket, now)
        else:
            assert what.then is not None
            self.enter(_Stage(what.arrival, None), what.then, now)
        return now

    def poll(self, now: float) -> None:
        for effect in self.batcher.poll(now):
            if isinstance(effect, Run):
                batch = effect.batch
                self._free_at = max(self._free_at, now) + self._costs[batch.lane][batch.bucket]
                self._push(self._free_at, batch.id)

    def _finished(self, ticket: Ticket, now: float) -> None:
        stage = ticket.payload
        assert isinstance(stage, _Stage)
        if stage.then is not None:
            self._push(now + self._hop_s, stage)
        elif now <= stage.arrival.at + stage.arrival.budget_s:
            self.good += 1

    def _push(self, at: float, what: int | _Stage) -> None:
        self._number += 1
        heapq.heappush(self._events, (at, self._number, what))


def attainment(
    policy: Policy,
    costs: Mapping[LaneKey, Costs],
    heads: Mapping[str, LaneKey],
    arrivals: Sequence[Arrival],
    *,
    hop_s: float,
    lead_s: float,
) -> float:
    """The part of the requests that are answered in time.

    Args:
        policy: chooses batches.
        costs: of every lane.
        heads: where the rows of each owner go after the lane in which they arrive.
        arrivals: in order of time, of one row each.
        hop_s: seconds between a unit's end and the rows' entry into the next.
        lead_s: see `Batcher`.
    """
    batcher = Batcher(policy, lead_s=lead_s)
    for key, found in costs.items():
        batcher.add_lane(key, Ladder(sorted(found)), 1 << 20, 1 << 40, found)
    device = _Device(batcher, costs, hop_s)
    coming = iter(arrivals)
    following = next(coming, None)
    now = 0.0
    while True:
        at = following.at if following is not None else inf
        wakeup = batcher.next_wakeup()
        now = max(now, min(at, device.next_event, inf if wakeup is None else wakeup))
        if now == inf:
            break
        if device.next_event <= now:
            device.happen()
        elif following is not None and at <= now:
            device.enter(_Stage(following, heads[following.owner]), following.lane, now)
            following = next(coming, None)
        device.poll(now)
        if following is None and device.next_event == inf and not batcher.has_waiting:
            break
    return device.good / len(arrivals) if arrivals else 1.0
