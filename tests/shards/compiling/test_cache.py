"""Executables on disk, and who may have written them."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import pytest

from shards.compiling.cache import ProgramCache


def entries(path: Path) -> list[Path]:
    return sorted((path / "executables-1").iterdir())


def test_what_was_put_is_found_by_another_process_of_the_user(tmp_path: Path) -> None:
    ProgramCache(tmp_path, "1").put(b"key", b"executable")
    cache = ProgramCache(tmp_path, "1")
    assert cache.get(b"key") == b"executable"
    assert cache.get(b"another") is None
    assert ProgramCache(tmp_path, "2").get(b"key") is None


def test_directory_key_and_entries_are_the_users_alone(tmp_path: Path) -> None:
    ProgramCache(tmp_path / "new", "1").put(b"key", b"executable")
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new").rglob("*")]
    assert sorted(modes) == [0o600, 0o600, 0o700]


@pytest.mark.parametrize("at", [0, 31, 32, -1])
def test_an_entry_that_was_changed_is_not_loaded_but_dropped(
    tmp_path: Path, at: int, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ProgramCache(tmp_path, "1")
    cache.put(b"key", b"executable")
    (path,) = entries(tmp_path)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert cache.get(b"key") is None
    assert "does not bear our seal" in caplog.text
    assert not path.exists()


def test_an_entry_cannot_stand_in_for_another(tmp_path: Path) -> None:
    cache = ProgramCache(tmp_path, "1")
    cache.put(b"one", b"executable of one")
    cache.put(b"two", b"executable of two")
    first, second = entries(tmp_path)
    second.write_bytes(first.read_bytes())
    found = {cache.get(b"one"), cache.get(b"two")}
    assert None in found
    assert len(found) == 2


def test_entries_of_another_key_are_not_found(tmp_path: Path) -> None:
    ProgramCache(tmp_path, "1").put(b"key", b"executable")
    (tmp_path / "key").unlink()
    assert ProgramCache(tmp_path, "1").get(b"key") is None


@pytest.mark.parametrize("shared", ["", "executables-1", "key"])
def test_nothing_is_kept_where_others_may_write(
    tmp_path: Path, shared: str, caplog: pytest.LogCaptureFixture
) -> None:
    ProgramCache(tmp_path, "1").put(b"key", b"executable")
    (tmp_path / shared).chmod(0o777)
    with caplog.at_level(logging.WARNING):
        cache = ProgramCache(tmp_path, "1")
    assert "not of this user alone" in caplog.text
    assert cache.get(b"key") is None
    cache.put(b"other", b"executable")
    cache.trim()
    assert len(entries(tmp_path)) == 1


def test_a_key_that_is_none_keeps_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "key").write_bytes(b"short")
    (tmp_path / "key").chmod(0o600)
    with caplog.at_level(logging.WARNING):
        assert ProgramCache(tmp_path, "1").get(b"key") is None
    assert "is not a key" in caplog.text


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    cache = ProgramCache(tmp_path, "1", bytes_max=2 * 8192)
    for number, name in enumerate((b"a", b"b", b"c")):
        before = set(entries(tmp_path))
        cache.put(name, bytes(8192 - 32))
        (path,) = {*entries(tmp_path)} - before
        os.utime(path, (number, number))
    assert cache.get(b"a") is not None  # and is now the one that was used last
    cache.trim()
    assert cache.get(b"b") is None
    assert cache.get(b"a") is not None
    assert cache.get(b"c") is not None


def test_what_cannot_be_written_is_only_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ProgramCache(tmp_path, "1")

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("shards.compiling.cache.write_atomically", full)
    with caplog.at_level(logging.WARNING):
        cache.put(b"key", b"executable")
    assert "no space left" in caplog.text
    assert cache.get(b"key") is None


def test_what_is_of_no_use_can_be_forgotten(tmp_path: Path) -> None:
    cache = ProgramCache(tmp_path, "1")
    cache.put(b"key", b"executable")
    cache.forget(b"key")
    cache.forget(b"key")
    assert cache.get(b"key") is None
