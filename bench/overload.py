"""``overload``: one model, asked for more than it can do.

At 1.1 and 1.5 times what the actor answers when it is saturated, with a deadline of ten single
rows. Arrival order wastes nearly everything on rows that are too late when they come back, though
what has expired is dropped there, too; making batches smaller to save their heads wastes the
device; giving the heads up saves the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import uvloop

from batching import LaneKey
from batching.simulation import Arrival
from batching.workloads import poisson
from bench.contest import Contest, Measured, conditions, plot_of, samples_of, table_of
from bench.device_actor import UsePolicy
from bench.device_scene import DeviceScene, device_scene
from bench.registry import Bench, Options
from bench.report import Figure, Result, machine
from bench.stats import bootstrap

__all__ = ["BENCH"]

_OURS: Final = "effsafe"
_FIFO: Final = "fifo"
#: Label to policy. Every one of them drops rows that have expired.
POLICIES: Final[Mapping[str, UsePolicy]] = {
    _OURS: UsePolicy("effsafe"),
    _FIFO: UsePolicy("fifo-late"),
    "shrink": UsePolicy("shrink"),
}
_SLO_TIMES: Final = 10.0
#: The largest batch takes about a quarter of the deadline, so that rows can wait for one.
_BUCKETS: Final = (1, 2, 4, 8, 16)
_LAYERS: Final = 16
_MARK: Final = "1.1x"
_MORE: Final = "1.5x"


def _arrivals(servable: str, rate: float, seconds: float, slo_s: float, seed: int) -> list[Arrival]:
    lane = LaneKey(servable)
    return list(poisson(lane, servable, rate, seconds, budget_s=slo_s, seed=seed))


async def _round(
    contest: Contest, scene: DeviceScene, number: int, slo_s: float, options: Options
) -> float:
    """One round, at loads of the capacity as it is in this round.

    Returns:
        The capacity, in rows a second.
    """
    [servable] = scene.servables
    long_s, short_s, warm_s = (5.0, 3.0, 1.0) if options.quick else (21.0, 7.0, 1.0)
    scene.use(POLICIES[_OURS])
    capacity = await scene.capacity(servable, 1.0 if options.quick else 2.0)
    seed = options.seed + number
    marked = _arrivals(servable, 1.1 * capacity, long_s, slo_s, seed)
    more = _arrivals(servable, 1.5 * capacity, short_s, slo_s, seed)
    runs: list[tuple[str, str, UsePolicy, Sequence[Arrival]]] = [
        (_MARK, _OURS, POLICIES[_OURS], marked),
        (_MARK, _FIFO, POLICIES[_FIFO], marked),
        (_MARK, "shrink", POLICIES["shrink"], [each for each in marked if each.at < short_s]),
        (_MORE, _OURS, POLICIES[_OURS], more),
        (_MORE, _FIFO, POLICIES[_FIFO], more),
    ]
    await contest.round(number, runs, warm_s)
    return capacity


async def _measure(options: Options) -> Result:
    # Before this process is bound to one processor, and before the load.
    computer = machine()
    async with device_scene(
        1, buckets=_BUCKETS, layers=_LAYERS, seed=options.seed, together=False
    ) as scene:
        slo_s = _SLO_TIMES * await scene.single_row_s()
        generator = await scene.generator_rate(0.5)
        contest = Contest(scene, options.seed)
        capacities = [
            await _round(contest, scene, number, slo_s, options)
            for number in range(options.rounds_or(quick=2, full=5))
        ]
        told = conditions(scene, options, computer, generator, 1.5 * max(capacities))
    return _result(contest, capacities, slo_s, told, options.seed)


def _result(
    contest: Contest,
    capacities: Sequence[float],
    slo_s: float,
    told: Mapping[str, Figure],
    seed: int,
) -> Result:
    measured = Measured(contest.entries, seed)
    ratios = {}
    for workload, key in ((_MARK, "1_1x"), (_MORE, "1_5x")):
        ours = measured.figures(workload, _OURS, lambda found: found.goodput)
        # One answer a run at least, so that a baseline that answers none can be divided by.
        fifo = measured.figures(
            workload, _FIFO, lambda found: max(found.goodput, 1 / found.seconds)
        )
        ratios[f"goodput_{key}_vs_fifo"] = measured.ratio(ours, fifo)
        ratios[f"goodput_{key}_vs_capacity"] = measured.ratio(ours, capacities)
    shrink = measured.figures(_MARK, "shrink", lambda found: found.goodput)
    ratios["shrink_goodput_1_1x_vs_capacity"] = measured.ratio(shrink, capacities)
    runs = list(dict.fromkeys((entry.workload, entry.contender) for entry in contest.entries))
    how = f"{_SLO_TIMES:g} times the median of a single row alone, {1e3 * slo_s:.1f} ms"
    return Result(
        bench=BENCH.name,
        ratios={key: estimate.value for key, estimate in ratios.items()},
        figures={
            "capacity": bootstrap(capacities, seed=seed).value,
            "slo_ms": 1e3 * slo_s,
            "intervals": {key: [each.low, each.high] for key, each in ratios.items()},
            **told,
        },
        tables=(table_of(measured, "one model over its capacity", sorted(runs)),),
        samples=samples_of(contest.entries),
        plot=plot_of(contest.entries, "1.1 times the capacity, from intended departure", _MARK),
        notes=(f"The deadline is {how}; the capacity is measured anew in every round.",),
    )


def _run(options: Options) -> Result:
    return uvloop.run(_measure(options))


BENCH: Final = Bench(
    name="overload",
    summary="goodput of one model at 1.1 and 1.5 times its capacity, by policy",
    run=_run,
)
