"""``isolation``: eight models share a device, and one is suddenly asked a hundred times as much.

They begin at 60 % of what eight such models can be served within the deadline, 25 single rows. When
the flood comes, the other seven must stay in time, and what the device has left should go to the
flooder in large batches: that it gets more than in turns is what looking at deadlines is good for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

import uvloop

from batching import LaneKey
from batching.simulation import Arrival
from batching.workloads import merged, poisson
from bench.contest import (
    Contest,
    Measured,
    conditions,
    plot_of,
    rate_within,
    samples_of,
    table_of,
)
from bench.device_actor import UsePolicy
from bench.device_scene import device_scene
from bench.open_loop import Outcome
from bench.registry import Bench, Options
from bench.report import Figure, Result, Table, machine
from bench.stats import Estimate

__all__ = ["BENCH"]

_OURS: Final = "effsafe"
_TURNS: Final = "round-robin"
#: All of them give up rows that cannot be in time, but for `fifo`, which drops what has expired.
POLICIES: Final[Mapping[str, UsePolicy]] = {
    _OURS: UsePolicy("effsafe"),
    _TURNS: UsePolicy("round-robin"),
    "edf": UsePolicy("edf"),
    "fair-share": UsePolicy("fair-share"),
    "fifo": UsePolicy("fifo-late"),
}
_MODELS: Final = 8
_LAYERS: Final = 16
_SLO_TIMES: Final = 25.0
_LOAD: Final = 0.6
_FLOOD_TIMES: Final = 100.0
_FLOOD: Final = "flood"
_QUIET: Final = "no flood"


def workload(
    servables: Sequence[str],
    rate: float,
    slo_s: float,
    seed: int,
    *,
    quiet_s: float,
    flood_s: float,
) -> list[Arrival]:
    """Every servable at a rate of its own, then the last one at a hundred times that.

    Args:
        servables: who asks.
        rate: requests a second of each.
        slo_s: until the deadline of each request.
        seed: of the draw.
        quiet_s: how long it is quiet.
        flood_s: how long it is not; may be 0.
    """
    flooder, lane = servables[-1], LaneKey(servables[-1])
    loads: list[Iterable[Arrival]] = [
        poisson(LaneKey(name), name, rate, quiet_s + flood_s, budget_s=slo_s, seed=seed)
        for name in servables
    ]
    if flood_s:
        # Another draw than the same servable's usual requests.
        more = poisson(
            lane, flooder, (_FLOOD_TIMES - 1) * rate, flood_s, budget_s=slo_s, seed=seed + 1_000_000
        )
        loads.append(arrival._replace(at=arrival.at + quiet_s) for arrival in more)
    return list(merged(*loads))


def victims(outcome: Outcome, flooder: str) -> float:
    """The part of all others' requests that was answered in time."""
    others = [found for owner, found in outcome.owners.items() if owner != flooder]
    return sum(each.good for each in others) / sum(each.offered for each in others)


def worst_victim(outcome: Outcome, flooder: str) -> float:
    """The same, of the one that fared worst."""
    return min(found.attainment for owner, found in outcome.owners.items() if owner != flooder)


def flooder_goodput(outcome: Outcome, flooder: str) -> float:
    """Requests a second of the flooder that were answered in time."""
    return outcome.owners[flooder].good / outcome.seconds


async def _measure(options: Options) -> Result:
    # Before this process is bound to one processor, and before the load.
    computer = machine()
    quiet_s, flood_s = (1.0, 2.5) if options.quick else (2.0, 8.0)
    async with device_scene(_MODELS, layers=_LAYERS, seed=options.seed, together=False) as scene:
        slo_s = _SLO_TIMES * await scene.single_row_s()
        served = rate_within(scene.curve, _MODELS, slo_s)
        rate = _LOAD * served / _MODELS
        generator = await scene.generator_rate(0.5)
        contest = Contest(scene, options.seed)
        for number in range(options.rounds_or(quick=2, full=5)):
            seed = options.seed + number
            flood = workload(scene.servables, rate, slo_s, seed, quiet_s=quiet_s, flood_s=flood_s)
            await contest.round(
                number,
                [(_FLOOD, name, policy, flood) for name, policy in POLICIES.items()],
                quiet_s,
            )
            quiet = workload(scene.servables, rate, slo_s, seed, quiet_s=quiet_s + 2, flood_s=0.0)
            await contest.round(number, [(_QUIET, _OURS, POLICIES[_OURS], quiet)], 1.0)
        told = conditions(scene, options, computer, generator, (_MODELS - 1 + _FLOOD_TIMES) * rate)
        flooder = scene.servables[-1]
    told = {**told, "slo_ms": 1e3 * slo_s, "served_within_slo": served, "rate_of_each": rate}
    return _result(contest, flooder, told, options.seed)


def _result(contest: Contest, flooder: str, told: Mapping[str, Figure], seed: int) -> Result:
    measured = Measured(contest.entries, seed)

    def estimate(of: Callable[[Outcome, str], float], name: str, when: str = _FLOOD) -> Estimate:
        return measured.estimate(when, name, lambda outcome: of(outcome, flooder))

    def goodputs(name: str) -> list[float]:
        # One answer a run at least, so that who gives the flooder nothing can be divided by.
        return measured.figures(
            _FLOOD, name, lambda found: max(flooder_goodput(found, flooder), 1 / found.seconds)
        )

    attained = {name: estimate(victims, name) for name in POLICIES}
    more = {
        name: measured.ratio(goodputs(_OURS), goodputs(name)) for name in POLICIES if name != _OURS
    }
    shares = Table(
        title="under the flood",
        columns=("policy", "victims in time", "the worst of them", "flooder's goodput/s"),
        rows=tuple(
            (name, attained[name], estimate(worst_victim, name), estimate(flooder_goodput, name))
            for name in POLICIES
        ),
    )
    runs = [(_QUIET, _OURS), *[(_FLOOD, name) for name in POLICIES]]
    return Result(
        bench=BENCH.name,
        ratios={
            "victim_attainment": attained[_OURS].value,
            "flooder_goodput_vs_round_robin": more[_TURNS].value,
        },
        figures={
            **{f"victim_attainment_{name}": each.value for name, each in attained.items()},
            **{f"flooder_goodput_vs_{name}": each.value for name, each in more.items()},
            "victim_attainment_no_flood": estimate(victims, _OURS, _QUIET).value,
            "worst_victim_attainment": estimate(worst_victim, _OURS).value,
            "intervals": {
                **{f"victim_attainment_{n}": [e.low, e.high] for n, e in attained.items()},
                **{f"flooder_goodput_vs_{n}": [e.low, e.high] for n, e in more.items()},
            },
            **told,
        },
        tables=(shares, table_of(measured, "all requests together", runs)),
        samples=samples_of(contest.entries),
        plot=plot_of(contest.entries, "Eight models, one floods", _FLOOD),
        notes=(
            f"The load is {_LOAD:.0%} of the rate at which so many can be served in turn in time.",
            f"The deadline is {_SLO_TIMES:g} times the median of a single row alone.",
            "The flood is counted from its first row.",
        ),
    )


def _run(options: Options) -> Result:
    return uvloop.run(_measure(options))


BENCH: Final = Bench(
    name="isolation",
    summary="one of eight models floods: who of the others stays in time, by policy",
    run=_run,
)
