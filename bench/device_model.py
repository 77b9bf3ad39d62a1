"""The models of the benches of scheduling: twin encoders, whose cost is mostly their weights'.

A row is a pair of vectors; both pass the same layers, and the answer is the product of the two
results. A batch reads all weights once, whatever its size, so its time is about alpha + beta rows
with alpha far above beta, as on an accelerator. Every model has weights of its own and the same
shape: a device that serves many of them batches them apart.

`null` is a model of next to no cost, on which the load generator's own rate is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

import shards
from shards.specs import Spec

if TYPE_CHECKING:
    import jax

__all__ = [
    "BUCKETS", "INPUT", "LAYERS", "NULL", "OUTPUT", "Parameters", "answer", "parameters", "rows",
    "save",
    "servables",
]  # fmt: skip

Parameters = dict[str, npt.NDArray[np.float32]]

INPUT: Final = "pair"
OUTPUT: Final = "product"
NULL: Final = "null"
BUCKETS: Final = (1, 2, 4, 8, 16, 32)
_IN: Final = 32
#: A layer is 4 MiB, so a few are more than any core's own cache.
_WIDTH: Final = 1024
LAYERS: Final = 8


def servables(count: int) -> tuple[str, ...]:
    """Names of so many models."""
    return tuple(f"encoder-{number}" for number in range(count))


def parameters(seed: int, layers: int = LAYERS) -> Parameters:
    """Weights that keep activations in the middle of tanh; other ones for every seed."""
    generator = np.random.default_rng(seed)
    shapes = [(_IN, _WIDTH), *[(_WIDTH, _WIDTH)] * layers]
    return {
        f"w{number}": generator.standard_normal(shape, np.float32) * np.float32(shape[0] ** -0.5)
        for number, shape in enumerate(shapes)
    }


def _encode(params: Parameters, pair: jax.Array) -> dict[str, jax.Array]:
    import jax.numpy as jnp

    hidden = pair.reshape(-1, _IN)
    for number in range(len(params)):
        hidden = jnp.tanh(hidden @ params[f"w{number}"])
    left, right = jnp.moveaxis(hidden.reshape(-1, 2, _WIDTH), 1, 0)
    return {OUTPUT: (left * right).mean(-1)}


def _nothing(params: Parameters, pair: jax.Array) -> dict[str, jax.Array]:
    return {OUTPUT: pair.sum((1, 2)) * params["one"]}


def answer(params: Parameters, pair: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """What a model answers, by NumPy."""
    hidden = pair.reshape(-1, _IN)
    for number in range(len(params)):
        hidden = np.tanh(hidden @ params[f"w{number}"])
    left, right = np.moveaxis(hidden.reshape(-1, 2, _WIDTH), 1, 0)
    product: npt.NDArray[np.float32] = (left * right).mean(-1)
    return product


def rows(count: int, seed: int) -> npt.NDArray[np.float32]:
    """Rows to ask for."""
    return np.random.default_rng((seed, 1)).standard_normal((count, 2, _IN), np.float32)


def save(
    store: Path,
    count: int,
    *,
    seed: int = 0,
    buckets: Sequence[int] = BUCKETS,
    layers: int = LAYERS,
) -> Mapping[str, Parameters]:
    """Save so many models of so many layers, and the one of no cost.

    Returns:
        The parameters of each model.
    """
    found = {
        name: parameters(seed + number, layers) for number, name in enumerate(servables(count))
    }
    for name, weights in found.items():
        _save(store, name, _encode, weights, buckets)
    _save(store, NULL, _nothing, {"one": np.ones((), np.float32)}, (64,))
    return found


def _save(
    store: Path,
    name: str,
    function: Callable[..., Any],
    weights: Parameters,
    buckets: Sequence[int],
) -> None:
    with shards.Bundle.create(store, name, 1) as bundle:
        unit = bundle.unit(
            "unit",
            function,
            weights,
            inputs={INPUT: Spec(("b", 2, _IN))},
            batch_buckets=tuple(buckets),
            platforms=("cpu",),
        )

        @bundle.signature(name="serving_default", inputs={INPUT: Spec(("b", 2, _IN))})
        def serving(pair: Any) -> Any:
            return {OUTPUT: unit(pair)}
