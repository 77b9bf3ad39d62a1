"""How a map unit is brought up on a device: parameters put, every bucket compiled and run.

After `open` returns, no request of the unit compiles, loads or allocates staging memory. Programs
are tried, compiled and, for a CPU, timed in a process of their own (`shards.compiling`); one loader
thread here puts parameters, loads the executables that come from there and, on an accelerator, runs
each a few times for its cost. Nothing is traced or lowered in this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Final, NamedTuple, TypeVar

import jax
import numpy as np

from batching.errors import Cancelled, ServingError
from shards.compiling.compiler import Compiler
from shards.compiling.handover import Executable
from shards.engine import DeviceEngine
from shards.executor import Bucket, LoadedUnit
from shards.hosted import LaneBounds
from shards.hosting import ServableVersion, UnitOpener
from shards.leaves import map_leaves, map_pages
from shards.manifest import MapUnit, Unit
from shards.needs import outputs_bytes, parameter_bytes
from shards.orders import HostedUnit, LoadOrder, UnitState
from shards.programs import buckets_of, sizes_of, zero_inputs
from shards.progress import Progress
from shards.sharing import Member, Members, Sizes, declared_sizes, maker_of, sizes_for
from shards.store import Store

__all__ = ["DeviceUnitOpener"]

logger = logging.getLogger(__name__)

_WARM_RUNS: Final = 3
#: Seconds after which a compile process that nobody needs gives its memory (200 MB) back.
_IDLE_S: Final = 60.0


T = TypeVar("T")


class _Made(NamedTuple):
    """Buckets that were compiled and warmed: what runs them, its seconds, what it allocates."""

    compiled: dict[Bucket, Callable[..., Any]]
    costs: dict[Bucket, float]
    step_bytes: dict[Bucket, int]


class _Open:
    """A unit that is open, and who uses it.

    Attributes:
        unit: as its first user declares it; what it takes and returns is the same for all.
        members: who uses it.
        sizes: what is used of what is compiled.
        loaded: what is compiled; larger sizes stay until the unit goes, should they be wanted
            again: they are code, and take memory when they run.
        step_bytes: what a step of each bucket allocates.
        batch_max: sizes above it did not fit into memory, or could not be compiled.
        note: why.
    """

    __slots__ = ("batch_max", "loaded", "members", "note", "sizes", "step_bytes", "unit")

    def __init__(
        self, unit: MapUnit, members: Members, loaded: LoadedUnit, step_bytes: dict[Bucket, int]
    ) -> None:
        self.unit = unit
        self.members = members
        self.sizes = sizes_for(members)
        self.loaded = loaded
        self.step_bytes = step_bytes
        self.batch_max = 0
        self.note = ""

    @property
    def parameter_bytes(self) -> int:
        return sum(leaf.nbytes for leaf in self.loaded.leaves)

    def steps_bytes(self, sizes: Sizes) -> int:
        """What a step allocates at most; of a size that is not compiled, as rows of the largest."""
        largest = max(batch for batch, _ in self.step_bytes)
        most = max(nbytes for (batch, _), nbytes in self.step_bytes.items() if batch == largest)
        row_bytes = most / largest
        return max(
            self.step_bytes.get(bucket, math.ceil(row_bytes * bucket[0]))
            for bucket in sizes.buckets
        )


class DeviceUnitOpener(UnitOpener):
    """Opens map units on one device. Its methods run on the engine's loop.

    A unit that several servables use is opened once. As they come and go, the sizes of its batches
    follow (`shards.sharing`), as far as there is memory.

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
        self._open: dict[str, _Open] = {}
        #: what the loader works for, by version; orders have turns, so there is one at most
        self._working: dict[ServableVersion, Progress] = {}

    @property
    def held_bytes(self) -> int:
        """Bytes of open parameters, of what a step of each unit allocates, and of staging."""
        units = sum(
            opened.parameter_bytes + opened.steps_bytes(opened.sizes)
            for opened in self._open.values()
        )
        return units + self._engine.staging_bytes

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
        opened = self._open.get(unit.id)
        if opened is not None:
            # What other sizes its user declares; larger ones are had only where there is room.
            sizes = sizes_for({**opened.members, ("", 0): Member(unit, 0)})
            return self._growth(opened, sizes)
        staging = self._engine.lanes.growth(unit, declared_sizes(unit))
        return parameter_bytes(unit) + outputs_bytes(unit) + staging

    async def open(self, store: Store, unit: Unit, wanted: HostedUnit, order: LoadOrder) -> None:
        """Put, compile, warm, then open the lanes."""
        assert isinstance(unit, MapUnit)
        members = {_version(order): Member(unit, order.shared_bucket_max)}
        with self._work_for(_version(order)) as progress:
            progress.expect(self.buckets(unit, wanted))
            try:
                loaded, step_bytes = await self._on_loader(
                    self._load, store, unit, _version(order), progress
                )
            except Exception as error:
                # Its frames have the parameters, and live as long as anybody has the error.
                traceback.clear_frames(error.__traceback__)
                await self._on_loader(_let_go)
                raise
        self._open[unit.id] = opened = _Open(unit, members, loaded, step_bytes)
        self._engine.lanes.install(unit, loaded, _bounds(order), opened.sizes)

    async def join(
        self, store: Store, unit: Unit, wanted: HostedUnit, order: LoadOrder, room_bytes: int
    ) -> None:
        """Have the sizes that the version declares, and larger ones for all users together.

        All are compiled and warm before this returns; the lanes serve meanwhile.
        """
        assert isinstance(unit, MapUnit)
        opened = self._open[unit.id]
        members = {**opened.members, _version(order): Member(unit, order.shared_bucket_max)}
        with self._work_for(_version(order)) as progress:
            await self._have(store, opened, members, sizes_for(members), progress)
            batch_max, note = self._batch_max(opened, members, room_bytes)
            larger = sizes_for(members, lambda bucket: bucket[0] <= batch_max)
            try:
                await self._have(store, opened, members, larger, progress)
            except Cancelled:
                raise
            except ServingError as error:
                logger.warning("unit %s: larger batches: %s", unit.id[:12], error.message)
                note = error.message
        # What a step of them allocates is known only now.
        batch_max, short = self._batch_max(opened, members, room_bytes)
        opened.members, opened.batch_max, opened.note = members, batch_max, note or short
        self._resize(opened, _bounds(order))

    async def leave(self, unit: Unit, wanted: HostedUnit, version: ServableVersion) -> None:
        """Form no larger batches than the others have together."""
        opened = self._open[unit.id]
        opened.members = {key: each for key, each in opened.members.items() if key != version}
        self._resize(opened, LaneBounds())

    def call_off(self, version: ServableVersion, reason: str) -> None:
        """Stop at the next leaf or bucket, and end the compile process in the middle of one."""
        progress = self._working.get(version)
        if progress is not None:
            progress.cancel(f"{version[0]} version {version[1]}: {reason}")
            self._compiler.call_off()

    def buckets(self, unit: Unit, wanted: HostedUnit) -> int:
        """One for every size that the unit declares."""
        assert isinstance(unit, MapUnit)
        return sum(1 for _ in buckets_of(unit))

    def compiled(self, version: ServableVersion) -> Progress | None:
        """What the loader has compiled, or found compiled, of the unit that it is at."""
        return self._working.get(version)

    def give_back(self) -> None:
        """Form no batches that are larger than somebody declares, whoever shares a unit."""
        for opened in self._open.values():
            before, opened.batch_max = opened.sizes.largest, 0
            self._resize(opened, LaneBounds())
            if opened.sizes.largest < before:
                opened.note = "the memory of larger batches was needed by another load"

    def state(self, unit: Unit, wanted: HostedUnit) -> UnitState:
        """What it takes, but for staging, which all units share, and its largest batch."""
        opened = self._open[unit.id]
        return UnitState(
            id=unit.id,
            nbytes=opened.parameter_bytes + opened.steps_bytes(opened.sizes),
            batch_max=opened.sizes.largest,
            note=opened.note,
        )

    async def close(self, unit: Unit, wanted: HostedUnit) -> None:
        """Finish the unit's rows, then drop its parameters and programs."""
        await self._engine.lanes.remove(unit.id)
        self._open.pop(unit.id, None)
        await self._on_loader(_let_go)

    @contextlib.contextmanager
    def _work_for(self, version: ServableVersion) -> Iterator[Progress]:
        progress = self._working[version] = Progress(0)
        try:
            yield progress
        finally:
            del self._working[version]

    async def _have(
        self, store: Store, opened: _Open, members: Members, sizes: Sizes, progress: Progress
    ) -> None:
        """Compile and warm what is missing."""
        missing: dict[ServableVersion, list[Bucket]] = {}
        for bucket in sizes.buckets:
            if bucket not in opened.loaded.compiled:
                missing.setdefault(maker_of(members, bucket), []).append(bucket)
        progress.expect(progress.total + sum(map(len, missing.values())))
        for version, buckets in missing.items():
            unit, leaves = members[version].unit, opened.loaded.leaves
            made = await self._on_loader(
                self._compile, store, unit, version, leaves, buckets, progress
            )
            opened.loaded = replace(
                opened.loaded,
                compiled=opened.loaded.compiled | made.compiled,
                costs=opened.loaded.costs | made.costs,
            )
            opened.step_bytes |= made.step_bytes

    def _batch_max(self, opened: _Open, members: Members, room_bytes: int) -> tuple[int, str]:
        """The largest batch for which there is memory, and why it is no larger."""
        note = ""
        wanted = sizes_for(members, lambda _: True)
        for top in sorted({batch for batch, _ in wanted.buckets}, reverse=True):
            sizes = sizes_for(members, lambda bucket, top=top: bucket[0] <= top)  # type: ignore[misc]
            short = self._growth(opened, sizes) - room_bytes
            if short <= 0:
                return top, note
            note = note or f"batches of {top} rows take {short} bytes more than there are"
        return 0, note

    def _growth(self, opened: _Open, sizes: Sizes) -> int:
        """By how much `held_bytes` would grow if an open unit had these sizes."""
        steps = opened.steps_bytes(sizes) - opened.steps_bytes(opened.sizes)
        return max(steps, 0) + self._engine.lanes.growth(opened.unit, sizes)

    def _resize(self, opened: _Open, bounds: LaneBounds) -> None:
        wanted = sizes_for(opened.members, lambda _: True)
        sizes = sizes_for(
            opened.members,
            lambda bucket: bucket in opened.loaded.compiled and bucket[0] <= opened.batch_max,
        )
        if sizes.largest == wanted.largest:
            opened.note = ""
        opened.sizes = sizes
        self._engine.lanes.resize(opened.unit, opened.loaded, bounds, sizes)

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

    async def _on_loader(self, work: Callable[..., T], *arguments: object) -> T:
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._loader, work, *arguments)
        finally:
            self._end_when_idle()

    # The loader thread

    def _load(
        self, store: Store, unit: MapUnit, version: ServableVersion, progress: Progress
    ) -> tuple[LoadedUnit, dict[Bucket, int]]:
        started = time.perf_counter()
        arrays = map_leaves(store, unit.params)
        if self._device.platform == "cpu":
            for array in arrays:
                progress.check()
                map_pages(array)
        leaves = tuple(self._put(array, progress) for array in arrays)
        made = self._compile(store, unit, version, leaves, None, progress)
        loaded = LoadedUnit(
            unit=unit.id,
            leaves=leaves,
            compiled=made.compiled,
            costs=made.costs,
            pads=tuple(spec.pad for spec in unit.program_inputs),
            load_s=time.perf_counter() - started,
            per_request=unit.per_request,
        )
        return loaded, made.step_bytes

    def _put(self, array: np.ndarray[Any, Any], progress: Progress) -> jax.Array:
        progress.check()
        placed: jax.Array = jax.device_put(array, self._device)
        return placed

    def _compile(
        self,
        store: Store,
        unit: MapUnit,
        version: ServableVersion,
        leaves: tuple[jax.Array, ...],
        buckets: Sequence[Bucket] | None,
        progress: Progress,
    ) -> _Made:
        """Compile and warm buckets; None for all that the unit declares."""
        started = time.perf_counter()
        made = _Made({}, {}, {})

        def ready(bucket: Bucket, executable: Executable) -> None:
            progress.check()
            made.step_bytes[bucket] = executable.step_bytes
            made.compiled[bucket] = executable.run
            # On a CPU the compile process has run it, when nobody else wanted the processor: to do
            # so here would take it from what serves, a second and more for a large batch.
            cost_s = executable.run_s or self._warm(unit, leaves, executable.run, bucket)
            made.costs[bucket] = cost_s
            progress.note(str(bucket), 1)

        def written_by() -> str:
            return store.read_manifest(*version).created.jax

        self._compiler.load(store, unit, written_by, ready, buckets, progress)
        logger.info(
            "%s/%d: unit %s: %d buckets in %.1f s",
            *version, unit.id[:12], len(made.compiled), time.perf_counter() - started,
        )  # fmt: skip
        # JAX's caches and this program live as long as the version: a full collection would walk
        # hundreds of thousands of objects, with the loop stopped, and find nothing.
        gc.freeze()
        return made

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


def _let_go() -> None:
    """Have JAX drop the memory of parameters that are gone.

    It keeps what NumPy lent it until the next collection calls it, which on an idle device is
    never: the files of an unloaded unit stayed mapped. The youngest generation is a few hundred
    objects, so the event loop does not notice.
    """
    gc.collect(0)


def _version(order: LoadOrder) -> ServableVersion:
    return order.servable, order.version


def _bounds(order: LoadOrder) -> LaneBounds:
    return LaneBounds(order.allowance.rows_max, order.allowance.bytes_max)
