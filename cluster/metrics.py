"""What is counted, and how Prometheus reads it.

The hot path adds to plain integers; names, labels and text exist only when somebody scrapes. A
histogram is an array of counts over fixed bounds.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from cluster.doors.stats import DoorStats, LogStats, ShadowStats

if TYPE_CHECKING:
    from cluster.router import Router

__all__ = ["Metrics", "VersionMetrics"]

#: Upper bounds of the latency histogram in seconds: 100 us to 30 s, about x1.8 apart.
_BOUNDS: Final = (
    0.0001, 0.0002, 0.0003, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.03, 0.05,
    0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0,
)  # fmt: skip

#: After a scrape there is none for so many times as long as it took.
_SCRAPE_REST: Final = 20


class VersionMetrics:
    """Counts of one servable version at one door."""

    __slots__ = ("_buckets", "_errors", "_sum_s", "servable", "version")

    def __init__(self, servable: str, version: int) -> None:
        self.servable = servable
        self.version = version
        self._buckets = [0] * (len(_BOUNDS) + 1)
        self._sum_s = 0.0
        self._errors: dict[str, int] = {}

    def answered(self, latency_s: float) -> None:
        """An answer went out, this long after its request was read."""
        self._buckets[bisect_left(_BOUNDS, latency_s)] += 1
        self._sum_s += latency_s

    def failed(self, code: str) -> None:
        """An error went out."""
        self._errors[code] = self._errors.get(code, 0) + 1

    @property
    def labels(self) -> list[str]:
        """Label values, in the order in which families declare them."""
        return [self.servable, str(self.version)]

    def add_to(self, requests: CounterMetricFamily, latency: HistogramMetricFamily) -> None:
        """Append these counts to the families."""
        total = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip((*map(str, _BOUNDS), "+Inf"), self._buckets, strict=True):
            total += count
            buckets.append((bound, float(total)))
        requests.add_metric([*self.labels, "OK"], total)
        for code, count in self._errors.items():
            requests.add_metric([*self.labels, code], count)
        latency.add_metric(self.labels, buckets, self._sum_s)


class Metrics:
    """All counts of one door's process.

    At most `versions_max` servable versions are kept apart; the counts of those that were asked
    for the longest ago are dropped, so that a cluster that rolls versions for months does not grow.
    """

    CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self, versions_max: int = 1024) -> None:
        self._versions: dict[tuple[str, int], VersionMetrics] = {}
        self._versions_max = versions_max
        self._shadows: dict[tuple[str, int], ShadowStats] = {}
        self._logs: dict[str, LogStats] = {}
        self._errors: dict[str, int] = {}
        self._refused: dict[int, int] = {}
        self._scraped = b""
        self._scrape_after = -math.inf
        #: of the process's own port; all zero where Ray Serve has the port
        self.door = DoorStats()

    def of(self, servable: str, version: int) -> VersionMetrics:
        """The counts of one version."""
        key = (servable, version)
        found = self._versions.pop(key, None) or VersionMetrics(servable, version)
        if len(self._versions) >= self._versions_max:
            del self._versions[next(iter(self._versions))]
        self._versions[key] = found
        return found

    def shadow(self, servable: str, version: int) -> ShadowStats:
        """The counts of shadow copies for one candidate; as bounded as those of versions."""
        key = (servable, version)
        found = self._shadows.pop(key, None) or ShadowStats()
        if len(self._shadows) >= self._versions_max:
            del self._shadows[next(iter(self._shadows))]
        self._shadows[key] = found
        return found

    def request_log(self, servable: str) -> LogStats:
        """The counts of a servable's request log; as bounded as those of versions."""
        found = self._logs.pop(servable, None) or LogStats()
        if len(self._logs) >= self._versions_max:
            del self._logs[next(iter(self._logs))]
        self._logs[servable] = found
        return found

    def failed(self, code: str) -> None:
        """An error response went out, whatever it was about."""
        self._errors[code] = self._errors.get(code, 0) + 1

    def refused(self, status: int) -> None:
        """A door refused bytes that did not become a request."""
        self._refused[status] = self._refused.get(status, 0) + 1

    def scrape(self, router: Router, clock: Callable[[], float]) -> bytes:
        """As `render`; who asks all the time gets what was printed just now.

        Printing takes milliseconds of the router's loop, of which scrapes may so take 5 %.
        """
        began = clock()
        if began >= self._scrape_after:
            self._scraped = self.render(router)
            self._scrape_after = began + (clock() - began) * _SCRAPE_REST
        return self._scraped

    def render(self, router: Router) -> bytes:
        """The text that Prometheus reads."""
        registry = CollectorRegistry()
        registry.register(_Snapshot(self._families(router)))
        return generate_latest(registry)

    def _families(self, router: Router) -> list[Metric]:
        requests = CounterMetricFamily(
            "serving_requests", "Requests by outcome.", labels=["servable", "version", "code"]
        )
        latency = HistogramMetricFamily(
            "serving_request_latency_seconds",
            "From the request read to the answer written, of requests that were answered.",
            labels=["servable", "version"],
        )
        for version in self._versions.values():
            version.add_to(requests, latency)
        errors = CounterMetricFamily("serving_errors", "Error responses.", labels=["code"])
        for code, count in self._errors.items():
            errors.add_metric([code], count)
        refused = CounterMetricFamily(
            "serving_refused", "Bytes that did not become a request.", labels=["status"]
        )
        for status, count in self._refused.items():
            refused.add_metric([str(status)], count)
        shadow = CounterMetricFamily(
            "serving_shadow",
            "Shadow copies for a candidate, by what came of them.",
            labels=["servable", "version", "outcome"],
        )
        for (name, number), counts in self._shadows.items():
            for outcome, count in msgspec.structs.asdict(counts).items():
                shadow.add_metric([name, str(number), outcome], count)
        logged = CounterMetricFamily(
            "serving_request_log",
            "Requests chosen for the request log, by what came of them.",
            labels=["servable", "outcome"],
        )
        for name, kept in self._logs.items():
            for outcome, count in msgspec.structs.asdict(kept).items():
                logged.add_metric([name, outcome], count)
        families: list[Metric] = [requests, latency, errors, refused, shadow, logged]
        stats = router.stats
        for name in stats.__struct_fields__:
            text = f"Router: {name.replace('_', ' ')}."
            families.append(
                CounterMetricFamily(f"serving_router_{name}", text, getattr(stats, name))
            )
        door = msgspec.structs.asdict(self.door)
        families.append(
            GaugeMetricFamily("serving_door_open", "Door: connections now.", door.pop("open"))
        )
        for name, value in door.items():
            text = f"Door: {name.replace('_', ' ')}."
            families.append(CounterMetricFamily(f"serving_door_{name}", text, value))
        families.append(
            GaugeMetricFamily("serving_in_flight", "Requests under way.", router.in_flight)
        )
        families.append(
            GaugeMetricFamily("serving_epoch", "Current routing epoch.", router.routes.number)
        )
        return families


class _Snapshot:
    """Families made once, in the shape that a registry collects."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        """The families."""
        return iter(self._families)
