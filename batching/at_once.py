"""Rows that find the device idle and nobody waiting: a batch of their own, without a line.

What admission, the line, the index of deadlines and the policy would come to is known then: all
rows leave in one batch, now. So that is what happens, and the books say the same as if the rows had
been offered, polled and taken (`tests/batching/test_at_once.py` holds the two against each other).
Where anything speaks against it nothing is done, and the rows are to be offered as ever.

All that came together is one ticket of several requests, which is late with all of them if it is
late for the most urgent. It is neither cut nor cancelled: the driver runs the batch before it does
anything else, and either lands it (`Batcher.finish`) or takes it back (`AtOnce.undo`), to offer the
requests one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from batching.admission import Admission
from batching.allowance import BEST_EFFORT
from batching.flight import Flight
from batching.lane import Lane
from batching.shares import Shares
from batching.values import Batch, LaneKey, Ticket, TicketState
from batching.window import fills_less

__all__ = ["AtOnce"]

_NEW: Final = TicketState.NEW
_RUNNING: Final = TicketState.RUNNING


class AtOnce:
    """The short way through one batcher.

    Args:
        lanes: all; live.
        ready: those with rows that wait; live.
        flight: what is on the device.
        shares: who is in share.
        admission: who would be late.
        land: takes a batch off the device.

    Attributes:
        is_on: whether the policy runs what comes alone in one batch; set by the batcher.
    """

    __slots__ = ("_admission", "_flight", "_land", "_lanes", "_ready", "_shares", "is_on")

    def __init__(
        self,
        lanes: Mapping[LaneKey, Lane],
        ready: Mapping[LaneKey, Lane],
        flight: Flight,
        shares: Shares,
        admission: Admission,
        land: Callable[[int, float], tuple[Batch, Lane]],
    ) -> None:
        self.is_on = False
        self._lanes: Final = lanes
        self._ready: Final = ready
        self._flight: Final = flight
        self._shares: Final = shares
        self._admission: Final = admission
        self._land: Final = land

    def begin(self, ticket: Ticket, now: float) -> Batch | None:
        """Form the batch of a new ticket.

        Args:
            ticket: all rows that came together; its deadline is the earliest of theirs.
            now: this instant.

        Returns:
            the batch, whose only part is the ticket; None, and nothing has changed, where the
            ticket has to be offered.
        """
        assert ticket.state is _NEW, f"{ticket} was offered before"
        lane = self._lanes.get(ticket.lane)
        if not self.is_on or lane is None or lane.draining or self._ready or len(self._flight):
            return None
        line = lane.lines.get(ticket.owner)
        rows, deadline, costs = ticket.rows, ticket.deadline, lane.costs
        if line is None or ticket.priority <= BEST_EFFORT or not 0 < rows <= costs.ladder.largest:
            return None  # an owner that was never here may be one too many
        if rows > line.rows_max or not 0 <= ticket.nbytes <= line.bytes_max:
            return None
        place = costs.ladder.places[rows]
        expected_s = costs.estimates[place]
        if not now + expected_s <= deadline or fills_less(
            costs, place, rows, expected_s, deadline, now
        ):
            return None
        admission = self._admission
        if admission.is_on and not admission.takes(
            lane, line, rows, deadline, ticket.priority, now
        ):
            return None
        line.pass_by(ticket, now)
        shares = self._shares
        shares.wake(line.owner)
        shares.sleep(line.owner)
        batch = self._flight.begin(lane, [(ticket, 0, rows)], rows, 0, now)
        shares.charge_batch(batch, lane.lines, batch.expected_s)
        shares.ran(batch.expected_s)
        return batch

    def undo(self, batch: Batch, now: float) -> None:
        """The batch came back in error: its requests are as if they had never come.

        What it took of the device stays counted.
        """
        _, lane = self._land(batch.id, now)
        [(ticket, _, _)] = batch.parts
        ticket.state = _NEW
        ticket.taken = 0
        lane.lines[ticket.owner].tally.offered -= ticket.requests
