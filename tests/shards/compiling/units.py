"""Units for the compile process: saved ones, and programs that no save would write."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jax import export

from shards.compiling.compiler import Compiler
from shards.compiling.handover import Executable
from shards.compiling.messages import Bucket
from shards.manifest import MapUnit
from shards.saving import save
from shards.specs import Spec
from shards.store import LocalStore

X = {"x": Spec(("b", 8))}
WEIGHTS = [np.random.default_rng(seed).random((8, 8), np.float32) for seed in range(3)]

Executables = dict[Bucket, Executable]


def layers(params: Any, x: Any) -> Any:
    for weight in params:
        x = jnp.tanh(x @ weight)
    return {"scores": jax.nn.softmax(x), "best": jax.lax.top_k(x, 2)[0]}


def answer(x: np.ndarray) -> np.ndarray:
    """The best two of `layers` over `WEIGHTS`."""
    for weight in WEIGHTS:
        x = np.tanh(x @ weight)
    return -np.sort(-x, axis=1)[:, :2]


def saved(
    path: Path, fn: Callable[..., Any] = layers, **options: Any
) -> tuple[LocalStore, MapUnit]:
    """A store with a bundle of one unit, and that unit."""
    arguments: dict[str, Any] = {"inputs": X, "batch_buckets": (1, 4), **options}
    params = arguments.pop("params", WEIGHTS)
    unit = save(fn, params, path, "model", 1, **arguments).units["model"]
    assert isinstance(unit, MapUnit)
    return LocalStore(path), unit


def with_program(store: LocalStore, unit: MapUnit, data: bytes) -> MapUnit:
    """The unit, whose only program is now this; its digest is right, as in a hostile bundle."""
    program = msgspec.structs.replace(unit.programs[0], blob=store.put(data))
    return msgspec.structs.replace(unit, programs=(program,))


def program_of(store: LocalStore, unit: MapUnit) -> bytes:
    (program,) = unit.programs
    return store.map(program.blob).tobytes()


def exported(fn: Callable[..., Any], **options: Any) -> bytes:
    """An export of a function of three 8x8 matrices and a batch of 8 columns, as it comes."""
    (batch,) = export.symbolic_shape("b")
    avals = [jax.ShapeDtypeStruct((8, 8), jnp.float32)] * len(WEIGHTS)  # type: ignore[no-untyped-call]
    x = jax.ShapeDtypeStruct((batch, 8), jnp.float32)  # type: ignore[no-untyped-call]
    return bytes(export.export(jax.jit(fn), **options)(*avals, x).serialize())


def load(
    compiler: Compiler, store: LocalStore, unit: MapUnit, written_by: str = jax.__version__
) -> Executables:
    """Every bucket that the compiler made."""
    made: Executables = {}
    compiler.load(store, unit, lambda: written_by, made.__setitem__)
    return made


@functools.cache
def compiler() -> Compiler:
    """One for all tests: its process takes a second to start. However busy others are, it stays."""
    return Compiler(jax.devices()[0], patience_s=900.0)
