"""What was verified, remembered: which file was found to have which digest.

Decides when a file needs not be hashed again: its inode, size and modification time are those of
the file that was. Memory is on disk where the disk can be written to, and in this process anyway.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from shards.files import write_atomically

__all__ = ["Stamps"]

logger = logging.getLogger(__name__)


class Stamps:
    """Stamps of verified files, by digest.

    Args:
        directory: where they are kept; made by the first write.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        # Bounded by the number of blobs.
        self._known: dict[str, str] = {}

    def fits(self, digest: str, status: os.stat_result) -> bool:
        """Whether this file was verified to have the digest."""
        stamp = _stamp(status)
        if self._known.get(digest) == stamp:
            return True
        # Not known here, or another file by now, which another process may have verified.
        try:
            known = (self._directory / digest).read_text()
        except (OSError, UnicodeDecodeError):
            return False
        self._known[digest] = known
        return known == stamp

    def remember(self, digest: str, status: os.stat_result) -> None:
        """This file was verified; `status` was taken before it was read.

        A write during the hash changes the file's time, so that the stamp does not fit and the
        file is hashed again.
        """
        stamp = self._known[digest] = _stamp(status)
        try:
            write_atomically(self._directory / digest, (stamp.encode(),), durable=False)
        except OSError as error:  # a read-only store: this process remembers, the next one hashes
            logger.debug("cannot remember that %s was verified: %s", digest, error)

    def forget(self, digest: str) -> None:
        """The file was found to be broken."""
        self._known.pop(digest, None)
        try:
            (self._directory / digest).unlink(missing_ok=True)
        except OSError as error:
            logger.warning("cannot forget that %s was verified: %s", digest, error)


def _stamp(status: os.stat_result) -> str:
    return f"{status.st_ino} {status.st_size} {status.st_mtime_ns}"
