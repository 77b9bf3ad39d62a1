"""``prefix``: servables that share a trunk, against the same servables that share nothing.

So many servables save one trunk, each by itself, and a head of their own. On a device actor their
rows meet in the trunk's lane, in batches as large as those of all together (*shared*). Beside
them it serves their like with trunks of their own, as two units (*apart*) and as one (*whole*).
For each the largest load is searched that is answered within a tight objective; the policy, the
buckets that are declared, the layers and the arrivals are the same.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from batching import LaneKey, policy_named
from batching.simulation import Arrival
from batching.workloads import merged, poisson
from bench.device_actor import GetUnits, OpenUnit, TimeUnit
from bench.device_scene import Control, device_under_router
from bench.errors import AnswersDiffer, LoadFailed
from bench.largest_load import Search, load_of, step_of
from bench.open_loop import OpenLoop
from bench.prefix_model import BUCKETS, INPUT, KINDS, OUTPUT, Shapes, answer, names, rows, save
from bench.registry import Bench, Options
from bench.report import Figure, Plot, Result, Samples, Series, Table, machine
from bench.stats import Estimate, bootstrap, paired_ratio
from bench.two_stages import Costs, attainment

__all__ = ["BENCH", "Case", "Fit", "Trial", "fit"]

#: The part of the requests that a load must have in time to count as served.
_SERVED: Final = 0.99
#: The objective in alphas. An objective of 50 ms at batches of 4 + b/4 ms is this tight.
_OBJECTIVE: Final = 12.5
#: A run is as long as this many requests take, within bounds in seconds.
_REQUESTS: Final = 1200
_RUN_S: Final = (1.5, 2.5)
_WARM_S: Final = 0.4
#: What the prediction adds for the actor's host, which shares the processor: a batch, a row.
_HOST_BATCH_S: Final = 0.0003
_HOST_ROW_S: Final = 0.00003
_HOP_S: Final = 0.0005
_LEAD_S: Final = 0.002
_PREDICTED_S: Final = 3.0
_ROWS: Final = 64
#: How often each size is run to learn what it takes.
_MEASURED: Final = 9


@dataclass(frozen=True, slots=True)
class Case:
    """So many servables with a trunk of some part of the cost, and which kinds to measure."""

    count: int
    shapes: Shapes
    kinds: tuple[str, ...]

    @property
    def label(self) -> str:
        """As in keys: the part in per cent where it is not the usual one."""
        return f"k{self.count}_half" if self.shapes == HALF else f"k{self.count}"


#: Nine tenths of the weights are the trunk's, 32 MiB; and half of them.
MOST: Final = Shapes(8, 87)
HALF: Final = Shapes(4, 430)
_FULL: Final = (
    Case(2, MOST, ("shared", "apart")),
    Case(4, MOST, ("shared", "apart")),
    Case(8, MOST, KINDS),
    Case(4, HALF, ("shared", "whole")),
)
_QUICK: Final = (Case(4, MOST, ("shared", "apart")),)


@dataclass(frozen=True, slots=True)
class Fit:
    """A batch of b rows of a whole model takes about ``alpha_s + b * beta_s`` seconds."""

    alpha_s: float
    beta_s: float

    @property
    def objective_s(self) -> float:
        """The deadline of every request."""
        return _OBJECTIVE * self.alpha_s


@dataclass(frozen=True, slots=True)
class Trial:
    """One load that was tried.

    Attributes:
        label: of the case.
        round: of its search, from 0.
        load: requests a second that were offered.
        attainment: the part that was in time.
        behind_s: how late the generator was, 99th percentile.
    """

    label: str
    kind: str
    round: int
    load: float
    attainment: float
    behind_s: float


@dataclass(frozen=True, slots=True)
class Found:
    """What a case came to.

    Attributes:
        fit: of a batch's time, trunk and head together.
        predicted: largest load by kind, by simulation, before anything was measured.
        loads: largest load by kind, one a round.
        weight_copies: bytes of trunks that the shared servables hold, in trunks.
        batch_max: of the shared trunk's lane.
    """

    case: Case
    fit: Fit
    predicted: Mapping[str, float]
    loads: Mapping[str, Sequence[float]]
    weight_copies: float
    batch_max: int


def fit(costs: Sequence[Costs]) -> Fit:
    """The line through what batches of units that run one after the other take, by least squares.

    Raises:
        LoadFailed: larger batches take no longer than small ones.
    """
    sizes = [size for size in BUCKETS if all(size in found for found in costs)]
    beta_s, alpha_s = np.polyfit(sizes, [sum(found[b] for found in costs) for b in sizes], 1)
    if alpha_s <= 0 or beta_s <= 0:
        raise LoadFailed(f"batches take {alpha_s:.4g} s and {beta_s:.4g} s a row: no such device")
    return Fit(float(alpha_s), float(beta_s))


def _arrivals(case: Case, kind: str, load: float, seconds: float, budget_s: float, seed: int,
              lanes: Mapping[str, LaneKey] | None = None) -> list[Arrival]:  # fmt: skip
    """Poisson requests of all servables of a kind, drawn alike for every kind."""
    return list(
        merged(
            *(
                poisson(
                    LaneKey("") if lanes is None else lanes[name],
                    name, load / case.count, seconds, budget_s=budget_s,
                    seed=seed * 1000 + number,
                )
                for number, name in enumerate(names(kind, case.count))
            )
        )
    )  # fmt: skip


def predict(case: Case, kind: str, trunk: Costs, head: Costs, budget_s: float, seed: int) -> float:
    """The largest load of a kind by simulation, from what batches of a trunk and of a head take."""
    host = {b: _HOST_BATCH_S + _HOST_ROW_S * b for b in trunk}
    costs: dict[LaneKey, Costs] = {}
    entry: dict[str, LaneKey] = {}
    heads: dict[str, LaneKey] = {}
    for number, name in enumerate(names(kind, case.count)):
        entry[name] = LaneKey("trunk" if kind == "shared" else f"trunk-{number}")
        declared = trunk if kind == "shared" else {b: trunk[b] for b in BUCKETS}
        costs[entry[name]] = {b: seconds + host[b] for b, seconds in declared.items()}
        heads[name] = LaneKey(f"head-{number}")
        costs[heads[name]] = {b: head[b] + host[b] for b in BUCKETS}
    search = Search(step_of(1.0 / budget_s * 32))
    while (step := search.next) is not None:
        arrivals = _arrivals(case, kind, load_of(step), _PREDICTED_S, budget_s, seed, lanes=entry)
        policy = policy_named("effsafe")
        part = attainment(policy, costs, heads, arrivals, hop_s=_HOP_S, lead_s=_LEAD_S)
        search.tell(good=part >= _SERVED)
    return load_of(search.best or 0)


class _Scene:
    """The servables of a case on a device actor.

    Args:
        case: which.
        control: of the actor.
        load: through a router to it.
        options: of the bench.
    """

    def __init__(self, case: Case, control: Control, load: OpenLoop, options: Options) -> None:
        self._case = case
        self._control = control
        self._load = load
        self._seed = options.seed
        self._random = random.Random(options.seed)
        self.trials: list[Trial] = []

    async def check(self, models: Sequence[tuple[str, Any, Any]]) -> None:
        """Every servable answers what NumPy says."""
        x = rows(1, self._seed)
        for name, trunk, head in models:
            found = (await self._load.ask(name, {INPUT: x}))[OUTPUT]
            if not np.allclose(found, answer(trunk, head, x), rtol=1e-3, atol=1e-4):
                raise AnswersDiffer(f"{name} answers {found}, not {answer(trunk, head, x)}")

    async def find(self, rounds: int) -> Found:
        """Predict, then search as many times as there are rounds, kinds in a drawn order."""
        case = self._case
        trunk, head, copies = self._units()
        found = fit([{b: trunk[b] for b in BUCKETS}, head])
        budget_s = found.objective_s
        predicted = {
            kind: predict(case, kind, trunk, head, budget_s, self._seed)
            for kind in case.kinds
            if kind != "whole"
        }
        said = ", ".join(f"{kind} {load:.0f}/s" for kind, load in predicted.items())
        print(
            f"{case.label}: alpha {found.alpha_s * 1e3:.2f} ms, beta {found.beta_s * 1e3:.3f} ms, "
            f"objective {budget_s * 1e3:.0f} ms; predicted: {said}",
            file=sys.stderr,
        )
        least = min(predicted.values())
        starts = {kind: step_of(predicted.get(kind, least)) for kind in case.kinds}
        loads: dict[str, list[float]] = {kind: [] for kind in case.kinds}
        for number in range(rounds):
            for kind in self._random.sample(case.kinds, len(case.kinds)):
                best = await self._search(kind, number, starts[kind], budget_s)
                loads[kind].append(load_of(best))
                starts[kind] = best
        return Found(case, found, predicted, loads, copies, max(trunk))

    async def _search(self, kind: str, number: int, start: int, budget_s: float) -> int:
        search = Search(start)
        while (step := search.next) is not None:
            load = load_of(step)
            seconds = _WARM_S + min(max(_REQUESTS / load, _RUN_S[0]), _RUN_S[1])
            seed = self._seed + number
            arrivals = _arrivals(self._case, kind, load, seconds, budget_s, seed)
            outcome = await self._load.offer(arrivals, warm_s=_WARM_S)
            search.tell(good=outcome.attainment >= _SERVED)
            self.trials.append(
                Trial(self._case.label, kind, number, load, outcome.attainment, outcome.behind_s)
            )
        if search.best is None:
            raise LoadFailed(f"{self._case.label}: {kind} serves no load within its objective")
        print(
            f"{self._case.label}, round {number + 1}: {kind} {load_of(search.best):.0f}/s",
            file=sys.stderr,
        )
        return search.best

    def _units(self) -> tuple[Costs, Costs, float]:
        """What batches of the trunk and of a head take, and how many trunks are held as one."""
        by_user: dict[str, list[OpenUnit]] = {}
        for unit in self._control.tell(GetUnits(), list[OpenUnit]):
            for user in unit.users:
                by_user.setdefault(user.rpartition(":")[0], []).append(unit)
        # Units of a servable are in the order in which it declared them.
        twos = [by_user[name] for name in names("shared", self._case.count)]
        held = {trunk.id: trunk.nbytes for trunk, _ in twos}
        copies = sum(held.values()) // self._case.shapes.trunk_bytes
        trunk, head = (
            self._control.tell(TimeUnit(unit.id, _MEASURED), dict[int, float]) for unit in twos[0]
        )
        return trunk, head, float(copies)


async def _run_case(case: Case, options: Options, rounds: int) -> tuple[Found, list[Trial]]:
    with tempfile.TemporaryDirectory(prefix="shardserve-") as name:
        kept = [kind for kind in KINDS if kind in case.kinds]
        models = list(save(Path(name, "store"), case.count, case.shapes, kept, seed=options.seed))
        servables = [name for name, _, _ in models]
        async with device_under_router(Path(name), servables) as (control, router, _):
            inputs = [{INPUT: row[None]} for row in rows(_ROWS, options.seed)]
            scene = _Scene(case, control, OpenLoop(router, inputs), options)
            await scene.check(models)
            del models
            return await scene.find(rounds), scene.trials


def _run(options: Options) -> Result:
    wanted = options.own.servables
    cases = [
        case for case in (_QUICK if options.quick else _FULL) if not wanted or case.count in wanted
    ]
    rounds = options.rounds_or(quick=1, full=5)
    found: list[Found] = []
    trials: list[Trial] = []
    for case in cases:
        outcome, tried = asyncio.run(_run_case(case, options, rounds))
        found.append(outcome)
        trials += tried
    return _result(found, trials, seed=options.seed)


def _result(found: Sequence[Found], trials: Sequence[Trial], *, seed: int) -> Result:
    """All that is told of what was found."""
    ratios: dict[str, Estimate] = {}
    for each in found:
        for kind in each.loads:
            if kind != "shared":
                suffix = "" if kind == "apart" else f"_vs_{kind}"
                ratios[f"throughput_{each.case.label}{suffix}"] = paired_ratio(
                    each.loads["shared"], each.loads[kind], seed=seed
                )
    copies = max(each.weight_copies for each in found)
    every = {
        f"load_{each.case.label}_{kind}": bootstrap(loads, seed=seed)
        for each in found
        for kind, loads in each.loads.items()
    }
    figures: dict[str, Figure] = {name: estimate.value for name, estimate in every.items()}
    figures["intervals"] = {name: [each.low, each.high] for name, each in (every | ratios).items()}
    for each in found:
        label = each.case.label
        figures[f"alpha_ms_{label}"] = each.fit.alpha_s * 1e3
        figures[f"beta_ms_{label}"] = each.fit.beta_s * 1e3
        figures[f"objective_ms_{label}"] = each.fit.objective_s * 1e3
        figures[f"trunk_fraction_{label}"] = each.case.shapes.fraction
        figures[f"batch_max_{label}"] = each.batch_max
        for kind, load in each.predicted.items():
            figures[f"predicted_{label}_{kind}"] = load
    return Result(
        bench=BENCH.name,
        ratios={name: each.value for name, each in ratios.items()} | {"weight_copies": copies},
        figures={**figures, "machine": machine()},
        tables=(_table(found, every, ratios),),
        samples={
            "trials": Samples(
                columns=("case", "kind", "round", "load", "attainment", "behind_s"),
                rows=[(t.label, t.kind, t.round, t.load, t.attainment, t.behind_s) for t in trials],
            )
        },
        plot=_plot(found, every),
        notes=(
            f"Requests a second of which {_SERVED:.0%} are answered within {_OBJECTIVE:g} alphas.",
            "The actor is on one processor, router and generator are on another.",
            "apart: trunk and head as two units, nothing shared; whole: as one unit.",
        ),
    )


def _table(
    found: Sequence[Found], loads: Mapping[str, Estimate], ratios: Mapping[str, Estimate]
) -> Table:
    lines = []
    for each in found:
        label = each.case.label
        for kind in each.loads:
            suffix = "" if kind == "apart" else f"_vs_{kind}"
            predicted = each.predicted.get(kind)
            lines.append(
                (
                    label,
                    kind,
                    f"{each.case.shapes.fraction:.2f}",
                    f"{each.fit.alpha_s * 1e3:.2f} + {each.fit.beta_s * 1e3:.3f} b",
                    f"{each.fit.objective_s * 1e3:.0f}",
                    "" if predicted is None else f"{predicted:.0f}",
                    loads[f"load_{label}_{kind}"],
                    ratios.get(f"throughput_{label}{suffix}", "") if kind != "shared" else "",
                )
            )
    return Table(
        title="Largest load within the objective, and what sharing gives over it",
        columns=("case", "kind", "trunk", "batch, ms", "objective ms", "predicted", "a second",
                 "shared over it"),
        rows=tuple(lines),
    )  # fmt: skip


def _plot(found: Sequence[Found], loads: Mapping[str, Estimate]) -> Plot:
    most = [each for each in found if each.case.shapes != HALF]
    kinds = [kind for kind in KINDS if any(kind in each.loads for each in most)]
    return Plot(
        title="Servables that share nine tenths of their cost",
        x_label="servables",
        y_label="requests a second within the objective",
        log_x=True,
        series=tuple(
            Series(
                label=kind,
                x=tuple(float(each.case.count) for each in most if kind in each.loads),
                y=tuple(
                    loads[f"load_{each.case.label}_{kind}"].value
                    for each in most
                    if kind in each.loads
                ),
            )
            for kind in kinds
        ),
    )


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--servables", type=int, nargs="+", metavar="K", help="only cases of so many servables"
    )


BENCH: Final = Bench(
    name="prefix",
    summary="servables that share a trunk against the same servables apart",
    run=_run,
    add_arguments=_add_arguments,
)
