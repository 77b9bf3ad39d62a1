"""A device actor under a router, for benches that compare policies on the same device.

The device is a child process on one processor (`bench.device_actor`); the router and the load are
this process, on another. The actor's event loop shares the device's processor, unless a bench wants
it on the other. Every contender serves the same programs, buckets and weights, in the same
process: only the policy of its batcher is changed, between runs, while nothing waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Final, TypeVar

import msgspec
import numpy as np

from batching.simulation import Arrival
from bench.device_actor import (
    ACTOR,
    READY,
    Bare,
    BareLoop,
    Command,
    Counts,
    GetCounts,
    Timed,
    TimeSizes,
    UsePolicy,
)
from bench.device_model import BUCKETS, INPUT, LAYERS, NULL, OUTPUT, Parameters, answer, rows, save
from bench.errors import AnswersDiffer, LoadFailed
from bench.look_ups_actor import NODE, SECRET_VARIABLE
from bench.open_loop import OpenLoop, Outcome
from bench.processes import child, python
from cluster.epochs import Epoch, ServableVersion
from cluster.router import Router
from shards.orders import Endpoint
from shards.store import LocalStore
from shards.transport import Link, LinkHandler, connect

__all__ = ["Control", "DeviceScene", "device_scene", "device_under_router"]

T = TypeVar("T")

_START_S: Final = 180.0
#: Rows to ask for; more would only cost memory.
_ROWS: Final = 64
#: What the generator keeps under way to learn its own rate, on a model of no cost.
_NULL_WINDOW: Final = 512
#: Runs of each size by which the curve is known.
_CURVE_RUNS: Final = 24


class Control:
    """Commands to a device actor.

    Args:
        peer: the other end is the actor's.
    """

    def __init__(self, peer: socket.socket) -> None:
        self._lines = peer.makefile("rwb")

    def close(self) -> None:
        """Let the actor end."""
        self._lines.close()

    def tell(self, command: Command, answer: type[T]) -> T:
        """Have a command carried out.

        Args:
            command: what to do.
            answer: the type of what it answers.

        Raises:
            LoadFailed: the actor has ended.
        """
        self._lines.write(msgspec.json.encode(command) + b"\n")
        self._lines.flush()
        line = self._lines.readline()
        if not line:
            raise LoadFailed("the device actor has ended")
        return msgspec.json.decode(line, type=answer)


class DeviceScene:
    """A device actor that has loaded so many models, and the load.

    Attributes:
        servables: names of the models.
        curve: seconds of a batch by size: medians of runs one at a time, with all models loaded.
            (What warm-up measured was taken while other models were loaded.)
        cores: processors of the actor and of this process; the same where there is only one.
    """

    def __init__(
        self,
        servables: Sequence[str],
        control: Control,
        load: OpenLoop,
        cores: tuple[int, int],
    ) -> None:
        self.servables = tuple(servables)
        self.cores = cores
        self._control = control
        self._load = load
        self.curve: Mapping[int, float] = {
            size: float(np.median(seconds))
            for size, seconds in self.time_sizes(_CURVE_RUNS).items()
        }

    # What the actor is told

    def use(self, policy: UsePolicy) -> None:
        """Choose batches by this policy from now on."""
        self._control.tell(policy, dict[str, str])

    def counts(self) -> Counts:
        """What the actor counted since its start."""
        return self._control.tell(GetCounts(), Counts)

    def bare(self, servable: str, seconds: float) -> float:
        """Rows a second of the bare loop, in the actor's process."""
        found = self._control.tell(Bare(servable, seconds), BareLoop)
        return found.bucket * found.runs / found.seconds

    def time_sizes(self, runs: int) -> Mapping[int, Sequence[float]]:
        """Seconds of so many runs of every size by itself, in the actor's process."""
        return self._control.tell(TimeSizes(self.servables, runs), Timed).seconds

    # What it is asked

    async def check(self, models: Mapping[str, Parameters]) -> None:
        """See that every model answers what NumPy says.

        Raises:
            AnswersDiffer: one does not.
        """
        pair = rows(1, 0)
        for name, weights in models.items():
            found = (await self._load.ask(name, {INPUT: pair}))[OUTPUT]
            expected = answer(weights, pair)
            if not np.allclose(found, expected, rtol=1e-3, atol=1e-5):
                raise AnswersDiffer(f"{name} answers {found}, not {expected}")

    async def offer(self, arrivals: Sequence[Arrival], *, warm_s: float = 1.0) -> Outcome:
        """Send a workload; see `OpenLoop.offer`."""
        compiled = self.counts().compiles
        outcome = await self._load.offer(arrivals, warm_s=warm_s)
        if self.counts().compiles != compiled:
            raise LoadFailed("the actor compiled while it served")
        return outcome

    async def capacity(self, servable: str, seconds: float) -> float:
        """Rows a second with four batches of the largest size always waiting."""
        window = 4 * max(self.curve)
        return await self._load.saturate(servable, seconds, window=window, warm_s=0.3)

    async def generator_rate(self, seconds: float) -> float:
        """Requests a second through the same path, of a model of no cost.

        At most what the generator can send: the actor is as busy as it is.
        """
        return await self._load.saturate(NULL, seconds, window=_NULL_WINDOW, warm_s=0.2)

    async def alone(self, count: int) -> Sequence[float]:
        """Seconds of so many rows, each alone; models in turn."""
        return list(map(float, await self._load.alone(self.servables, count)))

    async def single_row_s(self, count: int = 60) -> float:
        """Median seconds of one row alone, from router to router; models in turn."""
        latencies = await self._load.alone(self.servables, count + count // 4)
        return float(np.median(latencies[count // 4 :]))


@contextlib.asynccontextmanager
async def device_scene(
    count: int,
    *,
    buckets: Sequence[int] = BUCKETS,
    layers: int = LAYERS,
    seed: int = 0,
    together: bool = True,
) -> AsyncIterator[DeviceScene]:
    """Save so many models, start an actor that loads them, and route to it.

    Args:
        count: of the models.
        buckets: batch sizes that they are compiled for.
        layers: of each.
        seed: of weights and rows.
        together: the actor's event loop runs on the device's processor, too.

    Raises:
        ContenderFailed: the actor did not start.
        AnswersDiffer: it answers something else than NumPy does.
    """
    with tempfile.TemporaryDirectory(prefix="shardserve-") as name:
        models = save(Path(name) / "store", count, seed=seed, buckets=buckets, layers=layers)
        async with device_under_router(Path(name), (*models, NULL), together=together) as (
            control,
            router,
            cores,
        ):
            inputs = [{INPUT: pair[None]} for pair in rows(_ROWS, seed)]
            scene = DeviceScene(list(models), control, OpenLoop(router, inputs), cores)
            await scene.check(models)
            yield scene


@contextlib.asynccontextmanager
async def device_under_router(
    folder: Path, servables: Sequence[str], *, together: bool = True
) -> AsyncIterator[tuple[Control, Router, tuple[int, int]]]:
    """An actor that has loaded servables, on one processor, and a router to it, on another.

    This process moves to another processor than the actor's for as long as the context lasts.

    Args:
        folder: with the store in it.
        servables: version 1 of each is loaded, in this order.
        together: the actor's event loop runs on the device's processor, too.

    Yields:
        What commands the actor, the router, and the processors of the two.

    Raises:
        ContenderFailed: the actor did not start.
    """
    before = os.sched_getaffinity(0)
    cores = (min(before), max(before))
    secret = secrets.token_hex(16)
    with contextlib.ExitStack() as stack:
        ours, theirs = socket.socketpair()
        stack.callback(ours.close)
        said = stack.enter_context(
            child(
                python(
                    "bench.device_actor", "--directory", str(folder),
                    "--store", str(folder / "store"),
                    "--cache", str(folder / "cache"), "--core", str(cores[0]),
                    "--loop-core", str(cores[0] if together else cores[1]),
                    "--servables", msgspec.json.encode(servables).decode(),
                    "--control", str(theirs.fileno()),
                ),
                log=folder / "device.log",
                ready=READY,
                timeout_s=_START_S,
                environment={SECRET_VARIABLE: secret, "JAX_PLATFORMS": "cpu"},
                pass_fds=(theirs.fileno(),),
            )
        )  # fmt: skip
        theirs.close()
        os.sched_setaffinity(0, {cores[1]})
        stack.callback(os.sched_setaffinity, 0, before)
        router = await _router(msgspec.json.decode(said, type=Endpoint), folder, servables, secret)
        stack.callback(router.close)
        control = Control(ours)
        stack.callback(control.close)
        yield control, router, cores


async def _router(
    endpoint: Endpoint, folder: Path, servables: Sequence[str], secret: str
) -> Router:
    async def dial(endpoint: Endpoint, handler: LinkHandler) -> Link:
        return await connect(
            endpoint, name="router", node=NODE, secret=secret.encode(), handler=handler
        )

    # The loop's own clock stands still within a turn, and departures must not.
    router = Router(asyncio.get_running_loop(), dial, clock=time.monotonic)
    store = LocalStore(folder / "store")
    manifests = {name: store.read_manifest(name, 1) for name in servables}
    served = {
        name: ServableVersion(
            manifest=manifest, placement=dict.fromkeys(manifest.units, ((ACTOR,),))
        )
        for name, manifest in manifests.items()
    }
    await router.adopt(
        Epoch(
            term=1,
            number=1,
            servables={name: {1: version} for name, version in served.items()},
            endpoints={ACTOR: endpoint},
        )
    )
    return router
