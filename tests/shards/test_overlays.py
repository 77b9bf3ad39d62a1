"""Overlays over a base, held against a plain array in which rows are replaced."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.checking import OVERLAYS_MAX, decode_manifest
from shards.errors import BundleCorrupt
from shards.manifest import BlobRef, Overlay, Partition, TableUnit
from shards.overlays import Patch, Replaced, index_bytes, merged, put_overlay, read_overlay
from shards.specs import DTYPES, STRING
from shards.store import LocalStore
from shards.tables import HostedTable
from tests.shards.serving import Array

NO_BLOB = BlobRef(digest="0" * 64, size=0)
PLAIN = sorted(name for name in DTYPES if name != STRING)


def table(dtype: str, dim: int, sizes: list[int]) -> TableUnit:
    parts, first = [], 0
    for size in sizes:
        parts.append(Partition(first_row=first, rows=size, blob=NO_BLOB))
        first += size
    return TableUnit(id="t", dtype=dtype, dim=dim, rows=first, partitions=tuple(parts))


def replaced(positions: list[int], value: float, dim: int = 2) -> Replaced:
    return Replaced(np.array(positions, np.int64), np.full((len(positions), dim), value, "f4"))


@functools.cache
def random_bits(seed: int, rows: int, dim: int, dtype: str) -> Array:
    """Every bit pattern, not numbers that are easily equal."""
    wanted = DTYPES[dtype]
    raw = np.random.default_rng(seed).integers(0, 256, rows * dim * wanted.itemsize, np.uint8)
    if dtype == "bool":
        raw &= 1
    return raw.view(wanted).reshape(rows, dim)


@given(st.data(), st.sampled_from(PLAIN), st.sampled_from([1, 2, 4]), st.integers(1, 5))
def test_a_chain_of_overlays_is_the_table_with_its_rows_replaced_bit_for_bit(
    data: st.DataObject, dtype: str, partitions: int, dim: int
) -> None:
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=partitions, max_size=partitions))
    unit = table(dtype, dim, sizes)
    rows = random_bits(0, unit.rows, dim, dtype).copy()
    bases = {
        i: rows[p.first_row : p.first_row + p.rows].copy() for i, p in enumerate(unit.partitions)
    }
    patches = {}
    for index, part in enumerate(unit.partitions):
        chain = []
        for number in range(data.draw(st.integers(0, 4))):
            positions = sorted(data.draw(st.sets(st.integers(0, part.rows - 1), min_size=1)))
            new = random_bits(number + 1, len(positions), dim, dtype)
            chain.append(Replaced(np.array(positions, np.int64), new))
            rows[part.first_row + np.array(positions)] = new
        if chain:
            patches[index] = Patch(chain)
            if data.draw(st.booleans()):  # folded into one is the same
                patches[index] = Patch([merged(chain)])
    ids = data.draw(st.lists(st.integers(0, unit.rows - 1), max_size=30))
    asked = np.array(ids, np.int64)
    found = HostedTable(unit, bases, patches).rows(asked)
    assert (found.dtype, found.shape) == (rows.dtype, (len(ids), dim))
    assert found.tobytes() == rows[asked].tobytes()


def test_of_several_overlays_the_later_wins_and_the_index_is_no_larger_than_promised() -> None:
    chain = [replaced([1, 3, 5], 1), replaced([3], 2), replaced([0, 5], 3)]
    part = Partition(
        first_row=0, rows=6, blob=NO_BLOB,
        overlays=tuple(Overlay(rows=len(each.positions), blob=NO_BLOB) for each in chain),
    )  # fmt: skip
    patch = Patch(chain)
    out = np.zeros((6, 2), np.float32)
    patch.apply(np.arange(6), out)
    assert out[:, 0].tolist() == [3, 1, 0, 2, 0, 3]
    assert 0 < patch.nbytes <= index_bytes(part) == 16 * 6
    assert merged(chain).positions.tolist() == [0, 1, 3, 5]
    assert merged(chain).rows[:, 0].tolist() == [3, 1, 2, 3]


def test_a_single_overlay_is_searched_where_it_lies() -> None:
    assert Patch([replaced([0, 4], 1)]).nbytes == 0


@pytest.mark.parametrize("count", [1, 7, 8, 9])
def test_an_overlay_is_read_as_it_was_written_on_aligned_memory(tmp_path: Path, count: int) -> None:
    store = LocalStore(tmp_path)
    positions = np.arange(count, dtype=np.int64) * 3
    rows = random_bits(1, count, 5, "bfloat16")
    overlay = put_overlay(store, Replaced(positions, rows))
    found = read_overlay(table("bfloat16", 5, [100]), 0, overlay, store.map(overlay.blob))
    assert found.positions.tolist() == positions.tolist()
    assert found.rows.tobytes() == rows.tobytes()
    assert found.rows.__array_interface__["data"][0] % 64 == 0


@pytest.mark.parametrize("positions", [[3, 1], [1, 1], [-1, 2], [2, 10]])
def test_an_overlay_whose_positions_a_search_would_get_wrong_is_refused(
    tmp_path: Path, positions: list[int]
) -> None:
    store = LocalStore(tmp_path)
    overlay = put_overlay(store, replaced(positions, 1))
    with pytest.raises(BundleCorrupt, match="are not ascending inside the 10 rows of partition 0"):
        read_overlay(table("float32", 2, [10]), 0, overlay, store.map(overlay.blob))


def manifest_with(overlays: list[dict[str, Any]]) -> bytes:
    """A manifest with one partition of ten rows of eight bytes, and these overlays."""
    blob = {"digest": "a" * 64, "size": 80}
    part = {"first_row": 0, "rows": 10, "blob": blob, "overlays": overlays}
    unit = {"type": "table", "id": "t", "dtype": "float32", "dim": 2, "rows": 10,
            "partitions": [part]}  # fmt: skip
    signature = {
        "method": "predict", "inputs": {"ids": [["b"], "int64"]}, "returns": {"rows": "0:rows"},
        "outputs": {"rows": [["b", 2]]}, "nodes": [{"unit": "t", "inputs": {"ids": "in:ids"}}],
    }  # fmt: skip
    return msgspec.json.encode(
        {"schema": 3, "name": "m", "version": 1, "units": {"t": unit},
         "signatures": {"s": signature}, "created": {"shardserve": "", "jax": "", "at": ""}}
    )  # fmt: skip


def overlay_of(rows: int, size: int) -> dict[str, Any]:
    return {"rows": rows, "blob": {"digest": "b" * 64, "size": size}}


@pytest.mark.parametrize(
    ("overlays", "problem"),
    [
        ([overlay_of(1, 71)], "an overlay of 1 rows in 71 bytes does not fit partition 0"),
        ([overlay_of(0, 0)], "does not fit"),
        ([overlay_of(11, 128 + 88)], "does not fit"),
        ([overlay_of(1, 72)] * (OVERLAYS_MAX + 1), "has 9 overlays, at most 8 are read"),
    ],
)
def test_a_manifest_whose_overlays_do_not_fit_is_refused(
    overlays: list[dict[str, Any]], problem: str
) -> None:
    decode_manifest(manifest_with([overlay_of(1, 72)] * OVERLAYS_MAX), "m/1")
    with pytest.raises(BundleCorrupt, match=problem):
        decode_manifest(manifest_with(overlays), "m/1")
