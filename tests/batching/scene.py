"""A batcher, its clock and its device in one place; effects told as short sentences.

``run a/4: x[0:2] y[0:1]`` is a batch of lane ``a`` in bucket 4 with two rows of ticket x and one of
ticket y; ``finished x``, ``expired x``, ``shed x`` and ``failed x`` are the ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import assert_never

from batching import (
    Batch,
    Batcher,
    Effect,
    Expired,
    Failed,
    Finished,
    Ladder,
    LaneKey,
    LaneStats,
    Policy,
    RoundRobin,
    Run,
    Shed,
    Ticket,
)
from batching.allowance import DEFAULT
from batching.testing import CheckedTicket, FakeClock

#: A power of two, so that instants a few ticks apart are exact.
TICK = 2.0**-10

POISON = RuntimeError("poison")


def name(ticket: Ticket) -> str:
    assert isinstance(ticket.payload, str)
    return ticket.payload


def tell(effect: Effect) -> str:
    match effect:
        case Run(batch):
            parts = " ".join(f"{name(t)}[{start}:{stop}]" for t, start, stop in batch.parts)
            return f"run {batch.lane.unit}/{batch.bucket}: {parts}"
        case Finished(ticket):
            return f"finished {name(ticket)}"
        case Expired(ticket):
            return f"expired {name(ticket)}"
        case Shed(ticket, _):
            return f"shed {name(ticket)}"
        case Failed(ticket, _):
            return f"failed {name(ticket)}"
        case _:
            assert_never(effect)


class Scene:
    """Drives a batcher as an I/O loop would, and checks its invariants after every event."""

    def __init__(
        self,
        lanes: str = "a",
        sizes: Sequence[int] = (1, 2, 4),
        rows_max: int = 64,
        bytes_max: int = 1 << 20,
        credits: int = 1,
        policy: Policy | None = None,
        lead_s: float = inf,
    ) -> None:
        self.clock = FakeClock(100.0)
        self.batcher = Batcher(policy or RoundRobin(), credits, lead_s=lead_s)
        for unit in lanes:
            self.batcher.add_lane(LaneKey(unit), Ladder(sizes), rows_max, bytes_max)
        self.device: list[Batch] = []

    def offer(
        self,
        label: str,
        rows: int = 1,
        lane: str = "a",
        ttl: float = inf,
        nbytes: int = 1,
        priority: int = DEFAULT,
        owner: str = "",
    ) -> Ticket:
        deadline = self.clock() + ttl
        ticket = CheckedTicket(LaneKey(lane), rows, nbytes, deadline, label, owner, priority)
        try:
            self.batcher.offer(ticket, self.clock())
        finally:
            self.batcher.check_invariants()
        return ticket

    def poll(self) -> list[str]:
        return self._told(self.batcher.poll(self.clock()))

    def complete(self) -> list[str]:
        """The oldest batch comes back."""
        return self._told(self.batcher.complete(self.device.pop(0).id, self.clock()))

    def fail(self, fatal: bool = False) -> list[str]:
        """The oldest batch comes back in error."""
        batch = self.device.pop(0)
        return self._told(self.batcher.fail(batch.id, POISON, self.clock(), fatal=fatal))

    def cancel(self, ticket: Ticket) -> bool:
        cancelled = self.batcher.cancel(ticket, self.clock())
        self.batcher.check_invariants()
        return cancelled

    def step(self, poison: str = "") -> list[str]:
        """Poll, then let the oldest batch end; it fails if a ticket named in `poison` is in it."""
        told = self.poll()
        if self.device:
            failing = any(name(ticket) in poison for ticket, _, _ in self.device[0].parts)
            told += self.fail() if failing else self.complete()
        return told

    def run_dry(self, poison: str = "", steps_max: int = 200) -> list[str]:
        """Steps until nothing happens any more."""
        told: list[str] = []
        for _ in range(steps_max):
            news = self.step(poison)
            if not news:
                return told
            told += news
        raise AssertionError(f"still at work after {steps_max} steps: {told[-5:]}")

    def stats(self, lane: str = "a") -> LaneStats:
        return self.batcher.stats().lanes[LaneKey(lane)]

    def _told(self, effects: list[Effect]) -> list[str]:
        self.device += [effect.batch for effect in effects if isinstance(effect, Run)]
        self.batcher.check_invariants()
        return [tell(effect) for effect in effects]
