"""The models that all contenders of ``ingress`` serve, by name: chains of layers, and one scaling.

Every server imports this file, each under its own interpreter and its own JAX, and makes the same
parameters from the same seed; so it needs nothing but NumPy, and JAX where the model runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import jax

__all__ = ["ENVIRONMENT", "MODELS", "Compiled", "Model", "Parameters", "draw", "forward_of"]

Parameters = dict[str, npt.NDArray[np.float32]]
Rows = npt.NDArray[np.float32]

#: With a second Eigen thread, a product of 64 columns pays more for the hand-over than for the
#: arithmetic. No contender takes all memory of an accelerator that another may want.
ENVIRONMENT: Final = {
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One model.

    Attributes:
        name: of the servable.
        widths: of its layers, the input's first; of two equal ones, each number is only scaled.
        buckets: batch sizes that are compiled.
        turns: how often the layers between the first and the last are applied.
    """

    name: str
    widths: tuple[int, ...]
    buckets: tuple[int, ...] = (1, 8, 32, 128)
    turns: int = 1

    def parameters(self, seed: int) -> Parameters:
        """Weights and biases, scaled so that tanh is neither linear nor saturated."""
        generator = np.random.default_rng(seed)
        if len(self.widths) == 2:
            return {
                "scale": generator.standard_normal(self.widths[0], np.float32),
                "shift": generator.standard_normal(self.widths[0], np.float32),
            }
        made: Parameters = {}
        for number, (wide, narrow) in enumerate(zip(self.widths, self.widths[1:], strict=False)):
            weights = generator.standard_normal((wide, narrow), np.float32)
            made[f"w{number}"] = weights * np.float32(wide**-0.5)
            made[f"b{number}"] = generator.standard_normal(narrow, np.float32)
        return made


MODELS: Final[Mapping[str, Model]] = {
    model.name: model
    for model in (
        Model(name="mlp", widths=(64, 64, 64)),
        Model(name="mlp512", widths=(512, 512, 512, 512)),
        Model(name="megabyte", widths=(1 << 18, 1 << 18), buckets=(1, 2, 4)),
        Model(name="heavy", widths=(64, 2048, 2048, 64), buckets=(1, 4, 16), turns=16),
    )
}


def forward_of(model: Model) -> Callable[[Mapping[str, Any], jax.Array], jax.Array]:
    """The function of a model: parameters and rows ``[b, wide]`` to answers ``[b, narrow]``."""

    def scaled(params: Mapping[str, Any], x: jax.Array) -> jax.Array:
        answers: jax.Array = x * params["scale"] + params["shift"]
        return answers

    def layered(params: Mapping[str, Any], x: jax.Array) -> jax.Array:
        import jax.numpy as jnp

        last = len(params) // 2 - 1
        for number in (0, *model.turns * tuple(range(1, last))):
            x = jnp.tanh(x @ params[f"w{number}"] + params[f"b{number}"])
        answers: jax.Array = x @ params[f"w{last}"] + params[f"b{last}"]
        return answers

    return scaled if len(model.widths) == 2 else layered


class Compiled:
    """Any number of rows by programs that were compiled ahead, one for each batch size.

    Args:
        model: which.
        seed: of its parameters.
    """

    def __init__(self, model: Model, seed: int) -> None:
        import jax

        self._buckets = model.buckets
        self._params = jax.device_put(model.parameters(seed))
        self._programs = {}
        for bucket in model.buckets:
            rows = np.zeros((bucket, model.widths[0]), np.float32)
            self._programs[bucket] = jax.jit(forward_of(model)).lower(self._params, rows).compile()
            # Twice, since the first call of a shape takes a slower path than the others.
            for _ in range(2):
                self(rows)

    def __call__(self, rows: Rows) -> Rows:
        """The answers to rows ``[b, width]``."""
        most = self._buckets[-1]
        if len(rows) > most:
            starts = range(0, len(rows), most)
            return np.concatenate([self(rows[start : start + most]) for start in starts])
        bucket = next(size for size in self._buckets if size >= len(rows))
        if bucket > len(rows):
            padded = np.zeros((bucket, rows.shape[1]), np.float32)
            padded[: len(rows)] = rows
        else:
            padded = rows
        answers: Rows = np.asarray(self._programs[bucket](self._params, padded))[: len(rows)]
        return answers

    def together(self, requests: list[Rows]) -> list[Rows]:
        """The answers to several requests in one batch, one array for each."""
        if len(requests) == 1:
            return [self(requests[0])]
        ends = np.cumsum([len(rows) for rows in requests])
        return np.split(self(np.concatenate(requests)), ends[:-1])


def draw(model: Model, count: int, seed: int) -> list[list[float]]:
    """Rows to ask for, of six decimals: what a client that prints floats would send."""
    drawn = np.random.default_rng((seed, 1)).standard_normal((count, model.widths[0]))
    rows: list[list[float]] = np.round(drawn, 6).tolist()
    return rows
