"""The choice of the next batch: rows a second, as long as nobody in share is made late by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batching import EffSafe, Ladder, LaneKey, Pick, Situation, Ticket
from batching.allowance import BEST_EFFORT
from batching.costs import LaneCosts
from batching.deadlines import Deadlines
from batching.errors import InvalidArgument
from batching.lane import Lane
from batching.shares import Shares
from tests.batching.plain_effsafe import plainly_picked

START = 100.0
SIZES = (1, 4, 16)


class Device:
    """Lanes with rows, in front of a device that is free at `START`."""

    def __init__(self, credit_s: float = 1.0) -> None:
        self.shares = Shares(credit_s)
        self.lanes: dict[LaneKey, Lane] = {}
        self._numbers = 0

    def put(
        self,
        name: str,
        rows: int,
        left: float,
        cost: float = 1.0,
        a_row: float = 0.0,
        owner: str = "",
        priority: int = 0,
    ) -> LaneKey:
        """One ticket in a lane of its own, whose batches cost so much and so much a row."""
        key = LaneKey(name)
        if key not in self.lanes:
            costs = LaneCosts(Ladder(SIZES), {size: cost + a_row * size for size in SIZES})
            self.lanes[key] = Lane(key, costs, 1000, 1000, Deadlines(), self.shares, {})
        self._numbers += 1
        ticket = Ticket(key, rows, 0, START + left, name, owner or name, priority)
        self.lanes[key].admit(ticket, self._numbers, 1)
        return key

    def pick(self, guard_s: float | None = 0.0) -> Pick | None:
        situation = Situation(START, START, self.lanes, self.shares)
        return EffSafe(guard_s).pick(situation)

    def picked(self, guard_s: float | None = 0.0) -> str:
        found = self.pick(guard_s)
        assert found is not None
        assert found.key is not None
        return found.key.unit


def test_the_most_rows_a_second_run_where_nobody_is_in_a_hurry() -> None:
    device = Device()
    device.put("few", 1, inf)
    device.put("many", 16, inf)
    assert device.picked() == "many"


def test_a_batch_that_would_make_another_late_waits() -> None:
    device = Device()
    device.put("urgent", 1, 1.5)
    device.put("many", 16, inf)
    assert device.picked() == "urgent"


def test_a_batch_that_leaves_the_other_in_time_runs_first() -> None:
    device = Device()
    device.put("urgent", 1, 2.0)
    device.put("many", 16, inf)
    assert device.picked() == "many"


def test_a_guard_keeps_time_to_spare() -> None:
    device = Device()
    device.put("urgent", 1, 2.0)
    device.put("many", 16, inf)
    assert device.picked(guard_s=0.1) == "urgent"


def test_by_itself_the_guard_is_what_a_row_of_the_dearest_other_lane_costs() -> None:
    device = Device()
    device.put("urgent", 1, 2.4)
    device.put("many", 16, inf)
    device.put("dear", 1, inf, cost=0.5)
    assert device.picked(guard_s=None) == "urgent"  # 1 s and a guard of 1 s leave no time for it
    device = Device()
    device.put("urgent", 1, 3.1)
    device.put("many", 16, inf)
    assert device.picked(guard_s=None) == "many"


def test_all_others_in_share_are_protected_together() -> None:
    """Each alone could wait a second; both one after the other cannot."""
    device = Device()
    device.put("first", 1, 2.5)
    device.put("second", 1, 2.5)
    device.put("many", 16, inf)
    assert device.picked() in ("first", "second")


def test_where_not_all_can_be_in_time_an_owner_out_of_share_is_not_protected() -> None:
    device = Device(credit_s=0.5)
    device.put("greedy", 1, 1.5)
    device.put("modest", 1, 1.6)
    assert device.picked() == "greedy"
    device.shares.charge("greedy", 2.0)
    assert device.picked() == "modest"


def test_where_there_is_room_an_owner_out_of_share_is_in_time_too() -> None:
    device = Device(credit_s=0.5)
    device.put("greedy", 1, 1.5)
    device.put("many", 16, inf)
    device.shares.charge("greedy", 2.0)
    assert device.picked() == "greedy"


def test_an_owner_out_of_share_still_runs_when_that_is_the_best_use() -> None:
    device = Device(credit_s=0.5)
    device.put("greedy", 16, 50.0)
    device.put("modest", 1, 50.0)
    device.shares.charge("greedy", 5.0)
    assert device.picked() == "greedy"


def test_where_not_all_can_be_in_time_least_slack_goes_first() -> None:
    device = Device()
    device.put("a", 1, 1.5)
    device.put("b", 1, 1.2)
    device.put("c", 1, 1.4)
    assert device.picked() == "b"


def test_hopeless_tickets_are_given_up_whoever_is_picked() -> None:
    device = Device()
    device.put("late", 1, 0.5)
    device.put("fine", 1, 9.0)
    found = device.pick()
    assert found is not None
    assert found.key == LaneKey("fine")
    assert [ticket.payload for ticket in found.hopeless] == ["late"]


def test_a_head_that_costs_its_lane_a_large_batch_is_given_up_only_if_the_lane_is_picked() -> None:
    device = Device()
    device.put("slow", 1, 2.0, cost=1.0, a_row=1.0)  # alone it takes 2 s, in time; with others not
    for _ in range(3):
        device.put("slow", 1, 50.0)
    device.put("quick", 16, inf, cost=0.1)
    found = device.pick()
    assert found is not None
    assert found.key == LaneKey("quick")
    assert found.dropped == ()


def test_with_nothing_but_hopeless_tickets_nothing_runs() -> None:
    device = Device()
    device.put("late", 1, 0.5)
    found = device.pick()
    assert found is not None
    assert (found.key, len(found.hopeless)) == (None, 1)


@given(
    st.dictionaries(
        st.sampled_from("abcdef"),
        st.tuples(
            st.integers(1, 16),
            st.one_of(st.floats(0.5, 30.0), st.just(inf)),
            st.floats(0.1, 4.0),
            st.booleans(),
        ),
        min_size=1,
    )
)
def test_a_pick_never_makes_a_lane_in_share_late_if_another_would_not(
    drawn: Mapping[str, tuple[int, float, float, bool]],
) -> None:
    """Held against the definition: try every lane first, then run the rest by deadline."""
    device = Device(credit_s=0.5)
    for name, (rows, left, cost, greedy) in drawn.items():
        device.put(name, rows, left, cost)
        if greedy:
            device.shares.charge(name, 9.0)
    found = device.pick()
    assert found is not None
    offers = {
        key: lane.costs.of_rows(lane.rows)
        for key, lane in device.lanes.items()
        if START + lane.costs.of_rows(lane.rows) <= next(lane.tickets()).deadline
    }
    protected = [key for key in offers if device.lanes[key].heads()[1] < inf]

    def keeps(first: LaneKey) -> bool:
        others = sorted(
            (next(device.lanes[key].tickets()).deadline, offers[key])
            for key in protected
            if key != first
        )
        at = START + offers[first]
        for deadline, cost in others:
            at += cost
            if at > deadline + 1e-9:
                return False
        return True

    safe: Sequence[LaneKey] = [key for key in offers if keeps(key)]
    if safe:
        assert found.key is not None
        assert keeps(found.key)


#: Numbers that are exact in binary, so that the order of a sum does not matter.
QUARTERS = st.integers(1, 60).map(lambda number: number / 4)


@settings(max_examples=300)
@given(
    lanes=st.lists(
        st.lists(
            st.tuples(
                st.integers(1, 9),
                st.one_of(st.integers(2, 40).map(float), st.just(inf)),
                st.sampled_from((BEST_EFFORT, 0, 0, 1)),
                st.integers(0, 2),
            ),
            min_size=1,
            max_size=4,
        ),
        min_size=2,
        max_size=6,
    ),
    curves=st.lists(st.tuples(QUARTERS, QUARTERS), min_size=6, max_size=6),
    charged=st.lists(st.integers(0, 8), min_size=3, max_size=3),
    weight=st.sampled_from((1.0, 2.0)),
    retried=st.integers(0, 5),
    guard_s=st.sampled_from((None, 0.0, 0.5)),
)
def test_a_pick_is_what_the_rule_says_word_by_word(
    lanes: Sequence[Sequence[tuple[int, float, int, int]]],
    curves: Sequence[tuple[float, float]],
    charged: Sequence[int],
    weight: float,
    retried: int,
    guard_s: float | None,
) -> None:
    device = Device()
    device.shares.set_weight("owner-1", weight)
    for number, tickets in enumerate(lanes):
        cost, a_row = curves[number]
        for rows, left, priority, owner in tickets:
            device.put(
                f"lane-{number}", rows, left, cost / 4, a_row / 16,
                owner=f"owner-{number % 2 + owner}", priority=priority,
            )  # fmt: skip
    lane = device.lanes.get(LaneKey(f"lane-{retried}"))
    if lane is not None:
        parts, _, _ = lane.take(2, START)
        lane.return_for_retry(parts)
    for owner, seconds in enumerate(charged):
        device.shares.charge(f"owner-{owner}", seconds)
    situation = Situation(START, START, device.lanes, device.shares)
    assert device.pick(guard_s) == plainly_picked(situation, guard_s)


def test_a_guard_is_not_negative() -> None:
    with pytest.raises(InvalidArgument, match="a guard is at least 0"):
        EffSafe(-0.1)
