"""Rows that find the device idle leave the books as if they had waited in a line for no time."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass

import pytest

from batching import Batcher, EffSafe, Ladder, LaneKey, RoundRobin, Ticket, TicketState
from batching.allowance import BEST_EFFORT, CRITICAL, DEFAULT
from batching.values import Batch, Run

KEY, OTHER = LaneKey("a"), LaneKey("b")
COSTS = {1: 0.010, 4: 0.020, 16: 0.040}


def device(*, admission: bool = True) -> Batcher:
    batcher = Batcher(EffSafe(), in_flight_max=2, admission=admission)
    for key in (KEY, OTHER):
        batcher.add_lane(key, Ladder(COSTS), 24, 1 << 20, COSTS)
    return batcher


def crowd(rows: int, deadline: float, owner: str = "x", key: LaneKey = KEY) -> Ticket:
    return Ticket(key, rows, 4 * rows, deadline, None, owner, DEFAULT, requests=rows)


def known(batcher: Batcher, owner: str = "x", key: LaneKey = KEY) -> Batcher:
    """The same, once the owner has been served."""
    batcher.offer(Ticket(key, 1, 4, 60.0, None, owner, DEFAULT), 50.0)
    [run] = batcher.poll(50.0)
    assert isinstance(run, Run)
    batcher.finish(run.batch.id, 50.01)
    return batcher


def rounded(value: object) -> object:
    """Sums of a batch's parts in another order differ in their last bits."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, Mapping):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [rounded(each) for each in value]
    if is_dataclass(value):
        return [rounded(getattr(value, each.name)) for each in fields(value)]
    return value


def books(batcher: Batcher, now: float) -> object:
    found = (
        batcher.stats(),
        batcher.costs.snapshot(),
        batcher.shares.credit_s,
        [
            (line.stretch_of(DEFAULT).factor, batcher.admission.wait_s(key, owner, DEFAULT, now))
            for key, lane in batcher._lanes.items()
            for owner, line in lane.lines.items()
        ],
    )
    return rounded(found)


@pytest.mark.parametrize("admission", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_the_short_way_leaves_the_same_books_as_the_long_one(seed: int, admission: bool) -> None:
    draw = random.Random(seed)
    short, long = device(admission=admission), device(admission=admission)
    now, taken = 100.0, 0
    for _ in range(300):
        now += draw.choice((0.0001, 0.02, 3.0))
        key, owner = draw.choice((KEY, OTHER)), draw.choice("xy")
        deadline = now + draw.choice((0.012, 0.03, 0.06, 5.0))
        rows = draw.randint(1, 20)
        singles: list[list[Ticket]] = [
            [Ticket(key, 1, 4, deadline, None, owner, DEFAULT) for _ in range(rows)]
            for _ in range(2)
        ]
        batch = short.at_once.begin(crowd(rows, deadline, owner, key), now)
        running = [] if batch is None else [batch.id]
        if batch is None:
            short.offer_all(singles[0], now)
            running = [each.batch.id for each in short.poll(now) if isinstance(each, Run)]
        taken += batch is not None
        long.offer_all(singles[1], now)
        same = [each.batch.id for each in long.poll(now) if isinstance(each, Run)]
        assert books(short, now) == books(long, now)
        now += draw.choice((0.001, 0.01, 0.1))
        for batcher, numbers in ((short, running), (long, same)):
            for number in numbers:
                batcher.finish(number, now)
            while batcher.has_waiting:  # what did not fit
                for effect in batcher.poll(now + 100.0):
                    if isinstance(effect, Run):
                        batcher.finish(effect.batch.id, now + 100.0)
            batcher.poll(now)
            batcher.check_invariants()
        assert books(short, now) == books(long, now)
        now += 100.0
    assert taken > 50


def test_the_batch_is_all_rows_in_the_smallest_size_that_holds_them() -> None:
    batcher = known(device())
    ticket = crowd(3, 105.0)
    batch = batcher.at_once.begin(ticket, 100.0)
    assert batch is not None
    assert (batch.bucket, batch.rows, batch.parts) == (4, 3, [(ticket, 0, 3)])
    assert batcher.finish(batch.id, 100.01) == [ticket]
    assert ticket.state is TicketState.FINISHED


def waiting(batcher: Batcher) -> None:
    batcher.offer(Ticket(OTHER, 16, 4, 200.0, None, "x", DEFAULT), 99.0)


def running(batcher: Batcher) -> None:
    batcher.offer(Ticket(OTHER, 1, 4, 200.0, None, "x", DEFAULT), 99.0)
    batcher.poll(99.0)


SPEAKS_AGAINST: dict[str, tuple[Callable[[Batcher], object], Ticket]] = {
    "rows that wait": (waiting, crowd(3, 105.0)),
    "a batch on the device": (running, crowd(3, 105.0)),
    "a lane that takes no more": (lambda batcher: batcher.drain_lane(KEY), crowd(3, 105.0)),
    "no such lane": (lambda batcher: None, crowd(3, 105.0, key=LaneKey("c"))),
    "an owner who was never here": (lambda batcher: None, crowd(3, 105.0, owner="z")),
    "more rows than any batch": (lambda batcher: None, crowd(17, 105.0)),
    "a deadline before the batch is back": (lambda batcher: None, crowd(3, 100.015)),
    "a deadline that is no number": (lambda batcher: None, crowd(3, float("nan"))),
    "rows that had better fill a smaller batch": (lambda batcher: None, crowd(5, 105.0)),
    "best-effort rows": (
        lambda batcher: None,
        Ticket(KEY, 3, 12, 105.0, None, "x", BEST_EFFORT, requests=3),
    ),
    "a policy that wants to be asked": (
        lambda batcher: batcher.use(RoundRobin()),
        crowd(3, 105.0),
    ),
    "more bytes than a line holds": (
        lambda batcher: None,
        Ticket(KEY, 3, 2 << 20, 105.0, None, "x", CRITICAL, requests=3),
    ),
}


@pytest.mark.parametrize("what", SPEAKS_AGAINST)
def test_what_speaks_against_it_changes_nothing(what: str) -> None:
    prepare, ticket = SPEAKS_AGAINST[what]
    batcher = known(device())
    prepare(batcher)
    before = books(batcher, 100.0)
    assert batcher.at_once.begin(ticket, 100.0) is None
    assert books(batcher, 100.0) == before
    assert ticket.state is TicketState.NEW


def test_what_is_taken_back_was_never_offered_but_took_its_time() -> None:
    batcher = known(device())
    before = batcher.stats().lanes[KEY].total
    ticket = crowd(3, 105.0)
    batch = batcher.at_once.begin(ticket, 100.0)
    assert isinstance(batch, Batch)
    batcher.at_once.undo(batch, 100.5)
    after = batcher.stats().lanes[KEY].total
    assert (after.offered, after.finished) == (before.offered, before.finished)
    assert batcher.stats().lanes[KEY].busy_s == pytest.approx(0.51)
    assert batcher.stats().in_flight == 0
    assert ticket.state is TicketState.NEW
