"""Calls from Python: arrays in, arrays out, over the same router as HTTP.

What Ray Serve's `DeploymentHandle` methods do. Nothing is parsed or printed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from batching.allowance import criticality_named
from batching.errors import InvalidArgument, ServingError
from cluster.doors.request_log import RequestLogs
from cluster.router import Router, Sink
from shards.converting import convert

__all__ = ["call"]

Array = npt.NDArray[np.generic]


class _Wait:
    """A sink that a coroutine waits for."""

    __slots__ = ("answered",)

    def __init__(self) -> None:
        self.answered: asyncio.Future[Mapping[str, Array]] = (
            asyncio.get_running_loop().create_future()
        )

    def done(self, outputs: Mapping[str, Array], frame: Sequence[Array] | None) -> None:
        """Take the answer."""
        if not self.answered.done():
            self.answered.set_result(outputs)

    def failed(self, error: ServingError) -> None:
        """Take the error."""
        if not self.answered.done():
            self.answered.set_exception(error)


async def call(
    router: Router,
    servable: str,
    inputs: Mapping[str, npt.ArrayLike],
    *,
    signature: str = "serving_default",
    version: int | None = None,
    label: str | None = None,
    split_key: str = "",
    timeout_s: float | None = None,
    criticality: str = "critical",
    logs: RequestLogs | None = None,
) -> tuple[int, dict[str, Array]]:
    """Run one request.

    Args:
        router: of this process.
        servable: its name.
        inputs: the signature's inputs by name; see `shards.converting.convert`.
        signature: name of the signature.
        version: asked for; by the split, or the newest, where neither this nor ``label`` is given.
        label: asked for.
        split_key: calls with the same key get the same version of a split; "" for any.
        timeout_s: after which `DeadlineExceeded` is raised; None takes the servable's.
        criticality: makes the request less critical than its servable is declared to be.
        logs: keep some of the requests, where that is declared.

    Returns:
        The version that answered, and its outputs by name.

    Raises:
        ServingError: whatever is wrong, typed.
    """
    if version is not None and label is not None:
        raise InvalidArgument("a version or a label can be asked for, not both")
    most = criticality_named(criticality)
    if version is None and label is None:
        served = router.routes.pick(servable, split_key.encode())
    else:
        served = router.routes.find(servable, version, label)
    plan = served.plans.get(signature)
    if plan is None:
        raise InvalidArgument(f'Serving signature name: "{signature}" not found in signature def')
    arrays, rows = convert(plan.signature.inputs, inputs)
    wait = _Wait()
    wait_s = served.deadline_s if timeout_s is None else timeout_s
    sink: Sink = wait
    if logs is not None and (log := logs.of(served)) is not None:
        sink = logs.over(wait, log, plan, arrays)
    request = router.submit(plan, arrays, rows, time.monotonic() + wait_s, sink, b"", most)
    try:
        outputs = await wait.answered
    except asyncio.CancelledError:
        if request is not None:
            router.cancel(request)
        raise
    # Rows of a reply frame are views of the whole frame; a caller may keep its answer for long.
    return served.version, {name: np.array(array) for name, array in outputs.items()}
