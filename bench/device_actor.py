"""A device actor for benches: a process of its own, without Ray, which does what it is told.

It is made of what a device actor is made of in production (`make_device_host`, books, a listener of
the data plane), so requests reach it, and are batched, run and answered, as in a cluster. Beside
that it takes commands, one JSON object a line, over a socket that its parent made: which policy
chooses batches, what was counted, and the bare loop that it is compared with.

The process stays on the processor that it is given, and so do JAX's threads, which are made after
it has moved there. Its event loop may be given another one: on a machine with an accelerator, what
the host does takes nothing from the device.
"""

from __future__ import annotations

import argparse
import gc
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from batching import DEFAULT_POLICY, Aimd, Policy, policy_named
from bench.look_ups_actor import CAPACITY_BYTES, GENERATION, NODE, SECRET_VARIABLE, Frames
from shards.hosting import Hosting
from shards.loop import LoopThread
from shards.manifest import MapUnit
from shards.orders import ActorSpec, HostedUnit, LoadOrder
from shards.store import LocalStore
from shards.transport import listen

__all__ = [
    "ACTOR", "AIMD", "READY", "Bare", "BareLoop", "Command", "Count", "Counts", "GetCounts",
    "GetUnits", "OpenUnit", "TimeSizes", "TimeUnit", "Timed", "UsePolicy",
]  # fmt: skip

ACTOR: Final = "device-0"
READY: Final = "device ready"
#: Clipper's policy needs an objective, so it is not among those that can be declared.
AIMD: Final = "aimd"


class UsePolicy(msgspec.Struct, frozen=True, tag="policy"):
    """Choose by this policy from now on. Answered by an empty object.

    Attributes:
        name: of `batching.policies`, or `AIMD`.
        slo_s: the objective of `AIMD`.
        guard_s: of EffSafe.
        admission: whether rows that would be late are refused; None for the default policy alone.
    """

    name: str
    slo_s: float = 1.0
    guard_s: float | None = None
    admission: bool | None = None


class GetCounts(msgspec.Struct, frozen=True, tag="counts"):
    """Tell what was counted since the start, and what batches are expected to take."""


class Bare(msgspec.Struct, frozen=True, tag="bare"):
    """Run the bare loop over a servable's largest bucket. Answered by a `BareLoop`."""

    servable: str
    seconds: float


class GetUnits(msgspec.Struct, frozen=True, tag="units"):
    """Tell what is open. Answered by a list of `OpenUnit`."""


class TimeSizes(msgspec.Struct, frozen=True, tag="time"):
    """Time every bucket by itself, sizes and servables in turn. Answered by a `Timed`.

    In turn, so that whatever disturbs a while of it disturbs no single size, and since one servable
    by itself has its weights in the cache.

    Attributes:
        servables: of one shape.
        runs: of each size.
    """

    servables: tuple[str, ...]
    runs: int


class TimeUnit(msgspec.Struct, frozen=True, tag="time-unit"):
    """Time a unit by itself in every size that is compiled. Answered by median seconds by size."""

    unit: str
    runs: int


Command = UsePolicy | GetCounts | GetUnits | Bare | TimeSizes | TimeUnit


class Count(msgspec.Struct, frozen=True):
    """What a servable's lane did.

    Attributes:
        costs: seconds that a batch of each size is expected to take now.
        known: what is known of each size: mean, bound, batches.
    """

    batches: int
    rows: int
    padded: int
    busy_s: float
    refused: int
    costs: dict[int, float]
    known: dict[int, tuple[float, float, int]]


class Counts(msgspec.Struct, frozen=True):
    """What was counted since the start.

    Attributes:
        lanes: by servable.
        loop_s: CPU seconds of the event loop's thread.
        process_s: CPU seconds of the process.
        compiles: programs that were compiled while it served; must be 0.
        frames: of calls that came.
    """

    lanes: dict[str, Count]
    loop_s: float
    process_s: float
    compiles: int
    frames: int


class OpenUnit(msgspec.Struct, frozen=True):
    """A unit that is open, once for all who use it.

    Attributes:
        users: versions, as ``servable:version``.
        nbytes: of its parameters, and of what a step allocates.
        costs: seconds that a batch of each size is expected to take now.
    """

    id: str
    users: tuple[str, ...]
    nbytes: int
    costs: dict[int, float]


class BareLoop(msgspec.Struct, frozen=True):
    """How often the bare loop ran its bucket, and in how many seconds."""

    bucket: int
    runs: int
    seconds: float


class Timed(msgspec.Struct, frozen=True):
    """Seconds of every run, by size."""

    seconds: dict[int, list[float]]


class _Device(NamedTuple):
    """The parts of the actor that commands are about."""

    io: LoopThread
    host: Any
    hosting: Hosting
    units: dict[str, MapUnit]
    frames: Frames


def _make(io: LoopThread, directory: str, cache: str) -> tuple[Any, Hosting]:
    from shards.device_host import make_device_host

    spec = ActorSpec(
        kind="device", name=ACTOR, directory=directory, capacity_bytes=CAPACITY_BYTES,
        cache_directory=cache,
    )  # fmt: skip
    host = make_device_host(spec, io, GENERATION)
    return host, Hosting(host.opener, ACTOR, CAPACITY_BYTES)


def _load(io: LoopThread, hosting: Hosting, store: str, servable: str) -> MapUnit:
    manifest = LocalStore(store).read_manifest(servable, 1)
    order = LoadOrder(
        term=1,
        store=store,
        servable=servable,
        version=1,
        units=tuple(HostedUnit(name=name) for name in manifest.units),
    )
    io.run(hosting.load(order))
    unit = next(iter(manifest.units.values()))  # counts of a servable are those of its first
    assert isinstance(unit, MapUnit)
    return unit


def _admission(asked: UsePolicy) -> bool:
    """Whether rows that would be late are refused: unasked, with the default policy alone."""
    return asked.name == DEFAULT_POLICY if asked.admission is None else asked.admission


def _policy(asked: UsePolicy) -> Policy:
    if asked.name == AIMD:
        return Aimd(asked.slo_s)
    return policy_named(asked.name, guard_s=asked.guard_s)


def _use(device: _Device, asked: UsePolicy) -> dict[str, str]:
    batcher = device.host.batcher
    batcher.use(_policy(asked))
    batcher.admission.is_on = _admission(asked)
    return {}


def _counts(device: _Device) -> Counts:
    found = {key.unit: (key, lane) for key, lane in device.host.batcher.stats().lanes.items()}
    lanes = {}
    for servable, unit in device.units.items():
        key, lane = found[unit.id]
        costs = device.host.batcher.costs[key]
        lanes[servable] = Count(
            lane.batches, lane.rows_run, lane.padded_rows, lane.busy_s, lane.refused,
            dict(zip(costs.ladder.sizes, costs.estimates, strict=True)), costs.snapshot(),
        )  # fmt: skip
    return Counts(
        lanes, time.thread_time(), time.process_time(), device.host.compiles_after_available(),
        device.frames.calls,
    )  # fmt: skip


def _units(device: _Device) -> list[OpenUnit]:
    costs = {key.unit: found for key, found in device.host.batcher.costs.table().items()}
    return [
        OpenUnit(each.id, each.users, each.nbytes, costs[each.id]) for each in device.hosting.units
    ]


def _time_unit(device: _Device, asked: TimeUnit) -> dict[int, float]:
    loaded = device.host.executor.loaded(asked.unit)
    layouts = device.host.engine.lanes.units[asked.unit].layouts
    found: dict[int, float] = {}
    for bucket, run in sorted(loaded.compiled.items()):
        inputs = [np.zeros(shape, dtype) for shape, dtype in layouts[bucket]]
        seconds = []
        for _ in range(asked.runs):
            began = time.perf_counter()
            for output in run(*loaded.leaves, *inputs):
                np.asarray(output)
            seconds.append(time.perf_counter() - began)
        found[bucket[0]] = float(np.median(seconds))
    return found


def _runner(device: _Device, servable: str, size: int) -> Callable[[], None]:
    """One run of a bucket: lay rows out, launch, and look at the outputs; nothing else."""
    from shards.hosted import Hosted
    from shards.staging import Source, StagingPool, fill

    unit = device.units[servable]
    loaded = device.host.executor.loaded(unit.id)
    bucket = (size, ())
    layout = Hosted(unit, loaded.costs).layouts[bucket]
    pool = StagingPool(1)
    pool.reserve(layout)
    slot = pool.acquire()
    assert slot is not None
    views = pool.views(slot, layout)
    program: Callable[..., Sequence[Any]] = loaded.compiled[bucket]
    arrays = [np.zeros(shape, dtype) for shape, dtype in layout]
    sources = [Source(arrays, 0, size)]

    def run() -> None:
        fill(views, sources, loaded.pads)
        for output in program(*loaded.leaves, *views):
            np.asarray(output)

    return run


def _bare(device: _Device, asked: Bare) -> BareLoop:
    """What a program takes that does nothing but run the largest bucket."""
    bucket = device.units[asked.servable].batch_buckets[-1]
    run = _runner(device, asked.servable, bucket)
    runs = 0
    began = time.perf_counter()
    until = began + asked.seconds
    while time.perf_counter() < until:
        run()
        runs += 1
    return BareLoop(bucket, runs, time.perf_counter() - began)


def _time(device: _Device, asked: TimeSizes) -> Timed:
    sizes = device.units[asked.servables[0]].batch_buckets
    runners = {
        size: [_runner(device, servable, size) for servable in asked.servables] for size in sizes
    }
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    for number in range(asked.runs + len(asked.servables)):
        for size, runs in runners.items():
            began = time.perf_counter()
            runs[number % len(runs)]()
            if number >= len(runs):  # the first of each warms
                seconds[size].append(time.perf_counter() - began)
    return Timed(seconds)


def _obey(device: _Device, command: Command) -> object:
    match command:
        case UsePolicy():
            return device.io.call(_use, device, command)
        case GetCounts():
            return device.io.call(_counts, device)
        case GetUnits():
            return device.io.call(_units, device)
        case TimeUnit():
            return _time_unit(device, command)
        case Bare():
            # On this thread: an idle loop takes nothing from it.
            return _bare(device, command)
        case TimeSizes():
            return _time(device, command)


def main(argv: Sequence[str] | None = None) -> None:
    """Load, say so, serve and obey until the parent closes the socket.

    Args:
        argv: the arguments without the program's name; `sys.argv` when None.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", required=True, help="where its Unix socket goes")
    parser.add_argument("--store", required=True)
    parser.add_argument("--cache", required=True, help="where executables are kept")
    parser.add_argument("--servables", required=True, help="what to load, as JSON")
    parser.add_argument("--control", required=True, type=int, help="the socket of commands")
    parser.add_argument("--core", type=int, help="the processor to stay on")
    parser.add_argument("--loop-core", type=int, help="the processor of its event loop")
    asked = parser.parse_args(argv)
    if asked.core is not None:
        os.sched_setaffinity(0, {asked.core})
    control = socket.socket(fileno=asked.control)
    io = LoopThread(f"{ACTOR}-io")
    host, hosting = io.call(_make, io, asked.directory, asked.cache)
    units = {
        name: _load(io, hosting, asked.store, name) for name in msgspec.json.decode(asked.servables)
    }
    frames = Frames(host.engine)
    listener = io.run(
        listen(
            name=ACTOR,
            generation=GENERATION,
            node=NODE,
            secret=os.environ[SECRET_VARIABLE].encode(),
            handler=frames,
            directory=asked.directory,
            tcp_host="127.0.0.1",
        )
    )
    if asked.loop_core is not None:
        io.call(os.sched_setaffinity, 0, {asked.loop_core})  # of the calling thread alone
    gc.collect()
    gc.freeze()
    print(READY, msgspec.json.encode(listener.endpoint).decode(), flush=True)
    device = _Device(io, host, hosting, units, frames)
    with control.makefile("rwb") as lines:
        for line in lines:
            answer = _obey(device, msgspec.json.decode(line, type=Command))
            lines.write(msgspec.json.encode(answer) + b"\n")
            lines.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
