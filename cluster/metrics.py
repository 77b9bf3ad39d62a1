"""What is counted, and how Prometheus reads it.

The hot path adds to plain integers; names, labels and text exist only when somebody scrapes. A
histogram is an array of counts over fixed bounds. Text is made in turns of the router's loop that
requests pass between, and what there may be thousands of lines of is printed from templates.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Final

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from cluster.doors.siblings import labelled
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
#: Printing lets requests pass after so much of the loop's time.
_TURN_S: Final = 0.0005
_HEADS: Final = tuple(
    f"# HELP {name} {text}\n# TYPE {name} {kind}\n".encode()
    for name, kind, text in (
        ("serving_requests_total", "counter", "Requests by outcome."),
        (
            "serving_request_latency_seconds",
            "histogram",
            "From the request read to the answer written, of requests that were answered.",
        ),
    )
)


class VersionMetrics:
    """Counts of one servable version at one door."""

    __slots__ = ("_buckets", "_errors", "_sum_s", "_template", "servable", "version")

    def __init__(self, servable: str, version: int) -> None:
        self.servable = servable
        self.version = version
        self._buckets = [0] * (len(_BOUNDS) + 1)
        self._sum_s = 0.0
        self._errors: dict[str, int] = {}
        self._template = ""

    def answered(self, latency_s: float) -> None:
        """An answer went out, this long after its request was read."""
        self._buckets[bisect_left(_BOUNDS, latency_s)] += 1
        self._sum_s += latency_s

    def failed(self, code: str) -> None:
        """An error went out."""
        self._errors[code] = self._errors.get(code, 0) + 1

    @property
    def labels(self) -> str:
        """Labels as they are printed."""
        name = self.servable.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
        return f'servable="{name}",version="{self.version}"'

    def outcomes(self) -> bytes:
        """Lines of requests by how they ended."""
        labels = self.labels
        counts = {"OK": sum(self._buckets), **self._errors}
        return "".join(
            f'serving_requests_total{{code="{code}",{labels}}} {count}.0\n'
            for code, count in counts.items()
        ).encode()

    def latency(self) -> bytes:
        """Lines of the histogram."""
        if not self._template:
            name, labels = "serving_request_latency_seconds", self.labels.replace("%", "%%")
            bounds = (*_BOUNDS, "+Inf")
            lines = [f'{name}_bucket{{le="{bound}",{labels}}} %d.0\n' for bound in bounds]
            more = f"{name}_count{{{labels}}} %d.0\n{name}_sum{{{labels}}} %r\n"
            self._template = "".join(lines) + more
        counts = tuple(accumulate(self._buckets))
        return (self._template % (*counts, counts[-1], self._sum_s)).encode()


class Metrics:
    """All counts of one door's process.

    At most `versions_max` servable versions are kept apart; the counts of those that were asked
    for the longest ago are dropped, so that a cluster that rolls versions for months does not grow.

    Args:
        versions_max: see above.
        router: a label that every sample has; none where there is one router.
    """

    CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self, versions_max: int = 1024, *, router: str = "") -> None:
        self._router = router
        self._versions: dict[tuple[str, int], VersionMetrics] = {}
        self._versions_max = versions_max
        self._shadows: dict[tuple[str, int], ShadowStats] = {}
        self._logs: dict[str, LogStats] = {}
        self._errors: dict[str, int] = {}
        self._refused: dict[int, int] = {}
        self._scraped = b""
        self._readers: list[Callable[[bytes], None]] = []
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

    def scrape(
        self,
        router: Router,
        clock: Callable[[], float],
        later: Callable[[Callable[[], None]], object],
        then: Callable[[bytes], None],
    ) -> None:
        """Tell the text that Prometheus reads, now or after some turns of the loop.

        Printing hundreds of servables takes milliseconds of the router's loop, of which scrapes
        may take 5 %: who asks all the time gets what was printed just now.

        Args:
            router: whose counters are told, too.
            clock: seconds.
            later: calls something in a later turn of the loop.
            then: told the text, once.
        """
        if not self._readers and clock() < self._scrape_after:
            then(self._scraped)
            return
        self._readers.append(then)
        if len(self._readers) == 1:
            self._print(self._pieces(router), [], 0.0, clock, later)

    def _print(
        self,
        pieces: Iterator[bytes],
        text: list[bytes],
        took_s: float,
        clock: Callable[[], float],
        later: Callable[[Callable[[], None]], object],
    ) -> None:
        began = clock()
        for piece in pieces:
            text.append(piece)
            spent_s = clock() - began
            if spent_s >= _TURN_S:
                later(partial(self._print, pieces, text, took_s + spent_s, clock, later))
                return
        ended = clock()
        self._scraped = b"".join(text)
        self._scrape_after = ended + (took_s + ended - began) * _SCRAPE_REST
        readers, self._readers = self._readers, []
        for then in readers:
            then(self._scraped)

    def render(self, router: Router) -> bytes:
        """The text that Prometheus reads, at once."""
        return b"".join(self._pieces(router))

    def _pieces(self, router: Router) -> Iterator[bytes]:
        pieces = self._unlabelled(router)
        return (labelled(each, self._router) for each in pieces) if self._router else pieces

    def _unlabelled(self, router: Router) -> Iterator[bytes]:
        """The text in pieces; between them anything may be counted."""
        versions = list(self._versions.values())
        for head, lines in zip(
            _HEADS, (VersionMetrics.outcomes, VersionMetrics.latency), strict=True
        ):
            yield head
            for version in versions:
                yield lines(version)
        registry = CollectorRegistry()
        registry.register(_Snapshot(self._families(router)))
        yield generate_latest(registry)

    def _families(self, router: Router) -> list[Metric]:
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
        families: list[Metric] = [errors, refused, shadow, logged]
        stats = router.stats
        for name in stats.__struct_fields__:
            if name == "missing_by":
                continue
            text = f"Router: {name.replace('_', ' ')}."
            families.append(
                CounterMetricFamily(f"serving_router_{name}", text, getattr(stats, name))
            )
        missing = CounterMetricFamily(
            "serving_table_missing_rows",
            "Ids that were not in a table, by the servable that looked them up.",
            labels=["servable", "table"],
        )
        for (name, table), count in stats.missing_by.items():
            missing.add_metric([name, table], count)
        families.append(missing)
        door = msgspec.structs.asdict(self.door)
        families.append(
            GaugeMetricFamily("serving_door_open", "Door: connections now.", door.pop("open"))
        )
        for name, value in door.items():
            text = f"Door: {name.replace('_', ' ')}."
            families.append(CounterMetricFamily(f"serving_door_{name}", text, value))
        traffic = CounterMetricFamily(
            "serving_router_tensor_bytes",
            "Bytes of tensors sent to an actor and received from it, since it was first routed to.",
            labels=["actor", "direction"],
        )
        for peer in router.peers:
            traffic.add_metric([peer.endpoint.actor, "sent"], peer.sent_bytes)
            traffic.add_metric([peer.endpoint.actor, "received"], peer.received_bytes)
        families.append(traffic)
        families += _hot_rows(router)
        families.append(
            GaugeMetricFamily("serving_in_flight", "Requests under way.", router.in_flight)
        )
        families.append(
            GaugeMetricFamily("serving_epoch", "Current routing epoch.", router.routes.number)
        )
        return families


def _hot_rows(router: Router) -> list[Metric]:
    """What is kept of tables, where that is declared."""
    hot = router.hot_rows
    if hot is None:
        return []
    return [
        CounterMetricFamily("serving_router_hot_rows", "Rows that were kept here.", hot.found),
        CounterMetricFamily(
            "serving_router_hot_rows_missed", "Rows that shards were asked for.", hot.missed
        ),
        GaugeMetricFamily(
            "serving_router_hot_rows_bytes", "Memory set apart for kept rows.", hot.nbytes
        ),
    ]


class _Snapshot:
    """Families made once, in the shape that a registry collects."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        """The families."""
        return iter(self._families)
