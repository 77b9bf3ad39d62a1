from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.row_cache import RowCache

ROW_BYTES = 24
#: What one set of eight places takes.
SET_BYTES = 8 * (ROW_BYTES + 9) + 1


def rows_of(positions: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Rows that tell which they are."""
    return np.repeat(positions[:, None], ROW_BYTES // 8, axis=1).view(np.uint8)


def look_up(cache: RowCache, positions: list[int]) -> list[int]:
    """Ask for rows and put those that are missing, as `ColdRows` does; those that were there."""
    asked = np.array(positions, np.int64)
    slots = cache.find(asked)
    here = slots >= 0
    assert (cache.read(slots[here]) == rows_of(asked[here])).all()
    missing = np.unique(asked[~here])
    cache.put(missing, rows_of(missing))
    found: list[int] = asked[here].tolist()
    return found


@given(
    st.integers(0, 5 * SET_BYTES),
    st.lists(st.lists(st.integers(0, 60), max_size=40), max_size=20),
)
def test_a_row_is_never_anothers_and_never_more_are_kept_than_fit(
    budget: int, calls: list[list[int]]
) -> None:
    cache = RowCache(budget, ROW_BYTES)
    assert cache.nbytes <= budget
    seen: set[int] = set()
    for asked in calls:
        assert set(look_up(cache, asked)) <= seen
        seen |= set(asked)
        everything = np.arange(61)
        slots = cache.find(everything)
        kept = everything[slots >= 0]
        assert set(kept.tolist()) <= seen
        assert len(kept) <= cache.capacity
        assert cache.used == len(kept) * ROW_BYTES
        assert len(np.unique(slots[slots >= 0])) == len(kept)


@given(st.lists(st.integers(0, 1 << 40), max_size=8, unique=True))
def test_as_many_rows_as_a_set_has_places_are_all_kept(positions: list[int]) -> None:
    cache = RowCache(SET_BYTES, ROW_BYTES)
    assert look_up(cache, positions) == []
    assert look_up(cache, positions) == positions


@given(st.lists(st.integers(0, 3), min_size=40, max_size=120))
def test_one_set_gives_way_as_a_clock_does(asked: list[int]) -> None:
    """Held against the clock written down naively: a list of places, bits and a hand."""
    cache = RowCache(SET_BYTES, ROW_BYTES)
    places: list[int | None] = [None] * 8
    again = [False] * 8
    hand = 0
    for turn, each in enumerate(asked):
        # Few rows come again and again among ever new ones.
        position = each if each < 3 else 10 + turn
        found = look_up(cache, [position])
        assert bool(found) == (position in places)
        if position in places:
            again[places.index(position)] = True
            continue
        if all(again):
            again = [False] * 8
        while again[hand]:
            again[hand] = False
            hand = (hand + 1) % 8
        places[hand] = position
        hand = (hand + 1) % 8


def test_a_scan_leaves_what_is_asked_for_again_alone() -> None:
    cache = RowCache(100 * SET_BYTES, ROW_BYTES)
    popular = list(range(100))
    look_up(cache, popular)
    for start in range(1000, 21_000, 200):
        look_up(cache, popular)
        look_up(cache, list(range(start, start + 200)))
    assert len(look_up(cache, popular)) >= 95


def test_rows_at_random_positions_fill_nearly_all_places() -> None:
    cache = RowCache(1000 * SET_BYTES, ROW_BYTES)
    positions = np.random.default_rng(0).permutation(100_000).astype(np.int64)
    for start in range(0, 32_000, 500):
        mine = positions[start : start + 500]
        cache.put(mine, rows_of(mine))
    kept = int((cache.find(positions) >= 0).sum())
    assert kept >= 0.99 * cache.capacity


@pytest.mark.parametrize("budget", [-1, 0, SET_BYTES - 1])
def test_too_small_a_budget_keeps_nothing(budget: int) -> None:
    cache = RowCache(budget, ROW_BYTES)
    assert cache.capacity == cache.nbytes == 0
    assert look_up(cache, [1, 2]) == look_up(cache, [1, 2]) == []
