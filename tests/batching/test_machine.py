"""Random histories of a batcher, held against a naive model of it.

The model keeps plain lists and looks through all of them at every step. It knows the device's
secret, which rows are poison, and predicts every batch and every end.
"""

from __future__ import annotations

from math import ceil, inf, log2
from typing import TypeAlias

import pytest
from hypothesis import find, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from batching import (
    Batch,
    Batcher,
    Effect,
    Expired,
    Failed,
    Finished,
    Ladder,
    LaneBusy,
    LaneDraining,
    LaneFull,
    LaneKey,
    LaneUnknown,
    RoundRobin,
    Run,
    Shed,
    Ticket,
    TicketState,
    TicketTooLarge,
)
from batching.allowance import BEST_EFFORT, CRITICAL, DEFAULT, SHEDDABLE
from batching.errors import DeadlineExceeded, ServingError
from batching.testing import CheckedTicket, FakeClock, lane_keys
from tests.batching.naive import Fate, Group, Row, cut_to

KEYS = (LaneKey("trunk", (16,)), LaneKey("trunk", (32,)), LaneKey("head"), LaneKey("gone"))

LADDERS = st.sampled_from([(8,), (1, 2, 4), (3, 6), (1, 4, 8), (2,), (1,)]).map(Ladder)

#: Rows, bytes, seconds to live, poisoned row (counted round) or none, criticality: mostly harmless.
SIZES = st.tuples(
    st.sampled_from((1, 1, 1, 2, 3, 5, 12)),
    st.sampled_from((0, 1, 1, 1, 40)),
    st.sampled_from((inf, inf, inf, 4.0, 2.0, 1.0, 0.0)),
    st.sampled_from((None, None, None, 0, 11)),
    st.sampled_from((DEFAULT, DEFAULT, CRITICAL, SHEDDABLE, BEST_EFFORT, BEST_EFFORT)),
)
Size: TypeAlias = tuple[int, int, float, int | None, int]

ENDS = {
    Finished: TicketState.FINISHED,
    Failed: TicketState.FAILED,
    Expired: TicketState.EXPIRED,
    Shed: TicketState.SHED,
}


class Poison(Exception):
    """What the device says of a batch with a poisoned row."""


class Lost(Exception):
    """What becomes of a batch on a lost device."""


class BatcherMachine(RuleBasedStateMachine):
    """The batcher, its model, and the device with its secret."""

    @initialize(credits=st.integers(1, 3), ladder=LADDERS)
    def start(self, credits: int, ladder: Ladder) -> None:
        self.clock = FakeClock(1000.0)
        self.batcher = Batcher(RoundRobin(), credits)
        self.credits = credits
        self.lanes: dict[LaneKey, Row] = {}
        self.fates: dict[Ticket, Fate] = {}
        self.device: dict[int, tuple[Batch, Group]] = {}
        self.evicted: list[Ticket] = []  # ended, and to be told by the next poll
        self.add_lane(KEYS[0], ladder, rows_max=32, bytes_max=128)

    # ---- the model ----------------------------------------------------------------------

    def live(self, ticket: Ticket) -> bool:
        return not self.fates[ticket].ended

    def waits(self, fate: Fate) -> bool:
        lane = self.lanes[fate.ticket.lane]
        again = any(t is fate.ticket for group in lane.retries for t, _, _ in group.parts)
        return not fate.ended and (fate.left < fate.ticket.rows or again)

    def has_rows(self, lane: Row) -> bool:
        tickets = [fate.ticket for fate in lane.line]
        tickets += [ticket for group in lane.retries for ticket, _, _ in group.parts]
        return any(map(self.live, tickets))

    def end(self, ticket: Ticket, state: TicketState) -> None:
        fate = self.fates[ticket]
        assert not fate.ended, f"{ticket} ended twice"
        assert ticket.state is state
        fate.ended = True

    def take_turn(self, batch: Batch) -> None:
        """Check a new batch against the model and the round robin's promise."""
        now, lane = self.clock(), self.lanes[batch.lane]
        for key, other in self.lanes.items():
            if key == batch.lane or not self.has_rows(other):
                other.passed_over = 0
            else:
                other.passed_over += 1
                assert other.passed_over <= len(self.lanes) - 1, f"{key} starves"
        group = lane.next_batch(self.live)
        assert batch.parts == group.parts
        assert batch.rows == sum(stop - start for _, start, stop in batch.parts)
        assert all(ticket.lane == batch.lane for ticket, _, _ in batch.parts)
        spare = [part for part in batch.parts if part[0].priority <= BEST_EFFORT]
        assert batch.spare_rows == sum(stop - start for _, start, stop in spare)
        assert all(ticket.deadline > now for ticket, _, _ in batch.parts)
        assert batch.bucket == min(size for size in lane.ladder.sizes if size >= batch.rows)
        assert batch.formed_at == now
        assert batch.id not in self.device
        self.device[batch.id] = (batch, group)
        assert len(self.device) <= self.credits

    def due(self) -> list[Ticket]:
        now = self.clock()
        waiting = [fate.ticket for fate in self.fates.values() if self.waits(fate)]
        return [ticket for ticket in waiting if ticket.deadline <= now]

    def ends(self, effects: list[Effect]) -> list[Ticket]:
        """Book the ends among the effects."""
        ended = []
        for effect in effects:
            assert not isinstance(effect, Run)
            self.end(effect.ticket, ENDS[type(effect)])
            ended.append(effect.ticket)
        return ended

    # ---- what happens -------------------------------------------------------------------

    @rule(
        key=st.sampled_from(KEYS[:3]),
        ladder=LADDERS,
        rows_max=st.integers(4, 32),
        bytes_max=st.integers(16, 128),
    )
    def add_lane(self, key: LaneKey, ladder: Ladder, rows_max: int, bytes_max: int) -> None:
        if key not in self.lanes:
            self.batcher.add_lane(key, ladder, rows_max, bytes_max)
            self.lanes[key] = Row(ladder, rows_max, bytes_max)

    def refusal(self, ticket: Ticket) -> type[ServingError] | None:
        lane = self.lanes.get(ticket.lane)
        if lane is None:
            return LaneUnknown
        if lane.draining:
            return LaneDraining
        if ticket.deadline <= self.clock():
            return DeadlineExceeded
        if ticket.rows > lane.rows_max or ticket.nbytes > lane.bytes_max:
            return TicketTooLarge
        return LaneFull if lane.room_for(ticket) is None else None

    @rule(choice=st.integers(0, 9), sizes=st.lists(SIZES, min_size=3, max_size=12))
    def offer(self, choice: int, sizes: list[Size]) -> None:
        known = [*sorted(self.lanes)] * (choice < 9) or [KEYS[-1]]
        key = known[choice % len(known)]
        now = self.clock()
        for rows, nbytes, ttl, poison, priority in sizes:
            ticket = CheckedTicket(key, rows, nbytes, now + ttl, priority=priority)
            expected = self.refusal(ticket)
            if expected is None:
                for fate in self.lanes[key].room_for(ticket) or ():
                    fate.ended = True
                    self.evicted.append(fate.ticket)
                self.batcher.offer(ticket, now)
                assert all(other.state is TicketState.SHED for other in self.evicted)
                fate = self.fates[ticket] = Fate(ticket, None if poison is None else poison % rows)
                self.lanes[key].line.append(fate)
                continue
            with pytest.raises(expected) as refusal:
                self.batcher.offer(ticket, now)
            assert refusal.type is expected
            assert (refusal.value.retry_after_ms > 0) == (expected is LaneFull)
            assert ticket.story == [TicketState.NEW]

    @rule(
        choice=st.integers(0, 9),
        sizes=st.lists(SIZES, min_size=1, max_size=8),
        priority=st.integers(-1, 1),
    )
    def offer_together(self, choice: int, sizes: list[Size], priority: int) -> None:
        """What becomes of each is what would if they were offered one after the other."""
        known = [*sorted(self.lanes)] * (choice < 9) or [KEYS[-1]]
        key = known[choice % len(known)]
        now = self.clock()
        tickets = [
            CheckedTicket(key, rows, nbytes, now + ttl, priority=priority)
            for rows, nbytes, ttl, _, _ in sizes
        ]
        refused: list[tuple[Ticket, type[ServingError]]] = []
        for ticket, (rows, _, _, poison, _) in zip(tickets, sizes, strict=True):
            expected = self.refusal(ticket)
            if expected is not None:
                refused.append((ticket, expected))
                continue
            for fate in self.lanes[key].room_for(ticket) or ():
                fate.ended = True
                self.evicted.append(fate.ticket)
            fate = self.fates[ticket] = Fate(ticket, None if poison is None else poison % rows)
            self.lanes[key].line.append(fate)
        answers = self.batcher.offer_all(tickets, now)
        assert [(ticket, type(error)) for ticket, error in answers] == refused
        assert all(other.state is TicketState.SHED for other in self.evicted)
        assert all(ticket.state is TicketState.NEW for ticket, _ in refused)

    @rule()
    def poll(self) -> None:
        now = self.clock()
        expected = self.due()
        effects = self.batcher.poll(now)
        told, effects = effects[: len(self.evicted)], effects[len(self.evicted) :]
        for effect, ticket in zip(told, self.evicted, strict=True):
            assert isinstance(effect, Shed)
            assert (effect.ticket, effect.evicted) == (ticket, True)
        self.evicted.clear()
        expired = [effect.ticket for effect in effects if isinstance(effect, Expired)]
        assert sorted(expired, key=id) == sorted(expected, key=id)
        assert [t.deadline for t in expired] == sorted(t.deadline for t in expired)
        self.ends(effects[: len(expired)])
        for effect in effects[len(expired) :]:
            assert isinstance(effect, Run)
            self.take_turn(effect.batch)
        idle = not any(map(self.has_rows, self.lanes.values()))
        assert idle or len(self.device) == self.credits, "a credit is free and rows wait"
        assert self.batcher.poll(now) == []

    @rule(ticks=st.sampled_from((0.0, 0.5, 1.0, 3.0)))
    def pass_time(self, ticks: float) -> None:
        self.clock.advance(ticks)

    @precondition(lambda self: self.batcher.next_wakeup() is not None)
    @rule()
    def sleep_until_the_wakeup(self) -> None:
        """Polling before the wake-up yields at most batches; at the wake-up a ticket ends."""
        self.poll()
        wakeup = self.batcher.next_wakeup()
        if wakeup is not None:
            assert wakeup > self.clock()
            self.clock.advance_to((self.clock() + wakeup) / 2)
            assert self.batcher.poll(self.clock()) == []
            self.clock.advance_to(wakeup)
            assert self.due()
            self.poll()

    @rule(
        choice=st.integers(0, 8),
        sizes=st.lists(SIZES, min_size=3, max_size=12),
        choices=st.lists(st.integers(0, 2), min_size=1, max_size=6),
    )
    def serve(
        self,
        choice: int,
        sizes: list[Size],
        choices: list[int],
    ) -> None:
        """Rows come, and the device works off some batches."""
        self.offer(choice, sizes)
        for choice in choices:
            self.poll()
            if self.device:
                self.land(choice)

    @precondition(lambda self: self.device)
    @rule(choice=st.integers(0, 2))
    def land(self, choice: int) -> None:
        """A batch comes back, in error if a row of it is poison, whoever still waits for it."""
        number = sorted(self.device)[choice % len(self.device)]
        batch, group = self.device.pop(number)
        poisoned = [
            ticket
            for ticket, start, stop in batch.parts
            if self.fates[ticket].poison in range(start, stop)
        ]
        alive = [part for part in batch.parts if self.live(part[0])]
        if not poisoned:
            for ticket, start, stop in alive:
                self.fates[ticket].back += range(start, stop)
            ended = self.ends(self.batcher.complete(number, self.clock()))
            whole = [t for t, _, _ in alive if len(self.fates[t].back) == t.rows]
            assert ended == whole
            for ticket in ended:
                assert sorted(self.fates[ticket].back) == list(range(ticket.rows))
            return
        error = Poison()
        effects = self.batcher.fail(number, error, self.clock())
        assert all(isinstance(effect, Failed) and effect.error is error for effect in effects)
        if len(batch.parts) == 1:
            assert self.ends(effects) == [ticket for ticket, _, _ in alive]
            return
        assert effects == []
        half = (len(alive) + 1) // 2
        cuts = group.cuts + 1
        assert cuts <= ceil(log2(group.origin))
        lane = self.lanes[batch.lane]
        for half_of_it in (alive[:half], alive[half:]):
            for parts in cut_to(half_of_it, lane.ladder.largest):
                lane.retries.append(Group(parts, cuts, group.origin))

    @precondition(lambda self: self.device)
    @rule(choice=st.integers(0, 2))
    def lose(self, choice: int) -> None:
        number = sorted(self.device)[choice % len(self.device)]
        batch, _ = self.device.pop(number)
        alive = [ticket for ticket, _, _ in batch.parts if self.live(ticket)]
        assert self.ends(self.batcher.fail(number, Lost(), self.clock(), fatal=True)) == alive

    @precondition(lambda self: self.fates)
    @rule(choice=st.integers(0, 30))
    def cancel(self, choice: int) -> None:
        """Give up one of the newest tickets."""
        newest = list(self.fates.values())[-8:]
        fate = newest[choice % len(newest)]
        alive = not fate.ended
        assert self.batcher.cancel(fate.ticket, self.clock()) is alive
        if alive:
            self.end(fate.ticket, TicketState.CANCELLED)

    @precondition(lambda self: self.lanes)
    @rule(choice=st.integers(0, 2), verb=st.sampled_from(("drain", "reopen", "remove")))
    def operate(self, choice: int, verb: str) -> None:
        key = sorted(self.lanes)[choice % len(self.lanes)]
        lane = self.lanes[key]
        if verb == "drain":
            self.batcher.drain_lane(key)
            lane.draining = True
        elif verb == "reopen":
            self.batcher.reopen_lane(key)
            lane.draining = False
        else:
            flying = any(batch.lane == key for batch, _ in self.device.values())
            idle = not flying and not self.has_rows(lane)
            assert self.batcher.lane_idle(key) is idle
            if idle:
                self.batcher.remove_lane(key)
                del self.lanes[key]
                self.fates = {t: fate for t, fate in self.fates.items() if t.lane != key}
            else:
                with pytest.raises(LaneBusy):
                    self.batcher.remove_lane(key)

    @precondition(lambda self: self.lanes)
    @rule(choice=st.integers(0, 2), ladder=LADDERS)
    def resize(self, choice: int, ladder: Ladder) -> None:
        key = sorted(self.lanes)[choice % len(self.lanes)]
        lane = self.lanes[key]
        self.batcher.resize_lane(key, ladder)
        if ladder != lane.ladder:
            lane.ladder = ladder
            lane.retries = [
                Group(parts, group.cuts, group.origin)
                for group in lane.retries
                for parts in cut_to(group.parts, ladder.largest)
            ]

    # ---- what is always true ------------------------------------------------------------

    @invariant()
    def state_is_sound(self) -> None:
        self.batcher.check_invariants()

    @invariant()
    def bounds_hold_and_books_agree(self) -> None:
        stats = self.batcher.stats()
        assert stats.lanes.keys() == self.lanes.keys()
        assert stats.in_flight == len(self.device)
        assert stats.waiting == sum(map(self.waits, self.fates.values()))
        for key, lane in self.lanes.items():
            books = stats.lanes[key]
            assert books.rows == lane.rows <= lane.rows_max
            assert books.nbytes == lane.nbytes <= lane.bytes_max
            fates = [fate for ticket, fate in self.fates.items() if ticket.lane == key]
            total = books.total
            ended = total.finished + total.failed + total.expired + total.cancelled + total.shed
            assert (total.hopeless, total.evicted) == (0, total.shed)
            assert total.offered == len(fates)
            assert ended == sum(fate.ended for fate in fates)

    @invariant()
    def the_wakeup_is_the_first_deadline(self) -> None:
        waiting = [fate.ticket.deadline for fate in self.fates.values() if self.waits(fate)]
        first = min(waiting, default=inf)
        assert self.batcher.next_wakeup() == (first if first < inf else None)

    def teardown(self) -> None:
        """Draining ends: every ticket has an end within a bounded number of steps."""
        if not hasattr(self, "batcher"):
            return
        for key, lane in self.lanes.items():
            self.batcher.drain_lane(key)
            lane.draining = True
        rows = sum(ticket.rows for ticket in self.fates)
        for _ in range(2 * rows + 2):  # each row alone, and the cuts between them
            self.poll()
            if not self.device:
                break
            self.land(0)
        assert not self.device
        assert all(fate.ended for fate in self.fates.values())
        assert all(map(self.batcher.lane_idle, self.lanes))
        self.state_is_sound()


BatcherMachine.TestCase.settings = settings(
    max_examples=200, stateful_step_count=30, derandomize=True, deadline=None
)
TestBatcher = BatcherMachine.TestCase


def test_lane_keys_can_be_drawn() -> None:
    assert find(lane_keys(), lambda key: len(key.shape) == 2).unit
