"""The batches on the device: credits, numbers, and the device time each of them took.

It does not know why a lane was chosen, nor what becomes of the tickets.
"""

from __future__ import annotations

from math import inf
from typing import Final

from batching.errors import InvalidArgument
from batching.lane import Lane
from batching.values import Batch, Part

__all__ = ["Flight"]


class Flight:
    """What is in flight, and how much more may be.

    Attributes:
        busy_s: seconds of the device that came back.
        depths: launches by how many batches were then in flight; the first is for one.
    """

    __slots__ = (
        "_batches", "_free_at", "_landed_at", "_lead_s", "_limit", "_number", "busy_s", "depths",
    )  # fmt: skip

    def __init__(self, limit: int, lead_s: float = inf) -> None:
        if limit < 1:
            raise InvalidArgument(f"in_flight_max must be positive; was {limit}")
        if not lead_s >= 0:
            raise InvalidArgument(f"a lead is at least 0 s, not {lead_s}")
        self._limit: Final = limit
        self._lead_s: Final = lead_s
        self._batches: Final[dict[int, Batch]] = {}
        self._number = 0
        self.busy_s = 0.0
        self.depths: Final = [0] * limit
        self._landed_at = float("-inf")  # when a batch last came back
        self._free_at = float("-inf")  # when all that is in flight will have come back

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def full(self) -> bool:
        """Whether every credit is in use."""
        return len(self._batches) >= self._limit

    @property
    def free_at(self) -> float:
        """When the device is expected to have done what is in flight; may have passed."""
        return self._free_at

    @property
    def forms_at(self) -> float:
        """From when on another batch is worth forming; at once where nothing is in flight."""
        return self._free_at - self._lead_s if self._batches else -inf

    def free_without(self, landing: int, now: float) -> float:
        """The same at the instant at which this batch comes back."""
        batches = self._batches.items()
        return now + sum([batch.expected_s for number, batch in batches if number != landing])

    def launch(self, lane: Lane, limit: int, now: float) -> Batch:
        """Form the next batch of this lane, which has rows; takes a credit.

        Args:
            lane: whose rows.
            limit: the most rows to take; a group that is retried is taken as it stands.
            now: this instant.
        """
        return self.begin(lane, *lane.take(limit, now), now)

    def begin(self, lane: Lane, parts: list[Part], rows: int, spare_rows: int, now: float) -> Batch:
        """Make a batch of rows that have left their lines; takes a credit.

        Args:
            lane: theirs.
            parts: of the batch.
            rows: in them.
            spare_rows: how many of these are best-effort ones.
            now: this instant.
        """
        assert not self.full, "no credit is free"
        bucket = lane.ladder.bucket_of(rows)
        expected_s = lane.costs.of_rows(rows)
        lane.in_flight += 1
        lane.batches += 1
        lane.rows_run += rows
        lane.padded_rows += bucket - rows
        self._number = number = self._number + 1
        batch = Batch(number, lane.key, bucket, rows, parts, now, expected_s, spare_rows)
        self.depths[len(self._batches)] += 1
        self._batches[number] = batch
        self._free_at = max(self._free_at, now) + expected_s
        return batch

    def land(self, batch_id: int, now: float) -> tuple[Batch, float]:
        """The batch came back; gives its credit back.

        Returns:
            The batch and the seconds of the device that it took. One device runs one batch at a
            time, so they count from when the batch before it came back, if that is later than
            when it was formed.
        """
        assert batch_id in self._batches, f"batch {batch_id} is not in flight"
        batch = self._batches.pop(batch_id)
        began = max(batch.formed_at, self._landed_at)
        self._landed_at = now
        self._free_at = now + sum(left.expected_s for left in self._batches.values())
        seconds = max(0.0, now - began)
        self.busy_s += seconds
        return batch, seconds

    def batches(self) -> list[Batch]:
        """Every batch in flight, oldest first."""
        return list(self._batches.values())

    def check_invariants(self) -> None:
        """Hold the batches against themselves. O(n); for tests and simulation."""
        assert len(self._batches) <= self._limit, f"{len(self._batches)} of {self._limit} credits"
        for number, batch in self._batches.items():
            assert batch.id == number
            assert 0 < batch.rows <= batch.bucket
            assert batch.rows == sum(stop - start for _, start, stop in batch.parts)
            assert len({id(ticket) for ticket, _, _ in batch.parts}) == len(batch.parts)
            for ticket, start, stop in batch.parts:
                assert ticket.lane == batch.lane, f"{ticket} in a batch of {batch.lane}"
                assert 0 <= start < stop <= ticket.taken
