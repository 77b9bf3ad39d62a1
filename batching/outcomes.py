"""Made-up requests, and what became of them: values of simulations and benches.

Nothing here knows how requests are served. An owner's requests each end in exactly one of the ways
that `Outcome` counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

from batching.values import LaneKey

__all__ = ["Arrival", "DeviceReport", "Outcome", "Report"]


class Arrival(NamedTuple):
    """A request of some rows.

    Attributes:
        at: when it comes, in seconds; arrivals are in this order.
        lane: where its rows wait.
        owner: whose share they use.
        rows: how many.
        budget_s: seconds until its deadline; `inf` for none.
        then: lanes through which its rows go after that one, in order.
        priority: rows of a higher one leave first.
    """

    at: float
    lane: LaneKey
    owner: str
    rows: int = 1
    budget_s: float = inf
    then: tuple[LaneKey, ...] = ()
    priority: int = 0


@dataclass(slots=True)
class Outcome:
    """What became of one owner's requests.

    Attributes:
        offered: requests that came.
        good: answered by their deadline.
        late: answered after it.
        refused: turned away when they came.
        expired: waited past their deadline.
        shed: given up before it.
        latencies_s: of answered requests, in the order of their answers where all are of one
            priority.
    """

    offered: int = 0
    good: int = 0
    late: int = 0
    refused: int = 0
    expired: int = 0
    shed: int = 0
    latencies_s: list[float] = field(default_factory=list)

    @property
    def ended(self) -> int:
        """Requests that have their end."""
        return self.good + self.late + self.refused + self.expired + self.shed

    @property
    def attainment(self) -> float:
        """Share of the requests that were answered in time; 1 where none came."""
        return self.good / self.offered if self.offered else 1.0

    @classmethod
    def of_all(cls, parts: Sequence[Outcome]) -> Outcome:
        """Several outcomes as one; the latencies of one after those of the other."""
        found = cls()
        for part in parts:
            found.offered += part.offered
            found.good += part.good
            found.late += part.late
            found.refused += part.refused
            found.expired += part.expired
            found.shed += part.shed
            found.latencies_s += part.latencies_s
        return found

    def percentile(self, percent: float) -> float:
        """Latency in seconds below which this share of the answers lies; nan without answers."""
        ordered = sorted(self.latencies_s)
        if not ordered:
            return float("nan")
        return ordered[min(int(len(ordered) * percent / 100), len(ordered) - 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceReport:
    """What one device did.

    Attributes:
        busy_s: seconds at work.
        host_s: seconds that its event loop was at work.
        batches: that ran.
        rows: real rows in them.
        padded_rows: padding in them.
    """

    busy_s: float
    host_s: float
    batches: int
    rows: int
    padded_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a run came to.

    Attributes:
        owners: outcome by owner.
        criticalities: outcome by the priority of requests.
        seconds: virtual time from the first arrival to the last end.
        devices: what each device did.
    """

    owners: dict[str, Outcome]
    seconds: float
    devices: tuple[DeviceReport, ...]
    criticalities: Mapping[int, Outcome] = field(default_factory=dict)

    @property
    def busy_s(self) -> float:
        """Device seconds at work, of all devices."""
        return sum(device.busy_s for device in self.devices)

    @property
    def batches(self) -> int:
        """Batches that ran."""
        return sum(device.batches for device in self.devices)

    @property
    def rows(self) -> int:
        """Real rows in them."""
        return sum(device.rows for device in self.devices)

    @property
    def padded_rows(self) -> int:
        """Padding in them."""
        return sum(device.padded_rows for device in self.devices)

    @property
    def good(self) -> int:
        """Requests answered in time."""
        return sum(each.good for each in self.owners.values())

    @property
    def offered(self) -> int:
        """Requests that came."""
        return sum(each.offered for each in self.owners.values())

    @property
    def attainment(self) -> float:
        """Share of all requests that were answered in time; 1 where none came."""
        return self.good / self.offered if self.offered else 1.0

    @property
    def goodput(self) -> float:
        """Requests answered in time, a second."""
        return self.good / max(self.seconds, 1e-9)
