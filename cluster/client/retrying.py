"""When to ask again, and how long to wait before: decided here, done by the clients.

A call is asked again when nothing came of it for a reason that may pass: the server says when to
come back, or the connection broke and asking twice does no harm. Pauses are the server's own hint
or double from try to try, with jitter, and end with the call's deadline: an error is told at once
if there is no time left to mend it. All calls of a client share a budget, so a cluster that is
down is not asked several times as much as one that is up.

This file knows neither sockets nor HTTP; time comes from whoever asks.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from batching.errors import DeadlineExceeded, ResourceExhausted, ServingError, Unavailable

__all__ = ["Budget", "Lost", "Retries", "Tries"]


class Lost(Unavailable):
    """The connection could not be made, or broke before the answer was whole.

    Attributes:
        was_sent: whether the server may have had the request.
        was_reused: whether the connection had served before: then the server may just have closed
            it, being idle.
    """

    def __init__(self, message: str, *, was_sent: bool = True, was_reused: bool = False) -> None:
        super().__init__(message)
        self.was_sent = was_sent
        self.was_reused = was_reused


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """How often a client asks again.

    Attributes:
        attempts_max: tries of one call, the first included; 1 never asks again.
        pause_s: before the second try where the server gives no hint; doubles from try to try.
        pause_max_s: never longer than this.
        budget: retries that all calls together may have at once...
        budget_share: ...and what each call adds to it, as a share of a retry.
    """

    attempts_max: int = 4
    pause_s: float = 0.025
    pause_max_s: float = 1.0
    budget: float = 10.0
    budget_share: float = 0.2

    def __post_init__(self) -> None:
        if self.attempts_max < 1 or min(self.pause_s, self.budget, self.budget_share) < 0:
            raise ValueError(f"{self} has an attempts_max below 1 or a negative number")


class Budget:
    """The retries that a client's calls still have together. Shared by threads.

    Args:
        retries: says how many.
    """

    def __init__(self, retries: Retries) -> None:
        self._max = retries.budget
        self._share = retries.budget_share
        self._left = retries.budget

    def deposit(self) -> None:
        """A call was made."""
        # Two threads that meet here lose a share of a retry, which is not worth a lock.
        self._left = min(self._left + self._share, self._max)

    def take(self) -> bool:
        """Take a retry, if there is one."""
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Tries:
    """The tries of one call.

    Args:
        retries: how many.
        budget: of all calls.
        deadline: of the call.
        is_repeatable: whether asking twice does no harm.
        chance: for jitter.
    """

    __slots__ = ("_budget", "_chance", "_deadline", "_is_repeatable", "_number", "_retries")

    def __init__(
        self,
        retries: Retries,
        budget: Budget,
        deadline: float,
        *,
        is_repeatable: bool,
        chance: random.Random,
    ) -> None:
        self._retries = retries
        self._budget = budget
        self._deadline = deadline
        self._is_repeatable = is_repeatable
        self._chance = chance
        self._number = 1
        budget.deposit()

    def pause_s(self, error: ServingError, now: float) -> float:
        """After a try has failed, how long to wait before the next.

        Args:
            error: why it failed.
            now: on the clock of the deadline.

        Raises:
            ServingError: that error, where the call is over.
        """
        retries, number = self._retries, self._number
        if not _may_pass(error, self._is_repeatable) or number >= retries.attempts_max:
            raise error
        self._number += 1
        if number == 1 and isinstance(error, Lost) and error.was_reused:
            return 0.0  # the server closed it for being idle: no sign of trouble
        doubled: float = min(retries.pause_s * 2 ** (number - 1), retries.pause_max_s)
        pause_s = error.retry_after_ms / 1000 + doubled * self._chance.uniform(0.5, 1.0)
        if now + pause_s >= self._deadline or not self._budget.take():
            raise error
        return pause_s


def _may_pass(error: ServingError, is_repeatable: bool) -> bool:
    if isinstance(error, DeadlineExceeded):
        return False
    if isinstance(error, Lost):
        return is_repeatable or not error.was_sent
    if isinstance(error, Unavailable | ResourceExhausted):
        return is_repeatable and error.retry_after_ms > 0
    return False
