"""Which lane gets the next batch, of how many rows, and whose rows are given up for it.

A policy is asked when the device has a free credit and some lane has rows. It sees the device as it
is at that instant, and it may keep a state of its own. It must not assume that a unit is a whole
model, nor that a batch ends a request: both are untrue for parts of a graph and for recurrent
cells.

A policy does not form the batch, move time or touch a ticket. What the policies of this project
are, see `batching.effsafe` and `batching.baselines`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from batching.allowance import SHEDDABLE
from batching.costs import LaneCosts
from batching.shares import Shares
from batching.values import Batch, LaneKey, Part, Ticket

__all__ = ["LaneView", "Pick", "Policy", "Situation", "runs_at_once"]


class LaneView(Protocol):
    """What a policy may know of a lane. It is live: read it during `Policy.pick` only."""

    @property
    def key(self) -> LaneKey:
        """The lane's name."""

    @property
    def costs(self) -> LaneCosts:
        """What its batches are expected to take, and of which sizes they may be."""

    @property
    def rows(self) -> int:
        """Rows in line, but for best-effort ones."""

    @property
    def spare_rows(self) -> int:
        """Best-effort rows in line."""

    @property
    def retry_rows(self) -> int:
        """Rows ahead of the line that are to be retried, in groups."""

    @property
    def retry(self) -> Sequence[Part] | None:
        """The group that must be the lane's next batch, if one is to be retried."""

    @property
    def in_flight(self) -> int:
        """Batches of this lane on the device."""

    def tickets(self) -> Iterator[Ticket]:
        """The tickets in line, in the order in which their rows leave, best-effort ones last."""

    def first(self) -> Ticket | None:
        """The first of them."""

    def segments(self, limit: float | None = None) -> Iterator[tuple[bool, Iterator[Ticket]]]:
        """The same but for best-effort tickets, in runs inside which rows stand by deadline.

        Args:
            limit: what `Shares.limit` says at this instant, where many lanes are asked.

        Returns:
            for each run whether its owners are in share, and its tickets. Go through a run before
            the next is asked for.
        """

    def heads(self, limit: float | None = None, priority: int = SHEDDABLE) -> tuple[float, float]:
        """The earliest deadline in line, and that of owners in share; inf where there is none.

        Best-effort tickets are not counted.

        Args:
            limit: as for `segments`.
            priority: tickets of a lower one are not counted either.
        """

    def worth(self, rows: int) -> float:
        """The next so many rows, each counted by its owner's weight."""


@dataclass(slots=True)
class Situation:
    """The device at the instant of a pick.

    Attributes:
        now: this instant.
        free_at: when the device is expected to begin what is picked now; not before `now`.
        lanes: every lane with rows that wait; never empty, in no order that counts.
        shares: who is in share.
    """

    now: float
    free_at: float
    lanes: Mapping[LaneKey, LaneView]
    shares: Shares


@dataclass(slots=True)
class Pick:
    """What to do with the credit.

    Attributes:
        key: the lane that runs next; None to give rows up and ask again.
        rows: the most rows to take from its lines.
        hopeless: tickets to give up because they cannot be served in time.
        dropped: tickets to give up because serving them would make others late.
    """

    key: LaneKey | None
    rows: int = 0
    hopeless: Sequence[Ticket] = ()
    dropped: Sequence[Ticket] = ()


class Policy(Protocol):
    """The choice of the next batch."""

    def added(self, key: LaneKey) -> None:
        """This lane exists from now on."""

    def removed(self, key: LaneKey) -> None:
        """This lane exists no more."""

    def landed(self, batch: Batch, now: float) -> None:
        """A batch that it picked came back, whole or in error."""

    def pick(self, situation: Situation) -> Pick | None:
        """What runs next, or None to leave the credit unused.

        A pick without a lane must give up at least one ticket.
        """


def runs_at_once(policy: Policy) -> bool:
    """Whether a policy is known to run what comes to an idle device in one batch, at once.

    It says so by an attribute ``runs_at_once``; a policy that does not is always asked. One that
    derives from one that says so, and picks otherwise, must set it to False.
    """
    return getattr(policy, "runs_at_once", False) is True
