"""A batcher as a whole, for who looks at it: what it has counted, and whether its parts agree.

Changes nothing, and decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from batching.deadlines import Deadlines
from batching.flight import Flight
from batching.lane import Lane
from batching.shares import Shares
from batching.values import LaneKey, Stats

__all__ = ["check_invariants", "stats_of"]


def stats_of(
    lanes: Mapping[LaneKey, Lane], flight: Flight, deadlines: Deadlines, shares: Shares
) -> Stats:
    """A snapshot of every lane."""
    owners = {owner for lane in lanes.values() for owner in lane.lines}
    return Stats(
        lanes={key: lane.stats() for key, lane in lanes.items()},
        in_flight=len(flight),
        waiting=len(deadlines),
        busy_s=flight.busy_s,
        depths=tuple(flight.depths),
        shares={owner: shares.time_of(owner) for owner in owners},
    )


def check_invariants(
    lanes: Mapping[LaneKey, Lane],
    ready: Mapping[LaneKey, Lane],
    flight: Flight,
    deadlines: Deadlines,
) -> None:
    """Hold the parts of a batcher against themselves and one another. O(n log n).

    Args:
        lanes: all.
        ready: those with rows that wait.
        flight: what is on the device.
        deadlines: of the tickets that wait.
    """
    assert ready == {key: lane for key, lane in lanes.items() if lane.waiting}
    flight.check_invariants()
    deadlines.check_invariants()
    on_device: dict[int, int] = {}
    flying = dict.fromkeys(lanes, 0)
    for batch in flight.batches():
        flying[batch.lane] += 1
        assert batch.bucket >= batch.rows  # the lane's sizes may have changed since
        for ticket, start, stop in batch.parts:
            on_device[ticket.id] = on_device.get(ticket.id, 0) + stop - start
    for ticket in deadlines.tickets():
        running = on_device.get(ticket.id, 0)
        assert ticket.taken == ticket.done + ticket.retrying + running, ticket
        assert ticket.taken < ticket.rows or ticket.retrying, f"{ticket} has no row to wait"
    for key, lane in lanes.items():
        lane.check_invariants()
        assert lane.in_flight == flying[key]
