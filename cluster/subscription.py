"""How a router keeps up with the controller: one long poll that is lease, acknowledgement and news.

Each poll says which epoch the router has and the oldest to which a request of its is still
pinned; it returns when there is a newer epoch, or after a while. What the poll under way said of
old epochs is corrected by a second, short one when their last request has ended: until the
controller knows, it keeps loaded what only they need, which may be twice the memory of a model. A
controller that is away changes nothing but that: the router goes on with the epoch it has.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from cluster.epochs import decode_epoch
from cluster.router import Router

__all__ = ["Subscription", "Watch"]

logger = logging.getLogger(__name__)

#: (router name, term and number of the epoch it has, its oldest live epoch) -> newer epoch or b""
Watch = Callable[[str, tuple[int, int], int], Awaitable[bytes]]

#: Who has no epoch is answered at once.
_NO_EPOCH: Final = (0, 0)
#: How often is looked whether requests of old epochs have ended, while there are any.
_DRAINED_S: Final = 0.05
_RETRY_FIRST_S = 0.1
_RETRY_MAX_S = 2.0


class Subscription:
    """Feeds a router with epochs until it is cancelled; at most two calls of `watch` are open.

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
        #: the oldest epoch in use, as the controller was told last
        self._said = 0
        #: set while requests may be pinned to an epoch before the current one
        self._is_behind = asyncio.Event()

    async def wait_epoch(self, timeout_s: float) -> bool:
        """Wait until the router has its first epoch; False if it did not come in time."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._has_epoch.wait(), timeout_s)
        return self._has_epoch.is_set()

    async def run(self) -> None:
        """Poll for ever."""
        correcting = asyncio.create_task(self._correct())
        try:
            await self._follow()
        finally:
            correcting.cancel()

    async def _follow(self) -> None:
        delay_s = _RETRY_FIRST_S
        while True:
            epoch = self._router.routes.epoch
            self._said = self._router.oldest_live_epoch()
            if self._said < epoch.number:
                self._is_behind.set()
            try:
                data = await self._watch(self._name, (epoch.term, epoch.number), self._said)
                if data:
                    await self._router.adopt(decode_epoch(data))
                    self._has_epoch.set()
                delay_s = _RETRY_FIRST_S
            except Exception as error:  # whatever the controller's trouble is, routing goes on
                logger.info("%s: the controller cannot be asked: %s", self._name, error)
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, _RETRY_MAX_S)

    async def _correct(self) -> None:
        while True:
            await self._is_behind.wait()
            await asyncio.sleep(_DRAINED_S)
            oldest = self._router.oldest_live_epoch()
            if oldest >= self._router.routes.number:
                self._is_behind.clear()
            if oldest <= self._said:
                continue
            self._said = oldest
            try:
                # The answer is an epoch that the poll under way brings, or has brought.
                await self._watch(self._name, _NO_EPOCH, oldest)
            except Exception as error:  # the next poll says it again
                logger.info("%s: the controller cannot be told: %s", self._name, error)
