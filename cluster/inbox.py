"""Events that wait for the end of a turn of the loop, so that those of one turn are taken together.

The controller compares everything with everything when it takes events, and may publish an epoch,
which every router reads; at a start with hundreds of servables, events come for many seconds, one
after another. So taking them has a share of the time, with something saved for when little went
on: a change by itself is taken at once, of very many those that come within a moment are taken
together. The loss of an actor never waits, since requests fail until routers know.

Keeps events in order; knows neither what they say nor what follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from cluster.signals import ActorLost, Event

__all__ = ["Inbox"]

#: Of the time, what taking events may use in the long run, in seconds a second. Where few versions
#: may load at once, the next begins only when the end of one was taken: less holds up the loads.
_SHARE: Final = 0.25
#: How many seconds it may use ahead of that.
_SAVED_S_MAX: Final = 0.25


class Inbox:
    """Collects events and hands them on.

    Args:
        later: calls something once, after so many seconds; for 0 soon, and not now.
        take: given everything that has come, in order; never nothing.
        clock: seconds.
    """

    def __init__(
        self,
        later: Callable[[float, Callable[[], None]], object],
        take: Callable[[Sequence[Event]], None],
        clock: Callable[[], float],
    ) -> None:
        self._later = later
        self._take = take
        self._clock = clock
        self._events: list[Event] = []
        self._saved_s = _SAVED_S_MAX
        self._counted_at = clock()

    def put(self, event: Event) -> None:
        """Hand an event on in a moment, with others that come until then."""
        is_first = not self._events
        self._events.append(event)
        if isinstance(event, ActorLost):
            self._later(0.0, self._deliver)
        elif is_first:
            self._later(self._rest_s(), self._deliver)

    def put_now(self, event: Event) -> None:
        """Hand an event on by itself, after those that came before; raises what its taker does."""
        self._deliver()
        self._hand_on((event,))

    def _deliver(self) -> None:
        events, self._events = self._events, []
        if events:
            self._hand_on(events)

    def _hand_on(self, events: Sequence[Event]) -> None:
        began = self._clock()
        try:
            self._take(events)
        finally:
            self._saved_s -= self._clock() - began

    def _rest_s(self) -> float:
        """How long what comes now waits for more."""
        now = self._clock()
        earned_s = (now - self._counted_at) * _SHARE
        self._counted_at = now
        self._saved_s = min(self._saved_s + earned_s, _SAVED_S_MAX)
        return max(0.0, -self._saved_s / _SHARE)
