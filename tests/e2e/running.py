"""A cluster for tests, started, asked and ended by nothing but the command line and HTTP.

Every wait polls and has a deadline; what is still running at the end is found by the mark that
all processes of a cluster carry, not by what the cluster says of itself.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import yaml

from cluster.environment import MARK
from cluster.local_ray import LocalRay
from cluster.processes import Process, marked

__all__ = ["ROOT", "Answer", "Cluster", "ask", "until"]

ROOT: Final = Path(__file__).resolve().parents[2]

T = TypeVar("T")

#: Longer than any look takes by itself.
_LOOK_S_MAX: Final = 15.0


class Answer(NamedTuple):
    """An HTTP answer."""

    status: int
    body: bytes
    headers: Mapping[str, str]

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)


def ask(
    url: str,
    path: str,
    body: object | None = None,
    *,
    timeout_s: float = 30.0,
    deadline_ms: int = 0,
    method: str = "POST",
) -> Answer:
    """One request over a connection of its own; ``method`` is of one with a body.

    Raises:
        OSError: nobody answered.
    """
    where = url.removeprefix("http://")
    connection = http.client.HTTPConnection(where, timeout=timeout_s)
    headers = {"x-request-timeout-ms": str(deadline_ms)} if deadline_ms else {}
    try:
        if body is None:
            connection.request("GET", path, headers=headers)
        else:
            headers["content-type"] = "application/json"
            connection.request(method, path, json.dumps(body), headers)
        response = connection.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, response.read(), found)
    except http.client.HTTPException as error:
        raise ConnectionError(f"{url}{path}: {error!r}") from error
    finally:
        connection.close()


def until(what: str, look: Callable[[], T | None], timeout_s: float, every_s: float = 0.05) -> T:
    """What `look` finds, as soon as it finds something true.

    A virtual machine may stand still for a minute, cluster and clock alike; a look that seems to
    have taken so long says nothing about the cluster, and most of that time is not counted.

    Raises:
        AssertionError: it did not in time.
    """
    spent_s = 0.0
    while True:
        began = time.monotonic()
        found = look()
        if found:
            return found
        time.sleep(every_s)
        spent_s += min(time.monotonic() - began, _LOOK_S_MAX)
        assert spent_s < timeout_s, f"{what}: not after {timeout_s:g} s"


class Cluster:
    """One cluster with a store, a declaration and a state directory of its own.

    Args:
        folder: for all of them.
        name: of the cluster.
        cluster: more of the declaration's ``cluster``.
    """

    def __init__(self, folder: Path, name: str, **cluster: object) -> None:
        self.folder = folder
        self.name = name
        self.store = folder / "store"
        self.store_url = ""
        self.config = folder / "servables.yaml"
        self.rest = self.serve = self.ray = ""
        self._cluster = {
            "name": name,
            "http": {"port": 0, "admin": True},
            "serve": {"port": 0},
            "poll_s": 0.25,
            "lease_s": 2.0,
            **cluster,
        }
        kept = {
            name: value
            for name, value in os.environ.items()
            # Actors choose their devices themselves, as they do where no test set them up.
            if not name.startswith(("RAY_", "SHARDSERVE_", "JAX_", "XLA_"))
        }
        self.environment = {
            **kept,
            "SHARDSERVE_STATE": str(folder / "state"),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "PYTHONPATH": str(ROOT),
        }

    # The command line

    def run(self, *arguments: str, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        """A `shardserve` command, run to its end, however that is."""
        return subprocess.run(
            [sys.executable, "-c", "from cluster.cli import main; main()", *arguments],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def command(self, *arguments: str, timeout_s: float = 120.0) -> str:
        """What a command prints, once it has succeeded."""
        done = self.run(*arguments, timeout_s=timeout_s)
        assert done.returncode == 0, f"shardserve {' '.join(arguments)}:\n{done.stderr}"
        return done.stdout

    def declare(self, *servables: Mapping[str, object]) -> None:
        """Write the declaration."""
        document = {
            "store": self.store_url or str(self.store),
            "servables": [dict(servable) for servable in servables],
            "cluster": self._cluster,
        }
        self.config.write_text(yaml.safe_dump(document, sort_keys=False))

    def up(self, *options: str) -> None:
        """`shardserve up`."""
        printed = self.command("up", "--config", str(self.config), "--json", *options)
        found = json.loads(printed.splitlines()[-1])
        self.rest, self.serve, self.ray = found["rest"], found["serve"], found["ray"]

    def down(self) -> None:
        """`shardserve down`."""
        self.command("down", "--config", str(self.config))

    def status(self) -> dict[str, Any]:
        """`shardserve status`."""
        printed = self.command("status", "--config", str(self.config), "--json")
        found: dict[str, Any] = json.loads(printed.splitlines()[-1])
        return found

    def settled(self) -> dict[str, Any]:
        """The status, once the controller knows what the last reign left, and a door is open."""

        def look() -> dict[str, Any] | None:
            found = self.status()
            is_open = any(door["pid"] and not door["error"] for door in found["doors"])
            return found if is_open and not found["recovering"] else None

        return until("a controller that knows its cluster", look, 120.0)

    # What it runs

    def ray_file(self) -> dict[str, Any]:
        """What `up` wrote down about its Ray, or nothing."""
        try:
            found: dict[str, Any] = json.loads(
                (self.folder / "state" / self.name / "ray.json").read_text()
            )
        except FileNotFoundError:
            return {}
        return found

    def driver_environment(self) -> dict[str, str]:
        """For a program that connects to the cluster's Ray."""
        local = LocalRay(**self.ray_file())
        return {**self.environment, **local.environment()}

    # Requests

    def predict(
        self,
        servable: str,
        instances: Sequence[object],
        *,
        url: str = "",
        deadline_ms: int = 20_000,
    ) -> Answer:
        """One predict request; nobody is waited for much longer than the deadline."""
        path = f"/v1/models/{servable}:predict"
        body = {"instances": instances}
        return ask(
            url or self.rest, path, body, timeout_s=deadline_ms / 1000 + 20, deadline_ms=deadline_ms
        )

    def answers(self, servable: str, instances: Sequence[object], *, url: str = "") -> bool:
        """Whether a predict request is answered. A broken connection is no answer."""
        try:
            return self.predict(servable, instances, url=url).status == 200
        except OSError:
            return False

    def states(self, servable: str) -> dict[int, str]:
        """Version to its public state, as the REST door tells it."""
        try:
            answer = ask(self.rest, f"/v1/models/{servable}")
        except OSError:
            return {}
        if answer.status != 200:
            return {}
        rows = answer.json["model_version_status"]
        return {int(row["version"]): str(row["state"]) for row in rows}

    def is_whole(self) -> bool:
        """Whether every declared servable is available, with nothing degraded."""
        try:
            return ask(self.rest, "/readyz").status == 200
        except OSError:
            return False


def processes_of(ray: Mapping[str, Any]) -> list[Process]:
    """The processes of a Ray that `up` started and wrote down."""
    return marked(MARK, ray["mark"])


def is_open(url: str) -> bool:
    """Whether somebody listens at a URL's port."""
    host, _, port = url.rpartition("//")[2].rpartition(":")
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((host, int(port))) == 0
