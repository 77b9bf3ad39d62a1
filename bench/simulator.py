"""The simulator against the real device actor: the same requests, on costs that were frozen before.

Before every round the parts are measured, each by itself, on a device actor that serves nobody:
what a batch of every size takes, what the actor's event loop takes for a frame, a request and a
batch, what the router takes for a request, and what is left of the latency of one row alone, which
is the way from thread to thread and back. Nothing is fitted to a run that is predicted. Then
requests are drawn, the actor serves them in real time, and the simulator serves the same ones in
virtual time.

Before every round, since a machine of which others have a part does not stay the same: its pace
was seen to change by a tenth within minutes, and a load of 1.1 times its capacity is then another.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final, NamedTuple

import numpy as np

from batching import Ladder, LaneKey
from batching.costs import SizeCost
from batching.simulation import (
    Arrival,
    HostCosts,
    Network,
    Report,
    SimulatedCluster,
    SimulatedLane,
    simulate_cluster,
)
from batching.workloads import merged, poisson
from bench.device_actor import Counts, UsePolicy
from bench.device_scene import DeviceScene, device_scene
from bench.elsewhere import read, share_taken
from bench.open_loop import Outcome
from bench.registry import Bench, Options
from bench.report import Figure, Plot, Result, Samples, Series, Table, machine
from bench.stats import Estimate, bootstrap

__all__ = [
    "BENCH",
    "LOADS",
    "Frozen",
    "Pair",
    "Spent",
    "drift_of",
    "ratios_of",
    "simulated",
    "split",
]

#: Of the rate at which one model's largest batches follow each other.
LOADS: Final = (0.5, 0.8, 0.95, 1.1)
_MODELS: Final = 4
#: The deadline, in latencies of one row alone.
_SLO_ROWS: Final = 20.0
_WARM_S: Final = 1.0
#: Loads after which the actor's costs are taken as known; of these runs nothing is predicted.
_TRAINING: Final = (0.4, 1.0)
_POLICY: Final = "effsafe"


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    """What was measured before, part by part.

    Attributes:
        durations_s: of batches by themselves, by size: every run.
        known: what the actor expected of each size, by servable.
        host: what its event loop takes, and the ways between its threads.
        network: what the router takes.
        single_s: median latency of one row alone.
        capacity: rows a second of one model, saturated.
    """

    durations_s: Mapping[int, Sequence[float]]
    known: Mapping[str, Mapping[int, SizeCost]]
    host: HostCosts
    network: Network
    single_s: float
    capacity: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One workload, served and predicted.

    Attributes:
        load: as a part of the capacity.
        real: share of requests in time, requests in time a second, p50 and p99 of latency.
        predicted: the same.
        behind_s: how late the generator was.
        others: processors that other processes, or the hypervisor, had meanwhile.
    """

    load: float
    number: int
    real: tuple[float, float, float, float]
    predicted: tuple[float, float, float, float]
    behind_s: float
    others: float = 0.0


# ---- measuring the parts ------------------------------------------------------------------------


class Spent(NamedTuple):
    """What the actor's event loop did in a while, and the CPU seconds that this took.

    Attributes:
        loop_s: CPU seconds.
        batches: that it launched and delivered.
        requests: that it read and answered.
        frames: that brought these.
    """

    loop_s: float
    batches: float
    requests: float
    frames: float


async def _measure(scene: DeviceScene, *, quick: bool) -> Frozen:
    seconds = 2.0 if quick else 4.0
    durations = scene.time_sizes(50 if quick else 100)
    [model, *_] = scene.servables
    counts = [scene.counts()]
    latencies = await scene.alone(80 if quick else 150)
    counts.append(scene.counts())
    single_s = statistics.median(latencies)
    cpu_s = time.thread_time()
    capacity = await scene.capacity(model, seconds)
    cpu_s = time.thread_time() - cpu_s
    counts.append(scene.counts())
    spent = [_spent(*pair) for pair in itertools.pairwise(counts)]
    for number, load in enumerate(_TRAINING):
        arrivals = _poisson(
            scene.servables, load * capacity, seconds, budget_s=_SLO_ROWS * single_s, seed=-number
        )
        await scene.offer(arrivals, warm_s=0.0)
        counts.append(scene.counts())
        # Those that are refused or given up are read and answered, too.
        spent.append(_spent(*counts[-2:])._replace(requests=len(arrivals)))
    host = split(spent)
    router_s = cpu_s / spent[1].requests
    explained_s = statistics.median(durations[1]) + sum(host) + router_s
    hop_s = max(0.0, single_s - explained_s) / 4
    return Frozen(
        durations_s=durations,
        known={
            name: {size: SizeCost(*told) for size, told in lane.known.items()}
            for name, lane in counts[-1].lanes.items()
            if name in scene.servables
        },
        host=HostCosts(
            frame_s=host[0], request_s=host[1] / 2, batch_s=host[2], answer_s=host[1] / 2,
            hop_s=hop_s, shares_core=True,
        ),
        network=Network(request_s=router_s / 2, delay_s=hop_s),
        single_s=single_s,
        capacity=capacity,
    )  # fmt: skip


def _spent(before: Counts, after: Counts) -> Spent:
    """What was done between two counts."""
    batches = rows = 0
    for name, lane in after.lanes.items():
        batches += lane.batches - before.lanes[name].batches
        rows += lane.rows - before.lanes[name].rows
    return Spent(after.loop_s - before.loop_s, batches, rows, after.frames - before.frames)


def split(loads: Sequence[Spent]) -> tuple[float, float, float]:
    """Seconds of the event loop for a frame, for a request, and for a batch.

    Loads that have them in different proportions give as many sums. Least squares of the relative
    errors, over what is not negative.
    """
    every = np.array([[load.frames, load.requests, load.batches] for load in loads], float)
    every /= np.array([[load.loop_s] for load in loads])
    best, least = np.zeros(3), np.inf
    for chosen in itertools.product((False, True), repeat=3):
        places = np.flatnonzero(chosen)
        if not places.size:
            continue
        found, *_ = np.linalg.lstsq(every[:, places], np.ones(len(loads)), rcond=None)
        error = float(np.square(every[:, places] @ found - 1.0).sum())
        if found.min() >= 0 and error < least:
            best, least = np.zeros(3), error
            best[places] = found
    frame_s, request_s, batch_s = map(float, best)
    return frame_s, request_s, batch_s


# ---- serving and predicting ---------------------------------------------------------------------


def _poisson(
    servables: Sequence[str], rate: float, seconds: float, *, budget_s: float, seed: int
) -> list[Arrival]:
    loads = (
        poisson(LaneKey(name), name, rate / len(servables), seconds, budget_s=budget_s, seed=seed)
        for name in servables
    )
    return list(merged(*loads))


def simulated(frozen: Frozen, arrivals: Sequence[Arrival], *, warm_s: float, seed: int) -> Report:
    """What the simulator says of these requests."""
    from shards.device_host import batcher_of
    from shards.orders import ActorSpec

    spec = ActorSpec(
        kind="device", name="simulated", directory="", capacity_bytes=0, policy=_POLICY
    )
    sizes = sorted(frozen.durations_s)
    lanes = [
        SimulatedLane(key=LaneKey(name), ladder=Ladder(sizes), known=known)
        for name, known in frozen.known.items()
    ]
    means = {size: statistics.fmean(seconds) for size, seconds in frozen.durations_s.items()}
    cluster = SimulatedCluster(
        devices=[lanes],
        batcher=lambda: batcher_of(spec),
        host=frozen.host,
        network=frozen.network,
    )
    return simulate_cluster(
        cluster,
        arrivals,
        lambda key, size: means[size],
        lambda key, size, random: random.choice(frozen.durations_s[size]),
        warm_s=warm_s,
        seed=seed,
    )


def _told(found: Outcome | Report, seconds: float) -> tuple[float, float, float, float]:
    """Attainment, requests in time a second, p50 and p99."""
    latencies = sorted(
        latency for owner in found.owners.values() for latency in map(float, owner.latencies_s)
    )
    offered = sum(owner.offered for owner in found.owners.values())
    good = sum(owner.good for owner in found.owners.values())
    p50, p99 = (
        latencies[min(int(len(latencies) * share), len(latencies) - 1)] if latencies else 0.0
        for share in (0.5, 0.99)
    )
    return good / max(offered, 1), good / seconds, p50, p99


async def _pairs(options: Options) -> tuple[list[Frozen], list[Pair]]:
    seconds = _WARM_S + (2.0 if options.quick else 15.0)
    rounds = options.rounds_or(quick=2, full=5)
    freezes: list[Frozen] = []
    pairs: list[Pair] = []
    async with device_scene(_MODELS, seed=options.seed) as scene:
        scene.use(UsePolicy(_POLICY))
        order = Random(options.seed)
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}: costs", file=sys.stderr)
            frozen = await _measure(scene, quick=options.quick)
            freezes.append(frozen)
            for load in order.sample(LOADS, len(LOADS)):
                print(f"round {number + 1} of {rounds}: load {load:g}", file=sys.stderr)
                arrivals = _poisson(
                    scene.servables,
                    load * frozen.capacity,
                    seconds,
                    budget_s=_SLO_ROWS * frozen.single_s,
                    seed=order.randrange(1 << 30),
                )
                before = read()
                served = await scene.offer(arrivals, warm_s=_WARM_S)
                others = share_taken(before, read())
                report = simulated(frozen, arrivals, warm_s=_WARM_S, seed=number)
                pairs.append(
                    Pair(
                        load=load,
                        number=number,
                        real=_told(served, served.seconds),
                        predicted=_told(report, served.seconds),
                        behind_s=served.behind_s,
                        others=others,
                    )
                )
    return freezes, pairs


# ---- telling ------------------------------------------------------------------------------------


def ratios_of(pairs: Sequence[Pair], *, seed: int) -> tuple[dict[str, float], dict[str, Estimate]]:
    """The two figures that marks are on, and their estimates by load.

    Errors are of each load's median over rounds, and the worst load counts.
    """
    estimates: dict[str, Estimate] = {}
    points = share = 0.0
    for load in sorted({pair.load for pair in pairs}):
        mine = [pair for pair in pairs if pair.load == load]
        errors = [100 * (pair.predicted[0] - pair.real[0]) for pair in mine]
        ratios = [pair.predicted[1] / max(pair.real[1], 1e-9) - 1 for pair in mine]
        attainment = estimates[f"attainment_error_points_{load:g}"] = bootstrap(errors, seed=seed)
        throughput = estimates[f"throughput_error_{load:g}"] = bootstrap(ratios, seed=seed)
        points = max(points, abs(attainment.value))
        share = max(share, abs(throughput.value))
    return {"attainment_error_points": points, "throughput_error": share}, estimates


def drift_of(capacities: Sequence[float]) -> float:
    """How far apart the rates of one machine were, round by round: the range, by the median."""
    return (max(capacities) - min(capacities)) / statistics.median(capacities)


def _result(freezes: Sequence[Frozen], pairs: Sequence[Pair], options: Options) -> Result:
    ratios, estimates = ratios_of(pairs, seed=options.seed)
    parts = {name: statistics.median(told) for name, told in _parts(freezes).items()}
    conditions: dict[str, Figure] = {
        "quick": options.quick,
        "seed": options.seed,
        "machine": machine(),
        "models": _MODELS,
        "policy": _POLICY,
        **parts,
        "capacity_drift": drift_of([frozen.capacity for frozen in freezes]),
        "intervals": {name: [each.low, each.high] for name, each in estimates.items()},
    }
    loads = tuple(sorted({pair.load for pair in pairs}))
    curves = (("served", "real"), ("predicted", "predicted"))
    return Result(
        bench=BENCH.name,
        ratios=ratios,
        figures={**{name: each.value for name, each in estimates.items()}, **conditions},
        tables=(_table(pairs, estimates, loads),),
        samples=_samples(freezes, pairs),
        plot=Plot(
            title="Requests in time: served and predicted",
            x_label="load",
            y_label="share in time",
            series=tuple(
                Series(label=label, x=loads, y=tuple(_median(pairs, load, of, 0) for load in loads))
                for label, of in curves
            ),
        ),
        notes=(
            f"{_MODELS} models, Poisson, deadline {_SLO_ROWS:g} times a row alone.",
            "Load 1 is one model's saturated rate.",
            "Costs were measured before every round, each part by itself; nothing was fitted.",
        ),
    )


def _parts(freezes: Sequence[Frozen]) -> dict[str, list[float]]:
    """What was frozen, by name, a figure a round."""
    return {
        "deadline_ms": [1000 * _SLO_ROWS * each.single_s for each in freezes],
        "single_row_ms": [1000 * each.single_s for each in freezes],
        "capacity": [each.capacity for each in freezes],
        "frame_us": [1e6 * each.host.frame_s for each in freezes],
        "request_us": [1e6 * (each.host.request_s + each.host.answer_s) for each in freezes],
        "batch_us": [1e6 * each.host.batch_s for each in freezes],
        "hop_us": [1e6 * each.host.hop_s for each in freezes],
        "router_us": [2e6 * each.network.request_s for each in freezes],
        **{
            f"batch_of_{size}_ms": [
                1000 * statistics.median(each.durations_s[size]) for each in freezes
            ]
            for size in freezes[0].durations_s
        },
    }


def _median(pairs: Sequence[Pair], load: float, of: str, place: int) -> float:
    told = [pair.real if of == "real" else pair.predicted for pair in pairs if pair.load == load]
    return statistics.median(each[place] for each in told)


def _table(
    pairs: Sequence[Pair], estimates: Mapping[str, Estimate], loads: Sequence[float]
) -> Table:
    return Table(
        title="the same requests, served / predicted (medians over rounds)",
        columns=("load", "in time", "points", "a second", "error", "p99 ms"),
        rows=tuple(
            (
                f"{load:g}",
                " / ".join(f"{_median(pairs, load, of, 0):.1%}" for of in ("real", "predicted")),
                estimates[f"attainment_error_points_{load:g}"],
                " / ".join(f"{_median(pairs, load, of, 1):.0f}" for of in ("real", "predicted")),
                estimates[f"throughput_error_{load:g}"],
                " / ".join(
                    f"{1000 * _median(pairs, load, of, 3):.1f}" for of in ("real", "predicted")
                ),
            )
            for load in loads
        ),
    )


def _samples(freezes: Sequence[Frozen], pairs: Sequence[Pair]) -> dict[str, Samples]:
    parts = _parts(freezes)
    names = ("attainment", "goodput", "p50_ms", "p99_ms")
    columns = [f"{of}_{name}" for of in ("real", "predicted") for name in names]
    return {
        "runs": Samples(
            columns=("load", "round", *columns, "behind_ms", "others"),
            rows=[
                (
                    pair.load,
                    pair.number,
                    *_in_ms(pair.real),
                    *_in_ms(pair.predicted),
                    1000 * pair.behind_s,
                    pair.others,
                )
                for pair in pairs
            ],
        ),
        "durations": Samples(
            columns=("round", "size", "seconds"),
            rows=[
                (number, size, each)
                for number, frozen in enumerate(freezes)
                for size, found in frozen.durations_s.items()
                for each in found
            ],
        ),
        "parts": Samples(
            columns=("round", *parts), rows=list(zip(itertools.count(), *parts.values()))
        ),
    }


def _in_ms(told: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    return told[0], told[1], 1000 * told[2], 1000 * told[3]


def _run(options: Options) -> Result:
    freezes, pairs = asyncio.run(_pairs(options))
    return _result(freezes, pairs, options)


BENCH: Final = Bench(
    name="simulator",
    summary="the simulator's predictions against the real device actor, on the same requests",
    run=_run,
)
