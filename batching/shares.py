"""Who has had more than their share of the device.

Every owner of rows (a servable) has a virtual time: the device seconds that its rows took, divided
by its weight. An owner is *in share* while its virtual time is at most a credit above the least of
those who want the device now. Being out of share costs nothing while there is room; it decides who
waits, and whose rows are given up, when there is not.

An owner that comes back after a pause resumes near the others: time that it did not use is not
saved up, beyond the credit. Where that is never goes back: two owners that come back to a flood,
one after the other, resume alike, whoever finds whom there. After start-time fair queueing (Goyal,
Vin and Cheng, SIGCOMM 1996), used here only to say who is protected: serving in the order of
virtual times would make batches of one.

The credit is a few batches' worth of time, whatever a batch takes on this device. Too little, and
an owner that sends two requests together is out of share with the second; too much, and a flood
stays protected for as long as it lasts. A fixed one is wrong somewhere: 0.1 s, right for batches of
20 ms, is a hundred batches of 1 ms, and a flood then takes a third of the others' deadlines with it
(tests/batching/test_simulation.py).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from batching.allowance import BEST_EFFORT
from batching.errors import InvalidArgument
from batching.values import Batch

__all__ = ["Shares"]

#: Batches by which an owner may be ahead, where no credit is set.
_CREDIT_BATCHES: Final = 5.0
#: Weight of the newest batch in the moving mean of what a batch takes.
_WEIGHT: Final = 1 / 32
#: Owners that may sleep before those are forgotten of whom nothing need be remembered.
_SLEEPING_MAX: Final = 64


class Shares:
    """Virtual times of owners.

    Args:
        credit_s: device seconds by which an owner may be ahead of the last and still be in share;
            None for what five batches take.

    Attributes:
        credit_s: the same, as it is now.

    Raises:
        InvalidArgument: the credit is negative.
    """

    __slots__ = ("_active", "_batch_s", "_floor", "_follows", "_times", "_weights", "credit_s")

    def __init__(self, credit_s: float | None = None) -> None:
        if credit_s is not None and not credit_s >= 0:
            raise InvalidArgument(f"a credit is at least 0 s, not {credit_s}")
        self.credit_s = credit_s or 0.0
        self._follows: Final = credit_s is None
        self._batch_s = 0.0  # moving mean of what a batch takes
        self._weights: Final[dict[str, float]] = {}
        self._times: Final[dict[str, float]] = {}
        #: owners with rows that wait, and in how many lanes
        self._active: Final[dict[str, int]] = {}
        #: no owner that comes back resumes below this, less the credit; it only grows
        self._floor = 0.0

    def set_weight(self, owner: str, weight: float) -> None:
        """An owner of weight 2 may use twice the device time of one of weight 1.

        Raises:
            InvalidArgument: a weight is positive.
        """
        if not weight > 0:
            raise InvalidArgument(f"the weight of {owner!r} must be positive, not {weight}")
        if weight == 1:
            self._weights.pop(owner, None)
        else:
            self._weights[owner] = weight

    def weight_of(self, owner: str) -> float:
        """The owner's weight, 1 where none was set."""
        return self._weights.get(owner, 1.0)

    @property
    def is_weighted(self) -> bool:
        """Whether any weight is not 1."""
        return bool(self._weights)

    def wake(self, owner: str) -> None:
        """A lane has rows of this owner that wait, and had none."""
        count = self._active.get(owner, 0)
        if not count:
            self._floor = max(self._floor, self._virtual_now())
            time = self._times.get(owner, 0.0)
            self._times[owner] = max(time, self._floor - self.credit_s)
        self._active[owner] = count + 1

    def sleep(self, owner: str) -> None:
        """A lane has no rows of this owner any more."""
        count = self._active[owner] - 1
        if count:
            self._active[owner] = count
        else:
            self._floor = max(self._floor, self._virtual_now())
            del self._active[owner]
            if len(self._times) > 2 * len(self._active) + _SLEEPING_MAX:
                self._forget_sleepers()

    def charge(self, owner: str, seconds: float) -> None:
        """Rows of this owner take so much of the device; negative gives some back."""
        weight = self._weights.get(owner, 1.0)
        self._times[owner] = self._times.get(owner, 0.0) + seconds / weight

    def charge_batch(self, batch: Batch, owners: Collection[str], seconds: float) -> None:
        """Every owner's rows bear their part of a batch's time, padding included.

        But for best-effort rows: what runs where there is room takes no share from anybody.

        Args:
            batch: of rows of some of these owners.
            owners: who may have rows in it.
            seconds: that it takes; negative gives some back.
        """
        rows = batch.rows - batch.spare_rows
        if not rows:
            return
        if len(owners) == 1:
            [owner] = owners
            self.charge(owner, seconds)
            return
        each = seconds / rows
        for ticket, start, stop in batch.parts:
            if ticket.priority > BEST_EFFORT:
                self.charge(ticket.owner, each * (stop - start))

    def ran(self, expected_s: float) -> None:
        """A batch begins that will take so long."""
        if self._follows:
            mean = self._batch_s
            self._batch_s = mean = mean + _WEIGHT * (expected_s - mean) if mean else expected_s
            self.credit_s = _CREDIT_BATCHES * mean

    def limit(self) -> float:
        """The virtual time up to which an owner is in share now."""
        return self._virtual_now() + self.credit_s

    def time_of(self, owner: str) -> float:
        """The owner's virtual time."""
        return self._times.get(owner, 0.0)

    def in_share(self, owner: str, limit: float | None = None) -> bool:
        """Whether the owner has not had more than its share.

        Args:
            owner: who.
            limit: what `limit` said at this instant, where many are asked about at once.
        """
        return self._times.get(owner, 0.0) <= (self.limit() if limit is None else limit)

    def _forget_sleepers(self) -> None:
        """Drop the times of those who sleep and would resume at the floor in any case."""
        resumes_at = self._floor - self.credit_s
        for owner in [name for name, time in self._times.items() if time <= resumes_at]:
            if owner not in self._active:
                del self._times[owner]

    def _virtual_now(self) -> float:
        least = min(map(self._times.__getitem__, self._active), default=self._floor)
        return max(least, 0.0)
