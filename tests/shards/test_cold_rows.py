from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batching.errors import Unavailable
from shards.cold_file import ColdFile, buffer_bytes
from shards.cold_rows import ColdRows, base_bytes, open_cold
from shards.crew import Crew
from shards.errors import BundleCorrupt, BundleIncomplete
from shards.manifest import Partition
from shards.row_cache import RowCache
from shards.store import LocalStore

CREW = Crew(4)


def bytes_of_rows(rows: int, row_bytes: int) -> np.ndarray:
    drawn = np.random.default_rng(rows * 7919 + row_bytes).integers(256, size=(rows, row_bytes))
    return drawn.astype(np.uint8)


def open_file(
    path: Path, rows: np.ndarray, memory_bytes: int = 1 << 20, *, direct: bool = True
) -> ColdFile:
    path.write_bytes(rows.tobytes())
    descriptor = os.open(path, os.O_RDONLY)
    return ColdFile(descriptor, rows.shape[1], memory_bytes, CREW, "rows", direct=direct)


@settings(max_examples=40)
@given(st.data(), st.sampled_from([1, 7, 68, 256, 1028, 4096, 9000]), st.booleans())
def test_rows_are_read_as_they_lie(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, row_bytes: int, direct: bool
) -> None:
    count = data.draw(st.integers(1, 400))
    rows = bytes_of_rows(count, row_bytes)
    memory = data.draw(st.sampled_from([0, 1 << 18, 1 << 24]))
    file = open_file(tmp_path_factory.mktemp("rows") / "rows", rows, memory, direct=direct)
    asked = data.draw(st.lists(st.integers(0, count - 1), unique=True).map(sorted))
    positions = np.array(asked, np.int64)
    assert (file.read(positions) == rows[positions]).all()
    assert file.nbytes == buffer_bytes(row_bytes, memory)


def test_neighbours_are_read_in_one_call_and_others_apart(tmp_path: Path) -> None:
    file = open_file(tmp_path / "rows", bytes_of_rows(10_000, 100), 1 << 24)
    file.read(np.arange(100, 200))
    assert file.calls <= 2  # two where they lie in two windows
    before = file.calls
    file.read(np.arange(0, 10_000, 1000))
    assert file.calls == before + 10


def test_pages_of_a_file_that_is_read_past_the_cache_are_not_kept(tmp_path: Path) -> None:
    rows = bytes_of_rows(4096, 1024)
    file = open_file(tmp_path / "rows", rows, 1 << 24, direct=False)
    assert not file.is_direct
    assert (file.read(np.arange(0, 4096, 64)) == rows[::64]).all()


def test_a_file_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    file = open_file(tmp_path / "rows", bytes_of_rows(100, 1000))
    os.truncate(tmp_path / "rows", 50_000)
    assert len(file.read(np.arange(10))) == 10
    with pytest.raises(BundleIncomplete, match="cut"):
        file.read(np.arange(0, 100, 9))
    assert len(file.read(np.arange(10))) == 10  # and its buffers are there again


def test_a_disk_that_refuses_is_unavailable(tmp_path: Path) -> None:
    file = open_file(tmp_path / "rows", bytes_of_rows(100, 1000))
    file._reading = os.open(tmp_path, os.O_RDONLY)  # a directory cannot be read
    try:
        with pytest.raises(Unavailable, match="cannot be read"):
            file.read(np.arange(3))
    finally:
        os.close(file._reading)


def test_descriptors_are_closed_with_the_file(tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    file = open_file(rows, bytes_of_rows(100, 1000))
    assert open_of(rows) >= 1
    del file
    assert open_of(rows) == 0


def open_of(path: Path) -> int:
    """How many descriptors this process has of a file; others come and go in its threads."""
    found = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found += descriptor.readlink() == path
    return found


def cold(path: Path, rows: np.ndarray, cached: float) -> ColdRows:
    store = LocalStore(path)
    store.create()
    part = Partition(first_row=0, rows=len(rows), blob=store.put(rows))
    base = open_cold(store, part, cached, CREW)
    assert base.nbytes <= base_bytes(part, cached)
    return base


@pytest.mark.parametrize("cached", [0.0, 0.03, 0.25, 1.2])
def test_rows_come_in_the_order_asked_for_within_the_budget(tmp_path: Path, cached: float) -> None:
    rows = bytes_of_rows(20_000, 64)
    base = cold(tmp_path, rows, cached)
    asked = np.random.default_rng(1).zipf(1.2, 30_000) % len(rows)
    for part in np.split(asked, 3):
        assert (base.take(part) == rows[part]).all()
    assert base.nbytes <= max(rows.nbytes * cached, buffer_bytes(64, 0))
    figures = base.figures
    assert figures.hits + figures.misses == len(asked)
    assert (figures.hits > 0) == (cached > 0)


def test_a_row_that_is_asked_for_twice_at_once_is_read_once(tmp_path: Path) -> None:
    base = cold(tmp_path, bytes_of_rows(1000, 64), 1.0)
    base.take(np.array([5, 900, 5, 5]))
    assert (base.figures.hits, base.figures.misses, base.figures.reads) == (0, 4, 2)
    base.take(np.array([900, 5]))
    assert (base.figures.hits, base.figures.misses, base.figures.reads) == (2, 4, 2)


def test_a_blob_that_decayed_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.create()
    rows = bytes_of_rows(100, 64)
    part = Partition(first_row=0, rows=100, blob=store.put(rows))
    (blob,) = (tmp_path / "blobs").rglob(part.blob.digest)
    (tmp_path / "other").write_bytes(bytes(100 * 64))
    os.replace(tmp_path / "other", blob)
    with pytest.raises(BundleCorrupt):
        open_cold(store, part, 0.5, CREW)


def test_several_threads_get_their_own_rows(tmp_path: Path) -> None:
    rows = bytes_of_rows(5000, 64)
    base = cold(tmp_path, rows, 0.1)
    wrong: list[int] = []

    def ask(seed: int) -> Callable[[], None]:
        def work() -> None:
            for turn in range(20):
                asked = np.random.default_rng(seed * 100 + turn).integers(5000, size=200)
                wrong.append(int((base.take(asked) != rows[asked]).sum()))

        return work

    threads = [threading.Thread(target=ask(seed)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [0] * 80


def test_who_finds_all_readers_busy_reads_by_itself(tmp_path: Path) -> None:
    """Another table's disk that does not answer holds nobody up."""
    rows = bytes_of_rows(5000, 64)
    crew = Crew(2)
    answers = threading.Event()
    stuck = threading.Thread(target=lambda: crew.run(lambda: int(not answers.wait(30))))
    stuck.start()
    try:
        path = tmp_path / "rows"
        path.write_bytes(rows.tobytes())
        file = ColdFile(os.open(path, os.O_RDONLY), 64, 1 << 20, crew, "rows")
        base = ColdRows(file, RowCache(1 << 16, 64), len(rows), 1 << 16)
        asked = np.arange(0, 5000, 300)
        assert (base.take(asked) == rows[asked]).all()
        assert not answers.is_set()
    finally:
        answers.set()
        stuck.join()
