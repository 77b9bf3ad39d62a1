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
from cluster.router import Router
from shards.specs import STRING, Spec, check, dtype_of

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
) -> tuple[int, dict[str, Array]]:
    """Run one request.

    Args:
        router: of this process.
        servable: its name.
        inputs: the signature's inputs by name; converted to their dtype where that loses nothing
            but precision: integers must be in range, and a float too large is an infinity. What is
            per request may leave out the dimension of its only row.
        signature: name of the signature.
        version: asked for; by the split, or the newest, where neither this nor ``label`` is given.
        label: asked for.
        split_key: calls with the same key get the same version of a split; "" for any.
        timeout_s: after which `DeadlineExceeded` is raised; None takes the servable's.
        criticality: makes the request less critical than its servable is declared to be.

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
    specs = plan.signature.inputs
    arrays = {
        name: _whole(_convert(name, value, specs[name]), specs[name])
        if name in specs
        else np.asarray(value)
        for name, value in inputs.items()
    }
    sizes = check(specs, arrays)
    batch = next((spec.batch for spec in specs.values() if spec.batch is not None), None)
    rows = sizes[batch] if batch is not None else 1
    wait = _Wait()
    wait_s = served.deadline_s if timeout_s is None else timeout_s
    request = router.submit(plan, arrays, rows, time.monotonic() + wait_s, wait, b"", most)
    try:
        outputs = await wait.answered
    except asyncio.CancelledError:
        if request is not None:
            router.cancel(request)
        raise
    # Rows of a reply frame are views of the whole frame; a caller may keep its answer for long.
    return served.version, {name: np.array(array) for name, array in outputs.items()}


def _whole(array: Array, spec: Spec) -> Array:
    is_bare = spec.per_request and array.ndim == len(spec.shape) - 1
    return array[np.newaxis] if is_bare else array


def _convert(name: str, value: npt.ArrayLike, spec: Spec) -> Array:
    if spec.dtype == STRING:
        return _texts(name, value)
    try:
        array = np.asarray(value)
    except ValueError as error:  # lists of different lengths
        raise InvalidArgument(f"input {name!r} is not an array: {error}") from None
    wanted = dtype_of(spec.dtype)
    if array.dtype == wanted:
        return array
    if array.size and not _fits(array, wanted):
        raise InvalidArgument(f"input {name!r} must be {spec.dtype}, got {_content(array)}")
    with np.errstate(all="ignore"):
        return array.astype(wanted)


def _fits(array: Array, wanted: np.dtype[np.generic]) -> bool:
    if wanted.kind == "b":
        return False
    if wanted.kind in "iu":
        limits = np.iinfo(wanted.name)
        is_whole = array.dtype.kind in "iu"
        in_range = is_whole and limits.min <= int(array.min()) and int(array.max()) <= limits.max
        return in_range or array.dtype.kind == "b"
    return array.dtype.kind in "biuf" or array.dtype == dtype_of("bfloat16")


def _content(array: Array) -> str:
    if array.dtype.kind in "iu":
        return f"{array.dtype} from {array.min()} to {array.max()}"
    return str(array.dtype)


def _texts(name: str, value: npt.ArrayLike) -> Array:
    try:
        array = np.asarray(value, dtype=object)
        encoded = [item.encode() if isinstance(item, str) else item for item in array.reshape(-1)]
    except ValueError as error:  # lists of different lengths, or a lone surrogate
        raise InvalidArgument(f"input {name!r} is not an array of text: {error}") from None
    for item in encoded:
        if not isinstance(item, bytes):
            kind = type(item).__name__
            raise InvalidArgument(f"input {name!r} must be text or bytes, got {kind}")
    out = np.empty(len(encoded), object)
    out[:] = encoded
    return out.reshape(array.shape)
