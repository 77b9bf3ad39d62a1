"""Compiled kernels, kept between processes by this user and for this user alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from numba import types

from shards.compiling.cache import ProgramCache
from shards.kernel_cache import compiled

SIGNATURE = types.int64(types.int64)


def twice(number: Any) -> Any:
    return number + number


def made(directory: Path, source: Path) -> Any:
    return compiled(twice, [SIGNATURE], ProgramCache(directory, "1"), [source], nogil=True)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.py"
    path.write_text("one")
    return path


def hits(kernel: Any) -> int:
    return sum(kernel.stats.cache_hits.values())


def entries(directory: Path) -> list[Path]:
    return list((directory / "executables-1").iterdir())


def test_a_kernel_is_compiled_once_and_again_for_another_source(
    tmp_path: Path, source: Path
) -> None:
    directory = tmp_path / "cache"
    first, second = made(directory, source), made(directory, source)
    assert (hits(first), hits(second)) == (0, 1)
    assert first(21) == second(21) == 42
    source.write_text("two")
    assert hits(made(directory, source)) == 0


def test_an_entry_of_somebody_else_is_not_unpickled(tmp_path: Path, source: Path) -> None:
    directory = tmp_path / "cache"
    made(directory, source)
    [entry] = entries(directory)
    seal = entry.read_bytes()[:32]
    marker = tmp_path / "ran"
    hostile = f"cposix\nsystem\n(S'touch {marker}'\ntR.".encode()
    entry.write_bytes(seal + hostile)
    kernel = made(directory, source)
    assert not marker.exists()
    assert (hits(kernel), kernel(21)) == (0, 42)


def test_where_others_may_write_nothing_is_kept(tmp_path: Path, source: Path) -> None:
    directory = tmp_path / "cache"
    directory.mkdir()
    directory.chmod(0o777)
    assert made(directory, source)(21) == 42
    assert list(directory.iterdir()) == [] or entries(directory) == []
    assert hits(made(directory, source)) == 0


def test_a_damaged_entry_that_bears_our_seal_is_compiled_again(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "cache"
    made(directory, source)
    monkeypatch.setattr(ProgramCache, "get", lambda self, key: b"not a pickle")
    kernel = made(directory, source)
    assert (hits(kernel), kernel(21)) == (0, 42)
