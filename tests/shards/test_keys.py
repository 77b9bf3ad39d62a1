"""Keys become rows and rows places, the same ones for ever."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batching.errors import InvalidArgument
from shards.errors import SpecMismatch
from shards.keys import hashed_rows, numbers_at, places_of


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 10, 17, 1_000, 1_001, 65_537])
def test_every_row_has_a_place_of_its_own_and_comes_back_from_it(rows: int) -> None:
    places = places_of(np.arange(rows), rows)
    assert np.array_equal(np.sort(places), np.arange(rows))
    assert np.array_equal(numbers_at(places, rows), np.arange(rows))


@given(rows=st.integers(1, 2**62), data=st.data())
def test_places_of_tables_of_any_size_are_inside_and_lead_back(rows: int, data: Any) -> None:
    drawn = data.draw(st.lists(st.integers(0, rows - 1), max_size=20), "numbers")
    numbers = np.array(drawn, np.int64)
    places = places_of(numbers, rows)
    assert ((places >= 0) & (places < rows)).all()
    assert np.array_equal(numbers_at(places, rows), numbers)


@pytest.mark.parametrize("step", [1, 8, 64, 1_000])
def test_rows_at_any_stride_are_spread_evenly_over_ranges_of_places(step: int) -> None:
    rows, ranges = 1_000_000, 64
    numbers = np.arange(0, rows, step)[:10_000]
    edges = [rows * index // ranges for index in range(ranges + 1)]
    counts, _ = np.histogram(places_of(numbers, rows), edges)
    even = len(numbers) / ranges
    # For chance alone this is 1, give or take 0.18.
    assert ((counts - even) ** 2 / even).sum() / (ranges - 1) < 2


def test_places_are_what_they_have_always_been() -> None:
    # Saved tables depend on these: a change here loses their rows.
    assert places_of(np.array([0, 1, 2, 999]), 1_000).tolist() == [468, 178, 871, 588]
    assert hashed_rows(np.array([0, 1, -1, 2**62]), 10**9).tolist() == [
        0,
        940578789,
        876403067,
        938723525,
    ]
    assert hashed_rows(["", "alice", "zoë"], 10**9).tolist() == [483603138, 381308080, 235156642]


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20), st.integers(1, 2**62))
def test_a_key_is_its_bits_and_not_its_sign_or_its_neighbours(keys: list[int], rows: int) -> None:
    signed = np.array(keys, np.int64)
    found = hashed_rows(signed, rows)
    assert found.tolist() == hashed_rows(signed.view(np.uint64), rows).tolist()
    assert found.tolist() == [int(hashed_rows([key], rows)[0]) for key in keys]
    assert ((found >= 0) & (found < rows)).all()


def test_a_key_of_few_bits_is_the_same_key_as_one_of_many() -> None:
    for dtype in (np.int8, np.int16, np.int32):
        keys = np.array([-5, 7], dtype)
        assert hashed_rows(keys, 1000).tolist() == hashed_rows(keys.astype(np.int64), 1000).tolist()


@given(st.lists(st.text("aé\0z", max_size=8), min_size=1, max_size=8))
def test_text_is_hashed_as_its_utf8_bytes_in_any_shape(keys: list[str]) -> None:
    raw = np.array([key.encode() for key in keys] * 2, object).reshape(2, -1)
    found = hashed_rows(raw, 77)
    assert found.shape == (2, len(keys))
    assert found[1].tolist() == hashed_rows(keys, 77).tolist()


@pytest.mark.parametrize("keys", [[1.5], [None], np.array([True]), np.array([1, "a"], object)])
def test_keys_that_are_neither_integers_nor_text_are_refused(keys: Any) -> None:
    with pytest.raises(SpecMismatch, match="integers or text"):
        hashed_rows(keys, 10)


def test_a_table_without_rows_has_none_for_a_key() -> None:
    with pytest.raises(InvalidArgument):
        hashed_rows([1], 0)
