"""Files that are whole or absent: atomic writes, and digests of large files.

Decides how bytes become durable (temporary file, fsync, rename, fsync of the directory) and how a
file is hashed (in pieces, on several threads, without reading holes). Does not know what the files
mean.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

import blake3
import numpy as np

__all__ = [
    "TEMPORARY",
    "Bytes",
    "Hasher",
    "copy_sparsely",
    "digest_of",
    "digest_of_file",
    "extents",
    "flat_view",
    "is_zeros",
    "sync_directory",
    "temporary_beside",
    "write_atomically",
    "write_through",
]

Bytes = bytes | bytearray | memoryview

#: How names of files begin that are not whole yet.
TEMPORARY: Final = ".tmp-"

#: Bytes hashed in one call. Long enough for the hash to use its threads, short enough that a
#: signal or another thread is not kept waiting.
_PIECE: Final = 64 << 20

#: Below this, starting threads costs more than it saves.
_THREADED: Final = 1 << 20

#: What a hole reads as. Hashing it is five times as fast as faulting the hole in.
_ZEROS: Final = memoryview(bytes(4 << 20))


class Hasher:
    """blake3 over pieces; threads are used where a piece is large."""

    __slots__ = ("_parallel", "size")

    def __init__(self) -> None:
        self._parallel = blake3.blake3(max_threads=blake3.blake3.AUTO)
        self.size = 0

    def update(self, piece: Bytes) -> None:
        """Add a piece."""
        with flat_view(piece) as view:
            self._parallel.update(view)
            self.size += len(view)

    def hexdigest(self) -> str:
        """The digest of all pieces so far."""
        return str(self._parallel.hexdigest())


def flat_view(data: Bytes) -> memoryview:
    """A new view of a buffer as plain bytes."""
    view = memoryview(data)
    # An empty view cannot be cast, and needs not be.
    return view.cast("B") if view.nbytes else memoryview(b"")


def is_zeros(view: memoryview) -> bool:
    """Whether plain bytes are all zeros.

    Measured for 8 MiB of zeros: 0.08 ms, where comparing two views takes 15 ms.
    """
    # Most pieces that are not zeros say so in their first bytes.
    return not any(view[:64]) and not np.frombuffer(view, np.uint8).max(initial=0)


def digest_of(data: Bytes) -> str:
    """The hex blake3 of a buffer."""
    with flat_view(data) as view:
        threads = blake3.blake3.AUTO if len(view) >= _THREADED else 1
        return str(blake3.blake3(view, max_threads=threads).hexdigest())


def digest_of_file(descriptor: int) -> str:
    """The hex blake3 of an open regular file; holes are counted as zeros and not read."""
    size = os.fstat(descriptor).st_size
    hasher = Hasher()
    if size == 0:
        return hasher.hexdigest()
    with mmap.mmap(descriptor, size, access=mmap.ACCESS_READ) as mapped:
        with contextlib.suppress(OSError):
            mapped.madvise(mmap.MADV_SEQUENTIAL)
        with memoryview(mapped) as view:
            for start, stop, hole in extents(descriptor, size):
                _hash_extent(hasher, view, start, stop, hole)
    return hasher.hexdigest()


def _hash_extent(hasher: Hasher, view: memoryview, start: int, stop: int, hole: bool) -> None:
    step = len(_ZEROS) if hole else _PIECE
    for at in range(start, stop, step):
        end = min(at + step, stop)
        if hole:
            hasher.update(_ZEROS[: end - at])
        else:
            with view[at:end] as piece:
                hasher.update(piece)


def extents(descriptor: int, size: int) -> Iterator[tuple[int, int, bool]]:
    """Yield ``(start, stop, is a hole)`` over the whole file, in order."""
    at = 0
    while at < size:
        try:
            data = min(os.lseek(descriptor, at, os.SEEK_DATA), size)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data from here to the end
                yield at, size, True
                return
            yield at, size, False  # a file system that knows no holes
            return
        if data > at:
            yield at, data, True
        at = data
        if at < size:
            end = min(os.lseek(descriptor, at, os.SEEK_HOLE), size)
            yield at, end, False
            at = end


def write_atomically(
    path: Path,
    pieces: Iterable[Bytes],
    *,
    mode: int = 0o644,
    exclusive: bool = False,
    durable: bool = True,
) -> None:
    """Write a file that is never seen half-written.

    Args:
        path: where; its directory is made if need be.
        pieces: the content.
        mode: permissions of the file.
        exclusive: refuse to replace a file that is already there.
        durable: return only once it is on the disk. What can be found out again needs not be.

    Raises:
        FileExistsError: `exclusive`, and the file is there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        write_through(temporary, pieces, mode, durable=durable)
        if exclusive:
            _move_exclusively(temporary, path)
        else:
            os.replace(temporary, path)
        if durable:
            sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _move_exclusively(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)  # unlike rename, fails where the name is taken
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        # A file system without hard links: the check and the rename are two steps, and the
        # directory has one writer by agreement.
        if path.exists():
            raise FileExistsError(errno.EEXIST, "the name is taken", str(path)) from None
        os.replace(temporary, path)


def temporary_beside(path: Path) -> Path:
    """A fresh hidden name in the same directory, so that a rename cannot cross file systems."""
    return path.with_name(f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(6)}")


def write_through(path: Path, pieces: Iterable[Bytes], mode: int, *, durable: bool = True) -> None:
    """Write one new file, and fsync it where it must be durable."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        for piece in pieces:
            with flat_view(piece) as rest:
                done = 0
                while done < len(rest):
                    done += os.write(descriptor, rest[done:])
        os.fchmod(descriptor, mode)
        if durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy_sparsely(data: Bytes, descriptor: int, wrote: Callable[[int], None]) -> None:
    """Write bytes into an empty file, leaving holes where there are only zeros.

    Args:
        data: the content.
        descriptor: the file, open for writing.
        wrote: told how much of the content is done.
    """
    with flat_view(data) as view:
        os.truncate(descriptor, len(view))
        for at in range(0, len(view), len(_ZEROS)):
            piece = view[at : at + len(_ZEROS)]
            if not is_zeros(piece):
                done = 0
                while done < len(piece):
                    done += os.pwrite(descriptor, piece[done:], at + done)
            wrote(at + len(piece))


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
