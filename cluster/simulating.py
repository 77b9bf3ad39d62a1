"""``shardserve simulate``: a workload on imagined devices, with the scheduler that really decides.

Reads what is to be simulated from the command line's words, runs `batching.simulation`, and tells
what came of it in a table and, if asked, as JSON. Decides nothing about batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import inf
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from batching import DEFAULT_POLICY, Ladder, LaneKey, policy_named
from batching.errors import InvalidArgument
from batching.simulation import Arrival, Report, SimulatedLane, simulate
from batching.workloads import gamma, merged, power_law, trace

__all__ = ["Costs", "Scenario", "costs_in", "costs_of", "run_scenario", "summary"]

#: Seconds of a batch by its size, for every lane.
Costs: TypeAlias = Mapping[str, Mapping[int, float]]


class Scenario(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is simulated.

    Attributes:
        policy: a name of `batching.policies`.
        models: how many servables, each with a unit of its own, or all with one.
        shared: whether they use one unit.
        rate: requests a second of all together.
        power: exponent of the power law by which the rate falls from servable to servable.
        seconds: how long requests come.
        cv: coefficient of variation of the time between two requests; 1 is Poisson.
        slo_ms: deadline of each request; 0 for none.
        flood: factor on the last servable's rate.
        trace: requests from a file of comma-separated values instead.
        alpha_ms: cost of a batch without rows, where no costs are given.
        beta_ms: cost of each row.
        largest: the largest batch; sizes are its powers of two.
        noise: coefficient of variation of what batches take.
        seed: of everything that is drawn.
    """

    policy: str = DEFAULT_POLICY
    models: int = 1
    shared: bool = False
    rate: float = 1000.0
    power: float = 0.0
    seconds: float = 10.0
    cv: float = 1.0
    slo_ms: float = 50.0
    flood: float = 1.0
    trace: str = ""
    alpha_ms: float = 4.0
    beta_ms: float = 0.25
    largest: int = 64
    noise: float = 0.0
    seed: int = 0


def costs_of(path: Path) -> Costs:
    """The table of costs in a file; see `costs_in`.

    Raises:
        InvalidArgument: it cannot be read, or is not such a table.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InvalidArgument(f"{path} is no table of costs: {error}") from None
    return costs_in(text, str(path))


def costs_in(text: str | bytes, name: str) -> Costs:
    """A table of costs: ``{"unit": {"1": seconds, "8": seconds}}`` as JSON.

    Args:
        text: the JSON.
        name: what it was read from, for the error.

    Raises:
        InvalidArgument: it is not such a table.
    """
    try:
        found = msgspec.json.decode(text, type=dict[str, dict[int, float]])
    except (msgspec.DecodeError, ValueError) as error:
        raise InvalidArgument(f"{name} is no table of costs: {error}") from None
    if not found or not all(
        sizes and min(sizes) > 0 and min(sizes.values()) > 0 for sizes in found.values()
    ):
        raise InvalidArgument(f"{name}: every unit needs sizes, and every size takes some time")
    return found


def run_scenario(scenario: Scenario, costs: Costs | None = None) -> Report:
    """Simulate.

    Args:
        scenario: what.
        costs: seconds by unit and size; servables take units in turn. None for a line.

    Raises:
        InvalidArgument: the scenario cannot be meant; says why.
    """
    policy = policy_named(scenario.policy)
    if scenario.models < 1 or scenario.largest < 1:
        raise InvalidArgument("a scenario needs a model and a batch of one row")
    owners = [f"model-{number}" for number in range(scenario.models)]
    tables = list((costs or {"unit": _line(scenario)}).values())
    keys = [LaneKey("shared" if scenario.shared else owner) for owner in owners]
    seconds = {key: tables[n % len(tables)] for n, key in enumerate(dict.fromkeys(keys))}
    lanes = [SimulatedLane(key=key, ladder=Ladder(sorted(seconds[key]))) for key in seconds]
    return simulate(
        policy,
        lanes,
        _arrivals(scenario, dict(zip(owners, keys, strict=True))),
        lambda key, bucket: seconds[key][bucket],
        noise=scenario.noise,
        seed=scenario.seed,
    )


def summary(report: Report) -> dict[str, Any]:
    """A report as plain data: of the whole and of every servable."""
    return {
        "goodput": round(report.goodput, 1),
        "busy": round(report.busy_s / max(report.seconds, 1e-9), 4),
        "rows_a_batch": round(report.rows / max(report.batches, 1), 2),
        "padding": round(report.padded_rows / max(report.rows + report.padded_rows, 1), 4),
        "servables": {
            owner: {
                "offered": outcome.offered,
                "attainment": round(outcome.attainment, 4),
                "goodput": round(outcome.good / max(report.seconds, 1e-9), 1),
                "refused": outcome.refused,
                "shed": outcome.shed,
                "expired": outcome.expired,
                "p50_ms": round(outcome.percentile(50) * 1000, 3),
                "p99_ms": round(outcome.percentile(99) * 1000, 3),
            }
            for owner, outcome in sorted(report.owners.items())
        },
    }


def _line(scenario: Scenario) -> dict[int, float]:
    sizes = [1 << power for power in range(scenario.largest.bit_length())]
    sizes = [size for size in sizes if size <= scenario.largest]
    return {size: (scenario.alpha_ms + scenario.beta_ms * size) / 1000 for size in sizes}


def _arrivals(scenario: Scenario, lanes: Mapping[str, LaneKey]) -> Iterator[Arrival]:
    if scenario.trace:
        try:
            lines = Path(scenario.trace).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidArgument(f"{scenario.trace} cannot be read: {error}") from None
        return trace(lines, lanes)
    budget_s = scenario.slo_ms / 1000 if scenario.slo_ms > 0 else inf
    rates = power_law(scenario.rate, len(lanes), scenario.power)
    rates[-1] *= scenario.flood
    loads: Iterable[Iterator[Arrival]] = [
        gamma(
            lane,
            owner,
            rate,
            scenario.seconds,
            cv=scenario.cv,
            budget_s=budget_s,
            seed=scenario.seed,
        )
        for (owner, lane), rate in zip(lanes.items(), rates, strict=True)
    ]
    return merged(*loads)
