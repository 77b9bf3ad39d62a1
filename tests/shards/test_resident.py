"""Compiled look-ups and pooling, held against plain NumPy, bit for bit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import resident
from shards.errors import PartitionNotHeld, SpecMismatch
from shards.manifest import BlobRef, Partition, TableUnit
from shards.overlays import Patch, Replaced
from shards.pooling import Partial, pool_rows
from shards.resident import Crew
from shards.specs import DTYPES
from shards.tables import HostedTable
from tests.shards.serving import Array

BLOB = BlobRef(digest="0" * 64, size=0)
CREW = Crew(2)
DTYPES_POOLED = ("float32", "float16", "bfloat16")


@pytest.fixture(autouse=True)
def _all_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "_SHARED_BYTES_MIN", 0)
    monkeypatch.setattr(resident, "_STEP_IDS", 8)


def random_rows(seed: int, rows: int, dim: int, dtype: str) -> Array:
    """Whatever bits: infinities, subnormal numbers and NaN among them."""
    wanted = DTYPES[dtype]
    raw = np.random.default_rng(seed).integers(0, 256, rows * dim * wanted.itemsize, np.uint8)
    if dtype == "bool":
        raw &= 1
    return raw.view(wanted).reshape(rows, dim)


def tables(
    data: st.DataObject, dtype: str, whole_numbers: bool = False
) -> tuple[HostedTable, HostedTable, Array, Array]:
    """The same table with and without compiled look-ups, its rows, and ids that it has."""
    dim = data.draw(st.sampled_from([1, 3, 16, 33, 85]))
    uneven = st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any)
    even = st.lists(st.integers(20, 22), min_size=2, max_size=9)
    sizes = data.draw(uneven | even)
    firsts = [0, *itertools.accumulate(sizes)]
    rows = random_rows(0, firsts[-1], dim, dtype)
    if whole_numbers:
        rows = np.random.default_rng(0).integers(-8, 8, rows.shape).astype(rows.dtype)
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
    bases = {i: rows[p.first_row :][: p.rows].copy() for i, p in enumerate(unit.partitions)}
    patches = {}
    for index, part in enumerate(unit.partitions):
        chain = []
        for number in range(data.draw(st.integers(0, 3)) if part.rows else 0):
            where = np.array(sorted(data.draw(st.sets(st.integers(0, part.rows - 1), min_size=1))))
            new = random_rows(number + 1, len(where), dim, dtype)
            if whole_numbers:
                new = np.full(new.shape, number, new.dtype)
            chain.append(Replaced(where.astype(np.int64), new))
            rows[part.first_row + where] = new
        if chain:
            patches[index] = Patch(chain)
    ids = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=60))
    made = [HostedTable(unit, bases, patches, crew) for crew in (CREW, None)]
    return made[0], made[1], rows, np.array(ids, np.int64)


def bags_of(data: st.DataObject, count: int) -> Array:
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=8)))
    return np.array([0, *cuts, count], np.int64)


@settings(max_examples=40)
@given(st.data(), st.sampled_from([name for name in DTYPES if name != "string"]))
def test_rows_are_those_of_the_table_bit_for_bit(data: st.DataObject, dtype: str) -> None:
    compiled, _, rows, ids = tables(data, dtype)
    found = compiled.rows(ids)
    assert (found.dtype, found.shape) == (rows.dtype, rows[ids].shape)
    assert found.tobytes() == rows[ids].tobytes()


@settings(max_examples=40)
@given(st.data(), st.sampled_from(DTYPES_POOLED), st.sampled_from(["sum", "max"]), st.booleans())
def test_pooled_rows_are_those_of_numpy_bit_for_bit(
    data: st.DataObject, dtype: str, op: Partial, short: bool
) -> None:
    compiled, plain, _, ids = tables(data, dtype)
    offsets = bags_of(data, len(ids))
    weights = None
    if op == "sum" and data.draw(st.booleans()):
        weights = np.random.default_rng(3).normal(size=len(ids)).astype(np.float32)
    asked = ids.astype(np.int32) if short else ids
    asked.flags.writeable = False  # as they come from a peer
    with np.errstate(all="ignore"):
        expected = plain.pool(ids, offsets, op, weights)
        found = compiled.pool(asked, offsets, op, weights)
    # Which of several kinds of NaN it is differs from processor to processor.
    np.testing.assert_array_equal(found, expected)
    assert (np.signbit(found) == np.signbit(expected))[~np.isnan(found)].all()


@settings(max_examples=40)
@given(st.data(), st.sampled_from(DTYPES_POOLED))
def test_pooling_is_adding_up_the_rows_one_after_the_other(data: st.DataObject, dtype: str) -> None:
    _, plain, rows, ids = tables(data, dtype, whole_numbers=True)
    offsets = bags_of(data, len(ids))
    for bag, (start, stop) in enumerate(itertools.pairwise(offsets.tolist())):
        each = rows[ids[start:stop]].astype(np.float32)
        assert plain.pool(ids, offsets, "sum")[bag].tolist() == each.sum(0).tolist()
        greatest = each.max(0) if len(each) else np.zeros(rows.shape[1])
        assert plain.pool(ids, offsets, "max")[bag].tolist() == greatest.tolist()


@pytest.mark.parametrize("outside", [-1, 30, 1 << 62, -(1 << 62)])
def test_an_id_that_no_partition_has_is_named_and_nothing_is_read(outside: int) -> None:
    rows = np.ones((30, 4), np.float32)
    parts = tuple(Partition(first_row=first, rows=10, blob=BLOB) for first in (0, 10, 20))
    unit = TableUnit(id="t", dtype="float32", dim=4, rows=30, partitions=parts)
    table = HostedTable(unit, {i: rows[i * 10 :][:10] for i in (0, 1, 2)}, crew=CREW)
    ids = np.array([1, 12, 25, outside, 3], np.int64)
    with pytest.raises(PartitionNotHeld, match=f"id {outside} "):
        table.rows(ids)
    with pytest.raises(PartitionNotHeld, match=f"id {outside} "):
        table.pool(ids, np.array([0, 2, 5]), "sum")
    partial = HostedTable(unit, {0: rows[:10], 2: rows[20:]}, crew=CREW)
    with pytest.raises(PartitionNotHeld, match="id 12 "):
        partial.rows(ids[:3])


@pytest.mark.parametrize(
    ("offsets", "weights", "op", "text"),
    [
        ([1, 3], None, "sum", "do not cut 3 ids"),
        ([0, 2], None, "sum", "do not cut 3 ids"),
        ([0, 2, 1, 3], None, "sum", "do not cut 3 ids"),
        ([0, 5], None, "sum", "do not cut 3 ids"),
        ([0, (1 << 63) - 1, -2, 3], None, "sum", "do not cut 3 ids"),
        ([], None, "sum", "offsets must be"),
        ([0, 3], [1.0, 2.0], "sum", "weights must be"),
        ([0, 3], [1.0, 2.0, 3.0], "max", "weights are for sums"),
    ],
)
def test_bags_that_do_not_fit_are_refused(
    offsets: list[int], weights: list[float] | None, op: Partial, text: str
) -> None:
    unit = TableUnit(
        id="t", dtype="float32", dim=2, rows=4,
        partitions=(Partition(first_row=0, rows=4, blob=BLOB),),
    )  # fmt: skip
    table = HostedTable(unit, {0: np.ones((4, 2), np.float32)}, crew=CREW)
    given_weights = None if weights is None else np.array(weights, np.float32)
    with pytest.raises(SpecMismatch, match=text):
        table.pool(np.arange(3), np.array(offsets, np.int64), op, given_weights)


def test_rows_of_whole_numbers_are_not_pooled() -> None:
    unit = TableUnit(
        id="t", dtype="int32", dim=2, rows=4,
        partitions=(Partition(first_row=0, rows=4, blob=BLOB),),
    )  # fmt: skip
    table = HostedTable(unit, {0: np.ones((4, 2), np.int32)}, crew=CREW)
    with pytest.raises(SpecMismatch, match="cannot be pooled"):
        table.pool(np.arange(3), np.array([0, 3]), "sum")


def test_the_greatest_of_nan_is_nan_and_of_nothing_zero() -> None:
    rows = np.array([[1, np.nan], [2, 5]], np.float32)
    found = pool_rows(rows, np.array([0, 2, 2], np.int64), "max")
    np.testing.assert_array_equal(found, [[2, np.nan], [0, 0]])
