"""One owner's tickets that wait in one lane: a bounded line, the most urgent first.

The line is ordered by priority, then deadline, then arrival; tickets of one deadline budget come in
that order already, so joining at the end is the usual case and costs nothing more than an append.
Bounds are the owner's own: rows of one owner never keep those of another out, and what an owner may
have waiting in a shared lane is what it might have in a lane of its own.

A line does not know the device, its lane's other lines, or time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace
from typing import Final, TypeAlias

from batching.errors import DeadlineExceeded, ResourceExhausted, ServingError
from batching.refusals import LaneFull, TicketTooLarge
from batching.telemetry import Histogram
from batching.values import OwnerStats, Tally, Ticket

__all__ = ["Entry", "Line", "rank_of"]

#: A ticket's place: ``(-priority, deadline, number, ticket)``. Numbers are distinct, so that
#: comparing two entries never comes to the tickets.
Entry: TypeAlias = tuple[int, float, int, Ticket]


def rank_of(ticket: Ticket) -> Entry:
    """The ticket's place in any line."""
    return (-ticket.priority, ticket.deadline, ticket.id, ticket)


class Line:
    """The line of one owner. Only its lane changes it.

    Attributes:
        owner: whose rows these are.
        rows_max: the most rows in line.
        bytes_max: the most bytes in line.
        entries: the tickets in order. Any of them may have left in part.
        rows: rows in line.
        nbytes: bytes of the tickets in line, each counted whole until its last row has left.
        tally: what became of its tickets.
        queue: seconds from a ticket's admission until the last of its rows left.
    """

    __slots__ = ("bytes_max", "entries", "nbytes", "owner", "queue", "rows", "rows_max", "tally")

    def __init__(self, owner: str, rows_max: int, bytes_max: int) -> None:
        """Make an empty line."""
        self.owner: Final = owner
        self.rows_max: Final = rows_max
        self.bytes_max: Final = bytes_max
        self.entries: list[Entry] = []
        self.rows = self.nbytes = 0
        self.tally: Final = Tally()
        self.queue: Final = Histogram()

    def tickets(self) -> Iterator[Ticket]:
        """The tickets in order."""
        return (entry[3] for entry in self.entries)

    def leave(self, ticket: Ticket) -> None:
        """Forget a ticket, wherever it stands. O(log n), and a move of what stands behind it."""
        entries = self.entries
        at = bisect_left(entries, rank_of(ticket))
        assert entries[at][3] is ticket
        del entries[at]
        self.rows -= ticket.rows - ticket.taken
        self.nbytes -= ticket.nbytes

    def refusal(self, ticket: Ticket, retry_after_ms: int) -> TicketTooLarge | LaneFull:
        """Why a ticket that does not fit is turned away."""
        wanted = f"{ticket.rows} rows and {ticket.nbytes} bytes"
        bounds = f"{self.rows_max} rows and {self.bytes_max} bytes"
        if ticket.rows > self.rows_max or ticket.nbytes > self.bytes_max:
            return TicketTooLarge(f"{wanted} can never wait in a lane bounded to {bounds}")
        return LaneFull(
            f"{wanted} do not fit: {self.rows} rows and {self.nbytes} bytes wait for unit "
            f"{ticket.lane.unit} in a lane bounded to {bounds}",
            retry_after_ms,
        )

    def count_refusal(self, error: ServingError) -> None:
        """A ticket of this owner was turned away."""
        tally = self.tally
        if isinstance(error, LaneFull):
            tally.refused_full += 1
        elif isinstance(error, ResourceExhausted):
            tally.refused_admission += 1
        elif isinstance(error, DeadlineExceeded):
            tally.refused_late += 1
        else:
            tally.refused_other += 1

    def rows_over(self, ticket: Ticket) -> int:
        """About how many rows must leave before a ticket that does not fit would."""
        rows = max(0, self.rows + ticket.rows - self.rows_max)
        excess = max(0, self.nbytes + ticket.nbytes - self.bytes_max)
        if excess and self.nbytes:
            # Rows weigh about the same, so this share of the rows must leave.
            rows = max(rows, -(-self.rows * excess // self.nbytes))
        return rows

    def stats(self) -> OwnerStats:
        """The line as it is."""
        return OwnerStats(
            tickets=len(self.entries),
            rows=self.rows,
            nbytes=self.nbytes,
            tally=replace(self.tally),
            queue=self.queue.read(),
        )

    def check_invariants(self) -> None:
        """Hold the line against itself. O(n); for tests and simulation."""
        assert self.entries == sorted(self.entries), "the line is out of order"
        assert self.rows == sum(t.rows - t.taken for t in self.tickets())
        assert self.nbytes == sum(t.nbytes for t in self.tickets())
        assert self.rows <= self.rows_max, f"{self.rows} rows of {self.rows_max}"
        assert self.nbytes <= self.bytes_max, f"{self.nbytes} bytes of {self.bytes_max}"
        for entry in self.entries:
            ticket = entry[3]
            assert entry == rank_of(ticket)
            assert ticket.owner == self.owner
            assert ticket.taken < ticket.rows
