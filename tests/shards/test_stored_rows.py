"""Rows that do not lie as they are used: int8 with a scale, and floats of other sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import shards
from batching.errors import InvalidArgument
from shards.bundle import Bundle
from shards.checking import check_manifest, decode_manifest, encode_manifest
from shards.errors import BundleCorrupt, SpecMismatch
from shards.inspection import describe
from shards.interchange import table_to_arrow
from shards.manifest import BlobRef, Manifest, Partition, TableUnit
from shards.overlays import Patch, Replaced, view_rows
from shards.pooling import Partial
from shards.resident import Crew
from shards.specs import Spec
from shards.store import LocalStore
from shards.stored_rows import decoded, encoded
from shards.tables import HostedTable
from tests.shards.serving import Array

BLOB = BlobRef(digest="0" * 64, size=0)
CREW = Crew(2)
WHOLE = np.random.default_rng(0).integers(-127, 128, (40, 5)).astype(np.float32)
WHOLE[:, 0] = 127  # so that the scale is one and nothing is lost


@given(hnp.arrays(np.float32, (3, 5), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_no_value_is_off_by_more_than_half_a_scale(rows: Array) -> None:
    found = decoded("int8", encoded("int8", rows))
    assert found.dtype == np.float32
    wide = rows.astype(np.float64)
    scales = np.abs(wide).max(axis=1, keepdims=True) / 127
    # Where a scale itself is as coarse as floats can be, its own rounding is larger.
    assert (np.abs(found.astype(np.float64) - wide) <= scales * 0.5001 + 127 * 1.5e-45).all()


def test_whole_numbers_up_to_127_are_kept_and_a_row_of_zeros_is_zeros() -> None:
    rows = np.concatenate((WHOLE, np.zeros((1, 5), np.float32)))
    assert np.array_equal(decoded("int8", encoded("int8", rows)), rows)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_refused(bad: float) -> None:
    with pytest.raises(SpecMismatch, match="infinities or NaN"):
        encoded("int8", np.array([[1, bad]], np.float32))


@settings(max_examples=30)
@given(
    st.data(),
    st.sampled_from([1, 3, 16, 33]),
    st.sampled_from(["sum", "max"]),
    st.booleans(),
)
def test_compiled_look_ups_of_int8_are_those_of_numpy_bit_for_bit(
    data: st.DataObject, dim: int, op: Partial, weighted: bool
) -> None:
    draw = np.random.default_rng(data.draw(st.integers(0, 99), "seed"))
    stored = encoded("int8", draw.normal(size=(30, dim)).astype(np.float32))
    newer = encoded("int8", draw.normal(size=(3, dim)).astype(np.float32))
    unit = TableUnit(
        id="t", dtype="float32", dim=dim, rows=30, stored="int8",
        partitions=tuple(Partition(first_row=at, rows=15, blob=BLOB) for at in (0, 15)),
    )  # fmt: skip
    bases = {0: stored[:15].copy(), 1: stored[15:].copy()}
    patches = {1: Patch([Replaced(np.array([2, 7, 9]), newer)])}
    stored[[17, 22, 24]] = newer
    ids = np.array(data.draw(st.lists(st.integers(0, 29), max_size=50), "ids"), np.int64)
    cut = data.draw(st.integers(0, len(ids)), "cut")
    offsets = np.array([0, cut, cut, len(ids)], np.int64)
    weights = draw.normal(size=len(ids)).astype(np.float32) if weighted and op == "sum" else None
    plain, fast = (HostedTable(unit, bases, patches, crew) for crew in (None, CREW))
    for table in (plain, fast):
        assert np.array_equal(table.rows(ids), decoded("int8", stored[ids]))
    expected = plain.pool(ids, offsets, op, weights)
    assert fast.pool(ids, offsets, op, weights).tobytes() == expected.tobytes()
    assert not expected[1].any()


# --- in a bundle -------------------------------------------------------------------------------


def save(store: Path, dtype: str | None, rows: Any = WHOLE, version: int = 1) -> Manifest:
    with Bundle.create(store, "model", version) as bundle:
        table = bundle.table("users", rows, partitions=3, dtype=dtype)

        @bundle.signature(inputs={"ids": Spec(("b", "t"), "int32")})
        def answer(ids: Any) -> Any:
            return {"rows": table.rows(ids), "mean": table.pool(ids, "mean")}

    return bundle.manifest


def users_of(manifest: Manifest) -> TableUnit:
    unit = manifest.units["users"]
    assert isinstance(unit, TableUnit)
    return unit


def test_a_table_in_int8_takes_a_scale_and_a_byte_a_value_and_is_used_as_floats(
    tmp_path: Path,
) -> None:
    manifest = save(tmp_path, "int8")
    unit = users_of(manifest)
    assert (unit.dtype, unit.dim, unit.stored) == ("float32", 5, "int8")
    assert sum(part.blob.size for part in unit.partitions) == 40 * (4 + 5)
    assert manifest.signatures["serving_default"].outputs["rows"].dtype == "float32"
    assert decode_manifest(encode_manifest(manifest), "model/1") == manifest
    store = LocalStore(tmp_path)
    bases = {i: view_rows(unit, store.map(p.blob)) for i, p in enumerate(unit.partitions)}
    ids = np.array([39, 0, 13, 14, 27])
    assert np.array_equal(HostedTable(unit, bases).rows(ids), WHOLE[ids])
    assert table_to_arrow(manifest, store, "users")["rows"].to_pylist() == WHOLE.tolist()
    assert describe(manifest)["units"]["users"]["row"] == "float32[5], stored as int8 and a scale"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("given_as", [np.float64, np.float32, np.float16])
def test_floats_are_saved_as_the_floats_that_are_asked_for(
    tmp_path: Path, dtype: str, given_as: Any
) -> None:
    unit = users_of(save(tmp_path, dtype, WHOLE.astype(given_as)))
    assert (unit.dtype, unit.stored) == (dtype, None)
    store = LocalStore(tmp_path)
    wanted = WHOLE.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    found = [view_rows(unit, store.map(part.blob)) for part in unit.partitions]
    assert np.concatenate(found).tobytes() == wanted.tobytes()


def test_equal_tables_that_are_stored_differently_are_two_and_else_one(tmp_path: Path) -> None:
    units = [users_of(save(tmp_path, dtype, version=n + 1)) for n, dtype in enumerate(
        ["int8", "int8", "float32", None, "float16"]
    )]  # fmt: skip
    assert units[0].id == units[1].id
    assert units[2].id == units[3].id
    assert len({unit.id for unit in units}) == 3


@pytest.mark.parametrize(
    ("rows", "dtype", "says"),
    [
        (np.zeros((3, 2), np.int32), "float16", "rows of int32 cannot be saved as float16"),
        (np.zeros((3, 2), np.float32), "int32", "rows of float32 cannot be saved as int32"),
        (np.zeros((3, 2), np.float32), "int4", "unknown dtype 'int4'"),
        (np.full((3, 2), 1e5, np.float32), "float16", "too large for float16"),
        (np.full((3, 2), np.nan, np.float32), "int8", "NaN cannot be stored in int8"),
    ],
)
def test_rows_that_cannot_be_saved_so_are_refused(
    tmp_path: Path, rows: Any, dtype: str, says: str
) -> None:
    with pytest.raises(SpecMismatch, match=says):
        save(tmp_path, dtype, rows)


def test_sparse_rows_are_saved_as_they_are(tmp_path: Path) -> None:
    sparse = shards.SparseRows(rows=10, dim=2, given=[])
    with pytest.raises(InvalidArgument, match="sparse rows are saved as float32"):
        save(tmp_path, "int8", sparse)


def test_rows_of_an_int8_table_are_updated_and_compacted_as_floats(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    save(tmp_path, "int8")
    changed = WHOLE.copy()
    changed[[3, 30]] = np.array([127, 1, 2, 3, 4]), np.array([-127, 9, 8, 7, 6])
    with Bundle.delta(store, "model", base=1, version=2) as delta:
        delta.update_rows("users", [30, 3], changed[[30, 3]])
    assert [len(part.overlays) for part in users_of(delta.manifest).partitions] == [1, 0, 1]
    assert arrow(store, delta.manifest) == changed.tolist()
    with Bundle.delta(store, "model", base=2, version=3) as compacted:
        compacted.compact()
    assert users_of(compacted.manifest).id == users_of(save(tmp_path, "int8", changed, 4)).id
    assert arrow(store, compacted.manifest) == changed.tolist()


def arrow(store: LocalStore, manifest: Manifest) -> Any:
    return table_to_arrow(manifest, store, "users")["rows"].to_pylist()


def test_a_manifest_that_stores_anything_but_float32_in_int8_is_corrupt(tmp_path: Path) -> None:
    manifest = save(tmp_path, "int8")
    unit = msgspec.structs.replace(users_of(manifest), dtype="float16")
    with pytest.raises(BundleCorrupt, match="int8 is not a way to store float16"):
        check_manifest(msgspec.structs.replace(manifest, units={"users": unit}), "model/1")
