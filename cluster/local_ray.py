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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from batching.errors import FailedPrecondition, Unavailable
from cluster.environment import MARK, SERVE_FLAGS, ray_environment
from cluster.ports import PortClaim, claim_ports, claim_usual
from cluster.processes import end_all, marked

__all__ = ["LocalRay", "check_down", "find", "start", "state_directory", "stop"]

_START_TIMEOUT_S = 60.0

#: HAProxy's statistics and metrics, and the fallback behind it. Where another cluster or a stranger
#: has one of these, any port will do, but none at all keeps the Serve door shut.
_SERVE_PORTS: Final = {
    "RAY_SERVE_HAPROXY_STATS_PORT": 8404,
    "RAY_SERVE_HAPROXY_METRICS_PORT": 9101,
    **{name: int(port) for name, port in SERVE_FLAGS.items() if name.endswith("_PORT")},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRay:
    """A Ray that we started.

    Attributes:
        mark: value of `MARK` in all its processes.
        address: of its GCS, ``host:port``.
        directory: its private directory.
        ports: of Ray Serve's lesser listeners, by the variable that sets each.
    """

    mark: str
    address: str
    directory: str
    ports: Mapping[str, int] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to talk to it."""
        ports = {name: str(port) for name, port in self.ports.items()}
        return {**ray_environment(Path(self.directory), self.mark), **ports}

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


def check_down(cluster: str) -> None:
    """Refuse to go on where a Ray of the cluster runs.

    Raises:
        FailedPrecondition: one does.
    """
    known = find(cluster)
    if known is not None and known.is_running():
        raise FailedPrecondition(
            f"cluster {cluster!r} is up already (Ray at {known.address}); "
            "run `shardserve down` first"
        )


def start(cluster: str, num_cpus: int | None = None) -> LocalRay:
    """Start a head node on loopback, with token authentication.

    Raises:
        FailedPrecondition: one is running already.
        Unavailable: it did not come up; says where its log is.
    """
    check_down(cluster)
    stop(cluster, keep_logs=True)  # a note of a Ray that ended by itself
    mark = secrets.token_hex(8)
    # Ray and HAProxy put 70 characters behind it, and a socket's path has at most 97.
    directory = Path("/tmp") / f"ssv-{os.getuid()}-{mark[:8]}"
    directory.mkdir(mode=0o700)
    token = directory / "auth_token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    claims = claim_ports(4)
    port, *others = (claim.port for claim in claims)
    served = {name: claim_usual(usual) for name, usual in _SERVE_PORTS.items()}
    claims += served.values()
    local = LocalRay(
        mark=mark,
        address=f"127.0.0.1:{port}",
        directory=str(directory),
        ports={name: claim.port for name, claim in served.items()},
    )
    # Written down first: whatever happens from here on, `stop` finds what there is to end.
    state = state_directory(cluster) / "ray.json"
    state.write_text(json.dumps(asdict(local)))
    try:
        _run_head(local, _head_command(directory, port, others, num_cpus), claims)
    except BaseException:
        stop(cluster, keep_logs=True)
        raise
    finally:
        for claim in claims:
            claim.release()
    return local


def _head_command(
    directory: Path, port: int, others: Sequence[int], num_cpus: int | None
) -> list[str]:
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block",
        "--node-ip-address=127.0.0.1", f"--port={port}", "--include-dashboard=false",
        f"--dashboard-agent-listen-port={others[0]}", f"--ray-client-server-port={others[1]}",
        f"--runtime-env-agent-port={others[2]}", f"--temp-dir={directory / 'ray'}",
        "--disable-usage-stats", f"--object-store-memory={256 << 20}",
    ]  # fmt: skip
    if num_cpus is not None:
        command.append(f"--num-cpus={num_cpus}")
    return command


def _run_head(local: LocalRay, command: Sequence[str], claims: Sequence[PortClaim]) -> None:
    """Start the head, which holds its ports' claims from then on, and wait until it answers.

    Serve and the agents listen later, and again when one of them has died.
    """
    log = Path(local.directory) / "ray.log"
    with log.open("wb") as output:
        head = subprocess.Popen(
            command,
            env={**os.environ, **local.environment()},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[claim.fileno() for claim in claims],
        )
    port = int(local.address.rpartition(":")[2])
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not _answers(port):
        if head.poll() is not None or time.monotonic() > deadline:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
            raise Unavailable(f"Ray did not start; see {log}:\n{tail}")
        time.sleep(0.05)


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
