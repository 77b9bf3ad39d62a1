"""What others took of the processors, from two readings."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bench.elsewhere import Reading, read, share_taken

BURN = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass"


def test_what_is_busy_and_not_ours_is_others() -> None:
    assert share_taken(Reading(10, 100, 5), Reading(14, 106, 9)) == pytest.approx(0.5)


def test_ticks_that_are_counted_apart_make_nobody_negative() -> None:
    assert share_taken(Reading(10, 100, 5), Reading(14, 103, 9)) == 0.0


def test_a_child_counts_as_ours_also_when_it_has_ended() -> None:
    before = read()
    subprocess.run([sys.executable, "-c", BURN], check=True)
    assert read().own_s - before.own_s >= 0.25
