"""``predictability``: sixteen models, each asked in bursts, and how many deadlines are missed.

The times between two requests of a model are gamma distributed with a coefficient of variation of
four, at 70 % of what sixteen such models can be served within the deadline. The peer is Clipper's
adaptive batching (NSDI 2017): a limit a model that learns how large a batch may be, models in turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import uvloop

from batching import LaneKey
from batching.simulation import Arrival
from batching.workloads import gamma, merged
from bench.contest import (
    Contest,
    Measured,
    conditions,
    plot_of,
    rate_within,
    samples_of,
    table_of,
)
from bench.device_actor import AIMD, UsePolicy
from bench.device_scene import device_scene
from bench.open_loop import Outcome
from bench.registry import Bench, Options
from bench.report import Figure, Result, machine

__all__ = ["BENCH"]

_OURS: Final = "effsafe"
_MODELS: Final = 16
#: Twice that of eight models: what each may wait for its turn is then the same.
_SLO_TIMES: Final = 50.0
_CV: Final = 4.0
_MARK: Final = "70 %"
#: Of what one model would be served, in the largest batches: more than sixteen can be promised.
_MORE: Final = "70 % of saturation"
_LOAD: Final = 0.7


def workload(
    servables: Sequence[str], rate: float, slo_s: float, seconds: float, seed: int
) -> list[Arrival]:
    """Bursts of every servable.

    Args:
        servables: who asks.
        rate: mean requests a second of all together.
        slo_s: until the deadline of each request.
        seconds: how long.
        seed: of the draw.
    """
    each = rate / len(servables)
    return list(
        merged(
            *[
                gamma(LaneKey(name), name, each, seconds, cv=_CV, budget_s=slo_s, seed=seed)
                for name in servables
            ]
        )
    )


def violations(outcome: Outcome) -> float:
    """The part of all requests that was not answered in time."""
    return 1.0 - outcome.attainment


def violations_to_divide_by(outcome: Outcome) -> float:
    """The same, and at least one request, so that who misses none can be divided by."""
    return max(violations(outcome), 1 / sum(each.offered for each in outcome.owners.values()))


async def _measure(options: Options) -> Result:
    # Before this process is bound to one processor, and before the load.
    computer = machine()
    seconds = 5.0 if options.quick else 16.0
    async with device_scene(_MODELS, seed=options.seed, together=False) as scene:
        slo_s = _SLO_TIMES * await scene.single_row_s()
        policies = {
            _OURS: UsePolicy("effsafe"),
            AIMD: UsePolicy(AIMD, slo_s=slo_s),
            "round-robin": UsePolicy("round-robin"),
            "edf": UsePolicy("edf"),
        }
        curve = scene.curve
        served = rate_within(curve, _MODELS, slo_s)
        saturated = max(size / cost for size, cost in curve.items())
        generator = await scene.generator_rate(0.5)
        contest = Contest(scene, options.seed)
        for number in range(options.rounds_or(quick=2, full=5)):
            seed = options.seed + number
            marked = workload(scene.servables, _LOAD * served, slo_s, seconds, seed)
            runs = [(_MARK, name, policies[name], marked) for name in (_OURS, AIMD, "edf")]
            if not options.quick:
                more = workload(scene.servables, _LOAD * saturated, slo_s, seconds / 2, seed)
                runs += [(_MORE, name, policies[name], more) for name in (_OURS, AIMD)]
            await contest.round(number, runs, 1.0)
        told = conditions(scene, options, computer, generator, _LOAD * saturated)
    told = {
        **told, "slo_ms": 1e3 * slo_s, "served_within_slo": served, "saturated": saturated,
    }  # fmt: skip
    return _result(contest, told, options.seed)


def _result(contest: Contest, told: Mapping[str, Figure], seed: int) -> Result:
    measured = Measured(contest.entries, seed)
    runs = list(dict.fromkeys((entry.workload, entry.contender) for entry in contest.entries))
    ratios = {}
    for workload_name, key in ((_MARK, "violations_vs_aimd"), (_MORE, "violations_vs_aimd_more")):
        if (workload_name, _OURS) in runs:
            ratios[key] = measured.ratio(
                measured.figures(workload_name, _OURS, violations),
                measured.figures(workload_name, AIMD, violations_to_divide_by),
            )
    missed = {
        f"violations_{name} {when}": measured.estimate(when, name, violations)
        for when, name in runs
    }
    return Result(
        bench=BENCH.name,
        ratios={"violations_vs_aimd": ratios["violations_vs_aimd"].value},
        figures={
            **{key: each.value for key, each in (ratios | missed).items()},
            "p99_9_ms": 1e3
            * measured.estimate(_MARK, _OURS, lambda found: found.percentile_s(99.9)).value,
            "intervals": {key: [each.low, each.high] for key, each in (ratios | missed).items()},
            **told,
        },
        tables=(table_of(measured, "sixteen models in bursts", sorted(runs)),),
        samples=samples_of(contest.entries),
        plot=plot_of(contest.entries, "Sixteen models in bursts", _MARK),
        notes=(
            f"The load is {_LOAD:.0%} of the rate at which so many can be served in turn in time.",
            f"The deadline is {_SLO_TIMES:g} times the median of a single row alone.",
        ),
    )


def _run(options: Options) -> Result:
    return uvloop.run(_measure(options))


BENCH: Final = Bench(
    name="predictability",
    summary="missed deadlines of sixteen models in bursts, against Clipper's AIMD",
    run=_run,
)
