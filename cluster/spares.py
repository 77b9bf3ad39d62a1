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
from cluster.pace import LATE_S
from cluster.pending import Call, RouterStats, Spare
from cluster.roster import Roster
from cluster.routes import PlannedNode

__all__ = ["CallAt", "Calls", "Spares", "sharers"]

Array = npt.NDArray[np.generic]
#: `asyncio.AbstractEventLoop.call_at`.
CallAt: TypeAlias = Callable[[float, Callable[[], None]], asyncio.TimerHandle]

#: Late calls are looked for no more often.
_TICK_S: Final = 0.001


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

    def send(self, call: Call, op: str, arrays: tuple[Array, ...], names: tuple[str, ...]) -> None:
        """Send a call for which others could be asked.

        Args:
            call: which.
            op: what is asked.
            arrays: likewise.
            names: the actors that hold everything it asks for, the one that is asked included.

        Raises:
            Unavailable: the actor is away.
        """
        peer, hedging = call.peer, self._hedging
        shard = hedging.shard((call.node.unit, names))
        # Noted before it is sent: a call that cannot be is taken back with what it has.
        call.spare = spare = Spare(shard, op, arrays, names, peer.endpoint.actor)
        call.owed = peer.pace.sent(call.rows)
        number = self._calls.send(call, op, arrays)
        spare.numbers.append(number)
        spare.since = call.sent_at
        hedging.asked(shard, number, call.sent_at)
        if hedging.wakes_at < self._armed_for:
            self._arm(hedging.wakes_at)

    def settle(self, call: Call, now: float) -> None:
        """A call was answered: whoever else was asked for the same has nothing more to say."""
        spare = call.spare
        assert spare is not None
        spare.shard.answered(now - spare.since)
        call.peer.pace.answered(now - call.sent_at, call.owed, now)
        if len(spare.numbers) == 1:
            return
        for number in spare.numbers:
            twin = self._calls.take(number)
            if twin is not None:
                twin.peer.pace.outrun(now - twin.sent_at, twin.owed, now)
                twin.peer.cancel(number)
        if call.is_hedge:
            self._stats.hedges_won += 1

    def goes_on(self, call: Call, *, anew: bool) -> bool:
        """Whether a part may still be answered, although one who was asked for it will not.

        Args:
            call: which failed, and is no longer under way.
            anew: whether to ask another replica, if nobody who was asked may still answer.
        """
        spare = call.spare
        if spare is None or call.execution.slot < 0:
            return False
        if any(number in self._calls.calls for number in spare.numbers):
            return True
        if anew and self._ask_another(call, spare, is_hedge=False):
            self._stats.replaced += 1
            return True
        return False

    def _ask_another(self, call: Call, spare: Spare, *, is_hedge: bool) -> bool:
        """Ask a replica that has not been asked yet, where there is one and time."""
        execution, now = call.execution, self._clock()
        if execution.deadline <= now:
            return False
        others = [name for name in spare.names if name not in spare.asked]
        peer = self._roster.quickest(others, call.rows, now)
        if peer is None or (is_hedge and not self._hedging.spend()):
            return False
        spare.asked.append(peer.endpoint.actor)
        again = Call(
            execution, call.node, peer, call.rows, call.gather, call.positions, call.partials,
            call.partition,
        )  # fmt: skip
        again.spare = spare
        again.is_hedge = is_hedge
        again.owed = peer.pace.sent(call.rows)
        spare.numbers.append(self._calls.send(again, spare.op, spare.arrays))
        return True

    def _arm(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._armed_for = at
        self._timer = self._call_at(at, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._armed_for = math.inf
        now = self._clock()
        calls = self._calls.calls
        for number in self._hedging.late(now, calls):
            call = calls.get(number)
            if call is None or call.spare is None:
                continue  # one that was late before it has ended their request
            if self._ask_another(call, call.spare, is_hedge=True):
                call.peer.pace.late_until = now + LATE_S
                self._stats.hedged += 1
        if self._hedging.wakes_at < math.inf:
            self._arm(max(self._hedging.wakes_at, now + _TICK_S))


def sharers(node: PlannedNode, holders: Sequence[str], holder: str) -> tuple[str, ...]:
    """The actors that hold everything this one is asked for, itself among them."""
    own = [names for names, who in zip(node.holders, holders, strict=True) if who == holder]
    first = own[0]
    if len(own) == 1:
        return first
    return tuple([name for name in first if all(name in names for names in own)])
