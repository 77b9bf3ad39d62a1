"""Ports of this machine: which are free, and whose they are before anybody listens.

Between the choice of a port and its use may lie half a minute, in which another cluster may look
for one; and where ports are shared (``SO_REUSEPORT``) the kernel lets any process of the same user
listen beside ours. So a cluster claims its ports: each is a locked file while anybody who holds
the claim lives.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import socket
import tempfile
from pathlib import Path
from typing import Final

from batching.errors import Unavailable

__all__ = ["PortClaim", "claim_ports", "claim_usual", "free_ports"]

#: Above the ports that Ray gives to its workers.
_FIRST_PORT: Final = 20_000
_PORTS_MIN: Final = 1000
_TRIES_MAX: Final = 1000


class PortClaim:
    """A port of this machine, claimed for one cluster while anybody holds the claim.

    Args:
        port: TCP.
        owner: the same for all that may have it together.
        directory: where claims are; by default one of the user's own among temporary files.

    Raises:
        OSError: it is another's (`errno.EADDRINUSE`), or the file cannot be made.
    """

    def __init__(self, port: int, owner: str, directory: Path | None = None) -> None:
        self.port = port
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
            text = f"port {port} is claimed for another cluster"
            raise OSError(errno.EADDRINUSE, text)

    def fileno(self) -> int:
        """What a process has to inherit to hold the claim, too."""
        return self._descriptor

    def release(self) -> None:
        """Give it up, as far as this process holds it. Its end does so, too."""
        os.close(self._descriptor)


def claim_ports(count: int) -> list[PortClaim]:
    """Claim ports that nobody has, between those of Ray's workers and those of any client.

    From the latter the kernel gives one to whoever asks for any, which may be before ours is used.

    Raises:
        Unavailable: there are not so many.
        OSError: claims cannot be made.
    """
    bounds = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    last = max(int(bounds[0]), _FIRST_PORT + _PORTS_MIN)  # a host may give clients all it has
    claims: list[PortClaim] = []
    try:
        for _ in range(_TRIES_MAX):
            if len(claims) == count:
                return claims
            claim = _claimed(_FIRST_PORT + secrets.randbelow(last - _FIRST_PORT))
            claims += [] if claim is None else [claim]
        raise Unavailable(f"no free ports from {_FIRST_PORT} to {last}")
    except BaseException:
        for claim in claims:
            claim.release()
        raise


def claim_usual(port: int) -> PortClaim:
    """Claim this port or, where another cluster or a stranger has it, any.

    Raises:
        Unavailable: none is free.
        OSError: claims cannot be made.
    """
    return _claimed(port) or claim_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Ports that nobody has now; see `claim_ports`."""
    claims = claim_ports(count)
    for claim in claims:
        claim.release()
    return [claim.port for claim in claims]


def _claimed(port: int) -> PortClaim | None:
    """The claim, unless somebody has the port. Whoever looks later finds claim or listener."""
    try:
        claim = PortClaim(port, owner=secrets.token_hex(8))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return None
    if _is_free(port):
        return claim
    claim.release()
    return None


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True
