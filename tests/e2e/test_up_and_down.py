"""`up` and `down`: what they refuse, what they start, and that nothing is left behind."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from cluster.processes import marked
from tests.e2e import models
from tests.e2e.running import Cluster, is_open, processes_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

ROWS = [[1.0, 2.0, 3.0, 4.0]]
#: In /proc/net/unix.
_CONNECTED = "03"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster of one device that is not up yet; down at the end, whatever a test did.

    Its routers speak to the device by Ray calls, as where no port can be opened.
    """
    cluster = Cluster(tmp_path, f"small-{os.getpid()}", shards=0, hosts=0, transport="ray")
    models.save_mlp(cluster.store, 1)
    cluster.declare({"name": "mlp"})
    yield cluster
    if cluster.ray_file():
        cluster.down()


def links_over_sockets(ray: Mapping[str, Any]) -> list[str]:
    """The connections of this cluster's device that routers have to its Unix socket."""
    device = str(Path(ray["directory"], "sockets", "device-0-"))
    table = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    return [row[-1] for row in table if row[-1].startswith(device) and row[5] == _CONNECTED]


def test_down_leaves_no_process_no_port_and_no_file(cluster: Cluster) -> None:
    cluster.up("--no-serve")
    ray = cluster.ray_file()
    again = cluster.run("up", "--config", str(cluster.config), "--no-serve")
    assert (again.returncode, "is up already" in again.stderr) == (1, True)
    # The one that runs is none the worse for it.
    answer = cluster.predict("mlp", ROWS)
    assert (answer.status, answer.json) == (200, {"predictions": models.mlp_answer(ROWS, 1)})
    assert links_over_sockets(ray) == [], "told to use Ray calls"
    assert len(processes_of(ray)) > 5
    assert Path(ray["directory"]).is_dir()

    cluster.down()

    assert processes_of(ray) == []
    assert not is_open(cluster.rest)
    assert not is_open(cluster.ray)
    assert not Path(ray["directory"]).exists()
    assert cluster.ray_file() == {}
    once_more = cluster.run("down", "--config", str(cluster.config))
    assert (once_more.returncode, "was started here" in once_more.stderr) == (1, True)


def test_up_that_fails_says_why_and_leaves_nothing_running(cluster: Cluster) -> None:
    """Its only version cannot be loaded: the actors never had so much memory."""
    text = cluster.config.read_text()
    cluster.config.write_text(text.replace("cluster:\n", "cluster:\n  device_memory: 1\n"))
    told = cluster.run("up", "--config", str(cluster.config), "--no-serve")
    assert told.returncode == 1
    assert "mlp" in told.stderr
    assert "short" in told.stderr
    logs = re.search(r"its logs are in (\S+)/ray", " ".join(told.stderr.split()))
    assert logs is not None
    assert Path(logs[1], "ray.log").is_file()
    shutil.rmtree(logs[1])
    assert cluster.ray_file() == {}
    # Every process that `up` started, directly or not, has inherited this.
    assert marked("SHARDSERVE_STATE", cluster.environment["SHARDSERVE_STATE"]) == []


def test_up_refuses_a_port_that_is_taken_before_it_starts_anything(cluster: Cluster) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        text = cluster.config.read_text()
        cluster.config.write_text(text.replace("    port: 0\n", f"    port: {port}\n", 1))
        told = cluster.run("up", "--config", str(cluster.config), "--no-serve")
    assert told.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in told.stderr
    assert cluster.ray_file() == {}


def test_up_refuses_a_servable_that_the_store_does_not_have(cluster: Cluster) -> None:
    cluster.declare({"name": "mlp"}, {"name": "nobody"})
    told = cluster.run("up", "--config", str(cluster.config))
    assert (told.returncode, "has no nobody; it has mlp" in told.stderr) == (1, True)
    assert cluster.ray_file() == {}
