"""The rows that wait for one unit in one shape, whoever they are of, and what leaves next.

A lane has a line for every owner. Rows of different owners run in one batch; when not all fit,
those of owners that are in share go first, the most urgent of them before the others. With one
owner that is simply the line.

Rows of a failed batch wait again, in the groups in which they are to be retried, ahead of the
lines. They were admitted once and stay outside the bounds.

Bounds count live tickets only: an ended ticket leaves its line at once and nothing keeps its
payload. A lane does not know the device, the other lanes, or when its turn comes.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator
from itertools import chain, groupby
from math import ceil
from operator import attrgetter
from typing import Final

from batching.costs import LaneCosts
from batching.deadlines import Deadlines
from batching.errors import InvalidArgument, ResourceExhausted, ServingError
from batching.line import Entry, Line
from batching.shares import Shares
from batching.telemetry import LaneMeter
from batching.values import Batch, LaneKey, LaneStats, Part, Ticket, TicketState

__all__ = ["Lane"]

#: Reading a member off an enum class costs more than all else in the loops below.
_WAITING: Final = TicketState.WAITING
_RUNNING: Final = TicketState.RUNNING

#: The retry hint while nothing is known of the lane's pace, and the bounds of a known one.
_RETRY_MS_UNKNOWN: Final = 100
_RETRY_MS_MAX: Final = 10_000

_owner_of: Final = attrgetter("owner")

#: Names come from routers, which know the servables; a bound all the same.
_OWNERS_MAX: Final = 4096

#: Weight of the newest batch in the moving mean of device seconds per row.
_PACE_WEIGHT: Final = 0.125


class Lane:
    """The lines of one lane and its counters. Only its batcher changes it; a policy reads it.

    Attributes:
        key: the lane's name.
        ladder: the batch sizes its unit is compiled for.
        costs: what its batches are expected to take.
        rows_max: the most rows of any one owner in line.
        bytes_max: the most bytes of any one owner in line.
        lines: by owner; of every owner that ever had a ticket here.
        rows: rows in all lines.
        retry_rows: rows that wait ahead of the lines for another try.
        in_flight: batches of this lane on the device.
        draining: whether it refuses tickets.
        refused: tickets turned away, of whomever.
        pace_s: moving mean of device seconds per row, or None before the first batch ended.
        meter: what its batches held and took.
    """

    __slots__ = (
        "_deadlines",
        "_retries",
        "_shares",
        "batches",
        "bisections",
        "busy_s",
        "bytes_max",
        "costs",
        "draining",
        "in_flight",
        "key",
        "ladder",
        "lines",
        "meter",
        "pace_s",
        "padded_rows",
        "refused",
        "retry_rows",
        "rows",
        "rows_max",
        "rows_run",
    )

    def __init__(
        self,
        key: LaneKey,
        costs: LaneCosts,
        rows_max: int,
        bytes_max: int,
        deadlines: Deadlines,
        shares: Shares,
    ) -> None:
        """Make an empty lane.

        Args:
            key: the lane's name.
            costs: of the batch sizes that its unit is compiled for.
            rows_max: the most rows of any one owner in line.
            bytes_max: the most bytes of any one owner in line.
            deadlines: the batcher's index, which the lane keeps true for its own tickets.
            shares: the batcher's books of who is in share, which hear whose rows wait.

        Raises:
            InvalidArgument: a bound is not positive.
        """
        if rows_max < 1 or bytes_max < 1:
            raise InvalidArgument(
                f"lane {key}: bounds must be positive; were {rows_max} rows, {bytes_max} bytes"
            )
        self.key: Final = key
        self.costs: Final = costs
        self.ladder: Final = costs.ladder
        self.rows_max: Final = rows_max
        self.bytes_max: Final = bytes_max
        self.lines: Final[dict[str, Line]] = {}
        self._deadlines: Final = deadlines
        self._shares: Final = shares
        self._retries: Final[deque[list[Part]]] = deque()
        self.meter: Final = LaneMeter()
        self.rows = self.retry_rows = self.in_flight = 0
        self.draining = False
        self.refused = 0
        self.pace_s: float | None = None
        self.batches = self.rows_run = self.padded_rows = self.bisections = 0
        self.busy_s = 0.0

    @property
    def waiting(self) -> int:
        """Rows that the next batches may take."""
        return self.rows + self.retry_rows

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not (self.rows or self.retry_rows or self.in_flight)

    @property
    def retry(self) -> list[Part] | None:
        """The group that must be the next batch, if one is to be retried."""
        while self.retry_rows:
            # Only tickets that ended meanwhile are not waiting; their rows are counted no more.
            parts = [part for part in self._retries[0] if part[0].state is _WAITING]
            if parts:
                return parts
            self._retries.popleft()
        return None

    def tickets(self) -> Iterator[Ticket]:
        """The tickets in the order in which rows leave; any may have left in part."""
        if len(self.lines) == 1:
            [line] = self.lines.values()
            return line.tickets()
        return (entry[3] for entry in self._merged())

    def first(self) -> Ticket | None:
        """The ticket whose rows leave next from the lines."""
        if len(self.lines) == 1:
            [line] = self.lines.values()
            return line.entries[0][3] if line.entries else None
        return next(self.tickets(), None)

    def is_in_share(self, limit: float) -> bool:
        """Whether rows of an owner that is in share wait here.

        Args:
            limit: of the shares, at this instant.
        """
        shares = self._shares
        for line in self.lines.values():
            if line.entries and shares.in_share(line.owner, limit):
                return True
        return False

    def admit(self, ticket: Ticket, number: int, sharing: int) -> None:
        """Put the ticket into its owner's line.

        Args:
            ticket: a new ticket of this lane.
            number: the ticket's number from now on.
            sharing: how many lanes the device serves now, for the retry hint.

        Raises:
            ResourceExhausted: more owners than any cluster has servables.
            TicketTooLarge: it would not fit into the empty line.
            LaneFull: it does not fit now.
        """
        line = self.lines.get(ticket.owner)
        if line is None:
            line = self._new_line(ticket.owner)
        rows = line.rows + ticket.rows
        nbytes = line.nbytes + ticket.nbytes
        if rows > self.rows_max or nbytes > self.bytes_max:
            raise line.refusal(ticket, self._retry_after_ms(line, ticket, sharing))
        ticket.id = number
        ticket.state = _WAITING
        entries = line.entries
        entry = (-ticket.priority, ticket.deadline, number, ticket)
        if not entries:
            self._shares.wake(line.owner)
            entries.append(entry)
        elif entries[-1] < entry:
            entries.append(entry)
        else:
            insort(entries, entry)
        line.rows = rows
        line.nbytes = nbytes
        line.tally.offered += 1
        self._deadlines.add(ticket)
        self.rows += ticket.rows

    def _new_line(self, owner: str) -> Line:
        if len(self.lines) >= _OWNERS_MAX:
            raise ResourceExhausted(f"{_OWNERS_MAX} owners have rows in lane {self.key}")
        line = self.lines[owner] = Line(owner, self.rows_max, self.bytes_max)
        return line

    def refuse(self, ticket: Ticket, error: ServingError) -> None:
        """Count a ticket that was turned away."""
        self.refused += 1
        line = self.lines.get(ticket.owner)
        if line is None and len(self.lines) < _OWNERS_MAX:
            line = self._new_line(ticket.owner)
        if line is not None:
            line.count_refusal(error)

    def take(self, limit: int, now: float) -> tuple[list[Part], int]:
        """The parts of the next batch and their rows: a retry as it stands, else from the lines.

        Call it only while rows wait.

        Args:
            limit: the most rows to take from the lines.
            now: this instant.
        """
        if self.retry_rows:
            return self._take_retry()
        if len(self.lines) == 1:
            [line] = self.lines.values()
            parts, taken = self._take_from(line, limit, now)
        else:
            parts, taken = [], 0
            for owner, run in groupby(self._head(limit), key=_owner_of):
                line = self.lines[owner]
                more, rows = self._take_from(line, limit - taken, now, len(list(run)))
                parts += more
                taken += rows
        self.rows -= taken
        return parts, taken

    def _head(self, limit: int) -> list[Ticket]:
        """The tickets of which rows are among the next so many."""
        head: list[Ticket] = []
        for ticket in self.tickets():
            if limit <= 0:
                break
            limit -= ticket.rows - ticket.taken
            head.append(ticket)
        return head

    def _take_from(
        self, line: Line, limit: int, now: float, count: int | None = None
    ) -> tuple[list[Part], int]:
        """Rows from the head of a line.

        Args:
            line: whose.
            limit: the most rows.
            now: this instant.
            count: the most tickets.
        """
        entries, deadlines = line.entries, self._deadlines
        waits, bounds = line.queue.counts, line.queue.bounds
        room = limit
        gone = nbytes = 0
        waited_s = 0.0
        parts: list[Part] = []
        for _, _, _, ticket in entries if count is None else entries[:count]:
            start = ticket.taken
            stop = ticket.rows
            if stop - start > room:
                ticket.taken = stop = start + room
            else:
                ticket.taken = stop
                nbytes += ticket.nbytes
                ticket.state = _RUNNING  # no row of it waits for a retry: those leave first
                deadlines.remove(ticket)
                gone += 1
                wait_s = now - ticket.offered_at
                waits[bisect_left(bounds, wait_s)] += 1
                waited_s += wait_s
            room -= stop - start
            parts.append((ticket, start, stop))
            if not room:
                break
        # What leaves whole is the head of the line: only the last may have left in part.
        del entries[:gone]
        line.queue.total += waited_s
        line.rows -= limit - room
        line.nbytes -= nbytes
        if not entries:
            self._shares.sleep(line.owner)
        return parts, limit - room

    def _take_retry(self) -> tuple[list[Part], int]:
        parts = self.retry
        assert parts is not None, "rows wait for a retry, but no group has them"
        self._retries.popleft()
        taken = 0
        for ticket, start, stop in parts:
            taken += stop - start
            ticket.retrying -= stop - start
            if not ticket.retrying and ticket.taken == ticket.rows:
                ticket.state = _RUNNING
                self._deadlines.remove(ticket)
        self.retry_rows -= taken
        return parts, taken

    def return_for_retry(self, parts: list[Part]) -> None:
        """Let these parts of a failed batch wait again, as one batch, ahead of the lines."""
        for ticket, start, stop in parts:
            if ticket.state is _RUNNING:
                ticket.state = _WAITING
                self._deadlines.add(ticket)
            ticket.retrying += stop - start
            self.retry_rows += stop - start
        self._retries.append(parts)

    def forget(self, ticket: Ticket) -> None:
        """No row of this waiting ticket shall leave any more; its end is the caller's to set."""
        left = ticket.rows - ticket.taken
        if left:
            line = self.lines[ticket.owner]
            line.leave(ticket)
            self.rows -= left
            if not line.entries:
                self._shares.sleep(line.owner)
        if ticket.retrying:
            self.retry_rows -= ticket.retrying
            if not self.retry_rows:
                self._retries.clear()
        self._deadlines.remove(ticket)

    def landed(self, batch: Batch, seconds: float, wait_s: float) -> None:
        """A batch came back that took `seconds` of the device, after `wait_s` before it began."""
        rows, bucket = batch.rows, batch.bucket
        self.in_flight -= 1
        self.busy_s += seconds
        self.meter.landed(bucket, rows, wait_s, seconds, batch.expected_s)
        pace = seconds / rows
        padding = pace * (bucket - rows) / bucket
        if len(self.lines) == 1:
            [line] = self.lines.values()
            tally = line.tally
            tally.rows_run += rows
            tally.busy_s += seconds
            tally.padding_s += padding * rows
        else:
            for ticket, start, stop in batch.parts:
                tally = self.lines[ticket.owner].tally
                tally.rows_run += stop - start
                tally.busy_s += pace * (stop - start)
                tally.padding_s += padding * (stop - start)
        if self.pace_s is None:
            self.pace_s = pace
        else:
            self.pace_s += _PACE_WEIGHT * (pace - self.pace_s)

    def _merged(self) -> Iterator[Entry]:
        """Entries of all lines: owners in share first, each group by priority and deadline."""
        first: list[list[Entry]] = []
        then: list[list[Entry]] = []
        limit = self._shares.limit()
        for line in self.lines.values():
            if line.entries:
                in_share = self._shares.in_share(line.owner, limit)
                (first if in_share else then).append(line.entries)
        return chain(heapq.merge(*first), heapq.merge(*then))

    def _retry_after_ms(self, line: Line, ticket: Ticket, sharing: int) -> int:
        """When enough rows will have left: the rows ahead, at this lane's pace and share."""
        if self.pace_s is None:
            return _RETRY_MS_UNKNOWN
        rows = line.rows_over(ticket) + self.retry_rows
        hint = ceil(1000 * rows * self.pace_s * sharing)
        return min(max(hint, 1), _RETRY_MS_MAX)

    def stats(self) -> LaneStats:
        """The counters as they are."""
        lines = self.lines.values()
        return LaneStats(
            rows=self.rows,
            nbytes=sum(line.nbytes for line in lines),
            retry_rows=self.retry_rows,
            in_flight=self.in_flight,
            refused=self.refused,
            batches=self.batches,
            rows_run=self.rows_run,
            padded_rows=self.padded_rows,
            bisections=self.bisections,
            busy_s=self.busy_s,
            draining=self.draining,
            owners={line.owner: line.stats() for line in lines},
            runs={bucket: (run[0], run[1]) for bucket, run in self.meter.runs.items()},
            wait=self.meter.wait.read(),
            device=self.meter.device.read(),
            error=self.meter.error.read(),
        )

    def check_invariants(self) -> None:
        """Hold the lane against itself. O(n); for tests and simulation."""
        for owner, line in self.lines.items():
            assert owner == line.owner
            line.check_invariants()
            for ticket in line.tickets():
                assert ticket.lane == self.key
                assert ticket.state is _WAITING, f"{ticket} ended but is in line"
        assert self.rows == sum(line.rows for line in self.lines.values())
        assert sorted(map(id, self.tickets())) == sorted(
            id(ticket) for line in self.lines.values() for ticket in line.tickets()
        )
        retrying: dict[int, int] = {}
        for ticket, start, stop in (part for group in self._retries for part in group):
            if ticket.state is _WAITING:
                retrying[ticket.id] = retrying.get(ticket.id, 0) + stop - start
        assert self.retry_rows == sum(retrying.values())
