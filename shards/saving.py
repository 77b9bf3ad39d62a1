"""One function saved as a servable, in one line: a bundle of one unit and one signature."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shards.bundle import Bundle
from shards.manifest import Manifest
from shards.specs import Spec
from shards.store import Store
from shards.tracing import Method, Value, Values

__all__ = ["save"]


def save(
    fn: Callable[..., Any],
    params: Any,
    store: str | Path | Store,
    name: str,
    version: int | None = None,
    *,
    inputs: Mapping[str, Spec],
    method: Method = "predict",
    labels: Sequence[str] = (),
    signature: str = "serving_default",
    batch_buckets: Sequence[int] | None = None,
    length_buckets: Mapping[str, Sequence[int]] | None = None,
    request_buckets: Sequence[int] | None = None,
    donate: Sequence[str | int] = (),
    platforms: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Save one function and its parameters as a servable version, in one line.

    Args:
        fn: called as ``fn(params, **inputs)``; see `Bundle.unit`.
        params: any pytree.
        store: the store or its path.
        name: of the servable.
        version: None for one more than the highest.
        inputs: input name to spec.
        method: ``predict``, ``classify`` (yields ``scores``) or ``regress`` (yields ``outputs``).
        labels: for classify: the label of each score.
        signature: its name.
        batch_buckets: batch sizes to compile.
        length_buckets: for every symbol but the batch, the sizes to compile.
        request_buckets: where inputs are per request, numbers of requests in a batch to compile.
        donate: inputs whose memory outputs may take.
        platforms: what to lower for.
        overwrite: replace a version that exists.

    Returns:
        The manifest that was written.
    """
    with Bundle.create(store, name, version, overwrite=overwrite) as bundle:
        unit = bundle.unit(
            "model",
            fn,
            params,
            inputs=inputs,
            batch_buckets=batch_buckets,
            length_buckets=length_buckets,
            request_buckets=request_buckets,
            donate=donate,
            platforms=platforms,
        )

        @bundle.signature(signature, method=method, inputs=inputs, labels=labels)
        def answer(**values: Value) -> Any:
            result = unit(**values)
            name = next(iter(unit.outputs))
            # A bare array has no name of its own: the method gives it one.
            return result if isinstance(result, Values) or name == "outputs" else {name: result}

    return bundle.manifest
