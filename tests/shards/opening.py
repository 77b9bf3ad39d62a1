"""An actor as its units see it: books, a worker and an opener, without Ray and sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from shards.hosting import Hosting
from shards.orders import HostedUnit, LoadOrder
from shards.worker import WorkerEngine
from tests.shards.serving import DEADLINE_S, GENERATION, Array, FakeLink, call, until

__all__ = ["Actor", "run"]


class Actor:
    """Books, worker and opener of one actor."""

    def __init__(self, store: Path, engine: WorkerEngine, opener: Any, capacity: int) -> None:
        self.store = store
        self.engine = engine
        self.opener = opener
        self.books = Hosting(opener, "actor-0", capacity)
        self.link = FakeLink()
        self._asked = 0

    async def load(self, version: int, *units: HostedUnit, name: str = "model") -> None:
        order = LoadOrder(
            term=1, store=str(self.store), servable=name, version=version, units=units
        )
        await self.books.load(order)

    async def unload(self, version: int) -> None:
        await self.books.unload(1, "model", version)

    async def ask(self, unit: str, *arrays: Array) -> list[Array] | tuple[str, str]:
        """The outputs for these inputs, or code and message of the refusal."""
        self._asked += 1
        request = self._asked
        self.engine.on_call(self.link, call(unit, {request: len(arrays[0])}, *arrays))
        await until(lambda: request in self.link.ended)
        if request in self.link.errors:
            return self.link.codes[request], self.link.errors[request].message
        return self.link.answers[request]


def run(
    store: Path,
    make: Callable[[WorkerEngine], Any],
    scenario: Callable[[Actor], Awaitable[None]],
    capacity: int = 1 << 30,
) -> None:
    async def main() -> None:
        engine = WorkerEngine(asyncio.get_running_loop(), GENERATION)
        try:
            async with asyncio.timeout(DEADLINE_S):
                await scenario(Actor(store, engine, make(engine), capacity))
        finally:
            await asyncio.to_thread(engine.close)

    asyncio.run(main())
