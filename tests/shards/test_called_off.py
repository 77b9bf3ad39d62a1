"""Loads of a device called off at every step, with a real compile process: nothing of them is left.

One servable serves all the while. The load of another is held at a step, unloaded there, and let
go on; then books, descriptors, threads, processes and mapped files are as before.
"""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batching.errors import Cancelled
from shards import arrivals, device_units
from shards.compiling.compiler import Compiler
from shards.compiling.process import CompileProcess
from shards.device_units import DeviceUnitOpener
from shards.hosting import Hosting
from shards.manifest import MapUnit
from shards.orders import LoadOrder
from shards.saving import save
from shards.specs import Spec
from tests.shards.loading import UNITS, Actor, rows, unit_of
from tests.shards.serving import DEADLINE_S, DeviceRig, eventually

#: Compile processes are started four times, and each imports JAX.
pytestmark = pytest.mark.timeout(240)

X = {"x": Spec(("b", 4))}
W = np.arange(4096, dtype=np.float32).reshape(4, 1024) / 1e4


def layer(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params)[:, :3]


def other_layer(params: Any, x: Any) -> Any:
    return jnp.cos(x @ params)[:, :3]


class Gate:
    """Holds whoever comes to one step of a load, until a test lets him go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self.reached = threading.Event()
        self.may_go_on = threading.Event()

    def close(self, owner: Any, name: str, when: Callable[..., bool] = lambda *_: True) -> None:
        """Hold whoever calls this, as far as it is of the step."""
        real = getattr(owner, name)

        def held(*arguments: Any) -> Any:
            if when(*arguments) and not self.reached.is_set():
                self.reached.set()
                assert self.may_go_on.wait(DEADLINE_S)
            return real(*arguments)

        self._patch.setattr(owner, name, held)


def during(step: str) -> Callable[..., bool]:
    """While the compile process does this."""
    return lambda process, doing: doing.startswith(step)


#: Step to what is called in it, and which of those calls. The last three end the compile process.
STEPS: dict[str, tuple[Any, str, Callable[..., bool]]] = {
    "its blobs are read": (arrivals, "_map_all", lambda *_: True),
    "its pages are mapped": (device_units, "map_pages", lambda *_: True),
    "its parameters are put": (DeviceUnitOpener, "_put", lambda *_: True),
    "a program is compiled": (CompileProcess, "_receive", during("compiling")),
    "the compile process starts": (CompileProcess, "_receive", during("starting")),
    "a bucket is ready": (Compiler, "_taken", lambda *_: True),
}


class Footprint:
    """What this process has, but for the compile process of one compiler, and idle threads."""

    def __init__(self, compiler: Compiler) -> None:
        lists = Path("/proc/self/task").glob("*/children")
        own = {compiler.pid} if compiler.pid is not None else set()
        self.children = {int(p) for each in lists for p in each.read_text().split()} - own
        self.descriptors = len(os.listdir("/proc/self/fd")) - len(own)
        pools = ("arrivals", "blobs", "asyncio", "spawner")
        self.threads = sorted(
            each.name for each in threading.enumerate() if not each.name.startswith(pools)
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Footprint) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


def mapped(unit: MapUnit) -> bool:
    """Whether any of its parameters is mapped."""
    maps = Path("/proc/self/maps").read_text()
    return any(leaf.blob.digest in maps for leaf in unit.params)


@pytest.fixture
def actor(tmp_path: Path) -> Iterator[Actor]:
    with DeviceRig(run_now_s=0.001) as rig:
        made = Actor(rig, tmp_path)
        own = Compiler(jax.devices()[0])
        made.opener = rig.io.call(DeviceUnitOpener, rig.engine, jax.devices()[0], own)
        made.books = rig.io.call(Hosting, made.opener, "device-0", 1 << 30)
        yield made
        made.opener.shut()


def test_a_load_that_is_called_off_at_any_step_leaves_nothing_and_others_are_answered(
    actor: Actor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    good = unit_of(save(layer, W, tmp_path, "good", 1, inputs=X, batch_buckets=(1,)))
    unit = unit_of(save(other_layer, W + 1, tmp_path, "model", 1, inputs=X, batch_buckets=(1, 2)))
    actor.load("good")
    compiler, io = actor.opener._compiler, actor.rig.io
    gc.collect()
    before, held_bytes = Footprint(compiler), actor.books.reserved_bytes
    order = LoadOrder(term=1, store=str(tmp_path), servable="model", version=1, units=UNITS)
    for step, (owner, name, when) in STEPS.items():
        with monkeypatch.context() as patched:
            gate = Gate(patched)
            gate.close(owner, name, when)
            load = asyncio.run_coroutine_threadsafe(actor.books.load(order), io.loop)
            assert gate.reached.wait(DEADLINE_S), step
            pid = compiler.pid
            assert isinstance(actor.ask(good.id, rows(1, 4)), list), step
            unload = asyncio.run_coroutine_threadsafe(actor.books.unload(1, "model", 1), io.loop)
            # It has its first turn of the loop before this has one.
            io.call(lambda: None)
            gate.may_go_on.set()
            with pytest.raises(Cancelled, match="unloaded while it was loading"):
                load.result(DEADLINE_S)
            unload.result(DEADLINE_S)
        del load, unload
        assert actor.books.loaded == (("good", 1),), step
        assert (actor.books.loading, actor.books.reserved_bytes) == ((), held_bytes), step
        assert isinstance(actor.ask(good.id, rows(1, 4)), list), step
        eventually(lambda: Footprint(compiler) == before)
        assert not mapped(unit), step
        # Only in the middle of a program is the compile process ended; another is a second away.
        assert (compiler.pid == pid) == (owner not in (CompileProcess, Compiler)), step
    actor.unload("good")
    assert actor.books.reserved_bytes == 0
    assert actor.rig.watch.count == 0
    assert "ended by" not in caplog.text, "a compile process that was called off is nobody's death"
