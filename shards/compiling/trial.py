"""What the compile process does with a unit: read it, check it, compile it, run it.

Decides what a program must be before an actor may have it: readable; without custom calls that are
not allowed; exactly what its unit says, down to the identity; compilable; and able to run to its
end once, on the unit's own parameters. Says beforehand what it is about to do, since any step may
be the last that this process takes. Does not know the process around it, nor stores.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

import jax
import numpy as np
from jax import export

from batching.errors import ServingError
from shards.canonical import artefact_of, canonical, module_of
from shards.compiling.handover import load_compiled, pack_compiled, pack_lowered
from shards.compiling.messages import Compiled, FileSpan, Settings, Trial
from shards.custom_calls import refuse_foreign_calls
from shards.errors import BundleCorrupt, ProgramRefused
from shards.exporting import first_lines
from shards.identity import map_identity
from shards.leaves import Array, digest_of_leaf
from shards.manifest import BlobRef, MapUnit
from shards.programs import LoadedProgram, load_program, sizes_of, zero_inputs
from shards.specs import REQUESTS, dtype_of

__all__ = ["try_unit"]

#: On behalf of an accelerator a program is run on the CPU, once, if its parameters are no more
#: than this: more would take long and prove little about another device.
_CPU_RUN_BYTES_MAX: Final = 1 << 30
#: What a bucket is run for its cost: so often, or until it took so many seconds.
_RUNS_MAX: Final = 3
_RUNS_S: Final = 0.3
_TICKS_S: Final = 0.02


def try_unit(trial: Trial, settings: Settings, tell: Callable[[str], None]) -> Iterator[Compiled]:
    """Try a unit; yield each bucket that may be handed over.

    Args:
        trial: what to try.
        settings: for which device.
        tell: called with what is about to be done.

    Raises:
        BundleCorrupt: a program cannot be read, or is not the one that its unit names.
        SpecMismatch: it takes or returns something else than its unit says.
        ProgramRefused: it calls what it must not, or cannot be compiled or run.
        FailedPrecondition: it was not lowered for the platform.
        MemoryError: it takes more than the process may have.
    """
    unit = trial.unit
    programs = _read_all(trial, settings.platform, tell)
    arrays = _map_leaves(unit, trial.blobs)
    if trial.is_checkable:
        tell("finding its identity")
        _check_identity(unit, programs, trial, arrays)
    device = jax.local_devices()[settings.device]
    leaves = [jax.device_put(array, device) for array in arrays]
    for bucket, executable in zip(trial.buckets, trial.executables, strict=True):
        batch, sizes = bucket[0], sizes_of(unit, bucket)
        program = programs.get(None) or programs[batch]
        tries = _Tries(unit, program, leaves, device, tell)
        data, run_s = b"", 0.0
        if settings.platform == "cpu":
            data = b"" if executable else tries.compile(batch, sizes)
            # The parameters may be others than those that it was tried with.
            run_s = tries.run(executable or data, batch, sizes)
        elif not executable:
            if bucket == trial.buckets[0] and _runs_here(program, leaves):
                tries.run(tries.compile(batch, sizes), batch, sizes)
            data = tries.lower_for(batch, sizes, program.target(settings.platform))
        yield Compiled(bucket=bucket, data=data, run_s=run_s)


class _Tries:
    """One program of a unit, tried bucket by bucket."""

    def __init__(
        self,
        unit: MapUnit,
        program: LoadedProgram,
        leaves: Sequence[jax.Array],
        device: jax.Device,
        tell: Callable[[str], None],
    ) -> None:
        self._unit = unit
        self._program = program
        self._leaves = leaves
        self._device = device
        self._tell = tell

    def compile(self, batch: int, sizes: Mapping[str, int]) -> bytes:
        """Compile for the CPU, without donations: a staging slot is used again."""
        where = _bucket_text(batch, sizes)
        self._tell(f"compiling it for {where}")
        with _refusing(f"it cannot be compiled for {where}"):
            lowered = self._program.lower(batch, sizes, self._unit, self._device)
            return pack_compiled(lowered.compile())

    def run(self, data: bytes, batch: int, sizes: Mapping[str, int]) -> float:
        """Run what is handed over, loaded again: the actor is not the first to do so.

        Returns:
            Seconds of the quickest of a few runs, as far as this process had a processor.
        """
        where = _bucket_text(batch, sizes)
        self._tell(f"running it for {where}")
        best_s = math.inf
        with _refusing(f"it cannot be run for {where}"):
            inputs = zero_inputs(self._unit, batch, sizes)
            arguments = len(self._leaves) + len(inputs)
            executable = load_compiled(data, arguments, len(self._unit.outputs), self._device)
            until = time.perf_counter() + _RUNS_S
            for _ in range(_RUNS_MAX):
                watch = _Watch()
                for output in executable.run(*self._leaves, *inputs):
                    np.asarray(output)
                best_s = min(best_s, watch.read())
                if time.perf_counter() > until:
                    break
        return best_s

    def lower_for(self, batch: int, sizes: Mapping[str, int], platform: str) -> bytes:
        """Lower for an accelerator, which this process has not."""
        where = f"{platform}, {_bucket_text(batch, sizes)}"
        self._tell(f"lowering it for {where}")
        with _refusing(f"it cannot be lowered for {where}"):
            donate = self._unit.donate
            return pack_lowered(
                self._program.lower(batch, sizes, self._unit, donate=donate, platform=platform)
            )


class _Watch:
    """Seconds of wall time or, where whoever serves took the processor away, of processor time."""

    def __init__(self) -> None:
        self._began = time.perf_counter(), time.process_time(), time.thread_time()

    def read(self) -> float:
        """Seconds since the beginning."""
        now = time.perf_counter(), time.process_time(), time.thread_time()
        wall, process, thread = (end - began for end, began in zip(now, self._began, strict=True))
        # Under a limit of processor time the kernel counts that of a process in ticks.
        return wall if wall < _TICKS_S else min(wall, max(process, thread))


def _read_all(
    trial: Trial, platform: str, tell: Callable[[str], None]
) -> dict[int | None, LoadedProgram]:
    programs: dict[int | None, LoadedProgram] = {}
    for stored, data in zip(trial.unit.programs, trial.programs, strict=True):
        what = f"program {stored.blob.digest[:12]}"
        tell(f"reading {what}")
        program = load_program(data, platform)
        exported = program.exported
        if exported.nr_devices != 1 or exported.ordered_effects or exported.unordered_effects:
            raise ProgramRefused(f"{what} is not a plain function on one device")
        _check_calls(exported, what)
        programs[stored.batch] = program
    return programs


def _check_calls(exported: export.Exported, what: str) -> None:
    try:
        with module_of(exported) as module:
            refuse_foreign_calls(module, what)
    except ServingError:
        raise
    except Exception as error:
        raise BundleCorrupt(f"{what} cannot be read: {first_lines(error)}") from error


def _check_identity(
    unit: MapUnit,
    programs: Mapping[int | None, LoadedProgram],
    trial: Trial,
    arrays: Sequence[Array],
) -> None:
    """Hold what was read against what the unit says it is.

    A unit's identity decides with whom it shares lanes and weights, so a program may not bear that
    of another. The artefact as a whole must be what a save would write for it: its shapes and
    calling convention are no part of the identity's text.
    """
    texts = []
    for program, data in zip(programs.values(), trial.programs, strict=True):
        normal = canonical(program.exported)
        if artefact_of(normal.exported) != data:
            raise BundleCorrupt(
                "its program is not what a save writes: it was changed afterwards, or written by "
                "another shardserve; save the bundle again"
            )
        texts.append(normal.text)
    found = map_identity(
        texts,
        unit.inputs.values(),
        unit.outputs.values(),
        unit.donate,
        [
            (leaf.dtype, leaf.shape, digest_of_leaf(array, leaf))
            for leaf, array in zip(unit.params, arrays, strict=True)
        ],
    )
    if found != unit.id:
        raise BundleCorrupt(f"it computes something else than its identity says: {found[:12]}")


def _map_leaves(unit: MapUnit, blobs: Mapping[str, FileSpan]) -> list[Array]:
    """The parameters where they lie, so that trying a large unit takes no memory for them."""
    mapped: dict[str, Array] = {}
    arrays = []
    for leaf in unit.params:
        digest = leaf.blob.digest
        if digest not in mapped:
            mapped[digest] = _map(leaf.blob, blobs)
        arrays.append(np.ndarray(leaf.shape, dtype_of(leaf.dtype), mapped[digest], leaf.offset))
    return arrays


def _map(blob: BlobRef, blobs: Mapping[str, FileSpan]) -> Array:
    if blob.size == 0:  # a mapping must not be empty
        return np.empty(0, np.uint8)
    span = blobs[blob.digest]
    return np.memmap(span.path, np.uint8, "r", span.offset, (blob.size,)).view(np.ndarray)


def _runs_here(program: LoadedProgram, leaves: Sequence[jax.Array]) -> bool:
    size = sum(leaf.nbytes for leaf in leaves)
    return "cpu" in program.platforms and size <= _CPU_RUN_BYTES_MAX


def _bucket_text(batch: int, sizes: Mapping[str, int]) -> str:
    words = {REQUESTS: "requests"}
    lengths = [f"{words.get(symbol, symbol)} {size}" for symbol, size in sizes.items()]
    return ", ".join([f"batch {batch}", *lengths])


@contextlib.contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Whatever JAX raises about a program is the program's fault, but for lack of memory."""
    try:
        yield
    except (ServingError, MemoryError):
        raise
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise MemoryError(f"{what}: {first_lines(error)}") from error
        raise ProgramRefused(f"{what}: {first_lines(error)}") from error
