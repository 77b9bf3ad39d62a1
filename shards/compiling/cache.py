"""Executables on disk, so that an actor that comes back needs no compile process.

    <directory>/key                         32 random bytes, of mode 0600, made on first use
    <directory>/executables-<jax>/<name>    32 bytes of seal, then the executable

An executable is machine code inside a pickle: loading one is running it. XLA's own cache leaves
that to the permissions of its directory. Here the directory and the key must belong to this user
alone, too, and every entry is sealed with that key, over its name and its bytes, before a byte of
it is used: who can write entries but not read the key makes the cache miss, and no more. Who can
read the key is this user, who may run code here anyway. A name is derived from the key and from
everything that an executable depends on, so that no entry can stand in for another.

XLA's own cache is not used beside this one: an executable that came from there cannot be handed to
another process (measured on jax 0.10.2: half of its functions are then missing).

Decides what is kept and what goes. Does not know JAX.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import secrets
import stat
from pathlib import Path
from typing import Final

from shards.files import write_atomically

__all__ = ["ProgramCache"]

logger = logging.getLogger(__name__)

_ALGORITHM: Final = "sha256"
_SEAL_BYTES: Final = 32
_KEY_BYTES: Final = 32
#: More than this is not read: no program of ours is that large.
_ENTRY_BYTES_MAX: Final = 1 << 30
#: The least that an entry takes on a disk.
_FILE_BYTES: Final = 4096


class ProgramCache:
    """A directory of sealed executables. Safe to share between processes.

    Args:
        directory: of this user alone; made if it is not there.
        version: entries of one version are not found under another.
        bytes_max: of a version's entries; those that were not used for longest go first.
    """

    def __init__(self, directory: Path, version: str, bytes_max: int = 4 << 30) -> None:
        self._directory = directory / f"executables-{version}"
        self._bytes_max = bytes_max
        self._key = b""
        try:
            for each in (directory, self._directory):
                each.mkdir(mode=0o700, parents=True, exist_ok=True)
                _check_ours(each, stat.S_IWGRP | stat.S_IWOTH)
            self._key = _key(directory / "key")
        except OSError as error:
            logger.warning("executables are not kept: %s", error)

    def get(self, key: bytes) -> bytes | None:
        """What was kept under a key, or None."""
        if not self._key:
            return None
        path = self._path(key)
        try:
            with open(path, "rb") as file:
                if os.fstat(file.fileno()).st_size > _ENTRY_BYTES_MAX:
                    return None
                data = file.read()
            os.utime(path)
        except OSError:
            return None
        seal, body = data[:_SEAL_BYTES], data[_SEAL_BYTES:]
        if not hmac.compare_digest(seal, self._seal(path.name, body)):
            logger.warning("%s does not bear our seal: compiling again", path)
            path.unlink(missing_ok=True)
            return None
        return body

    def put(self, key: bytes, data: bytes) -> None:
        """Keep an executable; a disk that refuses costs only the next start its time."""
        if not self._key or len(data) + _SEAL_BYTES > _ENTRY_BYTES_MAX:
            return
        path = self._path(key)
        try:
            write_atomically(path, (self._seal(path.name, data), data), mode=0o600, durable=False)
        except OSError as error:
            logger.warning("%s cannot be written: %s", path, error)

    def forget(self, key: bytes) -> None:
        """Drop an entry that turned out to be of no use."""
        self._path(key).unlink(missing_ok=True)

    def trim(self) -> None:
        """Keep to the bound."""
        if not self._key:
            return
        entries = []
        for entry in os.scandir(self._directory):
            try:
                status = entry.stat()
            except OSError:  # another process was quicker
                continue
            # What a file takes on the disk: of the smallest, too, there are not more and more.
            size = max(status.st_size, _FILE_BYTES)
            entries.append((status.st_mtime_ns, size, entry.path))
        held = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if held <= self._bytes_max:
                break
            Path(path).unlink(missing_ok=True)
            held -= size

    def _path(self, key: bytes) -> Path:
        return self._directory / hmac.new(self._key, b"name" + key, _ALGORITHM).hexdigest()

    def _seal(self, name: str, body: bytes) -> bytes:
        mac = hmac.new(self._key, b"seal" + name.encode(), _ALGORITHM)
        mac.update(body)
        return mac.digest()


def _key(path: Path) -> bytes:
    """The key of this user, drawn if there is none; processes that begin at once agree on it."""
    if not path.exists():
        with contextlib.suppress(FileExistsError):
            write_atomically(path, (secrets.token_bytes(_KEY_BYTES),), mode=0o600, exclusive=True)
    _check_ours(path, stat.S_IRWXG | stat.S_IRWXO)
    key = path.read_bytes()
    if len(key) != _KEY_BYTES:
        raise OSError(f"{path} is not a key")
    return key


def _check_ours(path: Path, forbidden: int) -> None:
    status = path.stat()
    if status.st_uid != os.geteuid() or status.st_mode & forbidden:
        raise OSError(f"{path} is not of this user alone")
