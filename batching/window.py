"""How many rows of a lane run now, and which tickets at its head are not worth waiting for.

Rows that cannot be in time together with a large batch are given up, not the size of the batch: at
overload every batch that is shrunk to save its head leaves more rows behind that are late. The
window slides: drop the head until the batch that the rest makes is in time for its own head. From
Nexus (SOSP 2019), section 6.3 ("early drop").

Does not know other lanes, shares, or whether this lane will be picked at all.
"""

from __future__ import annotations

from math import inf
from typing import NamedTuple

from batching.policy import LaneView
from batching.values import Ticket

__all__ = ["Window", "batch_down", "window_of"]


class Window(NamedTuple):
    """What a lane would run.

    Attributes:
        deadline: the first deadline among what is kept, `inf` where there is none.
        expected_s: device seconds of it.
        rows: how many rows; 0 where nothing can be in time.
        hopeless: tickets that cannot be in time, whatever else happens.
        dropped: tickets to give up if this runs.
    """

    deadline: float
    expected_s: float
    rows: int
    hopeless: tuple[Ticket, ...] = ()
    dropped: tuple[Ticket, ...] = ()


def window_of(lane: LaneView, start: float) -> Window:
    """What a lane would run if the device began with it at ``start``.

    A group that is to be retried runs as it stands, whatever its deadlines: its rows were in time
    when they first ran.
    """
    costs = lane.costs
    group = lane.retry if lane.retry_rows else None
    if group is not None:
        rows = sum([stop - begin for _, begin, stop in group])
        return Window(min(ticket.deadline for ticket, _, _ in group), costs.of_rows(rows), rows)
    ladder = costs.ladder
    rows = lane.rows
    if rows > ladder.largest:
        rows = ladder.largest
    expected_s = costs.estimates[ladder.places[rows]]
    first = lane.first()
    assert first is not None, "a lane without rows was asked what it would run"
    if start + expected_s <= first.deadline:  # the usual case
        return Window(first.deadline, expected_s, rows)
    return _slide(lane, start)


def _slide(lane: LaneView, start: float) -> Window:
    costs, largest = lane.costs, lane.costs.ladder.largest
    soonest = start + costs.estimates[0]
    hopeless: list[Ticket] = []
    dropped: list[Ticket] = []
    left = lane.rows
    for ticket in lane.tickets():
        rows = min(left, largest)
        expected_s = costs.of_rows(rows)
        if start + expected_s <= ticket.deadline:
            return Window(ticket.deadline, expected_s, rows, tuple(hopeless), tuple(dropped))
        (hopeless if ticket.deadline < soonest else dropped).append(ticket)
        left -= ticket.rows - ticket.taken
    # Not even the last is in time by itself, so none is: each of them has more rows than can be in
    # time at once, and is late as a whole if its last row is.
    return Window(inf, 0.0, 0, (*hopeless, *dropped))


def batch_down(lane: LaneView, window: Window, start: float) -> Window:
    """Fewer rows, where filling a smaller size is cheaper a row than padding to the next larger.

    Only if the rows left behind can still be in time after this batch. The rule of TensorFlow's
    batch padding policies.
    """
    costs = lane.costs
    sizes = costs.ladder.sizes
    place = costs.ladder.places[window.rows]
    if place == 0 or sizes[place] == window.rows or lane.retry_rows:
        return window
    down = sizes[place - 1]
    cost = costs.estimates[place - 1]
    if cost * window.rows >= window.expected_s * down:
        return window
    # The lane's first deadline bounds those of the rows that would be left behind.
    if start + cost + costs.of_rows(window.rows - down) > window.deadline:
        return window
    return window._replace(rows=down, expected_s=cost)
