"""``shared``: eight servables on one trunk of 200 MB take hardly more memory than one.

Each is saved by itself, and the cluster finds that their trunks are the same. A cluster that has
just started loads one servable, answers, and is measured; then it loads the others, answers for all
eight, and is measured again. Then seven are unloaded, the one that came first before the others,
while the last is asked all the time. Full runs hold the same number of servables with trunks of
their own beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from bench import shared_model
from bench.doors import pss_mib
from bench.errors import ContenderFailed, LoadFailed
from bench.operating import Operator
from bench.product import declaration, start_product, status
from bench.registry import Bench, Options
from bench.report import Cell, Figure, Plot, Result, Samples, Series, Table, machine
from bench.shared_model import KINDS, TRUNK_BYTES
from bench.stats import bootstrap
from bench.terabyte_memory import memory_of
from bench.traffic import Asked, Attempt, Span, Traffic, latencies_ms
from cluster.ports import free_ports

__all__ = ["BENCH", "Held", "Round", "copies_of", "descendants"]

#: Requests a second, over all servables that are asked: a device that is mostly idle.
_RATE: Final = 20.0
_TIMEOUT_S: Final = 20.0
_SERVABLES: Final = 8
_MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What a cluster holds at one moment.

    Attributes:
        pss_mib: process, as role and number, to its memory: actors, routers, controller, and what
            they have started. Ray's own processes are not among them.
        mapped: bytes of blobs that the device actor has in memory.
        own: anonymous bytes of the device actor.
        trunks: units of the size of a trunk that the device actor says it has open.
    """

    pss_mib: Mapping[str, float]
    mapped: int
    own: int
    trunks: int

    @property
    def total_mib(self) -> float:
        """Of all processes."""
        return sum(self.pss_mib.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What became of one cluster.

    Attributes:
        kind: of `bench.shared_model.KINDS`.
        held: moment to what was held: ``one``, ``all`` and ``left``, when one is left.
        loads_s: seconds from each command to load until available.
        attempts: what was asked, in the whole round.
        failed: requests without a right answer.
        quiet: when all were there and asked.
        unloading: while all but the last were unloaded.
    """

    kind: str
    held: Mapping[str, Held]
    loads_s: Sequence[float]
    attempts: Sequence[Attempt]
    failed: int
    quiet: Span
    unloading: Span

    @property
    def growth(self) -> float:
        """Memory of all servables over that of one."""
        return self.held["all"].total_mib / self.held["one"].total_mib


def copies_of(one: Held, all_: Held) -> int:
    """Copies of trunks on the device: as it says itself, or as memory tells, if that is more."""
    grown = max(all_.own - one.own, 0)
    return max(all_.trunks, round((all_.mapped + grown) / TRUNK_BYTES))


def descendants(pids: Iterable[int], parents: Mapping[int, int]) -> set[int]:
    """Processes with all that descend from them.

    Args:
        pids: to begin with.
        parents: of every process.
    """
    found = set(pids)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--servables", type=int, default=_SERVABLES, help="how many share a trunk")


def _run(options: Options) -> Result:
    conditions = machine()
    count: int = options.own.servables
    if count < 2:
        raise ContenderFailed(f"{count} servables share nothing")
    kinds = KINDS[:1] if options.quick else KINDS
    asked_s = 2.0 if options.quick else 6.0
    rounds: list[Round] = []
    with tempfile.TemporaryDirectory(prefix="shardserve-") as name:
        folder = Path(name)
        store = folder / "store"
        asked = {
            kind: list(shared_model.save(store, kind, count, seed=options.seed)) for kind in kinds
        }
        for turn in range(options.rounds_or(quick=1, full=3)):
            # Later rounds find the programs that the first has compiled.
            rounds += [
                _round(folder, store, kind, asked[kind], asked_s, options.seed, turn)
                for kind in (kinds if turn % 2 else kinds[::-1])
            ]
    figures: dict[str, Figure] = {
        "quick": options.quick,
        "seed": options.seed,
        "servables": count,
        "trunk_mib": TRUNK_BYTES / _MIB,
        "rate": _RATE,
        "machine": conditions,
    }
    return _result(rounds, figures, options.seed)


def _round(
    folder: Path,
    store: Path,
    kind: str,
    asked: Sequence[Asked],
    asked_s: float,
    seed: int,
    turn: int,
) -> Round:
    config = folder / "servables.yaml"
    (port,) = free_ports(1)
    # A name of its own: what the store remembers of a cluster would be kept.
    cluster = {"name": f"bench-{os.getpid()}-{kind}-{turn}", "http": {"port": port, "admin": True}}
    config.write_text(declaration(store, [], cluster=cluster))
    own = {"XDG_CACHE_HOME": str(folder / "cache")}
    held: dict[str, Held] = {}
    with start_product(config, folder=folder, environment=own) as url:
        operator = Operator(url)
        loads = [_loaded(operator, asked[0].owner)]
        first, _ = _asked(url, asked[:1], asked_s, seed)
        held["one"] = _held(config)
        loads += [_loaded(operator, each.owner) for each in asked[1:]]
        every, quiet = _asked(url, asked, asked_s, seed)
        held["all"] = _held(config)
        with Traffic(url, asked[-1:], rate=_RATE, timeout_s=_TIMEOUT_S, seed=seed + 1) as unloaded:
            time.sleep(1.0)
            began = time.monotonic()
            for each in asked[:-1]:
                operator.unload(each.owner)
            time.sleep(1.0)
            unloading = Span(began, time.monotonic())
        held["left"] = _held(config)
    for traffic in (first, every, unloaded):
        if not any(each.is_right for each in traffic.attempts):
            raise LoadFailed(f"nothing was answered: {traffic.errors}")
    silent = {each.owner for each in asked} - {each.owner for each in every.attempts}
    if silent:
        raise LoadFailed(f"nobody asked {', '.join(sorted(silent))}")
    return Round(
        kind=kind,
        held=held,
        loads_s=loads,
        attempts=[*first.attempts, *every.attempts, *unloaded.attempts],
        failed=sum(sum(each.errors.values()) for each in (first, every, unloaded)),
        quiet=quiet,
        unloading=unloading,
    )


def _loaded(operator: Operator, servable: str) -> float:
    began = time.monotonic()
    operator.load(servable, 1, only=False)
    return time.monotonic() - began


def _asked(url: str, kinds: Sequence[Asked], asked_s: float, seed: int) -> tuple[Traffic, Span]:
    with Traffic(url, kinds, rate=_RATE, timeout_s=_TIMEOUT_S, seed=seed) as traffic:
        began = time.monotonic()
        time.sleep(asked_s)
        span = Span(began, time.monotonic())
    return traffic, span


def _held(config: Path) -> Held:
    told = status(config)
    named = {name: int(each["pid"]) for name, each in told["actors"].items() if each["pid"]}
    named |= {door["router"]: int(door["pid"]) for door in told["doors"]}
    named["controller"] = int(told["pid"])
    devices = [name for name, each in told["actors"].items() if each["kind"] == "device"]
    if len(devices) != 1 or devices[0] not in named:
        raise ContenderFailed(f"one device actor was asked for, there are: {devices}")
    parents = _parents()
    children = {
        f"{name}/{number}": pid
        for name, parent in named.items()
        for number, pid in enumerate(sorted(descendants([parent], parents) - {parent}))
    }
    pss: dict[str, float] = {}
    for name, pid in (named | children).items():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a child that has ended
            pss[name] = pss_mib(pid)
    memory = memory_of([named[devices[0]]])
    units = told["actors"][devices[0]]["units"]
    trunks = sum(each["bytes"] >= TRUNK_BYTES for each in units)
    return Held(pss_mib=pss, mapped=memory.blobs, own=memory.own, trunks=trunks)


def _parents() -> dict[int, int]:
    """Of every process of the machine, its parent."""
    found: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                found[int(entry.name)] = int(fields[1])
    return found


def _result(rounds: Sequence[Round], conditions: Mapping[str, Figure], seed: int) -> Result:
    by_kind = {
        kind: found for kind in KINDS if (found := [each for each in rounds if each.kind == kind])
    }
    shared = by_kind["shared"]
    growth = {
        kind: bootstrap([each.growth for each in found], seed=seed)
        for kind, found in by_kind.items()
    }
    copies = {
        kind: max(copies_of(each.held["one"], each.held["all"]) for each in found)
        for kind, found in by_kind.items()
    }
    within, quiet = (
        [
            ms
            for each in shared
            for ms in latencies_ms(each.attempts, [_last(each)], getattr(each, span))
        ]
        for span in ("unloading", "quiet")
    )
    count = conditions["servables"]
    p99 = {"unloading_p99_ms": within, "quiet_p99_ms": quiet}
    figures: dict[str, Figure] = {
        "rounds": len(shared),
        "pss_one_mib": _median(each.held["one"].total_mib for each in shared),
        "pss_all_mib": _median(each.held["all"].total_mib for each in shared),
        "pss_left_mib": _median(each.held["left"].total_mib for each in shared),
        "pss_worst_vs_one": max(each.growth for each in shared),
        **{f"pss_{kind}_vs_one": each.value for kind, each in growth.items() if kind != "shared"},
        **{f"copies_{kind}": each for kind, each in copies.items()},
        "first_load_s": _median(each.loads_s[0] for each in shared),
        "later_load_s": _median(took for each in shared for took in each.loads_s[1:]),
        **{name: float(np.percentile(each, 99)) for name, each in p99.items() if each},
        "requests": sum(len(each.attempts) for each in rounds),
        "intervals": {f"pss_k{count}_vs_one": [growth["shared"].low, growth["shared"].high]},
        **conditions,
    }
    return Result(
        bench=BENCH.name,
        ratios={
            f"pss_k{count}_vs_one": growth["shared"].value,
            "device_weight_copies": float(copies["shared"]),
            "failed_requests": float(sum(each.failed for each in rounds)),
        },
        figures=figures,
        tables=_tables(by_kind, copies),
        samples=_samples(rounds),
        plot=_plot(by_kind),
        notes=(
            "PSS of actors, routers, controller and what they started, without Ray's processes.",
            "Copies: open units as large as a trunk, or new memory of the device in trunks.",
        ),
    )


def _last(found: Round) -> str:
    """The servable that was asked to the end."""
    return max(found.attempts, key=lambda each: each.due).owner


def _median(values: Iterable[float]) -> float:
    return float(np.median(list(values)))


def _tables(by_kind: Mapping[str, Sequence[Round]], copies: Mapping[str, int]) -> tuple[Table, ...]:
    memory: list[tuple[Cell, ...]] = []
    loads: list[tuple[Cell, ...]] = []
    for kind, found in by_kind.items():
        totals = [
            _median(each.held[moment].total_mib for each in found)
            for moment in ("one", "all", "left")
        ]
        memory.append((kind, *totals, totals[1] / totals[0], copies[kind]))
        first = _median(each.loads_s[0] for each in found)
        loads.append((kind, first, _median(took for each in found for took in each.loads_s[1:])))
    return (
        Table(
            title="PSS, MiB: medians over rounds",
            columns=("trunks", "one", "all", "one left", "all over one", "copies on the device"),
            rows=tuple(memory),
        ),
        Table(
            title="Seconds from the command until available",
            columns=("trunks", "the first", "a later one"),
            rows=tuple(loads),
        ),
    )


def _samples(rounds: Sequence[Round]) -> dict[str, Samples]:
    return {
        "memory": Samples(
            columns=("round", "kind", "moment", "process", "pss_mib"),
            rows=[
                (number, each.kind, moment, process, mib)
                for number, each in enumerate(rounds)
                for moment, held in each.held.items()
                for process, mib in held.pss_mib.items()
            ],
        ),
        "requests": Samples(
            columns=("round", "owner", "due_s", "took_ms", "status", "right"),
            rows=[
                (
                    *(number, each.owner, each.due - found.quiet.began, 1e3 * each.took_s),
                    *(each.status, int(each.is_right)),
                )
                for number, found in enumerate(rounds)
                for each in found.attempts
            ],
        ),
    }


def _plot(by_kind: Mapping[str, Sequence[Round]]) -> Plot:
    """What each process holds, in turn with one, with all and with one left."""
    series = []
    for kind, found in by_kind.items():
        for number, each in enumerate(found):
            totals = [each.held[moment].total_mib for moment in ("one", "all", "left")]
            series.append(Series(label=f"{kind}, {number}", x=(0.0, 1.0, 2.0), y=tuple(totals)))
    return Plot(
        title="Memory of all processes",
        x_label="one servable, all, one left",
        y_label="MiB",
        series=tuple(series),
    )


BENCH: Final = Bench(
    name="shared",
    summary="eight servables on one trunk of 200 MB: memory over that of one, unloads under load",
    run=_run,
    add_arguments=_add_arguments,
)
