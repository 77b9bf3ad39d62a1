"""Which rows run and which are given up for them: early drop, and filling a size before padding."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batching import Ladder, LaneKey, Ticket
from batching.costs import LaneCosts
from batching.deadlines import Deadlines
from batching.lane import Lane
from batching.shares import Shares
from batching.window import batch_down, window_of

KEY = LaneKey("a")
SIZES = (1, 2, 4, 8)
START = 100.0
#: Seconds by batch size: a batch costs 4, and one more a row.
COSTS = {size: 4.0 + size for size in SIZES}


def lane_of(*tickets: tuple[float, int], costs: Mapping[int, float] = COSTS) -> Lane:
    """A lane with tickets of so many rows whose deadlines are so many seconds after `START`."""
    lane_costs = LaneCosts(Ladder(SIZES), costs)
    lane = Lane(KEY, lane_costs, 1000, 1000, Deadlines(), Shares(1.0))
    for number, (left, rows) in enumerate(tickets, 1):
        lane.admit(Ticket(KEY, rows, 0, START + left, number), number, 1)
    return lane


def test_what_is_in_time_runs_whole() -> None:
    window = window_of(lane_of((12.0, 3), (12.0, 5)), START)
    assert (window.rows, window.expected_s, window.deadline) == (8, 12.0, START + 12)
    assert not window.hopeless
    assert not window.dropped


def test_the_head_is_dropped_rather_than_the_batch_shrunk() -> None:
    window = window_of(lane_of((7.0, 1), *[(20.0, 1)] * 8), START)
    assert [ticket.payload for ticket in window.dropped] == [1]
    assert (window.rows, window.deadline) == (8, START + 20)


def test_a_head_that_is_late_even_alone_is_hopeless() -> None:
    window = window_of(lane_of((4.9, 1), (20.0, 1)), START)
    assert [ticket.payload for ticket in window.hopeless] == [1]
    assert (window.rows, window.dropped) == (1, ())


def test_where_nothing_can_be_in_time_all_are_hopeless() -> None:
    window = window_of(lane_of((1.0, 1), (2.0, 1), (5.5, 8)), START)
    assert window.rows == 0
    assert [ticket.payload for ticket in window.hopeless] == [1, 2, 3]


def test_rows_without_a_deadline_are_always_in_time() -> None:
    window = window_of(lane_of((inf, 5)), START)
    assert (window.rows, window.deadline) == (5, inf)


@given(st.lists(st.tuples(st.floats(0.0, 30.0), st.integers(1, 3)), min_size=1, max_size=12))
def test_nothing_is_dropped_that_a_smaller_drop_would_save(
    tickets: list[tuple[float, int]],
) -> None:
    """The window is the first, from the head on, whose own head is in time."""
    lane = lane_of(*tickets)
    window = window_of(lane, START)
    order = list(lane.tickets())
    given_up = len(window.hopeless) + len(window.dropped)

    def in_time(drop: int) -> bool:
        rows = min(sum(ticket.rows for ticket in order[drop:]), SIZES[-1])
        return START + lane.costs.of_rows(rows) <= order[drop].deadline

    firsts = [drop for drop in range(len(order)) if in_time(drop)]
    if window.rows:
        assert given_up == firsts[0]
        assert {*window.hopeless, *window.dropped} == {*order[:given_up]}
    else:
        assert firsts == []
        assert given_up == len(order)


@pytest.mark.parametrize(
    ("rows", "costs", "expected"),
    [
        (5, {1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0}, 4),  # a full four costs 1 a row, padded five 1.6
        (7, {1: 1.0, 2: 2.0, 4: 4.0, 8: 5.0}, 7),  # padding is cheaper a row
        (8, {1: 1.0, 2: 2.0, 4: 4.0, 8: 9.0}, 8),  # nothing to pad
        (3, {1: 9.0, 2: 9.0, 4: 9.0, 8: 9.0}, 3),  # all sizes cost the same
    ],
)
def test_a_smaller_size_is_filled_where_that_is_cheaper_a_row(
    rows: int, costs: dict[int, float], expected: int
) -> None:
    lane = lane_of((inf, rows), costs=costs)
    assert batch_down(lane, window_of(lane, START), START).rows == expected


def test_rows_are_not_left_behind_if_that_makes_them_late() -> None:
    lane = lane_of((8.0, 5), costs={1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0})
    window = window_of(lane, START)
    assert batch_down(lane, window, START).rows == 4
    late = window._replace(deadline=START + 4.5)
    assert batch_down(lane, late, START).rows == 5
