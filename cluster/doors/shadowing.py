"""Shadow copies: some requests again, for a candidate version, whose answers only are compared.

A copy is sent once its request has been answered, from a turn of its own, so no answer waits for
it on this side, and with the least criticality, so devices run it when they have time; nobody gets
its answer. Copies are bounded in number and bytes: what is beyond is dropped and
counted. Decides which requests are copied and what counts as the same answer; which version is the
candidate says the routing epoch.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from batching.allowance import BEST_EFFORT
from batching.errors import ServingError
from cluster.doors.stats import ShadowStats
from cluster.epochs import Copies
from cluster.router import Router, Sink
from cluster.routes import SignaturePlan
from cluster.splits import RING, EvenPoints

__all__ = ["Copying", "Shadows", "agree"]

logger = logging.getLogger(__name__)

Array = npt.NDArray[np.generic]

_UNDER_WAY_MAX: Final = 64
#: Of all inputs and answers that are kept for copies under way.
_BYTES_MAX: Final = 32 << 20
#: Larger answers would hold the loop while they are compared: a millisecond for so many.
_COMPARED_BYTES_MAX: Final = 1 << 20


class Copying:
    """What an epoch says about copies of one servable's requests.

    Attributes:
        rule: the candidate, how many, how alike.
        stats: where outcomes are counted.
    """

    __slots__ = ("_points", "_share", "rule", "stats")

    def __init__(self, rule: Copies, stats: ShadowStats) -> None:
        self.rule = rule
        self.stats = stats
        self._share = round(RING * rule.percent / 100)
        self._points = EvenPoints()

    def is_due(self) -> bool:
        """Whether the next request is one to copy."""
        return self._points.take() < self._share


class Shadows:
    """The copies of one door.

    Args:
        router: where they go.
        clock: the router's.
        stats: where outcomes of a servable's candidate are counted.
    """

    def __init__(
        self,
        router: Router,
        clock: Callable[[], float],
        stats: Callable[[str, int], ShadowStats],
    ) -> None:
        self._router = router
        self._clock = clock
        self._stats = stats
        self._copyings: dict[str, Copying] = {}
        self._under_way = 0
        self._bytes = 0

    def of(self, servable: str, version: int) -> Copying | None:
        """How requests that a version answers are copied now; None for not at all."""
        rule = self._router.routes.epoch.copies.get(servable)
        if rule is None:
            self._copyings.pop(servable, None)
            return None
        found = self._copyings.get(servable)
        if found is None or found.rule != rule:
            found = Copying(rule, self._stats(servable, rule.version))
            self._copyings[servable] = found
        return None if rule.version == version else found

    def over(
        self,
        sink: Sink,
        copying: Copying,
        plan: SignaturePlan,
        inputs: Mapping[str, Array],
        rows: int,
    ) -> Sink:
        """A sink that tells another one, and then has the request copied if it is due."""
        return _Answered(self, sink, copying, plan, inputs, rows) if copying.is_due() else sink

    def begin(self, copy: _Answered, outputs: Mapping[str, Array]) -> None:
        """Copy a request that has just been answered, if there is room."""
        copying = copy.copying
        answer_bytes = _bytes_of(outputs)
        nbytes = _bytes_of(copy.inputs) + answer_bytes
        copying.stats.due += 1
        if (
            self._under_way >= _UNDER_WAY_MAX
            or self._bytes + nbytes > _BYTES_MAX
            or answer_bytes > _COMPARED_BYTES_MAX
        ):
            copying.stats.dropped += 1
            return
        self._under_way += 1
        self._bytes += nbytes
        # Rows of a reply frame are views of the whole frame, which must not be kept for a copy.
        expected = {name: np.array(array) for name, array in outputs.items()}
        comparison = _Comparison(self, copying, expected, nbytes)
        asyncio.get_running_loop().call_soon(self._send, copy, comparison)

    def _send(self, copy: _Answered, comparison: _Comparison) -> None:
        plan, version = copy.plan, copy.copying.rule.version
        try:
            served = self._router.routes.find(plan.servable, version)
        except ServingError as error:
            comparison.failed(error)
            return
        candidate = served.plans.get(plan.name)
        if candidate is None or candidate.signature.inputs != plan.signature.inputs:
            # The inputs were checked against the other signature.
            comparison.end("failed")
            return
        deadline = self._clock() + served.deadline_s
        self._router.submit(
            candidate, copy.inputs, copy.rows, deadline, comparison, b"", BEST_EFFORT
        )

    def release(self, nbytes: int) -> None:
        """A copy is over."""
        self._under_way -= 1
        self._bytes -= nbytes


class _Answered:
    """The sink of a request that is to be copied."""

    __slots__ = ("_shadows", "_sink", "copying", "inputs", "plan", "rows")

    def __init__(
        self,
        shadows: Shadows,
        sink: Sink,
        copying: Copying,
        plan: SignaturePlan,
        inputs: Mapping[str, Array],
        rows: int,
    ) -> None:
        self._shadows = shadows
        self._sink = sink
        self.copying = copying
        self.plan = plan
        self.inputs = inputs
        self.rows = rows

    def done(self, outputs: Mapping[str, Array], frame: Sequence[Array] | None) -> None:
        """The client's answer first."""
        self._sink.done(outputs, frame)
        self._shadows.begin(self, outputs)

    def failed(self, error: ServingError) -> None:
        """There is nothing to compare with."""
        self._sink.failed(error)


class _Comparison:
    """The sink of a copy."""

    __slots__ = ("_copying", "_expected", "_nbytes", "_shadows")

    def __init__(
        self, shadows: Shadows, copying: Copying, expected: Mapping[str, Array], nbytes: int
    ) -> None:
        self._shadows = shadows
        self._copying = copying
        self._expected = expected
        self._nbytes = nbytes

    def done(self, outputs: Mapping[str, Array], frame: Sequence[Array] | None) -> None:
        """Compare."""
        same = agree(self._expected, outputs, self._copying.rule.tolerance)
        self.end("agreed" if same else "differed")

    def failed(self, error: ServingError) -> None:
        """Count it."""
        logger.debug("a shadow copy failed: %s", error)
        self.end("failed")

    def end(self, outcome: str) -> None:
        """Count the outcome, and make room."""
        stats = self._copying.stats
        setattr(stats, outcome, getattr(stats, outcome) + 1)
        self._shadows.release(self._nbytes)


def agree(expected: Mapping[str, Array], found: Mapping[str, Array], tolerance: float) -> bool:
    """Whether two answers are the same.

    Args:
        expected: outputs by name.
        found: the other's.
        tolerance: by how much numbers may differ, absolutely or relatively; with 0 bits must be
            equal. Not-a-number agrees with itself; texts and integers are always compared exactly.
    """
    return expected.keys() == found.keys() and all(
        _is_same(expected[name], found[name], tolerance) for name in expected
    )


def _is_same(expected: Array, found: Array, tolerance: float) -> bool:
    if expected.dtype != found.dtype or expected.shape != found.shape:
        return False
    if expected.dtype.kind == "O":
        return bool(np.array_equal(expected, found))
    if tolerance and expected.dtype.kind not in "biuSU":
        # Through float64, which every floating kind has a way to, bfloat16 as well.
        wide = expected.astype(np.float64), found.astype(np.float64)
        return bool(np.allclose(*wide, rtol=tolerance, atol=tolerance, equal_nan=True))
    return expected.tobytes() == found.tobytes()


def _bytes_of(arrays: Mapping[str, Array]) -> int:
    return sum(array.nbytes for array in arrays.values())
