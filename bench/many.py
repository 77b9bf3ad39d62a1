"""``many``: hundreds of small servables on one device actor.

They are declared at once, first as many of one program with weights of their own, then in their
place as many with programs of their own: how long until all are available. Then the same rate of
requests goes to all of them and to one of them, in turns, in the same cluster. Beside it: what a
list, the states and a scrape take, one more version of one of them, and what the controller does
when nothing happens.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import orjson

from bench import many_model
from bench.errors import ContenderFailed, LoadFailed
from bench.many_model import KINDS, asked, named
from bench.operating import Operator, metric
from bench.product import declaration, start_product, status
from bench.registry import Bench, Options
from bench.report import Figure, Plot, Result, Samples, Series, Table, machine
from bench.stats import Estimate, bootstrap, paired_ratio
from bench.traffic import Asked, Span, Traffic, latencies_ms
from cluster.ports import free_ports

__all__ = ["BENCH", "Costs", "Spell"]

#: Requests a second, to one or over all.
_RATE: Final = 300.0
_WARM_S: Final = 0.5
_IDLE_S: Final = 5.0
_CALLS: Final = 20
_VERSIONS: Final = (1, 2, 3, 4)
_AVAILABLE_S: Final = 300.0
_FAILED_SHARE_MAX: Final = 0.001
_COMPILED: Final = "shardserve_device_compiles_for_loads_total"
_PERCENTS: Final = (50.0, 90.0, 99.0)


class Spell(NamedTuple):
    """One while of load: milliseconds of its answers, over all servables and over one."""

    over_all: list[float]
    over_one: list[float]


class Costs(NamedTuple):
    """What looking at the cluster and changing it takes.

    Attributes:
        started_s: kind to seconds from the declaration until all were available.
        compiled: kind to programs compiled for that.
        calls: name to milliseconds of every call.
        sizes: name to bytes of the last answer.
        swaps_s: seconds from the command until the next version alone was there.
        idle: share of a processor that the controller takes when nothing happens.
    """

    started_s: Mapping[str, float]
    compiled: Mapping[str, float]
    calls: Mapping[str, Sequence[float]]
    sizes: Mapping[str, int]
    swaps_s: Sequence[float]
    idle: float


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--servables", type=int, help="how many; 200, or 40 with --quick")


def _run(options: Options) -> Result:
    conditions = machine()
    count = options.own.servables or (40 if options.quick else 200)
    spell_s = 2.0 if options.quick else 6.0
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shardserve-")))
        store = folder / "store"
        for kind in KINDS:
            for number in range(count):
                versions = _VERSIONS if (kind, number) == ("apart", 0) else _VERSIONS[:1]
                many_model.save(store, kind, number, versions)
        config = folder / "servables.yaml"
        (port,) = free_ports(1)
        config.write_text(declaration(store, [], cluster={"http": {"port": port, "admin": True}}))
        # A cache of its own: what earlier runs compiled is not there.
        own = {"XDG_CACHE_HOME": str(folder / "cache")}
        url = stack.enter_context(start_product(config, folder=folder, environment=own))
        operator = Operator(url, timeout_s=_AVAILABLE_S)
        started, compiled = {}, {}
        for kind in KINDS:
            before = metric(operator.metrics(), _COMPILED)
            started[kind] = _declare(operator, [named(kind, at) for at in range(count)])
            time.sleep(_WARM_S)  # no scrape is older than this
            compiled[kind] = metric(operator.metrics(), _COMPILED) - before
        kinds = [asked("apart", number) for number in range(count)]
        rounds = options.rounds_or(quick=3, full=7)
        spells = [_spell(url, kinds, spell_s, options.seed + at) for at in range(rounds)]
        calls, sizes = _calls(operator)
        idle = _idle(int(status(config)["pid"]))
        swaps = [_swapped(operator, named("apart", 0), version) for version in _VERSIONS[1:]]
    costs = Costs(started, compiled, calls, sizes, swaps, idle)
    figures: dict[str, Figure] = {
        "quick": options.quick,
        "seed": options.seed,
        "servables": count,
        "rate": _RATE,
        "machine": conditions,
    }
    return _result(spells, costs, figures, options.seed)


def _declare(operator: Operator, names: Sequence[str]) -> float:
    """Seconds from the declaration of these servables alone until all are available."""
    began = time.monotonic()
    servables = [{"name": name, "policy": {"specific": [1]}} for name in names]
    operator.put("/v1/admin/config", {"servables": servables})
    while True:
        states = _listed(operator.get("/v1/models"))
        if all(states.get(name) == {"AVAILABLE"} for name in names):
            return time.monotonic() - began
        failed = sorted(name for name in names if states.get(name) == {"END"})
        if failed or time.monotonic() - began > _AVAILABLE_S:
            raise ContenderFailed(f"not available: {failed or states}")
        time.sleep(0.05)


def _listed(body: bytes) -> dict[str, set[str]]:
    """Servable to the states of its versions."""
    states: dict[str, set[str]] = {}
    for each in orjson.loads(body)["models"]:
        states[each["name"]] = {version["state"] for version in each["versions"]}
    return states


def _spell(url: str, kinds: Sequence[Asked], spell_s: float, seed: int) -> Spell:
    """Ask all, and one of them, each for a while; which comes first takes turns."""
    found: dict[bool, list[float]] = {}
    for is_one in (False, True) if seed % 2 else (True, False):
        chosen = [kinds[seed % len(kinds)]] if is_one else kinds
        with Traffic(url, chosen, rate=_RATE, seed=seed) as traffic:
            time.sleep(_WARM_S)
            began = time.monotonic()
            time.sleep(spell_s)
            span = Span(began, time.monotonic())
        failed = sum(traffic.errors.values())
        if failed > _FAILED_SHARE_MAX * len(traffic.attempts):
            raise LoadFailed(f"requests failed: {traffic.errors}")
        owners = [kind.owner for kind in chosen]
        found[is_one] = latencies_ms(traffic.attempts, owners, span)
    return Spell(over_all=found[False], over_one=found[True])


def _calls(operator: Operator) -> tuple[dict[str, list[float]], dict[str, int]]:
    """What looking takes: milliseconds of each call, and bytes of the last answer."""
    looks: dict[str, Callable[[], bytes]] = {
        "list": lambda: operator.get("/v1/models"),
        "state": lambda: operator.get(f"/v1/models/{named('apart', 0)}"),
        "metrics": lambda: operator.get("/metrics"),
    }
    took: dict[str, list[float]] = {name: [] for name in looks}
    sizes: dict[str, int] = {}
    for name, look in looks.items():
        for _ in range(_CALLS):
            began = time.monotonic()
            sizes[name] = len(look())
            took[name].append(1e3 * (time.monotonic() - began))
            # Scrapes right after one another are answered with what was printed before.
            time.sleep(0.25 if name == "metrics" else 0.0)
    return took, sizes


def _idle(pid: int) -> float:
    """The share of a processor that a process takes while nothing happens."""
    before, began = _processor_s(pid), time.monotonic()
    time.sleep(_IDLE_S)
    return (_processor_s(pid) - before) / (time.monotonic() - began)


def _processor_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _swapped(operator: Operator, servable: str, version: int) -> float:
    began = time.monotonic()
    operator.load(servable, version, only=True)
    return time.monotonic() - began


def _result(
    spells: Sequence[Spell], costs: Costs, conditions: Mapping[str, Figure], seed: int
) -> Result:
    if not all(spell.over_all and spell.over_one for spell in spells):
        raise ContenderFailed("a spell of load without a single answer")
    latencies: dict[str, tuple[Estimate, Estimate, Estimate]] = {}
    for percent in _PERCENTS:
        over_all = [float(np.percentile(spell.over_all, percent)) for spell in spells]
        over_one = [float(np.percentile(spell.over_one, percent)) for spell in spells]
        latencies[f"p{percent:g}"] = (
            bootstrap(over_all, seed=seed),
            bootstrap(over_one, seed=seed),
            paired_ratio(over_all, over_one, seed=seed),
        )
    p99 = latencies["p99"][2]
    medians = {name: float(np.median(each)) for name, each in costs.calls.items()}
    return Result(
        bench=BENCH.name,
        ratios={
            "p50_all_vs_one": latencies["p50"][2].value,
            "p99_all_vs_one": p99.value,
            "start_alike_vs_apart": costs.started_s["alike"] / costs.started_s["apart"],
        },
        figures={
            "rounds": len(spells),
            **{f"start_{kind}_s": took for kind, took in costs.started_s.items()},
            **{f"compiled_{kind}": each for kind, each in costs.compiled.items()},
            **{f"all_{name}_ms": each[0].value for name, each in latencies.items()},
            **{f"one_{name}_ms": each[1].value for name, each in latencies.items()},
            **{f"{name}_ms": each for name, each in medians.items()},
            **{f"{name}_worst_ms": max(each) for name, each in costs.calls.items()},
            **{f"{name}_bytes": each for name, each in costs.sizes.items()},
            "next_version_s": float(np.median(costs.swaps_s)),
            "controller_idle": costs.idle,
            "intervals": {"p99_all_vs_one": [p99.low, p99.high]},
            **conditions,
        },
        tables=_tables(latencies, costs, medians),
        samples={
            "latencies": Samples(
                columns=("round", "over", "ms"),
                rows=[
                    (at, over, ms)
                    for at, spell in enumerate(spells)
                    for over, each in (("all", spell.over_all), ("one", spell.over_one))
                    for ms in each
                ],
            ),
        },
        plot=_plot(spells),
        notes=(
            f"Open loop, {_RATE:g} requests a second over all or to one; in turns.",
            "The list, the states and the scrape are asked one after another, without other load.",
        ),
    )


def _tables(
    latencies: Mapping[str, tuple[Estimate, Estimate, Estimate]],
    costs: Costs,
    medians: Mapping[str, float],
) -> tuple[Table, ...]:
    return (
        Table(
            title="Latency at the same rate, milliseconds: medians over rounds [95 %]",
            columns=("", "over all", "to one", "ratio"),
            rows=tuple((name, *each) for name, each in latencies.items()),
        ),
        Table(
            title="From the declaration until all are available",
            columns=("", "seconds", "programs compiled"),
            rows=tuple((kind, costs.started_s[kind], costs.compiled[kind]) for kind in KINDS),
        ),
        Table(
            title="Looking at it",
            columns=("", "median ms", "worst ms", "bytes"),
            rows=tuple(
                (name, medians[name], max(each), costs.sizes[name])
                for name, each in costs.calls.items()
            ),
        ),
        Table(
            title="Changing nothing, and one",
            columns=("", "value"),
            rows=(
                (
                    "seconds until the next version of one is there alone",
                    float(np.median(costs.swaps_s)),
                ),
                ("processors that the idle controller takes", costs.idle),
            ),
        ),
    )


def _plot(spells: Sequence[Spell]) -> Plot:
    """How many answers took how long."""
    series = []
    for label, each in (
        ("over all", [ms for spell in spells for ms in spell.over_all]),
        ("to one", [ms for spell in spells for ms in spell.over_one]),
    ):
        at = np.linspace(0.0, 99.9, 200)
        found: Any = np.percentile(each, at)
        series.append(Series(label=label, x=tuple(at.tolist()), y=tuple(found.tolist())))
    return Plot(
        title="Latency over all servables and to one, at the same rate",
        x_label="percentile",
        y_label="milliseconds",
        log_y=True,
        series=tuple(series),
    )


BENCH: Final = Bench(
    name="many",
    summary="hundreds of small servables on one device: start, latency, list, scrape",
    run=_run,
    add_arguments=_add_arguments,
)
