"""The first part of ``fanout``: what it costs to have a model's table on four shards.

A model sums rows of a table and then computes for five milliseconds, on one thread, one request
after the other. Once its rows come from four shards, once the table is among the parameters of its
unit, so that one process has the whole model; the router, the device's process, the requests and
their instants are the same, and so is the work.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

import shards
from batching.simulation import Arrival
from batching.values import LaneKey
from bench.errors import AnswersDiffer, LoadFailed
from bench.fanout_scene import Actor, percentile_ms, routers
from bench.look_ups_actor import SERVABLE
from bench.open_loop import OpenLoop
from bench.registry import Options
from cluster.router import Router
from shards.orders import HostedUnit
from shards.specs import Spec

__all__ = ["CONDITIONS", "WAYS", "Turn", "measure"]

_SHARDS: Final = 4
_DIM: Final = 64
_TABLE_ROWS: Final = 40_000
_IDS: Final = 32
#: Signatures to measure.
WAYS: Final = ("whole", "sharded")
#: What the device works on a request, and how far this one is from that at most.
_WORK_MS: Final = 5.0
_SPREAD_MS: Final = 0.5
_LOAD: Final = 0.5
_BUDGET_S: Final = 10.0
CONDITIONS: Final = (
    f"Compute: {_WORK_MS:g} ms (give or take {_SPREAD_MS:g}) of work on one thread, {_LOAD:.0%} of "
    "the time; whole: the table is in the process that works; sharded: on four others."
)
#: Steps of work by which a step's time is found, and requests of each.
_STEPS: Final = (0, 2000)
_PROBES: Final = 15
#: Of every piece of a round, not counted.
_WARM_S: Final = 0.5
#: Seconds in which the device has always something to do, to know what half of that is.
_FULL_S: Final = 1.0

Inputs = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What one way did in one round.

    Attributes:
        latencies_ms: of the requests that count.
        behind_ms: 99th percentile of how late the generator was.
    """

    latencies_ms: npt.NDArray[np.float64]
    behind_ms: float

    def percentile_ms(self, percent: float) -> float:
        """Nearest rank."""
        return percentile_ms(self.latencies_ms, percent)


def _save(store: Path) -> None:
    random = np.random.default_rng(0)
    rows = random.standard_normal((_TABLE_ROWS, _DIM), np.float32)
    weights = random.standard_normal((_DIM, _DIM), np.float32) * np.float32(_DIM**-0.5)
    steps = Spec(("b",), "int32")

    def work(params: Any, vectors: Any, steps: Any) -> Any:
        import jax
        import jax.numpy as jnp

        # The only bucket is 1, so the steps of a batch are those of its request.
        hidden = vectors.sum(1)
        after = jax.lax.fori_loop(
            0, steps[0], lambda _, hidden: jnp.tanh(hidden @ params["weights"]), hidden
        )
        return {"y": after.sum(1)}

    def whole(params: Any, ids: Any, steps: Any) -> Any:
        return work(params, params["table"][ids], steps)

    with shards.Bundle.create(store, SERVABLE, 1) as bundle:
        table = bundle.table("table", rows, partitions=_SHARDS)
        head = bundle.unit(
            "head", work, {"weights": weights},
            inputs={"vectors": Spec(("b", _IDS, _DIM)), "steps": steps},
            batch_buckets=(1,), platforms=("cpu",),
        )  # fmt: skip
        model = bundle.unit(
            "model", whole, {"weights": weights, "table": rows},
            inputs={"ids": Spec(("b", _IDS), "int32"), "steps": steps},
            batch_buckets=(1,), platforms=("cpu",),
        )  # fmt: skip
        inputs = {"ids": Spec(("b", _IDS), "int32"), "steps": steps}

        @bundle.signature(name="sharded", inputs=inputs)
        def sharded_way(ids: Any, steps: Any) -> Any:
            return head(vectors=table.rows(ids), steps=steps)

        @bundle.signature(name="whole", inputs=inputs)
        def whole_way(ids: Any, steps: Any) -> Any:
            return model(ids=ids, steps=steps)


def _actors() -> list[Actor]:
    # In memory, as the whole model's parameters are.
    tables = [
        Actor(
            name=f"shard-{held}",
            units=(HostedUnit(name="table", partitions=(held,)),),
            options=("--resident", "locked"),
        )
        for held in range(_SHARDS)
    ]
    return [
        *tables,
        Actor(name="device-0", units=(HostedUnit(name="head"), HostedUnit(name="model"))),
    ]


def _request(random: np.random.Generator, steps: int) -> Inputs:
    """Ids in all partitions, and so many steps of work."""
    each = _TABLE_ROWS // _SHARDS
    first = np.repeat(np.arange(_SHARDS) * each, _IDS // _SHARDS)
    ids = (first + random.integers(0, each, _IDS)).astype(np.int32)
    return {"ids": ids[None], "steps": np.array([steps], np.int32)}


async def _answer(router: Router, way: str, asked: Inputs) -> float:
    [value] = (await OpenLoop(router, (), signature=way).ask(SERVABLE, asked)).values()
    return float(value[0])


async def _check(router: Router, inputs: Sequence[Inputs]) -> None:
    """Both ways answer the same.

    Raises:
        AnswersDiffer: they do not.
    """
    for asked in inputs:
        whole, sharded = [await _answer(router, way, asked) for way in WAYS]
        if not np.isclose(whole, sharded, rtol=1e-4, atol=1e-5):
            raise AnswersDiffer(f"{whole} with the table in one process, {sharded} on shards")


async def _steps_per_ms(router: Router, random: np.random.Generator) -> float:
    """How many steps the device makes in a millisecond now, by the model in one process."""
    medians = []
    load = OpenLoop(router, (), signature="whole")
    for steps in _STEPS:
        seconds = []
        for _ in range(_PROBES):
            asked = _request(random, steps)
            began = time.perf_counter()
            await load.ask(SERVABLE, asked)
            seconds.append(time.perf_counter() - began)
        medians.append(float(np.median(seconds)) * 1e3)
    return (_STEPS[1] - _STEPS[0]) / max(medians[1] - medians[0], 1e-3)


async def _offer(
    router: Router, way: str, arrivals: Sequence[Arrival], inputs: Sequence[Inputs]
) -> Turn:
    outcome = await OpenLoop(router, inputs, signature=way).offer(arrivals, warm_s=_WARM_S)
    owner = outcome.owners[SERVABLE]
    if owner.errors:
        raise LoadFailed(f"requests failed: {dict(owner.errors)}")
    return Turn(latencies_ms=owner.latencies_s * 1e3, behind_ms=outcome.behind_s * 1e3)


async def _round(
    router: Router, random: np.random.Generator, pieces: int, piece_s: float
) -> Mapping[str, Turn]:
    """Both ways in turn, piece by piece, so that both meet the machine as it is at the time."""
    per_ms = await _steps_per_ms(router, random)
    usual = _request(random, int(_WORK_MS * per_ms))
    full = OpenLoop(router, (usual,), signature="whole")
    rate = _LOAD * await full.saturate(SERVABLE, _FULL_S, window=4, warm_s=0.2)
    low, high = ((_WORK_MS + sign * _SPREAD_MS) * per_ms for sign in (-1, 1))
    found: dict[str, list[Turn]] = {way: [] for way in WAYS}
    for piece in range(pieces):
        gaps = random.exponential(1.0 / rate, int((_WARM_S + piece_s) * rate))
        arrivals = [
            Arrival(float(at), LaneKey(SERVABLE), SERVABLE, 1, _BUDGET_S) for at in gaps.cumsum()
        ]
        inputs = [_request(random, int(random.uniform(low, high))) for _ in arrivals]
        for way in WAYS[:: 1 if piece % 2 else -1]:
            found[way].append(await _offer(router, way, arrivals, inputs))
            gc.collect()
    return {
        way: Turn(
            latencies_ms=np.concatenate([turn.latencies_ms for turn in turns]),
            behind_ms=max(turn.behind_ms for turn in turns),
        )
        for way, turns in found.items()
    }


async def measure(options: Options) -> Mapping[str, Sequence[Turn]]:
    """Both ways, in rounds of the same requests at the same instants.

    Raises:
        AnswersDiffer: the two ways answer otherwise.
        LoadFailed: requests failed.
    """
    rounds = options.rounds_or(quick=2, full=5)
    pieces, piece_s = (2, 2.0) if options.quick else (5, 3.0)
    random = np.random.default_rng(options.seed)
    found: dict[str, list[Turn]] = {way: [] for way in WAYS}
    placement = {
        "table": tuple((f"shard-{held}",) for held in range(_SHARDS)),
        "head": (("device-0",),),
        "model": (("device-0",),),
    }
    with tempfile.TemporaryDirectory(prefix="shardserve-") as name:
        store = Path(name, "store")
        _save(store)
        async with routers(Path(name), store, _actors(), placement, 1) as [router]:
            await _check(router, [_request(random, steps) for steps in (0, 1, 100)])
            for number in range(rounds):
                print(f"compute: round {number + 1} of {rounds}", file=sys.stderr)
                for way, turn in (await _round(router, random, pieces, piece_s)).items():
                    found[way].append(turn)
    return found
