"""One of several versions for each request: by weight, and the same one for the same key.

A request has a point on a ring of 2**32, a version an arc of it. The point of a key is a hash that
every process finds alike; requests without a key take points that spread evenly, so that weights
are kept exactly and not only on average. Decides which version; knows nothing else of a request.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from hashlib import blake2b
from itertools import accumulate
from typing import Final

__all__ = ["RING", "EvenPoints", "Split", "point_of"]

RING: Final = 1 << 32
#: The golden ratio of the ring: its multiples are as far from one another as can be.
_STRIDE: Final = 2_654_435_769


def point_of(servable: str, key: bytes) -> int:
    """The point of a key. Of every servable another one, lest the same users meet all changes."""
    digest = blake2b(b"%b\0%b" % (servable.encode(), key), digest_size=4).digest()
    return int.from_bytes(digest, "little")


class EvenPoints:
    """Points for requests without a key."""

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last = 0

    def take(self) -> int:
        """The next point."""
        self._last = (self._last + _STRIDE) % RING
        return self._last


class Split:
    """Versions with arcs of the ring.

    The arcs lie in the order of the targets' names: where one of two grows it keeps all keys that
    it had, and a label keeps its keys when it moves to another version.

    Args:
        servable: whose requests these are.
        shares: name of the target, its version and its weight; at least one weight above 0.
    """

    __slots__ = ("_bounds", "_points", "_servable", "_versions")

    def __init__(self, servable: str, shares: Iterable[tuple[str, int, int]]) -> None:
        ordered = sorted(share for share in shares if share[2] > 0)
        total = sum(weight for _, _, weight in ordered)
        assert total > 0, "a split without weights"
        ends = accumulate(weight for _, _, weight in ordered)
        self._servable = servable
        self._bounds = [RING * end // total for end in ends]
        self._versions = [version for _, version, _ in ordered]
        self._points = EvenPoints()

    def pick(self, key: bytes = b"") -> int:
        """The version of a request.

        Args:
            key: requests with the same key get the same version; empty for any.
        """
        point = point_of(self._servable, key) if key else self._points.take()
        return self._versions[bisect_right(self._bounds, point)]
