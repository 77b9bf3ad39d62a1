"""``ingress-floor``: the product's direct REST door against the bare prototype of the same shape.

Both serve the same MLP with the same parameters and get the same bytes, on the same processors,
in the same run. The prototype has no validation, versions, metrics or deadlines, so the ratio is
the price of being a product. The raw floor, which has not even frames, is measured in the same
rounds of a full run and shown beside: no mark is set against what no server could be, but how far
away it is must be seen.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from bench.floor import Prototype, Raw, noop, predict_request
from bench.load import Outcome, closed_loop, tool
from bench.mlp import rows
from bench.peers import Peer, Scenario, compare_answers, measure
from bench.product import Product
from bench.registry import Bench, Options
from bench.report import (
    Figure,
    Plot,
    Result,
    Samples,
    Series,
    Table,
    histogram_samples,
    machine,
    show,
)
from bench.stats import Estimate, Histogram, bootstrap, paired_ratio

__all__ = ["BENCH"]

_PERCENTILES: Final = (50.0, 90.0, 99.0, 99.9)
#: Below this, the load generator may be what is measured.
_HEADROOM_MIN: Final = 1.2
_BUSY_SHARE_MAX: Final = 0.25

_TOOLS: Final[Mapping[str, str]] = {
    "wrk": "Load by wrk -t1, on the same processors as the servers; nothing is pinned.",
    "own": "wrk is not installed (apt-get install wrk): load by our own, slower generator, on the "
    "same processors as the servers; nothing is pinned.",
}

Outcomes = Mapping[tuple[str, str], Sequence[Outcome]]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--floor-only", action="store_true", help="measure the floors alone; no ratios"
    )


def _run(options: Options) -> Result:
    # Before the load, so that the load average is what others do.
    conditions = machine()
    duration_s, warm_up_s = (1.0, 0.3) if options.quick else (5.0, 1.0)
    scenarios = tuple(
        Scenario(
            key=f"c{connections}",
            connections=connections,
            duration_s=duration_s,
            warm_up_s=warm_up_s,
        )
        for connections in (1, 32)
    )
    peers = _peers(options)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shardserve-")))
        urls = {}
        for peer in peers:
            own = folder / peer.name
            own.mkdir()
            urls[peer.name] = stack.enter_context(peer.running(own))
        equal = compare_answers(peers, urls, seed=options.seed)
        with noop(folder) as url:
            request = predict_request(rows(1, options.seed))
            ceiling = closed_loop(url, [request], connections=32, duration_s=duration_s)
        rounds = options.rounds_or(quick=3, full=7)
        outcomes = measure(peers, urls, scenarios, rounds=rounds, seed=options.seed)
    figures: dict[str, Figure] = {
        "answers_bit_equal": equal,
        "generator": tool(),
        "generator_ceiling_c32_rps": ceiling.rate,
        "quick": options.quick,
        "seed": options.seed,
        "machine": conditions,
    }
    return _result(outcomes, figures, seed=options.seed)


def _peers(options: Options) -> list[Peer]:
    """The contenders; rounds go forth and back, so the two that are compared are neighbours."""
    floor, product = Prototype(options.seed), Product(options.seed)
    if options.own.floor_only:
        return [Raw(options.seed), floor]
    if options.quick:
        # Within its minute there is no time for a third, which no mark needs.
        return [floor, product]
    return [Raw(options.seed), floor, product]


def _result(outcomes: Outcomes, conditions: Mapping[str, Figure], *, seed: int) -> Result:
    """All that is told of the outcomes; what compares, only where both were measured."""
    estimates: dict[str, Estimate] = {}
    for (peer, scenario), measured in outcomes.items():
        for name, values in _figures_of(measured).items():
            estimates[f"{peer}_{scenario}_{name}"] = bootstrap(values, seed=seed)
    ratios = _ratios(outcomes, Prototype.name, seed=seed)
    beside = _ratios(outcomes, Raw.name, seed=seed)
    ceiling = conditions["generator_ceiling_c32_rps"]
    assert isinstance(ceiling, float)
    headroom = ceiling / estimates["prototype_c32_rps"].value
    figures: dict[str, Figure] = {
        **{name: estimate.value for name, estimate in (estimates | beside).items()},
        "intervals": {
            name: [estimate.low, estimate.high]
            for name, estimate in (estimates | ratios | beside).items()
        },
        "errors": {f"{p}_{s}": sum(o.failed for o in found) for (p, s), found in outcomes.items()},
        "rounds": estimates["prototype_c32_rps"].rounds,
        "generator_headroom": headroom,
        **conditions,
    }
    return Result(
        bench=BENCH.name,
        ratios={name: estimate.value for name, estimate in ratios.items()},
        figures=figures,
        tables=_tables(outcomes, estimates, ratios),
        samples=_samples(outcomes),
        plot=_plot(outcomes),
        notes=_notes(figures, beside),
    )


def _figures_of(outcomes: Sequence[Outcome]) -> dict[str, list[float]]:
    figures = {"rps": [outcome.rate for outcome in outcomes]}
    for percent in _PERCENTILES:
        name = f"p{percent:g}_us".replace(".", "")
        figures[name] = [outcome.latency_us.percentile(percent) for outcome in outcomes]
    return figures


def _ratios(outcomes: Outcomes, floor: str, *, seed: int) -> dict[str, Estimate]:
    """The product against a floor, paired by round: what a slow second costs, it costs both."""
    if any((peer, "c32") not in outcomes for peer in ("product", floor)):
        return {}
    many = {peer: _figures_of(outcomes[peer, "c32"]) for peer in ("product", floor)}
    one = {peer: _figures_of(outcomes[peer, "c1"]) for peer in ("product", floor)}
    return {
        f"rps32_vs_{floor}": paired_ratio(many["product"]["rps"], many[floor]["rps"], seed=seed),
        f"p50_1_vs_{floor}": paired_ratio(
            one["product"]["p50_us"], one[floor]["p50_us"], seed=seed
        ),
    }


def _tables(
    outcomes: Outcomes, estimates: Mapping[str, Estimate], ratios: Mapping[str, Estimate]
) -> tuple[Table, ...]:
    names = tuple(_figures_of(next(iter(outcomes.values()))))
    measured = Table(
        title="MLP 64-64-64, JSON, one row a request: medians over rounds",
        columns=("server", "connections", *names, "errors"),
        rows=tuple(
            (
                peer,
                scenario.removeprefix("c"),
                *(estimates[f"{peer}_{scenario}_{name}"].value for name in names),
                sum(outcome.failed for outcome in found),
            )
            for (peer, scenario), found in outcomes.items()
        ),
    )
    if not ratios:
        return (measured,)
    compared = Table(
        title="Ratios: the median of the rounds' ratios, [its 95 % bootstrap interval]",
        columns=("ratio", "value"),
        rows=tuple(ratios.items()),
    )
    return (measured, compared)


def _samples(outcomes: Outcomes) -> dict[str, Samples]:
    """Every latency of every round, and the rounds' rates."""
    rates = [
        (peer, scenario, number, outcome.rate, outcome.answered, outcome.failed)
        for (peer, scenario), found in outcomes.items()
        for number, outcome in enumerate(found)
    ]
    columns = ("server", "scenario", "round", "rps", "answered", "failed")
    return {
        "rounds": Samples(columns=columns, rows=rates),
        **{
            f"latency-{peer}-{scenario}-{number}": histogram_samples(
                outcome.latency_us, unit="microseconds"
            )
            for (peer, scenario), found in outcomes.items()
            for number, outcome in enumerate(found)
        },
    }


def _plot(outcomes: Outcomes) -> Plot:
    percents = tuple(float(percent) for percent in range(1, 100))
    return Plot(
        title="Latency by percentile, all rounds",
        x_label="percentile",
        y_label="microseconds",
        log_y=True,
        series=tuple(
            Series(
                label=f"{peer}, connections: {scenario.removeprefix('c')}",
                x=percents,
                y=tuple(pooled.percentile(percent) for percent in percents),
            )
            for (peer, scenario), found in outcomes.items()
            for pooled in (Histogram.pooled([outcome.latency_us for outcome in found]),)
        ),
    )


def _notes(figures: Mapping[str, Figure], beside: Mapping[str, Estimate]) -> tuple[str, ...]:
    """What a reader must know before believing the tables."""
    conditions, headroom = figures["machine"], figures["generator_headroom"]
    assert isinstance(conditions, Mapping)
    assert isinstance(headroom, float)
    notes = [_TOOLS[str(figures["generator"])]]
    if figures["answers_bit_equal"]:
        notes.append("The servers' answers agree bit for bit.")
    else:
        notes.append("The servers' answers agree within 1e-5, not bit for bit.")
    if beside:
        told = ", ".join(f"{name} {show(estimate)}" for name, estimate in beside.items())
        notes.append(f"Raw, the harder floor, is shown and has no marks: {told}.")
    if headroom < _HEADROOM_MIN:
        notes.append(
            f"The generator reaches only {headroom:.2f} times the prototype's rate on a server "
            "that does nothing: it may be what limits both, and the ratio flatters."
        )
    load, cpus = conditions.get("load_1min"), conditions.get("cpus")
    if isinstance(load, float) and isinstance(cpus, int) and load > _BUSY_SHARE_MAX * cpus:
        notes.append(
            f"The machine was busy before the run (load {load:g} on {cpus} processors): read "
            "ratios, not rates."
        )
    return tuple(notes)


BENCH: Final = Bench(
    name="ingress-floor",
    summary="the direct REST door against a bare two-process prototype",
    run=_run,
    add_arguments=_add_arguments,
)
