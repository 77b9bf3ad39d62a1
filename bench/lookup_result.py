"""What ``lookup`` tells of tables behind a router: ratios, tables and the plot of its second half.

Does not know how anything was measured.
"""

from __future__ import annotations

from collections.abc import Mapping

from bench.lookup_routed import BATCHES, CONTENDERS, LENGTH, TABLES, WINDOW, Outcomes
from bench.report import Cell, Figure, Plot, Samples, Series, Table
from bench.stats import Estimate, bootstrap, paired_ratio

__all__ = ["figures_of", "plot_of", "ratios_of", "samples_of", "tables_of"]

_IN_PROCESS, _ROUTED, _PARTS, _NAIVE, _BY_TABLE = CONTENDERS
_LARGE = max(BATCHES)


def ratios_of(outcomes: Outcomes, seed: int) -> dict[str, Estimate]:
    """The ratios that marks are set on, and some beside them."""

    def per_core(who: str, figure: str) -> Estimate:
        return paired_ratio(
            [case.cpu_ms for case in outcomes[_IN_PROCESS, _LARGE]],
            [getattr(case, figure) for case in outcomes[who, _LARGE]],
            seed=seed,
        )

    found = {
        "router4_per_core_vs_in_process": per_core(_ROUTED, "cpu_ms"),
        "router4_one_at_a_time_per_core_vs_in_process": per_core(_ROUTED, "one_cpu_ms"),
        "router4_16_partitions_per_core_vs_in_process": per_core(_PARTS, "cpu_ms"),
    }
    for batch in BATCHES:
        for who, name in ((_NAIVE, "naive_ray"), (_BY_TABLE, "naive_ray_by_table")):
            found[f"vs_{name}_batch{batch}"] = paired_ratio(
                [case.one_ms for case in outcomes[who, batch]],
                [case.one_ms for case in outcomes[_ROUTED, batch]],
                seed=seed,
            )
    return found


def figures_of(outcomes: Outcomes, ratios: Mapping[str, Estimate], seed: int) -> dict[str, Figure]:
    """Medians of everything, and the ratios' intervals."""
    found: dict[str, Figure] = {name: [r.value, r.low, r.high] for name, r in ratios.items()}
    for (who, batch), cases in outcomes.items():
        for figure in ("one_ms", "cpu_ms", "router_ms", "one_cpu_ms"):
            values = [getattr(case, figure) for case in cases]
            if any(values):
                found[f"{who}_batch{batch}_{figure}"] = bootstrap(values, seed=seed).value
    return found


def tables_of(outcomes: Outcomes, seed: int) -> tuple[Table, ...]:
    """A table for each batch."""

    def cell(who: str, batch: int, figure: str) -> Cell:
        values = [getattr(case, figure) for case in outcomes[who, batch]]
        return bootstrap(values, seed=seed) if any(values) else ""

    figures = ("one_ms", "one_cpu_ms", "cpu_ms", "router_ms")
    return tuple(
        Table(
            title=f"milliseconds a request of {batch} x {TABLES} tables x {LENGTH} int32 ids",
            columns=(
                "", "one at a time", "its processors' time", f"the same, {WINDOW} under way",
                "of it the router",
            ),
            rows=tuple(
                (who, *(cell(who, batch, figure) for figure in figures)) for who in CONTENDERS
            ),
        )
        for batch in BATCHES
    )  # fmt: skip


def samples_of(outcomes: Outcomes) -> Samples:
    """Every round."""
    return Samples(
        columns=("contender", "batch", "round", "one_ms", "cpu_ms", "router_ms", "one_cpu_ms"),
        rows=[
            (*key, number, case.one_ms, case.cpu_ms, case.router_ms, case.one_cpu_ms)
            for key, cases in outcomes.items()
            for number, case in enumerate(cases)
        ],
    )


def plot_of(outcomes: Outcomes) -> Plot:
    """Every round of the larger batch, as processor time."""
    shown = {
        "in process": [case.cpu_ms for case in outcomes[_IN_PROCESS, _LARGE]],
        f"routed, {WINDOW} under way": [case.cpu_ms for case in outcomes[_ROUTED, _LARGE]],
        "routed, one at a time": [case.one_cpu_ms for case in outcomes[_ROUTED, _LARGE]],
        "16 partitions": [case.cpu_ms for case in outcomes[_PARTS, _LARGE]],
    }
    return Plot(
        title=f"Processor time of a request: {_LARGE} x {TABLES} tables x {LENGTH} ids",
        x_label="round",
        y_label="milliseconds of all processes",
        series=tuple(
            Series(label=label, x=tuple(map(float, range(len(values)))), y=tuple(values))
            for label, values in shown.items()
        ),
    )
