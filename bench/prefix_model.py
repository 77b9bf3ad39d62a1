"""Servables that have most of their cost in common, and their like that share nothing.

A trunk is a chain of layers whose weights are far larger than a processor's own caches, so that a
batch costs mostly the reading of them: about alpha + beta rows, as on an accelerator. A head is a
shorter chain. Of every servable there are three kinds, each of the same layers and of weights of
its own, but for the trunk of the first kind, which is one for all:

    shared   trunk, then head: two units, and the trunk's rows meet
    apart    the same two units, but every servable has a trunk of its own
    whole    trunk and head as one unit
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

import shards
from shards.specs import Spec

if TYPE_CHECKING:
    import jax

__all__ = ["BUCKETS", "INPUT", "KINDS", "OUTPUT", "Shapes", "answer", "names", "rows", "save"]

Array = npt.NDArray[np.float32]
Weights = dict[str, Array]

KINDS: Final = ("shared", "apart", "whole")
INPUT: Final = "x"
OUTPUT: Final = "scores"
BUCKETS: Final = (1, 2, 4, 8, 16, 32)
_IN: Final = 32
_WIDTH: Final = 1024
#: What goes from trunk to head is small, as an embedding is.
_BETWEEN: Final = 64
_OUT: Final = 8


@dataclass(frozen=True, slots=True)
class Shapes:
    """How deep trunk and head are.

    Attributes:
        trunk: square layers of the trunk, 4 MiB each.
        head: the same of the head, in hundredths; the last one is narrower.
    """

    trunk: int
    head: int

    @property
    def fraction(self) -> float:
        """The trunk's part of all weights, and so of the cost."""
        trunk, head = (sum(a * b for a, b in chain) for chain in (self._trunk, self._head))
        return trunk / (trunk + head)

    @property
    def trunk_bytes(self) -> int:
        """Of one trunk's weights."""
        return 4 * sum(a * b for a, b in self._trunk)

    @property
    def _trunk(self) -> tuple[tuple[int, int], ...]:
        return _pairs(_IN, *[_WIDTH] * (self.trunk + 1), _BETWEEN)

    @property
    def _head(self) -> tuple[tuple[int, int], ...]:
        whole, part = divmod(self.head, 100)
        narrow = [_WIDTH * part // 100] if part else []
        return _pairs(_BETWEEN, *[_WIDTH] * (whole + 1), *narrow, _OUT)

    def draw(self, seed: int) -> tuple[Weights, Weights]:
        """Weights of a trunk and of a head that keep activations in the middle of tanh."""
        generator = np.random.default_rng(seed)
        return _draw(generator, self._trunk), _draw(generator, self._head)


def _pairs(*sizes: int) -> tuple[tuple[int, int], ...]:
    return tuple(pairwise(sizes))


def _draw(generator: np.random.Generator, shapes: Sequence[tuple[int, int]]) -> Weights:
    return {
        f"w{number}": generator.standard_normal(shape, np.float32) * np.float32(shape[0] ** -0.5)
        for number, shape in enumerate(shapes)
    }


def _chain(params: Mapping[str, Any], x: jax.Array) -> jax.Array:
    import jax.numpy as jnp

    for number in range(len(params)):
        x = jnp.tanh(x @ params[f"w{number}"])
    return x


def _trunk(params: Mapping[str, Any], x: jax.Array) -> dict[str, jax.Array]:
    return {"h": _chain(params, x)}


def _head(params: Mapping[str, Any], h: jax.Array) -> dict[str, jax.Array]:
    return {OUTPUT: _chain(params, h)}


def _whole(params: Mapping[str, Any], x: jax.Array) -> dict[str, jax.Array]:
    return {OUTPUT: _chain(params["head"], _chain(params["trunk"], x))}


def answer(trunk: Weights, head: Weights, x: Array) -> Array:
    """What a servable answers, by NumPy."""
    for chain in (trunk, head):
        for number in range(len(chain)):
            x = np.tanh(x @ chain[f"w{number}"])
    return x


def rows(count: int, seed: int) -> Array:
    """Rows to ask for."""
    return np.random.default_rng((seed, 1)).standard_normal((count, _IN), np.float32)


def names(kind: str, count: int) -> tuple[str, ...]:
    """Servables of a kind."""
    return tuple(f"{kind}-{number}" for number in range(count))


def save(
    store: Path, count: int, shapes: Shapes, kinds: Sequence[str], *, seed: int = 0
) -> Iterator[tuple[str, Weights, Weights]]:
    """Save so many servables of each kind, each by itself.

    Yields:
        Name, trunk and head of each, once it is saved.
    """
    common, _ = shapes.draw(seed)
    for place, kind in enumerate(kinds):
        for number, name in enumerate(names(kind, count)):
            own, head = shapes.draw(seed + 1 + place * count + number)
            trunk = common if kind == "shared" else own
            with shards.Bundle.create(store, name, 1) as bundle:
                _declare(bundle, kind, trunk, head)
            yield name, trunk, head


def _declare(bundle: shards.Bundle, kind: str, trunk: Weights, head: Weights) -> None:
    x, h = {INPUT: Spec(("b", _IN))}, {"h": Spec(("b", _BETWEEN))}
    how: dict[str, Any] = {"batch_buckets": BUCKETS, "platforms": ("cpu",)}
    if kind == "whole":
        whole = bundle.unit("whole", _whole, {"trunk": trunk, "head": head}, inputs=x, **how)

        @bundle.signature(name="serving_default", inputs=x)
        def at_once(x: Any) -> Any:
            return {OUTPUT: whole(x)}

        return
    first = bundle.unit("trunk", _trunk, trunk, inputs=x, **how)
    second = bundle.unit("head", _head, head, inputs=h, **how)

    @bundle.signature(name="serving_default", inputs=x)
    def in_turn(x: Any) -> Any:
        return {OUTPUT: second(first(x))}
