from __future__ import annotations

from math import inf

from batching import LaneKey, Ticket, TicketState
from batching.deadlines import STALE_MAX, Deadlines

KEY = LaneKey("a")


def waiting(number: int, deadline: float) -> Ticket:
    ticket = Ticket(KEY, 1, 1, deadline)
    ticket.id, ticket.state = number, TicketState.WAITING
    return ticket


def test_tickets_fall_due_by_deadline_not_by_arrival() -> None:
    index = Deadlines()
    late, early, never = waiting(1, 9.0), waiting(2, 5.0), waiting(3, inf)
    for ticket in (late, early, never):
        index.add(ticket)
    assert index.earliest() == 5.0
    assert index.due(4.999) == []
    assert index.due(9.0) == [early, late]


def test_a_ticket_without_deadline_never_wakes_anyone() -> None:
    index = Deadlines()
    index.add(waiting(1, inf))
    assert index.earliest() is None
    assert index.due(inf) == []
    assert len(index) == 1


def test_a_removed_ticket_is_neither_due_nor_the_earliest() -> None:
    index = Deadlines()
    gone, here = waiting(1, 5.0), waiting(2, 6.0)
    index.add(gone)
    index.add(here)
    index.remove(gone)
    assert index.earliest() == 6.0
    assert index.due(7.0) == [here]


def test_a_ticket_that_waits_again_is_due_once() -> None:
    """Its first entry is still in the heap when the second is pushed."""
    index = Deadlines()
    ticket = waiting(1, 5.0)
    index.add(ticket)
    index.remove(ticket)
    index.add(ticket)
    assert index.due(5.0) == [ticket]


def test_stale_entries_stay_bounded_behind_a_long_wait() -> None:
    """One early ticket on top of the heap shields ten thousand that came and went behind it."""
    index = Deadlines()
    first = waiting(1, 5.0)
    index.add(first)
    for number in range(2, 10_000):
        ticket = waiting(number, 5.0 + number)
        index.add(ticket)
        assert len(index._heap) <= 2 * len(index) + STALE_MAX + 1
        index.remove(ticket)
        assert index.earliest() == 5.0
    index.check_invariants()


def test_rebuilding_the_heap_loses_no_live_ticket() -> None:
    index = Deadlines()
    for number in range(1, 2_000):
        ticket = waiting(number, float(-number % 97))
        index.add(ticket)
        if number % 10:
            index.remove(ticket)
    index.check_invariants()
    due = index.due(inf)
    assert sorted(ticket.id for ticket in due) == list(range(10, 2_000, 10))
    assert [ticket.deadline for ticket in due] == sorted(ticket.deadline for ticket in due)
