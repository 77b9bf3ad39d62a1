"""Everything that serves one device, put together: batcher, engine, executor, opener."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

from batching import DEFAULT_POLICY, LEAD_S, Batcher, policy_named
from shards.awake import stay_s
from shards.compiling.cache import ProgramCache
from shards.compiling.compiler import Compiler
from shards.compiling.handover import keep_compiled
from shards.device_units import DeviceUnitOpener
from shards.engine import DeviceEngine
from shards.executor import CompileWatch, Executor
from shards.loop import LoopThread
from shards.needs import IN_FLIGHT_MAX
from shards.orders import ActorSpec, MeasuredLane

__all__ = ["DeviceHost", "batcher_of", "make_device_host"]

#: What trying a program may take besides what the actor may hold: XLA's own needs.
_TRIAL_BYTES = 4 << 30
#: Far below the millisecond that nothing may hold the event loop for.
_RUN_NOW_S = 0.0001


class DeviceHost(NamedTuple):
    """The parts that an actor needs to know."""

    engine: DeviceEngine
    batcher: Batcher
    opener: DeviceUnitOpener
    executor: Executor
    compiles_after_available: Callable[[], int]

    def costs(self) -> tuple[MeasuredLane, ...]:
        """What batches take, by lane and size. Call it on the loop thread."""
        return tuple(
            MeasuredLane(
                unit=key.unit,
                shape=key.shape,
                sizes=tuple((size, *cost) for size, cost in sizes.items()),
            )
            for key, sizes in self.batcher.costs.snapshot().items()
        )

    def close(self) -> None:
        """Finish what was submitted, and end every thread and process."""
        self.executor.close()
        self.opener.shut()


def make_device_host(spec: ActorSpec, io: LoopThread, generation: int) -> DeviceHost:
    """Build the serving parts of a device. Runs on the loop thread."""
    # On a CPU the executor thread is the device: with asynchronous dispatch every step would wake
    # another thread (measured for a small program: 55 us of CPU a call against 14). Read when the
    # backend starts, and by the CPU backend alone.
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # type: ignore[no-untyped-call]
    device = jax.local_devices()[spec.device]
    batcher = batcher_of(spec)
    is_cpu = device.platform == "cpu"
    run_now_s = _RUN_NOW_S if is_cpu else 0.0
    engine = DeviceEngine(
        io.loop, batcher, generation, IN_FLIGHT_MAX, run_now_s, awake_s=stay_s() if is_cpu else 0.0
    )
    executor = Executor(device, engine.results)
    engine.attach(executor)
    compiler = _compiler(spec, device)
    opener = DeviceUnitOpener(engine, device, compiler)
    loader = opener.loader_thread_id
    watch = CompileWatch(
        (*executor.thread_ids, io.ident, *([loader] if is_cpu else [])), lowering=(loader,)
    )
    engine.meter.compiles = lambda: watch.count
    engine.meter.compiles_for_loads = lambda: compiler.compiled
    return DeviceHost(engine, batcher, opener, executor, lambda: watch.count)


def batcher_of(spec: ActorSpec) -> Batcher:
    """What decides in a device actor of this specification, and in a simulation of one."""
    policy = policy_named(spec.policy, guard_s=spec.guard_s)
    # The baselines answer late, or give up what has waited: that is what they are compared for.
    admission = spec.policy == DEFAULT_POLICY if spec.admission is None else spec.admission
    return Batcher(
        policy, IN_FLIGHT_MAX, credit_s=spec.credit_s, lead_s=LEAD_S, admission=admission
    )


def _compiler(spec: ActorSpec, device: jax.Device) -> Compiler:
    """What is compiled is kept, so that a restarted actor is back in a fraction of the time."""
    memory_bytes_max = spec.capacity_bytes + _TRIAL_BYTES
    if not spec.cache_directory:
        return Compiler(device, memory_bytes_max=memory_bytes_max)
    root = Path(spec.cache_directory)
    cache = ProgramCache(root, jax.__version__)
    if device.platform != "cpu":
        # This process compiles for an accelerator, so XLA keeps what comes of it.
        kept = root / f"xla-{jax.__version__}"
        kept.mkdir(mode=0o700, parents=True, exist_ok=True)
        keep_compiled(str(kept))
    return Compiler(device, cache=cache, memory_bytes_max=memory_bytes_max)
