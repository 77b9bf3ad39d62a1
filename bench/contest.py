"""Policies in turn on one device: rounds, figures by round, and what every such bench tells.

In a round every contender gets the very same arrivals, drawn from the round's seed, in an order
that is drawn as well. What is quoted is made of one figure a round; ratios are taken within rounds.
Does not know what a workload is for, nor which ratio is wanted.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Final

import numpy as np

from batching.simulation import Arrival
from bench.device_actor import UsePolicy
from bench.device_scene import DeviceScene
from bench.open_loop import Outcome
from bench.registry import Options
from bench.report import Cell, Figure, Plot, Samples, Series, Table
from bench.stats import Estimate, bootstrap, paired_ratio

__all__ = [
    "Contest", "Entry", "Measured", "conditions", "plot_of", "rate_within", "samples_of",
    "table_of",
]  # fmt: skip

#: Latencies are kept with this resolution, and how often each came.
_TICK_S: Final = 1e-4
#: Of a plot's lines.
_PERCENTS: Final = (1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One contender's run of one workload.

    Attributes:
        place: in the order of the round.
        loop_us: microseconds of the actor's event loop for each request that was sent.
        batch_rows: mean rows of a batch.
    """

    round: int
    place: int
    workload: str
    contender: str
    outcome: Outcome
    loop_us: float = nan
    batch_rows: float = nan


class Contest:
    """Runs workloads on a scene, and keeps what came of them.

    Args:
        scene: the device.
        seed: of the orders.
    """

    def __init__(self, scene: DeviceScene, seed: int) -> None:
        self._scene = scene
        self._random = random.Random(seed)
        self.entries: list[Entry] = []

    async def round(
        self,
        number: int,
        runs: Sequence[tuple[str, str, UsePolicy, Sequence[Arrival]]],
        warm_s: float,
    ) -> None:
        """Every run of a round, in a drawn order.

        Args:
            number: the round's.
            runs: workload, contender, its policy, and what it is offered.
            warm_s: what leaves before is not counted.
        """
        order = list(runs)
        self._random.shuffle(order)
        for place, (workload, contender, policy, arrivals) in enumerate(order):
            print(f"round {number + 1}: {workload}, {contender}", file=sys.stderr)
            self._scene.use(policy)
            before = self._scene.counts()
            outcome = await self._scene.offer(arrivals, warm_s=warm_s)
            after = self._scene.counts()
            batches = sum(lane.batches for lane in after.lanes.values())
            batches -= sum(lane.batches for lane in before.lanes.values())
            rows = sum(lane.rows for lane in after.lanes.values())
            rows -= sum(lane.rows for lane in before.lanes.values())
            self.entries.append(
                Entry(
                    round=number,
                    place=place,
                    workload=workload,
                    contender=contender,
                    outcome=outcome,
                    loop_us=(after.loop_s - before.loop_s) / max(len(arrivals), 1) * 1e6,
                    batch_rows=rows / max(batches, 1),
                )
            )


class Measured:
    """Figures of a contest by round.

    Args:
        entries: of all rounds.
        seed: of the bootstrap.
    """

    def __init__(self, entries: Sequence[Entry], seed: int) -> None:
        self._entries = sorted(entries, key=lambda entry: entry.round)
        self._seed = seed

    def entries(self, workload: str, contender: str) -> list[Entry]:
        """Of one contender and workload, by round."""
        return [
            entry
            for entry in self._entries
            if entry.workload == workload and entry.contender == contender
        ]

    def figures(
        self, workload: str, contender: str, figure: Callable[[Outcome], float]
    ) -> list[float]:
        """One figure a round."""
        return [figure(entry.outcome) for entry in self.entries(workload, contender)]

    def estimate(
        self, workload: str, contender: str, figure: Callable[[Outcome], float]
    ) -> Estimate:
        """Its median over the rounds."""
        return bootstrap(self.figures(workload, contender, figure), seed=self._seed)

    def ratio(self, above: Sequence[float], below: Sequence[float]) -> Estimate:
        """The median of the rounds' ratios."""
        return paired_ratio(above, below, seed=self._seed)


def rate_within(costs: Mapping[int, float], lanes: int, slo_s: float) -> float:
    """Rows a second that so many equal lanes can be served in turn, every row within its deadline.

    A row that has just missed its lane's batch waits for a turn of all lanes and is served in the
    next: two turns of `lanes` batches must fit into the deadline. So the largest batch takes
    ``slo / (2 lanes)``, and that is how often one of its size comes back. Between sizes, costs are
    interpolated.

    Args:
        costs: seconds of a batch by its size.
        lanes: how many take turns.
        slo_s: the deadline.
    """
    batch_s = slo_s / (2 * lanes)
    sizes = sorted(costs)
    # Ascending, so that a size that was measured below a smaller one does not bend the curve back.
    seconds = np.maximum.accumulate([costs[size] for size in sizes])
    if batch_s < seconds[0]:
        return 0.0
    if batch_s >= seconds[-1]:
        return sizes[-1] / float(seconds[-1])
    return float(np.interp(batch_s, seconds, sizes)) / batch_s


def conditions(
    scene: DeviceScene,
    options: Options,
    computer: Mapping[str, Figure],
    generator_rate: float,
    offered: float,
    *,
    together: bool = False,
) -> dict[str, Figure]:
    """What every bench on a scene tells of how it was measured.

    Args:
        scene: the device.
        options: of the bench.
        computer: what `bench.report.machine` said at the beginning.
        generator_rate: requests a second that the generator sends at least.
        offered: the most that it was asked to send.
        together: the actor's event loop was on the device's processor.
    """
    return {
        "quick": options.quick,
        "seed": options.seed,
        "models": len(scene.servables),
        "curve_ms": {str(size): 1e3 * s for size, s in scene.curve.items()},
        "device_core": scene.cores[0],
        "generator_core": scene.cores[1],
        "actor_loop_core": scene.cores[0 if together else 1],
        "generator_headroom": generator_rate / offered,
        "machine": computer,
    }


def table_of(measured: Measured, title: str, runs: Sequence[tuple[str, str]]) -> Table:
    """Rates and latencies of contenders, as medians over rounds."""
    rows: list[tuple[Cell, ...]] = []
    for workload, contender in runs:
        entries = measured.entries(workload, contender)
        rows.append(
            (
                workload,
                contender,
                measured.estimate(workload, contender, lambda found: found.goodput),
                float(np.median([100 * entry.outcome.attainment for entry in entries])),
                *[
                    1e3 * float(np.median([entry.outcome.percentile_s(p) for entry in entries]))
                    for p in (50, 99, 99.9)
                ],
                float(np.median([entry.batch_rows for entry in entries])),
                float(np.median([entry.loop_us for entry in entries])),
                1e3 * float(np.median([entry.outcome.behind_s for entry in entries])),
            )
        )
    return Table(
        title=title,
        columns=(
            "workload", "policy", "goodput/s", "in time %", "p50 ms", "p99", "p99.9", "rows/batch",
            "loop us", "behind ms",
        ),
        rows=tuple(rows),
    )  # fmt: skip


def samples_of(entries: Sequence[Entry]) -> dict[str, Samples]:
    """Everything that was counted, and every latency."""
    ends: list[tuple[float | int | str, ...]] = []
    latencies: list[tuple[float | int | str, ...]] = []
    for entry in entries:
        key = (entry.workload, entry.contender, entry.round)
        for owner, found in entry.outcome.owners.items():
            errors = " ".join(f"{code}:{count}" for code, count in sorted(found.errors.items()))
            seconds = entry.outcome.seconds
            ends.append((*key, entry.place, owner, found.offered, found.good, errors, seconds))
            ticks, counts = np.unique(
                np.rint(found.latencies_s / _TICK_S).astype(np.int64), return_counts=True
            )
            latencies += [
                (*key, owner, tick / 10, count)
                for tick, count in zip(ticks.tolist(), counts.tolist(), strict=True)
            ]
    return {
        "runs": Samples(
            columns=(
                "workload", "policy", "round", "place", "owner", "offered", "good", "errors",
                "seconds",
            ),
            rows=ends,
        ),
        "latencies": Samples(
            columns=("workload", "policy", "round", "owner", "ms", "count"), rows=latencies
        ),
    }  # fmt: skip


def plot_of(entries: Sequence[Entry], title: str, workload: str) -> Plot:
    """Latencies of each contender's requests, those that were not answered left out."""
    contenders = dict.fromkeys(entry.contender for entry in entries if entry.workload == workload)
    series = []
    for contender in contenders:
        found = [
            owner.latencies_s
            for entry in entries
            if (entry.workload, entry.contender) == (workload, contender)
            for owner in entry.outcome.owners.values()
        ]
        every = np.concatenate(found)
        if every.size:
            found_ms = 1e3 * np.percentile(every, _PERCENTS)
            offered = sum(
                owner.offered
                for entry in entries
                if (entry.workload, entry.contender) == (workload, contender)
                for owner in entry.outcome.owners.values()
            )
            # Of all requests, so that who answers few does not look quick.
            parts = tuple(percent * every.size / offered for percent in _PERCENTS)
            series.append(Series(label=contender, x=tuple(found_ms.tolist()), y=parts))
    return Plot(
        title=title, x_label="milliseconds", y_label="% of requests answered by then",
        series=tuple(series), log_x=True,
    )  # fmt: skip
