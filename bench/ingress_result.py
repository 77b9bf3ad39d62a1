"""What ``ingress`` tells: ratios of contenders within rounds, tables, samples, a plot.

A ratio whose peer was absent is not told at all, so that no mark is met by leaving one out. Knows
nothing of servers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from bench.load import Outcome
from bench.report import Cell, Figure, Plot, Samples, Series, Table, histogram_samples
from bench.stats import Estimate, Histogram, bootstrap, paired_ratio

__all__ = ["Outcomes", "Part", "estimates", "plot", "pooled", "ratios", "samples", "tables"]

#: Contender and scene (as ``mlp_c32``) to one outcome a round. Those of one cast ran side by side.
Outcomes = Mapping[tuple[str, str], Sequence[Outcome]]

_PERCENTILES: Final = (50.0, 99.0)
_RAY: Final = ("ray-serve", "ray-serve-haproxy")
#: Everybody else's servers, of whom the best is sought; ours are the other names.
_PEERS: Final = (*_RAY, "mosec", "litserve", "triton")

#: Key: the figure, the scene, ours, and those of whom the best is the other side.
_COMPARED: Final[Mapping[str, tuple[str, str, str, tuple[str, ...]]]] = {
    "rps32_vs_mosec": ("rps", "mlp_c32", "product", ("mosec",)),
    "rps32_vs_litserve": ("rps", "mlp_c32", "product", ("litserve",)),
    "rps32_vs_triton": ("rps", "mlp_c32", "product", ("triton",)),
    "rps32_vs_ray_serve_best": ("rps", "mlp_c32", "product", _RAY),
    "p99_32_vs_best_peer": ("p99_us", "mlp_c32", "product", _PEERS),
    "p50_1_vs_triton": ("p50_us", "mlp_c1", "product", ("triton",)),
    "p50_1_vs_ray_serve_best": ("p50_us", "mlp_c1", "product", _RAY),
    "binary_vs_own_json": ("rps", "mlp_c32", "product-binary", ("product",)),
    "serve_door_vs_noop_replica": ("rps", "mlp_c32", "product-serve", ("noop-serve",)),
    "mlp512_rps32_vs_best_peer": ("rps", "mlp512_c32", "product", _PEERS),
    "mb_in_out_vs_triton": ("rps", "megabyte_c4", "product-binary", ("triton-binary",)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What a part found that has no peers.

    Attributes:
        ratios: what marks are set on.
        figures: everything else.
        table: for people.
        notes: what a reader must know before believing it.
    """

    ratios: dict[str, float]
    figures: dict[str, Figure]
    table: Table
    notes: tuple[str, ...] = ()


def figures_of(outcomes: Sequence[Outcome]) -> dict[str, list[float]]:
    """Every figure, one a round."""
    found = {"rps": [outcome.rate for outcome in outcomes]}
    for percent in _PERCENTILES:
        found[f"p{percent:g}_us"] = [each.latency_us.percentile(percent) for each in outcomes]
    return found


def ratios(casts: Sequence[Outcomes], *, seed: int) -> dict[str, Estimate]:
    """Ours over the best of the others, paired by round of one cast; keys that were measured.

    The best is the one with the best median: of latencies the lowest, of rates the highest.
    """
    found = {}
    for key, (figure, scene, ours, others) in _COMPARED.items():
        pairs = [
            (figures_of(cast[ours, scene])[figure], figures_of(cast[name, scene])[figure])
            for cast in casts
            for name in others
            if (ours, scene) in cast and (name, scene) in cast
        ]
        if not pairs:
            continue
        medians = [bootstrap(theirs, seed=seed).value for _, theirs in pairs]
        best = (max if figure == "rps" else min)(range(len(pairs)), key=medians.__getitem__)
        found[key] = paired_ratio(*pairs[best], seed=seed)
    return found


def pooled(casts: Sequence[Outcomes]) -> Outcomes:
    """All rounds of each contender, whoever else was there."""
    found: dict[tuple[str, str], list[Outcome]] = {}
    for cast in casts:
        for key, measured in cast.items():
            found.setdefault(key, []).extend(measured)
    return found


def estimates(outcomes: Outcomes, *, seed: int) -> dict[str, Estimate]:
    """Every figure's median over the rounds, as ``CONTENDER_SCENE_FIGURE``."""
    return {
        f"{name}_{scene}_{figure}": bootstrap(values, seed=seed)
        for (name, scene), measured in outcomes.items()
        for figure, values in figures_of(measured).items()
    }


def tables(
    casts: Sequence[Outcomes], compared: Mapping[str, Estimate], *, seed: int
) -> list[Table]:
    """One table of all contenders in all scenes, cast by cast, and one of the ratios."""
    if not casts:
        return []
    columns = tuple(figures_of(next(iter(casts[0].values()))))
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (
            scene,
            name,
            *(bootstrap(values, seed=seed).value for values in figures_of(measured).values()),
            sum(outcome.failed for outcome in measured),
        )
        for cast in casts
        for (name, scene), measured in sorted(cast.items(), key=lambda item: item[0][1])
    )
    every = Table(
        title="One row a request, each peer beside the product: medians over rounds (cN: "
        "N connections)",
        columns=("model", "server", *columns, "errors"),
        rows=rows,
    )
    ratio = Table(
        title="Ratios: the median of the rounds' ratios, [its 95 % bootstrap interval]",
        columns=("ratio", "value"),
        rows=tuple(compared.items()),
    )
    return [every, ratio] if compared else [every]


def samples(outcomes: Outcomes) -> dict[str, Samples]:
    """Every latency of every round, and the rounds' rates."""
    rates = [
        (name, scene, number, outcome.rate, outcome.answered, outcome.failed)
        for (name, scene), found in outcomes.items()
        for number, outcome in enumerate(found)
    ]
    columns = ("server", "scene", "round", "rps", "answered", "failed")
    return {
        "rounds": Samples(columns=columns, rows=rates),
        **{
            f"latency-{name}-{scene}-{number}": histogram_samples(
                outcome.latency_us, unit="microseconds"
            )
            for (name, scene), found in outcomes.items()
            for number, outcome in enumerate(found)
        },
    }


def plot(outcomes: Outcomes) -> Plot | None:
    """Latencies of one scene by percentile, one line a contender: 32 connections, if measured."""
    scenes = {scene for _, scene in outcomes}
    if not scenes:
        return None
    scene = min(scenes, key=lambda each: (not each.endswith("_c32"), each))
    percents = tuple(float(percent) for percent in range(1, 100))
    latencies = {
        name: Histogram.pooled([outcome.latency_us for outcome in found])
        for (name, measured), found in outcomes.items()
        if measured == scene
    }
    return Plot(
        title=f"Latency by percentile, {scene}, all rounds",
        x_label="percentile",
        y_label="microseconds",
        log_y=True,
        series=tuple(
            Series(label=name, x=percents, y=tuple(each.percentile(at) for at in percents))
            for name, each in latencies.items()
        ),
    )
