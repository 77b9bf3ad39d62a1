"""The second part of ``fanout``: one replica slow now and then, and what routers do about it.

Four shards of two replicas. One of the eight sleeps in some of its calls. Router cores over them
get the same requests at the same instants, in turn, in every round: one that asks the replica with
the fewest calls under way and waits for it; one that asks another replica, too, when a part is
late; and the product's, which also learns who would be done first, and asks that one.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from unittest import mock

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
from cluster import hedging
from cluster.peers import Peer
from cluster.roster import Roster
from cluster.router import Router
from shards.orders import HostedUnit
from shards.specs import Spec

__all__ = ["CONDITIONS", "WAYS", "Round", "measure"]

_SHARDS: Final = 4
_REPLICAS: Final = 2
_DIM: Final = 64
_TABLE_ROWS: Final = 40_000
#: Ids of a request, as many of each shard.
_IDS: Final = 32
#: Requests a second: little, so that only the slow replica makes anything late.
_RATE: Final = 200.0
_SLOW: Final = "shard-0-0"
_SLOW_MS: Final = 50
_SLOW_SHARE: Final = 0.04
_BUDGET_S: Final = 10.0
#: Ways to name: the share of second calls that each may make, and whether it learns whom to ask.
WAYS: Final[Mapping[str, tuple[float, bool]]] = {
    "plain": (0.0, False),
    "second calls": (hedging.SHARE, False),
    "product": (hedging.SHARE, True),
}
CONDITIONS: Final = (
    f"Hedging: {_SLOW} sleeps {_SLOW_MS} ms in {_SLOW_SHARE:.0%} of its calls; {_RATE:g} requests "
    "a second; second calls are counted over all parts of all shards. Plain: neither second calls "
    "nor a choice by what was learned; product: both."
)

Inputs = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What one way did in one round.

    Attributes:
        latencies_ms: of the requests that count.
        extra_calls: second calls of parts over all parts, the warm-up's among them.
        behind_ms: 99th percentile of how late the generator was.
    """

    latencies_ms: npt.NDArray[np.float64]
    extra_calls: float
    behind_ms: float

    def percentile_ms(self, percent: float) -> float:
        """Nearest rank."""
        return percentile_ms(self.latencies_ms, percent)


def _names() -> list[list[str]]:
    """Of every shard the names of its replicas."""
    return [[f"shard-{at}-{copy}" for copy in range(_REPLICAS)] for at in range(_SHARDS)]


def _actors() -> list[Actor]:
    slow = ("--slow-ms", str(_SLOW_MS), "--slow-share", str(_SLOW_SHARE))
    return [
        Actor(
            name=name,
            units=(HostedUnit(name="table", partitions=(held,)),),
            options=slow if name == _SLOW else (),
        )
        for held, names in enumerate(_names())
        for name in names
    ]


def _rows() -> npt.NDArray[np.float32]:
    numbers = np.arange(_TABLE_ROWS, dtype=np.float32)
    return np.repeat(numbers[:, None], _DIM, axis=1)


def _ids(random: np.random.Generator) -> Inputs:
    """Ids of a request: as many of every partition."""
    each = _TABLE_ROWS // _SHARDS
    first = np.repeat(np.arange(_SHARDS) * each, _IDS // _SHARDS)
    return {"ids": (first + random.integers(0, each, _IDS))[None]}


def _save(store: Path) -> None:
    with shards.Bundle.create(store, SERVABLE, 1) as bundle:
        table = bundle.table("table", _rows(), partitions=_SHARDS)

        def look_up(ids: Any) -> Any:
            return table.rows(ids)

        inputs = {"ids": Spec(("b", _IDS), "int64")}
        bundle.signature(name="serving_default", inputs=inputs)(look_up)


async def _check(router: Router, inputs: Inputs) -> None:
    """Rows are those that were asked for.

    Raises:
        AnswersDiffer: they are not.
    """
    [rows] = (await OpenLoop(router, ()).ask(SERVABLE, inputs)).values()
    if not np.array_equal(rows[0, :, 0], inputs["ids"][0]):
        raise AnswersDiffer("a look-up did not answer the rows of its ids")


def _fewest(roster: Roster, names: Sequence[str], rows: int, now: float) -> Peer | None:
    return roster.best(names)


async def _offer(
    router: Router,
    way: str,
    arrivals: Sequence[Arrival],
    inputs: Sequence[Inputs],
    warm_s: float,
) -> Round:
    before = router.stats.hedged
    share, learns = WAYS[way]
    with contextlib.ExitStack() as stack:
        # A router that is never used with a share saves none up, so that it makes no second call.
        stack.enter_context(mock.patch.object(hedging, "SHARE", share))
        if not learns:
            stack.enter_context(mock.patch.object(Roster, "quickest", _fewest))
        outcome = await OpenLoop(router, inputs).offer(arrivals, warm_s=warm_s)
    owner = outcome.owners[SERVABLE]
    if owner.errors:
        raise LoadFailed(f"requests failed: {dict(owner.errors)}")
    return Round(
        latencies_ms=owner.latencies_s * 1e3,
        extra_calls=(router.stats.hedged - before) / (_SHARDS * len(arrivals)),
        behind_ms=outcome.behind_s * 1e3,
    )


async def measure(options: Options) -> Mapping[str, Sequence[Round]]:
    """Both ways in turn, in rounds of the same requests at the same instants.

    Raises:
        AnswersDiffer: rows are not those that were asked for.
        LoadFailed: requests failed.
    """
    rounds = options.rounds_or(quick=3, full=5)
    warm_s, duration_s = (0.5, 2.0) if options.quick else (1.0, 10.0)
    random = np.random.default_rng(options.seed)
    inputs = [_ids(random) for _ in range(256)]
    outcomes: dict[str, list[Round]] = {way: [] for way in WAYS}
    placement = {"table": tuple(tuple(names) for names in _names())}
    with tempfile.TemporaryDirectory(prefix="shardserve-") as name:
        store = Path(name, "store")
        _save(store)
        async with routers(Path(name), store, _actors(), placement, len(WAYS)) as made:
            by_way = dict(zip(WAYS, made, strict=True))
            for router in made:
                await _check(router, inputs[0])
            for number in range(rounds):
                print(f"hedging: round {number + 1} of {rounds}", file=sys.stderr)
                gaps = random.exponential(1.0 / _RATE, int((warm_s + duration_s) * _RATE))
                arrivals = [
                    Arrival(float(at), LaneKey(SERVABLE), SERVABLE, 1, _BUDGET_S)
                    for at in gaps.cumsum()
                ]
                for way in list(WAYS)[:: 1 if number % 2 else -1]:
                    found = await _offer(by_way[way], way, arrivals, inputs, warm_s)
                    outcomes[way].append(found)
                    gc.collect()
    return outcomes
