"""Executables of a unit, those of an equal program or new ones, loaded for the actor's device.

Decides when the compile process is asked, how often a trial is repeated that it did not survive,
and when it is given up. Every method but
`close` and `call_off` belongs to the actor's loader thread; none traces, lowers or, on a CPU,
compiles anything in this process.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import jax

from batching.errors import Cancelled, ServingError
from shards.compiling.cache import ProgramCache
from shards.compiling.handover import Executable
from shards.compiling.kept import KeptExecutables
from shards.compiling.messages import Bucket, Compiled, Settings, Trial
from shards.compiling.process import ChildDied, ChildStarved, CompileProcess
from shards.compiling.spans import spans_of
from shards.manifest import MapUnit
from shards.programs import bucket_key, buckets_of
from shards.progress import Progress
from shards.store import Store

__all__ = ["Compiler"]

logger = logging.getLogger(__name__)

#: A trial whose child died, perhaps by somebody else's hand, is given one more child.
_DEATHS_MAX: Final = 2


class Compiler:
    """Makes executables for one device.

    Args:
        device: of this process.
        cache: where executables are kept, if anywhere.
        memory_bytes_max: what a trial may allocate.
        step_cpu_s_max: processor seconds that one step of a trial may take.
        silence_s_max: the same in wall seconds.
        patience_s: wall seconds that the compile process may be starved by what serves.

    Attributes:
        compiled: how many programs were compiled; none is where an equal one was before.
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
        self.compiled = 0
        settings = Settings(
            platform=device.platform,
            device=jax.local_devices().index(device) if device.platform == "cpu" else 0,
            device_count=jax.device_count() if device.platform == "cpu" else 1,
            enable_x64=jax.config.read("jax_enable_x64"),  # type: ignore[no-untyped-call]
            memory_bytes_max=memory_bytes_max,
            step_cpu_s_max=step_cpu_s_max,
        )
        self._process = CompileProcess(settings, silence_s_max, patience_s)
        self._kept = KeptExecutables(device, settings, cache)
        self._used_at = time.monotonic()
        self._is_trying = False

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

    def call_off(self) -> None:
        """End the trial that goes on, if any, and the process with it. On any thread.

        XLA cannot be interrupted, and a large bucket takes it minutes; a process takes a second.
        """
        if self._is_trying:
            self._process.kill()

    def load(
        self,
        store: Store,
        unit: MapUnit,
        written_by: Callable[[], str],
        on_ready: Callable[[Bucket, Executable], None],
        buckets: Sequence[Bucket] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Get buckets of a unit.

        Args:
            store: has its programs and parameters.
            unit: what to compile.
            written_by: tells the version of JAX that its bundle was saved with; asked only if
                something has to be compiled.
            on_ready: called with each bucket's executable.
            buckets: which; None for those that it declares, in the order of `buckets_of`.
            progress: says whether to go on; who calls it off then calls `call_off`.

        Raises:
            BundleCorrupt: a program cannot be read, or is not the one that the unit names.
            ProgramRefused: it makes calls that are not allowed, cannot be compiled or run, or
                ended the process that tried it.
            ResourceExhausted: trying it took more memory than there was.
            FailedPrecondition: it was not lowered for this platform.
            Cancelled: it was called off.
        """
        progress = progress or Progress(0)
        missing: dict[Bucket, Executable | None] = {}
        for bucket in _buckets(unit) if buckets is None else buckets:
            progress.check()
            found = self._kept.find(unit, bucket)
            run_s = None if found is None else self._kept.tried_s(unit, bucket)
            if found is not None and run_s is not None:
                on_ready(bucket, found._replace(run_s=run_s))
            else:
                missing[bucket] = found
        if not missing:
            return
        # Before anything is checked: whoever calls this off later finds it so.
        self._is_trying = True
        try:
            self._try(store, unit, missing, written_by(), on_ready, progress)
        except Cancelled:
            raise
        except ServingError as error:
            raise type(error)(f"unit {unit.id[:12]}: {error.message}") from error
        finally:
            self._is_trying = False
            self._used_at = time.monotonic()
        self._kept.trim()

    def _try(
        self,
        store: Store,
        unit: MapUnit,
        missing: Mapping[Bucket, Executable | None],
        written_by: str,
        on_ready: Callable[[Bucket, Executable], None],
        progress: Progress,
    ) -> None:
        """Have buckets tried; what an equal program was compiled to is not compiled again."""
        left = dict(missing)
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
                    executables=tuple(
                        b"" if found is None else self._kept.data(unit, bucket)
                        for bucket, found in left.items()
                    ),
                    is_checkable=written_by == jax.__version__,
                )
                # The process first: who calls this off after the check finds it, and ends it.
                self._process.start()
                progress.check()
                try:
                    for compiled in self._process.try_unit(trial):
                        ours = left.pop(compiled.bucket)
                        on_ready(compiled.bucket, self._taken(unit, compiled, ours))
                except ChildStarved as starved:
                    logger.info("unit %s: %s: it gets a share", unit.id[:12], starved)
                    self._process.hurry()
                except ChildDied as death:
                    progress.check()  # if it was called off, it is nobody's fault
                    logger.warning("unit %s: %s", unit.id[:12], death)
                    deaths += 1
                    if deaths == _DEATHS_MAX or not death.may_retry:
                        raise death.refusal() from death
                else:
                    assert not left, "the compile process left buckets out"

    def _taken(self, unit: MapUnit, compiled: Compiled, ours: Executable | None) -> Executable:
        """The executable of a bucket that was tried; ours, where it was only run."""
        if compiled.data:
            self.compiled += 1
            ours = self._kept.add(unit, compiled.bucket, compiled.data)
        assert ours is not None, "the compile process ran what it was not given"
        self._kept.mark_tried(unit, compiled.bucket, compiled.run_s)
        return ours._replace(run_s=compiled.run_s)


def _buckets(unit: MapUnit) -> list[Bucket]:
    return [bucket_key(unit, batch, sizes) for batch, sizes in buckets_of(unit)]
