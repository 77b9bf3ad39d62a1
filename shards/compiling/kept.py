"""Executables that this process holds, or that were kept on disk, by what they were made of.

A program takes its parameters as arguments, so an executable is a matter of the program, of shapes
and of the device, and not of the weights: a version with new weights runs the executables of the
version before. Whether a program runs to its end may be a matter of its weights, so what was tried
with which unit is kept apart.

Decides what counts as an equal program. Does not know the compile process.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform as machine
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final
from weakref import WeakKeyDictionary, WeakValueDictionary

import jax
import msgspec

from shards.compiling.cache import ProgramCache
from shards.compiling.handover import Executable, load_compiled, load_lowered
from shards.compiling.messages import Bucket, Settings
from shards.manifest import MapUnit

__all__ = ["KeptExecutables"]

logger = logging.getLogger(__name__)

#: Raise it where what is kept, or what it is kept for, changes its meaning.
_FORMAT: Final = 3


class KeptExecutables:
    """Loads executables for one device, and finds those of equal programs again.

    Args:
        device: of this process.
        settings: of the compile process that makes them.
        cache: where they are kept between processes, if anywhere.
    """

    def __init__(self, device: jax.Device, settings: Settings, cache: ProgramCache | None) -> None:
        self._device = device
        self._settings = settings
        self._cache = cache
        self._surroundings = _surroundings(device, settings)
        #: What loaded units run; it goes with the last of them.
        self._running: WeakValueDictionary[bytes, Callable[..., Any]] = WeakValueDictionary()
        self._step_bytes: WeakKeyDictionary[Callable[..., Any], int] = WeakKeyDictionary()

    def find(self, unit: MapUnit, bucket: Bucket) -> Executable | None:
        """The executable of an equal program, if there is one."""
        key = self._program_key(unit, bucket)
        running = self._running.get(key)
        if running is not None:
            return Executable(running, self._step_bytes[running])
        data = None if self._cache is None else self._cache.get(key)
        if data is None:
            return None
        assert self._cache is not None
        try:
            return self._load(unit, key, data)
        except Exception as error:  # JAX raises what it likes; the cache is only a short cut
            logger.warning("a kept executable cannot be loaded: %s", error)
            self._cache.forget(key)
            return None

    def tried_s(self, unit: MapUnit, bucket: Bucket) -> float | None:
        """Seconds of a run of this very unit, with its own parameters; None if it was not tried."""
        kept = None if self._cache is None else self._cache.get(self._unit_key(unit, bucket))
        return None if kept is None else msgspec.json.decode(kept, type=float)

    def data(self, unit: MapUnit, bucket: Bucket) -> bytes:
        """What `find` loaded, to be tried with other parameters; ``b""`` if it is not kept."""
        kept = None if self._cache is None else self._cache.get(self._program_key(unit, bucket))
        return kept or b""

    def add(self, unit: MapUnit, bucket: Bucket, data: bytes) -> Executable:
        """Load and keep what the compile process made of a unit."""
        key = self._program_key(unit, bucket)
        executable = self._load(unit, key, data)
        if self._cache is not None:
            self._cache.put(key, data)
        return executable

    def mark_tried(self, unit: MapUnit, bucket: Bucket, run_s: float) -> None:
        """Remember that this very unit was tried, and what a run took."""
        if self._cache is not None:
            self._cache.put(self._unit_key(unit, bucket), msgspec.json.encode(run_s))

    def trim(self) -> None:
        """Keep to the bound of what is kept on disk."""
        if self._cache is not None:
            self._cache.trim()

    def _load(self, unit: MapUnit, key: bytes, data: bytes) -> Executable:
        if self._settings.platform == "cpu":
            arguments = len(unit.params) + len(unit.program_inputs)
            executable = load_compiled(data, arguments, len(unit.outputs), self._device)
        else:
            executable = load_lowered(data, self._device)
        self._running[key] = executable.run
        self._step_bytes[executable.run] = executable.step_bytes
        return executable

    def _program_key(self, unit: MapUnit, bucket: Bucket) -> bytes:
        """Everything that an executable depends on: of parameters, only their shapes."""
        shapes = [(leaf.dtype, leaf.shape) for leaf in unit.params]
        program = msgspec.structs.replace(unit, id="", params=())
        return self._key("program", program, shapes, bucket)

    def _unit_key(self, unit: MapUnit, bucket: Bucket) -> bytes:
        """The whole unit: what was tried under one identity is not taken for another."""
        return self._key("unit", unit, bucket)

    def _key(self, kind: str, *parts: object) -> bytes:
        return msgspec.json.encode([_FORMAT, kind, self._surroundings, *parts])


def _surroundings(device: jax.Device, settings: Settings) -> Sequence[str | int]:
    return [
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
