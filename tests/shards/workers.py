"""What the tests of the worker engine share: scenarios on a loop, and functions to be served."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np

from shards.wire import Frame
from shards.worker import WorkerEngine
from tests.shards.serving import DEADLINE_S, GENERATION, Array, FakeLink, until


def run(scenario: Callable[[WorkerEngine], Awaitable[None]], **arguments: Any) -> None:
    """Run a scenario; fails if the loop met an error that nobody took."""
    untaken: list[dict[str, Any]] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, what: untaken.append(what))
        engine = WorkerEngine(loop, GENERATION, **arguments)
        try:
            async with asyncio.timeout(DEADLINE_S):
                await scenario(engine)
        finally:
            await asyncio.to_thread(engine.close)
            await asyncio.sleep(0)
        assert engine._waiting_bytes == 0
        assert not engine._running
        assert not engine._open
        assert not engine._cancelled

    asyncio.run(main())
    assert untaken == []


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def double(inputs: Sequence[Array]) -> Sequence[Array]:
    return [inputs[0] * 2]


def no_negatives(inputs: Sequence[Array]) -> Sequence[Array]:
    if (inputs[0] < 0).any():
        raise ValueError(f"a negative number among {inputs[0].tolist()}\nover two lines")
    return double(inputs)


class Held:
    """A handler that begins when a test sees it and goes on when it is told."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.begun = threading.Semaphore(0)
        self.go = threading.Semaphore(0)

    def __call__(self, inputs: Sequence[Array]) -> Sequence[Array]:
        self.calls.append(inputs[0].tolist())
        self.begun.release()
        assert self.go.acquire(timeout=DEADLINE_S)
        return double(inputs)

    async def has_begun(self) -> None:
        assert await asyncio.to_thread(self.begun.acquire, timeout=DEADLINE_S)


def answered(link: FakeLink) -> dict[int, list[int]]:
    return {request: outputs[0].tolist() for request, outputs in link.answers.items()}


async def ask(engine: WorkerEngine, link: FakeLink, *frames: Frame, ends: int = 1) -> None:
    """Let frames arrive, and wait until the link has so many ends in all."""
    for frame in frames:
        engine.on_call(link, frame)
    await until(lambda: len(link.ended) >= ends)
