"""``recovery``: a process that holds tables is killed under load; what clients see, and how long.

Tables of one partition of 100 GB each, of which few rows are written, lie on shard actors: on one,
or on two. In each round another actor gets SIGKILL while its tables are asked at a steady rate. A
table with a second replica must not fail a request; of one without, requests must end with a typed
error in time, until another process has the partition and answers. Where this machine can have two
hosts, the same is asked of a raylet that is killed with all that it has started.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from bench.errors import ContenderFailed
from bench.hosts import available
from bench.recovery_ends import DEADLINE_S, Blow, Ends
from bench.recovery_hosts import kill_raylet
from bench.recovery_model import LOGICAL_BYTES
from bench.recovery_scene import ALONE, NEVER_S, RATE, kill_actors
from bench.registry import Bench, Options
from bench.report import Figure, Plot, Result, Samples, Series, Table, machine
from bench.stats import bootstrap
from bench.terabyte_memory import disk_bytes

__all__ = ["BENCH"]

#: Rounds in which a raylet is killed; each takes more than a minute, most of it to make a cluster.
_RAYLETS: Final = 3
_RAYLET: Final = "raylet_"
_GB: Final = 1e9


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--one-host", action="store_true", help="even where two can be had")


def _run(options: Options) -> Result:
    conditions = machine()
    rounds = options.rounds_or(quick=3, full=7)
    if rounds < 2:
        raise ContenderFailed("a table on two actors needs two rounds: one kills one actor")
    one_host = options.quick or options.own.one_host
    reason = "asked for one host" if one_host else available(ssh=False)
    with tempfile.TemporaryDirectory(prefix="shardserve-", dir="/tmp") as name:
        folder = Path(name)
        killed = kill_actors(_made(folder / "one"), rounds, options)
        disk = disk_bytes(folder)
        lost = [
            kill_raylet(_made(folder / f"two-{number}"), options)
            for number in range(0 if reason else _RAYLETS)
        ]
    return _result(killed, lost, disk, reason, options, conditions)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _result(
    killed: Sequence[Blow],
    lost: Sequence[Blow],
    disk: int,
    reason: str,
    options: Options,
    conditions: dict[str, Figure],
) -> Result:
    blows = (*killed, *lost)
    figures: dict[str, Figure] = {
        "quick": options.quick,
        "seed": options.seed,
        "rounds": len(killed),
        "raylet_rounds": len(lost),
        "one_host_because": reason,
        "logical_gb": LOGICAL_BYTES / _GB,
        "disk_gb": disk / _GB,
        "rate": RATE,
        "deadline_s": DEADLINE_S,
        **_figures(killed, ""),
        **(_figures(lost, _RAYLET) if lost else {}),
        "requests": sum(len(blow.attempts) for blow in blows),
        "machine": conditions,
    }
    notes = [
        f"Open loop, {RATE:g} requests a second to a table, deadline {DEADLINE_S:g} s.",
        "Other: neither a right answer nor 503.",
        "Recovered: from the signal to the first right answer after the last error.",
    ]
    if reason:
        notes.append(f"On one host, so without raylets that are killed: {reason}.")
    return Result(
        bench=BENCH.name,
        ratios={**_ratios(killed, ""), **(_ratios(lost, _RAYLET) if lost else {})},
        figures=figures,
        tables=(_table(blows), _summary(killed, lost, options.seed)),
        samples={"requests": _samples(blows)},
        plot=_plot(killed),
        notes=tuple(notes),
    )


def _ends(blows: Sequence[Blow], replicas: int) -> list[Ends]:
    return [each for blow in blows for each in blow.tables if each.replicas == replicas]


def _recovered_s(blows: Sequence[Blow]) -> list[float]:
    """Of the tables of one replica."""
    return [NEVER_S if each.recovered_s is None else each.recovered_s for each in _ends(blows, 1)]


def _figures(blows: Sequence[Blow], prefix: str) -> dict[str, Figure]:
    alone, back = _ends(blows, 1), _recovered_s(blows)
    codes = sorted({code for each in alone for code in each.errors})
    return {
        f"{prefix}recovered_s": back,
        f"{prefix}recovered_median_s": float(np.median(back)),
        f"{prefix}errors": {
            str(code): sum(each.errors.get(code, 0) for each in alone) for code in codes
        },
    }


def _ratios(blows: Sequence[Blow], prefix: str) -> dict[str, float]:
    alone = _ends(blows, 1)
    unanswered = sum(blow.unanswered for blow in blows)
    return {
        f"{prefix}failed_with_two_replicas": float(sum(e.failed for e in _ends(blows, 2))),
        f"{prefix}untyped": float(unanswered + sum(each.untyped for each in alone)),
        f"{prefix}error_s": max(each.error_s for each in alone),
        f"{prefix}recovered_s": max(_recovered_s(blows)),
    }


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


def _summary(killed: Sequence[Blow], lost: Sequence[Blow], seed: int) -> Table:
    return Table(
        title="Seconds to right answers, one replica",
        columns=("", "rounds", "median", "worst"),
        rows=tuple(
            (what, len(blows), bootstrap(back, seed=seed), max(back))
            for what, blows in (("shard actor killed", killed), ("raylet killed", lost))
            if (back := _recovered_s(blows))
        ),
    )


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
    add_arguments=_add_arguments,
)
