"""The process of `bench.cycles`: a device and a shard that load, answer and let go of one servable.

Both are made of what actors are made of in production: books, a listener, links that the product's
router dials. Only Ray is not there, and that both are one process. After every cycle it says in a
line what it holds: memory as the kernel counts it, its own books, handles, threads, programs.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import jax
import msgspec
import numpy as np

from batching.errors import ServingError
from bench.cycles import INPUT, SERVABLE, Footprint
from bench.look_ups_actor import GENERATION, NODE, Frames
from cluster.epochs import Epoch, ServableVersion
from cluster.placement import Copies
from cluster.router import Router
from shards.device_host import DeviceHost, make_device_host
from shards.forwarding import Forwarder
from shards.hosting import Hosting
from shards.loop import LoopThread
from shards.manifest import Manifest, TableUnit
from shards.openers import TableOpener
from shards.orders import ActorSpec, Endpoint, HostedUnit, LoadOrder
from shards.store import LocalStore
from shards.transport import Link, LinkHandler, Listener, connect, listen
from shards.worker import WorkerEngine

__all__ = ["DEVICE", "SHARD"]

DEVICE: Final = "device-0"
SHARD: Final = "shard-0"
_CAPACITY_BYTES: Final = 16 << 30
_TIMEOUT_S: Final = 60.0
#: Of the larger of two requests.
_ROWS: Final = 8


class _Sink:
    """Takes one answer."""

    def __init__(self) -> None:
        self.answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def done(self, outputs: Mapping[str, Any], frame: Sequence[Any] | None) -> None:
        del frame
        (rows,) = outputs.values()
        self.answered.set_result(np.array(rows))

    def failed(self, error: ServingError) -> None:
        self.answered.set_exception(error)


class _Actor:
    """A device and a shard on one loop, and how a servable's version comes and goes on them."""

    def __init__(self, store: Path, directory: str, cache: str) -> None:
        self.io = LoopThread("cycles-io")
        self._store = store
        self._directory = directory
        self._secret = secrets.token_bytes(16)
        spec = ActorSpec(
            kind="device", name=DEVICE, directory=directory, capacity_bytes=_CAPACITY_BYTES,
            cache_directory=cache,
        )  # fmt: skip
        self.device: DeviceHost = self.io.call(make_device_host, spec, self.io, GENERATION)
        self._worker = self.io.call(self._make_worker)
        self.books = {
            DEVICE: self.io.call(Hosting, self.device.opener, DEVICE, _CAPACITY_BYTES),
            SHARD: self.io.call(Hosting, TableOpener(self._worker), SHARD, _CAPACITY_BYTES),
        }
        self._listeners = {
            name: self.io.run(self._listen(name, engine))
            for name, engine in ((DEVICE, self.device.engine), (SHARD, self._worker))
        }
        self._load_s = 0.0

    def _make_worker(self) -> WorkerEngine:
        loop = self.io.loop
        return WorkerEngine(loop, GENERATION, forwarder=Forwarder(self._dial_on, loop))

    async def _listen(self, name: str, engine: Any) -> Listener:
        return await listen(
            name=name, generation=GENERATION, node=NODE, secret=self._secret,
            handler=Frames(engine), directory=self._directory,
        )  # fmt: skip

    async def _dial(self, endpoint: Endpoint, handler: LinkHandler) -> Link:
        """As the router."""
        return await connect(
            endpoint, name="router", node=NODE, secret=self._secret, handler=handler
        )

    async def _dial_on(self, endpoint: Endpoint, handler: LinkHandler) -> Link:
        """As the shard, which sends rows on."""
        return await connect(
            endpoint, name=SHARD, node=NODE, secret=self._secret, handler=handler,
            generation=GENERATION,
        )  # fmt: skip

    def cycle(self, version: int) -> None:
        """Load a version, have it answer, and unload it.

        Raises:
            ServingError: a load, a request or an unload failed.
        """
        manifest = LocalStore(self._store).read_manifest(SERVABLE, version)
        placement = {name: _copies(unit) for name, unit in manifest.units.items()}
        began = time.perf_counter()
        self.io.run(self._load(manifest, placement), _TIMEOUT_S)
        self._load_s = time.perf_counter() - began
        self.io.run(self._ask(manifest, placement), _TIMEOUT_S)
        for books in self.books.values():
            self.io.run(books.unload(1, SERVABLE, version), _TIMEOUT_S)

    async def _load(self, manifest: Manifest, placement: Mapping[str, Copies]) -> None:
        orders: dict[str, list[HostedUnit]] = {DEVICE: [], SHARD: []}
        for name, copies in placement.items():
            partitions = tuple(range(len(copies))) if copies[0] == (SHARD,) else ()
            orders[copies[0][0]].append(HostedUnit(name=name, partitions=partitions))
        for actor, units in orders.items():
            order = LoadOrder(
                term=1, store=str(self._store), servable=SERVABLE, version=manifest.version,
                units=tuple(units),
            )  # fmt: skip
            await self.books[actor].load(order)

    async def _ask(self, manifest: Manifest, placement: Mapping[str, Copies]) -> None:
        """Requests through a router of their own: with rows by way of it, and straight."""
        router = Router(asyncio.get_running_loop(), self._dial)
        endpoints = {name: each.endpoint for name, each in self._listeners.items()}
        served = ServableVersion(manifest=manifest, placement=dict(placement))
        try:
            for number, continuation_bytes_min in enumerate((None, 0)):
                epoch = Epoch(
                    term=1, number=number + 1, servables={SERVABLE: {manifest.version: served}},
                    endpoints=endpoints, continuation_bytes_min=continuation_bytes_min,
                )  # fmt: skip
                await router.adopt(epoch)
                plan = router.routes.find(SERVABLE).plans["serving_default"]
                for count in (1, _ROWS):
                    ids = np.arange(count, dtype=np.int64)[:, None]
                    sink = _Sink()
                    router.submit(plan, {INPUT: ids}, count, time.monotonic() + _TIMEOUT_S, sink)
                    await sink.answered
        finally:
            router.close()

    def _books_bytes(self) -> int:
        return sum(books.reserved_bytes for books in self.books.values())

    def footprint(self) -> Footprint:
        """What is held now."""
        client = jax.devices()[0].client
        handles = _handles()
        return Footprint(
            pss_bytes=_pss(os.getpid()),
            children_pss_bytes=sum(map(_pss, _children())),
            books_bytes=self.io.call(self._books_bytes),
            handles=len(handles),
            sockets=sum(target.startswith("socket:") for target in handles),
            blobs=sum(target.startswith(str(self._store)) for target in handles),
            threads=len(os.listdir("/proc/self/task")),
            mappings=len(Path("/proc/self/maps").read_text().splitlines()),
            executables=len(client.live_executables()),
            arrays=len(client.live_arrays()),
            load_s=self._load_s,
        )


def _children() -> list[int]:
    """Processes that this one started, and has not seen end."""
    lists = Path("/proc/self/task").glob("*/children")
    return [int(pid) for each in lists for pid in each.read_text().split()]


def _copies(unit: object) -> Copies:
    if isinstance(unit, TableUnit):
        return ((SHARD,),) * len(unit.partitions)
    return ((DEVICE,),)


def _handles() -> list[str]:
    """What every open descriptor is, but for the one by which they are listed."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:
            continue
    return found


def _pss(pid: int) -> int:
    """Proportional set size of a process, in bytes, without libraries."""
    total_kib, is_library = 0, False
    with Path(f"/proc/{pid}/smaps").open() as lines:
        for line in lines:
            name, _, rest = line.partition(":")
            if "-" in name.split(" ", 1)[0]:  # the area itself: its range, and last its file
                is_library = ".so" in line or "/bin/" in line
            elif name == "Pss" and not is_library:
                total_kib += int(rest.split()[0])
    return total_kib * 1024


def main(argv: Sequence[str] | None = None) -> None:
    """Go through the cycles; a line with a `Footprint` as JSON before the first and after each.

    Args:
        argv: the arguments without the program's name; `sys.argv` when None.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", required=True, type=Path)
    parser.add_argument("--directory", required=True, help="where its Unix sockets go")
    parser.add_argument("--cache", default="", help="where executables are kept; nowhere if empty")
    parser.add_argument("--cycles", required=True, type=int)
    asked = parser.parse_args(argv)
    actor = _Actor(asked.store, asked.directory, asked.cache)
    versions = LocalStore(asked.store).versions(SERVABLE)
    for number in range(asked.cycles + 1):
        if number:
            actor.cycle(versions[number % len(versions)])
        sys.stdout.write(msgspec.json.encode(actor.footprint()).decode() + "\n")
        sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
