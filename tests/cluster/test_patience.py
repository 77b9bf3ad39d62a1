"""How long each wait may take, to the second."""

from __future__ import annotations

import pytest

from cluster.doors.patience import Patience, Phase
from cluster.doors.settings import DoorLimits

LIMITS = DoorLimits(head_s=10.0, body_s=20.0, read_s=30.0, idle_s=120.0, rate_min_bytes=100)


def over_after(phase: Phase, elapsed_s: float, *, requests: int = 1, moved: int = 0) -> bool:
    """Whether patience ends when this was seen 1,000 s after the start and again after that."""
    patience = Patience(0.0)
    assert not patience.is_over(phase, requests, 0, 1000.0, LIMITS)
    return patience.is_over(phase, requests, moved, 1000.0 + elapsed_s, LIMITS)


@pytest.mark.parametrize(
    ("phase", "moved", "allowed_s"),
    [
        (Phase.IDLE, 0, 120.0),
        (Phase.HEAD, 0, 10.0),
        (Phase.HEAD, 10_000, 10.0),
        (Phase.BODY, 0, 20.0),
        (Phase.BODY, 1000, 30.0),
        (Phase.BODY, 100_000, 1020.0),
        (Phase.UNREAD, 0, 30.0),
        (Phase.UNREAD, 500, 35.0),
        (Phase.UNREAD, -500, 30.0),
    ],
)
def test_each_wait_has_its_time_and_progress_earns_more_where_it_counts(
    phase: Phase, moved: int, allowed_s: float
) -> None:
    assert not over_after(phase, allowed_s, moved=moved)
    assert over_after(phase, allowed_s + 0.001, moved=moved)


def test_a_request_under_way_is_never_timed_out_here() -> None:
    assert not over_after(Phase.BUSY, 1e9)


def test_a_connection_that_never_said_anything_has_the_time_of_a_head() -> None:
    patience = Patience(0.0)
    assert not patience.is_over(Phase.IDLE, 0, 0, 10.0, LIMITS)
    assert patience.is_over(Phase.IDLE, 0, 0, 10.001, LIMITS)


def test_another_phase_or_another_request_begins_another_wait() -> None:
    patience = Patience(0.0)
    now = 0.0
    for request in range(1, 50):
        for phase in (Phase.HEAD, Phase.BODY, Phase.BUSY, Phase.UNREAD, Phase.IDLE):
            now += 9.0
            assert not patience.is_over(phase, request, 0, now, LIMITS)
    for request in range(50, 100):  # each is a new head, although always one is open
        now += 9.0
        assert not patience.is_over(Phase.HEAD, request, 0, now, LIMITS)
    assert patience.is_over(Phase.HEAD, 99, 0, now + 10.1, LIMITS)


def test_progress_counts_from_where_the_wait_began() -> None:
    patience = Patience(0.0)
    assert not patience.is_over(Phase.UNREAD, 1, -5000, 0.0, LIMITS)
    assert not patience.is_over(Phase.UNREAD, 1, -4000, 39.0, LIMITS)
    assert patience.is_over(Phase.UNREAD, 1, -4000, 41.0, LIMITS)
