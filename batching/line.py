"""One owner's tickets that wait in one lane: a bounded line, the most urgent first.

The line is ordered by priority, then deadline, then arrival; tickets of one deadline budget come in
that order already, so joining at the end is the usual case and costs nothing more than an append.
Best-effort tickets stand beside it, as they leave when there is room. A ticket that finds the line
full may take the place of less critical ones.
Bounds are the owner's own: rows of one owner never keep those of another out, and what an owner may
have waiting in a shared lane is what it might have in a lane of its own.

A line does not know the device, its lane's other lines, or time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import inf
from typing import Final, TypeAlias

from batching.allowance import BEST_EFFORT, DEFAULT, SHEDDABLE
from batching.deadlines import Deadlines
from batching.errors import DeadlineExceeded, ServingError
from batching.refusals import LaneFull, TicketTooLarge, TooBusy
from batching.stretch import Stretch
from batching.telemetry import Histogram
from batching.values import OwnerStats, Part, Tally, Ticket, TicketState

__all__ = ["Entry", "Line", "rank_of"]

#: Reading a member off an enum class costs more than all else in the loops below.
_WAITING: Final = TicketState.WAITING
_RUNNING: Final = TicketState.RUNNING

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
        rows_max: the most rows in line, best-effort ones included.
        bytes_max: the most bytes in line.
        entries: the tickets in order. Any of them may have left in part.
        spare: the best-effort tickets, which are in no other list, in order.
        rows: rows in line, best-effort ones included.
        nbytes: bytes of the tickets in line, each counted whole until its last row has left.
        tally: what became of its tickets.
        queue: seconds from a ticket's admission until the last of its rows left.
    """

    __slots__ = (
        "_stretches", "bytes_max", "entries", "nbytes", "owner", "queue", "rows", "rows_max",
        "spare", "tally",
    )  # fmt: skip

    def __init__(self, owner: str, rows_max: int, bytes_max: int) -> None:
        """Make an empty line."""
        self.owner: Final = owner
        self.rows_max = rows_max
        self.bytes_max = bytes_max
        self.entries: list[Entry] = []
        self.spare: list[Entry] = []
        self.rows = self.nbytes = 0
        self.tally: Final = Tally()
        self.queue: Final = Histogram()
        self._stretches: Final = (Stretch(), Stretch(), Stretch())

    def stretch_of(self, priority: int) -> Stretch:
        """By how much longer than forecast its tickets of this priority take.

        Apart for each, since what is given up for more critical rows says nothing about these.
        """
        low, default, high = self._stretches
        return low if priority < DEFAULT else default if priority == DEFAULT else high

    def tickets(self) -> Iterator[Ticket]:
        """The tickets in order, best-effort ones last."""
        return (entry[3] for entries in (self.entries, self.spare) for entry in entries)

    @property
    def spare_rows(self) -> int:
        """Best-effort rows in line."""
        return sum(ticket.rows - ticket.taken for _, _, _, ticket in self.spare)

    def earliest(self, priority: int = SHEDDABLE) -> float:
        """The earliest deadline of tickets of this priority or a higher one; inf without any.

        Of best-effort tickets none.
        """
        entries = self.entries
        if not entries:
            return inf
        rank, found, _, _ = entries[0]
        if rank > -priority:
            return inf
        if entries[-1][0] == rank:  # the usual case
            return found
        at = bisect_left(entries, (rank + 1, -inf))
        while at < len(entries):  # the first of each criticality
            rank, deadline, _, _ = entries[at]
            if rank > -priority:
                break
            found = min(found, deadline)
            at = bisect_left(entries, (rank + 1, -inf), at)
        return found

    def less_critical(self, ticket: Ticket) -> list[Ticket]:
        """Tickets whose leaving would make room for this one: least critical and latest first.

        None that has left in part: the device has worked for it. Empty where that is not enough.
        """
        rows = self.rows + ticket.rows - self.rows_max
        nbytes = self.nbytes + ticket.nbytes - self.bytes_max
        found: list[Ticket] = []
        for entries in (self.spare, self.entries):
            for rank, _, _, other in reversed(entries):
                if rows <= 0 and nbytes <= 0:
                    return found
                if rank <= -ticket.priority:
                    break
                if not other.taken:
                    rows -= other.rows
                    nbytes -= other.nbytes
                    found.append(other)
        return found if rows <= 0 and nbytes <= 0 else []

    def join(self, tickets: Sequence[Ticket], number: int, rows: int, nbytes: int) -> None:
        """Let tickets of one priority above best-effort, which came together, wait here.

        Args:
            tickets: new ones.
            number: the first one's from now on; the others' follow.
            rows: of all of them.
            nbytes: likewise.
        """
        entries = self.entries
        in_order = True
        last = entries[-1] if entries else None
        for ticket in tickets:
            ticket.id = number
            ticket.state = _WAITING
            entry = (-ticket.priority, ticket.deadline, number, ticket)
            if last is not None and entry < last:
                in_order = False
            entries.append(entry)
            last = entry
            number += 1
        if not in_order:
            entries.sort()
        self.rows += rows
        self.nbytes += nbytes
        self.tally.offered += len(tickets)

    def pass_by(self, ticket: Ticket, now: float) -> None:
        """Rows that run the moment they are taken: no line was formed."""
        ticket.offered_at = now
        ticket.state = _RUNNING
        ticket.taken = ticket.rows
        self.tally.offered += ticket.requests
        self.queue.counts[0] += ticket.requests  # they have waited for 0 s

    def take(
        self,
        entries: list[Entry],
        limit: int,
        now: float,
        deadlines: Deadlines,
        count: int | None = None,
    ) -> tuple[list[Part], int]:
        """Rows from the head of the line.

        Args:
            entries: which of its tickets.
            limit: the most rows.
            now: this instant.
            deadlines: hear whose last row left.
            count: the most tickets.

        Returns:
            the parts of the next batch, and their rows.
        """
        waits, bounds = self.queue.counts, self.queue.bounds
        room = limit
        nbytes = together = 0
        wait_s = waited_s = 0.0
        since = -inf
        parts: list[Part] = []
        gone: list[int] = []
        for _, _, _, ticket in entries if count is None else entries[:count]:
            start = ticket.taken
            stop = ticket.rows
            if stop - start > room:
                ticket.taken = stop = start + room
            else:
                ticket.taken = stop
                nbytes += ticket.nbytes
                ticket.state = _RUNNING  # no row of it waits for a retry: those leave first
                gone.append(ticket.id)
                # Those that came together have waited for as long.
                if ticket.offered_at != since:
                    waits[bisect_left(bounds, wait_s)] += together
                    since, together = ticket.offered_at, 0
                    wait_s = now - since
                together += 1
                waited_s += wait_s
            room -= stop - start
            parts.append((ticket, start, stop))
            if not room:
                break
        # What leaves whole is the head of the line: only the last may have left in part.
        del entries[: len(gone)]
        deadlines.remove_all(gone)
        waits[bisect_left(bounds, wait_s)] += together
        self.queue.total += waited_s
        self.rows -= limit - room
        self.nbytes -= nbytes
        return parts, limit - room

    def leave(self, ticket: Ticket) -> None:
        """Forget a ticket, wherever it stands. O(log n), and a move of what stands behind it."""
        entries = self.entries if ticket.priority > BEST_EFFORT else self.spare
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
        elif isinstance(error, TooBusy):
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
            tickets=len(self.entries) + len(self.spare),
            rows=self.rows,
            nbytes=self.nbytes,
            tally=replace(self.tally),
            queue=self.queue.read(),
        )

    def check_invariants(self) -> None:
        """Hold the line against itself. O(n); for tests and simulation."""
        for entries in (self.entries, self.spare):
            assert entries == sorted(entries), "the line is out of order"
        assert all(-rank > BEST_EFFORT for rank, _, _, _ in self.entries)
        assert all(-rank <= BEST_EFFORT for rank, _, _, _ in self.spare)
        assert self.rows == sum(t.rows - t.taken for t in self.tickets())
        assert self.nbytes == sum(t.nbytes for t in self.tickets())
        for entry in (*self.entries, *self.spare):
            ticket = entry[3]
            assert entry == rank_of(ticket)
            assert ticket.owner == self.owner
            assert ticket.taken < ticket.rows
