"""What is counted about tickets, lanes and the device, by example."""

from __future__ import annotations

from dataclasses import asdict
from math import inf, isnan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batching import (
    Batch,
    Batcher,
    Distribution,
    Histogram,
    Ladder,
    LaneKey,
    RoundRobin,
    Run,
    Ticket,
)
from batching.errors import DeadlineExceeded, ResourceExhausted, ServingError
from batching.line import Line
from batching.policy import Pick, Policy, Situation
from batching.refusals import LaneDraining, LaneFull, TooBusy
from batching.telemetry import TIME_BOUNDS

LANE = LaneKey("unit")


def batcher(sizes: tuple[int, ...] = (1, 4), credits: int = 2, rows_max: int = 8) -> Batcher:
    made = Batcher(RoundRobin(), credits)
    made.add_lane(LANE, Ladder(sizes), rows_max, 1 << 20, {size: 0.01 for size in sizes})
    return made


def offer(
    to: Batcher, now: float, rows: int = 1, deadline: float = inf, owner: str = "a"
) -> Ticket:
    ticket = Ticket(LANE, rows, 1, deadline, owner=owner)
    to.offer(ticket, now)
    return ticket


def poll(of: Batcher, now: float) -> list[int]:
    return [effect.batch.id for effect in of.poll(now) if isinstance(effect, Run)]


def filled(found: Distribution) -> dict[float, int]:
    """Upper bound of each bucket that holds values, and how many."""
    return {
        bound: count
        for bound, count in zip((*found.bounds, inf), found.counts, strict=True)
        if count
    }


def test_a_value_belongs_to_the_bucket_whose_bound_it_reaches() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        histogram.add(value)
    found = histogram.read()
    assert filled(found) == {1.0: 2, 2.0: 2, inf: 1}
    assert (found.count, found.total) == (5, 14.0)


def test_what_was_read_does_not_change_and_adds_up() -> None:
    histogram = Histogram((1.0,))
    before = histogram.read()
    histogram.add(0.5)
    assert before.count == 0
    assert (before + histogram.read() + histogram.read()).counts == [2, 0]


@given(st.lists(st.floats(1e-6, 60.0), min_size=1), st.floats(0.01, 1.0))
def test_a_quantile_lies_in_the_bucket_of_the_true_one(values: list[float], share: float) -> None:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    found = histogram.read().quantile(share)
    rank = next(n for n in range(1, len(values) + 1) if n >= share * len(values))
    true = sorted(values)[rank - 1]
    above = [bound for bound in TIME_BOUNDS if bound >= true]
    below = [bound for bound in TIME_BOUNDS if bound < true]
    assert (below[-1] if below else 0.0) <= found <= (above[0] if above else TIME_BOUNDS[-1])


def test_nothing_has_no_quantile() -> None:
    assert isnan(Histogram().read().quantile(0.5))


def test_the_queue_counts_each_ticket_once_when_its_last_row_has_left() -> None:
    device = batcher(sizes=(1, 2), credits=1)
    offer(device, 10.0, rows=3)
    [first] = poll(device, 10.0)
    [line] = device.stats().lanes[LANE].owners.values()
    assert (line.queue.count, line.tickets, line.rows) == (0, 1, 1)
    device.complete(first, 10.75)
    [second] = poll(device, 10.75)
    device.fail(second, RuntimeError("tried again"), 11.0)
    [line] = device.stats().lanes[LANE].owners.values()
    assert filled(line.queue) == {1.0: 1}
    assert line.queue.total == 0.75


def test_a_batch_waits_for_the_one_before_it_and_then_takes_the_device() -> None:
    device = batcher(sizes=(1,))
    offer(device, 10.0)
    offer(device, 10.0)
    first, second = poll(device, 10.0)
    device.complete(first, 10.25)
    device.complete(second, 10.75)
    stats = device.stats()
    lane = stats.lanes[LANE]
    assert filled(lane.wait) == {TIME_BOUNDS[0]: 1, 0.5: 1}
    assert lane.wait.total == 0.25
    assert filled(lane.device) == {0.5: 2}
    assert lane.device.total == lane.busy_s == stats.busy_s == 0.75
    assert stats.depths == (1, 1)


def test_rows_are_counted_by_the_size_that_they_ran_in() -> None:
    device = batcher(sizes=(1, 4))
    for rows, now in ((1, 10.0), (3, 11.0), (2, 12.0)):
        offer(device, now, rows=rows)
        [batch] = poll(device, now)
        device.complete(batch, now + 0.25)
    assert device.stats().lanes[LANE].runs == {1: (1, 1), 4: (2, 5)}


def test_owners_bear_the_padding_of_their_batches_by_rows() -> None:
    device = batcher(sizes=(4,))
    offer(device, 10.0, owner="a")
    offer(device, 10.0, rows=2, owner="b")
    [batch] = poll(device, 10.0)
    device.complete(batch, 10.75)
    owners = device.stats().lanes[LANE].owners
    assert {owner: line.tally.busy_s for owner, line in owners.items()} == {"a": 0.25, "b": 0.5}
    assert {owner: line.tally.padding_s for owner, line in owners.items()} == {
        "a": 0.0625,
        "b": 0.125,
    }


def test_one_owner_bears_all_padding() -> None:
    device = batcher(sizes=(4,))
    offer(device, 10.0, rows=3)
    [batch] = poll(device, 10.0)
    device.complete(batch, 11.0)
    assert device.stats().lanes[LANE].owners["a"].tally.padding_s == 0.25


def test_an_answer_after_its_deadline_is_finished_and_late() -> None:
    device = batcher(sizes=(1,), credits=2)
    offer(device, 10.0, deadline=10.5)
    offer(device, 10.0, deadline=10.5)
    in_time, late = poll(device, 10.0)
    device.complete(in_time, 10.5)
    device.complete(late, 10.75)
    tally = device.stats().lanes[LANE].owners["a"].tally
    assert (tally.offered, tally.finished, tally.late) == (2, 2, 1)


def test_refusals_are_counted_by_owner_and_cause() -> None:
    device = batcher(rows_max=2)
    offer(device, 10.0, rows=2)
    refused = [("a", 1, inf), ("a", 1, 9.0), ("b", 3, inf), ("b", 1, 10.0)]
    for owner, rows, deadline in refused:
        with pytest.raises(ServingError):
            offer(device, 10.0, rows=rows, deadline=deadline, owner=owner)
    device.drain_lane(LANE)
    with pytest.raises(ServingError):
        offer(device, 10.0, owner="b")
    lane = device.stats().lanes[LANE]
    first, second = (lane.owners[owner].tally for owner in ("a", "b"))
    assert (first.refused_full, first.refused_late, first.refused_other) == (1, 1, 0)
    assert (second.refused_full, second.refused_late, second.refused_other) == (0, 1, 2)
    assert lane.refused == first.refused + second.refused == 5
    assert first.live == 1


@pytest.mark.parametrize(
    ("error", "count"),
    [
        (LaneFull("full"), "refused_full"),
        (TooBusy("late"), "refused_admission"),
        (DeadlineExceeded("past"), "refused_late"),
        (LaneDraining("leaves"), "refused_other"),
        (ResourceExhausted("too many owners"), "refused_other"),
    ],
)
def test_every_refusal_has_one_cause(error: ServingError, count: str) -> None:
    line = Line("a", 8, 8)
    line.count_refusal(error)
    found = {name: number for name, number in asdict(line.stats().tally).items() if number}
    assert found == {count: 1}


class Drops(Policy):
    """Gives up the second ticket as hopeless, and the third for the first one's sake."""

    def added(self, key: LaneKey) -> None:
        """A lane is there."""

    def removed(self, key: LaneKey) -> None:
        """A lane is gone."""

    def landed(self, batch: Batch, now: float) -> None:
        """A batch is back."""

    def pick(self, situation: Situation) -> Pick | None:
        """The one lane."""
        [(key, lane)] = situation.lanes.items()
        _, hopeless, dropped = lane.tickets()
        return Pick(key, 1, hopeless=(hopeless,), dropped=(dropped,))


def test_what_is_shed_is_counted_by_why() -> None:
    device = Batcher(Drops(), 1)
    device.add_lane(LANE, Ladder((1,)), 8, 1 << 20)
    for owner in "abc":
        offer(device, 10.0, owner=owner)
    poll(device, 10.0)
    owners = device.stats().lanes[LANE].owners
    found = {owner: (line.tally.shed, line.tally.hopeless) for owner, line in owners.items()}
    assert found == {"a": (0, 0), "b": (1, 1), "c": (1, 0)}


def test_an_estimate_is_held_against_what_the_batch_took() -> None:
    device = batcher(sizes=(1,))
    offer(device, 10.0)
    [batch] = poll(device, 10.0)
    device.complete(batch, 10.02)  # twice what was expected, so half of it was missing
    error = device.stats().lanes[LANE].error
    assert error.count == 1
    assert error.total == pytest.approx(0.5, abs=0.01)


def test_seconds_of_the_device_outlive_their_lane_and_shares_name_who_has_a_line() -> None:
    device = batcher(sizes=(1,))
    offer(device, 10.0)
    [batch] = poll(device, 10.0)
    device.complete(batch, 10.5)
    assert device.stats().shares == {"a": pytest.approx(0.5)}
    device.remove_lane(LANE)
    stats = device.stats()
    assert (stats.busy_s, stats.lanes, stats.shares) == (0.5, {}, {})
