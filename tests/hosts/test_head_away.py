"""The head's GCS is killed and stays away: requests go on, and control returns with every actor.

Ray is started by the commands of `cluster.yaml`, in its variant for this, but without `ray up`:
its autoscaler, which starts workers over ssh, has a test of its own.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import pytest

from bench.hosts import Host, Hosts
from tests.e2e.running import until
from tests.hosts import cluster_file, looked_up
from tests.hosts.running import NAME, REST, declare, look_up, succeed, wheel, with_ours

pytestmark = [pytest.mark.e2e, pytest.mark.hosts, pytest.mark.timeout(240)]

VARIANT: Final = "a head that may go away"
AWAY_S: Final = 30.0
AUTOSCALER: Final = "--autoscaling-config=~/ray_bootstrap_config.yaml"
GCS: Final = "gcs/gcs_server"
KEEPER: Final = "cluster.gcs_keeper"


@dataclass
class Load:
    """Requests to the direct doors of all hosts, one after another, until told to end."""

    net: Hosts
    answered: int = 0
    lost: list[str] = field(default_factory=list)
    versions: set[int] = field(default_factory=set)

    def run(self, over: threading.Event) -> None:
        known = {str(looked_up.answer(looked_up.IDS, version)): version for version in (1, 2)}
        # The network is a thread's own, so this one joins for itself.
        with self.net.joined():
            while not over.is_set():
                for host in self.net.hosts:
                    self._ask(host, known)

    def _ask(self, host: Host, known: dict[str, int]) -> None:
        try:
            found = look_up(host, REST)
            self.versions.add(known[str(found.json["predictions"])])
        except (OSError, KeyError) as error:
            self.lost.append(f"{host.name}: {error!r}")
        else:
            self.answered += 1


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    folder = tmp_path_factory.mktemp("away")
    wheel(folder)
    servables = declare(folder)
    document = cluster_file.documents()[VARIANT]
    with Hosts(folder) as net:
        head, worker = net.hosts
        for host in net.hosts:
            cluster_file.prepare(net, host)
            succeed(net, host, f"~/shardserve/bin/pip install -q {folder}/dist/*.whl")
            succeed(net, host, f"umask 077; mkdir -p ~/.ray; echo {'0' * 64} >~/.ray/auth_token")
        for command in document["head_start_ray_commands"]:
            succeed(net, head, command.replace(AUTOSCALER, ""))
        for command in document["worker_start_ray_commands"]:
            succeed(net, worker, f"RAY_HEAD_IP={head.address}; {command}")
        deploy = f"shardserve deploy --no-serve --config {servables}"
        succeed(net, head, with_ours(deploy), timeout_s=120.0)
        yield net


def status(net: Hosts) -> dict[str, Any]:
    config = net.folder / "servables.yaml"
    printed = succeed(net, net.hosts[0], with_ours(f"shardserve status --config {config} --json"))
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


def lives(found: dict[str, Any]) -> dict[str, Any]:
    """Who is who: every process of the cluster, and the lives of its actors."""
    actors = {name: (one["pid"], one["generation"]) for name, one in found["actors"].items()}
    doors = {door["router"]: door["pid"] for door in found["doors"]}
    return {"controller": found["pid"], "term": found["term"], **actors, **doors}


def is_served(net: Hosts, version: int) -> bool:
    wanted = {"predictions": looked_up.answer(looked_up.IDS, version)}
    return all(look_up(host, REST).json == wanted for host in net.hosts)


def test_nothing_is_lost_while_the_gcs_is_away_and_control_returns(net: Hosts) -> None:
    with net.joined():
        until("both doors", lambda: is_served(net, 1), 30.0)
    before = lives(status(net))
    assert len(before) == 8, "two devices, two shards, two routers, the controller and its term"
    head = net.hosts[0]
    [gcs], [keeper] = net.pids(head, GCS), net.pids(head, KEEPER)

    load, over = Load(net), threading.Event()
    thread = threading.Thread(target=load.run, args=[over])
    thread.start()
    try:
        # The keeper would have another one there within a moment.
        os.kill(keeper, signal.SIGSTOP)
        os.kill(gcs, signal.SIGKILL)
        began = time.monotonic()
        until("the time", lambda: time.monotonic() - began > AWAY_S, AWAY_S + 30.0, every_s=1.0)
        assert net.pids(head, GCS) == []
        answered_without = load.answered
        os.kill(keeper, signal.SIGCONT)
        until("a GCS", lambda: net.pids(head, GCS), 10.0)
        assert lives(status(net)) == before
        # Control is back when something can be changed.
        looked_up.save(net.folder / "store", NAME, 2)
        until("version 2", lambda: 2 in load.versions, 30.0)
    finally:
        over.set()
        thread.join()
    assert load.lost == []
    assert answered_without > 100
    assert lives(status(net)) == before


def test_the_keeper_has_another_gcs_there_at_once(net: Hosts) -> None:
    before = lives(status(net))
    [gcs] = net.pids(net.hosts[0], GCS)
    os.kill(gcs, signal.SIGKILL)
    until("another", lambda: set(net.pids(net.hosts[0], GCS)) - {gcs}, 10.0)
    assert lives(status(net)) == before


def test_down_ends_ray_and_its_keeper_on_every_host(net: Hosts) -> None:
    config = net.folder / "servables.yaml"
    succeed(net, net.hosts[0], with_ours(f"shardserve down --config {config} --with-ray"))
    until("no process", lambda: not any(net.pids(host) for host in net.hosts), 20.0)
