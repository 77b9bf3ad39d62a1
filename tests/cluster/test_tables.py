"""Look-ups taken apart and put together, against NumPy's own indexing."""

from __future__ import annotations

import random
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batching.errors import InvalidArgument
from cluster.routes import PlannedNode, Routes
from cluster.tables import Gather
from shards.errors import SpecMismatch
from tests.cluster.routing_fakes import epoch, look_up, rows_of, table_unit

Missing = Literal["error", "zero"]


def node_of(sizes: list[int], missing: Missing = "error", dim: int = 2) -> PlannedNode:
    manifest = look_up(table_unit(sizes=sizes, missing=missing, dim=dim))
    placement = {"unit": [["a"]] * len(sizes)}
    served = Routes(epoch(1, (manifest, placement))).find("model")
    return served.plans["serving_default"].nodes[0]


def fetch(gather: Gather, holders: list[str], table: Any, order: random.Random) -> Any:
    """Ask every holder and put the answers in, in some order."""
    parts = list(gather.split(holders).items())
    order.shuffle(parts)
    for count, (_, positions) in enumerate(parts):
        assert not gather.is_complete, f"complete with {len(parts) - count} parts to come"
        gather.put(positions, table[gather.ids_at(positions)])
    assert gather.is_complete
    return gather.rows()


@given(data=st.data(), seed=st.integers(0, 2**16))
def test_any_look_up_is_what_numpy_would_index(data: st.DataObject, seed: int) -> None:
    sizes = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=5), "rows of partitions")
    sizes[0] += 1
    rows = sum(sizes)
    shape = data.draw(st.sampled_from([(), (0,), (1,), (7,), (3, 2), (2, 0), (2, 1, 2)]), "shape")
    count = int(np.prod(shape))
    ids = data.draw(st.lists(st.integers(-2, rows + 1), min_size=count, max_size=count), "ids")
    holders = data.draw(
        st.lists(st.sampled_from("abc"), min_size=len(sizes), max_size=len(sizes)), "holders"
    )
    array = np.array(ids, np.int64).reshape(shape)
    node = node_of(sizes, "zero")
    assert node.table is not None
    table = rows_of(node.table)
    gather = Gather(node, array)
    found = fetch(gather, holders, table, random.Random(seed))
    known = (array >= 0) & (array < rows)
    wanted = np.where(known[..., None], table[np.where(known, array, 0)], np.float32(0))
    assert found.dtype == np.float32
    assert found.shape == (*shape, 2)
    assert found.tobytes() == wanted.tobytes()
    assert gather.missing == int((~known).sum())


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint32, np.int64, np.uint64])
def test_ids_of_every_integer_dtype_are_understood(dtype: Any) -> None:
    node = node_of([3, 3])
    assert node.table is not None
    table = rows_of(node.table)
    gather = Gather(node, np.array([5, 0, 3], dtype))
    assert fetch(gather, ["a", "b"], table, random.Random(0)).tolist() == table[[5, 0, 3]].tolist()


@pytest.mark.parametrize("ids", [np.array([0.0]), np.array([True]), np.array([b"1"], object)])
def test_ids_that_are_not_integers_are_refused(ids: Any) -> None:
    with pytest.raises(SpecMismatch, match="must be integers"):
        Gather(node_of([3]), ids)


@pytest.mark.parametrize("wrong", [-1, 6, 2**62])
def test_with_the_error_policy_an_id_that_does_not_exist_is_named(wrong: int) -> None:
    with pytest.raises(InvalidArgument, match=f"id {wrong} is not in a table of 6 rows"):
        Gather(node_of([3, 3]), np.array([1, wrong, 2], np.int64))


def test_an_id_beyond_int64_is_missing_and_not_wrapped_into_the_table() -> None:
    with pytest.raises(InvalidArgument):
        Gather(node_of([3]), np.array([2**64 - 1], np.uint64))
    gather = Gather(node_of([3], "zero"), np.array([2**64 - 2], np.uint64))
    assert gather.missing == 1


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(np.zeros((1, 2), np.float32), id="too few"),
        pytest.param(np.zeros((2, 3), np.float32), id="too wide"),
        pytest.param(np.zeros((2, 2), np.float64), id="another dtype"),
        pytest.param(np.zeros((2, 2, 1), np.float32), id="another rank"),
    ],
)
def test_rows_of_another_kind_than_the_tables_are_refused(rows: Any) -> None:
    gather = Gather(node_of([3, 3]), np.array([0, 1, 5], np.int64))
    positions = gather.split(["a", "b"])["a"]
    with pytest.raises(SpecMismatch):
        gather.put(positions, rows)


def test_an_empty_look_up_asks_nobody_and_is_complete() -> None:
    gather = Gather(node_of([3, 3]), np.empty((0, 4), np.int64))
    assert gather.split(["a", "b"]) == {}
    assert gather.is_complete
    assert gather.rows().shape == (0, 4, 2)


def test_a_look_up_that_one_holder_answers_whole_is_not_copied() -> None:
    node = node_of([6])
    assert node.table is not None
    ids = np.array([1, 1, 0], np.int64)
    gather = Gather(node, ids)
    [(_, positions)] = gather.split(["a"]).items()
    assert np.shares_memory(gather.ids_at(positions), ids)
    rows = rows_of(node.table)[ids]
    gather.put(positions, rows)
    assert np.shares_memory(gather.rows(), rows)
