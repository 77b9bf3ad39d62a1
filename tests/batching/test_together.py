"""Tickets that come in one frame end as if each had come by itself."""

from __future__ import annotations

import random

import pytest

from batching import Batcher, EffSafe, Ladder, LaneKey, Ticket, TicketState
from batching.errors import ServingError
from batching.values import Run

KEY, OTHER = LaneKey("a"), LaneKey("b")
COSTS = {1: 0.010, 4: 0.020, 16: 0.040}


def device(*, admission: bool = True) -> Batcher:
    batcher = Batcher(EffSafe(0.0), in_flight_max=1, credit_s=0.05, admission=admission)
    for key in (KEY, OTHER):
        batcher.add_lane(key, Ladder(COSTS), 24, 1 << 20, COSTS)
    return batcher


def tickets(draw: random.Random, now: float) -> list[Ticket]:
    """Rows of one frame: deadlines are jittered, now and then one is too soon, or large."""
    left_s = draw.choice((0.03, 0.06, 0.5, 10.0))
    owner, priority, key = draw.choice("xy"), draw.choice((0, 0, 1, -1)), draw.choice((KEY, OTHER))
    return [
        Ticket(
            key, draw.choice((1, 1, 1, 3)), 4, now + left_s + draw.uniform(-0.02, 0.02), None,
            owner, priority,
        )
        for _ in range(draw.randint(1, 8))
    ]  # fmt: skip


def outcome(batcher: Batcher, refused: list[tuple[Ticket, ServingError]]) -> object:
    stats = batcher.stats()
    return (
        [(type(error), error.retry_after_ms) for _, error in refused],
        {
            key: (lane.rows, lane.nbytes, lane.refused, lane.total)
            for key, lane in stats.lanes.items()
        },
        stats.waiting,
        batcher.next_wakeup(),
    )


@pytest.mark.parametrize("admission", [True, False])
def test_a_frame_is_taken_as_its_tickets_would_be_one_by_one(admission: bool) -> None:
    draw = random.Random(7)
    together, alone = device(admission=admission), device(admission=admission)
    now = 100.0
    runs: list[tuple[Run, Run]] = []
    for _ in range(400):
        now += draw.choice((0.0, 0.001, 0.02))
        seed = draw.random()
        frame, singles = (tickets(random.Random(seed), now) for _ in range(2))
        refused: list[tuple[Ticket, ServingError]] = []
        for ticket in singles:
            try:
                alone.offer(ticket, now)
            except ServingError as error:
                refused.append((ticket, error))
        assert outcome(together, together.offer_all(frame, now)) == outcome(alone, refused)
        assert [t.state for t in frame] == [t.state for t in singles]
        ours, theirs = together.poll(now), alone.poll(now)
        assert [type(effect) for effect in ours] == [type(effect) for effect in theirs]
        runs += [
            (a, b) for a, b in zip(ours, theirs, strict=True)
            if isinstance(a, Run) and isinstance(b, Run)
        ]  # fmt: skip
        if runs and draw.random() < 0.7:
            a, b = runs.pop()
            assert len(a.batch.parts) == len(b.batch.parts)
            assert len(together.finish(a.batch.id, now)) == len(alone.complete(b.batch.id, now))
        together.check_invariants()


def test_a_frame_has_one_entry_among_the_deadlines() -> None:
    """Or the quick way was not taken, and each ticket has one."""
    batcher = device()
    batcher.offer(Ticket(KEY, 1, 1, 200.0, None, "x"), 100.0)
    frame = [Ticket(KEY, 1, 1, 150.0 + at, None, "x") for at in (3, 1, 2)]
    assert batcher.offer_all(frame, 100.0) == []
    assert len(batcher._deadlines._heap) == 2
    assert batcher.next_wakeup() == 151.0
    batcher.cancel(frame[1], 100.0)
    assert batcher.next_wakeup() == 152.0
    [expired] = [effect for effect in batcher.poll(152.5) if not isinstance(effect, Run)]
    assert expired.ticket is frame[2]
    assert frame[0].state is not TicketState.EXPIRED


def test_of_a_frame_that_does_not_fit_the_first_tickets_are_taken() -> None:
    batcher = device(admission=False)
    batcher.offer(Ticket(KEY, 20, 1, 200.0, None, "x"), 100.0)
    frame = [Ticket(KEY, 3, 1, 200.0, None, "x") for _ in range(3)]
    assert [ticket for ticket, _ in batcher.offer_all(frame, 100.0)] == frame[1:]
    assert [ticket.state for ticket in frame[1:]] == [TicketState.NEW] * 2
