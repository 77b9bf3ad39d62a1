"""How a map unit is brought up on a device: parameters put, every bucket compiled and run once.

After `open` returns, no request of the unit compiles, loads or allocates staging memory. Compiling
happens on one loader thread, never on the threads that serve.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from shards.engine import DeviceEngine, LaneBounds
from shards.executor import Bucket, LoadedUnit
from shards.leaves import leaf_bytes, map_leaves
from shards.manifest import MapUnit, Unit
from shards.orders import HostedUnit, LoadOrder
from shards.programs import buckets_of, load_program
from shards.specs import dtype_of
from shards.staging import aligned
from shards.store import Store

__all__ = ["DeviceUnitOpener"]

logger = logging.getLogger(__name__)

_WARM_RUNS = 3


class DeviceUnitOpener:
    """Opens map units on one device. Its methods run on the engine's loop.

    Args:
        engine: gets the lanes of every unit that is ready.
        device: where parameters and programs go.
    """

    def __init__(self, engine: DeviceEngine, device: jax.Device) -> None:
        self._engine = engine
        self._device = device
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._held: dict[str, int] = {}

    @property
    def held_bytes(self) -> int:
        """Bytes of the parameters that are open and of what their programs need besides."""
        return sum(self._held.values())

    def estimate(self, unit: Unit, wanted: HostedUnit) -> int:
        """Bytes of the parameters. What programs need besides is measured once they exist."""
        assert isinstance(unit, MapUnit)
        return sum(leaf_bytes(leaf) for leaf in unit.params)

    async def open(self, store: Store, unit: Unit, wanted: HostedUnit, order: LoadOrder) -> None:
        """Put, compile, warm, then open the lanes."""
        assert isinstance(unit, MapUnit)
        loop = asyncio.get_running_loop()
        loaded, temp_bytes = await loop.run_in_executor(
            self._loader, self._load, store, unit, f"{order.servable}/{order.version}"
        )
        bounds = LaneBounds(order.rows_max, order.bytes_max)
        self._engine.install(unit, loaded, bounds)
        self._held[unit.id] = sum(leaf.nbytes for leaf in loaded.leaves) + temp_bytes

    async def close(self, unit: Unit, wanted: HostedUnit) -> None:
        """Finish the unit's rows, then drop its parameters and programs."""
        await self._engine.remove(unit.id)
        self._held.pop(unit.id, None)

    # The loader thread

    def _load(self, store: Store, unit: MapUnit, owner: str) -> tuple[LoadedUnit, int]:
        started = time.perf_counter()
        # A staging slot is memory that is used again, so on a CPU, where programs read it in
        # place, inputs are never donated.
        leaves = tuple(
            jax.device_put(array, self._device) for array in map_leaves(store, unit.params)
        )
        programs = {
            program.batch: load_program(store.map(program.blob), self._device.platform)
            for program in unit.programs
        }
        compiled: dict[Bucket, Callable[..., Any]] = {}
        costs: dict[Bucket, float] = {}
        temp_bytes = 0
        donating = None if self._device.platform == "cpu" else unit
        for batch, sizes in buckets_of(unit):
            program = programs.get(None) or programs[batch]
            executable = program.compile(batch, sizes, unit=donating, device=self._device)
            temp_bytes = max(temp_bytes, _temp_bytes(executable))
            bucket = (batch, tuple(sizes[symbol] for symbol in sorted(sizes)))
            compiled[bucket] = executable
            costs[bucket] = self._warm(unit, leaves, executable, batch, sizes)
        logger.info(
            "%s: unit %s: %d buckets in %.1f s",
            owner, unit.id[:12], len(compiled), time.perf_counter() - started,
        )  # fmt: skip
        pads = tuple(spec.pad for spec in unit.inputs.values())
        # JAX's caches and this program live as long as the version: a full collection would walk
        # hundreds of thousands of objects, with the loop stopped, and find nothing.
        gc.freeze()
        return LoadedUnit(
            unit=unit.id, leaves=leaves, compiled=compiled, costs=costs, pads=pads
        ), temp_bytes

    def _warm(
        self,
        unit: MapUnit,
        leaves: tuple[jax.Array, ...],
        executable: Callable[..., Any],
        batch: int,
        sizes: Mapping[str, int],
    ) -> float:
        """Run a bucket a few times; returns the seconds of the quickest."""
        arrays: list[Any] = []
        for spec in unit.inputs.values():
            shape = (batch, *(sizes[d] if isinstance(d, str) else d for d in spec.row_shape))
            dtype = dtype_of(spec.dtype)
            flat = aligned(int(np.prod(shape)) * dtype.itemsize)
            arrays.append(flat.view(dtype).reshape(shape))
        best_s = math.inf
        for _ in range(_WARM_RUNS):
            inputs = arrays
            if self._device.platform != "cpu":
                # Anew for every run: a program that donates takes the memory of what it is given.
                inputs = [jax.device_put(array, self._device) for array in arrays]
            started = time.perf_counter()
            for output in executable(*leaves, *inputs):
                np.asarray(output)
            best_s = min(best_s, time.perf_counter() - started)
        return best_s


def _temp_bytes(executable: Any) -> int:
    analysis = executable.memory_analysis()
    return int(getattr(analysis, "temp_size_in_bytes", 0) or 0)
