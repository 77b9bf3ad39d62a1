"""Replaying a version's warm-up requests, before any epoch names it.

A router does it, with a routing core of its own whose one epoch names the version: what runs is the
path that requests will take, over links of their own, and nothing of it is in what the router
counts or routes. Requests go one after the other, so a replay never takes more of the cluster than
one client would. Where units have several copies the requests are replayed for each.

Decides which failures are worth another try, and how people are told of one that is not. Does not
know why a version is loaded, nor Ray.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
from msgspec import structs

from batching.errors import (
    Code,
    DeadlineExceeded,
    Internal,
    ServingError,
    Unavailable,
    error_of,
)
from cluster.dialing import Dial
from cluster.epochs import Epoch, Rehearsal, ServableVersion
from cluster.router import Router
from cluster.routes import SignaturePlan
from cluster.signals import Rehearse, Rehearsed
from cluster.watching import reason_of
from shards.converting import rows_of
from shards.orders import Outcome, decode, encode
from shards.recorded import Recorded
from shards.specs import check
from shards.store import open_store
from shards.warmups import read_warmups

__all__ = ["Ask", "Rehearsing", "delegate", "replay"]

logger = logging.getLogger(__name__)

Array = npt.NDArray[np.generic]

#: Replays of one router at the same time.
_AT_ONCE: Final = 2
#: A part of the version that cannot be reached is tried again for so long.
_UNAVAILABLE_S: Final = 5.0
_PAUSE_S: Final = 0.05
_PAUSE_S_MAX: Final = 1.0
#: How long some router is looked for: Ray restarts one within about a second.
_ROUTER_S: Final = 30.0
_ROUTER_PAUSE_S: Final = 0.5

#: Asks a router to replay: a `Rehearsal` to an `Outcome`.
Ask = Callable[[bytes], Awaitable[bytes]]


class Rehearsing:
    """The replays of one router.

    Args:
        dial: opens links to actors, under a name that no other router has.
    """

    def __init__(self, dial: Dial) -> None:
        self._dial = dial
        self._places = asyncio.Semaphore(_AT_ONCE)

    async def take(self, order: bytes) -> bytes:
        """Replay what a `Rehearsal` says; answers an `Outcome`."""
        rehearsal = decode(order, Rehearsal)
        try:
            async with self._places:
                await self._rehearse(rehearsal)
        except Exception as error:
            if not isinstance(error, ServingError):
                logger.exception("a replay failed for a reason of our own")
                error = Internal(reason_of(error))
            return encode(Outcome(code=error.code, message=error.message))
        return encode(Outcome())

    async def _rehearse(self, rehearsal: Rehearsal) -> None:
        manifest = rehearsal.served.manifest
        store = open_store(rehearsal.store)
        requests = await asyncio.to_thread(read_warmups, store, manifest)
        began = time.monotonic()
        await replay(rehearsal, requests, self._dial)
        took_s = time.monotonic() - began
        name = f"{manifest.name}:{manifest.version}"
        logger.info("%s answered %d warm-up requests in %.2f s", name, len(requests), took_s)


async def replay(rehearsal: Rehearsal, requests: Sequence[Recorded], dial: Dial) -> None:
    """Replay warm-up requests on a version.

    Args:
        rehearsal: the version, and where its units are.
        requests: that fit its signatures.
        dial: opens links to actors.

    Raises:
        DeadlineExceeded: not all of them were answered in time.
        ServingError: one of them failed; says which.
    """
    loop = asyncio.get_running_loop()
    manifest = rehearsal.served.manifest
    router = Router(loop, dial, clock=loop.time)
    turn = _Turn(router, rehearsal.timeout_s, len(requests))
    try:
        for number, copy in enumerate(_copies(rehearsal.served), start=1):
            epoch = Epoch(
                term=1,
                number=number,
                servables={manifest.name: {manifest.version: copy}},
                endpoints=rehearsal.endpoints,
                continuation_bytes_min=rehearsal.continuation_bytes_min,
            )
            await router.adopt(epoch)
            plans = router.routes.find(manifest.name, manifest.version).plans
            for index, request in enumerate(requests, start=1):
                await turn.run(index, plans[request.signature], request)
    finally:
        router.close()


class _Turn:
    """Has one request answered after the other.

    Args:
        router: has the epoch.
        timeout_s: for all of them, from now on.
        count: how many there are.
    """

    def __init__(self, router: Router, timeout_s: float, count: int) -> None:
        self._router = router
        self._clock = asyncio.get_running_loop().time
        self._timeout_s = timeout_s
        self._deadline = self._clock() + timeout_s
        self._count = count

    async def run(self, number: int, plan: SignaturePlan, request: Recorded) -> None:
        """Have a request answered, however often it has to be asked.

        Raises:
            ServingError: it was refused for good; says which it is.
        """
        which = f"warm-up request {number} of {self._count} ({request.signature})"
        began, pause_s = self._clock(), _PAUSE_S
        while True:
            try:
                await self._ask(plan, request)
                return
            except ServingError as error:
                code, text, wait_ms = error.code, error.message, error.retry_after_ms
            now = self._clock()
            if now + pause_s >= self._deadline:
                late = f"{which}: not answered within the {self._timeout_s:g} s for all: {text}"
                raise DeadlineExceeded(late)
            is_away = code == Code.UNAVAILABLE and now - began < _UNAVAILABLE_S
            if code != Code.RESOURCE_EXHAUSTED and not is_away:
                raise error_of(code, f"{which} failed: {text}")
            await asyncio.sleep(max(pause_s, min(wait_ms / 1000, _PAUSE_S_MAX)))
            pause_s = min(2 * pause_s, _PAUSE_S_MAX)

    async def _ask(self, plan: SignaturePlan, request: Recorded) -> None:
        specs = plan.signature.inputs
        rows = rows_of(specs, check(specs, request.inputs))
        end = _End()
        self._router.submit(plan, request.inputs, rows, self._deadline, end)
        await end.answered


class _End:
    """The sink of one request."""

    __slots__ = ("answered",)

    def __init__(self) -> None:
        self.answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def done(self, outputs: Mapping[str, Array], frame: Sequence[Array] | None) -> None:
        """Any answer will do."""
        if not self.answered.done():
            self.answered.set_result(None)

    def failed(self, error: ServingError) -> None:
        """Tell the replay."""
        if not self.answered.done():
            self.answered.set_exception(error)


def _copies(served: ServableVersion) -> list[ServableVersion]:
    """The same once for every copy of the units, such that each copy is asked by one of them."""
    placement = served.placement
    most = max((len(part) for parts in placement.values() for part in parts), default=1)
    return [
        structs.replace(
            served,
            placement={
                name: tuple(part[index % max(len(part), 1) :][:1] for part in parts)
                for name, parts in placement.items()
            },
        )
        for index in range(most)
    ]


async def delegate(effect: Rehearse, routers: Callable[[], Sequence[Ask]]) -> Rehearsed:
    """Have some router replay. One that is lost meanwhile is replaced by another.

    Args:
        effect: what to replay.
        routers: those that there are.

    Returns:
        The event for how it ended.
    """
    order = encode(effect.order)
    clock = asyncio.get_running_loop().time
    deadline = clock() + _ROUTER_S
    reason = "there is none"
    while True:
        found = routers()
        turn = effect.number % len(found) if found else 0
        for ask in (*found[turn:], *found[:turn]):
            try:
                outcome = decode(await ask(order), Outcome)
            except Exception as error:  # whatever it is, it is that router's
                reason = reason_of(error)
                continue
            failed = outcome.code != "OK"
            return effect.done(error_of(outcome.code, outcome.message) if failed else None)
        if clock() >= deadline:
            return effect.done(Unavailable(f"no router to replay warm-up requests: {reason}"))
        await asyncio.sleep(_ROUTER_PAUSE_S)
