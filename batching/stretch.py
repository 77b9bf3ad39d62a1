"""By how much longer than forecast rows take: a factor that mends itself.

A forecast leaves out rows that have not come yet, and what a policy knows beside shares and
deadlines. So its times are multiplied by a *stretch*, which grows by `STRETCH_STEP` whenever
accepted tickets are late or given up, and shrinks with every batch of which none was, by as much
less as makes it rest where one batch in twenty has such a ticket. The idea is AlpaServe's (OSDI
2023, the scale of its clocks).

Does not know whose tickets these are, nor what is done with the forecast.
"""

from __future__ import annotations

from typing import Final

__all__ = ["STRETCH_MAX", "STRETCH_MIN", "STRETCH_STEP", "Stretch"]

#: By how much a stretch grows when accepted tickets are late.
STRETCH_STEP: Final = 0.03
#: The least and the most that times are multiplied by. Estimates are meant to be kept, so where
#: batches take now more and now less, most are shorter.
STRETCH_MIN: Final = 0.8
STRETCH_MAX: Final = 4.0
#: With this a stretch rests where one batch in twenty has a late ticket.
_EASE: Final = STRETCH_STEP * 0.05 / 0.95


class Stretch:
    """One such factor.

    Attributes:
        factor: what times are multiplied by.
    """

    __slots__ = ("_missed_at", "factor")

    def __init__(self) -> None:
        self.factor = 1.0
        self._missed_at = float("-inf")

    def missed(self, now: float) -> None:
        """A ticket was late or was given up. Those of the same instant count once."""
        if self._missed_at != now:
            self._missed_at = now
            self.factor = min(self.factor + STRETCH_STEP, STRETCH_MAX)

    def kept(self) -> None:
        """A batch came back in which no ticket was late."""
        if self.factor > STRETCH_MIN:
            self.factor = max(self.factor - _EASE, STRETCH_MIN)
