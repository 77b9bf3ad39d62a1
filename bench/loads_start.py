"""A start of many servables as a controller orders it: its core over the books of one device.

Carries out what `ControlCore` asks for, without Ray: so many load at once as are declared, and
the next begins when one is there.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from pathlib import Path

from cluster.control import (
    ActorUp,
    ControlCore,
    Declared,
    Effect,
    EnsureActor,
    Event,
    ListStore,
    Load,
    ReadManifest,
)
from cluster.declared import DeclaredState
from cluster.servable_settings import ServableConfig
from cluster.settings import ClusterConfig, Config
from shards.hosting import Hosting
from shards.local import LocalStore
from shards.orders import ActorReport, Endpoint

__all__ = ["start"]


async def start(books: Hosting, store: Path, servables: Sequence[str], parallel: int) -> None:
    """Declare servables, and wait until all of them are available.

    Args:
        books: of the device that loads them. They are left loaded, by orders of term 1.
        store: has them.
        servables: of which version 1 is there.
        parallel: how many may load at once.

    Raises:
        ServingError: one cannot be loaded.
    """
    shell = _Shell(books, store)
    cluster = ClusterConfig(
        devices=1, shards=0, hosts=0, load_parallel_start=parallel, load_parallel=parallel
    )
    config = Config(
        store=str(store),
        servables=tuple(ServableConfig(name=name) for name in servables),
        cluster=cluster,
    )
    await shell.run(Declared(config=config), frozenset(servables))


class _Shell:
    """Carries effects out; a load that fails fails the whole.

    Args:
        books: of the device.
        store: of the bundles.
    """

    def __init__(self, books: Hosting, store: Path) -> None:
        self._books = books
        self._store = LocalStore(store)
        self._core = ControlCore(DeclaredState(term=1, seq=0))
        self._events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self._loads: set[asyncio.Task[None]] = set()

    async def run(self, event: Event, servables: frozenset[str]) -> None:
        self._events.put_nowait(event)
        while not self._serves(servables):
            found = await self._events.get()
            if isinstance(found, Exception):
                raise found
            for effect in self._core.handle(found, time.monotonic()):
                self._carry_out(effect)

    def _serves(self, servables: frozenset[str]) -> bool:
        epoch = self._core.epoch
        return epoch is not None and servables <= epoch.servables.keys()

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case EnsureActor():
                self._events.put_nowait(ActorUp(report=self._report(effect)))
            case ListStore():
                self._events.put_nowait(effect.done((1,)))
            case ReadManifest():
                manifest = self._store.read_manifest(effect.servable, effect.version)
                self._events.put_nowait(effect.done(manifest))
            case Load():
                task = asyncio.create_task(self._load(effect))
                self._loads.add(task)
                task.add_done_callback(self._loads.discard)
            case _:
                pass  # nobody routes, and nothing is kept

    def _report(self, effect: EnsureActor) -> ActorReport:
        return ActorReport(
            kind=effect.kind,
            endpoint=Endpoint(actor=effect.name, generation=1, node=""),
            pid=os.getpid(),
            capacity_bytes=self._books.capacity_bytes,
        )

    async def _load(self, effect: Load) -> None:
        try:
            await self._books.load(effect.order)
        except Exception as error:
            self._events.put_nowait(error)
        else:
            self._events.put_nowait(effect.done())
