"""When a call is asked a second time: the times it is learned from, and the budget."""

from __future__ import annotations

import random
from math import inf

import pytest

from cluster.hedging import SHARE, Hedging, Shard


def learned(hedging: Hedging, name: str = "s", seconds: float = 0.004, count: int = 64) -> Shard:
    shard = hedging.shard(name)
    for _ in range(count):
        shard.answered(seconds)
    return shard


def test_nothing_is_late_before_enough_answers_have_come() -> None:
    hedging = Hedging()
    shard = learned(hedging, count=63)
    hedging.asked(shard, 1, 0.0)
    assert hedging.wakes_at == inf
    learned(hedging, count=1)
    hedging.asked(shard, 2, 0.0)
    assert hedging.late(1.0, {1, 2}) == [2]


def test_a_call_is_late_after_twice_what_nine_of_ten_need() -> None:
    hedging = Hedging()
    hedging.asked(learned(hedging, seconds=0.004), 1, 10.0)
    assert hedging.wakes_at == pytest.approx(10.008)
    assert hedging.late(10.0079, {1}) == []
    assert hedging.wakes_at == pytest.approx(10.008)
    assert hedging.late(10.0081, {1}) == [1]
    assert hedging.late(11.0, {1}) == []
    assert hedging.wakes_at == inf


def test_slow_answers_of_a_few_do_not_put_it_off() -> None:
    hedging = Hedging()
    shard = hedging.shard("s")
    for number in range(512):
        shard.answered(0.050 if number % 20 == 0 else 0.001)
    assert shard.wait_s == pytest.approx(0.002)


def test_what_a_shard_needs_now_outweighs_what_it_needed() -> None:
    hedging = Hedging()
    learned(hedging, seconds=0.001, count=2000)
    assert learned(hedging, seconds=0.020, count=2000).wait_s == pytest.approx(0.040, rel=0.01)


def test_each_shard_has_times_of_its_own() -> None:
    hedging = Hedging()
    hedging.asked(hedging.shard("unknown"), 1, 10.0)
    hedging.asked(learned(hedging, "slow", seconds=0.100), 2, 10.0)
    hedging.asked(learned(hedging, "quick", seconds=0.001), 3, 10.0)
    assert hedging.late(10.01, {1, 2, 3}) == [3]
    assert hedging.wakes_at == pytest.approx(10.2)
    assert hedging.late(11.0, {1, 2, 3}) == [2]


def test_what_was_answered_is_not_late_and_holds_up_nobody_behind_it() -> None:
    hedging = Hedging()
    shard = learned(hedging)
    for number in range(4):
        hedging.asked(shard, number, 10.0 + number)
    assert hedging.late(20.0, {1, 3}) == [1, 3]
    assert not shard.watched


def test_of_what_was_answered_nothing_is_kept_once_it_would_be_late() -> None:
    hedging = Hedging()
    shard = learned(hedging)
    for number in range(10_000):
        now = number * 0.001
        hedging.asked(shard, number, now)
        if hedging.wakes_at <= now:
            hedging.late(now, ())
        assert len(shard.watched) <= 10


@pytest.mark.parametrize("seed", range(5))
def test_there_are_never_more_second_calls_than_the_budget_allows(seed: int) -> None:
    chance = random.Random(seed)
    hedging = Hedging()
    shard = hedging.shard("s")
    calls = spent = 0
    for _ in range(20_000):
        if chance.random() < 0.5:
            hedging.asked(shard, calls, 0.0)
            calls += 1
        else:
            spent += hedging.spend()
        assert spent <= SHARE * calls + 1e-6
    assert spent > 0.9 * SHARE * calls


def test_little_is_saved_up_while_nothing_is_late() -> None:
    hedging = Hedging()
    for number in range(10_000):
        hedging.asked(hedging.shard("s"), number, 0.0)
    assert sum(hedging.spend() for _ in range(100)) == 10
