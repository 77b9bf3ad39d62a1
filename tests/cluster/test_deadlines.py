"""The deadline wheel against a dictionary of deadlines."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cluster.deadlines import DeadlineWheel

TICKS = (0.001, 0.005, 0.01, 0.25)


@given(deadline=st.floats(0.0, 1e7), tick_s=st.sampled_from(TICKS), early=st.floats(1e-6, 1.0))
def test_a_key_expires_within_a_tick_of_its_deadline_and_never_early(
    deadline: float, tick_s: float, early: float
) -> None:
    wheel: DeadlineWheel[str] = DeadlineWheel(tick_s)
    wheel.add("key", deadline)
    assert wheel.expired(deadline - early) == []
    assert wheel.expired(deadline + tick_s * 1.001 + 1e-6) == ["key"]


@given(slot=st.integers(1, 10**9), tick_s=st.sampled_from(TICKS))
def test_at_the_wakeup_something_expires_however_the_floats_round(slot: int, tick_s: float) -> None:
    wheel: DeadlineWheel[str] = DeadlineWheel(tick_s)
    wheel.add("key", (slot - 0.5) * tick_s)
    wakeup = wheel.next_wakeup()
    assert wakeup is not None
    assert wheel.expired(wakeup) == ["key"]


def test_before_the_wakeup_nothing_expires() -> None:
    wheel: DeadlineWheel[str] = DeadlineWheel()
    wheel.add("key", 7.0)
    wakeup = wheel.next_wakeup()
    assert wakeup is not None
    assert wheel.expired(wakeup - 1e-6) == []


def test_keys_expire_in_the_order_of_their_ticks() -> None:
    wheel: DeadlineWheel[str] = DeadlineWheel(1.0)
    for key, deadline in (("late", 9.5), ("early", 1.5), ("middle", 5.5)):
        wheel.add(key, deadline)
    assert wheel.expired(100.0) == ["early", "middle", "late"]


def test_an_empty_wheel_has_no_wakeup() -> None:
    wheel: DeadlineWheel[str] = DeadlineWheel()
    slot = wheel.add("key", 1.0)
    wheel.remove("key", slot)
    assert wheel.next_wakeup() is None


def test_removing_what_has_expired_is_fine() -> None:
    wheel: DeadlineWheel[str] = DeadlineWheel()
    slot = wheel.add("key", 1.0)
    assert wheel.expired(2.0) == ["key"]
    wheel.remove("key", slot)
    assert len(wheel) == 0


@pytest.mark.parametrize("count", [1, 1000])
def test_a_removed_key_leaves_nothing_behind(count: int) -> None:
    wheel: DeadlineWheel[int] = DeadlineWheel()
    slots = [wheel.add(key, 1.0 + key * 0.01) for key in range(count)]
    for key, slot in enumerate(slots):
        wheel.remove(key, slot)
    assert not wheel._slots


class WheelMachine(RuleBasedStateMachine):
    """The same calls to a wheel and to a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.wheel: DeadlineWheel[int] = DeadlineWheel(0.5)
        self.slots: dict[int, int] = {}
        self.deadlines: dict[int, float] = {}
        self.now = 1000.0
        self.number = 0

    @rule(after=st.floats(-2.0, 20.0))
    def add(self, after: float) -> None:
        self.number += 1
        self.deadlines[self.number] = self.now + after
        self.slots[self.number] = self.wheel.add(self.number, self.now + after)

    @precondition(lambda self: self.deadlines)
    @rule(pick=st.randoms(use_true_random=False))
    def remove(self, pick: object) -> None:
        key = pick.choice(sorted(self.deadlines))  # type: ignore[attr-defined]
        self.wheel.remove(key, self.slots[key])
        del self.deadlines[key]

    @rule(by=st.floats(0.0, 10.0))
    def advance(self, by: float) -> None:
        self.now += by
        expired = set(self.wheel.expired(self.now))
        surely = {key for key, deadline in self.deadlines.items() if deadline + 0.5 <= self.now}
        maybe = {key for key, deadline in self.deadlines.items() if deadline <= self.now}
        assert surely <= expired <= maybe
        for key in expired:
            del self.deadlines[key]

    @invariant()
    def counts_agree(self) -> None:
        assert len(self.wheel) == len(self.deadlines)

    @invariant()
    def wakes_up_in_time(self) -> None:
        wakeup = self.wheel.next_wakeup()
        if self.deadlines:
            assert wakeup is not None
            assert wakeup <= min(self.deadlines.values()) + 0.5


TestWheelMachine = WheelMachine.TestCase
