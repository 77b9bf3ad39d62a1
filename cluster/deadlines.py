"""A timer wheel for request deadlines: O(1) to add and to remove, no heap of dead entries.

A router adds and removes tens of thousands of deadlines a second, and nearly all are removed
before they pass. A heap would keep every finished request until its deadline (at 50,000 requests
a second and 10 s, half a million); the wheel forgets at once. The price is resolution: a deadline
fires up to one tick late, never early.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

__all__ = ["DeadlineWheel"]

K = TypeVar("K", bound=Hashable)


class DeadlineWheel(Generic[K]):
    """Keys by the tick in which their deadline passes.

    Args:
        tick_s: resolution in seconds.
    """

    def __init__(self, tick_s: float = 0.005) -> None:
        self._tick_s = tick_s
        self._slots: dict[int, dict[K, None]] = {}

    def __len__(self) -> int:
        return sum(len(slot) for slot in self._slots.values())

    def add(self, key: K, deadline: float) -> int:
        """Watch a key; returns the slot that `remove` wants back."""
        slot = int(deadline / self._tick_s) + 1
        keys = self._slots.get(slot)
        if keys is None:
            keys = self._slots[slot] = {}
        keys[key] = None
        return slot

    def remove(self, key: K, slot: int) -> None:
        """Stop watching a key. Unknown keys are fine: they may just have expired."""
        keys = self._slots.get(slot)
        if keys is not None:
            keys.pop(key, None)
            if not keys:
                del self._slots[slot]

    def expired(self, now: float) -> list[K]:
        """Remove and return the keys whose deadline has passed."""
        # The same product as in `next_wakeup`: a quotient may be rounded to the tick before.
        due = sorted(slot for slot in self._slots if slot * self._tick_s <= now)
        return [key for slot in due for key in self._slots.pop(slot)]

    def next_wakeup(self) -> float | None:
        """When `expired` can next return something, or None."""
        return min(self._slots) * self._tick_s if self._slots else None
