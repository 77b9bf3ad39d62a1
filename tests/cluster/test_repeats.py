"""Rows that one look-up wants several times: asked for once, and given back as often."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.hot_rows import HotRows
from cluster.repeats import Repeats, distinct
from cluster.tables import Gather, Thrift
from tests.cluster.test_tables import fetch, node_of

WIDE = 1 << 20
TWICE = np.array([5, 5])
APART = np.array([5, 6])


@given(
    st.lists(
        st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 3) | st.sampled_from([2**62, 2**32]),
        max_size=300,
    )
)
def test_what_is_asked_for_once_gives_every_id_its_own(ids: list[int]) -> None:
    given_ids = np.array(ids, np.int64)
    found = distinct(given_ids, len(ids))
    assert found is not None
    assert np.array_equal(given_ids[found.first][found.again], given_ids)
    assert np.array_equal(found.first, np.unique(found.first))
    assert set(given_ids[found.first].tolist()) == set(ids)


def test_nearly_all_repeats_are_found() -> None:
    ids = np.random.default_rng(0).integers(0, 1_000, 10_000)
    found = distinct(ids, 5_000)
    assert found is not None
    assert len(found.first) <= 1_200
    assert distinct(ids, 500) is None


def test_a_look_up_of_few_bytes_or_of_narrow_rows_is_not_looked_at() -> None:
    assert Repeats().find("t", TWICE, 1_000) is None
    assert Repeats().find("t", np.zeros(1 << 20, np.int64), 32) is None
    assert Repeats().find("t", TWICE[:0], WIDE) is None
    assert Repeats().find("t", TWICE, WIDE) is not None


def test_a_table_in_which_nothing_repeats_is_looked_at_ever_more_seldom() -> None:
    repeats = Repeats()
    found = []
    for rest in (1, 2, 4, 8, 16, 32, 32):
        assert repeats.find("t", APART, WIDE) is None
        found += [repeats.find("t", TWICE, WIDE) for _ in range(rest)]
        assert repeats.find("u", TWICE, WIDE) is not None  # another table is none of its business
    assert found == [None] * len(found)
    assert repeats.find("t", TWICE, WIDE) is not None
    assert repeats.find("t", TWICE, WIDE) is not None


def test_no_more_than_some_tables_are_remembered() -> None:
    repeats = Repeats()
    for table in range(1_000):
        repeats.find(str(table), APART, WIDE)
    assert len(repeats._rests) <= 256


@pytest.mark.parametrize("keeps", [False, True])
@settings(max_examples=15)
@given(seed=st.integers(0, 2**16), lost=st.booleans())
def test_rows_are_those_that_numpy_would_index(keeps: bool, seed: int, lost: bool) -> None:
    draw = np.random.default_rng(seed)
    node = node_of([30, 1, 40], "zero", dim=1 << 11)
    table = np.repeat(np.arange(71, dtype=np.float32)[:, None] + 1, 1 << 11, axis=1)
    thrift = Thrift()
    thrift.hot = HotRows(1 << 21) if keeps else None
    for _ in range(2):
        ids = draw.integers(-2 if lost else 0, 73 if lost else 71, (4, 10)) // 9 * 9
        gather = Gather(node, ids)
        gather.save(thrift)
        missing = (ids < 0) | (ids >= 71)
        assert gather.missing == missing.sum()
        rows = fetch(gather, ["a", "b", "a"], table, random.Random(seed))
        assert np.array_equal(
            rows[..., 0], np.where(missing, 0, table[np.where(missing, 0, ids), 0])
        )
        assert (rows == rows[..., :1]).all()
