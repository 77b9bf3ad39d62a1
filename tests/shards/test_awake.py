"""A loop that hears something often looks for more; one that does not sleeps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from shards.awake import Awake, Vigil, stay_s

STAY_S = 0.001


class FakeLoop:
    """Callbacks that wait for their turn."""

    def __init__(self) -> None:
        self.due: list[Callable[[], object]] = []

    def call_soon(self, callback: Callable[[], object]) -> None:
        self.due.append(callback)

    def turn(self) -> None:
        due, self.due = self.due, []
        for callback in due:
            callback()


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def awake_of(loop: FakeLoop, clock: Clock, stay: float = STAY_S) -> Awake:
    return Awake(cast(asyncio.AbstractEventLoop, loop), stay, clock)


def test_what_comes_once_or_seldom_keeps_no_loop_awake() -> None:
    vigil = Vigil(STAY_S)
    assert not vigil.heard(100.0)
    assert not vigil.heard(100.0 + STAY_S)
    assert vigil.is_over(100.0 + STAY_S)


def test_what_comes_twice_within_the_time_keeps_it_awake_for_as_long_again() -> None:
    vigil = Vigil(STAY_S)
    vigil.heard(100.0)
    assert vigil.heard(100.0 + STAY_S / 2)
    assert not vigil.is_over(100.0 + 1.4 * STAY_S)
    assert vigil.is_over(100.0 + 1.6 * STAY_S)


def test_a_rest_ends_the_vigil_and_forgets_what_was_heard() -> None:
    vigil = Vigil(STAY_S)
    vigil.heard(100.0)
    vigil.heard(100.0)
    vigil.rest()
    assert vigil.is_over(100.0)
    assert not vigil.heard(100.0)


def test_a_vigil_of_no_time_never_begins() -> None:
    vigil = Vigil(0.0)
    assert not any([vigil.heard(100.0) for _ in range(3)])


def test_a_loop_looks_turn_after_turn_until_nothing_has_come_for_the_time() -> None:
    loop, clock = FakeLoop(), Clock()
    awake = awake_of(loop, clock)
    awake.heard()
    assert not loop.due
    awake.heard()
    for _ in range(3):
        loop.turn()
        assert len(loop.due) == 1
    clock.now += STAY_S / 2
    awake.heard()
    clock.now += 0.9 * STAY_S
    loop.turn()
    assert len(loop.due) == 1
    clock.now += 0.2 * STAY_S
    loop.turn()
    assert not loop.due


def test_a_loop_that_rests_sleeps_after_its_next_turn_and_can_be_kept_awake_again() -> None:
    loop, clock = FakeLoop(), Clock()
    awake = awake_of(loop, clock)
    awake.heard()
    awake.heard()
    awake.rest()
    loop.turn()
    assert not loop.due
    awake.heard()
    awake.heard()
    assert len(loop.due) == 1


@pytest.mark.parametrize(
    ("environment", "processors", "seconds"),
    [
        ({}, 2, 0.0006),
        ({}, 1, 0.0),
        ({"SHARDSERVE_STAY_AWAKE_US": "50"}, 4, 0.00005),
        ({"SHARDSERVE_STAY_AWAKE_US": "0"}, 4, 0.0),
    ],
)
def test_the_time_is_the_environments_and_none_on_a_single_processor(
    environment: dict[str, str], processors: int, seconds: float
) -> None:
    assert stay_s(environment, processors) == pytest.approx(seconds)


@pytest.mark.parametrize("told", ["soon", "-1", "nan", "inf"])
def test_a_time_that_is_none_is_refused(told: Any) -> None:
    with pytest.raises(ValueError, match="SHARDSERVE_STAY_AWAKE_US must be"):
        stay_s({"SHARDSERVE_STAY_AWAKE_US": told}, 2)
