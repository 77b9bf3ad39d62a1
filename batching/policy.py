"""Which lane gets the next batch.

A policy is asked when the device has a free credit and some lane has rows. It sees lanes as they
are at that instant, and it may keep a state of its own. It must not assume that a unit is a whole
model, nor that a batch ends a request: both are untrue for parts of a graph and for recurrent
cells.

A policy does not form the batch, move time or touch a ticket.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from batching.buckets import Ladder
from batching.values import LaneKey, Ticket

__all__ = ["LaneView", "Policy", "RoundRobin"]


class LaneView(Protocol):
    """What a policy may know of a lane. It is live: read it during `Policy.pick` only."""

    @property
    def key(self) -> LaneKey:
        """The lane's name."""

    @property
    def ladder(self) -> Ladder:
        """The batch sizes its unit is compiled for."""

    @property
    def waiting(self) -> int:
        """Rows that the next batches may take; positive for every lane that is shown."""

    @property
    def in_flight(self) -> int:
        """Batches of this lane on the device."""

    @property
    def pace_s(self) -> float | None:
        """Moving mean of device seconds per row, or None before the first batch ended."""

    def tickets(self) -> Iterator[Ticket]:
        """The tickets in line, first in, first out."""


class Policy(Protocol):
    """The choice of the next lane."""

    def added(self, key: LaneKey) -> None:
        """This lane exists from now on."""

    def removed(self, key: LaneKey) -> None:
        """This lane exists no more."""

    def pick(self, now: float, lanes: Mapping[LaneKey, LaneView]) -> LaneKey | None:
        """The lane that runs next, or None to leave the credit unused.

        Args:
            now: this instant.
            lanes: every lane with rows that wait; never empty, in no order that counts.
        """


class RoundRobin:
    """The lane that has gone longest without a turn; a new lane comes first.

    With k lanes, a lane with rows waits at most k - 1 turns. A pick costs O(lanes with rows).
    """

    __slots__ = ("_last_turn", "_turn")

    def __init__(self) -> None:
        self._turn = 0
        self._last_turn: dict[LaneKey, int] = {}

    def added(self, key: LaneKey) -> None:
        """See `Policy.added`."""
        self._last_turn[key] = 0

    def removed(self, key: LaneKey) -> None:
        """See `Policy.removed`."""
        del self._last_turn[key]

    def pick(self, now: float, lanes: Mapping[LaneKey, LaneView]) -> LaneKey:
        """See `Policy.pick`."""
        self._turn += 1
        key = min(lanes, key=self._last_turn.__getitem__)
        self._last_turn[key] = self._turn
        return key
