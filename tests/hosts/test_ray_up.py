"""`ray up cluster.yaml`, `shardserve deploy`, requests, `ray down`, over two hosts.

The file is the one that we ship; see `tests.hosts.cluster_file` for what little is changed of it.
The tests follow one cluster through its life, in the order in which they stand here.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.hosts import Host, Hosts
from cluster.environment import SERVE_FLAGS, haproxy_environment
from tests.e2e.running import until
from tests.hosts import cluster_file, looked_up
from tests.hosts.running import NAME, REST, SERVE, declare, look_up, succeed, wheel, with_ours

pytestmark = [pytest.mark.e2e, pytest.mark.hosts, pytest.mark.timeout(240)]

RAY = f"{sys.executable} -m ray.scripts.scripts"


class RayUp:
    """The operator's view: a folder with cluster.yaml, and what is typed there."""

    def __init__(self, net: Hosts) -> None:
        self.net = net

    def ray(self, command: str, timeout_s: float = 60.0) -> str:
        return succeed(
            self.net,
            self.net.operator,
            f"RAY_USAGE_STATS_ENABLED=0 {RAY} {command}",
            timeout_s=timeout_s,
            folder=self.net.folder,
        )

    def on_head(self, command: str, timeout_s: float = 60.0) -> str:
        return self.ray(f"exec cluster.yaml '{with_ours(command)}'", timeout_s)

    def status(self) -> dict[str, Any]:
        printed = self.on_head("shardserve status --config ~/servables.yaml --json")
        [line] = [line for line in printed.splitlines() if line.startswith("{")]
        found: dict[str, Any] = json.loads(line)
        return found


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayUp]:
    folder = tmp_path_factory.mktemp("hosts")
    wheel(folder)
    servables = declare(folder)
    with Hosts(folder) as net:
        for host in net.hosts:
            cluster_file.prepare(net, host)
        document = cluster_file.adapted(cluster_file.documents()[cluster_file.SHIPPED], net)
        (folder / "cluster.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
        up = RayUp(net)
        # The very commands at the head of cluster.yaml.
        up.ray("get-auth-token --generate")
        up.ray("up --yes --no-config-cache cluster.yaml", timeout_s=120.0)
        until("two nodes", lambda: " 2 local.cluster.node" in up.on_head("ray status"), 120.0, 2.0)
        up.ray(f"rsync-up cluster.yaml {servables} ~/servables.yaml".replace("~", "'~'"))
        up.on_head("shardserve deploy --config ~/servables.yaml", timeout_s=120.0)
        yield up


@pytest.fixture(scope="module")
def net(up: RayUp) -> Hosts:
    return up.net


def workers(net: Hosts, host: Host, kind: str) -> list[int]:
    return net.pids(host, f"ray::{kind}")


def test_every_node_runs_the_wheel_that_was_shipped(net: Hosts) -> None:
    where = "import cluster; print(cluster.__file__)"
    for host in net.hosts:
        told = succeed(net, host, f"~/shardserve/bin/python -c '{where}'", folder=Path("/"))
        assert told.startswith(f"{Path.home()}/shardserve/lib/")


@pytest.mark.parametrize("process", ["raylet/raylet", "ray::ShardActor"])
def test_every_ray_process_has_the_environment(net: Hosts, process: str) -> None:
    home = str(Path.home())
    wanted = {
        **SERVE_FLAGS,
        **haproxy_environment(f"{home}/.hap"),
        "RAY_AUTH_MODE": "token",
    }
    for host in net.hosts:
        [pid] = net.pids(host, process)
        # A worker that renamed itself has overwritten its own.
        if process.startswith("ray::"):
            [raylet] = net.pids(host, "raylet/raylet")
            nice = [os.getpriority(os.PRIO_PROCESS, each) for each in (pid, raylet)]
            assert nice[0] == nice[1], "RAY_worker_niceness"
            continue
        lines = Path(f"/proc/{pid}/environ").read_text().split("\0")
        found = dict(line.split("=", 1) for line in lines if "=" in line)
        assert {name: found.get(name) for name in wanted} == wanted


def test_haproxys_admin_socket_is_out_of_others_reach(net: Hosts) -> None:
    # It runs where Serve has a replica, and on the head.
    held = [host for host in net.hosts if net.pids(host, "haproxy.cfg")]
    assert held
    for host in held:
        told = succeed(net, host, "stat -c '%a %F' ~/.hap ~/.hap/*/admin.sock")
        assert told.splitlines() == ["700 directory", "666 socket"]


def test_both_doors_of_both_hosts_answer(net: Hosts) -> None:
    def answered(host: Host, port: int) -> bool:
        try:
            found = look_up(host, port)
        except OSError:
            return False
        return bool(found.json == {"predictions": looked_up.answer(looked_up.IDS, 1)})

    with net.joined():
        until("the direct doors", lambda: all(answered(h, REST) for h in net.hosts), 20.0)
        # Serve opens its door where its replica is, and that is on one node.
        until("the Serve door", lambda: any(answered(h, SERVE) for h in net.hosts), 20.0)


def test_actors_of_a_kind_sit_on_both_hosts(up: RayUp) -> None:
    actors = up.status()["actors"]
    for kind in ("device", "shard"):
        nodes = {actors[f"{kind}-{number}"]["node"] for number in range(2)}
        assert len(nodes) == 2
        process = {"device": "DeviceActor", "shard": "ShardActor"}[kind]
        assert [len(workers(up.net, host, process)) for host in up.net.hosts] == [1, 1]


def test_what_is_apart_speaks_tcp(net: Hosts) -> None:
    """Each router has a connection to the shard of the other host, at that host's address."""
    for host, other in zip(net.hosts, reversed(net.hosts), strict=True):
        table = net.run(other, ["ss", "-Htnp", "state", "established"]).stdout
        [shard] = workers(net, other, "ShardActor")
        inside = re.search(r"^NSpid:.*\s(\d+)$", Path(f"/proc/{shard}/status").read_text(), re.M)
        assert inside is not None
        held = [line.split() for line in table.splitlines() if f"pid={inside[1]}," in line]
        ends = {
            (local.rpartition(":")[0], peer.rpartition(":")[0]) for _, _, local, peer, *_ in held
        }
        assert (other.address, host.address) in ends, table


def test_a_new_version_reaches_both_hosts(up: RayUp) -> None:
    looked_up.save(up.net.folder / "store", NAME, 2)
    wanted = {"predictions": looked_up.answer(looked_up.IDS, 2)}

    def everywhere() -> bool:
        return all(look_up(host, REST).json == wanted for host in up.net.hosts)

    with up.net.joined():
        until("version 2", everywhere, 30.0)


def test_down_leaves_no_process_on_any_host(up: RayUp) -> None:
    told = up.on_head("shardserve down --config ~/servables.yaml --with-ray")
    assert "Ray on 2 nodes" in told
    up.ray("down --yes cluster.yaml", timeout_s=120.0)
    net = up.net

    def left() -> list[str]:
        found = [(host, pid) for host in net.hosts for pid in net.pids(host)]
        return [f"{h.name}: {Path(f'/proc/{pid}/cmdline').read_bytes()!r}" for h, pid in found]

    with contextlib.suppress(AssertionError):
        until("no process", lambda: not left(), 20.0)
    assert left() == []
