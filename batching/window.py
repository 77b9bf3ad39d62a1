"""How many rows of a lane run now, and which tickets at its head are not worth waiting for.

Rows that cannot be in time together with a large batch are given up, not the size of the batch: at
overload every batch that is shrunk to save its head leaves more rows behind that are late. The
window slides: drop the head until the batch that the rest makes is in time for its own head. From
Nexus (SOSP 2019), section 6.3 ("early drop").

Only rows of one segment are weighed so against each other: of owners that are all in share or all
out of it, and of one criticality. Rows of a later segment join the batch as far as those of the
earlier ones stay in time, so that no flood and no less critical row costs them theirs. And where
the rows behind the head have time for several batches more, nothing need be given up: the head runs
in a batch that is small enough for it, the others in the next.

Best-effort rows have a window where no others wait: a batch that takes little longer than one of a
single row does, as whoever comes meanwhile has to wait for it.

Does not know other lanes, or whether this lane will be picked at all.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator
from math import inf
from typing import Final, NamedTuple

from batching.costs import LaneCosts
from batching.policy import LaneView
from batching.values import Ticket

__all__ = ["Window", "batch_down", "fills_less", "is_patient", "usual_of", "window_of"]

#: Who can be in time after so many batches of the largest size may be left behind for an earlier
#: head. With less, every batch of an overloaded lane would be shrunk for its head.
_PATIENCE: Final = 4.0

#: A batch of best-effort rows alone takes at most so many times what one of a single row takes.
_SPARE_TIMES_MAX: Final = 4.0


class Window(NamedTuple):
    """What a lane would run.

    Attributes:
        deadline: the first deadline among what is kept, `inf` where there is none.
        expected_s: device seconds of it.
        rows: how many rows, of best-effort ones only where there are no others; 0 where nothing
            can be in time.
        hopeless: tickets that cannot be in time, whatever else happens.
        dropped: tickets to give up if this runs.
        protected: the first deadline among what is kept of owners in share, `inf` where there is
            none.
    """

    deadline: float
    expected_s: float
    rows: int
    hopeless: tuple[Ticket, ...] = ()
    dropped: tuple[Ticket, ...] = ()
    protected: float = inf


def window_of(lane: LaneView, start: float, limit: float | None = None) -> Window:
    """What a lane would run if the device began with it at ``start``.

    A group that is to be retried runs as it stands, whatever its deadlines: its rows were in time
    when they first ran.

    Args:
        lane: which has rows.
        start: when the device is free.
        limit: what `Shares.limit` says at this instant, where many lanes are asked.
    """
    costs = lane.costs
    group = lane.retry if lane.retry_rows else None
    if group is not None:
        rows = sum([stop - begin for _, begin, stop in group])
        deadline = min(ticket.deadline for ticket, _, _ in group)
        waits_in_share = lane.heads(limit)[1] < inf
        return Window(
            deadline, costs.of_rows(rows), rows, protected=deadline if waits_in_share else inf
        )
    ladder = costs.ladder
    rows = lane.rows
    if not rows:
        rows = min(lane.spare_rows, _most(costs, _SPARE_TIMES_MAX * costs.estimates[0]))
        return Window(inf, costs.of_rows(rows), rows)
    if rows > ladder.largest:
        rows = ladder.largest
    expected_s = costs.estimates[ladder.places[rows]]
    deadline, protected = lane.heads(limit)
    if start + expected_s <= deadline:  # the usual case
        return Window(deadline, expected_s, rows, (), (), protected)
    return _slide(lane, start, limit)


def _slide(lane: LaneView, start: float, limit: float | None) -> Window:
    costs = lane.costs
    soonest = start + costs.estimates[0]
    hopeless: list[Ticket] = []
    dropped: list[Ticket] = []
    rows, room = 0, costs.ladder.largest
    deadline = protected = inf
    for in_share, tickets in lane.segments(limit):
        first, taken, given_up = _first_in_time(tickets, costs, start, rows, room)
        for ticket in given_up:
            (hopeless if ticket.deadline < soonest else dropped).append(ticket)
        if first is None:
            continue
        rows += taken
        deadline = min(deadline, first.deadline)
        if in_share:
            protected = min(protected, first.deadline)
        room = _most(costs, deadline - start) - rows
        if room <= 0:
            break
    if not rows:
        # None is in time by itself, even one that would be if it had fewer rows: it is late as a
        # whole if its last row is.
        return Window(inf, 0.0, 0, (*hopeless, *dropped))
    return Window(deadline, costs.of_rows(rows), rows, tuple(hopeless), tuple(dropped), protected)


def _first_in_time(
    tickets: Iterator[Ticket], costs: LaneCosts, start: float, rows: int, room: int
) -> tuple[Ticket | None, int, list[Ticket]]:
    """The first ticket of a segment that is in time in a batch with as many after it as fit.

    Args:
        tickets: the segment, by deadline.
        costs: of the lane.
        start: when the batch would begin.
        rows: rows of earlier segments in it.
        room: the most rows that may be added.

    Returns:
        the ticket, or None if there is none; the rows that join from it on; those given up for it.
    """
    ahead: deque[Ticket] = deque()
    given_up: list[Ticket] = []
    held = 0
    alone: tuple[int, int] | None = None
    while True:
        while held < room and (ticket := next(tickets, None)) is not None:
            ahead.append(ticket)
            held += ticket.rows - ticket.taken
        if not ahead:
            break
        head = ahead.popleft()
        taken = min(held, room)
        if start + costs.of_rows(rows + taken) <= head.deadline:
            return head, taken, given_up
        if not given_up and (fewer := _with_the_patient_left(head, ahead, costs, start, rows)):
            return head, fewer, given_up
        own = min(head.rows - head.taken, room)
        held -= head.rows - head.taken
        if alone is None and start + costs.of_rows(rows + own) <= head.deadline:
            alone = (len(given_up), own)
        given_up.append(head)
    if alone is None:
        return None, 0, given_up
    # What follows has more rows than can be in time; who is in time without them need not wait.
    at, own = alone
    return given_up[at], own, given_up[:at]


def is_patient(deadline: float, costs: LaneCosts, start: float) -> bool:
    """Whether rows of this deadline may be left behind by a batch that begins then."""
    return start + (1.0 + _PATIENCE) * costs.estimates[-1] <= deadline


def _with_the_patient_left(
    head: Ticket, others: Iterable[Ticket], costs: LaneCosts, start: float, rows: int
) -> int:
    """How many rows may run so that the head is in time, if all that are left can wait; or 0."""
    fewer = _most(costs, head.deadline - start) - rows
    left = fewer - (head.rows - head.taken)
    if left < 0:
        return 0
    for ticket in others:
        left -= ticket.rows - ticket.taken
        if left < 0:
            return fewer if is_patient(ticket.deadline, costs, start) else 0
    return 0


def _most(costs: LaneCosts, seconds: float) -> int:
    """The largest size that takes so long at most; 0 if none does."""
    place = bisect_right(costs.estimates, seconds)
    return costs.ladder.sizes[place - 1] if place else 0


def batch_down(lane: LaneView, window: Window, start: float) -> Window:
    """Fewer rows, where filling a smaller size is cheaper a row than padding to the next larger.

    Only if the rows left behind can still be in time after this batch. The rule of TensorFlow's
    batch padding policies.
    """
    costs = lane.costs
    place = costs.ladder.places[window.rows]
    if lane.retry_rows or not fills_less(
        costs, place, window.rows, window.expected_s, window.deadline, start
    ):
        return window
    rows = costs.ladder.sizes[place - 1]
    return window._replace(rows=rows, expected_s=costs.estimates[place - 1])


def usual_of(lane: LaneView, start: float, limit: float) -> tuple[float, float, int, float] | None:
    """What `batch_down` makes of `window_of`, for a third of their time, in the usual case.

    Returns:
        deadline, seconds, rows and protected deadline of the window; None where it takes more: for
        a retry, for best-effort rows alone, and where rows must be given up.
    """
    rows = lane.rows
    if not rows or lane.retry_rows:
        return None
    costs = lane.costs
    ladder, estimates = costs.ladder, costs.estimates
    if rows > ladder.largest:
        rows = ladder.largest
    place = ladder.places[rows]
    expected_s = estimates[place]
    deadline, protected = lane.heads(limit)
    if start + expected_s > deadline:
        return None
    if ladder.sizes[place] != rows and fills_less(costs, place, rows, expected_s, deadline, start):
        return deadline, estimates[place - 1], ladder.sizes[place - 1], protected
    return deadline, expected_s, rows, protected


def fills_less(
    costs: LaneCosts, place: int, rows: int, expected_s: float, deadline: float, start: float
) -> bool:
    """Whether so many rows, which this place of the ladder holds, had better fill the one below."""
    sizes = costs.ladder.sizes
    if place == 0 or sizes[place] == rows:
        return False
    down = sizes[place - 1]
    cost = costs.estimates[place - 1]
    if cost * rows >= expected_s * down:
        return False
    # The first deadline bounds those of the rows that would be left behind.
    return start + cost + costs.of_rows(rows - down) <= deadline
