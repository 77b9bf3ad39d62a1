"""The servables of ``shared``: heads of their own on a trunk of 200 MB, in one of two ways.

* ``shared-N``: all have the same trunk, each saved by itself as if by teams that never met.
* ``apart-N``: of the same layers and sizes, but each with a trunk of its own.

What each answers is known, to float32, so a servable that got another's head or trunk is noticed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import orjson

from bench.load import Request
from bench.traffic import Asked

__all__ = ["KINDS", "TRUNK_BYTES", "named", "read", "save"]

Array = npt.NDArray[np.float32]

KINDS: Final = ("shared", "apart")
_BUCKETS: Final = (1, 8)
#: From layer to layer; square ones of 16 MiB, as far as is needed.
_TRUNK: Final = (64, *[2048] * 13, 64)
_HEAD: Final = (64, 256, 8)
#: Of one trunk's weights.
TRUNK_BYTES: Final = 4 * sum(a * b for a, b in pairwise(_TRUNK))
_TOLERANCE: Final = 1e-3


def named(kind: str, number: int) -> str:
    """The name of one of them."""
    return f"{kind}-{number}"


def save(store: Path, kind: str, count: int, *, seed: int) -> Iterator[Asked]:
    """Save so many servables of a kind.

    Yields:
        What is asked of each, and how its answers are read: as ``(1,)`` where they are its own.
    """
    # Here, since it imports JAX.
    import shards

    x = np.random.default_rng((seed, 0)).standard_normal((1, _TRUNK[0]), np.float32)
    how: dict[str, Any] = {"batch_buckets": _BUCKETS, "platforms": ("cpu",)}
    trunk: dict[str, Array] = {}
    for number in range(count):
        if kind == "apart" or not trunk:
            trunk = _drawn(_TRUNK, (seed, 1, number))
        head = _drawn(_HEAD, (seed, 2, number))
        name = named(kind, number)
        with shards.Bundle.create(store, name, 1) as bundle:
            first = bundle.unit(
                "trunk", _chain, trunk, inputs={"x": shards.Spec(("b", _TRUNK[0]))}, **how
            )
            second = bundle.unit(
                "head", _chain, head, inputs={"x": shards.Spec(("b", _HEAD[0]))}, **how
            )

            def scored(x: Any, first: Any = first, second: Any = second) -> Any:
                return {"scores": second(first(x))}

            bundle.signature(inputs={"x": shards.Spec(("b", _TRUNK[0]))})(scored)
        expected = _answer(head, _answer(trunk, x))[0]
        body = orjson.dumps({"instances": x.tolist()})
        request = Request(path=f"/v1/models/{name}:predict", body=body)
        yield Asked(name, request, partial(read, expected))


def _drawn(sizes: tuple[int, ...], seed: tuple[int, ...]) -> dict[str, Array]:
    """Weights that keep activations in the middle of tanh."""
    generator = np.random.default_rng(seed)
    return {
        f"w{number:02}": generator.standard_normal(shape, np.float32) * np.float32(shape[0] ** -0.5)
        for number, shape in enumerate(pairwise(sizes))
    }


def _chain(params: Mapping[str, Any], x: Any) -> Any:
    import jax.numpy as jnp

    for number in range(len(params)):
        x = jnp.tanh(x @ params[f"w{number:02}"])
    return x


def _answer(params: Mapping[str, Array], x: Array) -> Array:
    for number in range(len(params)):
        x = np.tanh(x @ params[f"w{number:02}"])
    return x


def read(expected: Array, body: bytes) -> tuple[int, ...]:
    """``(1,)`` for the answer that is expected.

    Raises:
        ValueError: it is another one, or none.
    """
    try:
        [told] = orjson.loads(body)["predictions"]
        is_right = np.allclose(np.asarray(told, np.float32), expected, atol=_TOLERANCE)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not an answer: {body[:200]!r}") from error
    if not is_right:
        raise ValueError(f"an answer of another servable: {told}")
    return (1,)
