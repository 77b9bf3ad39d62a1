"""The largest load that is served within an objective, found by trying loads one after another.

Loads are steps of a ladder of equal ratios, so that contenders and rounds can be compared; one
that is served is called good. A search begins where the one before it ended, goes up or down in
strides that double until it has one good load and one above it that is not, and halves what is
between. It tries no load twice. Chance decides near the edge, so a search is one sample, not a
truth: rounds, each with arrivals of its own, make an estimate of it. Does not know how loads are
tried.
"""

from __future__ import annotations

from math import ceil, log
from typing import Final

__all__ = ["STEP", "Search", "load_of", "step_of"]

#: Ratio of neighbouring loads: finer than what chance makes of a round.
STEP: Final = 1.07
#: Loads a second at step 0; nothing that is measured is below it.
_LEAST: Final = 5.0
_STEPS_MAX: Final = 120


def load_of(step: int) -> float:
    """Requests a second at a step."""
    return float(_LEAST * STEP**step)


def step_of(load: float) -> int:
    """The first step with at least so many requests a second."""
    return min(max(ceil(log(max(load, _LEAST) / _LEAST, STEP) - 1e-9), 0), _STEPS_MAX)


class Search:
    """One search. Ask `next`, try that step, say with `tell` how it went, until `next` is None.

    Args:
        start: the step to begin with.
    """

    def __init__(self, start: int) -> None:
        self._good = -1
        self._bad = _STEPS_MAX + 1
        self._stride = 1
        self._next: int | None = min(max(start, 0), _STEPS_MAX)

    @property
    def next(self) -> int | None:
        """The step to try, or None when the search is over."""
        return self._next

    @property
    def best(self) -> int | None:
        """The largest step that was good so far; None where none was."""
        return self._good if self._good >= 0 else None

    def tell(self, *, good: bool) -> None:
        """How the step went that was asked for."""
        assert self._next is not None, "the search is over"
        if good:
            self._good = self._next
        else:
            self._bad = self._next
        low, high = self._good, self._bad
        if high - low <= 1:
            self._next = None
        elif low < 0:
            self._next = max(high - self._stride, 0)
            self._stride *= 2
        elif high > _STEPS_MAX:
            self._next = min(low + self._stride, _STEPS_MAX)
            self._stride *= 2
        else:
            self._next = (low + high) // 2
