"""Whole clusters in virtual time: what would happen, without it happening.

The very objects that decide in a device actor decide here; only clocks, devices, networks and
requests are made up. Everything follows from a seed: the same run gives the same report, bit for
bit. Books are checked while a run goes on and at its end: every request has one end, and nothing
is left waiting, running or under way.

A batch takes what the durations say, or the mean times a noise of mean one; batches of one device
queue behind each other when several are in flight. What event loops and networks take is nothing
unless it is given. Does not know where workloads come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf
from random import Random
from typing import Final

from batching.batcher import LEAD_S, Batcher
from batching.errors import InvalidArgument
from batching.outcomes import Arrival, DeviceReport, Outcome, Report
from batching.policy import Policy
from batching.values import LaneKey
from batching.virtual import VirtualTime, varied
from batching.virtual_device import (
    CostModel,
    Durations,
    HostCosts,
    SimulatedLane,
    VirtualDevice,
)
from batching.virtual_router import Network, VirtualRouter

__all__ = [
    "Arrival",
    "CostModel",
    "DeviceReport",
    "Durations",
    "HostCosts",
    "Network",
    "Outcome",
    "Report",
    "SimulatedCluster",
    "SimulatedLane",
    "noisy",
    "simulate",
    "simulate_cluster",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedCluster:
    """Devices, and routers before them.

    Attributes:
        devices: the lanes of each device; a lane that several have is served by whichever of them
            a router chooses.
        batcher: makes the batcher of a device.
        routers: how many; each request comes to one of them by chance. 0 for clients that are in
            the process of the device, and for whom late answers are answers.
        network: what routers and the ways to devices take.
        host: what devices need around their batches.
    """

    devices: Sequence[Sequence[SimulatedLane]]
    batcher: Callable[[], Batcher]
    routers: int = 1
    network: Network = field(default_factory=Network)
    host: HostCosts = field(default_factory=HostCosts)


def noisy(means: CostModel, noise: float) -> Durations:
    """Durations that vary about a mean: gamma distributed, with this coefficient of variation."""
    return lambda key, bucket, random: means(key, bucket) * varied(noise, random)


def simulate(
    policy: Policy,
    lanes: Sequence[SimulatedLane],
    arrivals: Iterable[Arrival],
    costs: CostModel,
    *,
    in_flight_max: int = 2,
    credit_s: float | None = None,
    lead_s: float = LEAD_S,
    admission: bool = False,
    noise: float = 0.0,
    seed: int = 0,
) -> Report:
    """Serve a workload on one device.

    Args:
        policy: chooses batches.
        lanes: of the device.
        arrivals: in order of time; taken one at a time, so that they may be many.
        costs: what each batch takes. Estimates begin with these, as after a warm-up.
        in_flight_max: credits.
        credit_s: of the shares, see `Batcher`.
        lead_s: see `Batcher`.
        admission: see `Batcher`.
        noise: coefficient of variation of a batch's time; 0 for none.
        seed: of the noise.

    Raises:
        InvalidArgument: arrivals are out of order, or of a lane that is not there.
    """
    cluster = SimulatedCluster(
        devices=[lanes],
        batcher=lambda: Batcher(
            policy, in_flight_max, credit_s=credit_s, lead_s=lead_s, admission=admission
        ),
        routers=0,
    )
    return simulate_cluster(cluster, arrivals, costs, noisy(costs, noise), seed=seed)


def simulate_cluster(
    cluster: SimulatedCluster,
    arrivals: Iterable[Arrival],
    means: CostModel,
    durations: Durations | None = None,
    *,
    warm_s: float = 0.0,
    seed: int = 0,
) -> Report:
    """Serve a workload on a cluster.

    Args:
        cluster: who serves.
        arrivals: in order of time; taken one at a time, so that they may be many.
        means: what batches take on average; estimates begin with these unless a lane says better.
        durations: what each batch really takes; None for the means.
        warm_s: requests that come before are served and not counted; the report's seconds begin
            here.
        seed: of everything that is drawn: delays, durations, which router a request comes to.

    Raises:
        InvalidArgument: arrivals are out of order, or of a lane that is not there.
    """
    run = _Run(cluster, arrivals, means, durations or noisy(means, 0.0), warm_s, seed)
    while run.time.step():
        pass
    return run.report()


class _Run:
    """One simulation under way."""

    def __init__(
        self,
        cluster: SimulatedCluster,
        arrivals: Iterable[Arrival],
        means: CostModel,
        durations: Durations,
        warm_s: float,
        seed: int,
    ) -> None:
        self.time: Final = VirtualTime()
        self._outcomes: Final[dict[tuple[str, int], Outcome]] = {}
        self._random: Final = Random(f"{seed} routers")
        self._devices: Final = [
            VirtualDevice(
                self.time,
                cluster.batcher(),
                lanes,
                means,
                durations,
                cluster.host,
                Random(seed if number == 0 else f"{seed} device {number}"),
            )
            for number, lanes in enumerate(cluster.devices)
        ]
        holders: dict[LaneKey, list[VirtualDevice]] = {}
        for device, lanes in zip(self._devices, cluster.devices, strict=True):
            for lane in lanes:
                holders.setdefault(lane.key, []).append(device)
        self._routers: Final = [
            VirtualRouter(
                self.time,
                cluster.network,
                holders,
                self._outcomes,
                Random(f"{seed} router {number}"),
                warm_s,
                keeps_deadlines=cluster.routers > 0,
            )
            for number in range(max(cluster.routers, 1))
        ]
        self._coming: Final = _checked(arrivals, set(holders))
        first = next(self._coming, None)
        self._first_at: Final = max(warm_s, 0.0 if first is None else first.at)
        self._arrange(first)

    def _arrange(self, arrival: Arrival | None) -> None:
        if arrival is not None:
            self.time.at(arrival.at, partial(self._arrive, arrival))

    def _arrive(self, arrival: Arrival) -> None:
        """All that come at this instant, before anything that it brings about."""
        following: Arrival | None = arrival
        while following is not None and following.at == arrival.at:
            routers = self._routers
            router = routers[0] if len(routers) == 1 else self._random.choice(routers)
            router.on_arrival(following)
            following = next(self._coming, None)
        self._arrange(following)

    def report(self) -> Report:
        """What came of it, once nothing is left to happen."""
        for router in self._routers:
            router.check_idle()
        for device in self._devices:
            device.check_idle()
        owners: dict[str, list[Outcome]] = {}
        criticalities: dict[int, list[Outcome]] = {}
        for (owner, priority), outcome in self._outcomes.items():
            assert outcome.ended == outcome.offered, f"{owner}: {outcome}"
            owners.setdefault(owner, []).append(outcome)
            criticalities.setdefault(priority, []).append(outcome)
        ended_at = max((router.ended_at for router in self._routers), default=0.0)
        return Report(
            owners={owner: Outcome.of_all(parts) for owner, parts in owners.items()},
            criticalities={
                priority: Outcome.of_all(parts) for priority, parts in criticalities.items()
            },
            seconds=max(0.0, ended_at - self._first_at),
            devices=tuple(device.report() for device in self._devices),
        )


def _checked(arrivals: Iterable[Arrival], keys: set[LaneKey]) -> Iterator[Arrival]:
    before = -inf
    for arrival in arrivals:
        if arrival.at < before:
            raise InvalidArgument(f"an arrival at {arrival.at} comes after one at {before}")
        for key in (arrival.lane, *arrival.then):
            if key not in keys:
                raise InvalidArgument(f"there is no lane {key}")
        before = arrival.at
        yield arrival
