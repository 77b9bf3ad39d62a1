"""Atomic files and digests."""

from __future__ import annotations

import os
from pathlib import Path

import blake3
import numpy as np
import pytest

from shards.files import Hasher, digest_of, digest_of_file, write_atomically


def digest_at(path: Path) -> str:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return digest_of_file(descriptor)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 3 << 20])
def test_a_file_a_buffer_and_pieces_have_the_digest_that_blake3_gives(
    tmp_path: Path, size: int
) -> None:
    data = np.random.default_rng(size).bytes(size)
    path = tmp_path / "file"
    path.write_bytes(data)
    hasher = Hasher()
    for at in range(0, size, 1000):
        hasher.update(data[at : at + 1000])
    expected = blake3.blake3(data).hexdigest()
    assert (digest_at(path), digest_of(data), hasher.hexdigest()) == (expected,) * 3
    assert hasher.size == size


@pytest.mark.parametrize(
    "extents",
    [
        [(0, b"head")],
        [(5 << 20, b"tail")],
        [(0, b"head"), (3 << 20, b"middle"), (9 << 20, b"tail")],
        [],
    ],
)
def test_holes_are_hashed_as_zeros(tmp_path: Path, extents: list[tuple[int, bytes]]) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(10 << 20)
        for at, data in extents:
            file.seek(at)
            file.write(data)
    assert digest_at(path) == blake3.blake3(path.read_bytes()).hexdigest()


def test_buffers_of_any_type_are_hashed_as_their_bytes() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert digest_of(array.data) == digest_of(array.tobytes())
    assert digest_of(np.empty((0, 4), np.float32).data) == digest_of(b"")


def test_a_write_that_fails_leaves_neither_file_nor_temporary(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def pieces() -> object:
        yield b"first"
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write_atomically(path, pieces())  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_an_exclusive_write_keeps_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, (b"old",), exclusive=True)
    with pytest.raises(FileExistsError):
        write_atomically(path, (b"new",), exclusive=True)
    assert path.read_bytes() == b"old"
    write_atomically(path, (b"n", b"ew"), mode=0o444)
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o444
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_an_exclusive_write_holds_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    write_atomically(tmp_path / "file", (b"old",), exclusive=True)
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "file", (b"new",), exclusive=True)
    assert (tmp_path / "file").read_bytes() == b"old"
