"""Tickets that came in one frame: admitted in one go where nothing speaks against any of them.

What is found out for each ticket by itself (`Batcher.offer`) is found out here once, for the most
demanding that they can be together: all rows, the earliest deadline. Where that is not enough to
take every one of them, nothing is done, and each is asked about by itself. Does not refuse.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Final

from batching.admission import Admission
from batching.allowance import BEST_EFFORT
from batching.lane import Lane
from batching.values import Ticket, TicketState

__all__ = ["admit_together"]

#: Reading a member off an enum class costs more than all else in the loop below.
_NEW: Final = TicketState.NEW


def admit_together(
    lane: Lane, tickets: Sequence[Ticket], number: int, now: float, admission: Admission | None
) -> bool:
    """Put the tickets into their line, if all of them would be taken.

    Args:
        lane: theirs.
        tickets: new ones, of one owner and priority.
        number: the first one's from now on; the others' follow.
        now: this instant.
        admission: turns late ones away; None where nobody is.

    Returns:
        Whether they are in line; else nothing has changed.
    """
    first = tickets[0]
    line = lane.lines.get(first.owner)
    if line is None or lane.draining or first.priority <= BEST_EFFORT:
        return False
    rows = nbytes = 0
    soonest = inf
    for ticket in tickets:
        assert ticket.state is _NEW, f"{ticket} was offered before"
        deadline = ticket.deadline
        # Written so that a deadline that is no number is past.
        if not deadline > now or ticket.rows < 1 or ticket.nbytes < 0:
            return False
        rows += ticket.rows
        nbytes += ticket.nbytes
        if deadline < soonest:
            soonest = deadline
    if line.rows + rows > line.rows_max or line.nbytes + nbytes > line.bytes_max:
        return False
    if admission is not None and not admission.takes(
        lane, line, rows, soonest, first.priority, now
    ):
        return False
    lane.admit_all(line, tickets, number, rows, nbytes)
    for ticket in tickets:
        ticket.offered_at = now
    return True
