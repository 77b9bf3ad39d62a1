"""``fanout``: look-ups over four shards of two replicas each, of which one is slow now and then.

Eight shards, each a process made of what an actor is made of in production, and this process, which
hosts two of the product's router cores, one of which may not ask a second replica for a late part;
no Ray, no HTTP. One replica of one shard sleeps in some of its calls. Both routers get the same
requests at the same instants, in turn, in every round; latency counts from the intended arrival.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import secrets
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from unittest import mock

import msgspec
import numpy as np
import numpy.typing as npt
import uvloop

import shards
from batching.simulation import Arrival
from batching.values import LaneKey
from bench.errors import AnswersDiffer, LoadFailed
from bench.look_ups_actor import NODE, READY, SECRET_VARIABLE, SERVABLE
from bench.open_loop import OpenLoop
from bench.processes import child, python
from bench.registry import Bench, Options
from bench.report import Figure, Plot, Result, Samples, Series, Table, machine
from bench.stats import Estimate, bootstrap, paired_ratio
from cluster import hedging
from cluster.epochs import Epoch, ServableVersion
from cluster.router import Router
from shards.orders import Endpoint, HostedUnit
from shards.specs import Spec
from shards.store import LocalStore
from shards.transport import Link, LinkHandler, connect

__all__ = ["BENCH", "WAYS", "Round"]

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
_START_S: Final = 90.0
#: Ways to name, and the share of second calls that each may make.
WAYS: Final[Mapping[str, float]] = {"plain": 0.0, "hedged": hedging.SHARE}
_PERCENTS: Final = (50, 90, 99)


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
        return float(np.percentile(self.latencies_ms, percent, method="higher"))


#: Way to its rounds.
Outcomes = Mapping[str, Sequence[Round]]


def _names() -> list[list[str]]:
    """Of every shard the names of its replicas."""
    return [[f"shard-{at}-{copy}" for copy in range(_REPLICAS)] for at in range(_SHARDS)]


def _rows() -> npt.NDArray[np.float32]:
    numbers = np.arange(_TABLE_ROWS, dtype=np.float32)
    return np.repeat(numbers[:, None], _DIM, axis=1)


def _ids(random: np.random.Generator) -> dict[str, npt.NDArray[np.float32]]:
    """Ids of a request: as many of every partition."""
    each = _TABLE_ROWS // _SHARDS
    first = np.repeat(np.arange(_SHARDS) * each, _IDS // _SHARDS)
    ids: Any = (first + random.integers(0, each, _IDS))[None]
    return {"ids": ids}


def _save(store: Path) -> None:
    with shards.Bundle.create(store, SERVABLE, 1) as bundle:
        table = bundle.table("table", _rows(), partitions=_SHARDS)

        def look_up(ids: Any) -> Any:
            return table.rows(ids)

        inputs = {"ids": Spec(("b", _IDS), "int64")}
        bundle.signature(name="serving_default", inputs=inputs)(look_up)


def _command(name: str, held: int, folder: Path, store: Path) -> list[str]:
    units = [HostedUnit(name="table", partitions=(held,))]
    command = python(
        "bench.look_ups_actor", "--name", name, "--directory", str(folder), "--node", NODE,
        "--store", str(store), "--units", msgspec.json.encode(units).decode(),
    )  # fmt: skip
    if name == _SLOW:
        command += ["--slow-ms", str(_SLOW_MS), "--slow-share", str(_SLOW_SHARE)]
    return command


@contextlib.asynccontextmanager
async def _routers(folder: Path, store: Path) -> AsyncIterator[dict[str, Router]]:
    """A router for each way, all over the same shards."""
    secret = secrets.token_hex(16)
    with contextlib.ExitStack() as stack:
        said = [
            stack.enter_context(
                child(
                    _command(name, held, folder, store),
                    log=folder / f"{name}.log",
                    ready=READY,
                    timeout_s=_START_S,
                    environment={SECRET_VARIABLE: secret},
                )
            )
            for held, names in enumerate(_names())
            for name in names
        ]
        endpoints = [msgspec.json.decode(line, type=Endpoint) for line in said]

        async def dial(endpoint: Endpoint, handler: LinkHandler) -> Link:
            return await connect(
                endpoint, name="router", node=NODE, secret=secret.encode(), handler=handler
            )

        placement = {"table": tuple(tuple(names) for names in _names())}
        manifest = LocalStore(store).read_manifest(SERVABLE, 1)
        version = ServableVersion(manifest=manifest, placement=placement)
        epoch = Epoch(
            term=1,
            number=1,
            servables={SERVABLE: {1: version}},
            endpoints={endpoint.actor: endpoint for endpoint in endpoints},
        )
        routers = {way: Router(asyncio.get_running_loop(), dial) for way in WAYS}
        try:
            for router in routers.values():
                await router.adopt(epoch)
            yield routers
        finally:
            for router in routers.values():
                router.close()


async def _check(router: Router, inputs: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Rows are those that were asked for.

    Raises:
        AnswersDiffer: they are not.
    """
    [rows] = (await OpenLoop(router, ()).ask(SERVABLE, inputs)).values()
    if not np.array_equal(rows[0, :, 0], inputs["ids"][0]):
        raise AnswersDiffer("a look-up did not answer the rows of its ids")


async def _offer(
    router: Router,
    share: float,
    arrivals: Sequence[Arrival],
    inputs: Sequence[Mapping[str, npt.NDArray[np.float32]]],
    warm_s: float,
) -> Round:
    before = router.stats.hedged
    # A router that is never used with a share saves none up, so that it makes no second call.
    with mock.patch.object(hedging, "SHARE", share):
        outcome = await OpenLoop(router, inputs).offer(arrivals, warm_s=warm_s)
    owner = outcome.owners[SERVABLE]
    if owner.errors:
        raise LoadFailed(f"requests failed: {dict(owner.errors)}")
    return Round(
        latencies_ms=owner.latencies_s * 1e3,
        extra_calls=(router.stats.hedged - before) / (_SHARDS * len(arrivals)),
        behind_ms=outcome.behind_s * 1e3,
    )


async def _measure(options: Options) -> dict[str, list[Round]]:
    rounds = options.rounds_or(quick=3, full=9)
    warm_s, duration_s = (0.5, 4.0) if options.quick else (1.0, 12.0)
    random = np.random.default_rng(options.seed)
    inputs = [_ids(random) for _ in range(256)]
    outcomes: dict[str, list[Round]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(prefix="shardserve-") as name:
        store = Path(name, "store")
        _save(store)
        async with _routers(Path(name), store) as routers:
            for router in routers.values():
                await _check(router, inputs[0])
            for number in range(rounds):
                print(f"round {number + 1} of {rounds}", file=sys.stderr)
                gaps = random.exponential(1.0 / _RATE, int((warm_s + duration_s) * _RATE))
                arrivals = [
                    Arrival(float(at), LaneKey(SERVABLE), SERVABLE, 1, _BUDGET_S)
                    for at in gaps.cumsum()
                ]
                for way in list(WAYS)[:: 1 if number % 2 else -1]:
                    found = await _offer(routers[way], WAYS[way], arrivals, inputs, warm_s)
                    outcomes[way].append(found)
                    gc.collect()
    return outcomes


def _result(outcomes: Outcomes, conditions: Mapping[str, Figure], *, seed: int) -> Result:
    """All that is told of the outcomes."""
    estimates = {
        f"{way}_p{percent}_ms": bootstrap(
            [each.percentile_ms(percent) for each in rounds], seed=seed
        )
        for way, rounds in outcomes.items()
        for percent in _PERCENTS
    }
    cut = paired_ratio(
        [each.percentile_ms(99) for each in outcomes["plain"]],
        [each.percentile_ms(99) for each in outcomes["hedged"]],
        seed=seed,
    )
    extra = bootstrap([each.extra_calls for each in outcomes["hedged"]], seed=seed)
    intervals: dict[str, Estimate] = {
        **estimates, "hedging_p99_cut": cut, "hedging_extra_calls": extra,
    }  # fmt: skip
    return Result(
        bench=BENCH.name,
        ratios={"hedging_p99_cut": cut.value, "hedging_extra_calls": extra.value},
        figures={
            **{name: estimate.value for name, estimate in estimates.items()},
            "plain_extra_calls": max(each.extra_calls for each in outcomes["plain"]),
            "generator_behind_p99_ms": max(
                each.behind_ms for rounds in outcomes.values() for each in rounds
            ),
            "intervals": {name: [each.low, each.high] for name, each in intervals.items()},
            **conditions,
        },
        tables=(
            Table(
                title="Latency, milliseconds: medians over rounds [95 %]",
                columns=("", *[f"p{percent}" for percent in _PERCENTS]),
                rows=tuple(
                    (way, *[estimates[f"{way}_p{percent}_ms"] for percent in _PERCENTS])
                    for way in outcomes
                ),
            ),
            Table(
                title="What second calls gain and cost",
                columns=("p99 plain over hedged", "second calls of parts over all"),
                rows=((cut, extra),),
            ),
        ),
        samples={
            "requests": Samples(
                columns=("way", "round", "milliseconds"),
                rows=[
                    (way, number, latency)
                    for way, rounds in outcomes.items()
                    for number, each in enumerate(rounds)
                    for latency in each.latencies_ms.tolist()
                ],
            )
        },
        plot=_plot(outcomes),
        notes=(
            f"{_SLOW} sleeps {_SLOW_MS} ms in {_SLOW_SHARE:.0%} of its calls.",
            f"Open loop, {_RATE:g} requests a second; latency counts from the intended arrival.",
        ),
    )


def _plot(outcomes: Outcomes) -> Plot:
    """Latency over percentiles, all rounds of a way together."""
    curve = np.linspace(50, 99.9, 200)
    pooled = {
        way: np.concatenate([each.latencies_ms for each in rounds])
        for way, rounds in outcomes.items()
    }
    return Plot(
        title="Latency of look-ups over four shards, one replica slow",
        x_label="percentile",
        y_label="milliseconds",
        log_y=True,
        series=tuple(
            Series(
                label=way,
                x=tuple(curve.tolist()),
                y=tuple(np.percentile(latencies, curve).tolist()),
            )
            for way, latencies in pooled.items()
        ),
    )


def _run(options: Options) -> Result:
    # Before the load, so that the load average is what others do.
    conditions: dict[str, Figure] = {
        "quick": options.quick,
        "seed": options.seed,
        "rate": _RATE,
        "machine": machine(),
    }
    return _result(uvloop.run(_measure(options)), conditions, seed=options.seed)


BENCH: Final = Bench(
    name="fanout",
    summary="look-ups over shards of which one replica is slow, with second calls and without",
    run=_run,
)
