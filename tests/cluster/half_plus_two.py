"""The model of TensorFlow Serving's tests, x / 2 + 2, saved and served in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import shards
from cluster.epochs import VersionStatus
from shards.specs import Spec
from tests.cluster.serving import Cluster

X = {"x": Spec(("b",))}
MODEL = "/v1/models/half_plus_two"
PREDICT = f"{MODEL}:predict"


def save_half_plus_two(store: Path, version: int, plus: float) -> None:
    """The model of TensorFlow Serving's tests: x / 2 + 2 by several names."""
    import jax.numpy as jnp

    with shards.Bundle.create(store, "half_plus_two", version) as bundle:
        params = {"a": np.float32(0.5), "b": np.float32(plus)}

        def unit(name: str, fn: Callable[..., Any], params: Any, spec: Spec) -> Any:
            return bundle.unit(
                name, fn, params, inputs={"x": spec}, batch_buckets=(1, 8), platforms=("cpu",)
            )

        half = unit("half", lambda p, x: {"y": x * p["a"] + p["b"]}, params, X["x"])
        scores = unit(
            "scores", lambda p, x: {"scores": (x * p["a"] + p["b"])[:, None]}, params, X["x"]
        )
        pair = unit(
            "pair",
            lambda _, x: {"sum": x.sum(-1), "nan": jnp.full(x.shape[:1], jnp.nan), "same": x},
            {},
            Spec(("b", 2)),
        )

        @bundle.signature(inputs=X)
        def serving_default(x: Any) -> Any:
            return half(x)

        @bundle.signature("classify_x_to_y", method="classify", inputs=X)
        def classify(x: Any) -> Any:
            return scores(x)

        @bundle.signature("regress_x_to_y", method="regress", inputs=X)
        def regress(x: Any) -> Any:
            return {"outputs": half(x)}

        @bundle.signature("pairs", inputs={"x": Spec(("b", 2))})
        def pairs(x: Any) -> Any:
            return pair(x)

        @bundle.signature("text", inputs={"t": Spec(("b",), "string")})
        def text(t: Any) -> Any:
            return {"t_bytes": t}


@contextmanager
def half_plus_two(directory: Path) -> Iterator[Cluster]:
    """Version 123 as in the original, labelled stable; 100 adds 3, labelled old; 99 has ended."""
    save_half_plus_two(directory / "store", 123, 2.0)
    save_half_plus_two(directory / "store", 100, 3.0)
    cluster = Cluster(directory / "store", directory)
    try:
        cluster.load("half_plus_two", 123)
        cluster.load("half_plus_two", 100)
        ended = VersionStatus(servable="half_plus_two", version=99, state="END")
        cluster.publish({"half_plus_two": {"stable": 123, "old": 100}}, [ended])
        yield cluster
    finally:
        cluster.close()
