"""The rows that wait for one unit in one shape, whoever they are of, and what leaves next.

A lane has a line for every owner. Rows of different owners run in one batch; when not all fit,
`batching.ranks` says which go first. With one owner that is simply the line. Best-effort rows fill
the compiled size to which the others would have been padded, and never make it larger; they make up
a batch of their own only where no others wait.

Rows of a failed batch wait again, ahead of the lines (`batching.retries`), outside the bounds.

Bounds count live tickets only: an ended ticket leaves its line at once and nothing keeps its
payload. A lane does not know the device, the other lanes, or when its turn comes.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from math import ceil, inf
from operator import attrgetter
from typing import Final

from batching.allowance import BEST_EFFORT, SHEDDABLE, Allowance
from batching.costs import LaneCosts
from batching.deadlines import Deadlines
from batching.errors import InvalidArgument, ResourceExhausted, ServingError
from batching.line import Entry, Line
from batching.ranks import heads, in_order, segments, spares
from batching.retries import Retries
from batching.shares import Shares
from batching.telemetry import LaneMeter
from batching.values import Batch, LaneKey, LaneStats, Part, Ticket, TicketState

__all__ = ["Lane"]

#: Reading a member off an enum class costs more than all else in the loops below.
_WAITING: Final = TicketState.WAITING

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
        rows_max: the most rows in the line of an owner without an allowance.
        bytes_max: the most bytes in it.
        lines: by owner; of every owner that ever had a ticket here.
        rows: rows in all lines, but for best-effort ones.
        spare_rows: best-effort rows in all lines.
        in_flight: batches of this lane on the device.
        draining: whether it refuses tickets.
        refused: tickets turned away, of whomever.
        pace_s: moving mean of device seconds per row, or None before the first batch ended.
        meter: what its batches held and took.
    """

    __slots__ = (
        "_allowances",
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
        "rows",
        "rows_max",
        "rows_run",
        "spare_rows",
    )

    def __init__(
        self,
        key: LaneKey,
        costs: LaneCosts,
        rows_max: int,
        bytes_max: int,
        deadlines: Deadlines,
        shares: Shares,
        allowances: Mapping[str, Allowance],
    ) -> None:
        """Make an empty lane.

        Args:
            key: the lane's name.
            costs: of the batch sizes that its unit is compiled for.
            rows_max: the most rows in the line of an owner without an allowance.
            bytes_max: the most bytes in it.
            deadlines: the batcher's index, which the lane keeps true for its own tickets.
            shares: the batcher's books of who is in share, which hear whose rows wait.
            allowances: by owner; live.

        Raises:
            InvalidArgument: a bound is not positive.
        """
        if rows_max < 1 or bytes_max < 1:
            raise InvalidArgument(
                f"lane {key}: bounds must be positive; were {rows_max} rows, {bytes_max} bytes"
            )
        self.key: Final = key
        self.costs = costs
        self.ladder = costs.ladder
        self.rows_max: Final = rows_max
        self.bytes_max: Final = bytes_max
        self.lines: Final[dict[str, Line]] = {}
        self._deadlines: Final = deadlines
        self._shares: Final = shares
        self._allowances: Final = allowances
        self._retries: Final = Retries(deadlines)
        self.meter: Final = LaneMeter()
        self.rows = self.spare_rows = self.in_flight = 0
        self.draining = False
        self.refused = 0
        self.pace_s: float | None = None
        self.batches = self.rows_run = self.padded_rows = self.bisections = 0
        self.busy_s = 0.0

    @property
    def waiting(self) -> int:
        """Rows that the next batches may take."""
        return self.rows + self.spare_rows + self._retries.rows

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not (self.waiting or self.in_flight)

    @property
    def retry_rows(self) -> int:
        """Rows that wait ahead of the lines for another try."""
        return self._retries.rows

    @property
    def retry(self) -> list[Part] | None:
        """The group that must be the next batch, if one is to be retried."""
        return self._retries.first

    def tickets(self) -> Iterator[Ticket]:
        """The tickets in the order in which rows leave, best-effort ones last."""
        yield from in_order(self.lines, self._shares)
        if self.spare_rows:
            yield from spares(self.lines)

    def first(self) -> Ticket | None:
        """The ticket whose rows leave next from the lines."""
        if len(self.lines) == 1:
            [line] = self.lines.values()
            if line.entries:
                return line.entries[0][3]
        return next(self.tickets(), None)

    def segments(self, limit: float | None = None) -> Iterator[tuple[bool, Iterator[Ticket]]]:
        """See `LaneView.segments`."""
        if limit is None:
            limit = self._shares.limit()
        return segments(self.lines, self._shares, limit)

    def heads(self, limit: float | None = None, priority: int = SHEDDABLE) -> tuple[float, float]:
        """See `LaneView.heads`."""
        if limit is None:
            limit = self._shares.limit()
        if len(self.lines) == 1:
            [line] = self.lines.values()
            deadline = line.earliest(priority)
            return deadline, deadline if self._shares.in_share(line.owner, limit) else inf
        return heads(self.lines.values(), self._shares, limit, priority)

    def worth(self, rows: int) -> float:
        """See `LaneView.worth`."""
        weight_of = self._shares.weight_of
        if len(self.lines) == 1:
            [owner] = self.lines
            return rows * weight_of(owner)
        worth, left = 0.0, rows
        for ticket in self._head(in_order(self.lines, self._shares), rows):
            taken = min(left, ticket.rows - ticket.taken)
            left -= taken
            worth += taken * weight_of(ticket.owner)
        return worth + left  # of best-effort rows none is worth more than another

    def admit(self, ticket: Ticket, number: int, sharing: int) -> list[Ticket] | None:
        """Put the ticket into its owner's line.

        Args:
            ticket: a new ticket of this lane.
            number: the ticket's number from now on.
            sharing: how many lanes the device serves now, for the retry hint.

        Returns:
            Less critical tickets of the line that must make room for it; the caller is to end them.

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
        evicted = None
        if rows > line.rows_max or nbytes > line.bytes_max:
            evicted = line.less_critical(ticket)
            if not evicted:
                raise line.refusal(ticket, self._retry_after_ms(line, ticket, sharing))
        ticket.id = number
        ticket.state = _WAITING
        entry = (-ticket.priority, ticket.deadline, number, ticket)
        if ticket.priority <= BEST_EFFORT:
            # It wants no share of the device, so it does not wake its owner.
            entries = line.spare
            self.spare_rows += ticket.rows
        else:
            entries = line.entries
            self.rows += ticket.rows
            if not entries:
                self._shares.wake(line.owner)
        if not entries or entries[-1] < entry:
            entries.append(entry)
        else:
            insort(entries, entry)
        line.rows = rows
        line.nbytes = nbytes
        line.tally.offered += 1
        self._deadlines.add(ticket)
        return evicted

    def admit_all(
        self, line: Line, tickets: Sequence[Ticket], number: int, rows: int, nbytes: int
    ) -> None:
        """Put tickets that came together, and fit, into their owner's line.

        Args:
            line: the owner's.
            tickets: new ones of this lane and one priority above best-effort.
            number: the first ticket's from now on; the others' follow.
            rows: of all of them.
            nbytes: likewise.
        """
        if not line.entries:
            self._shares.wake(line.owner)
        line.join(tickets, number, rows, nbytes)
        self.rows += rows
        self._deadlines.add_all(tickets)

    def _new_line(self, owner: str) -> Line:
        if len(self.lines) >= _OWNERS_MAX:
            raise ResourceExhausted(f"{_OWNERS_MAX} owners have rows in lane {self.key}")
        line = self.lines[owner] = Line(owner, self.rows_max, self.bytes_max)
        self.allow(owner)
        return line

    def allow(self, owner: str) -> None:
        """The allowance of an owner is new: its line, if it has one, is bounded by them.

        Rows beyond a bound that was lowered stay; none comes in until they have left.
        """
        line, allowance = self.lines.get(owner), self._allowances.get(owner)
        if line is not None:
            line.rows_max = self.rows_max if allowance is None else allowance.rows_max
            line.bytes_max = self.bytes_max if allowance is None else allowance.bytes_max

    def refuse(self, ticket: Ticket, error: ServingError) -> None:
        """Count a ticket that was turned away."""
        self.refused += 1
        line = self.lines.get(ticket.owner)
        if line is None and len(self.lines) < _OWNERS_MAX:
            line = self._new_line(ticket.owner)
        if line is not None:
            line.count_refusal(error)

    def take(self, limit: int, now: float) -> tuple[list[Part], int, int]:
        """The next batch: a retry as it stands, else rows from the lines, padded with spare ones.

        Call it only while rows wait.

        Args:
            limit: the most rows to take from the lines, but for the spare ones that pad.
            now: this instant.

        Returns:
            its parts, their rows, and how many of these are best-effort ones.
        """
        if self._retries.rows:
            parts = self._retries.take()
            rows = sum([stop - start for _, start, stop in parts])
            spare = [part for part in parts if part[0].priority <= BEST_EFFORT]
            return parts, rows, sum([stop - start for _, start, stop in spare])
        if not self.rows:
            parts, spare_taken = self._take_spare(limit, now)
            return parts, spare_taken, spare_taken
        if len(self.lines) == 1:
            [line] = self.lines.values()
            parts, taken = self._take_from(line, line.entries, limit, now)
        else:
            head = self._head(in_order(self.lines, self._shares), limit)
            parts, taken = self._take_each(head, limit, now, is_spare=False)
        self.rows -= taken
        if self.spare_rows:
            more, spare_taken = self._take_spare(self.ladder.bucket_of(taken) - taken, now)
            return parts + more, taken + spare_taken, spare_taken
        return parts, taken, 0

    def _take_spare(self, limit: int, now: float) -> tuple[list[Part], int]:
        head = self._head(spares(self.lines), limit)
        parts, taken = self._take_each(head, limit, now, is_spare=True)
        self.spare_rows -= taken
        return parts, taken

    def _head(self, tickets: Iterator[Ticket], limit: int) -> list[Ticket]:
        """The tickets of which rows are among the next so many."""
        head: list[Ticket] = []
        while limit > 0 and (ticket := next(tickets, None)) is not None:
            limit -= ticket.rows - ticket.taken
            head.append(ticket)
        return head

    def _take_each(
        self, head: Iterable[Ticket], limit: int, now: float, *, is_spare: bool
    ) -> tuple[list[Part], int]:
        """Rows of these tickets, which are the next of their lines."""
        parts: list[Part] = []
        taken = 0
        for owner, run in groupby(head, key=_owner_of):
            line = self.lines[owner]
            entries = line.spare if is_spare else line.entries
            more, rows = self._take_from(line, entries, limit - taken, now, len(list(run)))
            parts += more
            taken += rows
        return parts, taken

    def _take_from(
        self, line: Line, entries: list[Entry], limit: int, now: float, count: int | None = None
    ) -> tuple[list[Part], int]:
        taken = line.take(entries, limit, now, self._deadlines, count)
        if not entries and entries is line.entries:
            self._shares.sleep(line.owner)
        return taken

    def return_for_retry(self, parts: list[Part]) -> None:
        """Let these parts of a failed batch wait again, as one batch, ahead of the lines.

        As several, if the lane's largest size became smaller while they ran.
        """
        self._retries.put(parts, self.ladder.largest)

    def resize(self, costs: LaneCosts) -> None:
        """The unit is compiled for other sizes: what leaves from now on goes by them."""
        self.costs = costs
        self.ladder = costs.ladder
        self._retries.refit(self.ladder.largest)

    def forget(self, ticket: Ticket) -> None:
        """No row of this waiting ticket shall leave any more; its end is the caller's to set."""
        left = ticket.rows - ticket.taken
        if left:
            line = self.lines[ticket.owner]
            line.leave(ticket)
            if ticket.priority <= BEST_EFFORT:
                self.spare_rows -= left
            else:
                self.rows -= left
                if not line.entries:
                    self._shares.sleep(line.owner)
        self._retries.forget(ticket)
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

    def _retry_after_ms(self, line: Line, ticket: Ticket, sharing: int) -> int:
        """When enough rows will have left: the rows ahead, at this lane's pace and share."""
        if self.pace_s is None:
            return _RETRY_MS_UNKNOWN
        rows = line.rows_over(ticket) + self._retries.rows
        hint = ceil(1000 * rows * self.pace_s * sharing)
        return min(max(hint, 1), _RETRY_MS_MAX)

    def stats(self) -> LaneStats:
        """The counters as they are."""
        lines = self.lines.values()
        return LaneStats(
            rows=self.rows + self.spare_rows,
            spare_rows=self.spare_rows,
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
        assert self.spare_rows == sum(line.spare_rows for line in self.lines.values())
        assert self.rows + self.spare_rows == sum(line.rows for line in self.lines.values())
        assert sorted(map(id, self.tickets())) == sorted(
            id(ticket) for line in self.lines.values() for ticket in line.tickets()
        )
        self._retries.check_invariants()
