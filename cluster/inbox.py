"""Events that wait for the end of a turn of the loop, so that those of one turn are taken together.

The controller compares everything with everything for each event that it takes; at a start with
hundreds of servables, hundreds of events come within a moment. Keeps them in order; knows neither
what they say nor what follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cluster.signals import Event

__all__ = ["Inbox"]


class Inbox:
    """Collects events and hands them on.

    Args:
        later: calls something once, soon, and not now.
        take: given everything that has come, in order; never nothing.
    """

    def __init__(
        self, later: Callable[[Callable[[], None]], object], take: Callable[[Sequence[Event]], None]
    ) -> None:
        self._later = later
        self._take = take
        self._events: list[Event] = []

    def put(self, event: Event) -> None:
        """Hand an event on in a moment, with others that come until then."""
        if not self._events:
            self._later(self._deliver)
        self._events.append(event)

    def put_now(self, event: Event) -> None:
        """Hand an event on by itself, after those that came before; raises what its taker does."""
        self._deliver()
        self._take((event,))

    def _deliver(self) -> None:
        events, self._events = self._events, []
        if events:
            self._take(events)
