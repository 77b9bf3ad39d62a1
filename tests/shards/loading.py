"""The books of a device actor over an engine with JAX on a CPU: bundles loaded, then asked."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from shards.compiling.compiler import Compiler
from shards.device_units import DeviceUnitOpener
from shards.hosting import Hosting
from shards.manifest import Manifest, MapUnit
from shards.orders import HostedUnit, LoadOrder
from tests.shards.serving import DEADLINE_S, Array, DeviceRig, FakeLink, call

UNITS = (HostedUnit(name="model"),)


@functools.cache
def compiler() -> Compiler:
    """One for all tests: its process takes a second to start."""
    return Compiler(jax.devices()[0])


class Actor:
    """Books over an engine with a loop thread, an executor and a device."""

    def __init__(self, rig: DeviceRig, store: Path, capacity_bytes: int = 1 << 30) -> None:
        self.rig = rig
        self.store = store
        self.opener = rig.io.call(DeviceUnitOpener, rig.engine, jax.devices()[0], compiler())
        self.books = rig.io.call(Hosting, self.opener, "device-0", capacity_bytes)
        self.link = FakeLink()
        self._asked = 0

    def load(self, name: str = "model", version: int = 1, **changes: Any) -> None:
        arguments: dict[str, Any] = {"term": 1, "store": str(self.store), "units": UNITS}
        order = LoadOrder(servable=name, version=version, **(arguments | changes))
        self.rig.io.run(self.books.load(order), DEADLINE_S)

    def unload(self, name: str = "model", version: int = 1) -> None:
        self.rig.io.run(self.books.unload(1, name, version), DEADLINE_S)

    def ask(self, unit: str, *arrays: Array) -> list[Array] | str:
        """The outputs for these inputs, or the code of the refusal."""
        self._asked += 1
        self.rig.call(self.link, call(unit, {self._asked: len(arrays[0])}, *arrays))
        self.link.wait_for(self._asked)
        if self._asked in self.link.errors:
            return self.link.codes[self._asked]
        return self.link.answers[self._asked]


def unit_of(manifest: Manifest) -> MapUnit:
    unit = manifest.units["model"]
    assert isinstance(unit, MapUnit)
    return unit


def rows(count: int, *shape: int) -> Array:
    return np.random.default_rng(count).standard_normal((count, *shape)).astype(np.float32)
