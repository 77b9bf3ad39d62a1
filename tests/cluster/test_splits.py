"""Splits: exact without keys, stable with them, wherever they are asked for."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from cluster.splits import RING, Split, point_of

KEYS = [b"user-%d" % number for number in range(4000)]


def test_without_keys_the_weights_are_kept_almost_exactly() -> None:
    split = Split("m", [("stable", 1, 95), ("canary", 2, 5)])
    found = Counter(split.pick() for _ in range(1000))
    assert abs(found[2] - 50) <= 2
    assert set(found) == {1, 2}


def test_a_key_always_gets_the_same_version_and_keys_spread_by_weight() -> None:
    split = Split("m", [("a", 1, 3), ("b", 2, 1)])
    first = [split.pick(key) for key in KEYS]
    assert [split.pick(key) for key in KEYS] == first
    assert abs(Counter(first)[2] / len(KEYS) - 0.25) < 0.03


def test_points_are_the_same_in_every_process() -> None:
    code = "from cluster.splits import point_of; print(point_of('m', b'user-1'))"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    # Pinned: another hash would move everybody's users with an upgrade.
    assert int(found) == point_of("m", b"user-1") == 2_960_103_515


def test_of_every_servable_a_key_has_another_point() -> None:
    assert len({point_of(name, b"user-1") for name in "abcdef"}) == 6


def test_who_had_the_canary_keeps_it_when_it_grows() -> None:
    before = Split("m", [("stable", 1, 95), ("canary", 2, 5)])
    after = Split("m", [("stable", 1, 80), ("canary", 2, 20)])
    had = [key for key in KEYS if before.pick(key) == 2]
    assert had
    assert {after.pick(key) for key in had} == {2}


def test_a_label_that_moves_keeps_its_keys() -> None:
    before = Split("m", [("stable", 1, 60), ("canary", 2, 40)])
    after = Split("m", [("stable", 2, 60), ("canary", 3, 40)])
    assert [before.pick(key) + 1 for key in KEYS] == [after.pick(key) for key in KEYS]


def test_a_weight_of_nothing_gets_nothing() -> None:
    split = Split("m", [("a", 1, 0), ("b", 2, 1)])
    assert {split.pick(key) for key in [b"", *KEYS]} == {2}


@given(st.lists(st.integers(0, 1_000_000), min_size=1, max_size=16).filter(any))
def test_the_whole_ring_has_a_version(weights: list[int]) -> None:
    split = Split("m", [(f"{n:02}", n, weight) for n, weight in enumerate(weights)])
    assert split._bounds[-1] == RING
    assert all(weights[split.pick()] > 0 for _ in range(20))
