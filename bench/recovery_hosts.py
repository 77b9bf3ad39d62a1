"""The half of ``recovery`` that needs two hosts: the raylet of one of them is killed.

Tables lie on a shard actor on each host. With a raylet go the processes that it has started; Ray
takes the node for dead when its health checks have failed, by the settings of `cluster.yaml`. Each
round is a cluster of its own, since a node that was lost comes back empty.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import orjson

from bench.errors import ContenderFailed
from bench.product import declaration
from bench.ray_hosts import REST_PORT, RayHosts, own_id
from bench.recovery_ends import Blow
from bench.recovery_model import save_table
from bench.recovery_scene import ALONE, NEVER_S, TWIN, are_up, declare, held, strike
from bench.registry import Options

__all__ = ["kill_raylet"]

_TABLES: Final = (f"{ALONE}-0", f"{ALONE}-1", f"{TWIN}-0")


def kill_raylet(folder: Path, options: Options) -> Blow:
    """Kill the raylet of a host while everything that its actor holds is asked for, elsewhere.

    Args:
        folder: empty and absolute; seen by the hosts.
        options: of the benchmark.

    Raises:
        ToolMissing: this machine can have no such hosts.
        ContenderFailed: the cluster does not come up.
    """
    store = folder / "store"
    for table in _TABLES:
        save_table(store, table, options.seed)
    config = folder / "servables.yaml"
    http = {"host": "0.0.0.0", "port": REST_PORT}
    config.write_text(declaration(store, [], cluster={"http": http, "devices": 0, "shards": 2}))
    ray = RayHosts(folder, {"XDG_CACHE_HOME": str(folder / "cache")})
    with ray.hosts:
        ray.start()
        ray.command("deploy", config, "--no-serve")
        deadline = time.monotonic() + NEVER_S
        while not are_up(_status(ray, config), 2):
            if time.monotonic() > deadline:
                raise ContenderFailed(f"2 shard actors are not up after {NEVER_S:g} s")
        declare(config, _TABLES)
        ray.command("apply", config)
        tables = held(found := _status(ray, config), _lost_with(ray, found))
        [raylet] = ray.running_on([ray.worker], b"/raylet\0")
        return strike(
            f"http://{ray.head.address}:{REST_PORT}",
            "raylet killed",
            tables,
            lambda: os.kill(raylet, signal.SIGKILL),
            options,
            network=ray.hosts.joined,
        )


def _lost_with(ray: RayHosts, found: Mapping[str, Any]) -> str:
    """The shard actor on the host that will be lost."""
    [process] = ray.running_on([ray.worker], b"ray::ShardActor")
    names = [name for name, actor in found["actors"].items() if actor["pid"] == own_id(process)]
    if len(names) != 1:
        raise ContenderFailed(f"which actor is on {ray.worker.name}: {names}")
    return str(names[0])


def _status(ray: RayHosts, config: Path) -> dict[str, Any]:
    found: dict[str, Any] = orjson.loads(ray.command("status", config, "--json").splitlines()[-1])
    return found
