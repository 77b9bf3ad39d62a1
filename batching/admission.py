"""When rows that are offered now would be answered, and whether that is soon enough to take them.

Who cannot be answered in time should hear so at once, not when the time is up: he may go elsewhere,
and others do not wait behind rows that are given up later. What is known at that instant says it:

    start   when the device will have done what is in flight
    ahead   the batches that run first: of other lanes, as far as shares and deadlines put them
            before these rows
    own     the batches of the rows' own lane, up to the one that holds the last of these rows

An owner in share does not wait for the backlog of one that is not, and of another one in share it
waits for no more than that one may still take and be in share. Who is out of share waits for
everybody in share, and takes turns with the others. A ticket is refused, too, where one batch more
of its lane would have to be so large that the tickets before it are late: a policy would give those
up for it, and they were accepted. (Not where it has time for several batches more: then it can be
left behind.)

Rows that have not come yet are not counted, nor what a policy knows beside shares and deadlines. So
the times of every line, and of every criticality in it, are multiplied by a factor that grows while
accepted tickets are late (`batching.stretch`). A ticket is never refused for what becomes of less
critical ones. The rule is Clockwork's (OSDI 2020).

The usual case, rows of one lane that fit into one batch, costs O(1); else it is O(lanes with rows)
once between two changes of what waits elsewhere, and a sum over them for each ticket. Does not know
policies, what is picked next, or clocks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from math import ceil, inf
from sys import maxsize
from typing import Final

from batching.allowance import BEST_EFFORT
from batching.costs import LaneCosts
from batching.flight import Flight
from batching.lane import Lane
from batching.line import Line
from batching.refusals import TooBusy
from batching.shares import Shares
from batching.stretch import Stretch
from batching.values import LaneKey, Part, Ticket
from batching.window import is_patient

__all__ = ["Admission"]

_RETRY_MS_MAX: Final = 10_000
_TOO_BUSY: Final = "the device is too busy to answer by the deadline"


class Admission:
    """What the rows of one batcher may expect.

    Args:
        lanes: all; live.
        ready: those with rows that wait; live.
        shares: who is in share.
        flight: what is on the device.
        is_on: whether tickets are refused; what may be expected is known in any case.

    Attributes:
        is_on: the same; may be changed.
    """

    __slots__ = (
        "_ahead", "_ahead_s", "_flight", "_lanes", "_limit", "_ready", "_shares", "is_on",
    )  # fmt: skip

    def __init__(
        self,
        lanes: Mapping[LaneKey, Lane],
        ready: Mapping[LaneKey, Lane],
        shares: Shares,
        flight: Flight,
        *,
        is_on: bool,
    ) -> None:
        self.is_on = is_on
        self._lanes: Final = lanes
        self._ready: Final = ready
        self._shares: Final = shares
        self._flight: Final = flight
        #: By lane and owner: of every other lane with rows to run first, its first deadline and
        #: its seconds. Worked out once between two polls, for all tickets of a frame.
        self._ahead: dict[tuple[Lane, str], list[tuple[float, float]]] = {}
        self._ahead_s: dict[tuple[Lane, str], float] = {}  # sums of these
        self._limit: float | None = None  # of the shares, likewise

    def changed(self) -> None:
        """Something else happened than a ticket being admitted."""
        if self._limit is not None:
            self._limit = None
            self._ahead.clear()
            self._ahead_s.clear()

    def check(self, lane: Lane, ticket: Ticket, now: float) -> None:
        """Refuse a ticket, which is not in its line yet, that would be late or make others late.

        Best-effort rows are always taken: they wait for room, and make nobody late.

        Raises:
            TooBusy: says after what time a ticket like it would be in time.
        """
        line = lane.lines.get(ticket.owner)
        if line is not None and self.takes(
            lane, line, ticket.rows, ticket.deadline, ticket.priority, now
        ):
            return
        if ticket.priority > BEST_EFFORT:
            start = max(self._flight.free_at, now)
            room_s = self._room_s(lane, ticket, now, start)
            if room_s > 0.0:
                raise TooBusy(_TOO_BUSY, _ms(room_s))

    def takes(
        self, lane: Lane, line: Line, rows: int, deadline: float, priority: int, now: float
    ) -> bool:
        """Whether new rows of a line are in time for sure: the usual case.

        All rows of the lane fit into one batch then, and whatever waits elsewhere may go first.

        Args:
            lane: the lane.
            line: their owner's.
            rows: how many.
            deadline: the earliest of theirs.
            priority: of all of them.
            now: this instant.
        """
        costs, waiting = lane.costs, lane.rows
        rows += waiting
        if rows > costs.ladder.largest or lane.retry_rows:
            return False
        ahead_s = 0.0
        if len(self._ready) > (waiting > 0):
            known_s = self._ahead_s.get((lane, line.owner))
            if known_s is None:
                return False
            ahead_s = known_s
        start = self._flight.free_at
        if start < now:
            start = now
        own_s = costs.estimates[costs.ladder.places[rows]]
        stretch = line.stretch_of(priority).factor
        finish = now + stretch * (start - now + ahead_s + own_s)
        return finish <= deadline and (
            not waiting
            or finish <= (line.entries[0][1] if len(lane.lines) == 1 else _head_of(lane))
        )

    def _room_s(self, lane: Lane, ticket: Ticket, now: float, start: float) -> float:
        """0 where the ticket would be in time; else after how long one like it would."""
        if not self._ready and not len(self._flight):
            # Nobody waits for the device, so trying costs nobody anything; and whatever makes the
            # forecast wrong, an estimate or a stretch, is mended by what comes of it.
            return 0.0
        line = lane.lines.get(ticket.owner)
        stretch = line.stretch_of(ticket.priority).factor if line is not None else 1.0
        costs, deadline = lane.costs, ticket.deadline
        before = self._rows_before(lane, line, ticket.priority, deadline)
        rows = before + ticket.rows
        own_s = _backlog_s(costs, rows)
        ahead_s = self._before(lane, ticket.owner, deadline)
        late_s = stretch * (start - now + ahead_s + own_s) - (deadline - now)
        if late_s > 0.0:
            return late_s
        if before and rows <= costs.ladder.largest:
            # Rows that are less critical are given up for it, not it for them.
            earliest, protected = lane.heads(self._limit_now(), ticket.priority)
            is_in_share = self._shares.in_share(ticket.owner, self._limit_now())
            head = protected if is_in_share else earliest
            if head < deadline + late_s and deadline < inf:  # else it is in time for them, too
                begin_s = start - now + self._before(lane, ticket.owner, head)
                if now + stretch * (begin_s + own_s) > head and not is_patient(
                    deadline, costs, now + stretch * begin_s
                ):
                    # The batch that forms now is full; when it leaves there will be another.
                    return max(begin_s, costs.estimates[0])
        return 0.0

    def news(self, ticket: Ticket, now: float, landing: int) -> tuple[int, int]:
        """What to tell a router with the answer to a ticket.

        Args:
            ticket: which is answered.
            now: this instant.
            landing: the number of its batch.

        Returns:
            microseconds that another like it would wait, and those that each row adds; two zeros
            where nobody is refused for being late: a router would do so in the device's stead.
        """
        if not self.is_on:
            return (0, 0)
        costs = self._lanes[ticket.lane].costs
        wait_s = self.wait_s(ticket.lane, ticket.owner, ticket.priority, now, landing)
        row_s = costs.estimates[-1] / costs.ladder.largest
        return int(wait_s * 1e6), int(row_s * 1e6) + 1

    def wait_s(
        self, key: LaneKey, owner: str, priority: int, now: float, landing: int = 0
    ) -> float:
        """Seconds until the device would begin with a row that came now.

        Args:
            key: the lane in which it would wait.
            owner: whose it is.
            priority: its own.
            now: this instant.
            landing: number of a batch that is coming back in this very moment, and of which the
                batcher has not been told yet.
        """
        lane = self._lanes[key]
        start = self._flight.free_without(landing, now) if landing else self._flight.free_at
        start = max(start, now)
        if not self._ready:
            return start - now
        line = lane.lines.get(owner)
        costs = lane.costs
        before = self._rows_before(lane, line, priority, inf)
        largest = costs.ladder.largest
        own_s = before // largest * costs.estimates[-1]
        ahead_s = self._before(lane, owner, inf)
        if 0 < before < largest:
            joined_s = costs.of_rows(before + 1)
            if (
                start + ahead_s + joined_s > lane.heads(self._limit_now(), priority)[0]
            ):  # it must wait for the next batch
                own_s = costs.of_rows(before)
        stretch = line.stretch_of(priority).factor if line is not None else 1.0
        return stretch * (start - now + ahead_s + own_s)

    def retry_ms(self, ticket: Ticket, now: float) -> int:
        """A hint for whom a ticket was: when the device would begin with another like it."""
        return _ms(self.wait_s(ticket.lane, ticket.owner, ticket.priority, now))

    def missed(self, ticket: Ticket, now: float) -> None:
        """An accepted ticket is late, or was given up."""
        if self.is_on and ticket.priority > BEST_EFFORT:
            line = self._lanes[ticket.lane].lines[ticket.owner]
            line.stretch_of(ticket.priority).missed(now)

    def landed(self, lane: Lane, parts: list[Part], now: float) -> None:
        """A batch of these parts came back."""
        if not self.is_on:
            return
        lines = lane.lines
        first, last = parts[0][0], parts[-1][0]
        if len(lines) == 1 and first.priority == last.priority:  # the usual case
            if first.priority <= BEST_EFFORT:
                return
            stretch = lines[first.owner].stretch_of(first.priority)
            if first.deadline < now:  # the most urgent come first
                stretch.missed(now)
            else:
                stretch.kept()
            return
        late: dict[Stretch, bool] = {}
        for ticket, _, _ in parts:
            if ticket.priority > BEST_EFFORT:
                stretch = lines[ticket.owner].stretch_of(ticket.priority)
                late[stretch] = late.get(stretch, False) or ticket.deadline < now
        for stretch, is_late in late.items():
            if is_late:
                stretch.missed(now)
            else:
                stretch.kept()

    def _rows_before(self, lane: Lane, line: Line | None, priority: int, deadline: float) -> int:
        """Rows of the lane that leave before a new ticket of this line."""
        rows = lane.retry_rows
        if line is not None:
            rows += _rows_ahead_in(line, priority, deadline)
        if len(lane.lines) == (line is not None):
            return rows
        shares, limit = self._shares, self._limit_now()
        owner = line.owner if line is not None else ""
        is_in_share = line is None or shares.in_share(owner, limit)
        row_s = lane.costs.estimates[-1] / lane.ladder.largest
        for other in lane.lines.values():
            if other is line or not other.entries:
                continue
            if not is_in_share:
                rows += _rows_of(other)
                continue
            credit_s = limit - shares.time_of(other.owner)
            if credit_s >= 0.0:
                rows += min(_rows_of(other), int(credit_s / row_s) + 1)
        return rows

    def _before(self, lane: Lane, owner: str, deadline: float) -> float:
        """Seconds of other lanes before rows of this owner and deadline."""
        ahead = self._ahead.get((lane, owner))
        if ahead is None:
            ahead = self._ahead[lane, owner] = self._others(lane, owner)
            self._ahead_s[lane, owner] = sum([seconds for _, seconds in ahead])
        return sum([seconds for first, seconds in ahead if first <= deadline])

    def _limit_now(self) -> float:
        if self._limit is None:
            self._limit = self._shares.limit()
        return self._limit

    def _others(self, lane: Lane, owner: str) -> list[tuple[float, float]]:
        """Of every other lane: its first deadline, and how long this owner must let it run."""
        shares = self._shares
        limit = max(self._limit_now(), shares.time_of(owner) + shares.credit_s)
        found: list[tuple[float, float]] = []
        for other in self._ready.values():
            if other is lane:
                continue
            rows, credit_s = other.retry_rows, 0.0
            first = inf
            for line in other.lines.values():
                if line.entries:
                    left_s = limit - shares.time_of(line.owner)
                    if left_s >= 0.0:
                        rows += _rows_of(line)
                        credit_s += left_s
                        first = min(first, line.entries[0][1])
            if rows:
                costs = other.costs
                one_s = costs.of_rows(min(rows, costs.ladder.largest))
                found.append((first, max(min(_backlog_s(costs, rows), credit_s), one_s)))
        return found


def _ms(seconds: float) -> int:
    return min(max(ceil(1000 * seconds), 1), _RETRY_MS_MAX) if seconds < inf else _RETRY_MS_MAX


def _backlog_s(costs: LaneCosts, rows: int) -> float:
    """Device seconds of so many rows, in batches as large as they may be."""
    full, rest = divmod(rows, costs.ladder.largest)
    seconds = full * costs.estimates[-1]
    return seconds + costs.estimates[costs.ladder.places[rest]] if rest else seconds


def _head_of(lane: Lane) -> float:
    """A deadline that is not after any of the rows that leave the lines first; inf for no rows."""
    return min([line.entries[0][1] for line in lane.lines.values() if line.entries], default=inf)


def _rows_of(line: Line) -> int:
    """Rows of a line, but for best-effort ones: those wait for room that others leave."""
    return line.rows - line.spare_rows if line.spare else line.rows


def _rows_ahead_in(line: Line, priority: int, deadline: float) -> int:
    """Rows of a line that would leave before a new ticket; about, where it is not the last."""
    entries = line.entries
    if not entries or entries[-1][:2] <= (-priority, deadline):
        return _rows_of(line)
    place = bisect_left(entries, (-priority, deadline, maxsize))
    return _rows_of(line) * place // len(entries)
