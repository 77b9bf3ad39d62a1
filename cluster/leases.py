"""Which routing epochs may still be in use: the fence between "no longer routed to" and "unload".

A router holds a lease and says which epoch is the oldest that a request of its is pinned to. An
epoch is behind every router when all of them have moved on, or when those that did not have been
silent for their lease plus the longest time a request may take. A new reign knows no router yet,
so it waits a lease before it believes that it has heard of all.

Silence means something only to those who listen. What a controller that stood still did not hear
is no router's silence, and its latest epoch may not have left it: that time counts for no lease.

Decides nothing else; does not know versions or how leases travel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final, NamedTuple

__all__ = ["Leases"]

#: The part of a lease after which somebody who waits for routers looks again, even in silence.
_LOOK: Final = 0.25


class _Lease(NamedTuple):
    """What a router has reported.

    Attributes:
        oldest: the oldest epoch that a request of its is pinned to.
        epoch: by which it answers what comes now.
        until: when its lease ends.
    """

    oldest: int
    epoch: int
    until: float


class Leases:
    """The routers that are known.

    Attributes:
        lease_s: for how long a report is believed; may be changed.
    """

    __slots__ = ("_blind_until", "_heeded_at", "_routers", "lease_s")

    def __init__(self, lease_s: float = 10.0) -> None:
        self.lease_s = lease_s
        self._blind_until: float | None = None
        self._heeded_at = math.inf
        self._routers: dict[str, _Lease] = {}

    def heed(self, now: float) -> None:
        """The controller runs at this instant: to be said before anything else of it.

        Where it comes after `looks_at`, the controller stood still; leases that had not run out
        before go on for that long.
        """
        before, self._heeded_at = self._heeded_at, now
        late_s = now - (before + _LOOK * self.lease_s)
        if late_s <= 0.0:
            return
        for router, lease in self._routers.items():
            if lease.until > before:
                self._routers[router] = lease._replace(until=lease.until + late_s)
        if self._blind_until is not None and self._blind_until > before:
            self._blind_until += late_s

    @property
    def looks_at(self) -> float:
        """When to `heed` again at the latest, while anything waits for routers."""
        return self._heeded_at + _LOOK * self.lease_s

    def begin_blind(self, now: float) -> None:
        """Routers of an earlier reign may exist that have not been heard yet."""
        self._blind_until = now + self.lease_s

    def renew(self, router: str, oldest_live_epoch: int, now: float, epoch: int = 0) -> None:
        """A router has reported. A report that comes late never takes it back in time.

        Args:
            router: its name.
            oldest_live_epoch: the oldest that a request of its is pinned to.
            now: the present instant.
            epoch: by which it answers what comes now; 0 where the report does not say.
        """
        oldest, has, until = self._routers.get(router, _Lease(0, 0, now))
        oldest = max(oldest, oldest_live_epoch)
        self._routers[router] = _Lease(
            oldest, max(has, epoch, oldest), max(until, now + self.lease_s)
        )

    def forget(self, router: str) -> None:
        """A router's process is gone."""
        self._routers.pop(router, None)

    def expire(self, now: float, grace_s: float) -> None:
        """Forget routers that have been silent for so long that no request of theirs can live."""
        for router, lease in list(self._routers.items()):
            if now >= lease.until + grace_s:
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
        return {router: lease.oldest for router, lease in sorted(self._routers.items())}

    def behind(self, epoch: int) -> tuple[str, ...]:
        """Routers that answer by an epoch before this one, as far as they have reported.

        Those whose lease has ended are not among them: nobody waits for the dead.
        """
        return tuple(
            router
            for router, lease in sorted(self._routers.items())
            if lease.epoch < epoch and lease.until > self._heeded_at
        )

    def _blockers(self, epoch: int, grace_s: float) -> Iterator[float]:
        if self._blind_until is not None:
            yield self._blind_until + grace_s
        for lease in self._routers.values():
            if lease.oldest < epoch:
                yield lease.until + grace_s
