"""Which replica of a shard would be done first with a part of a look-up.

Of every actor it is learned how long a row takes there: the time to an answer over the rows that
this router had under way there when it asked. That holds whatever slows the actor down, other
routers' calls that wait in its line among it. A part would be done after what is under way and
itself, at that speed.

Predictions that are nearly the same are of replicas that are: they take turns, as the one that
answered a little quicker last would get everything otherwise. Who is not asked is not heard of: one
that has answered nothing for `FRESH_S` gets one part, whatever it was like. One that was so late
that another was asked in its place is the last choice until it answers anything, or `LATE_S` have
passed: its call is under way no longer, so that it would look idle.

Pure: time comes in. Does not know links, shards, or what is asked.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from typing import Final, Protocol, TypeVar

__all__ = ["FRESH_S", "LATE_S", "Pace", "Paced", "quickest"]

#: What was heard longer ago says nothing.
FRESH_S: Final = 1.0
#: A replica that was late and has answered nothing since is asked again after so long.
LATE_S: Final = 0.25
#: A part costs as much as so many rows, before it has any.
_PART_ROWS: Final = 32
#: What one answer weighs against all before.
_WEIGHT: Final = 0.125
#: Predictions that differ by less are the same.
_ALIKE: Final = 1.25
#: Predictions of who has not answered yet but owes something, and of who is late: the last ones.
_UNKNOWN_S: Final = 1e6
_LATEST_S: Final = 1e9


class Pace:
    """What one actor does, and how quickly.

    Attributes:
        owed: rows of parts that are under way, and `_PART_ROWS` for each part.
        row_s: what a row takes; 0 before anything was answered.
        heard_at: when something was.
        asked_at: when it was chosen last.
        late_until: it is the last choice until then.
    """

    __slots__ = ("asked_at", "heard_at", "late_until", "owed", "row_s")

    def __init__(self) -> None:
        self.owed = 0
        self.row_s = 0.0
        self.heard_at = self.asked_at = self.late_until = -inf

    def sent(self, rows: int) -> int:
        """A part of so many rows was sent; what is owed since, which `answered` wants back."""
        self.owed += rows + _PART_ROWS
        return self.owed

    def ended(self, rows: int) -> None:
        """A part of so many rows is under way no longer, answered or not."""
        self.owed -= rows + _PART_ROWS

    def answered(self, seconds: float, owed: int, now: float) -> None:
        """A part was answered.

        Args:
            seconds: after it was sent.
            owed: as `sent` said.
            now: this instant.
        """
        row_s = self.row_s
        self.row_s = row_s + _WEIGHT * (seconds / owed - row_s) if row_s else seconds / owed
        self.heard_at = now

    def outrun(self, seconds: float, owed: int, now: float) -> None:
        """Another has answered in its place, so long after it was asked: it takes at least that."""
        if seconds > owed * self.row_s:
            self.answered(seconds, owed, now)


class Paced(Protocol):
    """A replica that may be asked."""

    @property
    def pace(self) -> Pace:
        """What is known of it."""


_Paced = TypeVar("_Paced", bound=Paced)


def quickest(replicas: Iterable[_Paced], rows: int, now: float) -> _Paced | None:
    """The replica that would be done first with a part of so many rows; None if there are none."""
    best: _Paced | None = None
    best_s = asked_at = inf
    rows += _PART_ROWS
    for replica in replicas:
        pace = replica.pace
        if pace.late_until > now:
            needs_s = _LATEST_S + pace.late_until
        elif not pace.owed and now - pace.heard_at > FRESH_S:
            needs_s = 0.0
        elif pace.row_s:
            needs_s = (pace.owed + rows) * pace.row_s
        else:
            needs_s = _UNKNOWN_S + pace.owed
        if needs_s * _ALIKE < best_s or (needs_s <= best_s * _ALIKE and pace.asked_at < asked_at):
            best, best_s, asked_at = replica, needs_s, pace.asked_at
    if best is not None:
        best.pace.asked_at = now
    return best
