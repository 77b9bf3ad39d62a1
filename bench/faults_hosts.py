"""A cluster over two hosts of namespaces, for what only a second host can suffer.

Clients speak to the doors of the first from the network outside.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

from bench.errors import ContenderFailed
from bench.faults_bucket import CREDENTIALS, Bucket
from bench.faults_cluster import Watch, declaration
from bench.faults_model import save
from bench.hosts import Host
from bench.processes import python
from bench.ray_hosts import REST_PORT, SERVE_PORT, RayHosts, own_id
from bench.report import ROOT

__all__ = ["TwoHosts"]

_NAME: Final = "faults"
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
        self._ray = RayHosts(folder, {"XDG_CACHE_HOME": str(_CACHE), **CREDENTIALS})
        self.hosts = self._ray.hosts
        self._watch: Watch | None = None

    @property
    def head(self) -> Host:
        """The host that clients speak to."""
        return self._ray.head

    @property
    def worker(self) -> Host:
        """The host that can be lost."""
        return self._ray.worker

    @property
    def rest(self) -> str:
        """URL of the head's direct door."""
        return f"http://{self.head.address}:{REST_PORT}"

    @property
    def serve(self) -> str:
        """URL of Ray Serve's door on the head."""
        return f"http://{self.head.address}:{SERVE_PORT}"

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
                self._ray.run(host, ["sh", "-c", small])
            self._ray.start()
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
        self._ray.join()

    def fill_caches(self) -> None:
        """Leave no byte free where nodes keep blobs and compiled programs."""
        for host in self.hosts.hosts:
            self._ray.run(host, ["sh", "-c", f"cat /dev/zero >{_CACHE}/filler || true"])

    def free_caches(self) -> None:
        """Take away what fills them."""
        for host in self.hosts.hosts:
            self._ray.run(host, ["rm", "-f", f"{_CACHE}/filler"])

    def process(self, node: str, pid: int) -> int:
        """Our id of the process that its own node knows by another."""
        status = self.watch.since(0.0)
        address = "" if status is None else status["addresses"].get(node, "")
        for host in self.hosts.hosts:
            if host.address == address:
                for ours in self.hosts.pids(host):
                    if own_id(ours) == pid:
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
        return self._ray.running_on(hosts, words)

    def command(self, *arguments: str) -> str:
        """Run a `shardserve` command with the cluster's declaration to its end; what it prints."""
        name, *options = arguments
        return self._ray.command(name, self._config, *options)

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
                    "http": {"host": "0.0.0.0", "port": REST_PORT},
                    "serve": {"host": "0.0.0.0", "port": SERVE_PORT},
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

    def _start_watch(self) -> subprocess.Popen[str]:
        enter = ["nsenter", "-t", str(self.head.pid), "--mount", "--pid", "--net", "--uts"]
        settings = [f"{name}={value}" for name, value in self._ray.environment.items()]
        command = python("bench.faults_watch", self._ray.address, _NAME)
        with (self._folder / "watch.log").open("w") as log:
            return subprocess.Popen(
                [*enter, "env", "-C", str(ROOT), *settings, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
