"""A lane as one would write it down: plain lists, looked through from end to end at every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from batching import Ladder, Part, Ticket
from batching.allowance import BEST_EFFORT

__all__ = ["Fate", "Group", "Row", "cut_to"]


@dataclass(eq=False)
class Fate:
    """What the model knows of a ticket."""

    ticket: Ticket
    poison: int | None
    left: int = 0  # rows that left the line
    back: list[int] = field(default_factory=list)  # rows that came back, in order of arrival
    ended: bool = False

    @property
    def rank(self) -> tuple[int, float, int]:
        return (-self.ticket.priority, self.ticket.deadline, self.ticket.id)


@dataclass(eq=False)
class Group:
    """Parts to be tried again together, and how often the first batch they were in was cut."""

    parts: list[Part]
    cuts: int
    origin: int  # parts of that first batch


@dataclass(eq=False)
class Row:
    """A lane of the model."""

    ladder: Ladder
    rows_max: int
    bytes_max: int
    line: list[Fate] = field(default_factory=list)
    retries: list[Group] = field(default_factory=list)
    draining: bool = False
    passed_over: int = 0  # turns of other lanes since this one had rows and no turn

    @property
    def rows(self) -> int:
        return sum(fate.ticket.rows - fate.left for fate in self.line if not fate.ended)

    @property
    def nbytes(self) -> int:
        return sum(fate.ticket.nbytes for fate in self.line if not fate.ended)

    def next_batch(self, live: Callable[[Ticket], bool]) -> Group:
        """What the next batch of this lane must hold; takes it out of the model."""
        while self.retries:
            group = self.retries.pop(0)
            group.parts = [part for part in group.parts if live(part[0])]
            if group.parts:
                return group
        waiting = sorted((fate for fate in self.line if not fate.ended), key=lambda f: f.rank)
        paying = [fate for fate in waiting if fate.ticket.priority > BEST_EFFORT]
        spare = waiting[len(paying) :]
        parts = taken(paying, self.ladder.largest)
        rows = sum(stop - start for _, start, stop in parts)
        # Padding is made of best-effort rows, which make up a batch only where no others wait.
        bucket = min(size for size in self.ladder.sizes if size >= rows)
        parts += taken(spare, bucket - rows if rows else self.ladder.largest)
        self.line = [fate for fate in waiting if fate.left < fate.ticket.rows]
        return Group(parts, 0, len(parts))

    def room_for(self, ticket: Ticket) -> list[Fate] | None:
        """Who has to make room for a ticket; None where that would not do."""
        rows = self.rows + ticket.rows - self.rows_max
        nbytes = self.nbytes + ticket.nbytes - self.bytes_max
        less = [
            fate
            for fate in self.line
            if not fate.ended and not fate.left and fate.ticket.priority < ticket.priority
        ]
        evicted: list[Fate] = []
        for fate in sorted(less, key=lambda fate: fate.rank, reverse=True):
            if rows <= 0 and nbytes <= 0:
                break
            rows -= fate.ticket.rows
            nbytes -= fate.ticket.nbytes
            evicted.append(fate)
        return evicted if rows <= 0 and nbytes <= 0 else None


def taken(fates: list[Fate], room: int) -> list[Part]:
    """The parts of the next so many rows; they leave the line."""
    parts: list[Part] = []
    for fate in fates:
        stop = min(fate.ticket.rows, fate.left + room)
        if stop > fate.left:
            parts.append((fate.ticket, fate.left, stop))
            room -= stop - fate.left
            fate.left = stop
    return parts


def cut_to(parts: list[Part], largest: int) -> list[list[Part]]:
    """Row by row into groups of at most so many rows, neighbours put together again."""
    every = [(ticket, row) for ticket, start, stop in parts for row in range(start, stop)]
    groups = []
    for first in range(0, len(every), largest):
        group: list[Part] = []
        for ticket, row in every[first : first + largest]:
            if group and group[-1][0] is ticket and group[-1][2] == row:
                group[-1] = (ticket, group[-1][1], row + 1)
            else:
                group.append((ticket, row, row + 1))
        groups.append(group)
    return groups
