"""A cluster that ``faults`` may hurt: started by the command line, watched, and ended whole.

`Watch` keeps the latest word of the controller with the instant at which it came. `OneHost` is the
cluster that ``shardserve up`` makes on this machine. What is done to them is not decided here.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import yaml

from bench.errors import ContenderFailed
from bench.faults_model import ENTRY_POINTS, SERVABLES, save
from bench.processes import python, tail
from bench.report import ROOT
from cluster.environment import MARK
from cluster.local_ray import LocalRay
from cluster.ports import free_ports
from cluster.processes import marked

__all__ = [
    "Moment",
    "OneHost",
    "Site",
    "Status",
    "Versions",
    "Watch",
    "available",
    "command_line",
    "declaration",
    "is_whole",
]

Status = Mapping[str, Any]

_UP_S: Final = 180.0
_DOWN_S: Final = 90.0
_POLL_S: Final = 0.05


class Moment(NamedTuple):
    """A status and when it came."""

    at: float
    status: Status


class Site(Protocol):
    """A running cluster, as faults need it."""

    @property
    def rest(self) -> str:
        """URL of the direct door that clients use."""

    @property
    def serve(self) -> str:
        """URL of Ray Serve's door."""

    @property
    def watch(self) -> Watch:
        """What the cluster says of itself."""

    def process(self, node: str, pid: int) -> int:
        """Our id of the process that its own node knows by another."""

    def signal(self, pid: int, number: signal.Signals) -> None:
        """Send a signal to a process of the cluster, and to no other."""

    def running(self, words: bytes) -> list[int]:
        """Processes of the cluster whose command line contains these words."""

    def command(self, *arguments: str) -> str:
        """Run a `shardserve` command with the cluster's declaration to its end; what it prints."""

    def publish(self, version: int) -> None:
        """Let a version that was saved beforehand appear in the store, whole."""


class Watch:
    """Reads statuses from a `bench.faults_watch` process.

    Args:
        process: with pipes for standard input and output.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._latest: Moment | None = None
        self._thread = threading.Thread(target=self._read, name="faults-watch", daemon=True)
        self._thread.start()

    def since(self, instant: float) -> Status | None:
        """The latest status, if it came after an instant."""
        latest = self._latest
        return latest.status if latest is not None and latest.at > instant else None

    def until(
        self, what: str, holds: Callable[[Status], bool], since: float, timeout_s: float
    ) -> Moment:
        """The first status after an instant of which something holds.

        Raises:
            ContenderFailed: it did not come in time.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            latest = self._latest
            if latest is not None and latest.at > since and holds(latest.status):
                return latest
            if time.monotonic() > deadline:
                told = "" if latest is None else f"; the last word: {json.dumps(latest.status)}"
                raise ContenderFailed(f"{what}: not within {timeout_s:g} s{told[:4000]}")
            time.sleep(_POLL_S)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._thread.join(5.0)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                # Ray says things of its own there, too, such as that a node was lost.
                with contextlib.suppress(json.JSONDecodeError):
                    self._latest = Moment(time.monotonic(), json.loads(line))


def is_whole(status: Status) -> bool:
    """Whether everything that is declared runs, and has loaded what is placed on it."""
    actors, doors = status["actors"].values(), status["doors"]
    return (
        not status["recovering"]
        and bool(doors)
        and all(actor["state"] == "UP" for actor in actors)
        and all(hold == "LOADED" for actor in actors for hold in actor["holds"].values())
        and not any(door["error"] for door in doors)
        and all(available(status, name) for name in SERVABLES)
    )


def available(status: Status, servable: str) -> list[int]:
    """Versions that are available, if they are those that should be."""
    found = status["servables"].get(servable)
    if found is None:
        return []
    versions = sorted(v["version"] for v in found["versions"] if v["state"] == "AVAILABLE")
    return versions if versions == sorted(found["aspired"]) else []


def declaration(
    store: str, cluster: Mapping[str, object], replicas: Mapping[str, int] | None = None
) -> str:
    """The text of a ``servables.yaml`` for the servables of this benchmark."""
    copies = replicas or {}
    return yaml.safe_dump(
        {
            "store": store,
            "servables": [{"name": name, "replicas": copies.get(name, 1)} for name in SERVABLES],
            "cluster": {"allow_entry_points": list(ENTRY_POINTS), **cluster},
        },
        sort_keys=False,
    )


class Versions:
    """A store in a directory, and versions that wait beside it.

    Args:
        folder: for both.
        count: how many versions are saved; the first is in the store from the start.
    """

    def __init__(self, folder: Path, count: int = 2) -> None:
        self.store = folder / "store"
        self._aside = folder / "aside"
        self._aside.mkdir()
        for version in range(1, count + 1):
            save(self.store, version)
            if version > 1:
                for name in SERVABLES:
                    (self.store / name / str(version)).rename(self._aside / f"{name}-{version}")

    def publish(self, version: int) -> None:
        """Let a version appear in the store; a rename is all, so it is whole at once."""
        for name in SERVABLES:
            (self._aside / f"{name}-{version}").rename(self.store / name / str(version))


class OneHost:
    """A cluster of one device, two shards and a host actor on this machine, with both doors.

    Args:
        folder: empty; takes the store, the declaration, the state and the log.
    """

    def __init__(self, folder: Path) -> None:
        self.rest = self.serve = ""
        self._folder = folder
        self._name = f"faults-{os.getpid()}"
        self._log = folder / "shardserve.log"
        self._versions = Versions(folder)
        self._config = folder / "servables.yaml"
        ports = free_ports(2)
        self._config.write_text(
            declaration(
                str(self._versions.store),
                {
                    "name": self._name,
                    "http": {"port": ports[0]},
                    "serve": {"port": ports[1]},
                    "devices": 1,
                    "shards": 2,
                    "hosts": 1,
                    "poll_s": 0.5,
                    "lease_s": 2.0,
                },
            )
        )
        self._environment = {
            **os.environ,
            "SHARDSERVE_STATE": str(folder / "state"),
            "XDG_CACHE_HOME": str(folder / "cache"),
            # Actors import the host unit from this checkout.
            "PYTHONPATH": str(ROOT),
        }
        self._watch: Watch | None = None

    @property
    def watch(self) -> Watch:
        """What the cluster says of itself."""
        assert self._watch is not None, "the cluster is not up"
        return self._watch

    @contextlib.contextmanager
    def up(self) -> Iterator[OneHost]:
        """The cluster for as long as the context lasts.

        Raises:
            ContenderFailed: it does not come up, or something of it is left when it went down.
        """
        try:
            printed = self._run("up", "--config", str(self._config), "--json", timeout_s=_UP_S)
            doors = json.loads(printed.splitlines()[-1])
            self.rest, self.serve = doors["rest"], doors["serve"]
            self._watch = Watch(self._start_watch())
            yield self
        finally:
            if self._watch is not None:
                self._watch.close()
            ray = self._ray()
            if ray is not None:
                self._run("down", "--config", str(self._config), timeout_s=_DOWN_S)
                left = marked(MARK, ray.mark)
                if left:
                    raise ContenderFailed(f"down left processes: {[one.pid for one in left]}")

    def process(self, node: str, pid: int) -> int:
        """Our id of a process; on one host, everybody's."""
        return pid

    def signal(self, pid: int, number: signal.Signals) -> None:
        """Send a signal to a process of the cluster, and to no other."""
        if pid not in {process.pid for process in self._processes()}:
            raise ContenderFailed(f"{pid} is no process of the cluster")
        os.kill(pid, number)

    def running(self, words: bytes) -> list[int]:
        """Processes of the cluster whose command line contains these words."""
        return [one.pid for one in self._processes() if words in command_line(one.pid)]

    def command(self, *arguments: str) -> str:
        """Run a `shardserve` command with the cluster's declaration to its end; what it prints."""
        return self._run(*arguments, "--config", str(self._config), timeout_s=_UP_S)

    def publish(self, version: int) -> None:
        """Let a version that was saved beforehand appear in the store, whole."""
        self._versions.publish(version)

    def _processes(self) -> Sequence[Any]:
        ray = self._ray()
        return [] if ray is None else marked(MARK, ray.mark)

    def _ray(self) -> LocalRay | None:
        note = self._folder / "state" / self._name / "ray.json"
        try:
            return LocalRay(**json.loads(note.read_text()))
        except FileNotFoundError:
            return None

    def _start_watch(self) -> subprocess.Popen[str]:
        ray = self._ray()
        assert ray is not None
        with self._log.open("a") as log:
            return subprocess.Popen(
                python("bench.faults_watch", ray.address, self._name),
                cwd=ROOT,
                env={**self._environment, **ray.environment()},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def _run(self, *arguments: str, timeout_s: float) -> str:
        name = f"shardserve {arguments[0]}"
        with self._log.open("a") as log:
            try:
                done = subprocess.run(
                    [sys.executable, "-c", "from cluster.cli import main; main()", *arguments],
                    cwd=self._folder,
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    timeout=timeout_s,
                )
            except subprocess.TimeoutExpired as error:
                text = f"{name} took over {timeout_s:g} s:\n{tail(self._log)}"
                raise ContenderFailed(text) from error
        if done.returncode:
            raise ContenderFailed(f"{name} ended with {done.returncode}:\n{tail(self._log)}")
        return done.stdout


def command_line(pid: int) -> bytes:
    """The command line of a process, its words apart by zeros; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
