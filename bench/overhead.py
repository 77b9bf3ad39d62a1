"""``overhead``: what the actor costs beside its programs, and what a pick costs.

One model, always with rows waiting, against a loop in the same process that does nothing but lay
the same rows out in the same staging memory, launch the same executable and look at its outputs.
Both have one processor, the actor for its event loop, too.
And the time that EffSafe takes for a pick among sixteen lanes that all have rows.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import uvloop

from batching import EffSafe, Ladder, LaneKey, Pick, Policy, Situation
from batching.simulation import SimulatedLane, simulate
from batching.values import Batch
from batching.workloads import merged, poisson
from bench.contest import conditions
from bench.device_actor import UsePolicy
from bench.device_scene import device_scene
from bench.registry import Bench, Options
from bench.report import Figure, Result, Samples, Table, machine
from bench.stats import bootstrap, paired_ratio

__all__ = ["BENCH", "TimedPicks", "time_picks"]

_LAYERS: Final = 16
_LANES: Final = 16


class TimedPicks:
    """A policy whose picks are timed, where so many lanes have rows.

    Args:
        policy: picks.
        lanes: how many lanes a situation must have to count.

    Attributes:
        seconds: of each pick that counts.
    """

    def __init__(self, policy: Policy, lanes: int) -> None:
        self.seconds: list[float] = []
        self._policy = policy
        self._lanes = lanes

    def added(self, key: LaneKey) -> None:
        """See `Policy.added`."""
        self._policy.added(key)

    def removed(self, key: LaneKey) -> None:
        """See `Policy.removed`."""
        self._policy.removed(key)

    def landed(self, batch: Batch, now: float) -> None:
        """See `Policy.landed`."""
        self._policy.landed(batch, now)

    def pick(self, situation: Situation) -> Pick | None:
        """See `Policy.pick`."""
        began = time.perf_counter()
        found = self._policy.pick(situation)
        seconds = time.perf_counter() - began
        if len(situation.lanes) == self._lanes:
            self.seconds.append(seconds)
        return found


def time_picks(load: float, seconds: float, seed: int) -> list[float]:
    """Seconds of each pick among sixteen lanes, while a device is simulated.

    Args:
        load: requests, as a multiple of what the device can do in the largest batches.
        seconds: of virtual time.
        seed: of the requests.
    """
    ladder = Ladder((1, 2, 4, 8, 16, 32))
    lanes = [SimulatedLane(key=LaneKey(f"m{n}"), ladder=ladder) for n in range(_LANES)]
    rate = load * 32 / _cost(lanes[0].key, 32) / _LANES
    policy = TimedPicks(EffSafe(), _LANES)
    requests = [
        poisson(lane.key, lane.key.unit, rate, seconds, budget_s=0.5, seed=seed) for lane in lanes
    ]
    simulate(policy, lanes, merged(*requests), _cost)
    return policy.seconds


def _cost(key: LaneKey, bucket: int) -> float:
    return 0.004 + 0.00025 * bucket


async def _measure(options: Options) -> Result:
    # Before this process is bound to one processor, and before the load.
    computer = machine()
    seconds = 1.5 if options.quick else 5.0
    bare: list[float] = []
    actor: list[float] = []
    loop_us: list[float] = []
    async with device_scene(1, layers=_LAYERS, seed=options.seed) as scene:
        [servable] = scene.servables
        scene.use(UsePolicy("effsafe"))
        generator = await scene.generator_rate(0.5)
        for number in range(options.rounds_or(quick=5, full=15)):
            print(f"round {number + 1}", file=sys.stderr)
            if number % 2:
                bare.append(scene.bare(servable, seconds))
            before = scene.counts()
            actor.append(await scene.capacity(servable, seconds))
            after = scene.counts()
            rows = after.lanes[servable].rows - before.lanes[servable].rows
            loop_us.append((after.loop_s - before.loop_s) / rows * 1e6)
            if not number % 2:
                bare.append(scene.bare(servable, seconds))
        told = conditions(scene, options, computer, generator, max(actor), together=True)
    rounds = options.rounds_or(quick=3, full=10)
    picks = {
        load: [1e6 * np.array(time_picks(load, 1.0, options.seed + n)) for n in range(rounds)]
        for load in (0.9, 1.2)
    }
    return _result(actor, bare, loop_us, picks, told, options.seed)


def _result(
    actor: Sequence[float],
    bare: Sequence[float],
    loop_us: Sequence[float],
    picks: Mapping[float, Sequence[np.ndarray[tuple[int], np.dtype[np.float64]]]],
    told: Mapping[str, Figure],
    seed: int,
) -> Result:
    ratio = paired_ratio(actor, bare, seed=seed)
    medians = {
        load: bootstrap([float(np.median(each)) for each in rounds], seed=seed)
        for load, rounds in picks.items()
    }
    high = {
        load: bootstrap([float(np.percentile(each, 99)) for each in rounds], seed=seed)
        for load, rounds in picks.items()
    }
    # Within capacity and over it, the dearer counts.
    pick = max(medians.values(), key=lambda each: each.value)
    return Result(
        bench=BENCH.name,
        ratios={"throughput_vs_bare_loop": ratio.value, "pick_16_lanes_us": pick.value},
        figures={
            "rows_a_second": bootstrap(actor, seed=seed).value,
            "bare_rows_a_second": bootstrap(bare, seed=seed).value,
            "loop_us_a_row": bootstrap(loop_us, seed=seed).value,
            **{f"pick_us_at_{load:g}": each.value for load, each in medians.items()},
            **{f"pick_p99_us_at_{load:g}": each.value for load, each in high.items()},
            "intervals": {
                "throughput_vs_bare_loop": [ratio.low, ratio.high],
                "pick_16_lanes_us": [pick.low, pick.high],
            },
            **told,
        },
        tables=(
            Table(
                title="rows a second",
                columns=("actor", "bare loop", "ratio", "loop us a row"),
                rows=(
                    (
                        bootstrap(actor, seed=seed),
                        bootstrap(bare, seed=seed),
                        ratio,
                        bootstrap(loop_us, seed=seed),
                    ),
                ),
            ),
            Table(
                title=f"a pick among {_LANES} lanes, in microseconds",
                columns=("load", "median", "99th percentile"),
                rows=tuple((load, medians[load], high[load]) for load in picks),
            ),
        ),
        samples=_samples(actor, bare, loop_us, picks),
    )


def _samples(
    actor: Sequence[float],
    bare: Sequence[float],
    loop_us: Sequence[float],
    picks: Mapping[float, Sequence[np.ndarray[tuple[int], np.dtype[np.float64]]]],
) -> dict[str, Samples]:
    return {
        "rounds": Samples(
            columns=("round", "actor", "bare", "loop_us_a_row"),
            rows=[
                (number, *each)
                for number, each in enumerate(zip(actor, bare, loop_us, strict=True))
            ],
        ),
        "picks": Samples(
            columns=("load", "round", "us"),
            rows=[
                (load, number, value)
                for load, rounds in picks.items()
                for number, each in enumerate(rounds)
                for value in np.round(each, 1).tolist()
            ],
        ),
    }


def _run(options: Options) -> Result:
    return uvloop.run(_measure(options))


BENCH: Final = Bench(
    name="overhead",
    summary="the actor against a bare loop over its own programs; what a pick costs",
    run=_run,
)
