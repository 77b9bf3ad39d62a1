"""The actors that a controller has started or found: made, listened to, ended.

An actor is one process under a name. It is made where the fewest of its kind are, or found if it
is there; from then on a call is always pending at it, so that its end is known at once. Who is
silent for too long is ended before it is called lost, since another process can bear the name only
when this one is gone; but never by a controller that has been succeeded (`cluster.reign`). What
is ended is always the very process that was heard: Ray's handles are of one, and orders to stop
name its generation.

Does not know how Ray makes or kills an actor, nor what is decided about actors.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, RayError

from cluster.reign import Deeds, ReignOver
from cluster.signals import ActorLost, ActorUp, EnsureActor, Event, StopActor
from cluster.siting import emptiest
from cluster.watching import SILENT_S, START_S, heard, reason_of
from shards.orders import ActorKind, ActorReport, Outcome, decode

__all__ = ["Crew"]

logger = logging.getLogger(__name__)

_STOP_S: Final = 5.0
#: Between two tries to end what is out of reach, while the store cannot say who reigns.
_AGAIN_S: Final = 1.0


class _Member(NamedTuple):
    handle: ActorHandle
    generation: int
    pid: int


class Crew:
    """Actors by name.

    Args:
        term: of this reign.
        deeds: make and kill.
        nodes: ids of the nodes that live.
        make: makes or finds an actor, of a name and a kind, on a node; blocks.
        kill: ends a process; blocks.
        feed: takes what happens to actors.
    """

    def __init__(
        self,
        term: int,
        deeds: Deeds,
        *,
        nodes: Callable[[], Awaitable[list[str]]],
        make: Callable[[str, ActorKind, str], ActorHandle],
        kill: Callable[[ActorHandle], None],
        feed: Callable[[Event], None],
    ) -> None:
        self._term = term
        self._deeds = deeds
        self._nodes = nodes
        self._make = make
        self._kill = kill
        self._feed = feed
        self._members: dict[str, _Member] = {}
        self._sites: dict[str, tuple[ActorKind, str]] = {}

    def handle(self, name: str) -> ActorHandle | None:
        """The actor of this name, if one was heard."""
        member = self._members.get(name)
        return None if member is None else member.handle

    def handles(self) -> list[ActorHandle]:
        """All that were heard."""
        return [member.handle for member in self._members.values()]

    def pid(self, name: str) -> int:
        """The process id of an actor, 0 while there is none."""
        member = self._members.get(name)
        return 0 if member is None else member.pid

    async def ensure(self, effect: EnsureActor) -> None:
        """Have an actor run, and tell what becomes of it until it is gone.

        Raises:
            ReignOver: another controller has taken over; nothing was done to the actor.
        """
        name = effect.name
        try:
            handle, report = await self._begin(name, effect.kind)
        except ReignOver:
            raise
        except Exception as error:
            self._sites.pop(name, None)
            reason = f"cannot be started: {reason_of(error)}"
            self._feed(ActorLost(name=name, generation=0, reason=reason))
            return
        endpoint = report.endpoint
        self._members[name] = _Member(handle, endpoint.generation, report.pid)
        self._sites[name] = (effect.kind, endpoint.node)
        self._feed(ActorUp(report=report))
        reason = await self._listen(handle)
        self._members.pop(name, None)
        self._sites.pop(name, None)
        self._feed(ActorLost(name=name, generation=endpoint.generation, reason=reason))

    async def stop(self, effect: StopActor) -> None:
        """End an actor, if it is still the process that is meant.

        Raises:
            ReignOver: another controller has taken over; the actor was not killed.
        """
        member = self._members.get(effect.name)
        if member is not None and member.generation == effect.generation:
            await self.end(member.handle)

    async def end(self, handle: ActorHandle, *, blindly: bool = False) -> None:
        """Let an actor stop by itself, then make sure; one that knows a higher term is not ours.

        Args:
            handle: of any actor that can be told to stop.
            blindly: also where the store cannot say whether this reign is over.

        Raises:
            ReignOver: another controller has taken over; the actor was not killed.
        """
        with contextlib.suppress(RayError, TimeoutError):
            refusal = decode(
                await asyncio.wait_for(_stopped(handle, self._term), timeout=_STOP_S), Outcome
            )
            logger.error("controller: another one reigns: %s", refusal.message)
            return
        await self._deeds.kill(lambda: self._kill(handle), blindly=blindly)

    async def _begin(self, name: str, kind: ActorKind) -> tuple[ActorHandle, ActorReport]:
        nodes = await self._nodes()
        node = emptiest(nodes, kind, self._sites.values())
        # Noted before it is there, since others are started at the same time.
        self._sites[name] = (kind, node)
        logger.info("%s: starting on node %s of %d", name, node[:12], len(nodes))
        handle = await self._deeds.create(lambda: self._make(name, kind, node))
        try:
            return handle, await heard(handle.report.remote(), ActorReport, START_S)
        except TimeoutError:
            # Where it cannot be killed now, the next start finds it by its name.
            await self._deeds.kill(lambda: self._kill(handle))
            raise

    async def _listen(self, handle: ActorHandle) -> str:
        """Hear an actor until it is gone; why."""
        while True:
            try:
                # Pending most of the time, so the end of the process is known at once.
                report = await heard(handle.watch.remote(), ActorReport, SILENT_S)
            except ActorDiedError as error:
                return reason_of(error)
            except (RayError, TimeoutError) as error:
                # Out of reach, and perhaps alive. It is taken for lost only when it is gone, and
                # listened to as long as nobody may end it.
                if await self._deeds.kill(lambda: self._kill(handle)):
                    return reason_of(error)
                await asyncio.sleep(_AGAIN_S)
            else:
                self._feed(ActorUp(report=report))


async def _stopped(handle: ActorHandle, term: int) -> bytes:
    refusal: bytes = await handle.stop.remote(term)
    return refusal
