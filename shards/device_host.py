"""Everything that serves one device, put together: batcher, engine, executor, opener."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

from batching import Batcher, RoundRobin
from shards.device_units import DeviceUnitOpener
from shards.engine import DeviceEngine
from shards.executor import CompileWatch, Executor
from shards.loop import LoopThread
from shards.orders import ActorSpec

__all__ = ["IN_FLIGHT_MAX", "DeviceHost", "make_device_host"]

#: One step runs while the next is launched; more would only make late binding earlier.
IN_FLIGHT_MAX = 2
_CACHE_BYTES_MAX = 4 << 30
#: Far below the millisecond that nothing may hold the event loop for.
_RUN_NOW_S = 0.0001


class DeviceHost(NamedTuple):
    """The parts that an actor needs to know."""

    engine: DeviceEngine
    opener: DeviceUnitOpener
    executor: Executor
    compiles_after_available: Callable[[], int]


def make_device_host(spec: ActorSpec, io: LoopThread, generation: int) -> DeviceHost:
    """Build the serving parts of a device. Runs on the loop thread."""
    if spec.cache_directory:
        _keep_programs(spec.cache_directory)
    # On a CPU the executor thread is the device: with asynchronous dispatch every step would wake
    # another thread (measured for a small program: 55 us of CPU a call against 14). Read when the
    # backend starts, and by the CPU backend alone.
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # type: ignore[no-untyped-call]
    device = jax.local_devices()[spec.device]
    batcher = Batcher(RoundRobin(), in_flight_max=IN_FLIGHT_MAX)
    run_now_s = _RUN_NOW_S if device.platform == "cpu" else 0.0
    engine = DeviceEngine(io.loop, batcher, generation, IN_FLIGHT_MAX, run_now_s)
    executor = Executor(device, engine.results)
    engine.attach(executor)
    watch = CompileWatch((*executor.thread_ids, io.ident))
    opener = DeviceUnitOpener(engine, device)
    return DeviceHost(engine, opener, executor, lambda: watch.count)


def _keep_programs(directory: str) -> None:
    """Let XLA keep what it compiled, so that a restarted actor is back in a fraction of the time.

    The directory holds executables: it must be writable by the cluster's owner alone. One per jax
    version, since a cache is not shared between versions.
    """
    path = Path(directory) / f"xla-{jax.__version__}"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    settings = {
        "jax_compilation_cache_dir": str(path),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_compilation_cache_max_size": _CACHE_BYTES_MAX,
    }
    for name, value in settings.items():
        jax.config.update(name, value)  # type: ignore[no-untyped-call]
