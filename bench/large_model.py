"""A large model for ``isolation-load``: a gibibyte of weights, eight buckets, many programs.

All versions have the same weights, so the store holds them once; each has a constant of its own in
its program, so that each is compiled anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

__all__ = ["BUCKETS", "NAME", "save"]

NAME: Final = "large"
BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128)
_WIDTH: Final = 4096
_MIB: Final = 1 << 20


def save(store: Path, versions: Sequence[int], mebibytes: int, *, seed: int) -> None:
    """Save versions of it.

    Args:
        store: where.
        versions: which.
        mebibytes: of weights, in layers of 64.
        seed: of the weights.
    """
    # Here, since it imports JAX.
    import jax.numpy as jnp

    import shards

    generator = np.random.default_rng(seed)
    layers = max(1, mebibytes * _MIB // (4 * _WIDTH * _WIDTH))
    weights = {
        f"w{layer:02}": generator.standard_normal((_WIDTH, _WIDTH), np.float32) / _WIDTH**0.5
        for layer in range(layers)
    }
    for version in versions:

        def forward(params: Mapping[str, Any], x: Any, version: int = version) -> Any:
            for layer in range(layers):
                x = jnp.tanh(x @ params[f"w{layer:02}"]) + 1e-3 * version
            return x[:, :8]

        shards.save(
            forward,
            weights,
            store,
            NAME,
            version,
            inputs={"x": shards.Spec(("b", _WIDTH))},
            batch_buckets=BUCKETS,
        )
