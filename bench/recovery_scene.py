"""What ``recovery`` does to a cluster: a process dies while the tables that it holds are asked for.

Each actor is killed once: one that crashes again within a minute is started again after a pause,
which would be measured as well.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final

import yaml

from bench.errors import ContenderFailed
from bench.faults_cluster import command_line
from bench.product import apply, declaration, start_product, status
from bench.recovery_ends import DEADLINE_S, Blow, ends_of, is_over
from bench.recovery_model import kinds, save_table
from bench.registry import Options
from bench.traffic import Traffic

__all__ = ["ALONE", "NEVER_S", "RATE", "TWIN", "are_up", "declare", "held", "kill_actors", "strike"]

#: Tables of one replica, and of two: how their names begin.
ALONE: Final = "alone"
TWIN: Final = "twin"
#: Requests a second to each table that the killed process holds.
RATE: Final = 100.0
#: A table that does not answer again by now counts as one that never does.
NEVER_S: Final = 60.0
_BEFORE_S: Final = 1.0
_LOOK_S: Final = 0.05


def kill_actors(folder: Path, rounds: int, options: Options) -> list[Blow]:
    """Kill every shard actor of a cluster that ``shardserve up`` makes, one after the other.

    Args:
        folder: empty; takes the store, the declaration and the log.
        rounds: how many there are; as many tables of each kind lie on them.
        options: of the benchmark.
    """
    store = folder / "store"
    tables = [f"{kind}-{number}" for kind in (ALONE, TWIN) for number in range(rounds)]
    for table in tables:
        save_table(store, table, options.seed)
    config = folder / "servables.yaml"
    config.write_text(declaration(store, [], cluster={"devices": 0, "shards": rounds}))
    with start_product(config, folder=folder) as url:
        deadline = time.monotonic() + NEVER_S
        while not are_up(status(config), rounds):
            if time.monotonic() > deadline:
                raise ContenderFailed(f"{rounds} shard actors are not up after {NEVER_S:g} s")
        declare(config, tables)
        apply(config)
        return [_kill_actor(url, config, f"shard-{at}", options) for at in range(rounds)]


def are_up(found: Mapping[str, Any], count: int) -> bool:
    """Whether so many actors run: tables that come now can lie on all of them."""
    return [actor["state"] for actor in found["actors"].values()].count("UP") >= count


def declare(config: Path, tables: Sequence[str]) -> None:
    """Add tables to a declaration."""
    declared = yaml.safe_load(config.read_text())
    declared["servables"] = [{"name": name, "table_replicas": _replicas(name)} for name in tables]
    config.write_text(yaml.safe_dump(declared))


def _replicas(table: str) -> int:
    return 2 if table.startswith(TWIN) else 1


def _kill_actor(url: str, config: Path, name: str, options: Options) -> Blow:
    """Kill an actor's process while everything that it holds is asked for."""
    found = status(config)
    pid = int(found["actors"][name]["pid"])
    if b"ray::ShardActor" not in command_line(pid):
        raise ContenderFailed(f"{name} should be process {pid}, which is no shard actor")
    tables = held(found, name)
    if not tables:
        raise ContenderFailed(f"{name} holds no table")
    return strike(url, f"{name} killed", tables, lambda: os.kill(pid, signal.SIGKILL), options)


def held(found: Mapping[str, Any], actor: str) -> list[str]:
    """Servables of a status that are placed on an actor."""
    return sorted(
        name
        for name, servable in found["servables"].items()
        if any(actor in version["actors"] for version in servable["versions"])
    )


def strike(
    url: str,
    what: str,
    tables: Sequence[str],
    deed: Callable[[], None],
    options: Options,
    *,
    network: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
) -> Blow:
    """Do something to a cluster while tables are asked for, and wait until all are answered again.

    Args:
        url: of its door.
        what: is done, in words.
        tables: that are asked for.
        deed: does it.
        options: of the benchmark.
        network: on which the cluster is.
    """
    asked = [kind for name in tables for kind in kinds(name, options.seed, DEADLINE_S)]
    with Traffic(
        url,
        asked,
        rate=RATE * len(tables),
        timeout_s=2 * DEADLINE_S,
        seed=options.seed,
        network=network,
    ) as traffic:
        time.sleep(_BEFORE_S)
        at = time.monotonic()
        deed()
        until = at + NEVER_S
        while (now := time.monotonic()) < until:
            time.sleep(_LOOK_S)
            if is_over(traffic.attempts, tables, at, now):
                break
    unanswered = {kind: count for kind, count in traffic.errors.items() if kind != "status"}
    return Blow(
        what=what,
        at=at,
        tables=tuple(ends_of(traffic.attempts, name, _replicas(name), at) for name in tables),
        unanswered=sum(unanswered.values()),
        attempts=tuple(traffic.attempts),
    )
