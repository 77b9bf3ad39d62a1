"""The bounded line of rows that wait for one unit in one shape, and what leaves it next.

A lane admits a ticket or says why not, hands out the parts of the next batch, first in, first out,
and forgets the waiting rows of a ticket that ended early, wherever it stands. Bounds count live
tickets only: an ended ticket leaves the line at once and nothing keeps its payload.

Rows of a failed batch wait again, in the groups in which they are to be retried, ahead of the line.
They were admitted once and stay outside the bounds.

A lane does not know the device, the other lanes, or when its turn comes.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from math import ceil
from typing import Final

from batching.buckets import Ladder
from batching.deadlines import Deadlines
from batching.errors import InvalidArgument
from batching.refusals import LaneFull, TicketTooLarge
from batching.values import LaneKey, LaneStats, Part, Ticket, TicketState

__all__ = ["Lane"]

#: Reading a member off an enum class costs more than all else in the loops below.
_WAITING: Final = TicketState.WAITING
_RUNNING: Final = TicketState.RUNNING

#: The retry hint while nothing is known of the lane's pace, and the bounds of a known one.
_RETRY_MS_UNKNOWN: Final = 100
_RETRY_MS_MAX: Final = 10_000

#: Weight of the newest batch in the moving mean of device seconds per row.
_PACE_WEIGHT: Final = 0.125


class Lane:
    """The line of one lane and its counters. Only its batcher changes it; a policy reads it.

    Attributes:
        key: the lane's name.
        ladder: the batch sizes its unit is compiled for.
        rows_max: the most rows in line.
        bytes_max: the most bytes in line.
        rows: rows in line.
        nbytes: bytes of the tickets in line, each counted whole until its last row has left.
        retry_rows: rows that wait ahead of the line for another try.
        in_flight: batches of this lane on the device.
        draining: whether it refuses tickets.
        pace_s: moving mean of device seconds per row, or None before the first batch ended.
    """

    __slots__ = (
        "_deadlines",
        "_line",
        "_retries",
        "batches",
        "bisections",
        "busy_s",
        "bytes_max",
        "cancelled",
        "draining",
        "expired",
        "failed",
        "finished",
        "in_flight",
        "key",
        "ladder",
        "nbytes",
        "offered",
        "pace_s",
        "padded_rows",
        "refused",
        "retry_rows",
        "rows",
        "rows_max",
        "rows_run",
    )

    def __init__(
        self, key: LaneKey, ladder: Ladder, rows_max: int, bytes_max: int, deadlines: Deadlines
    ) -> None:
        """Make an empty lane.

        Args:
            key: the lane's name.
            ladder: the batch sizes its unit is compiled for.
            rows_max: the most rows in line.
            bytes_max: the most bytes in line.
            deadlines: the batcher's index, which the lane keeps true for its own tickets.

        Raises:
            InvalidArgument: a bound is not positive.
        """
        if rows_max < 1 or bytes_max < 1:
            raise InvalidArgument(
                f"lane {key}: bounds must be positive; were {rows_max} rows, {bytes_max} bytes"
            )
        self.key: Final = key
        self.ladder: Final = ladder
        self.rows_max: Final = rows_max
        self.bytes_max: Final = bytes_max
        self._deadlines: Final = deadlines
        self._line: Final[OrderedDict[int, Ticket]] = OrderedDict()
        self._retries: Final[deque[list[Part]]] = deque()
        self.rows = self.nbytes = self.retry_rows = self.in_flight = 0
        self.draining = False
        self.pace_s: float | None = None
        self.offered = self.refused = 0
        self.finished = self.failed = self.expired = self.cancelled = 0
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

    def tickets(self) -> Iterator[Ticket]:
        """The tickets in line, first in, first out; the first may have left in part."""
        return iter(self._line.values())

    def admit(self, ticket: Ticket, number: int, sharing: int) -> None:
        """Put the ticket at the end of the line.

        Args:
            ticket: a new ticket of this lane.
            number: the ticket's number from now on.
            sharing: how many lanes the device serves now, for the retry hint.

        Raises:
            TicketTooLarge: it would not fit into the empty lane.
            LaneFull: it does not fit now.
        """
        rows = self.rows + ticket.rows
        nbytes = self.nbytes + ticket.nbytes
        if rows > self.rows_max or nbytes > self.bytes_max:
            raise self._refusal(ticket, sharing)
        ticket.id = number
        ticket.state = _WAITING
        self._line[number] = ticket
        self._deadlines.add(ticket)
        self.rows = rows
        self.nbytes = nbytes
        self.offered += 1

    def take(self) -> tuple[list[Part], int]:
        """The parts of the next batch and their rows: a retry as it stands, else from the line.

        Call it only while rows wait.
        """
        if self.retry_rows:
            return self._take_retry()
        line = self._line
        room = self.ladder.largest
        taken = 0
        parts: list[Part] = []
        while line and taken < room:
            number, ticket = line.popitem(last=False)
            start = ticket.taken
            stop = ticket.rows
            if stop - start > room - taken:
                stop = start + room - taken
                line[number] = ticket
                line.move_to_end(number, last=False)
                ticket.taken = stop
            else:
                ticket.taken = stop
                self.nbytes -= ticket.nbytes
                ticket.state = _RUNNING  # no row of it waits for a retry: those leave first
                self._deadlines.remove(ticket)
            taken += stop - start
            parts.append((ticket, start, stop))
        self.rows -= taken
        return parts, taken

    def _take_retry(self) -> tuple[list[Part], int]:
        while True:
            # Only tickets that ended meanwhile are not waiting; their rows are counted no more.
            parts = [part for part in self._retries.popleft() if part[0].state is _WAITING]
            if parts:
                break
        taken = 0
        for ticket, start, stop in parts:
            taken += stop - start
            ticket.retrying -= stop - start
            if not ticket.retrying and ticket.taken == ticket.rows:
                ticket.state = _RUNNING
                self._deadlines.remove(ticket)
        self.retry_rows -= taken
        return parts, taken

    def retry(self, parts: list[Part]) -> None:
        """Let these parts of a failed batch wait again, as one batch, ahead of the line."""
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
            del self._line[ticket.id]
            self.rows -= left
            self.nbytes -= ticket.nbytes
        if ticket.retrying:
            self.retry_rows -= ticket.retrying
            if not self.retry_rows:
                self._retries.clear()
        self._deadlines.remove(ticket)

    def landed(self, rows: int, seconds: float) -> None:
        """A batch ended: `rows` took `seconds` of the device."""
        self.in_flight -= 1
        self.busy_s += seconds
        pace = seconds / rows
        if self.pace_s is None:
            self.pace_s = pace
        else:
            self.pace_s += _PACE_WEIGHT * (pace - self.pace_s)

    def _refusal(self, ticket: Ticket, sharing: int) -> TicketTooLarge | LaneFull:
        wanted = f"{ticket.rows} rows and {ticket.nbytes} bytes"
        bounds = f"{self.rows_max} rows and {self.bytes_max} bytes"
        if ticket.rows > self.rows_max or ticket.nbytes > self.bytes_max:
            return TicketTooLarge(f"{wanted} can never wait in a lane bounded to {bounds}")
        return LaneFull(
            f"{wanted} do not fit: {self.rows} rows and {self.nbytes} bytes wait for unit "
            f"{self.key.unit} in a lane bounded to {bounds}",
            self._retry_after_ms(ticket, sharing),
        )

    def _retry_after_ms(self, ticket: Ticket, sharing: int) -> int:
        """When enough rows will have left: the rows ahead, at this lane's pace and share."""
        if self.pace_s is None:
            return _RETRY_MS_UNKNOWN
        rows = max(0, self.rows + ticket.rows - self.rows_max)
        excess = max(0, self.nbytes + ticket.nbytes - self.bytes_max)
        if excess:
            # Rows weigh about the same, so this share of the rows must leave.
            rows = max(rows, ceil(self.rows * excess / self.nbytes))
        hint = ceil(1000 * (rows + self.retry_rows) * self.pace_s * sharing)
        return min(max(hint, 1), _RETRY_MS_MAX)

    def stats(self) -> LaneStats:
        """The counters as they are."""
        return LaneStats(
            rows=self.rows,
            nbytes=self.nbytes,
            retry_rows=self.retry_rows,
            in_flight=self.in_flight,
            offered=self.offered,
            refused=self.refused,
            finished=self.finished,
            failed=self.failed,
            expired=self.expired,
            cancelled=self.cancelled,
            batches=self.batches,
            rows_run=self.rows_run,
            padded_rows=self.padded_rows,
            bisections=self.bisections,
            busy_s=self.busy_s,
            draining=self.draining,
        )

    def check_invariants(self) -> None:
        """Hold the lane against itself. O(n); for tests and simulation."""
        line = list(self._line.values())
        assert self.rows == sum(ticket.rows - ticket.taken for ticket in line)
        assert self.nbytes == sum(ticket.nbytes for ticket in line)
        assert self.rows <= self.rows_max, f"{self.rows} rows of {self.rows_max}"
        assert self.nbytes <= self.bytes_max, f"{self.nbytes} bytes of {self.bytes_max}"
        numbers = list(self._line)
        assert numbers == sorted(numbers), f"the line is not first in, first out: {numbers}"
        for number, ticket in self._line.items():
            assert ticket.id == number
            assert ticket.lane == self.key
            assert ticket.state is _WAITING, f"{ticket} ended but is in line"
            assert ticket.taken < ticket.rows
        assert all(not ticket.taken for ticket in line[1:]), "only the first may have left in part"
        retrying: dict[int, int] = {}
        for ticket, start, stop in (part for group in self._retries for part in group):
            if ticket.state is _WAITING:
                retrying[ticket.id] = retrying.get(ticket.id, 0) + stop - start
        assert self.retry_rows == sum(retrying.values())
        ended = self.offered - self.finished - self.failed - self.expired - self.cancelled
        assert ended >= len(line), "a ticket in line was counted as ended"
