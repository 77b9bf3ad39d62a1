"""Rows of failed batches that wait for another try, in the groups in which they are to be tried.

They were admitted once, wait ahead of every line, and are at most what was in flight. A ticket that
ends meanwhile is skipped when its group's turn comes. Does not know why a batch failed, nor how it
is cut.
"""

from __future__ import annotations

from collections import deque
from itertools import chain
from typing import Final

from batching.deadlines import Deadlines
from batching.values import Part, Ticket, TicketState

__all__ = ["Retries"]

#: Reading a member off an enum class costs more than all else in the loops below.
_WAITING: Final = TicketState.WAITING
_RUNNING: Final = TicketState.RUNNING


class Retries:
    """The groups of one lane. Only its lane changes it.

    Args:
        deadlines: the batcher's index, which is kept true for these tickets.

    Attributes:
        rows: that wait in all groups, of tickets that have not ended.
    """

    __slots__ = ("_deadlines", "_groups", "rows")

    def __init__(self, deadlines: Deadlines) -> None:
        self._deadlines: Final = deadlines
        self._groups: Final[deque[list[Part]]] = deque()
        self.rows = 0

    @property
    def first(self) -> list[Part] | None:
        """The group that must be the lane's next batch."""
        while self.rows:
            # Only tickets that ended meanwhile are not waiting; their rows are counted no more.
            parts = [part for part in self._groups[0] if part[0].state is _WAITING]
            if parts:
                return parts
            self._groups.popleft()
        return None

    def take(self) -> list[Part]:
        """That group; its rows wait no more. Call it only while there are rows."""
        parts = self.first
        assert parts is not None, "rows wait for a retry, but no group has them"
        self._groups.popleft()
        for ticket, start, stop in parts:
            self.rows -= stop - start
            ticket.retrying -= stop - start
            if not ticket.retrying and ticket.taken == ticket.rows:
                ticket.state = _RUNNING
                self._deadlines.remove(ticket)
        return parts

    def put(self, parts: list[Part], largest: int) -> None:
        """Let these parts of a failed batch wait again, as one batch if they fit into one.

        Args:
            parts: that are to be tried again together.
            largest: the most rows of a batch, which may be fewer than when these ran.
        """
        for ticket, start, stop in parts:
            if ticket.state is _RUNNING:
                ticket.state = _WAITING
                self._deadlines.add(ticket)
            ticket.retrying += stop - start
            self.rows += stop - start
        self._groups.extend(_fitting(parts, largest))

    def refit(self, largest: int) -> None:
        """A batch has at most so many rows from now on."""
        groups = [_fitting(group, largest) for group in self._groups]
        self._groups.clear()
        self._groups.extend(chain.from_iterable(groups))

    def forget(self, ticket: Ticket) -> None:
        """This ticket ends; its rows here, if any, wait no more."""
        if ticket.retrying:
            self.rows -= ticket.retrying
            if not self.rows:
                self._groups.clear()

    def check_invariants(self) -> None:
        """Hold the groups against themselves. O(n); for tests and simulation."""
        retrying: dict[int, int] = {}
        for ticket, start, stop in (part for group in self._groups for part in group):
            if ticket.state is _WAITING:
                retrying[ticket.id] = retrying.get(ticket.id, 0) + stop - start
        assert self.rows == sum(retrying.values())


def _fitting(parts: list[Part], largest: int) -> list[list[Part]]:
    """The parts in as few groups as there must be so that none has more rows than `largest`."""
    groups: list[list[Part]] = [[]]
    room = largest
    for ticket, start, stop in parts:
        while start < stop:
            if not room:
                groups.append([])
                room = largest
            upto = min(stop, start + room)
            groups[-1].append((ticket, start, upto))
            room -= upto - start
            start = upto
    return groups
