"""What units need to answer at the least, and what earlier units of a graph leave them."""

from __future__ import annotations

import pytest

from batching.reply_times import ReplyTimes


def test_what_a_unit_needs_is_the_quickest_of_its_recent_answers() -> None:
    times = ReplyTimes()
    assert times.least_s("unit") == 0.0
    times.observe("unit", 0.010)
    for _ in range(63):
        times.observe("unit", 0.020)
    assert times.least_s("unit") == 0.010
    for _ in range(128):
        times.observe("unit", 0.020)
    assert times.least_s("unit") == 0.020, "it is slower now"


def test_of_many_units_few_are_remembered() -> None:
    times = ReplyTimes()
    for number in range(10_000):
        times.observe(f"unit-{number}", 1.0)
    assert len(times._times) <= 4096


def test_a_unit_is_due_so_much_earlier_that_later_ones_can_be_in_time() -> None:
    assert ReplyTimes().due(2.0, after_s=0.25, now=1.0) == 1.75
    assert ReplyTimes().due(2.0, after_s=0.0, now=1.0) == 2.0


def test_no_more_than_half_of_the_time_is_kept_for_later_units() -> None:
    assert ReplyTimes().due(2.0, after_s=5.0, now=1.0) == pytest.approx(1.5)
    assert ReplyTimes().due(2.0, after_s=5.0, now=2.5) == 2.0
