"""From any pytree of parameters to a flat list of plain arrays, and back inside a trace.

Decides which leaves of a tree are weights (arrays) and which are part of the program (everything
else: activation functions, numbers, strings, None). Trees of Flax and Equinox carry their classes
with them and cannot be serialised; a flat list of arrays can. Does not know exports or stores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shards.errors import SpecMismatch
from shards.leaves import Array, dtype_name

__all__ = ["FlatParameters", "flatten"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatParameters:
    """A flattened tree.

    Attributes:
        arrays: the weights, in the tree's order, as NumPy arrays of dtypes that can be saved.
        rebuild: the tree again, from as many arrays or tracers.
        notices: what was changed on the way, for people.
    """

    arrays: tuple[Array, ...]
    rebuild: Callable[[Sequence[Any]], Any]
    notices: tuple[str, ...]


def flatten(params: Any) -> FlatParameters:
    """Part a tree into weights and structure.

    Args:
        params: any pytree. NumPy and JAX arrays are weights; typed random keys are saved as the
            integers they are made of; every other leaf stays in the program.

    Raises:
        SpecMismatch: a weight of a dtype that cannot be saved; names the leaf.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    arrays: list[Array] = []
    notices: list[str] = []
    # For every leaf of the tree: how to make it, from the sequence of arrays.
    makers: list[Callable[[Sequence[Any]], Any]] = []
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path) or "the parameter"
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            makers.append(_key(len(arrays), str(jax.random.key_impl(leaf))))
            arrays.append(np.asarray(jax.random.key_data(leaf)))
        elif isinstance(leaf, np.ndarray | np.generic | jax.Array):
            makers.append(_item(len(arrays)))
            arrays.append(_saveable(leaf, name, notices))
        else:
            makers.append(_constant(leaf))

    def rebuild(values: Sequence[Any]) -> Any:
        return jax.tree_util.tree_unflatten(tree, [make(values) for make in makers])

    return FlatParameters(arrays=tuple(arrays), rebuild=rebuild, notices=tuple(notices))


def _saveable(leaf: Any, name: str, notices: list[str]) -> Array:
    array = np.asarray(leaf)
    # JAX reads 64-bit arrays as 32-bit ones unless told otherwise. What is saved is what the
    # program takes.
    canonical = jax.dtypes.canonicalize_dtype(array.dtype)
    if canonical != array.dtype:
        notices.append(f"{name} is saved as {canonical}, not {array.dtype}: jax_enable_x64 is off")
        array = array.astype(canonical)
    try:
        dtype_name(array.dtype)
    except SpecMismatch as error:
        raise SpecMismatch(f"{name}: {error}") from None
    return array


def _item(index: int) -> Callable[[Sequence[Any]], Any]:
    return lambda values: values[index]


def _key(index: int, impl: str) -> Callable[[Sequence[Any]], Any]:
    return lambda values: jax.random.wrap_key_data(values[index], impl=impl)


def _constant(value: Any) -> Callable[[Sequence[Any]], Any]:
    return lambda values: value
