"""Executables of a unit, from the cache or from the compile process, loaded for the actor's device.

Decides when the process is asked, how often a trial is repeated that it did not survive, and when
it is given up. Every method but `close` belongs to the actor's loader thread; none traces, lowers
or, on a CPU, compiles anything in this process.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform as machine
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Final

import jax
import msgspec

from batching.errors import ServingError
from shards.compiling.cache import ProgramCache
from shards.compiling.handover import Executable, load_compiled, load_lowered
from shards.compiling.messages import Bucket, Settings, Trial
from shards.compiling.process import ChildDied, ChildStarved, CompileProcess
from shards.compiling.spans import spans_of
from shards.manifest import MapUnit
from shards.programs import bucket_key, buckets_of
from shards.store import Store

__all__ = ["Compiler"]

logger = logging.getLogger(__name__)

#: A trial whose child died, perhaps by somebody else's hand, is given one more child.
_DEATHS_MAX: Final = 2
#: Raise it where what is kept, or what it is kept for, changes its meaning.
_FORMAT: Final = 1


class Compiler:
    """Makes executables for one device.

    Args:
        device: of this process.
        cache: where executables are kept, if anywhere.
        memory_bytes_max: what a trial may allocate.
        step_cpu_s_max: processor seconds that one step of a trial may take.
        silence_s_max: the same in wall seconds.
        patience_s: wall seconds that the compile process may be starved by what serves.
    """

    def __init__(
        self,
        device: jax.Device,
        *,
        cache: ProgramCache | None = None,
        memory_bytes_max: int = 8 << 30,
        step_cpu_s_max: int = 300,
        silence_s_max: float = 900.0,
        patience_s: float = 5.0,
    ) -> None:
        self._device = device
        self._cache = cache
        self._settings = Settings(
            platform=device.platform,
            device=jax.local_devices().index(device) if device.platform == "cpu" else 0,
            device_count=jax.device_count() if device.platform == "cpu" else 1,
            enable_x64=jax.config.read("jax_enable_x64"),  # type: ignore[no-untyped-call]
            memory_bytes_max=memory_bytes_max,
            step_cpu_s_max=step_cpu_s_max,
        )
        self._process = CompileProcess(self._settings, silence_s_max, patience_s)
        self._surroundings = _surroundings(device, self._settings)
        self._used_at = time.monotonic()

    @property
    def pid(self) -> int | None:
        """Of the compile process, if there is one."""
        return self._process.pid

    def start(self) -> None:
        """Start the compile process, so that the first load does not wait for it."""
        self._used_at = time.monotonic()
        self._process.start()

    def end_if_idle(self, idle_s: float) -> None:
        """End the compile process, and give its memory back, if it was not used for a while."""
        if time.monotonic() - self._used_at >= idle_s:
            self._process.end()

    def close(self) -> None:
        """End the compile process."""
        self._process.end()

    def load(
        self,
        store: Store,
        unit: MapUnit,
        written_by: Callable[[], str],
        on_ready: Callable[[Bucket, Executable], None],
        buckets: Sequence[Bucket] | None = None,
    ) -> None:
        """Get buckets of a unit.

        Args:
            store: has its programs and parameters.
            unit: what to compile.
            written_by: tells the version of JAX that its bundle was saved with; asked only if
                something has to be compiled.
            on_ready: called with each bucket's executable.
            buckets: which; None for those that it declares, in the order of `buckets_of`.

        Raises:
            BundleCorrupt: a program cannot be read, or is not the one that the unit names.
            ProgramRefused: it makes calls that are not allowed, cannot be compiled or run, or
                ended the process that tried it.
            ResourceExhausted: trying it took more memory than there was.
            FailedPrecondition: it was not lowered for this platform.
        """
        wanted = _buckets(unit) if buckets is None else buckets
        keys = {bucket: self._key(unit, bucket) for bucket in wanted}
        missing = [
            bucket
            for bucket, key in keys.items()
            if not self._from_cache(unit, bucket, key, on_ready)
        ]
        if not missing:
            return

        def ready(bucket: Bucket, data: bytes) -> None:
            on_ready(bucket, self._load(unit, data))
            if self._cache is not None:
                self._cache.put(keys[bucket], data)

        try:
            self._compile(store, unit, missing, written_by(), ready)
        except ServingError as error:
            raise type(error)(f"unit {unit.id[:12]}: {error.message}") from error
        finally:
            self._used_at = time.monotonic()
        if self._cache is not None:
            self._cache.trim()

    def _compile(
        self,
        store: Store,
        unit: MapUnit,
        buckets: Sequence[Bucket],
        written_by: str,
        ready: Callable[[Bucket, bytes], None],
    ) -> None:
        left = list(buckets)
        programs = tuple(store.map(program.blob).tobytes() for program in unit.programs)
        blobs = {leaf.blob.digest: leaf.blob for leaf in unit.params}
        with spans_of({digest: store.map(blob) for digest, blob in blobs.items()}) as spans:
            deaths = 0
            while left:
                trial = Trial(
                    unit=unit,
                    programs=programs,
                    blobs=spans,
                    buckets=tuple(left),
                    is_checkable=written_by == jax.__version__,
                )
                try:
                    for compiled in self._process.try_unit(trial):
                        ready(compiled.bucket, compiled.data)
                        left.remove(compiled.bucket)
                except ChildStarved as starved:
                    logger.info("unit %s: %s: it gets a share", unit.id[:12], starved)
                    self._process.hurry()
                except ChildDied as death:
                    logger.warning("unit %s: %s", unit.id[:12], death)
                    deaths += 1
                    if deaths == _DEATHS_MAX or not death.may_retry:
                        raise death.refusal() from death
                else:
                    assert not left, "the compile process left buckets out"

    def _from_cache(
        self,
        unit: MapUnit,
        bucket: Bucket,
        key: bytes,
        on_ready: Callable[[Bucket, Executable], None],
    ) -> bool:
        data = None if self._cache is None else self._cache.get(key)
        if data is None:
            return False
        assert self._cache is not None
        try:
            executable = self._load(unit, data)
        except Exception as error:  # JAX raises what it likes; the cache is only a short cut
            logger.warning("a kept executable cannot be loaded: %s", error)
            self._cache.forget(key)
            return False
        on_ready(bucket, executable)
        return True

    def _load(self, unit: MapUnit, data: bytes) -> Executable:
        if self._settings.platform != "cpu":
            return load_lowered(data, self._device)
        arguments = len(unit.params) + len(unit.program_inputs)
        return load_compiled(data, arguments, len(unit.outputs), self._device)

    def _key(self, unit: MapUnit, bucket: Bucket) -> bytes:
        """Everything that an executable depends on.

        The whole unit is in it: what was tried under one identity, buckets and blobs, is not
        taken for another.
        """
        return msgspec.json.encode([self._surroundings, unit, bucket])


def _buckets(unit: MapUnit) -> list[Bucket]:
    return [bucket_key(unit, batch, sizes) for batch, sizes in buckets_of(unit)]


def _surroundings(device: jax.Device, settings: Settings) -> list[str | int]:
    return [
        _FORMAT,
        jax.__version__,
        metadata.version("jaxlib"),
        sys.version,
        machine.machine(),
        _cpu_features(),
        os.environ.get("XLA_FLAGS", ""),
        device.platform,
        device.device_kind,
        settings.device,
        settings.device_count,
        settings.enable_x64,
    ]


def _cpu_features() -> str:
    """What the machine's code may use; a cache directory can be shared between machines."""
    lines = {
        line
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith(("model name", "flags", "Features", "CPU part"))
    }
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
