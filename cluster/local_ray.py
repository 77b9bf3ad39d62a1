"""A Ray of our own on this machine: started with our environment, ended without a trace.

What was started is written down in the state directory: the mark that all its processes carry, the
address, the token. `down` needs nothing else, even after a crash of whoever called `up`.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from batching.errors import FailedPrecondition, Unavailable
from cluster.environment import MARK, ray_environment
from cluster.processes import end_all, marked

__all__ = ["LocalRay", "find", "start", "state_directory", "stop"]

_START_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRay:
    """A Ray that we started.

    Attributes:
        mark: value of `MARK` in all its processes.
        address: of its GCS, ``host:port``.
        directory: its private directory.
    """

    mark: str
    address: str
    directory: str

    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to talk to it."""
        return ray_environment(Path(self.directory), self.mark)

    def is_running(self) -> bool:
        """Whether any process of it is left."""
        return bool(marked(MARK, self.mark))


def state_directory(cluster: str) -> Path:
    """Where a local cluster's state is kept; private to the user."""
    base = os.environ.get("SHARDSERVE_STATE")
    root = Path(base) if base else Path.home() / ".local" / "state" / "shardserve"
    path = root / cluster
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def find(cluster: str) -> LocalRay | None:
    """The Ray that was started for a cluster and not ended, running or not."""
    try:
        return LocalRay(**json.loads((state_directory(cluster) / "ray.json").read_text()))
    except FileNotFoundError:
        return None


def start(cluster: str, num_cpus: int | None = None) -> LocalRay:
    """Start a head node on loopback, with token authentication.

    Raises:
        FailedPrecondition: one is running already.
        Unavailable: it did not come up; says where its log is.
    """
    known = find(cluster)
    if known is not None and known.is_running():
        raise FailedPrecondition(
            f"cluster {cluster!r} is up already (Ray at {known.address}); "
            "run `shardserve down` first"
        )
    mark = secrets.token_hex(8)
    # Ray and HAProxy put 70 characters behind it, and a socket's path has at most 97.
    directory = Path("/tmp") / f"ssv-{os.getuid()}-{mark[:8]}"
    directory.mkdir(mode=0o700)
    token = directory / "auth_token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    port, *others = _free_ports(4)
    local = LocalRay(mark=mark, address=f"127.0.0.1:{port}", directory=str(directory))
    state = state_directory(cluster) / "ray.json"
    state.write_text(json.dumps(asdict(local)))
    log = (directory / "ray.log").open("wb")
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block",
        "--node-ip-address=127.0.0.1", f"--port={port}", "--include-dashboard=false",
        f"--dashboard-agent-listen-port={others[0]}", f"--ray-client-server-port={others[1]}",
        f"--runtime-env-agent-port={others[2]}", f"--temp-dir={directory / 'ray'}",
        "--disable-usage-stats", f"--object-store-memory={256 << 20}",
    ]  # fmt: skip
    if num_cpus is not None:
        command.append(f"--num-cpus={num_cpus}")
    with log:
        head = subprocess.Popen(
            command,
            env={**os.environ, **local.environment()},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not _answers(port):
        if head.poll() is not None or time.monotonic() > deadline:
            tail = "\n".join((directory / "ray.log").read_text(errors="replace").splitlines()[-5:])
            stop(cluster, keep_logs=True)
            raise Unavailable(f"Ray did not start; see {directory / 'ray.log'}:\n{tail}")
        time.sleep(0.05)
    return local


def stop(cluster: str, *, keep_logs: bool = False) -> int:
    """End every process that `start` started, directly or not, HAProxy included.

    Returns:
        How many processes were ended.
    """
    local = find(cluster)
    if local is None:
        return 0
    ended = end_all(MARK, local.mark)
    (state_directory(cluster) / "ray.json").unlink(missing_ok=True)
    if not keep_logs:
        shutil.rmtree(local.directory, ignore_errors=True)
    return ended


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_ports(count: int) -> list[int]:
    """Ports that are free now, above those which Ray gives to its workers."""
    sockets: list[socket.socket] = []
    try:
        for _ in range(1000):
            candidate = socket.socket()
            sockets.append(candidate)
            candidate.bind(("127.0.0.1", 0))
            ports = [s.getsockname()[1] for s in sockets if s.getsockname()[1] >= 20_000]
            if len(ports) == count:
                return ports
        raise Unavailable("no free ports above 20000")
    finally:
        for one in sockets:
            one.close()
