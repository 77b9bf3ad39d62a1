"""Request logs of one door: which requests are kept, and what is kept of them.

Some of a servable's requests, evenly chosen, are handed to a thread that writes them
(`cluster.doors.log_files`) once they have been answered; those that were not would fail a version
that they warm up. The loop waits for nothing: what cannot be taken at once is dropped and counted.
Which servables have a log says the routing epoch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from batching.errors import ServingError
from cluster.doors.log_files import Entry, LogFile, LogWriter
from cluster.doors.settings import RequestLog
from cluster.doors.stats import LogStats
from cluster.router import Router, Sink
from cluster.routes import Served, SignaturePlan
from cluster.splits import RING, EvenPoints
from shards.recorded import Recorded

__all__ = ["Logging", "RequestLogs"]

logger = logging.getLogger(__name__)

Array = npt.NDArray[np.generic]

#: Texts beyond so many are not counted one by one on the loop: such a request is not kept.
_TEXTS_MAX: Final = 10_000
_TOO_LARGE: Final = 1 << 62
_VERSIONS_MAX: Final = 64


class Logging:
    """What is kept of one servable's requests.

    Attributes:
        rule: as it was declared.
        stats: what came of those that were chosen.
        file: where they go; the writing thread's.
    """

    __slots__ = ("_allowed", "_points", "_share", "file", "rule", "stats")

    def __init__(self, rule: RequestLog, servable: str, stats: LogStats) -> None:
        self.rule = rule
        self.stats = stats
        self.file = LogFile(rule, servable)
        self._share = round(RING * rule.rate)
        self._points = EvenPoints()
        #: version to whether its requests may be kept; where there is a split, each request asks
        self._allowed: dict[int, bool] = {}

    def allows(self, served: Served) -> bool:
        """Whether requests of this version may be kept."""
        found = self._allowed.get(served.version)
        if found is None:
            if len(self._allowed) >= _VERSIONS_MAX:
                self._allowed.clear()
            found = self._allowed[served.version] = _may_log(self.rule, served)
        return found

    def is_due(self) -> bool:
        """Whether the next request is one to keep."""
        return self._points.take() < self._share


class RequestLogs:
    """The request logs of one door.

    Args:
        router: whose epoch says which there are.
        stats: where outcomes of a servable's log are counted.
    """

    def __init__(self, router: Router, stats: Callable[[str], LogStats]) -> None:
        self._router = router
        self._stats = stats
        self._writer = LogWriter()
        self._logs: dict[str, Logging] = {}

    def of(self, served: Served) -> Logging | None:
        """How requests that a version answers are kept now; None for not at all."""
        name = served.servable
        rule = self._router.routes.epoch.logs.get(name)
        known = self._logs.get(name)
        if known is not None and known.rule != rule:
            del self._logs[name]
            self._writer.offer(Entry(known.file, known.stats, None))
            known = None
        if rule is None:
            return None
        if known is None:
            known = self._logs[name] = Logging(rule, name, self._stats(name))
        return known if known.allows(served) else None

    def over(
        self, sink: Sink, log: Logging, plan: SignaturePlan, inputs: Mapping[str, Array]
    ) -> Sink:
        """A sink that tells another one, and then has the request kept if it is due."""
        return _Kept(self, sink, log, plan, inputs) if log.is_due() else sink

    def keep(self, log: Logging, plan: SignaturePlan, inputs: Mapping[str, Array]) -> None:
        """Have a request written, if there is room."""
        request = Recorded(signature=plan.name, inputs=dict(inputs), version=plan.version)
        if not self._writer.offer(Entry(log.file, log.stats, request, _bytes_of(inputs))):
            log.stats.dropped += 1

    def close(self) -> None:
        """Write what waits, and end the thread that writes."""
        self._writer.close()


class _Kept:
    """The sink of a request that is to be kept."""

    __slots__ = ("_inputs", "_log", "_logs", "_plan", "_sink")

    def __init__(
        self,
        logs: RequestLogs,
        sink: Sink,
        log: Logging,
        plan: SignaturePlan,
        inputs: Mapping[str, Array],
    ) -> None:
        self._logs = logs
        self._sink = sink
        self._log = log
        self._plan = plan
        self._inputs = inputs
        log.stats.due += 1

    def done(self, outputs: Mapping[str, Array], frame: Sequence[Array] | None) -> None:
        """The client's answer first."""
        self._sink.done(outputs, frame)
        self._logs.keep(self._log, self._plan, self._inputs)

    def failed(self, error: ServingError) -> None:
        """It would fail the version that it warms up."""
        self._log.stats.unanswered += 1
        self._sink.failed(error)


def _may_log(rule: RequestLog, served: Served) -> bool:
    """Whether everything that is not to be kept is known, under the names that were declared."""
    known = {name for each in served.manifest.signatures.values() for name in each.inputs}
    unknown = sorted(set(rule.redact) - known)
    if unknown:
        # A name that was misspelt must not be the reason why its values are kept.
        logger.warning(
            "no request of %s:%d is logged: log.redact names %s, which is no input of it",
            served.servable, served.version, ", ".join(unknown),
        )  # fmt: skip
    return not unknown


def _bytes_of(inputs: Mapping[str, Array]) -> int:
    return sum(
        array.nbytes if array.dtype != object else _bytes_of_texts(array)
        for array in inputs.values()
    )


def _bytes_of_texts(array: Array) -> int:
    if array.size > _TEXTS_MAX:
        return _TOO_LARGE
    return sum(map(len, array.reshape(-1).tolist()))
