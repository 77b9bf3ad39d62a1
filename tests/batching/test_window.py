"""Which rows run and which are given up for them: early drop, and filling a size before padding."""

from __future__ import annotations

import itertools
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
#: The same by rows.
COSTS_OF = {rows: 4.0 + min(size for size in SIZES if size >= rows) for rows in (1, 2, 3)}


def mixed(*tickets: tuple[float, int, int, str], greedy: str = "") -> Lane:
    """As `lane_of`, with the criticality and the owner of each; one owner is out of share."""
    shares = Shares(1.0)
    lane = Lane(KEY, LaneCosts(Ladder(SIZES), COSTS), 1000, 1000, Deadlines(), shares, {})
    for number, (left, rows, priority, owner) in enumerate(tickets, 1):
        ticket = Ticket(KEY, rows, 0, START + left, number, owner, priority)
        lane.admit(ticket, number, 1)
    if greedy:
        shares.charge(greedy, 5.0)
    return lane


def lane_of(*tickets: tuple[float, int], costs: Mapping[int, float] = COSTS) -> Lane:
    """A lane with tickets of so many rows whose deadlines are so many seconds after `START`."""
    lane_costs = LaneCosts(Ladder(SIZES), costs)
    lane = Lane(KEY, lane_costs, 1000, 1000, Deadlines(), Shares(1.0), {})
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


def test_one_that_is_in_time_alone_runs_alone_where_what_follows_is_late_in_any_case() -> None:
    window = window_of(lane_of((5.0, 1), (6.5, 4), (6.5, 4)), START)
    assert (window.rows, window.deadline) == (1, START + 5)
    assert not window.hopeless
    assert not window.dropped


def test_a_critical_head_is_not_dropped_for_a_large_batch_of_others() -> None:
    lane = mixed((7.0, 1, 1, "m"), *[(20.0, 1, 0, "m")] * 8)
    window = window_of(lane, START)
    assert (window.rows, window.deadline, window.dropped) == (2, START + 7, ())


def test_an_owner_in_share_is_not_dropped_for_the_rows_of_one_that_is_not() -> None:
    lane = mixed((7.0, 1, 0, "modest"), *[(20.0, 1, 0, "greedy")] * 8, greedy="greedy")
    window = window_of(lane, START)
    assert (window.rows, window.dropped) == (2, ())
    assert window.protected == START + 7
    lane = mixed((20.0, 1, 0, "modest"), *[(9.0, 1, 0, "greedy")] * 8, greedy="greedy")
    window = window_of(lane, START)
    assert (window.deadline, window.protected) == (START + 9, START + 20)


def test_less_critical_rows_that_cannot_be_in_time_with_the_others_are_given_up() -> None:
    lane = mixed((20.0, 8, 0, "m"), (6.0, 1, -1, "m"))
    assert window_of(lane, START).rows == 8
    lane = mixed((20.0, 3, 0, "m"), (6.0, 1, -1, "m"))
    window = window_of(lane, START)
    assert [ticket.payload for ticket in window.dropped] == [2]
    assert window.rows == 3


@given(
    st.lists(
        st.tuples(
            st.floats(0.0, 30.0),
            st.integers(1, 3),
            st.sampled_from((-1, 0, 1)),
            st.sampled_from(("modest", "greedy")),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_nothing_of_a_lower_rank_costs_a_higher_one_its_deadline(
    tickets: list[tuple[float, int, int, str]],
) -> None:
    """What a rank keeps by itself it keeps in company, and what is kept is in time."""
    order = sorted(tickets, key=lambda each: (each[3] == "greedy", -each[2]))
    ranks = [list(run) for _, run in itertools.groupby(order, lambda each: (each[3], each[2]))]
    whole = window_of(mixed(*tickets, greedy="greedy"), START)
    assert START + whole.expected_s <= whole.deadline
    lane = mixed(*tickets, greedy="greedy")
    window = window_of(lane, START)
    given_up = {*window.hopeless, *window.dropped}
    kept = [ticket for ticket in lane.tickets() if ticket not in given_up]
    left = window.rows
    for ticket in kept:
        if left <= 0:
            break
        assert START + window.expected_s <= ticket.deadline
        left -= ticket.rows
    alone = window_of(mixed(*ranks[0], greedy="greedy"), START)
    first = {(ticket.deadline, ticket.rows) for ticket in (*alone.hopeless, *alone.dropped)}
    gone = {
        (ticket.deadline, ticket.rows)
        for ticket in given_up
        if (ticket.owner, ticket.priority) == (ranks[0][0][3], ranks[0][0][2])
    }
    assert gone == first


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
    alone = [ticket for ticket in order if START + COSTS_OF[ticket.rows] <= ticket.deadline]
    if firsts:
        assert given_up == firsts[0]
        assert {*window.hopeless, *window.dropped} == {*order[:given_up]}
    elif alone:
        assert given_up == order.index(alone[0])
        assert window.rows == alone[0].rows
    else:
        assert window.rows == 0
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
