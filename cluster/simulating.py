"""``shardserve simulate``: a workload on imagined devices, with the scheduler that really decides.

Runs scenarios and tells what came of them, in tables, as plain data and, for several loads, as a
plot. Decides nothing about batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

from msgspec.structs import replace

from batching.allowance import CRITICALITIES
from batching.errors import FailedPrecondition, InvalidArgument
from batching.outcomes import Outcome
from batching.simulation import Report, simulate_cluster
from cluster.measured import SavedCosts
from cluster.scenarios import Scenario, Stage

__all__ = ["LOADS", "Sweep", "draw", "run_scenario", "summary", "sweep"]

#: What a plot goes over where nothing else is said, as factors on the rate.
LOADS: Final = (0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5)

#: By policy, then by load: a summary.
Sweep: TypeAlias = Mapping[str, Mapping[float, dict[str, Any]]]


def run_scenario(scenario: Scenario, costs: SavedCosts | None = None) -> Report:
    """Simulate.

    Args:
        scenario: what.
        costs: what was measured; units take the measured ones in turn. None for a line.

    Raises:
        InvalidArgument: the scenario cannot be meant; says why.
    """
    stage = Stage(scenario, costs)
    return simulate_cluster(
        stage.cluster, stage.arrivals(), stage.mean_of, stage.durations, seed=scenario.seed
    )


def sweep(
    scenario: Scenario, policies: Sequence[str], loads: Sequence[float], costs: SavedCosts | None
) -> Sweep:
    """Simulate every policy at every load, on the same requests.

    Args:
        scenario: what, at load 1.
        policies: names of `batching.policies`.
        loads: factors on the rate.
        costs: see `run_scenario`.

    Raises:
        InvalidArgument: the scenario cannot be meant, or a load is not positive.
    """
    if not all(load > 0 for load in loads):
        raise InvalidArgument(f"loads are positive, not {list(loads)}")
    if scenario.trace and list(loads) != [1.0]:
        raise InvalidArgument("a trace is served as it is, at no other load")
    return {
        policy: {
            load: summary(
                run_scenario(replace(scenario, policy=policy, rate=scenario.rate * load), costs)
            )
            for load in loads
        }
        for policy in policies
    }


def summary(report: Report) -> dict[str, Any]:
    """A report as plain data: of the whole, of every servable and of every criticality."""
    seconds = max(report.seconds, 1e-9)
    return {
        "goodput": round(report.goodput, 1),
        "attainment": round(report.attainment, 4),
        "busy": round(report.busy_s / seconds / len(report.devices), 4),
        "rows_a_batch": round(report.rows / max(report.batches, 1), 2),
        "padding": round(report.padded_rows / max(report.rows + report.padded_rows, 1), 4),
        "devices": [
            {
                "busy": round(device.busy_s / seconds, 4),
                "host": round(device.host_s / seconds, 4),
                "batches": device.batches,
                "rows": device.rows,
            }
            for device in report.devices
        ],
        "servables": {
            owner: _told(outcome, seconds) for owner, outcome in sorted(report.owners.items())
        },
        "criticalities": {
            name: _told(report.criticalities[priority], seconds)
            for name, priority in CRITICALITIES.items()
            if priority in report.criticalities
        },
    }


def _told(outcome: Outcome, seconds: float) -> dict[str, Any]:
    return {
        "offered": outcome.offered,
        "attainment": round(outcome.attainment, 4),
        "goodput": round(outcome.good / seconds, 1),
        "refused": outcome.refused,
        "shed": outcome.shed,
        "expired": outcome.expired,
        "late": outcome.late,
        "p50_ms": _ms(outcome.percentile(50)),
        "p99_ms": _ms(outcome.percentile(99)),
    }


def draw(found: Sweep, path: Path) -> None:
    """Draw attainment and goodput over the load, a line for each policy.

    Raises:
        FailedPrecondition: matplotlib is not installed.
        InvalidArgument: the file cannot be written, or its suffix names no format.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FailedPrecondition(
            "--plot needs matplotlib: pip install 'shardserve[bench]'"
        ) from error
    # A bare Figure, not pyplot: no display, no state shared with whoever imported us.
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    for axes, key, label in zip(
        figure.subplots(1, 2),
        ("attainment", "goodput"),
        ("share of requests in time", "requests in time, a second"),
        strict=True,
    ):
        for policy, loads in found.items():
            axes.plot(list(loads), [told[key] for told in loads.values()], label=policy, marker=".")
        axes.set(xlabel="load, as a factor on the rate", ylabel=label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"{path} cannot be drawn: {error}") from None


def _ms(seconds: float) -> float | None:
    """Milliseconds; None for what there is none of, since JSON knows no such number."""
    return None if seconds != seconds else round(seconds * 1000, 3)
