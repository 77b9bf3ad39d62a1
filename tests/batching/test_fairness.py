"""How long an owner in share waits, whatever the others want: held in virtual time.

The statement is the design's: the rows of an owner that asks for less than its share are delayed by
the guard, by one batch of the longest (what has begun is not stopped) and by their own batch.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batching import EffSafe, FirstCome, Ladder, LaneKey, Policy
from batching.allowance import BEST_EFFORT, Allowance
from batching.batcher import Batcher
from batching.simulation import Arrival, Report, SimulatedLane, simulate
from batching.values import Run, Ticket
from batching.workloads import merged

MODEST = LaneKey("modest")
SIZES = Ladder((1, 64))

#: Milliseconds of a batch, whatever its size.
lengths = st.integers(1, 20)


def beside_floods(
    policy: Policy, own: int, floods: list[int], gaps: list[int], in_flight_max: int
) -> Report:
    """One owner's requests, now and then, beside lanes that never run out of rows."""
    guard, longest = max(floods), max(own, *floods)
    budget_s = (guard + in_flight_max * longest + own) / 1000
    lanes = [SimulatedLane(key=MODEST, ladder=SIZES)]
    took = {MODEST: own / 1000}
    streams = []
    seconds = sum(gaps) / 1000 + 1.0
    for number, length in enumerate(floods):
        key = LaneKey(f"flood-{number}")
        lanes.append(SimulatedLane(key=key, ladder=SIZES, rows_max=1 << 30))
        took[key] = length / 1000
        streams.append([Arrival(0.0, key, key.unit, 64 * int(seconds * 1000))])
    at = 0.0
    wanted = []
    for gap in gaps:
        at += gap / 1000
        wanted.append(Arrival(at, MODEST, "modest", 1, budget_s))
    return simulate(
        policy,
        lanes,
        merged(wanted, *streams),
        lambda key, bucket: took[key],
        in_flight_max=in_flight_max,
    )


@settings(max_examples=20, deadline=None)
@given(
    lengths,
    st.lists(lengths, min_size=1, max_size=3),
    st.lists(st.integers(0, 60), min_size=1, max_size=10),
    st.integers(1, 2),
)
def test_an_owner_in_share_waits_for_the_guard_one_batch_and_its_own(
    own: int, floods: list[int], gaps: list[int], in_flight_max: int
) -> None:
    report = beside_floods(EffSafe(), own, floods, gaps, in_flight_max)
    assert report.owners["modest"].good == len(gaps)


def test_in_order_of_arrival_it_would_wait_for_all() -> None:
    report = beside_floods(FirstCome(), 5, [10], [1, 20, 20], 1)
    assert report.owners["modest"].good == 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 8)), min_size=1, max_size=30),
    st.tuples(*[st.sampled_from((0.5, 1.0, 2.0, 4.0))] * 3),
)
def test_device_time_is_charged_once_and_by_weight(
    offers: list[tuple[str, int]], weights: tuple[float, float, float]
) -> None:
    """Virtual times by weight add up to what the device did for rows that claim a share."""
    batcher = Batcher(EffSafe(), 1, credit_s=1e9)
    batcher.add_lane(MODEST, Ladder((1, 4, 16)), 1000, 1 << 30, {1: 0.5, 4: 1.0, 16: 2.0})
    for owner, weight in zip("abc", weights, strict=True):
        batcher.allow(owner, Allowance(weight=weight))
        # So that nobody's time is moved up to the others' when it comes back.
        batcher.shares.wake(owner)
    claimed_s = now = 0.0
    for number, (owner, rows) in enumerate(offers):
        priority = BEST_EFFORT if number % 5 == 4 else 0
        batcher.offer(Ticket(MODEST, rows, 0, 1e9, owner=owner, priority=priority), now)
        if number % 3:
            continue
        for effect in batcher.poll(now):
            assert isinstance(effect, Run)
            now += 0.75
            batcher.complete(effect.batch.id, now)
            if effect.batch.spare_rows < effect.batch.rows:
                claimed_s += 0.75
    times = [batcher.shares.time_of(owner) for owner in "abc"]
    total = sum(time * weight for time, weight in zip(times, weights, strict=True))
    assert total == pytest.approx(claimed_s)


@pytest.mark.parametrize("weight", [0.5, 1.0, 3.0])
def test_where_not_all_can_be_in_time_servables_get_their_weights_worth(weight: float) -> None:
    """Two servables want twice what there is, all the time."""
    batcher = Batcher(EffSafe(), 1)
    lanes = [LaneKey("heavy"), LaneKey("light")]
    for key in lanes:
        batcher.add_lane(key, Ladder((1, 16)), 4096, 1 << 30, {1: 0.010, 16: 0.010})
    batcher.allow("heavy", Allowance(weight=weight))
    now = 0.0
    done = dict.fromkeys(lanes, 0.0)
    for _ in range(400):
        for key in lanes:
            batcher.offer(Ticket(key, 16, 0, now + 0.035, owner=key.unit), now)
        runs = [effect for effect in batcher.poll(now) if isinstance(effect, Run)]
        now += 0.010
        for run in runs:
            done[run.batch.lane] += 1
            batcher.complete(run.batch.id, now)
    share = done[lanes[0]] / sum(done.values())
    assert share == pytest.approx(weight / (weight + 1.0), abs=0.02)
