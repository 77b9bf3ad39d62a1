"""Stored programs, read again and compiled for one bucket.

Decides what a program needs to be compiled: a size for each of its symbols, a platform it was
lowered for, shapes and dtypes that are its unit's, and donations declared again (an export forgets
them). Does not know stores, nor when and in which process to compile (`shards.compiling`). How
functions become programs: `shards.exporting`, whose public names are here as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import export

from batching import Ladder, shapes
from batching.errors import FailedPrecondition
from shards.compiling.messages import Bucket
from shards.errors import BundleCorrupt, SpecMismatch
from shards.exporting import (
    BATCH_BUCKETS,
    PLATFORMS,
    REQUEST_BUCKETS,
    Artefact,
    ExportedUnit,
    export_unit,
    first_lines,
)
from shards.leaves import Array
from shards.manifest import MapUnit
from shards.needs import shape_of
from shards.specs import REQUESTS, dtype_of
from shards.staging import aligned

__all__ = [
    "BATCH_BUCKETS",
    "PLATFORMS",
    "REQUEST_BUCKETS",
    "Artefact",
    "ExportedUnit",
    "LoadedProgram",
    "bucket_key",
    "buckets_of",
    "export_unit",
    "load_program",
    "shape_of",
    "sizes_of",
    "zero_inputs",
]

#: Tensors that a message lists.
_NAMED_MAX = 8


def buckets_of(unit: MapUnit) -> Iterator[tuple[int, dict[str, int]]]:
    """Every (batch, size of each other symbol) that is compiled, small to large.

    The sizes are those that `batching.bucketize` rounds up to, by the same code. The number of
    requests, where it matters, is one of the symbols: `REQUESTS`.
    """
    symbols = sorted(unit.length_buckets)
    ladders = {symbol: Ladder(sizes) for symbol, sizes in unit.length_buckets.items()}
    for batch in unit.batch_buckets:
        for lengths in shapes(ladders):
            sizes = dict(zip(symbols, lengths, strict=True))
            for requests in unit.requests_of(batch):
                yield batch, {**sizes, REQUESTS: requests}
            if not unit.per_request:
                yield batch, sizes


def bucket_key(unit: MapUnit, batch: int, sizes: Mapping[str, int]) -> Bucket:
    """The bucket's key: lengths in the order of their names, then the number of requests."""
    lengths = tuple(sizes[symbol] for symbol in sorted(unit.length_buckets))
    return batch, (*lengths, sizes[REQUESTS]) if unit.per_request else lengths


def sizes_of(unit: MapUnit, bucket: Bucket) -> dict[str, int]:
    """The size of each symbol but the batch in a bucket; the reverse of `bucket_key`."""
    symbols = [*sorted(unit.length_buckets), *([REQUESTS] if unit.per_request else [])]
    return dict(zip(symbols, bucket[1], strict=True))


def zero_inputs(unit: MapUnit, batch: int, sizes: Mapping[str, int]) -> list[Array]:
    """Inputs to try a bucket with, in memory like that of a staging slot."""
    arrays: list[Array] = []
    for spec in unit.program_inputs:
        shape, dtype = shape_of(spec, batch, sizes)
        flat = aligned(math.prod(shape) * dtype.itemsize)
        arrays.append(flat.view(dtype).reshape(shape))
    return arrays


def load_program(data: bytes | bytearray | memoryview | Array, platform: str) -> LoadedProgram:
    """Read a stored program.

    Bytes whose digest was verified may still be hostile or of a broken JAX; parsing can end the
    process. So this is called where bundles are written, and in the compile process.

    Args:
        data: the artefact's bytes.
        platform: where it is to run: ``cpu``, ``cuda`` (or ``gpu``), ``rocm``, ``tpu``.

    Raises:
        BundleCorrupt: JAX cannot read it.
        FailedPrecondition: it was not lowered for the platform.
    """
    try:
        # JAX's reader wants a bytearray; programs are small, so the copy does not matter.
        exported = export.deserialize(bytearray(data))
    except Exception as error:
        raise BundleCorrupt(f"the program cannot be read: {first_lines(error)}") from error
    platform = _target(exported, platform)
    if platform not in exported.platforms:
        raise FailedPrecondition(
            f"the program was lowered for {', '.join(exported.platforms)}, not for {platform}: "
            f"save the bundle again with platforms=({platform!r},)"
        )
    return LoadedProgram(exported)


class LoadedProgram:
    """A program that was read; compile it once for every bucket."""

    def __init__(self, exported: export.Exported) -> None:
        self._exported = exported
        self._symbols = {
            str(dim): position == 0 and str(dim) != REQUESTS
            for aval in exported.in_avals
            for position, dim in reversed(list(enumerate(aval.shape)))
            if not isinstance(dim, int)
        }

    @property
    def exported(self) -> export.Exported:
        """What was read."""
        return self._exported

    @property
    def in_avals(self) -> tuple[Any, ...]:
        """Shapes and dtypes of parameters, then inputs; sizes may be symbols."""
        return tuple(self._exported.in_avals)

    @property
    def out_avals(self) -> tuple[Any, ...]:
        """Shapes and dtypes of outputs; sizes may be symbols."""
        return tuple(self._exported.out_avals)

    @property
    def platforms(self) -> tuple[str, ...]:
        """What it was lowered for."""
        return tuple(self._exported.platforms)

    def target(self, platform: str) -> str:
        """The name under which an export knows a platform of JAX's devices."""
        return _target(self._exported, platform)

    def avals(
        self, batch: int, lengths: Mapping[str, int] | None = None, device: jax.Device | None = None
    ) -> list[jax.ShapeDtypeStruct]:
        """Shapes of parameters, then inputs, for one bucket."""
        sizes = dict(lengths or {})
        for symbol, is_batch in self._symbols.items():
            if is_batch:
                sizes[symbol] = batch
        missing = self._symbols.keys() - sizes.keys()
        if missing:
            raise SpecMismatch(f"no size given for {', '.join(sorted(missing))}")
        sharding = None if device is None else jax.sharding.SingleDeviceSharding(device)
        return [
            jax.ShapeDtypeStruct(  # type: ignore[no-untyped-call]
                tuple(dim if isinstance(dim, int) else sizes[str(dim)] for dim in aval.shape),
                aval.dtype,
                sharding=sharding,
            )
            for aval in self._exported.in_avals
        ]

    def compile(
        self,
        batch: int,
        lengths: Mapping[str, int] | None = None,
        unit: MapUnit | None = None,
        device: jax.Device | None = None,
    ) -> jax.stages.Compiled:
        """Compile for one bucket; see `lower`.

        Returns:
            To be called as ``compiled(*leaves, *inputs)``; it returns a tuple.
        """
        donate = () if unit is None else unit.donate
        return self.lower(batch, lengths, unit, device, donate=donate).compile()

    def lower(
        self,
        batch: int,
        lengths: Mapping[str, int] | None = None,
        unit: MapUnit | None = None,
        device: jax.Device | None = None,
        *,
        donate: Sequence[int] = (),
        platform: str | None = None,
    ) -> jax.stages.Lowered:
        """Lower for one bucket.

        Args:
            batch: rows.
            lengths: the size of every other symbol.
            unit: whose the program is said to be; what it takes and returns must fit.
            device: where it will run; None for JAX's default.
            donate: indices of the unit's inputs whose memory outputs may take; one that no output
                can take is left out.
            platform: to lower for another platform than that of this process.

        Raises:
            SpecMismatch: no size was given for a symbol, or the program takes or returns
                something else than its unit says.
        """
        avals = self.avals(batch, lengths, device)
        if unit is not None:
            _check(f"unit {unit.id[:12]}: its program takes", avals, [
                *((leaf.shape, dtype_of(leaf.dtype)) for leaf in unit.params),
                *(shape_of(spec, batch, lengths or {}) for spec in unit.program_inputs),
            ])  # fmt: skip
        taken = self._donatable(unit, avals, donate) if unit is not None and donate else ()
        # An accelerator's module is called without JAX, which would leave out what is not used.
        jitted = jax.jit(
            self._exported.call, donate_argnums=taken, keep_unused=platform is not None
        )
        traced = jitted.trace(*avals)
        if unit is not None:
            _check(f"unit {unit.id[:12]}: its program returns", jax.tree.leaves(traced.out_info), [
                shape_of(spec, batch, lengths or {}) for spec in unit.outputs.values()
            ])  # fmt: skip
        lowered: jax.stages.Lowered = traced.lower(
            lowering_platforms=None if platform is None else (platform,)
        )
        return lowered

    def _donatable(
        self, unit: MapUnit, avals: Sequence[jax.ShapeDtypeStruct], donate: Sequence[int]
    ) -> tuple[int, ...]:
        """Donated arguments that an output can take; for others JAX would warn."""
        free = [(out.shape, out.dtype) for out in jax.eval_shape(self._exported.call, *avals)]
        usable = []
        for index in (len(unit.params) + index for index in donate):
            kind = (avals[index].shape, avals[index].dtype)
            if kind in free:
                free.remove(kind)
                usable.append(index)
        return tuple(usable)


def _target(exported: export.Exported, platform: str) -> str:
    if platform == "gpu":
        return "rocm" if "rocm" in exported.platforms else "cuda"
    return platform


def _check(
    what: str,
    found: Sequence[Any],
    wanted: Sequence[tuple[tuple[int, ...], np.dtype[np.generic]]],
) -> None:
    if [(aval.shape, aval.dtype) for aval in found] != wanted:
        raise SpecMismatch(f"{what} something else: {_text(found)}")


def _text(avals: Sequence[Any]) -> str:
    shapes = (f"{aval.dtype}{list(aval.shape)}" for aval in avals[:_NAMED_MAX])
    return ", ".join(shapes) + (", ..." if len(avals) > _NAMED_MAX else "")
