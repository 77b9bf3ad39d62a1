"""Executables on their way from the compile process to the actor.

On a CPU the child hands over what XLA compiled (`jax.experimental.serialize_executable`). An
accelerator belongs to the actor's process, so the child cannot compile for it: it hands over the
StableHLO that it lowered and refined for a bucket, and the actor gives that to XLA, which compiles
without Python's lock. In neither case does the actor trace or lower anything.

Loading what came is as good as running it: an executable is machine code inside a pickle. Only
bytes of our own child, or of the cache that we sealed ourselves, may come here.

Like `shards.canonical`, this file reaches for JAX's internals: there is no public way to compile a
module. The accelerators' way is tested on a CPU; it was never run on a GPU or a TPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import jax
import numpy as np
from jax._src import compiler as jax_compiler
from jax._src.interpreters import mlir as jax_mlir
from jax._src.lib import xla_client  # type: ignore[attr-defined]
from jax.experimental import serialize_executable
from jax.extend.mlir import ir

__all__ = [
    "Executable",
    "keep_compiled",
    "load_compiled",
    "load_lowered",
    "pack_compiled",
    "pack_lowered",
]

#: Bytes that XLA's own cache may take on disk.
_CACHE_BYTES_MAX: Final = 4 << 30


class Executable(NamedTuple):
    """A program for one bucket on one device.

    Attributes:
        run: takes leaves, then inputs; returns the outputs.
        step_bytes: what a run allocates: temporaries and outputs.
        run_s: seconds of a run; 0 where nobody knows.
    """

    run: Callable[..., Sequence[jax.Array]]
    step_bytes: int
    run_s: float = 0.0


def keep_compiled(directory: str) -> None:
    """Let XLA keep, in a directory of the owner's alone, what this process compiles."""
    settings = {
        "jax_compilation_cache_dir": directory,
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_compilation_cache_max_size": _CACHE_BYTES_MAX,
    }
    for name, value in settings.items():
        jax.config.update(name, value)  # type: ignore[no-untyped-call]


def pack_compiled(compiled: jax.stages.Compiled) -> bytes:
    """An executable as bytes, for a device of the same index in a process like this one."""
    data, _, _ = serialize_executable.serialize(compiled)
    return bytes(data)


def load_compiled(data: bytes, arguments: int, outputs: int, device: jax.Device) -> Executable:
    """What `pack_compiled` packed, ready to run.

    Args:
        data: of our own child, or of our own sealed cache.
        arguments: how many the program takes: leaves and inputs.
        outputs: how many it returns.
        device: the one that it was compiled for.
    """
    compiled = serialize_executable.deserialize_and_load(
        data,
        jax.tree.structure((tuple(range(arguments)), {})),
        jax.tree.structure(tuple(range(outputs))),
        backend=device.client,
        execution_devices=[device],
    )
    return Executable(compiled, _step_bytes(compiled.memory_analysis()))


def pack_lowered(lowered: jax.stages.Lowered) -> bytes:
    """A lowered program with every size settled, as MLIR bytecode of this version of XLA."""
    written: Any = lowered.compiler_ir()
    module = jax_mlir.refine_polymorphic_shapes(written)
    return bytes(jax_mlir.module_to_bytecode(module))


def load_lowered(data: bytes, device: jax.Device) -> Executable:
    """What `pack_lowered` packed, compiled for a device of this process.

    XLA's persistent cache is asked first, where this process has one.
    """
    client = device.client
    options = jax_compiler.get_compile_options(
        1, 1, device_assignment=np.array([[device.id]]), backend=client
    )
    with jax_mlir.make_ir_context():
        loaded = jax_compiler.compile_or_get_cached(
            client,
            ir.Module.parse(data),
            np.array([device]),
            options,
            [],
            xla_client.DeviceList((device,)),
        )

    def run(*arguments: jax.Array) -> Sequence[jax.Array]:
        outputs: list[jax.Array] = loaded.execute(list(arguments))
        return outputs

    return Executable(run, _step_bytes(loaded.get_compiled_memory_stats()))


def _step_bytes(stats: Any) -> int:
    temporary = int(getattr(stats, "temp_size_in_bytes", 0) or 0)
    return temporary + int(getattr(stats, "output_size_in_bytes", 0) or 0)
