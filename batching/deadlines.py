"""Which waiting ticket's deadline comes first.

One index serves all lanes of a batcher, so that neither a poll nor the next wake-up looks at every
lane. It is a heap whose stale entries are left in place and skipped later. Entries hold numbers,
not tickets, so an ended ticket's payload is not kept alive by them, and the heap is rebuilt when
stale entries outnumber the live, so a long deadline on top does not let it grow without bound.

It does not know lanes, rows or effects.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from math import inf
from typing import Final

from batching.values import Ticket, TicketState

__all__ = ["Deadlines"]

#: Stale entries the heap may hold beyond one for each live ticket before it is rebuilt.
STALE_MAX: Final = 64


class Deadlines:
    """The tickets that have rows waiting, by deadline. All operations are O(log n) amortised."""

    __slots__ = ("_heap", "_waiting")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []
        self._waiting: dict[int, Ticket] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, ticket: Ticket) -> None:
        """The ticket has rows that wait. It may have been here before."""
        waiting = self._waiting
        waiting[ticket.id] = ticket
        if ticket.deadline != inf:
            heap = self._heap
            if len(heap) > 2 * len(waiting) + STALE_MAX:
                heap[:] = {entry for entry in heap if entry[1] in waiting}
                heapify(heap)
            heappush(heap, (ticket.deadline, ticket.id))

    def remove(self, ticket: Ticket) -> None:
        """No row of the ticket waits any more."""
        del self._waiting[ticket.id]

    def due(self, now: float) -> list[Ticket]:
        """The tickets whose deadline has come, earliest first. The caller must remove each."""
        heap, waiting = self._heap, self._waiting
        if not heap or heap[0][0] > now:
            return []
        due: dict[int, Ticket] = {}  # a ticket that waits again has two entries: report it once
        while heap and heap[0][0] <= now:
            number = heappop(heap)[1]
            if number in waiting:
                due[number] = waiting[number]
        return list(due.values())

    def earliest(self) -> float | None:
        """The first deadline of a ticket that waits, or None."""
        heap, waiting = self._heap, self._waiting
        while heap:
            deadline, number = heap[0]
            if number in waiting:
                return deadline
            heappop(heap)
        return None

    def tickets(self) -> list[Ticket]:
        """Every ticket that waits, in no order."""
        return list(self._waiting.values())

    def check_invariants(self) -> None:
        """Hold the index against itself. O(n log n); for tests and simulation."""
        entries = set(self._heap)
        for number, ticket in self._waiting.items():
            assert ticket.id == number, f"{ticket} filed under {number}"
            assert ticket.state is TicketState.WAITING, f"{ticket} does not wait"
            assert ticket.deadline == inf or (ticket.deadline, number) in entries, ticket
