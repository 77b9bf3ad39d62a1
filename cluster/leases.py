"""Which routing epochs may still be in use: the fence between "no longer routed to" and "unload".

A router holds a lease and says which epoch is the oldest that a request of its is pinned to. An
epoch is behind every router when all of them have moved on, or when those that did not have been
silent for their lease plus the longest time a request may take. A new reign knows no router yet,
so it waits a lease before it believes that it has heard of all.

Decides nothing else; does not know versions or how leases travel.
"""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["Leases"]


class Leases:
    """The routers that are known.

    Attributes:
        lease_s: for how long a report is believed; may be changed.
    """

    __slots__ = ("_blind_until", "_routers", "lease_s")

    def __init__(self, lease_s: float = 10.0) -> None:
        self.lease_s = lease_s
        self._blind_until: float | None = None
        self._routers: dict[str, tuple[int, float]] = {}

    def begin_blind(self, now: float) -> None:
        """Routers of an earlier reign may exist that have not been heard yet."""
        self._blind_until = now + self.lease_s

    def renew(self, router: str, oldest_live_epoch: int, now: float) -> None:
        """A router has reported. A report that comes late never takes it back in time."""
        oldest, until = self._routers.get(router, (0, now))
        self._routers[router] = (max(oldest, oldest_live_epoch), max(until, now + self.lease_s))

    def forget(self, router: str) -> None:
        """A router's process is gone."""
        self._routers.pop(router, None)

    def expire(self, now: float, grace_s: float) -> None:
        """Forget routers that have been silent for so long that no request of theirs can live."""
        for router, (_, until) in list(self._routers.items()):
            if now >= until + grace_s:
                del self._routers[router]

    def passes_at(self, epoch: int, grace_s: float, now: float) -> float | None:
        """When no request can be pinned to an epoch before this one any more.

        Args:
            epoch: the first epoch that counts as moved on.
            grace_s: the longest that a request may take.
            now: the present instant.

        Returns:
            The instant at the latest, if nobody reports; None when it is so already.
        """
        blockers = (at for at in self._blockers(epoch, grace_s) if at > now)
        return max(blockers, default=None)

    def oldest(self) -> dict[str, int]:
        """Router to the oldest epoch it reported."""
        return {router: oldest for router, (oldest, _) in sorted(self._routers.items())}

    def _blockers(self, epoch: int, grace_s: float) -> Iterator[float]:
        if self._blind_until is not None:
            yield self._blind_until + grace_s
        for oldest, until in self._routers.values():
            if oldest < epoch:
                yield until + grace_s
