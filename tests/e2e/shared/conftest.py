"""One cluster for all tests here, started and ended as a user does."""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import models
from tests.e2e.running import Cluster, is_open, processes_of, until
from tests.plugins import EXAMPLES, importable, install

#: What is declared from the start. `rolling` and `careful` belong to one test each.
SERVABLES = ("mlp", "words", "map", "rolling", "careful")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A running cluster: a device, two shards, a host, both doors. Ends without a trace."""
    folder = tmp_path_factory.mktemp("shared")
    # Rows of look-ups go straight to the device, however few they are.
    straight: dict[str, object] = {"continuation_bytes_min": 0}
    cluster = Cluster(folder, "shared", shards=2, allow_entry_points=["tests.e2e.*"], **straight)
    for name in ("mlp", "rolling", "careful"):
        models.save_mlp(cluster.store, 1, name)
    models.save_words(cluster.store)
    plugin = install(EXAMPLES / "hashmap", folder)
    cluster.environment["PYTHONPATH"] += f":{plugin}"
    with importable(plugin, "hashmap_servable"):
        hashmap = importlib.import_module("hashmap_servable")
        hashmap.save_map(cluster.store, "map", models.MAP, partitions=4)
    compact = {"words": {"compact": {"overlays": 1}}}
    cluster.declare(*({"name": name, **compact.get(name, {})} for name in SERVABLES))
    # A replica that is replaced goes on for so long, and a deploy waits for it: 30 s by default.
    cluster.environment["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] = "3"
    try:
        cluster.up()
        yield cluster
    finally:
        ray = cluster.ray_file()
        if ray:
            cluster.down()
            assert processes_of(ray) == []
            assert not Path(ray["directory"]).exists()
    # HAProxy's statistics and metrics, and the proxy behind it, too.
    lesser = [f"127.0.0.1:{port}" for port in ray["ports"].values()] if ray else []
    for url in (cluster.rest, cluster.serve, *lesser):
        assert not is_open(url), url


@pytest.fixture
def cluster(shared: Cluster) -> Cluster:
    """The shared cluster, once everything that is declared answers."""
    until("a whole cluster", lambda: is_answering(shared), 120.0, every_s=0.1)
    return shared


def is_answering(cluster: Cluster) -> bool:
    """Whether each kind of servable answers through the direct port."""
    rows = [[0.0] * models.WIDTH]
    return cluster.answers("mlp", rows) and cluster.answers("words", ["whole"])


@pytest.fixture
def stop(shared: Cluster) -> Iterator[Callable[[int], None]]:
    """Stops a process of the cluster where it stands; goes on at the test's end, if it is there."""
    stopped: list[int] = []

    def halt(pid: int) -> None:
        assert any(process.pid == pid for process in processes_of(shared.ray_file()))
        os.kill(pid, signal.SIGSTOP)
        stopped.append(pid)

    yield halt
    for pid in stopped:
        if any(process.pid == pid for process in processes_of(shared.ray_file())):
            os.kill(pid, signal.SIGCONT)


@pytest.fixture
def kill(shared: Cluster) -> Callable[[int], None]:
    """Ends a process of the cluster, and of nothing else, without warning."""

    def end(pid: int) -> None:
        assert pid in {process.pid for process in processes_of(shared.ray_file())}
        os.kill(pid, signal.SIGKILL)

    return end


def generations(status: dict[str, Any]) -> dict[str, int]:
    """Actor to its generation."""
    return {name: actor["generation"] for name, actor in status["actors"].items()}
