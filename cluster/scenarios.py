"""What is to be simulated, in words: units and their costs, devices, routers, requests.

Turns a `Scenario` into what `batching.simulation` takes. Decides nothing about batches, and runs
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import inf
from pathlib import Path
from random import Random
from typing import Final, TypeAlias

import msgspec

from batching import DEFAULT_POLICY, LEAD_S, Batcher, Ladder, LaneKey, learn_buckets, policy_named
from batching.costs import SizeCost
from batching.errors import InvalidArgument
from batching.europarl import EUROPARL_LENGTHS
from batching.simulation import (
    Arrival,
    Durations,
    HostCosts,
    Network,
    SimulatedCluster,
    SimulatedLane,
    noisy,
)
from batching.virtual import varied
from batching.workloads import (
    gamma,
    maf_style,
    merged,
    power_law,
    trace,
    with_criticalities,
    with_lengths,
)
from cluster.measured import SavedCosts

__all__ = ["Scenario", "Stage"]

#: Costs of a unit: by shape, by size.
_Shapes: TypeAlias = Mapping[tuple[int, ...], Mapping[int, SizeCost]]

#: Tokens of a row for which `Scenario.beta_ms` stands, where rows have lengths: Europarl's mean.
_MEAN_LENGTH: Final = 28.9
_LENGTH_BUCKETS: Final = 8


class Scenario(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is simulated.

    Attributes:
        policy: a name of `batching.policies`.
        models: how many servables, each with a unit of its own, or all with one.
        shared: whether they use one unit; of a chain, its first.
        chain: how many units each request goes through, one after the other.
        devices: how many.
        replicas: on how many of them each unit is; 0 for all.
        routers: how many; 0 for clients within the device's process.
        delay_ms: mean time of a frame between router and device.
        delay_cv: coefficient of variation of that.
        router_us: of a router, for each request and each answer.
        host_us: of a device's event loop, for each request and each answer.
        batch_us: of it, for each frame and each batch.
        rate: requests a second of all together.
        power: exponent of the power law by which the rate falls from servable to servable.
        seconds: how long requests come.
        cv: coefficient of variation of the time between two requests; 1 is Poisson.
        maf: whether rates also change every ten seconds, in the style of traces of functions.
        slo_ms: deadline of each request; 0 for none.
        flood: factor on the last servable's rate.
        criticalities: shares of the requests that have another criticality than the default, by
            its name.
        trace: requests from a file of comma-separated values instead.
        lengths: whether rows have the lengths of Europarl's sentences.
        buckets: lengths that are compiled; none for eight that are learned.
        alpha_ms: cost of a batch without rows, where no costs are given.
        beta_ms: cost of each row; with lengths, of 28.9 tokens.
        largest: the largest batch; sizes are its powers of two.
        noise: coefficient of variation of what batches take; None for what was measured.
        seed: of everything that is drawn.
    """

    policy: str = DEFAULT_POLICY
    models: int = 1
    shared: bool = False
    chain: int = 1
    devices: int = 1
    replicas: int = 0
    routers: int = 0
    delay_ms: float = 0.0
    delay_cv: float = 0.0
    router_us: float = 0.0
    host_us: float = 0.0
    batch_us: float = 0.0
    rate: float = 1000.0
    power: float = 0.0
    seconds: float = 10.0
    cv: float = 1.0
    maf: bool = False
    slo_ms: float = 50.0
    flood: float = 1.0
    criticalities: Mapping[str, float] = {}
    trace: str = ""
    lengths: bool = False
    buckets: tuple[int, ...] = ()
    alpha_ms: float = 4.0
    beta_ms: float = 0.25
    largest: int = 64
    noise: float | None = None
    seed: int = 0


class Stage:
    """A scenario with its costs: who serves, and what comes.

    Args:
        scenario: what.
        costs: what was measured; units take the measured ones in turn. None for a line.

    Attributes:
        cluster: devices, routers and what they take.
        durations: what batches really take.

    Raises:
        InvalidArgument: the scenario cannot be meant; says why.
    """

    def __init__(self, scenario: Scenario, costs: SavedCosts | None = None) -> None:
        if min(scenario.models, scenario.largest, scenario.chain, scenario.devices) < 1:
            raise InvalidArgument("a scenario needs a model, a unit, a device and batches of a row")
        if not 0 <= scenario.replicas <= scenario.devices or scenario.routers < 0:
            raise InvalidArgument("replicas are as many as devices at most, and routers 0 or more")
        policy_named(scenario.policy)
        self._scenario = scenario
        self._lines = _lines_of(scenario.trace) if scenario.trace else None
        self._owners = _owners_of(self._lines) or [f"model-{n}" for n in range(scenario.models)]
        self._tables = _by_unit(costs) if costs else {"unit": _line(scenario)}
        self._units = self._place_costs()
        self.cluster = SimulatedCluster(
            devices=self._place(),
            # As a device actor has it: the baselines refuse nothing when it comes.
            batcher=lambda: Batcher(
                policy_named(scenario.policy),
                lead_s=LEAD_S,
                admission=scenario.policy == DEFAULT_POLICY,
            ),
            routers=scenario.routers,
            network=Network(
                request_s=scenario.router_us * 1e-6,
                delay_s=scenario.delay_ms / 1000,
                delay_cv=scenario.delay_cv,
            ),
            host=HostCosts(
                frame_s=scenario.batch_us * 1e-6,
                request_s=scenario.host_us * 1e-6,
                batch_s=scenario.batch_us * 1e-6,
                answer_s=scenario.host_us * 1e-6,
            ),
        )
        self.durations: Durations = (
            self._measured_durations
            if scenario.noise is None
            else noisy(self.mean_of, scenario.noise)
        )

    def mean_of(self, key: LaneKey, size: int) -> float:
        """Mean seconds of a batch."""
        return self._units[key.unit][key.shape][size].mean_s

    def arrivals(self) -> Iterator[Arrival]:
        """The requests, drawn anew and always the same.

        Raises:
            InvalidArgument: the trace is none.
        """
        scenario = self._scenario
        budget_s = scenario.slo_ms / 1000 if scenario.slo_ms > 0 else inf
        if self._lines is not None:
            found = trace(self._lines, self._lane_of, budget_s=budget_s)
        else:
            found = self._drawn(budget_s)
            if scenario.lengths:
                found = with_lengths(found, self._lane_of, EUROPARL_LENGTHS, seed=scenario.seed)
            if scenario.criticalities:
                found = with_criticalities(found, scenario.criticalities, seed=scenario.seed)
        for arrival in found:
            yield arrival._replace(then=self._then(arrival)) if scenario.chain > 1 else arrival

    def _drawn(self, budget_s: float) -> Iterator[Arrival]:
        scenario = self._scenario
        lanes = {owner: self._lane_of(owner, 0) for owner in self._owners}
        if scenario.maf:
            return maf_style(
                lanes, scenario.rate, scenario.seconds,
                exponent=scenario.power, cv=scenario.cv, budget_s=budget_s, seed=scenario.seed,
            )  # fmt: skip
        rates = power_law(scenario.rate, len(lanes), scenario.power)
        rates[-1] *= scenario.flood
        return merged(
            *(
                gamma(
                    lane, owner, rate, scenario.seconds,
                    cv=scenario.cv, budget_s=budget_s, seed=scenario.seed,
                )
                for (owner, lane), rate in zip(lanes.items(), rates, strict=True)
            )
        )  # fmt: skip

    # Units and where they are

    def _unit(self, owner: str, stage: int) -> str:
        if stage == 0:
            return "shared" if self._scenario.shared else owner
        return f"{owner}/{stage + 1}"

    def _then(self, arrival: Arrival) -> tuple[LaneKey, ...]:
        shape = arrival.lane.shape
        return tuple(
            LaneKey(self._unit(arrival.owner, stage), shape)
            for stage in range(1, self._scenario.chain)
        )

    def _place_costs(self) -> dict[str, _Shapes]:
        tables = list(self._tables.values())
        units = dict.fromkeys(
            self._unit(owner, stage)
            for owner in self._owners
            for stage in range(self._scenario.chain)
        )
        return {unit: tables[number % len(tables)] for number, unit in enumerate(units)}

    def _place(self) -> list[list[SimulatedLane]]:
        scenario = self._scenario
        devices: list[list[SimulatedLane]] = [[] for _ in range(scenario.devices)]
        for number, (unit, shapes) in enumerate(self._units.items()):
            for replica in range(scenario.replicas or scenario.devices):
                device = devices[(number + replica) % scenario.devices]
                device += [
                    SimulatedLane(
                        key=LaneKey(unit, shape), ladder=Ladder(sorted(sizes)), known=sizes
                    )
                    for shape, sizes in shapes.items()
                ]
        return devices

    def _lane_of(self, owner: str, length: int) -> LaneKey:
        unit = self._unit(owner, 0)
        shapes = self._units[unit]
        if not length or () in shapes:
            # Of a unit whose rows have lengths, those that have none are as long as can be.
            return LaneKey(unit, max(shapes))
        ladder = Ladder(sorted(shape[0] for shape in shapes))
        return LaneKey(unit, (ladder.bucket_of(min(length, ladder.largest)),))

    def _measured_durations(self, key: LaneKey, size: int, random: Random) -> float:
        cost = self._units[key.unit][key.shape][size]
        return cost.mean_s * varied((cost.bound_s - cost.mean_s) / 2.0 / cost.mean_s, random)


def _by_unit(costs: SavedCosts) -> dict[str, _Shapes]:
    units: dict[str, dict[tuple[int, ...], Mapping[int, SizeCost]]] = {}
    for key, sizes in costs.items():
        if len(key.shape) > 1:
            raise InvalidArgument(f"unit {key.unit} has {len(key.shape)} lengths; one is simulated")
        units.setdefault(key.unit, {})[key.shape] = sizes
    return dict(units)


def _line(scenario: Scenario) -> _Shapes:
    if not (scenario.alpha_ms >= 0 and scenario.beta_ms >= 0):
        raise InvalidArgument("costs are not negative")
    sizes = [1 << power for power in range(scenario.largest.bit_length())]
    if not scenario.lengths:
        return {(): _sizes(scenario, sizes, 1.0)}
    buckets = scenario.buckets or learn_buckets(EUROPARL_LENGTHS, count=_LENGTH_BUCKETS).sizes
    return {(length,): _sizes(scenario, sizes, length / _MEAN_LENGTH) for length in buckets}


def _sizes(scenario: Scenario, sizes: list[int], factor: float) -> dict[int, SizeCost]:
    found: dict[int, SizeCost] = {}
    for size in sizes:
        seconds = (scenario.alpha_ms + scenario.beta_ms * factor * size) / 1000
        if not seconds > 0:
            raise InvalidArgument("a batch takes some time: alpha or beta must be positive")
        found[size] = SizeCost(seconds, seconds, 1)
    return found


def _lines_of(file: str) -> list[str]:
    try:
        return Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{file} cannot be read: {error}") from None


def _owners_of(lines: list[str] | None) -> list[str]:
    """The owners that a trace names, in the order of their first request."""
    if lines is None:
        return []
    found: dict[str, None] = {}
    for arrival in trace(lines, lambda owner, _: LaneKey(owner)):
        found[arrival.owner] = None
    return list(found)
