"""How soon an actor would begin with rows, as far as a router has been told.

A device's answers say how long rows of this servable that came now would wait for it, and what each
row more adds (`shards.wire.ReplyHeader`). Between two answers the router adds what it has sent
itself. A refusal says after what time a request like the refused one would be in time; until then
no other like it is, so it need not be asked.

News is of one unit, servable and criticality: rows of others may go before these or after them. It
is soon out of date, and nobody must be turned away for what is no longer so: what is older than
`FRESH_S` says nothing, an answer says that rows are taken again, and while requests are turned away
one goes through every `PROBE_S` and brings news. Does not know requests or links.
"""

from __future__ import annotations

from math import ceil, inf
from typing import Final, TypeAlias

__all__ = ["FRESH_S", "PROBE_S", "Busyness", "News", "Whose", "retry_ms"]

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
    """What was heard last of one actor, for rows of one kind.

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
        """An answer came, with what the actor says of itself."""
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
    """News of one actor."""

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


def retry_ms(late_s: float) -> int:
    """How long to tell a client to wait that would be late by so much."""
    return max(ceil(1000 * late_s), 1)
