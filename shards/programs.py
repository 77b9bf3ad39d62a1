"""Stored programs, read again and compiled for one bucket.

Decides what a program needs to be compiled: a size for each of its symbols, a platform it was
lowered for, and donations declared again (an export forgets them). Does not know stores, nor when
and on which thread to compile. How functions become programs: `shards.exporting`, whose public
names are here as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax import export

from batching.errors import FailedPrecondition
from shards.errors import BundleCorrupt, SpecMismatch
from shards.exporting import (
    BATCH_BUCKETS,
    PLATFORMS,
    Artefact,
    ExportedUnit,
    export_unit,
    first_lines,
)
from shards.leaves import Array
from shards.manifest import MapUnit
from shards.specs import dtype_of

__all__ = [
    "BATCH_BUCKETS",
    "PLATFORMS",
    "Artefact",
    "ExportedUnit",
    "LoadedProgram",
    "buckets_of",
    "export_unit",
    "load_program",
]


def buckets_of(unit: MapUnit) -> Iterator[tuple[int, dict[str, int]]]:
    """Every (batch, size of each other symbol) that is compiled, small to large."""
    for batch in unit.batch_buckets:
        for sizes in itertools.product(*unit.length_buckets.values()):
            yield batch, dict(zip(unit.length_buckets, sizes, strict=True))


def load_program(data: bytes | bytearray | memoryview | Array, platform: str) -> LoadedProgram:
    """Read a stored program.

    Bytes whose digest was verified may still be hostile or of a broken JAX; parsing can end the
    process. Try programs in a process that may die before one that serves reads them.

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
    if platform == "gpu":
        platform = "rocm" if "rocm" in exported.platforms else "cuda"
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
            str(dim): position == 0
            for aval in exported.in_avals
            for position, dim in reversed(list(enumerate(aval.shape)))
            if not isinstance(dim, int)
        }

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
        *,
        compiler_options: Mapping[str, str | bool] | None = None,
    ) -> jax.stages.Compiled:
        """Compile for one bucket.

        Args:
            batch: rows.
            lengths: the size of every other symbol.
            unit: whose donations are declared again, since an export forgets them; one that no
                output can take is left out. None donates nothing.
            device: where it will run; None for JAX's default.
            compiler_options: passed to XLA.

        Returns:
            To be called as ``compiled(*leaves, *inputs)``; it returns a tuple.

        Raises:
            SpecMismatch: no size was given for a symbol, or the unit's parameters are not those
                that the program takes.
        """
        avals = self.avals(batch, lengths, device)
        donate = () if unit is None else self._donatable(unit, avals)
        jitted = jax.jit(self._exported.call, donate_argnums=donate)
        options = dict(compiler_options) if compiler_options else None
        return jitted.lower(*avals).compile(compiler_options=options)

    def _donatable(self, unit: MapUnit, avals: Sequence[jax.ShapeDtypeStruct]) -> tuple[int, ...]:
        """Donated arguments that an output can take; for others JAX would warn."""
        wanted = [(leaf.shape, dtype_of(leaf.dtype)) for leaf in unit.params]
        params = len(wanted)
        taken = [(aval.shape, aval.dtype) for aval in avals]
        if taken[:params] != wanted or len(taken) != params + len(unit.inputs):
            raise SpecMismatch(f"unit {unit.id[:12]}: its program takes other parameters")
        outs = jax.eval_shape(self._exported.call, *avals) if unit.donate else ()
        free = [(out.shape, out.dtype) for out in outs]
        usable = []
        for index in (params + index for index in unit.donate):
            if taken[index] in free:
                free.remove(taken[index])
                usable.append(index)
        return tuple(usable)
