"""What a full cache gives up: the least recently used blobs that nobody holds.

Pure: from what lies in the cache to what goes, or to how much is missing. Does not know files,
locks or time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Cached", "Room", "make_room"]


class Cached(NamedTuple):
    """A blob in the cache.

    Attributes:
        digest: its name.
        size: bytes that it takes.
        used: when it was last used; later is larger.
        held: whether a live process holds it.
    """

    digest: str
    size: int
    used: int
    held: bool


class Room(NamedTuple):
    """What a new blob needs.

    Attributes:
        victims: digests to give up, in this order.
        short: bytes that would still be missing, 0 where the blob fits.
    """

    victims: tuple[str, ...]
    short: int


def make_room(cached: Sequence[Cached], coming: int, need: int, budget: int) -> Room:
    """What to give up for a new blob.

    Nothing is given up in vain: where everything that may go is not enough, nothing goes. No blob
    goes that could stay: of those that were to go, the one used last is spared where the rest
    make room enough.

    Args:
        cached: what lies there.
        coming: bytes promised to blobs that are being brought.
        need: bytes of the new blob.
        budget: the most that all of it may take.
    """
    over = sum(blob.size for blob in cached) + coming + need - budget
    if over <= 0:
        return Room((), 0)
    victims: list[Cached] = []
    free = 0
    for blob in sorted(cached, key=lambda blob: (blob.used, blob.digest)):
        if free >= over:
            break
        if not blob.held and blob.size:
            victims.append(blob)
            free += blob.size
    if free < over:
        return Room((), over - free)
    kept: list[str] = []
    for blob in reversed(victims):
        if free - blob.size >= over:
            free -= blob.size
        else:
            kept.append(blob.digest)
    return Room(tuple(reversed(kept)), 0)
