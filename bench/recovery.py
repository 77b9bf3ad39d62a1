"""``recovery``: a process that holds tables is killed under load; what clients see, and how long.

Tables of one partition of 100 GB each, of which few rows are written, lie on shard actors: on one,
or on two. In each round another actor gets SIGKILL while its tables are asked at a steady rate. A
table with a second replica must not fail a request; of one without, requests must end with a typed
error in time, until another process has the partition and answers.

Each actor is killed once: one that crashes again within a minute is started again after a pause,
which would be measured as well.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import yaml

from bench.errors import ContenderFailed
from bench.faults_cluster import command_line
from bench.product import apply, declaration, start_product, status
from bench.recovery_ends import DEADLINE_S, Blow, Ends, ends_of, is_over
from bench.recovery_model import LOGICAL_BYTES, kinds, save_table
from bench.registry import Bench, Options
from bench.report import Figure, Plot, Result, Samples, Series, Table, machine
from bench.stats import bootstrap
from bench.terabyte_memory import disk_bytes
from bench.traffic import Traffic

__all__ = ["BENCH"]

ALONE: Final = "alone"
TWIN: Final = "twin"
#: Requests a second to each table that the killed process holds.
_RATE: Final = 100.0
_BEFORE_S: Final = 1.0
#: A table that does not answer again by now counts as one that never does.
_NEVER_S: Final = 60.0
_LOOK_S: Final = 0.05
_GB: Final = 1e9


def _run(options: Options) -> Result:
    conditions = machine()
    rounds = options.rounds_or(quick=3, full=7)
    if rounds < 2:
        raise ContenderFailed("a table on two actors needs two rounds: one kills one actor")
    with tempfile.TemporaryDirectory(prefix="shardserve-", dir="/tmp") as name:
        folder = Path(name)
        store = folder / "store"
        tables = [f"{kind}-{number}" for kind in (ALONE, TWIN) for number in range(rounds)]
        for table in tables:
            save_table(store, table, options.seed)
        config = folder / "servables.yaml"
        cluster = {"devices": 0, "shards": rounds}
        config.write_text(declaration(store, [], cluster=cluster))
        with start_product(config, folder=folder) as url:
            _await_actors(config, rounds)
            declared = yaml.safe_load(config.read_text())
            declared["servables"] = [
                {"name": table, "table_replicas": _replicas(table)} for table in tables
            ]
            config.write_text(yaml.safe_dump(declared))
            apply(config)
            blows = [_kill_actor(url, config, f"shard-{at}", options) for at in range(rounds)]
        disk = disk_bytes(store)
    return _result(blows, disk, options, conditions)


def _replicas(table: str) -> int:
    return 2 if table.startswith(TWIN) else 1


def _await_actors(config: Path, count: int) -> None:
    """Wait until all shard actors run: tables would lie on those that are there."""
    deadline = time.monotonic() + _NEVER_S
    while sum(actor["state"] == "UP" for actor in status(config)["actors"].values()) < count:
        if time.monotonic() > deadline:
            raise ContenderFailed(f"{count} shard actors are not up after {_NEVER_S:g} s")


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
    url: str, what: str, tables: Sequence[str], deed: Callable[[], None], options: Options
) -> Blow:
    """Do something to a cluster while tables are asked for, and wait until all are answered again.

    Args:
        url: of its door.
        what: is done, in words.
        tables: that are asked for.
        deed: does it.
        options: of the benchmark.
    """
    asked = [kind for name in tables for kind in kinds(name, options.seed, DEADLINE_S)]
    rate = _RATE * len(tables)
    with Traffic(url, asked, rate=rate, timeout_s=2 * DEADLINE_S, seed=options.seed) as traffic:
        time.sleep(_BEFORE_S)
        at = time.monotonic()
        deed()
        until = at + _NEVER_S
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


def _result(
    blows: Sequence[Blow], disk: int, options: Options, conditions: dict[str, Figure]
) -> Result:
    alone = [each for blow in blows for each in blow.tables if each.replicas == 1]
    twins = [each for blow in blows for each in blow.tables if each.replicas > 1]
    back = [each.recovered_s for each in alone if each.recovered_s is not None]
    codes = sorted({code for each in alone for code in each.errors})
    figures: dict[str, Figure] = {
        "quick": options.quick,
        "seed": options.seed,
        "rounds": len(blows),
        "logical_gb": LOGICAL_BYTES / _GB,
        "disk_gb": disk / _GB,
        "rate": _RATE,
        "deadline_s": DEADLINE_S,
        "recovered_s": back,
        "recovered_median_s": float(np.median(back)) if back else None,
        "errors": {str(code): sum(each.errors.get(code, 0) for each in alone) for code in codes},
        "requests": sum(len(blow.attempts) for blow in blows),
        "machine": conditions,
    }
    return Result(
        bench=BENCH.name,
        ratios={
            "failed_with_two_replicas": float(sum(each.failed for each in twins)),
            "untyped": float(
                sum(each.untyped for each in alone) + sum(blow.unanswered for blow in blows)
            ),
            "error_s": max((each.error_s for each in alone), default=0.0),
            "recovered_s": max(back, default=0.0) if len(back) == len(alone) else _NEVER_S,
        },
        figures=figures,
        tables=(_table(blows), _summary(back, options.seed)),
        samples={"requests": _samples(blows)},
        plot=_plot(blows),
        notes=(
            f"Open loop, {_RATE:g} requests a second to a table, deadline {DEADLINE_S:g} s.",
            "Untyped: other ends than an answer or 503, over all tables.",
            "Recovered: from the signal to the first right answer after the last error.",
        ),
    )


def _table(blows: Sequence[Blow]) -> Table:
    return Table(
        title="What clients saw; seconds: the latest end of an error, right answers again",
        columns=("", "table", "replicas", "right", "503", "other", "error", "recovered"),
        rows=tuple(
            (
                *(blow.what, each.table, each.replicas, each.right),
                *(each.failed - each.untyped, each.untyped, each.error_s, _seconds(each)),
            )
            for blow in blows
            for each in blow.tables
        ),
    )


def _seconds(ends: Ends) -> str:
    if not ends.failed:
        return "-"
    return "never" if ends.recovered_s is None else f"{ends.recovered_s:.2f}"


def _summary(back: Sequence[float], seed: int) -> Table:
    rows = (("median", bootstrap(back, seed=seed)), ("worst", max(back))) if back else ()
    return Table(title="Seconds to right answers, one replica", columns=("", "s"), rows=rows)


def _samples(blows: Sequence[Blow]) -> Samples:
    return Samples(
        columns=("what", "table", "due_s", "took_ms", "status", "right"),
        rows=[
            (blow.what, a.owner, a.due - blow.at, 1e3 * a.took_s, a.status, int(a.is_right))
            for blow in blows
            for a in blow.attempts
        ],
    )


def _plot(blows: Sequence[Blow]) -> Plot:
    """When requests for the tables of one replica failed, and when they were answered again."""
    return Plot(
        title="Requests around the death of the only process that holds a table",
        x_label="seconds from the signal",
        y_label="milliseconds",
        log_y=True,
        series=tuple(
            Series(
                label=label,
                x=tuple(a.due - blow.at for blow, a in found),
                y=tuple(1e3 * a.took_s for _, a in found),
            )
            for label, is_right in (("answers", True), ("errors", False))
            if (
                found := [
                    (blow, a)
                    for blow in blows
                    for a in sorted(blow.attempts, key=lambda a: a.due)
                    if a.owner.startswith(ALONE) and a.is_right is is_right
                ]
            )
        ),
        uprights=((0.0, "SIGKILL"),),
    )


BENCH: Final = Bench(
    name="recovery",
    summary="a process that holds a table of 100 GB is killed under load: errors, and for how long",
    run=_run,
)
