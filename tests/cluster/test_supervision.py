"""Restart intensity, at its edges."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.supervision import Intensity, Verdict, backoff_s, judge

INTENSITY = Intensity(crashes_max=5, window_s=60.0, backoff_first_s=0.5, backoff_s_max=15.0)


def test_a_lone_crash_is_answered_at_once() -> None:
    assert judge([7.0], 7.0, INTENSITY) == Verdict(restart_at=7.0, recent=(7.0,), pauses=0)


@pytest.mark.parametrize(
    ("count", "delay_s", "pauses"),
    [(1, 0.0, 0), (2, 0.5, 0), (3, 1.0, 0), (4, 2.0, 0), (5, 4.0, 0), (6, 5.0, 1)],
)
def test_crashes_in_a_row_wait_longer_until_there_are_too_many(
    count: int, delay_s: float, pauses: int
) -> None:
    crashes = [float(at) for at in range(count)]
    now = crashes[-1]
    verdict = judge(crashes, now, INTENSITY)
    assert verdict == Verdict(restart_at=now + delay_s, recent=tuple(crashes), pauses=pauses)


def test_pauses_double_up_to_their_bound_however_long_the_crashes_are_apart() -> None:
    """A crash that an older one's window no longer holds does not make the actor a good one."""
    now, pauses = 0.0, 1
    crashes: tuple[float, ...] = (0.0,)
    delays: list[float] = []
    for _ in range(6):
        verdict = judge((*crashes, now), now, INTENSITY, pauses)
        delays.append(verdict.restart_at - now)
        now, pauses, crashes = verdict.restart_at + 1.0, verdict.pauses, verdict.recent
    assert delays == [10.0, 20.0, 40.0, 60.0, 60.0, 60.0]


@pytest.mark.parametrize(("age_s", "counts"), [(59.999, True), (60.0, False), (60.001, False)])
def test_a_crash_counts_until_the_window_is_over(age_s: float, counts: bool) -> None:
    crashes = [1000.0 - age_s, 996.0, 997.0, 998.0, 999.0, 1000.0]
    verdict = judge(crashes, 1000.0, INTENSITY)
    assert bool(verdict.pauses) == counts
    assert len(verdict.recent) == (6 if counts else 5)


def test_every_crash_may_be_answered_by_a_pause() -> None:
    assert judge([1.0], 1.0, Intensity(crashes_max=0)) == Verdict(
        restart_at=6.0, recent=(1.0,), pauses=1
    )


def test_the_delay_is_capped_and_never_overflows() -> None:
    assert backoff_s(3, 0.5, 15.0) == 4.0
    assert backoff_s(5, 0.5, 15.0) == 15.0
    assert backoff_s(10**9, 0.5, 15.0) == 15.0


@given(st.lists(st.floats(0, 1000), min_size=1, max_size=60), st.booleans())
def test_the_intensity_is_never_exceeded(times: list[float], keeps_crashing: bool) -> None:
    """Whatever the times of crashes, no window sees more quick restarts than the bound."""
    crashes: tuple[float, ...] = ()
    pauses = 0
    quick: list[float] = []
    started = 0.0
    for now in sorted(times):
        if now < started:
            continue  # it had not been started again yet, so it cannot have crashed
        verdict = judge((*crashes, now), now, INTENSITY, pauses if keeps_crashing else 0)
        crashes, pauses, started = verdict.recent, verdict.pauses, verdict.restart_at
        assert started >= now
        assert len(crashes) <= INTENSITY.crashes_max + 1
        if not pauses:
            quick.append(now)
            recent = [at for at in quick if now - at < INTENSITY.window_s]
            assert len(recent) <= INTENSITY.crashes_max
        else:
            assert started - now >= INTENSITY.pause_first_s * 0.999
