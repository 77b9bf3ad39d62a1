"""How requests for tables ended around the death of a process that holds them: pure bookkeeping."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from bench.traffic import Attempt

__all__ = ["DEADLINE_S", "Blow", "Ends", "ends_of", "is_over"]

#: What every request carries.
DEADLINE_S: Final = 2.0
#: So long must be nothing but right answers before something is over.
_CALM_S: Final = 1.5
_UNAVAILABLE: Final = 503


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """What became of the requests for one table.

    Attributes:
        table: its servable.
        replicas: that it had.
        right: right answers.
        errors: of the others, by HTTP status; that of a wrong answer is 200.
        error_s: the latest end of one of these, from when the request was due.
        recovered_s: from the blow to the first right answer to a request that was due after the
            last that failed; 0 where none failed, None where there was no such answer.
    """

    table: str
    replicas: int
    right: int
    errors: Mapping[int, int]
    error_s: float
    recovered_s: float | None

    @property
    def failed(self) -> int:
        """Requests without a right answer."""
        return sum(self.errors.values())

    @property
    def untyped(self) -> int:
        """Of these, those that did not end as UNAVAILABLE."""
        return self.failed - self.errors.get(_UNAVAILABLE, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Blow:
    """What was done to a cluster, and what came of it.

    Attributes:
        what: in words.
        at: when, in seconds of the monotonic clock.
        tables: those that were asked for.
        unanswered: requests that found no end at all, of whatever table.
        attempts: every request that did.
    """

    what: str
    at: float
    tables: tuple[Ends, ...]
    unanswered: int
    attempts: tuple[Attempt, ...]


def ends_of(attempts: Sequence[Attempt], table: str, replicas: int, at: float) -> Ends:
    """What became of the requests for a table, one of whose processes was struck at an instant."""
    own = [each for each in attempts if each.owner == table]
    bad = [each for each in own if not each.is_right]
    recovered_s: float | None = 0.0
    if bad:
        last = max(each.due for each in bad)
        later = [each.due + each.took_s for each in own if each.is_right and each.due > last]
        recovered_s = min(later) - at if later else None
    return Ends(
        table=table,
        replicas=replicas,
        right=len(own) - len(bad),
        errors=Counter(each.status for each in bad),
        error_s=max((each.took_s for each in bad), default=0.0),
        recovered_s=recovered_s,
    )


def is_over(attempts: Sequence[Attempt], tables: Sequence[str], at: float, now: float) -> bool:
    """Whether every table has been answered for a while, and nothing else, since it was struck."""
    if now < at + _CALM_S:
        return False
    calm = [each for each in attempts if each.due + each.took_s > now - _CALM_S]
    return all(each.is_right for each in calm) and {each.owner for each in calm} >= set(tables)
