"""One port for several router processes of a node (``SO_REUSEPORT``).

The kernel gives each new connection to one of those that listen, and to the others when one has
ended. It lets whoever of the same user asks for it listen, too, so a claim, a locked file, keeps
another cluster off the port: connections would go to either.
"""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from pathlib import Path
from typing import Final

__all__ = ["PortClaim", "processes_on"]

#: A router serves some 25,000 small requests a second with one processor, and what it asks needs
#: several times that: beyond so many of a node's processors another router finds work.
_PROCESSORS_EACH: Final = 8
_AUTO_MAX: Final = 8


def processes_on(declared: int, processors: int) -> int:
    """How many router processes a node has.

    Args:
        declared: 0 for as many as its processors are good for: one for each eight, eight at most.
        processors: of the node.
    """
    return declared or min(max(processors // _PROCESSORS_EACH, 1), _AUTO_MAX)


class PortClaim:
    """A port of this machine, claimed for the routers of one cluster while any of them lives.

    Args:
        port: TCP.
        owner: the same for all routers that may share it.
        directory: where claims are; by default one of the user's own among temporary files.

    Raises:
        OSError: it is another's (`errno.EADDRINUSE`), or the file cannot be made.
    """

    def __init__(self, port: int, owner: str, directory: Path | None = None) -> None:
        where = directory or Path(tempfile.gettempdir(), f"shardserve-ports-{os.getuid()}")
        where.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(where / str(port), flags, 0o600)
        try:
            self._claim(port, owner.encode())
        except BaseException:
            self.release()
            raise

    def _claim(self, port: int, owner: bytes) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass  # somebody has it; whose it is stands in the file
        else:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, owner, 0)
        # A lock is not made weaker in one step: another may come between, so it is read after.
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            found = b""
        else:
            found = os.pread(self._descriptor, len(owner) + 1, 0)
        if found != owner:
            text = f"port {port} is shared by the routers of another cluster"
            raise OSError(errno.EADDRINUSE, text)

    def release(self) -> None:
        """Give it up. The end of the process does so, too."""
        os.close(self._descriptor)
