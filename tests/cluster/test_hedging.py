"""When a call is asked a second time: the times it is learned from, and the budget."""

from __future__ import annotations

import random

import pytest

from cluster.hedging import SHARE, Hedging


def learned(hedging: Hedging, shard: str = "s", seconds: float = 0.004, count: int = 64) -> None:
    for number in range(count):
        slot = hedging.asked(shard, -number, 0.0)
        hedging.answered(shard, -number, slot, seconds)


def test_nothing_is_late_before_enough_answers_have_come() -> None:
    hedging = Hedging()
    learned(hedging, count=63)
    assert hedging.asked("s", 1, 0.0) == -1
    learned(hedging, count=1)
    assert hedging.asked("s", 2, 0.0) > 0


def test_a_call_is_late_after_twice_what_nine_of_ten_need() -> None:
    hedging = Hedging()
    learned(hedging, seconds=0.004)
    slot = hedging.asked("s", 1, 10.0)
    assert 0.008 <= hedging.wakes_at(slot) - 10.0 <= 0.008 * 2**0.25 + 0.0011
    assert hedging.late(10.0079) == []
    assert hedging.late(10.011) == [1]
    assert hedging.late(11.0) == []


def test_slow_answers_of_a_few_do_not_put_it_off() -> None:
    hedging = Hedging()
    for number in range(512):
        slot = hedging.asked("s", number, 0.0)
        hedging.answered("s", number, slot, 0.050 if number % 20 == 0 else 0.001)
    slot = hedging.asked("s", 1000, 10.0)
    assert hedging.wakes_at(slot) - 10.0 < 0.005


def test_what_a_shard_needs_now_outweighs_what_it_needed() -> None:
    hedging = Hedging()
    learned(hedging, seconds=0.001, count=2000)
    learned(hedging, seconds=0.020, count=2000)
    slot = hedging.asked("s", 1, 10.0)
    assert hedging.wakes_at(slot) - 10.0 >= 0.040


def test_each_shard_has_times_of_its_own() -> None:
    hedging = Hedging()
    learned(hedging, "quick", seconds=0.001)
    learned(hedging, "slow", seconds=0.100)
    assert hedging.asked("unknown", 1, 0.0) == -1
    quick, slow = hedging.asked("quick", 2, 10.0), hedging.asked("slow", 3, 10.0)
    assert hedging.wakes_at(quick) < 10.01 < 10.2 <= hedging.wakes_at(slow)


def test_what_was_answered_is_not_late() -> None:
    hedging = Hedging()
    learned(hedging)
    slot = hedging.asked("s", 1, 10.0)
    hedging.answered("s", 1, slot, 0.003)
    assert hedging.next_wakeup() is None
    assert hedging.late(20.0) == []


@pytest.mark.parametrize("seed", range(5))
def test_there_are_never_more_second_calls_than_the_budget_allows(seed: int) -> None:
    chance = random.Random(seed)
    hedging = Hedging()
    calls = spent = 0
    for _ in range(20_000):
        if chance.random() < 0.5:
            hedging.asked("s", calls, 0.0)
            calls += 1
        else:
            spent += hedging.spend()
        assert spent <= SHARE * calls + 1e-6
    assert spent > 0.9 * SHARE * calls


def test_little_is_saved_up_while_nothing_is_late() -> None:
    hedging = Hedging()
    learned(hedging, count=10_000)
    assert sum(hedging.spend() for _ in range(100)) == 10
