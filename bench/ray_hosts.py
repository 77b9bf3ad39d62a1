"""Ray over two hosts of namespaces: the first is its head, the second can be lost and join again.

Ray has the environment that `cluster.yaml` gives it. A node that was lost does not come back by
itself, since nobody watches over it here: a host that is to be used again is cleared of what is
left and joins as a new node. This file does not know what runs on that Ray.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from bench.errors import ContenderFailed
from bench.faults_cluster import command_line
from bench.hosts import Host, Hosts
from bench.processes import python
from bench.report import ROOT
from cluster.environment import SERVE_FLAGS

__all__ = ["REST_PORT", "SERVE_PORT", "RayHosts", "own_id"]

REST_PORT: Final = 8501
SERVE_PORT: Final = 8000
_GCS_PORT: Final = 6379
_START_S: Final = 60.0
_COMMAND_S: Final = 180.0
_CLEAR_S: Final = 10.0
_POLL_S: Final = 0.05


class RayHosts:
    """Two hosts with a Ray.

    Args:
        folder: absolute; seen by both hosts under the same path.
        environment: added to that of everything on the hosts.

    Attributes:
        hosts: the hosts, which are there while the context lasts.
        environment: of everything on them.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._folder = folder
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        self.environment = {
            **SERVE_FLAGS,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            # Actors import what they are made of from this checkout.
            "PYTHONPATH": str(ROOT),
            **environment,
        }
        self.hosts = Hosts(folder, ssh=False)

    @property
    def head(self) -> Host:
        """The host that clients speak to."""
        return self.hosts.hosts[0]

    @property
    def worker(self) -> Host:
        """The host that can be lost."""
        return self.hosts.hosts[1]

    @property
    def address(self) -> str:
        """Of the Ray, on its hosts."""
        return f"{self.head.address}:{_GCS_PORT}"

    def start(self) -> None:
        """Have Ray on both; it ends with the hosts.

        Raises:
            ContenderFailed: it does not start.
        """
        self._start(self.head, "--head", f"--port={_GCS_PORT}", "--include-dashboard=false")
        self.join()

    def join(self) -> None:
        """Let the worker host join as a new node, whatever ran there before.

        Raises:
            ContenderFailed: it cannot be cleared, or does not join.
        """
        deadline = time.monotonic() + _CLEAR_S
        while left := self.hosts.pids(self.worker):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise ContenderFailed(f"{self.worker.name} cannot be cleared of {left}")
            time.sleep(_POLL_S)
        self._start(self.worker, f"--address={self.address}")

    def running_on(self, hosts: Sequence[Host], words: bytes) -> list[int]:
        """Processes of some of the hosts whose command line contains these words."""
        return [
            pid for host in hosts for pid in self.hosts.pids(host) if words in command_line(pid)
        ]

    def command(self, name: str, config: Path, *options: str) -> str:
        """Run a `shardserve` command with a declaration, on the head; what it prints.

        Raises:
            ContenderFailed: it fails.
        """
        command = [sys.executable, "-c", "from cluster.cli import main; main()", name, *options]
        command += ["--config", str(config), "--ray", self.address]
        return self.run(self.head, command, _COMMAND_S)

    def run(self, host: Host, command: Sequence[str], timeout_s: float = _START_S) -> str:
        """Run a command on a host; what it prints.

        Raises:
            ContenderFailed: it fails.
        """
        done = self.hosts.run(
            host, command, timeout_s=timeout_s, environment=self.environment, folder=self._folder
        )
        if done.returncode:
            said = "\n".join((done.stderr or done.stdout).splitlines()[-15:])
            raise ContenderFailed(f"{' '.join(command[1:6])} on {host.name}: {said}")
        return done.stdout

    def _start(self, host: Host, *options: str) -> None:
        command = python("ray.scripts.scripts", "start", f"--node-ip-address={host.address}")
        command += [*options, "--disable-usage-stats", f"--object-store-memory={100 << 20}"]
        self.run(host, [*command, "--num-cpus=2"])


def own_id(pid: int) -> int:
    """What a process's own host calls it; 0 if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    [ids] = [line.split()[1:] for line in lines if line.startswith("NSpid:")]
    return int(ids[-1])
