"""Joins: parts that come before, after, twice, or from somebody else; bounds, deadlines, ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shards.joining import (
    Complete,
    Effect,
    JoinBounds,
    Joins,
    Opening,
    Part,
    Place,
    Refused,
)
from shards.replies import UNJOINED
from shards.wire import Awaited

AWAITED = (Awaited("shard-0", 7, 3, "plan", 0), Awaited("shard-1", 8, 2, "plan", 0))


def opening(number: int = 1, **changes: Any) -> Opening:
    given: dict[str, Any] = {
        "number": number, "epoch": 4, "parts": AWAITED, "nbytes": 100, "deadline": 10.0,
        "owner": f"join {number}",
    }  # fmt: skip
    return Opening(**{**given, **changes})


def part(slot: int = 0, number: int = 1, **changes: Any) -> Part:
    wanted = AWAITED[slot] if slot < len(AWAITED) else AWAITED[0]
    given: dict[str, Any] = {
        "number": number, "slot": slot, "actor": wanted.actor, "generation": wanted.generation,
        "epoch": 4, "plan": "plan", "rows": wanted.rows, "nbytes": 10, "deadline": 10.0,
        "payload": f"rows {slot}",
    }  # fmt: skip
    return Part(**{**given, **changes})


def test_a_join_is_complete_with_its_last_part_in_whatever_order_they_come() -> None:
    for order in ([0, 1], [1, 0]):
        joins = Joins()
        assert joins.open(opening(), 0.0) == []
        first, last = (part(slot) for slot in order)
        assert joins.arrive(first, 0.0) == [Place("join 1", first.slot, first.payload)]
        placed = Place("join 1", last.slot, last.payload)
        assert joins.arrive(last, 0.0) == [placed, Complete("join 1")]
        assert joins.is_idle


def test_parts_that_come_before_their_join_are_placed_when_it_opens() -> None:
    joins = Joins()
    assert joins.arrive(part(1), 0.0) == []
    assert joins.arrive(part(0), 0.0) == []
    assert joins.open(opening(), 0.0) == [
        Place("join 1", 1, "rows 1"), Place("join 1", 0, "rows 0"), Complete("join 1"),
    ]  # fmt: skip
    assert joins.is_idle
    assert (joins.stats.early, joins.stats.completed) == (2, 1)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"generation": 6}, "generation 6"),
        ({"actor": "shard-9"}, "shard-9"),
        ({"epoch": 3}, "epoch 3 for a request of epoch 4"),
        ({"plan": "other"}, "plan other, not by plan"),
        ({"plan": ""}, "plan none"),
        ({"rows": 4}, "4 rows where 3"),
        ({"slot": 2}, "not awaited"),
    ],
)
@pytest.mark.parametrize("comes_first", [False, True])
def test_a_part_that_is_not_what_is_awaited_is_never_merged_and_ends_the_join(
    changes: dict[str, Any], text: str, comes_first: bool
) -> None:
    joins = Joins()
    wrong = part(**{"slot": 0, **changes})
    effects = joins.arrive(wrong, 0.0) if comes_first else joins.open(opening(), 0.0)
    assert effects == []
    [refused] = joins.open(opening(), 0.0) if comes_first else joins.arrive(wrong, 0.0)
    assert isinstance(refused, Refused)
    assert refused.code == UNJOINED
    assert text in refused.message
    assert joins.arrive(part(1), 0.0) == []
    assert (joins.stats.mismatched, joins.stats.late) == (1, 1)


def test_a_part_said_twice_ends_the_join() -> None:
    joins = Joins()
    joins.open(opening(), 0.0)
    joins.arrive(part(0), 0.0)
    [refused] = joins.arrive(part(0), 0.0)
    assert isinstance(refused, Refused)


def test_parts_of_a_join_that_was_closed_are_dropped() -> None:
    joins = Joins()
    joins.open(opening(), 0.0)
    joins.close(1)
    assert joins.arrive(part(0), 0.0) == []
    assert joins.stats.late == 1
    joins.poll(10.0)
    assert joins.is_idle


def test_a_join_ends_at_its_deadline_and_not_before() -> None:
    joins = Joins()
    joins.open(opening(), 0.0)
    assert joins.poll(9.999) == []
    [refused] = joins.poll(10.0)
    assert isinstance(refused, Refused)
    assert refused.code == "DEADLINE_EXCEEDED"
    assert joins.is_idle
    assert joins.arrive(part(0), 10.0) == []
    assert joins.is_idle, "a part that is as late is held for nobody"


def test_what_comes_past_its_deadline_is_not_held() -> None:
    joins = Joins()
    assert joins.arrive(part(0), 10.0) == []
    [refused] = joins.open(opening(), 10.0)
    assert isinstance(refused, Refused)
    assert refused.code == "DEADLINE_EXCEEDED"


def test_a_broken_link_ends_the_joins_that_still_await_that_process() -> None:
    joins = Joins()
    joins.open(opening(1), 0.0)
    joins.open(opening(2), 0.0)
    joins.arrive(part(1, number=2), 0.0)
    assert joins.lose("shard-1", 7) == [], "another generation of it was asked"
    [refused] = joins.lose("shard-1", 8)
    assert isinstance(refused, Refused)
    assert (refused.owner, refused.code) == ("join 1", UNJOINED)
    assert joins.arrive(part(0, number=2), 0.0)[-1] == Complete("join 2")


@pytest.mark.parametrize(
    ("bounds", "changes"),
    [
        (JoinBounds(joins_max=1), {}),
        (JoinBounds(bytes_max=199), {}),
    ],
)
def test_beyond_its_bounds_a_join_is_refused_and_may_come_back(
    bounds: JoinBounds, changes: dict[str, Any]
) -> None:
    joins = Joins(bounds)
    assert joins.open(opening(1), 0.0) == []
    [refused] = joins.open(opening(2), 0.0)
    assert isinstance(refused, Refused)
    assert refused.code == "RESOURCE_EXHAUSTED"
    assert refused.retry_after_ms > 0
    joins.close(1)
    assert joins.open(opening(3), 0.0) == []


@pytest.mark.parametrize("bounds", [JoinBounds(early_max=1), JoinBounds(early_bytes_max=19)])
def test_a_join_whose_early_part_found_no_room_is_refused_when_it_opens(
    bounds: JoinBounds,
) -> None:
    joins = Joins(bounds)
    joins.arrive(part(0, number=1), 0.0)
    joins.arrive(part(0, number=2), 0.0)
    assert joins.stats.overflowed == 1
    [refused] = joins.open(opening(2), 0.0)
    assert isinstance(refused, Refused)
    assert refused.code == UNJOINED
    assert joins.open(opening(1), 0.0) == [Place("join 1", 0, "rows 0")]


def test_a_join_without_parts_or_with_a_number_that_is_taken_is_refused() -> None:
    joins = Joins()
    joins.open(opening(1), 0.0)
    for bad in (opening(1, owner="second"), opening(2, parts=())):
        [refused] = joins.open(bad, 0.0)
        assert isinstance(refused, Refused)
        assert refused.code == "INVALID_ARGUMENT"
    assert joins.arrive(part(0), 0.0), "the first was harmed by the second"


class JoinsMachine(RuleBasedStateMachine):
    """Against a model that knows what was sent: a join completes with exactly its own parts."""

    def __init__(self) -> None:
        super().__init__()
        bounds = JoinBounds(
            joins_max=4, bytes_max=400, early_max=5, early_bytes_max=40, ended_max=6
        )
        self.joins = Joins(bounds)
        self.now = 0.0
        #: numbers of joins to what was placed in them, while they live
        self.live: dict[int, dict[int, object]] = {}
        self.ended: dict[int, str] = {}
        self.right: dict[int, set[int]] = {}

    def carry_out(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            number = effect.owner
            assert isinstance(number, int)
            assert number not in self.ended, "a join was told of after its end"
            match effect:
                case Place(_, slot, payload):
                    assert payload == (number, slot), "rows of another join, or in another place"
                    assert slot not in self.live[number]
                    self.live[number][slot] = payload
                case Complete():
                    assert self.live.pop(number).keys() == {0, 1}
                    self.ended[number] = "OK"
                case Refused():
                    self.live.pop(number, None)
                    self.ended[number] = effect.code

    @rule(number=st.integers(0, 12), wait=st.sampled_from([0.5, 5.0]))
    def open(self, number: int, wait: float) -> None:
        if number in self.live or number in self.ended:
            return
        self.live[number] = {}
        self.carry_out(
            self.joins.open(opening(number, owner=number, deadline=self.now + wait), self.now)
        )

    @rule(number=st.integers(0, 12), slot=st.integers(0, 1), lie=st.integers(0, 9))
    def arrive(self, number: int, slot: int, lie: int) -> None:
        changes: dict[str, Any] = {"generation": 1} if lie == 0 else {}
        came = part(slot, number, deadline=self.now + 2.0, payload=(number, slot), **changes)
        effects = self.joins.arrive(came, self.now)
        assert not (lie == 0 and any(isinstance(each, Place) for each in effects))
        self.carry_out(effects)

    @rule(number=st.integers(0, 12))
    def close(self, number: int) -> None:
        self.joins.close(number)
        if self.live.pop(number, None) is not None:
            self.ended[number] = "CLOSED"

    @rule(slot=st.integers(0, 1))
    def lose(self, slot: int) -> None:
        gone = AWAITED[slot]
        self.carry_out(self.joins.lose(gone.actor, gone.generation))
        assert all(slot in placed for placed in self.live.values())

    @rule(passes=st.sampled_from([0.1, 1.0, 6.0]))
    def wait(self, passes: float) -> None:
        self.now += passes
        self.carry_out(self.joins.poll(self.now))

    @precondition(lambda self: not self.live)
    @rule()
    def everything_is_forgotten_in_time(self) -> None:
        self.now += 10.0
        self.carry_out(self.joins.poll(self.now))
        self.joins.poll(self.now)
        assert self.joins.is_idle

    @invariant()
    def holds_together(self) -> None:
        self.joins.check_invariants()
        assert len(self.live) == len(self.joins._open)


TestJoinsMachine = JoinsMachine.TestCase
TestJoinsMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
