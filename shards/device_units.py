"""How a map unit is brought up on a device: parameters put, every bucket compiled and run once.

After `open` returns, no request of the unit compiles, loads or allocates staging memory. Programs
are tried and compiled in a process of their own (`shards.compiling`); one loader thread here puts
parameters, loads the executables that come from there, and runs each a few times for its cost.
Nothing is traced or lowered in this process.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import jax
import numpy as np

from shards.compiling.compiler import Compiler
from shards.compiling.handover import Executable
from shards.engine import DeviceEngine
from shards.executor import Bucket, LoadedUnit
from shards.hosted import LaneBounds
from shards.leaves import leaf_bytes, map_leaves
from shards.manifest import MapUnit, Unit
from shards.orders import HostedUnit, LoadOrder
from shards.programs import outputs_bytes, sizes_of, zero_inputs
from shards.store import Store

__all__ = ["DeviceUnitOpener"]

logger = logging.getLogger(__name__)

_WARM_RUNS: Final = 3
#: Seconds after which a compile process that nobody needs gives its memory (200 MB) back.
_IDLE_S: Final = 60.0


class DeviceUnitOpener:
    """Opens map units on one device. Its methods run on the engine's loop.

    Args:
        engine: gets the lanes of every unit that is ready.
        device: where parameters and programs go.
        compiler: makes executables for that device; it belongs to this opener's loader thread.
        idle_s: seconds after which an idle compile process is ended.
    """

    def __init__(
        self,
        engine: DeviceEngine,
        device: jax.Device,
        compiler: Compiler,
        idle_s: float = _IDLE_S,
    ) -> None:
        self._engine = engine
        self._device = device
        self._compiler = compiler
        self._idle_s = idle_s
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._idle: asyncio.TimerHandle | None = None
        self._is_shut = False
        self._held: dict[str, int] = {}

    @property
    def held_bytes(self) -> int:
        """Bytes of open parameters, of what a step of each unit allocates, and of staging."""
        return sum(self._held.values()) + self._engine.staging_bytes

    @property
    def loader_thread_id(self) -> int:
        """Identifier of the thread that loads, for `CompileWatch`."""
        return self._loader.submit(threading.get_ident).result()

    def prepare(self) -> None:
        """Start the compile process now, so that the first load does not wait for it."""
        self._loader.submit(self._compiler.start)
        self._end_when_idle()

    def estimate(self, unit: Unit, wanted: HostedUnit) -> int:
        """Bytes of the parameters, of the outputs of a step, and by how much staging will grow.

        What a step allocates for itself is known once its program is compiled: `held_bytes` has it.
        """
        assert isinstance(unit, MapUnit)
        parameters = sum(leaf_bytes(leaf) for leaf in unit.params)
        return parameters + outputs_bytes(unit) + self._engine.staging_growth(unit)

    async def open(self, store: Store, unit: Unit, wanted: HostedUnit, order: LoadOrder) -> None:
        """Put, compile, warm, then open the lanes."""
        assert isinstance(unit, MapUnit)
        loop = asyncio.get_running_loop()
        try:
            loaded, step_bytes = await loop.run_in_executor(
                self._loader, self._load, store, unit, order
            )
        finally:
            self._end_when_idle()
        bounds = LaneBounds(order.rows_max, order.bytes_max)
        self._engine.install(unit, loaded, bounds)
        self._held[unit.id] = sum(leaf.nbytes for leaf in loaded.leaves) + step_bytes

    async def close(self, unit: Unit, wanted: HostedUnit) -> None:
        """Finish the unit's rows, then drop its parameters and programs."""
        await self._engine.remove(unit.id)
        self._held.pop(unit.id, None)

    def shut(self) -> None:
        """End the compile process and the loader thread. On any thread; nothing opens after it."""
        self._is_shut = True
        self._loader.submit(self._compiler.close)
        self._loader.shutdown()

    def _end_when_idle(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
        self._idle = asyncio.get_running_loop().call_later(self._idle_s, self._on_idle)

    def _on_idle(self) -> None:
        if not self._is_shut:
            self._loader.submit(self._compiler.end_if_idle, self._idle_s)

    # The loader thread

    def _load(self, store: Store, unit: MapUnit, order: LoadOrder) -> tuple[LoadedUnit, int]:
        started = time.perf_counter()
        leaves = tuple(
            jax.device_put(array, self._device) for array in map_leaves(store, unit.params)
        )
        compiled: dict[Bucket, Callable[..., Any]] = {}
        costs: dict[Bucket, float] = {}
        step_bytes = 0

        def ready(bucket: Bucket, executable: Executable) -> None:
            nonlocal step_bytes
            step_bytes = max(step_bytes, executable.step_bytes)
            compiled[bucket] = executable.run
            costs[bucket] = self._warm(unit, leaves, executable.run, bucket)

        def written_by() -> str:
            return store.read_manifest(order.servable, order.version).created.jax

        self._compiler.load(store, unit, written_by, ready)
        load_s = time.perf_counter() - started
        logger.info(
            "%s/%d: unit %s: %d buckets in %.1f s",
            order.servable, order.version, unit.id[:12], len(compiled), load_s,
        )  # fmt: skip
        pads = tuple(spec.pad for spec in unit.program_inputs)
        # JAX's caches and this program live as long as the version: a full collection would walk
        # hundreds of thousands of objects, with the loop stopped, and find nothing.
        gc.freeze()
        loaded = LoadedUnit(
            unit=unit.id, leaves=leaves, compiled=compiled, costs=costs, pads=pads,
            load_s=load_s,
            per_request=unit.per_request,
        )  # fmt: skip
        return loaded, step_bytes

    def _warm(
        self,
        unit: MapUnit,
        leaves: tuple[jax.Array, ...],
        run: Callable[..., Sequence[Any]],
        bucket: Bucket,
    ) -> float:
        """Run a bucket a few times; returns the seconds of the quickest."""
        arrays = zero_inputs(unit, bucket[0], sizes_of(unit, bucket))
        best_s = math.inf
        for _ in range(_WARM_RUNS):
            inputs: Sequence[Any] = arrays
            if self._device.platform != "cpu":
                # Anew for every run: a program that donates takes the memory of what it is given.
                inputs = [jax.device_put(array, self._device) for array in arrays]
            started = time.perf_counter()
            for output in run(*leaves, *inputs):
                np.asarray(output)
            best_s = min(best_s, time.perf_counter() - started)
        return best_s
