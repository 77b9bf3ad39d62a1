"""Other replicas for a part of a look-up: one that breaks is replaced, one that is late hedged.

A part is asked of one replica. Where its link breaks, or it says that it is not available, another
is asked for the same part, within the request's deadline and epoch. Where it is late (`hedging`
says when), another is asked besides: the first answer is taken, and the other is told to stop. No
replica is asked twice for a part, so there is an end.

One timer for all calls. Does not know what an answer is for.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from cluster.hedging import Hedging
from cluster.pending import Call, RouterStats, Spare
from cluster.roster import Roster
from cluster.routes import PlannedNode

__all__ = ["CallAt", "Calls", "Spares", "sharers"]

Array = npt.NDArray[np.generic]
#: `asyncio.AbstractEventLoop.call_at`.
CallAt: TypeAlias = Callable[[float, Callable[[], None]], asyncio.TimerHandle]

#: A replica that was late and has answered nothing since is asked again after so long.
_LATE_S: Final = 0.25


class Calls(Protocol):
    """Who sends calls and keeps them."""

    @property
    def calls(self) -> Mapping[int, Call]:
        """Those under way, by number."""

    def take(self, number: int) -> Call | None:
        """The call of this number, which is no longer under way."""

    def send(self, call: Call, op: str, arrays: tuple[Array, ...]) -> int:
        """Send a call; its number."""


class Spares:
    """Watches the calls that another replica could be asked for.

    Args:
        calls: under way.
        roster: the actors.
        stats: to count into.
        clock: the loop's.
        call_at: the loop's.
    """

    def __init__(
        self,
        calls: Calls,
        roster: Roster,
        stats: RouterStats,
        clock: Callable[[], float],
        call_at: CallAt,
    ) -> None:
        self._calls = calls
        self._roster = roster
        self._stats = stats
        self._clock = clock
        self._call_at = call_at
        self._hedging = Hedging()
        self._timer: asyncio.TimerHandle | None = None
        self._armed_for = math.inf

    def close(self) -> None:
        """Watch no longer."""
        if self._timer is not None:
            self._timer.cancel()

    def watch(
        self, call: Call, number: int, op: str, arrays: tuple[Array, ...], names: Sequence[str]
    ) -> None:
        """A call was sent for which others could be asked.

        Args:
            call: which.
            number: its number.
            op: what was asked.
            arrays: likewise.
            names: the actors that hold everything it asks for, the one that was asked included.
        """
        asked = call.peer.endpoint.actor
        spare = Spare((call.node.unit, tuple(names)), op, arrays)
        spare.others = [name for name in names if name != asked]
        spare.numbers = [number]
        spare.slot = self._hedging.asked(spare.shard, number, call.sent_at)
        spare.since = call.sent_at
        call.spare = spare
        if spare.slot >= 0:
            at = self._hedging.wakes_at(spare.slot)
            if at < self._armed_for:
                self._arm(at)

    def settle(self, call: Call, now: float) -> None:
        """A call was answered: whoever else was asked for the same has nothing more to say."""
        spare = call.spare
        assert spare is not None
        self._hedging.answered(spare.shard, spare.numbers[0], spare.slot, now - spare.since)
        if len(spare.numbers) == 1:
            return
        for number in spare.numbers:
            twin = self._calls.take(number)
            if twin is not None:
                twin.peer.cancel(number)
        if call.is_hedge:
            self._stats.hedges_won += 1

    def goes_on(self, call: Call, *, anew: bool) -> bool:
        """Whether a part may still be answered, although one who was asked for it will not.

        Args:
            call: which failed, and is no longer under way.
            anew: whether to ask another replica, if none has been asked yet.
        """
        spare = call.spare
        if spare is None or call.execution.slot < 0:
            return False
        if any(number in self._calls.calls for number in spare.numbers):
            return True
        if anew and self._ask_another(call, spare) is not None:
            self._stats.replaced += 1
            return True
        return False

    def _ask_another(self, call: Call, spare: Spare) -> Call | None:
        """Ask a replica that has not been asked yet, where there is one and time."""
        execution = call.execution
        peer = self._roster.best(spare.others)
        if peer is None or execution.deadline <= self._clock():
            return None
        spare.others.remove(peer.endpoint.actor)
        again = Call(
            execution, call.node, peer, call.rows, call.gather, call.positions, call.partials,
            call.partition,
        )  # fmt: skip
        again.spare = spare
        spare.numbers.append(self._calls.send(again, spare.op, spare.arrays))
        return again

    def _arm(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._armed_for = at
        self._timer = self._call_at(at, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._armed_for = math.inf
        for number in self._hedging.late(self._clock()):
            call = self._calls.calls.get(number)
            if call is None or call.spare is None:
                continue  # its request has ended, or another was asked as this one broke
            if self._roster.best(call.spare.others) is None or not self._hedging.spend():
                continue
            second = self._ask_another(call, call.spare)
            if second is not None:
                call.peer.is_late = True
                self._call_at(self._clock() + _LATE_S, call.peer.forgive)
                second.is_hedge = True
                self._stats.hedged += 1
        wakeup = self._hedging.next_wakeup()
        if wakeup is not None:
            self._arm(wakeup)


def sharers(node: PlannedNode, holders: Sequence[str], holder: str) -> tuple[str, ...]:
    """The actors that hold everything this one is asked for, itself among them."""
    own = [names for names, who in zip(node.holders, holders, strict=True) if who == holder]
    first = own[0]
    if len(own) == 1:
        return first
    return tuple([name for name in first if all(name in names for names in own)])
