"""Restart intensity, at its edges."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.supervision import Intensity, Verdict, backoff_s, judge

INTENSITY = Intensity(crashes_max=5, window_s=60.0, backoff_first_s=0.5, backoff_s_max=15.0)


def test_a_lone_crash_is_answered_at_once() -> None:
    assert judge([7.0], 7.0, INTENSITY) == Verdict(restart_at=7.0, recent=(7.0,))


@pytest.mark.parametrize(
    ("count", "delay_s"), [(1, 0.0), (2, 0.5), (3, 1.0), (4, 2.0), (5, 4.0), (6, None)]
)
def test_crashes_in_a_row_wait_longer_until_there_are_too_many(
    count: int, delay_s: float | None
) -> None:
    crashes = [float(at) for at in range(count)]
    now = crashes[-1]
    verdict = judge(crashes, now, INTENSITY)
    assert verdict.restart_at == (None if delay_s is None else now + delay_s)


@pytest.mark.parametrize(("age_s", "counts"), [(59.999, True), (60.0, False), (60.001, False)])
def test_a_crash_counts_until_the_window_is_over(age_s: float, counts: bool) -> None:
    crashes = [1000.0 - age_s, 996.0, 997.0, 998.0, 999.0, 1000.0]
    verdict = judge(crashes, 1000.0, INTENSITY)
    assert (verdict.restart_at is None) == counts
    assert len(verdict.recent) == (6 if counts else 5)


def test_no_restart_at_all_may_be_asked_for() -> None:
    assert judge([1.0], 1.0, Intensity(crashes_max=0)).restart_at is None


def test_the_delay_is_capped_and_never_overflows() -> None:
    assert backoff_s(3, 0.5, 15.0) == 4.0
    assert backoff_s(5, 0.5, 15.0) == 15.0
    assert backoff_s(10**9, 0.5, 15.0) == 15.0


@given(st.lists(st.floats(0, 1000), min_size=1, max_size=30))
def test_the_intensity_is_never_exceeded(times: list[float]) -> None:
    """Whatever the times of crashes, no window sees more restarts than the bound."""
    crashes: tuple[float, ...] = ()
    restarts: list[float] = []
    for now in sorted(times):
        if restarts and now < restarts[-1]:
            continue  # it had not been started again yet, so it cannot have crashed
        verdict = judge((*crashes, now), now, INTENSITY)
        crashes = verdict.recent
        if verdict.restart_at is None:
            break
        assert verdict.restart_at >= now
        restarts.append(verdict.restart_at)
        recent = [at for at in crashes if now - at < INTENSITY.window_s]
        assert len(recent) <= INTENSITY.crashes_max
        assert len(crashes) <= INTENSITY.crashes_max
