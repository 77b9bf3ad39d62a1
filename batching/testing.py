"""Help for those who test against the batching core: a clock that obeys, tickets that check.

Shipped with the package, so that the tests of device actors and the simulation use the same means.
Hypothesis is needed by the strategies alone, and is imported when one is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING

from batching.buckets import Ladder
from batching.values import TRANSITIONS, LaneKey, Ticket, TicketState

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = [
    "CheckedTicket",
    "FakeClock",
    "IllegalTransition",
    "ladders",
    "lane_keys",
    "tickets",
]

_LEGAL = frozenset((before, after) for (before, _), after in TRANSITIONS.items())


class FakeClock:
    """A monotonic clock that stands still until told otherwise. Call it for the instant."""

    def __init__(self, now: float = 0.0) -> None:
        self._now = now

    def __call__(self) -> float:
        """This instant."""
        return self._now

    def advance(self, seconds: float) -> float:
        """Let time pass.

        Returns:
            The new instant.
        """
        assert seconds >= 0, "a monotonic clock does not go back"
        self._now += seconds
        return self._now

    def advance_to(self, instant: float) -> float:
        """Let time pass until `instant`; one that has passed already changes nothing.

        Returns:
            The new instant.
        """
        self._now = max(self._now, instant)
        return self._now


class IllegalTransition(AssertionError):
    """A ticket went from a state to one that `TRANSITIONS` does not allow."""


class CheckedTicket(Ticket):
    """A ticket that holds every change of its state against `TRANSITIONS`.

    Attributes:
        story: its states so far.
    """

    __slots__ = ("story",)

    story: list[TicketState]

    @property
    def state(self) -> TicketState:
        """Where the ticket is in its life: the last state of the story."""
        return self.story[-1]

    @state.setter
    def state(self, state: TicketState) -> None:
        story = getattr(self, "story", [])
        if story and (story[-1], state) not in _LEGAL:
            raise IllegalTransition(" -> ".join([*story, state]))
        self.story = [*story, state]


def ladders(largest: int = 32) -> SearchStrategy[Ladder]:
    """Ladders of one to five buckets up to `largest`."""
    from hypothesis import strategies as st

    sizes = st.sets(st.integers(1, largest), min_size=1, max_size=5)
    return sizes.map(lambda chosen: Ladder(sorted(chosen)))


def lane_keys(units: Sequence[str] = ("trunk", "head", "ranker")) -> SearchStrategy[LaneKey]:
    """Lanes of these units, with none, one or two length symbols."""
    from hypothesis import strategies as st

    shape = st.lists(st.sampled_from((16, 32, 64)), max_size=2).map(tuple)
    return st.builds(LaneKey, st.sampled_from(units), shape)


def tickets(
    lane: LaneKey, now: float = 0.0, rows_max: int = 16, ttl_max: int = 8
) -> SearchStrategy[CheckedTicket]:
    """New tickets for a lane, whose deadlines are whole seconds after `now`, or never."""
    from hypothesis import strategies as st

    ttl = st.one_of(st.integers(1, ttl_max).map(float), st.just(inf))
    return st.builds(
        CheckedTicket,
        lane=st.just(lane),
        rows=st.integers(1, rows_max),
        nbytes=st.integers(0, 64),
        deadline=ttl.map(lambda seconds: now + seconds),
    )
