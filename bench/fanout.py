"""``fanout``: what it costs to ask four shards, and what second calls gain.

In two parts, each with processes of its own: a model whose table is on shards against the same
model in one process (`bench.fanout_compute`), and look-ups over replicas of which one is slow now
and then (`bench.fanout_hedging`). Open loops; latency counts from the intended arrival.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import uvloop

from bench import fanout_compute, fanout_hedging
from bench.fanout_compute import Turn
from bench.fanout_hedging import Round
from bench.registry import Bench, Options
from bench.report import Figure, Plot, Result, Samples, Series, Table, machine
from bench.stats import Estimate, bootstrap, paired_ratio

__all__ = ["BENCH"]

_PERCENTS: Final = (50, 90, 99)


class _Measured(Protocol):
    """What one way did in one round."""

    @property
    def latencies_ms(self) -> npt.NDArray[np.float64]: ...
    @property
    def behind_ms(self) -> float: ...
    def percentile_ms(self, percent: float) -> float:
        """Nearest rank."""


#: Way to its rounds.
Ways = Mapping[str, Sequence[_Measured]]


def _estimates(ways: Ways, *, seed: int) -> dict[str, Estimate]:
    return {
        f"{way.replace(' ', '_')}_p{percent}_ms": bootstrap(
            [each.percentile_ms(percent) for each in rounds], seed=seed
        )
        for way, rounds in ways.items()
        for percent in _PERCENTS
    }


def _result(
    compute: Mapping[str, Sequence[Turn]],
    hedged: Mapping[str, Sequence[Round]],
    conditions: Mapping[str, Figure],
    *,
    seed: int,
) -> Result:
    """All that is told of the outcomes."""
    ways: dict[str, Sequence[_Measured]] = {**compute, **hedged}
    estimates = _estimates(ways, seed=seed)
    p99 = {way: [each.percentile_ms(99) for each in rounds] for way, rounds in ways.items()}
    ratios = {
        "p99_vs_single_process": paired_ratio(p99["sharded"], p99["whole"], seed=seed),
        "hedging_p99_cut": paired_ratio(p99["plain"], p99["product"], seed=seed),
        "hedging_extra_calls": bootstrap(
            [each.extra_calls for each in hedged["product"]], seed=seed
        ),
    }
    beside = {
        "second_calls_alone_p99_cut": paired_ratio(p99["plain"], p99["second calls"], seed=seed),
        "second_calls_alone_extra_calls": bootstrap(
            [each.extra_calls for each in hedged["second calls"]], seed=seed
        ),
    }
    intervals = {**estimates, **ratios, **beside}
    return Result(
        bench=BENCH.name,
        ratios={name: estimate.value for name, estimate in ratios.items()},
        figures={
            **{name: estimate.value for name, estimate in estimates.items()},
            **{name: estimate.value for name, estimate in beside.items()},
            "plain_extra_calls": max(each.extra_calls for each in hedged["plain"]),
            "generator_behind_p99_ms": max(
                each.behind_ms for rounds in ways.values() for each in rounds
            ),
            "intervals": {name: [each.low, each.high] for name, each in intervals.items()},
            **conditions,
        },
        tables=_tables(estimates, {**ratios, **beside}, ways),
        samples={
            "requests": Samples(
                columns=("way", "round", "milliseconds"),
                rows=[
                    (way, number, latency)
                    for way, rounds in ways.items()
                    for number, each in enumerate(rounds)
                    for latency in each.latencies_ms.tolist()
                ],
            )
        },
        plot=_plot(ways),
        notes=(
            fanout_compute.CONDITIONS,
            fanout_hedging.CONDITIONS,
            "Open loop; latency counts from the intended arrival.",
        ),
    )


def _tables(
    estimates: Mapping[str, Estimate], ratios: Mapping[str, Estimate], ways: Ways
) -> tuple[Table, ...]:
    return (
        Table(
            title="Latency, milliseconds: medians over rounds [95 %]",
            columns=("", *[f"p{percent}" for percent in _PERCENTS]),
            rows=tuple(
                (
                    way,
                    *[estimates[f"{way.replace(' ', '_')}_p{percent}_ms"] for percent in _PERCENTS],
                )
                for way in ways
            ),
        ),
        Table(
            title="Ratios, of the same round",
            columns=("ratio", "value"),
            rows=tuple(ratios.items()),
        ),
    )


def _plot(ways: Ways) -> Plot:
    """Latency over percentiles, all rounds of a way together."""
    curve = np.linspace(50, 99.9, 200)
    pooled = {
        way: np.concatenate([each.latencies_ms for each in rounds]) for way, rounds in ways.items()
    }
    return Plot(
        title="Latency over four shards",
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
        "machine": machine(),
    }
    compute = uvloop.run(fanout_compute.measure(options))
    hedged = uvloop.run(fanout_hedging.measure(options))
    return _result(compute, hedged, conditions, seed=options.seed)


BENCH: Final = Bench(
    name="fanout",
    summary="a model over four shards and in one process; one replica slow, with second calls",
    run=_run,
)
