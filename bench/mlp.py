"""The model of the ingress benchmarks: an MLP of 64 → 64 → 64, the same for every contender.

Small on purpose: what is measured is the way to the device and back. Without JAX for whoever
only wants the parameters or the rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import jax

__all__ = ["BUCKETS", "WIDTH", "Parameters", "forward", "parameters", "rows"]

WIDTH: Final = 64
BUCKETS: Final = (1, 8, 32, 128)

Parameters = dict[str, npt.NDArray[np.float32]]


def parameters(seed: int) -> Parameters:
    """Weights and biases, scaled so that tanh is neither linear nor saturated."""
    generator = np.random.default_rng(seed)
    scale = np.float32(WIDTH**-0.5)
    return {
        "w1": generator.standard_normal((WIDTH, WIDTH), np.float32) * scale,
        "b1": generator.standard_normal(WIDTH, np.float32) * scale,
        "w2": generator.standard_normal((WIDTH, WIDTH), np.float32) * scale,
        "b2": generator.standard_normal(WIDTH, np.float32) * scale,
    }


def forward(params: Parameters, x: jax.Array) -> jax.Array:
    """The model."""
    import jax.numpy as jnp

    hidden = jnp.tanh(x @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


def rows(count: int, seed: int) -> list[list[float]]:
    """Rows to ask for, of six decimals: what a client that prints floats would send."""
    drawn = np.random.default_rng((seed, 1)).standard_normal((count, WIDTH))
    return [[round(value, 6) for value in row] for row in drawn.tolist()]
