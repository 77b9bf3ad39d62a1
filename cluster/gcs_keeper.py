"""Starts the head's GCS again, as it was started, when it dies: `python -m cluster.gcs_keeper`.

Ray starts its GCS, the book of all nodes and actors, once. Where nobody watches it, nodes wait for
it in vain and end themselves; where `ray start --block` watches it, the head's other processes end
with it. This runs beside Ray on the head, and ends when the head's raylet has ended, since then
Ray was stopped. Does not know what the GCS knows: a new one finds that only where Ray was told to
keep it outside of the process, and without that this refuses to run. Linux only: reads /proc.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from batching.errors import FailedPrecondition, NotFound, ServingError
from cluster.ownership import check_ownership
from cluster.supervision import Intensity, judge

__all__ = [
    "Server",
    "find_server",
    "has_raylet",
    "keep",
    "keeps_its_state",
    "main",
    "server_to_keep",
]

logger = logging.getLogger(__name__)

_SERVER: Final = "gcs_server"
_RAYLET: Final = "raylet"


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A GCS that runs, and all that it takes to run it again.

    Attributes:
        pid: its process.
        command: program and arguments.
        environment: which it was started in.
    """

    pid: int
    command: tuple[str, ...]
    environment: Mapping[str, str]

    @property
    def session(self) -> str:
        """The directory of the Ray session that it belongs to."""
        return _option(self.command, "--session-dir")


def find_server(port: int) -> Server | None:
    """The GCS of a port on this machine, or None."""
    for pid, command in _commands():
        if _is(command, _SERVER) and _option(command, "--gcs_server_port") == str(port):
            try:
                text = Path(f"/proc/{pid}/environ").read_text(errors="surrogateescape")
            except OSError:
                continue
            lines = (line.partition("=") for line in text.split("\0") if "=" in line)
            environment = {name: value for name, _, value in lines}
            return Server(pid=pid, command=command, environment=environment)
    return None


def has_raylet(session: str) -> bool:
    """Whether the raylet of a session lives on this machine."""
    return any(
        _is(command, _RAYLET) and any(session in word for word in command)
        for _, command in _commands()
    )


def keeps_its_state(server: Server) -> bool:
    """Whether a GCS that is started again will know what this one knows."""
    settings = server.environment
    return settings.get("RAY_gcs_storage") == "rocksdb" or bool(settings.get("RAY_REDIS_ADDRESS"))


def server_to_keep(port: int) -> Server:
    """The GCS of a port on this machine.

    Raises:
        NotFound: there is none.
        FailedPrecondition: it would come back knowing nothing, which is worse than not at all.
    """
    server = find_server(port)
    if server is None:
        raise NotFound(f"no GCS listens on port {port} of this machine: run `ray start` first")
    if not keeps_its_state(server):
        raise FailedPrecondition(
            "the GCS keeps its state in memory alone, so another one would know no actor: start "
            "Ray with RAY_gcs_storage=rocksdb and RAY_gcs_storage_path, or with RAY_REDIS_ADDRESS"
        )
    return server


def keep(server: Server, intensity: Intensity) -> None:
    """Start a GCS again whenever it dies, until Ray is stopped.

    One that dies again and again is left alone for longer and longer, but never given up: what made
    it die (a Redis that is away, a full disk) may pass, and without a GCS nothing else can.
    """
    crashes: tuple[float, ...] = ()
    pauses = 0
    child: subprocess.Popen[bytes] | None = None
    pid = server.pid
    started_at = -math.inf
    logger.info("keeping the GCS, process %d", pid)
    while True:
        _await_end(pid)
        if child is not None:
            child.wait()
        now = time.monotonic()
        if now - started_at >= intensity.window_s:
            pauses = 0
        verdict = judge((*crashes, now), now, intensity, pauses)
        crashes, pauses = verdict.recent, verdict.pauses
        if pauses:
            logger.error("the GCS died %d times in %g s", len(crashes), intensity.window_s)
        time.sleep(max(verdict.restart_at - time.monotonic(), 0.0))
        # `ray stop` ends the raylet first and the GCS last.
        if not has_raylet(server.session):
            logger.info("Ray was stopped")
            return
        child = subprocess.Popen(
            server.command,
            env=dict(server.environment),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        logger.warning("the GCS (process %d) died; it runs again as %d", pid, child.pid)
        pid, started_at = child.pid, time.monotonic()


def main(arguments: list[str] | None = None) -> int:
    """Entry point.

    Returns:
        0 once Ray was stopped; 1 if the GCS cannot be kept, with the reason on standard error.
    """
    parser = argparse.ArgumentParser(prog="python -m cluster.gcs_keeper", description=__doc__)
    parser.add_argument("--port", type=int, default=6379, help="of the GCS (default: %(default)s)")
    port: int = parser.parse_args(arguments).port
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        check_ownership()
        keep(server_to_keep(port), Intensity())
    except ServingError as error:
        logger.error("%s", error.message)
        return 1
    return 0


def _await_end(pid: int) -> None:
    """Wait until a process has ended, whosever child it is."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        watch = select.poll()
        watch.register(descriptor, select.POLLIN)
        watch.poll()
    finally:
        os.close(descriptor)


def _commands() -> Iterator[tuple[int, tuple[str, ...]]]:
    """Processes of this user with their command lines."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if entry.stat().st_uid != os.getuid():
                continue
            words = (entry / "cmdline").read_bytes().split(b"\0")[:-1]
        except OSError:
            continue  # it ended meanwhile
        if words:
            yield int(entry.name), tuple(map(os.fsdecode, words))


def _is(command: tuple[str, ...], name: str) -> bool:
    return command[0].rpartition("/")[2] == name


def _option(command: tuple[str, ...], name: str) -> str:
    values = (word.partition("=")[2] for word in command if word.startswith(f"{name}="))
    return next(values, "")


if __name__ == "__main__":
    sys.exit(main())
