"""The node's cache: blobs of remote stores as local files, shared by every process of the node.

    <cache>/blobs/<digest>      a blob, mode 0444, verified; locked (shared) by whoever maps it
    <cache>/partial/<digest>    one that is being brought; locked (exclusive) by who brings it
    <cache>/.verified-<boot>/   which file was found to have which digest since this boot
    <cache>/lock                held while room is made, for no longer than that

Decides who brings a blob (one process; the others wait, and one takes over when it dies), what is
given up for it (`shards.eviction`), and that all of it stays within the budget. All locks are
`flock`s of open files, which the kernel drops with the process: nothing is left to be cleared by
hand after a crash. A mapping holds its blob's lock, and a blob that is given up all the same stays
readable to who has it mapped. Does not know where blobs come from.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from batching.errors import Unavailable
from shards.errors import BundleCorrupt, CacheFull
from shards.eviction import Cached, make_room
from shards.files import digest_of_file
from shards.manifest import BlobRef
from shards.progress import Progress
from shards.stamps import Stamps

__all__ = ["SIZE_BYTES", "NodeCache"]

logger = logging.getLogger(__name__)

#: The budget where none is given.
SIZE_BYTES: Final = 20 << 30
_WAIT_S: Final = 0.05
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class NodeCache:
    """A cache in a directory. Safe to use from several threads and processes at once.

    Args:
        directory: of this node, not shared between nodes; made when first needed.
        size_bytes: the most that blobs may take, those that are being brought included.
    """

    def __init__(self, directory: str | Path, size_bytes: int = SIZE_BYTES) -> None:
        self.directory = Path(directory).expanduser().absolute()
        self.size_bytes = size_bytes
        self._blobs = self.directory / "blobs"
        self._partial = self.directory / "partial"
        # Blobs are not synced to the disk before they get their names, which would cap the speed
        # of a load at the disk's. What a crash of the machine leaves is verified again.
        self._verified = f".verified-{_boot()}"
        self._stamps = Stamps(self.directory / self._verified)

    def map(
        self, ref: BlobRef, fetch: Callable[[int], None], progress: Progress | None = None
    ) -> npt.NDArray[np.uint8]:
        """A blob as read-only memory; brought first, where it is not here.

        While the memory lives the blob is held: it is not given up for others.

        Args:
            ref: the blob.
            fetch: writes the blob's verified bytes into an empty file, and raises otherwise.
            progress: told of a blob that is here, and asked whether to go on waiting.

        Raises:
            CacheFull: there is no room, and nothing that may go; or the disk is full.
            Unavailable: the disk or its permissions refuse.
            Cancelled: `progress` says so.
            ServingError: whatever `fetch` raises.
        """
        if ref.size == 0:
            empty = np.empty(0, np.uint8)
            empty.flags.writeable = False
            return empty
        descriptor = self.open(ref, fetch, progress)
        try:
            # The mapping keeps a duplicate of the descriptor, and with it the lock, until the last
            # array over it is gone.
            memory = mmap.mmap(descriptor, ref.size, access=mmap.ACCESS_READ)
        except OSError as error:
            raise Unavailable(f"the cache {self.directory}: {error.strerror}") from None
        finally:
            os.close(descriptor)
        return np.frombuffer(memory, np.uint8)

    def open(
        self, ref: BlobRef, fetch: Callable[[int], None], progress: Progress | None = None
    ) -> int:
        """A blob as a descriptor to read from, for the caller to close; as `map` does.

        While it is open the blob is held.
        """
        try:
            return self._open_or_bring(ref, fetch, progress)
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise CacheFull(self._disk_full(ref)) from None
            raise Unavailable(f"the cache {self.directory}: {error.strerror}") from None

    def _open_or_bring(
        self, ref: BlobRef, fetch: Callable[[int], None], progress: Progress | None
    ) -> int:
        while True:
            held = self._open(ref)
            if held is not None:
                if progress is not None:
                    progress.note(ref.digest, ref.size)
                return held
            descriptor = self._reserve(ref)
            if descriptor is None:
                self._await(ref, progress)
                continue
            try:
                self._bring(ref, descriptor, fetch)
            finally:
                os.close(descriptor)

    def usage(self) -> tuple[int, int]:
        """Bytes of blobs that are here, and of those that are being brought."""
        return sum(blob.size for blob in self._cached(probe=False)), self._coming()

    # --- one blob --------------------------------------------------------------------------------

    def _open(self, ref: BlobRef) -> int | None:
        """The blob's file, locked as held for as long as it is open; None if it is not here."""
        path = self._blobs / ref.digest
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            # Who gives it up holds the lock for an instant.
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            status = os.fstat(descriptor)
            if status.st_nlink == 0 or not self._is_sound(ref, descriptor, status):
                os.close(descriptor)
                return None
            with contextlib.suppress(OSError):  # the time of use; stamps look at the other one
                os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _is_sound(self, ref: BlobRef, descriptor: int, status: os.stat_result) -> bool:
        if status.st_size == ref.size:
            if self._stamps.fits(ref.digest, status):
                return True
            if digest_of_file(descriptor) == ref.digest:
                self._stamps.remember(ref.digest, status)
                return True
        logger.warning("%s in the cache is damaged: bringing it anew", ref.digest)
        (self._blobs / ref.digest).unlink(missing_ok=True)
        return False

    def _bring(self, ref: BlobRef, descriptor: int, fetch: Callable[[int], None]) -> None:
        partial = self._partial / ref.digest
        try:
            try:
                fetch(descriptor)
            except OSError as error:
                # What it wrote so far is given back first, or it would be in its own way.
                os.ftruncate(descriptor, 0)
                if error.errno not in _NO_ROOM or not self._empty_disk(ref):
                    raise
                fetch(descriptor)
            if os.fstat(descriptor).st_size != ref.size:
                raise BundleCorrupt(f"blob {ref.digest}: not {ref.size} bytes were brought")
            os.fchmod(descriptor, stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH)
            self._stamps.remember(ref.digest, os.fstat(descriptor))
            os.replace(partial, self._blobs / ref.digest)
        finally:
            # Still ours if it did not get its name: the lock is held until the descriptor closes.
            if _is_same(descriptor, partial):
                partial.unlink(missing_ok=True)

    def _await(self, ref: BlobRef, progress: Progress | None) -> None:
        """Another process, or thread, brings the blob: wait until it has, or is gone."""
        path = self._partial / ref.digest
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return
            try:
                if _try_lock(descriptor, fcntl.LOCK_SH):
                    return
                come = os.fstat(descriptor).st_blocks * 512
            finally:
                os.close(descriptor)
            if progress is not None:
                progress.note(ref.digest, min(come, ref.size))
            time.sleep(_WAIT_S)

    # --- room ------------------------------------------------------------------------------------

    def _reserve(self, ref: BlobRef) -> int | None:
        """Make room and begin a blob's file, locked; None where another has begun it."""
        for path in (self._blobs, self._partial):
            path.mkdir(mode=0o755, parents=True, exist_ok=True)
        path = self._partial / ref.digest
        with self._locked():
            self._sweep()
            if path.exists():  # what nobody brings any more was just swept
                return None
            if (self._blobs / ref.digest).exists():
                return None
            self._make_room(ref)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                # Sparse: takes no disk yet, and counts as promised from here on.
                os.ftruncate(descriptor, ref.size)
            except BaseException:
                path.unlink(missing_ok=True)
                os.close(descriptor)
                raise
            return descriptor

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _sweep(self) -> None:
        """Remove what processes that died, and earlier boots, have left behind."""
        for path in self._partial.iterdir():
            if _remove_if_free(path):
                logger.warning("%s was left half-brought: removed", path.name)
        for old in self.directory.glob(".verified-*"):
            if old.name != self._verified:
                shutil.rmtree(old, ignore_errors=True)

    def _make_room(self, ref: BlobRef) -> None:
        while True:
            cached = self._cached(probe=True)
            coming = self._coming()
            room = make_room(cached, coming, ref.size, self.size_bytes)
            if room.short:
                held = sum(blob.size for blob in cached if blob.held)
                raise CacheFull(
                    f"blob {ref.digest} of {ref.size} bytes does not fit into the cache "
                    f"{self.directory}: {room.short} bytes short; {held} are in use and {coming} "
                    f"on their way, of {self.size_bytes} (cluster.cache.size)"
                )
            if all([self._give_up(digest) for digest in room.victims]):
                return

    def _give_up(self, digest: str) -> bool:
        """Remove a blob unless somebody has begun to hold it."""
        gone = _remove_if_free(self._blobs / digest)
        if gone:
            self._stamps.forget(digest)
            logger.info("blob %s was given up for another", digest)
        return gone

    def _empty_disk(self, ref: BlobRef) -> bool:
        """Where the disk is smaller than the budget: give up what can be, if that is enough."""
        with self._locked():
            free = _free(self.directory)
            cached = self._cached(probe=True)
            used = sum(blob.size for blob in cached)
            room = make_room(cached, 0, ref.size, used + free)
            return not room.short and all([self._give_up(each) for each in room.victims])

    def _disk_full(self, ref: BlobRef) -> str:
        free = _free(self.directory)
        return (
            f"the disk of the cache {self.directory} is full: blob {ref.digest} needs {ref.size} "
            f"bytes, {free} are free: {max(ref.size - free, 0)} short"
        )

    def _cached(self, *, probe: bool) -> list[Cached]:
        found = []
        for entry in _entries(self._blobs):
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                held = probe and not _is_free(Path(entry.path))
                size = min(status.st_blocks * 512, status.st_size)
                found.append(Cached(entry.name, size, status.st_atime_ns, held))
        return found

    def _coming(self) -> int:
        total = 0
        for entry in _entries(self._partial):
            with contextlib.suppress(FileNotFoundError):
                total += entry.stat(follow_symlinks=False).st_size
        return total


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            return [entry for entry in entries if entry.is_file(follow_symlinks=False)]
    except FileNotFoundError:
        return []


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_free(path: Path) -> bool:
    """Whether nobody holds a file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _try_lock(descriptor, fcntl.LOCK_EX)
    finally:
        os.close(descriptor)


def _remove_if_free(path: Path) -> bool:
    """Remove a file that nobody holds; True as well where it is gone already."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        if not _try_lock(descriptor, fcntl.LOCK_EX):
            return False
        # Under the lock: who opened it meanwhile sees, once it gets the lock, that it is gone.
        path.unlink(missing_ok=True)
        return True
    finally:
        os.close(descriptor)


def _is_same(descriptor: int, path: Path) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(descriptor))


def _free(directory: Path) -> int:
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"
