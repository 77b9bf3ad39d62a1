"""A cluster over two hosts of namespaces, for what only a second host can suffer.

The first host is Ray's head, and clients speak to its doors from the network outside; the second
joins it. A node that was lost does not come back by itself, since nobody watches over it here: a
host that is to be used again is cleared of what is left and joins as a new node.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

from bench.errors import ContenderFailed
from bench.faults_bucket import CREDENTIALS, Bucket
from bench.faults_cluster import Watch, command_line, declaration
from bench.faults_model import save
from bench.hosts import Host, Hosts
from bench.processes import python
from bench.report import ROOT
from cluster.environment import SERVE_FLAGS

__all__ = ["TwoHosts"]

_NAME: Final = "faults"
_GCS_PORT: Final = 6379
_REST_PORT: Final = 8501
_SERVE_PORT: Final = 8000
_START_S: Final = 60.0
_DEPLOY_S: Final = 180.0
_CLEAR_S: Final = 10.0
_POLL_S: Final = 0.05
_BUCKET_PORT: Final = 9200
_VERSIONS: Final = 4
#: Where the nodes keep blobs and compiled programs; small, so that it can be filled.
_CACHE: Final = Path("/tmp/cache")
_CACHE_MIB: Final = 16


class TwoHosts:
    """Two devices, two shards and a host actor over two hosts, with both doors on each.

    Args:
        folder: empty and absolute; seen by both hosts under the same path.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._source = folder / "source"
        for version in range(1, _VERSIONS + 1):
            save(self._source, version)
        self._config = folder / "servables.yaml"
        self._bucket: Bucket | None = None
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        self._environment = {
            **SERVE_FLAGS,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "XDG_CACHE_HOME": str(_CACHE),
            **CREDENTIALS,
            # Actors import the host unit from this checkout.
            "PYTHONPATH": str(ROOT),
        }
        self.hosts = Hosts(folder)
        self._watch: Watch | None = None

    @property
    def head(self) -> Host:
        """The host that clients speak to."""
        return self.hosts.hosts[0]

    @property
    def worker(self) -> Host:
        """The host that can be lost."""
        return self.hosts.hosts[1]

    @property
    def rest(self) -> str:
        """URL of the head's direct door."""
        return f"http://{self.head.address}:{_REST_PORT}"

    @property
    def serve(self) -> str:
        """URL of Ray Serve's door on the head."""
        return f"http://{self.head.address}:{_SERVE_PORT}"

    @property
    def watch(self) -> Watch:
        """What the cluster says of itself."""
        assert self._watch is not None, "the cluster is not up"
        return self._watch

    @contextlib.contextmanager
    def up(self) -> Iterator[TwoHosts]:
        """The hosts and the cluster for as long as the context lasts.

        Raises:
            ToolMissing: this machine can have no such hosts.
            ContenderFailed: Ray or the cluster does not come up.
        """
        with self.hosts, self._running_bucket() as bucket:
            self._bucket = bucket
            bucket.publish(1)
            self._declare(bucket.url)
            for host in self.hosts.hosts:
                small = f"mkdir -p {_CACHE}; mount -t tmpfs -o size={_CACHE_MIB}m cache {_CACHE}"
                self._run(host, ["sh", "-c", small], _START_S)
            self._start(self.head, "--head", f"--port={_GCS_PORT}", "--include-dashboard=false")
            self.join()
            self.command("deploy")
            self._watch = Watch(self._start_watch())
            try:
                yield self
            finally:
                self._watch.close()

    @property
    def bucket(self) -> Bucket:
        """The store."""
        assert self._bucket is not None, "the cluster is not up"
        return self._bucket

    def publish(self, version: int) -> None:
        """Let a version that was saved beforehand appear in the store, whole."""
        self.bucket.publish(version)

    def join(self) -> None:
        """Let the worker host join as a new node, whatever ran there before."""
        deadline = time.monotonic() + _CLEAR_S
        while left := self.hosts.pids(self.worker):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise ContenderFailed(f"{self.worker.name} cannot be cleared of {left}")
            time.sleep(_POLL_S)
        self._start(self.worker, f"--address={self.head.address}:{_GCS_PORT}")

    def fill_caches(self) -> None:
        """Leave no byte free where nodes keep blobs and compiled programs."""
        for host in self.hosts.hosts:
            self._run(host, ["sh", "-c", f"cat /dev/zero >{_CACHE}/filler || true"], _START_S)

    def free_caches(self) -> None:
        """Take away what fills them."""
        for host in self.hosts.hosts:
            self._run(host, ["rm", "-f", f"{_CACHE}/filler"], _START_S)

    def process(self, node: str, pid: int) -> int:
        """Our id of the process that its own node knows by another."""
        status = self.watch.since(0.0)
        address = "" if status is None else status["addresses"].get(node, "")
        for host in self.hosts.hosts:
            if host.address == address:
                for ours in self.hosts.pids(host):
                    if _own_id(ours) == pid:
                        return ours
        raise ContenderFailed(f"no process {pid} on node {node[:12]} at {address or 'nowhere'}")

    def signal(self, pid: int, number: signal.Signals) -> None:
        """Send a signal to a process of the cluster, and to no other."""
        if not any(pid in self.hosts.pids(host) for host in self.hosts.hosts):
            raise ContenderFailed(f"{pid} is no process of the cluster")
        os.kill(pid, number)

    def running(self, words: bytes) -> list[int]:
        """Processes of the cluster whose command line contains these words."""
        return self.running_on(self.hosts.hosts, words)

    def running_on(self, hosts: Sequence[Host], words: bytes) -> list[int]:
        """The same on some of the hosts."""
        return [
            pid for host in hosts for pid in self.hosts.pids(host) if words in command_line(pid)
        ]

    def command(self, *arguments: str) -> str:
        """Run a `shardserve` command with the cluster's declaration to its end; what it prints."""
        command = [sys.executable, "-c", "from cluster.cli import main; main()", *arguments]
        command += ["--config", str(self._config), "--ray", f"{self.head.address}:{_GCS_PORT}"]
        return self._run(self.head, command, _DEPLOY_S)

    def _running_bucket(self) -> AbstractContextManager[Bucket]:
        operator = self.hosts.operator
        bucket = Bucket(
            self._source, network=operator.pid, address=operator.address, port=_BUCKET_PORT
        )
        return bucket.running()

    def _declare(self, store: str) -> None:
        self._config.write_text(
            declaration(
                store,
                {
                    "name": _NAME,
                    "http": {"host": "0.0.0.0", "port": _REST_PORT},
                    "serve": {"host": "0.0.0.0", "port": _SERVE_PORT},
                    "devices": 2,
                    "shards": 2,
                    "hosts": 1,
                    "poll_s": 0.5,
                    "lease_s": 2.0,
                },
                # One of the servables is on both hosts, the other needs parts of either.
                replicas={"plain": 2},
            )
        )

    def _start(self, host: Host, *options: str) -> None:
        command = python("ray.scripts.scripts", "start", f"--node-ip-address={host.address}")
        command += [*options, "--disable-usage-stats", f"--object-store-memory={100 << 20}"]
        self._run(host, [*command, "--num-cpus=2"], _START_S)

    def _run(self, host: Host, command: Sequence[str], timeout_s: float) -> str:
        done = self.hosts.run(
            host, command, timeout_s=timeout_s, environment=self._environment, folder=self._folder
        )
        if done.returncode:
            said = "\n".join((done.stderr or done.stdout).splitlines()[-15:])
            raise ContenderFailed(f"{' '.join(command[1:6])} on {host.name}: {said}")
        return done.stdout

    def _start_watch(self) -> subprocess.Popen[str]:
        enter = ["nsenter", "-t", str(self.head.pid), "--mount", "--pid", "--net", "--uts"]
        settings = [f"{name}={value}" for name, value in self._environment.items()]
        address = f"{self.head.address}:{_GCS_PORT}"
        command = python("bench.faults_watch", address, _NAME)
        with (self._folder / "watch.log").open("w") as log:
            return subprocess.Popen(
                [*enter, "env", "-C", str(ROOT), *settings, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )


def _own_id(pid: int) -> int:
    """What a process's own host calls it; 0 if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    [ids] = [line.split()[1:] for line in lines if line.startswith("NSpid:")]
    return int(ids[-1])
