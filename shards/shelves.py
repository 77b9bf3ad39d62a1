"""Small files of a store by path: what a directory and a bucket have in common.

Decides what the rest may rely on: a file is whole or absent, what was written is listed at once,
and of several who create one path exclusively at most one succeeds. Object stores keep this
(`shards.objects`); here it is for a directory. Does not know what the files mean.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

from batching.errors import InvalidArgument, Unavailable
from shards.files import Bytes, write_atomically

__all__ = ["DirectoryShelf", "Object", "Shelf"]


class Object(NamedTuple):
    """One file that is there.

    Attributes:
        path: under the root, with slashes.
        size: bytes.
        mtime_s: when it came to be there, by the store's clock.
    """

    path: str
    size: int
    mtime_s: float


class Shelf(Protocol):
    """Files under a root. Every method may raise `Unavailable`."""

    def list(self, prefix: str, *, recursive: bool = True) -> tuple[list[Object], list[str]]:
        """Files and folders under a folder, by path; nothing where there is no such folder."""

    def stat(self, path: str) -> Object | None:
        """A file, or None where there is none."""

    def read(self, path: str, size_max: int) -> bytes:
        """A file's bytes.

        Raises:
            FileNotFoundError: there is none.
            InvalidArgument: it is larger than that.
        """

    def write(self, path: str, data: Bytes) -> None:
        """Write a file, or replace it."""

    def create_exclusively(self, path: str, data: Bytes) -> None:
        """Write a file that nobody else writes.

        Raises:
            FileExistsError: it is there, or somebody else is about to write it.
        """

    def delete(self, path: str) -> None:
        """Remove a file; one that is not there is fine."""


class DirectoryShelf:
    """The files of a directory.

    Args:
        root: the directory; made by the first write.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def list(self, prefix: str, *, recursive: bool = True) -> tuple[list[Object], list[str]]:
        """Files and folders under a folder; hidden files are not shown.

        Raises:
            Unavailable: a folder cannot be read.
        """
        found: list[Object] = []
        folders: list[str] = []
        for path, entry in _walk(self._root / prefix, prefix, recursive):
            try:
                if entry.is_dir():
                    folders.append(path)
                else:
                    found.append(_object(path, entry.stat()))
            except FileNotFoundError:  # removed meanwhile
                continue
        return sorted(found), sorted(folders)

    def stat(self, path: str) -> Object | None:
        """A file, or None where there is none.

        Raises:
            Unavailable: the disk or its permissions refuse.
        """
        try:
            return _object(path, os.stat(self._root / path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise Unavailable(f"{self._root / path}: {error.strerror}") from None

    def read(self, path: str, size_max: int) -> bytes:
        """A file's bytes.

        Raises:
            FileNotFoundError: there is none.
            InvalidArgument: it is larger than that.
            Unavailable: the disk or its permissions refuse.
        """
        try:
            with open(self._root / path, "rb") as file:
                data = file.read(size_max + 1)
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(f"{self._root / path} is not there") from None
        except OSError as error:
            raise Unavailable(f"{self._root / path}: {error.strerror}") from None
        if len(data) > size_max:
            raise InvalidArgument(f"{self._root / path} is larger than {size_max} bytes")
        return data

    def write(self, path: str, data: Bytes) -> None:
        """Write a file, or replace it. What must outlive the machine is created exclusively.

        Raises:
            Unavailable: the disk or its permissions refuse.
        """
        with _typed(self._root / path):
            write_atomically(self._root / path, (data,), durable=False)

    def create_exclusively(self, path: str, data: Bytes) -> None:
        """Write a file that is not there yet.

        Raises:
            FileExistsError: it is.
            Unavailable: the disk or its permissions refuse.
        """
        with _typed(self._root / path, FileExistsError):
            write_atomically(self._root / path, (data,), exclusive=True)

    def delete(self, path: str) -> None:
        """Remove a file; one that is not there is fine.

        Raises:
            Unavailable: the disk or its permissions refuse.
        """
        with _typed(self._root / path):
            (self._root / path).unlink(missing_ok=True)


@contextmanager
def _typed(path: Path, *meant: type[OSError]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, meant):
            raise
        raise Unavailable(f"{path} cannot be written: {error.strerror}") from None


def _walk(directory: Path, prefix: str, recursive: bool) -> Iterator[tuple[str, os.DirEntry[str]]]:
    try:
        with os.scandir(directory) as scan:
            entries = [entry for entry in scan if not entry.name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise Unavailable(f"{directory} cannot be read: {error.strerror}") from None
    for entry in entries:
        path = f"{prefix}/{entry.name}" if prefix else entry.name
        yield path, entry
        if recursive and entry.is_dir(follow_symlinks=False):
            yield from _walk(directory / entry.name, path, recursive)


def _object(path: str, status: os.stat_result) -> Object:
    # A copy may keep the time of writing; the inode's own time is when it came here.
    return Object(path, status.st_size, max(status.st_mtime_ns, status.st_ctime_ns) / 1e9)
