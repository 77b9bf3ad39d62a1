"""How a router keeps up with the controller: one long poll that is lease, acknowledgement and news.

Each poll says which epoch the router has and the oldest to which a request of its is still
pinned; it returns when there is a newer epoch, or after a while. A controller that is away
changes nothing but that: the router goes on with the epoch it has.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from cluster.epochs import decode_epoch
from cluster.router import Router

__all__ = ["Subscription", "Watch"]

logger = logging.getLogger(__name__)

#: (router name, term and number of the epoch it has, its oldest live epoch) -> newer epoch or b""
Watch = Callable[[str, tuple[int, int], int], Awaitable[bytes]]

_RETRY_FIRST_S = 0.1
_RETRY_MAX_S = 2.0


class Subscription:
    """Feeds a router with epochs until it is cancelled.

    Args:
        name: of the router, unique in the cluster.
        router: adopts the epochs.
        watch: the long poll; raises when the controller is away.
    """

    def __init__(self, name: str, router: Router, watch: Watch) -> None:
        self._name = name
        self._router = router
        self._watch = watch
        self._has_epoch = asyncio.Event()

    async def wait_epoch(self, timeout_s: float) -> bool:
        """Wait until the router has its first epoch; False if it did not come in time."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._has_epoch.wait(), timeout_s)
        return self._has_epoch.is_set()

    async def run(self) -> None:
        """Poll for ever."""
        delay_s = _RETRY_FIRST_S
        while True:
            epoch = self._router.routes.epoch
            oldest = self._router.oldest_live_epoch()
            try:
                data = await self._watch(self._name, (epoch.term, epoch.number), oldest)
                if data:
                    await self._router.adopt(decode_epoch(data))
                    self._has_epoch.set()
                delay_s = _RETRY_FIRST_S
            except Exception as error:  # whatever the controller's trouble is, routing goes on
                logger.info("%s: the controller cannot be asked: %s", self._name, error)
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, _RETRY_MAX_S)
