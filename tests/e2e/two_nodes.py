"""A cluster over two raylets of this machine, as a program of its own; prints what it found.

Ray's state is the process's: two clusters in one process would meet.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from cluster.environment import ray_environment


def main(folder: Path, private: Path, mark: str) -> dict[str, Any]:
    """Start the nodes, deploy, ask, and say where everything is.

    Args:
        folder: of the declaration.
        private: for Ray's files; a short path, since sockets lie below it.
        mark: what all processes carry.
    """
    # Ray reads its settings when it is imported.
    os.environ.update(ray_environment(private, mark))
    (private / "auth_token").write_text("0" * 64)
    import ray
    from ray.cluster_utils import Cluster as Nodes

    nodes = Nodes()
    try:
        for _ in range(2):
            nodes.add_node(
                num_cpus=2,
                object_store_memory=100 << 20,
                include_dashboard=False,
                temp_dir=str(private / "ray"),
            )
        return _serve(nodes.address, folder)
    finally:
        ray.shutdown()
        nodes.shutdown()


def _serve(address: str, folder: Path) -> dict[str, Any]:
    from cluster import deployment
    from cluster.config import load
    from tests.e2e import models
    from tests.e2e.models import TEXTS
    from tests.e2e.running import ask

    config = load(folder / "servables.yaml")
    models.save_words(Path(config.store))
    deployment.attach(address, config.cluster.name)
    controller = deployment.create_controller(config, folder / "sockets", folder / "cache")
    deployment.apply(controller, config)
    status = deployment.wait_ready(controller, config, 120.0)
    # The second node's router may still be on its way.
    doors = _both_doors(controller)
    answers = {
        door["node"]: ask(
            f"http://{door['host']}:{door['port']}",
            "/v1/models/words:predict",
            {"instances": TEXTS},
        ).json
        for door in doors
    }
    connections = _connections_once_made(controller, len(status["actors"]))
    drained = _drain(controller, doors)
    assert deployment.shut_down(config.cluster.name)
    assert not deployment.shut_down(config.cluster.name)
    return {
        "nodes": {name: actor["node"] for name, actor in status["actors"].items()},
        "answers": answers,
        "connections": connections,
        "drained": drained,
        "left": _left(),
    }


def _drain(controller: Any, doors: list[dict[str, Any]]) -> dict[str, Any]:
    """Drain a node while both routers are asked all the time."""
    from concurrent.futures import ThreadPoolExecutor
    from threading import Event

    from cluster import deployment
    from cluster.edits import DrainNode
    from tests.e2e.models import TEXTS
    from tests.e2e.running import ask

    done = Event()

    def asked(door: dict[str, Any]) -> set[int]:
        url, seen = f"http://{door['host']}:{door['port']}", set()
        while not done.is_set():
            found = ask(url, "/v1/models/words:predict", {"instances": TEXTS})
            seen.add(found.status)
        return seen

    # Another device would have to compile.
    found = deployment.status(controller)["actors"]
    device = found["device-0"]["node"]
    (node,) = (door["node"] for door in doors if door["node"] != device)
    with ThreadPoolExecutor(len(doors)) as clients:
        try:
            statuses = [clients.submit(asked, door) for door in doors]
            deployment.edit(controller, DrainNode(node=node[:16]))
            deployment.wait_drained(controller, node, 120.0)
        finally:
            done.set()
    found = deployment.status(controller)["actors"]
    return {
        "node": node,
        "actors": {name: actor["node"] for name, actor in found.items()},
        "statuses": sorted(set().union(*(each.result() for each in statuses))),
    }


def _left() -> list[str]:
    """Named actors, once those that were told to end have done so."""
    import ray

    from tests.e2e.running import until

    def named() -> list[str]:
        return [str(each) for each in ray.util.list_named_actors(all_namespaces=True)]

    with contextlib.suppress(AssertionError):
        until("no actors", lambda: not named(), 30.0)
    return named()


def _connections_once_made(controller: Any, actors: int) -> dict[str, int]:
    """The connections, as soon as there is one to each actor; else, what there was at last."""
    from tests.e2e.running import until

    with contextlib.suppress(AssertionError):
        until("a link each", lambda: [*_connections(controller).values()] == [1] * actors, 20.0)
    return _connections(controller)


def _connections(controller: Any) -> dict[str, int]:
    """Actor to the TCP connections that others have open to it."""
    import ray

    from cluster.epochs import decode_epoch

    epoch = decode_epoch(ray.get(controller.watch_epoch.remote("test", (0, 0), 0)))
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    established = [int(line[1].rpartition(":")[2], 16) for line in lines if line[3] == "01"]
    return {name: established.count(one.port) for name, one in epoch.endpoints.items()}


def _both_doors(controller: Any) -> list[dict[str, Any]]:
    from cluster import deployment
    from tests.e2e.running import ask, until

    def ready() -> list[dict[str, Any]]:
        doors: list[dict[str, Any]] = deployment.status(controller)["doors"]
        urls = [f"http://{door['host']}:{door['port']}" for door in doors]
        with contextlib.suppress(OSError):  # one that is told of may not listen yet
            if len(urls) == 2 and all(ask(url, "/readyz").status == 200 for url in urls):
                return doors
        return []

    return until("two doors", ready, 120.0, every_s=0.2)


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])))
