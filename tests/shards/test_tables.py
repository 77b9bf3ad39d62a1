"""Look-ups in partitions, held against plain NumPy indexing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import PartitionNotHeld
from shards.manifest import BlobRef, Partition, TableUnit
from shards.tables import HostedTable, split_ids
from tests.shards.serving import Array

BLOB = BlobRef(digest="0" * 64, size=0)


def table(sizes: list[int], dim: int = 3, dtype: str = "float32") -> tuple[TableUnit, Array]:
    """A table cut into partitions of these sizes, and all of its rows."""
    firsts = [0, *itertools.accumulate(sizes)]
    unit = TableUnit(
        id="table",
        dtype=dtype,
        dim=dim,
        rows=firsts[-1],
        partitions=tuple(
            Partition(first_row=first, rows=size, blob=BLOB)
            for first, size in zip(firsts, sizes, strict=False)
        ),
    )
    rows = np.arange(firsts[-1] * dim).reshape(firsts[-1], dim).astype(np.dtype(dtype))
    return unit, rows


def hosted(unit: TableUnit, rows: Array, indices: set[int] | None = None) -> HostedTable:
    wanted = range(len(unit.partitions)) if indices is None else indices
    return HostedTable(
        unit,
        {
            index: rows[part.first_row : part.first_row + part.rows]
            for index, part in enumerate(unit.partitions)
            if index in wanted
        },
    )


SIZES = st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any)


def ids_of(*ids: int) -> Array:
    return np.array(ids, np.int64)


# --- rows --------------------------------------------------------------------------------------


@given(st.data(), SIZES)
def test_rows_are_those_of_the_whole_table_in_the_order_of_the_ids(
    data: st.DataObject, sizes: list[int]
) -> None:
    unit, rows = table(sizes)
    held = data.draw(st.sets(st.sampled_from(range(len(sizes))), min_size=1))
    ids = [
        number
        for index, part in enumerate(unit.partitions)
        if index in held
        for number in range(part.first_row, part.first_row + part.rows)
    ]
    asked = ids_of(*data.draw(st.lists(st.sampled_from(ids), max_size=20)) if ids else ())
    found = hosted(unit, rows, held).rows(asked)
    assert found.dtype == rows.dtype
    np.testing.assert_array_equal(found, rows[asked])


@given(st.data(), SIZES)
def test_an_id_of_a_partition_that_is_not_held_is_named(
    data: st.DataObject, sizes: list[int]
) -> None:
    unit, rows = table(sizes)
    held = data.draw(st.sets(st.sampled_from(range(len(sizes)))))
    inside = {
        number
        for index in held
        for number in range(
            unit.partitions[index].first_row,
            unit.partitions[index].first_row + unit.partitions[index].rows,
        )
    }
    outside = sorted(set(range(-3, unit.rows + 3)) - inside)
    bad = data.draw(st.sampled_from(outside))
    asked = ids_of(*data.draw(st.permutations([*sorted(inside), bad])))
    with pytest.raises(PartitionNotHeld, match=f"^id {bad} is in no partition"):
        hosted(unit, rows, held).rows(asked)


@pytest.mark.parametrize("bad", [-(2**63), -1, 6, 2**63 - 1])
def test_ids_of_no_table_are_refused_by_a_shard_with_one_partition(bad: int) -> None:
    unit, rows = table([6])
    with pytest.raises(PartitionNotHeld, match=f"id {bad} "):
        hosted(unit, rows).rows(ids_of(0, bad))


def test_a_gap_between_the_partitions_held_is_outside() -> None:
    unit, rows = table([2, 2, 2])
    some = hosted(unit, rows, {0, 2})
    np.testing.assert_array_equal(some.rows(ids_of(5, 0, 4)), rows[[5, 0, 4]])
    for gap in (2, 3):
        with pytest.raises(PartitionNotHeld):
            some.rows(ids_of(gap))


def test_a_shard_without_partitions_refuses_every_id() -> None:
    unit, rows = table([4])
    none = hosted(unit, rows, set())
    assert none.rows(ids_of()).shape == (0, 3)
    with pytest.raises(PartitionNotHeld, match="id 0 "):
        none.rows(ids_of(0))


@pytest.mark.parametrize("sizes", [[5], [2, 3]])
def test_rows_are_a_copy_that_the_caller_may_keep(sizes: list[int]) -> None:
    unit, rows = table(sizes)
    found = hosted(unit, rows).rows(ids_of(4, 0))
    found[:] = -1
    assert rows.min() == 0


def test_no_ids_are_no_rows() -> None:
    unit, rows = table([2, 2], dim=7, dtype="int8")
    found = hosted(unit, rows).rows(ids_of())
    assert found.shape == (0, 7)
    assert found.dtype == np.dtype(np.int8)


def test_a_shard_says_what_it_holds() -> None:
    unit, rows = table([2, 3, 4])
    some = hosted(unit, rows, {0, 2})
    assert some.partitions == {0, 2}
    assert some.nbytes == 6 * 3 * 4


# --- splitting ---------------------------------------------------------------------------------


@given(st.data(), SIZES)
def test_every_position_goes_to_the_holder_of_its_partition(
    data: st.DataObject, sizes: list[int]
) -> None:
    unit, _ = table(sizes)
    holders = data.draw(st.lists(st.sampled_from("abc"), min_size=len(sizes), max_size=len(sizes)))
    ids = ids_of(*data.draw(st.lists(st.integers(0, unit.rows - 1), max_size=30)))
    firsts = np.array([part.first_row for part in unit.partitions], np.int64)
    expected: dict[str, list[int]] = {}
    for position, number in enumerate(ids.tolist()):
        for index, part in enumerate(unit.partitions):
            if part.first_row <= number < part.first_row + part.rows:
                expected.setdefault(holders[index], []).append(position)
    split = split_ids(ids, firsts, holders)
    assert {name: positions.tolist() for name, positions in split.items()} == expected


@given(st.data(), SIZES)
def test_rows_of_the_shards_put_together_are_the_rows_of_the_table(
    data: st.DataObject, sizes: list[int]
) -> None:
    unit, rows = table(sizes)
    holders = [f"shard-{index % 2}" for index in range(len(sizes))]
    ids = ids_of(*data.draw(st.lists(st.integers(0, unit.rows - 1), max_size=30)))
    firsts = np.array([part.first_row for part in unit.partitions], np.int64)
    out = np.zeros((len(ids), unit.dim), rows.dtype)
    for name, positions in split_ids(ids, firsts, holders).items():
        held = {index for index, holder in enumerate(holders) if holder == name}
        out[positions] = hosted(unit, rows, held).rows(ids[positions])
    np.testing.assert_array_equal(out, rows[ids])


@pytest.mark.parametrize("holders", [["a", "a"], ["a", "b"]])
def test_no_ids_ask_nobody(holders: list[str]) -> None:
    assert split_ids(ids_of(), ids_of(0, 3), holders) == {}


def test_one_holder_is_asked_for_all() -> None:
    (found,) = split_ids(ids_of(5, 0, 5), ids_of(0, 3), ["a", "a"]).items()
    assert (found[0], found[1].tolist()) == ("a", [0, 1, 2])
