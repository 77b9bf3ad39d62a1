"""What ``terabyte`` writes, and how it reads the kernel's books."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from bench.terabyte_memory import Memory, disk_bytes, read_memory
from bench.terabyte_model import DIM, ROW_BYTES, draw_ids, rows_of, save, save_delta, save_dense
from bench.terabyte_nvme import Cold, ColdSizes
from shards.manifest import TableUnit
from shards.store import LocalStore

SMAPS = """\
7f0000000000-7f0000100000 r--s 00000000 fe:00 17 /tmp/store/blobs/blake3/0123456789abcdef
Size:               1024 kB
Rss:                 100 kB
Pss:                  60 kB
Pss_Dirty:             7 kB
7f1000000000-7f1000100000 r--p 00000000 fe:00 18 /usr/lib/libc.so.6
Pss:                 500 kB
7f2000000000-7f2000100000 rw-p 00000000 00:00 0
Pss:                  40 kB
7f3000000000-7f3000100000 r--s 00000000 fe:00 19 /tmp/store/blobs/blake3/fedcba
Pss:                   4 kB
VmFlags: rd sh mr mw me ms
"""
STATUS = "Name:\tray\nVmPTE:\t     300 kB\nRssAnon:\t    2000 kB\nThreads:\t3\n"


def test_mapped_blobs_are_told_from_all_else() -> None:
    found = read_memory(SMAPS, STATUS)
    assert found == Memory(blobs=64 << 10, own=2000 << 10, page_tables=300 << 10)


def test_rows_of_different_ids_and_versions_are_all_different_and_no_zeros() -> None:
    ids = draw_ids(1 << 30, 2000, 16, 0)
    rows = np.concatenate([rows_of(ids, 1), rows_of(ids, 2)])
    assert len(np.unique(rows, axis=0)) == 2 * len(ids)
    assert rows.any(axis=1).all()
    assert rows.dtype == np.float32


def test_ids_are_as_many_as_asked_for_and_of_every_partition() -> None:
    for count in (16, 1000, 5000):
        ids = draw_ids(1 << 20, count, 16, 3)
        assert len(ids) >= count
        assert (np.diff(ids) > 0).all()
        assert len(np.unique(ids // (1 << 16))) == 16


def test_what_is_saved_has_these_rows_in_both_versions(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    ids = draw_ids(1 << 20, 100, 4, 0)
    save(store.path, "full", rows=1 << 20, ids=ids, partitions=4)
    save_delta(store.path, "full", ids[::5])
    unit = store.read_manifest("full", 2).units["rows"]
    assert isinstance(unit, TableUnit)
    assert sum(o.rows for part in unit.partitions for o in part.overlays) == len(ids[::5])
    assert disk_bytes(store.path) < 4 << 20
    part = unit.partitions[0]
    rows = store.map(part.blob).view(np.ndarray).view(np.float32).reshape(-1, DIM)
    mine = ids[ids < part.rows]
    assert np.array_equal(rows[mine], rows_of(mine, 1))


def test_what_is_held_against_the_budget_is_what_is_more_and_late_calls_are_the_second_half() -> (
    None
):
    found = Cold(
        seconds={"ask": 2.0}, asked=4 * 4096, wrong=0, calls_ms=(900.0, 800.0, 10.0, 30.0),
        grown=105, held=90, hits=1, misses=3, reads=2, read_bytes=8192, direct=True, disk=400,
        budget=100,
    )  # fmt: skip
    assert found.ratios == {"nvme_rows_wrong": 0.0, "nvme_budget_used": 1.05}
    assert dataclasses.replace(found, grown=80).ratios["nvme_budget_used"] == 0.9
    assert found.figures["nvme_p50_ms"] == 20.0
    assert found.figures["nvme_hit_rate"] == 0.25
    assert found.figures["nvme_rows_a_second"] == pytest.approx(2 * 4096 / 0.04)
    assert ("rows asked for", 4 * 4096) in found.table.rows


def test_the_table_in_the_nvme_tier_is_four_times_its_budget() -> None:
    for quick in (False, True):
        sizes = ColdSizes.of(quick=quick)
        assert sizes.rows * ROW_BYTES == pytest.approx(4 * sizes.budget, rel=1e-4)
        # The cache is full for long: more rows are asked for than it has places for.
        assert sizes.asked > 2 * sizes.budget / ROW_BYTES


def test_a_dense_table_has_all_its_rows(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    save_dense(store.path, "cold", rows=1003, partitions=4)
    unit = store.read_manifest("cold", 1).units["rows"]
    assert isinstance(unit, TableUnit)
    for part in unit.partitions:
        rows = store.map(part.blob).view(np.ndarray).view(np.float32).reshape(-1, DIM)
        ids = np.arange(part.first_row, part.first_row + part.rows)
        assert np.array_equal(rows, rows_of(ids, 1))
