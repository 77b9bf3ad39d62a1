"""Partitions that a division finds: right or one too low, everywhere, or not at all."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards import pitches
from shards.pitches import guessed, partitions_of, pitch_of

SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=40)


def edges_of(sizes: list[int], first: int = 0) -> tuple[np.ndarray, int]:
    edges = np.array([first, *(first + end for end in itertools.accumulate(sizes))], np.int64)
    return edges[:-1], int(edges[-1])


@given(SIZES, st.integers(0, 1 << 40))
def test_a_pitch_is_right_or_one_too_low_for_every_id(sizes: list[int], first: int) -> None:
    firsts, stop = edges_of(sizes, first)
    pitch = pitch_of(firsts, stop)
    if pitch:
        ids = np.arange(first, stop)
        behind = np.searchsorted(firsts, ids, side="right") - 1 - guessed(ids, first, pitch)
        assert set(behind.tolist()) <= {0, 1}


@given(st.integers(1 << 18, 1 << 44), st.integers(1, 300))
def test_rows_cut_evenly_have_a_pitch(rows: int, parts: int) -> None:
    firsts = np.array([rows * index // parts for index in range(parts)], np.int64)
    assert pitch_of(firsts, rows)


@pytest.mark.parametrize("sizes", [[1, 1, 1, 40], [40, 1, 1, 1], [10, 10, 1, 1, 10, 10]])
def test_partitions_of_very_different_sizes_have_none(sizes: list[int]) -> None:
    assert pitch_of(*edges_of(sizes)) == 0


@given(
    SIZES | st.lists(st.integers(20, 22), min_size=1, max_size=40),
    st.sampled_from([np.int32, np.int64]),
    st.integers(0, 1000),
)
def test_partitions_are_those_of_a_binary_search(
    sizes: list[int], dtype: type[np.signedinteger[Any]], last: int
) -> None:
    firsts, stop = edges_of([*sizes, last])
    ids = np.random.default_rng(0).permutation(stop).astype(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pitches, "_IDS_MIN", 0)
        found = partitions_of(ids, firsts)
    assert found.tolist() == (np.searchsorted(firsts, ids, side="right") - 1).tolist()
