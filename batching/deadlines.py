"""Which waiting ticket's deadline comes first.

One index serves all lanes of a batcher, so that neither a poll nor the next wake-up looks at every
lane. It is a heap whose stale entries are left in place and skipped later. Tickets that came
together have one entry: most leave together, too, long before any of their deadlines. Entries hold
numbers, not tickets, so an ended ticket's payload is not kept alive by them, and the heap is
rebuilt when stale entries outnumber the live, so a long deadline on top does not let it grow
without bound.

It does not know lanes, rows or effects.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush
from math import inf
from operator import attrgetter
from typing import Final, TypeAlias

from batching.values import Ticket, TicketState

__all__ = ["Deadlines"]

#: Stale entries the heap may hold beyond one for each live ticket before it is rebuilt.
STALE_MAX: Final = 64

#: The earliest deadline of some tickets, the number of the ticket whose it is, and the first and
#: the last of their numbers.
_Entry: TypeAlias = tuple[float, int, int, int]

_urgency: Final = attrgetter("deadline", "id")


class Deadlines:
    """The tickets that have rows waiting, by deadline. All operations are O(log n) amortised."""

    __slots__ = ("_heap", "_waiting")

    def __init__(self) -> None:
        self._heap: list[_Entry] = []
        self._waiting: dict[int, Ticket] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, ticket: Ticket) -> None:
        """The ticket has rows that wait. It may have been here before."""
        number = ticket.id
        self._waiting[number] = ticket
        self._push((ticket.deadline, number, number, number))

    def add_all(self, tickets: Sequence[Ticket]) -> None:
        """The same for tickets that are new, with numbers that follow one another."""
        waiting = self._waiting
        soonest = tickets[0]
        for ticket in tickets:
            waiting[ticket.id] = ticket
            if ticket.deadline < soonest.deadline:
                soonest = ticket
        self._push((soonest.deadline, soonest.id, tickets[0].id, tickets[-1].id))

    def remove(self, ticket: Ticket) -> None:
        """No row of the ticket waits any more."""
        del self._waiting[ticket.id]

    def remove_all(self, numbers: Iterable[int]) -> None:
        """No row of the tickets of these numbers waits any more."""
        waiting = self._waiting
        for number in numbers:
            del waiting[number]

    def due(self, now: float) -> list[Ticket]:
        """The tickets whose deadline has come, earliest first. The caller must remove each."""
        heap = self._heap
        if not heap or heap[0][0] > now:
            return []
        due: dict[int, Ticket] = {}  # a ticket that waits again has two entries: report it once
        while heap and heap[0][0] <= now:
            for ticket in self._live(heappop(heap)):
                if ticket.deadline <= now:
                    due[ticket.id] = ticket
                else:
                    # Each has an entry of its own from here on: this happens once to a group.
                    heappush(heap, (ticket.deadline, ticket.id, ticket.id, ticket.id))
        return sorted(due.values(), key=_urgency)

    def earliest(self) -> float | None:
        """The first deadline of a ticket that waits, or None."""
        heap, waiting = self._heap, self._waiting
        while heap:
            entry = heap[0]
            if entry[1] in waiting:
                return entry[0]
            heappop(heap)
            if entry[2] != entry[3] and (live := self._live(entry)):
                soonest = min(live, key=_urgency)
                heappush(heap, (soonest.deadline, soonest.id, *entry[2:]))
        return None

    def tickets(self) -> list[Ticket]:
        """Every ticket that waits, in no order."""
        return list(self._waiting.values())

    def _push(self, entry: _Entry) -> None:
        if entry[0] == inf:
            return
        heap = self._heap
        if len(heap) > 2 * len(self._waiting) + STALE_MAX:
            heap[:] = {old for old in heap if self._live(old)}
            heapify(heap)
        heappush(heap, entry)

    def _live(self, entry: _Entry) -> list[Ticket]:
        """The tickets of an entry that wait and have a deadline."""
        waiting = self._waiting
        numbers = range(entry[2], entry[3] + 1)
        return [waiting[n] for n in numbers if n in waiting and waiting[n].deadline != inf]

    def check_invariants(self) -> None:
        """Hold the index against itself. O(n log n); for tests and simulation."""
        first: dict[int, float] = {}
        for deadline, _, begin, end in self._heap:
            for number in range(begin, end + 1):
                first[number] = min(first.get(number, inf), deadline)
        for number, ticket in self._waiting.items():
            assert ticket.id == number, f"{ticket} filed under {number}"
            assert ticket.state is TicketState.WAITING, f"{ticket} does not wait"
            assert ticket.deadline == inf or first[number] <= ticket.deadline, ticket
