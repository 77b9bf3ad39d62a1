"""The event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
import uvloop

from shards.loop import LoopThread
from tests.shards.serving import DEADLINE_S


@pytest.fixture
def io() -> Iterator[LoopThread]:
    made = LoopThread("test-io")
    yield made
    made.close()


async def where() -> tuple[int, asyncio.AbstractEventLoop]:
    return threading.get_ident(), asyncio.get_running_loop()


async def fail() -> None:
    raise LookupError("not here")


def test_coroutines_run_on_the_loop_of_the_thread(io: LoopThread) -> None:
    assert io.run(where()) == (io.ident, io.loop)
    assert io.ident != threading.get_ident()
    assert isinstance(io.loop, uvloop.Loop)


def test_functions_run_there_too_and_may_ask_for_the_running_loop(io: LoopThread) -> None:
    assert io.call(threading.get_ident) == io.ident
    assert io.call(asyncio.get_running_loop) is io.loop
    assert io.call(divmod, 7, 2) == (3, 1)


def test_an_exception_comes_back_to_the_caller(io: LoopThread) -> None:
    with pytest.raises(LookupError, match="not here"):
        io.run(fail())
    with pytest.raises(ZeroDivisionError):
        io.call(divmod, 1, 0)


def test_another_loop_can_wait_for_this_one(io: LoopThread) -> None:
    async def main() -> tuple[int, asyncio.AbstractEventLoop]:
        with pytest.raises(LookupError):
            await io.wait(fail())
        return await io.wait(where())

    assert asyncio.run(main()) == (io.ident, io.loop)


def test_a_wait_of_another_loop_keeps_that_loop_turning(io: LoopThread) -> None:
    async def main() -> bool:
        begun, go = threading.Event(), asyncio.Event()

        async def held() -> None:
            begun.set()
            await go.wait()

        waiting = asyncio.ensure_future(io.wait(held()))
        await asyncio.to_thread(begun.wait, DEADLINE_S)
        still = not waiting.done()  # this line runs while the other loop holds the coroutine
        io.loop.call_soon_threadsafe(go.set)
        await waiting
        return still

    assert asyncio.run(main())


def test_a_wait_that_is_given_up_cancels_what_it_waited_for(io: LoopThread) -> None:
    ended = threading.Event()
    begun = threading.Event()

    async def held() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def main() -> None:
        waiting = asyncio.ensure_future(io.wait(held()))
        await asyncio.to_thread(begun.wait, DEADLINE_S)
        waiting.cancel()

    asyncio.run(main())
    assert ended.wait(DEADLINE_S)


def test_a_limit_on_a_run_is_kept(io: LoopThread) -> None:
    with pytest.raises(TimeoutError):
        io.run(asyncio.sleep(3600), timeout_s=0.01)


def test_a_coroutine_that_was_given_up_is_cancelled(io: LoopThread) -> None:
    ended = threading.Event()

    async def held() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    with pytest.raises(TimeoutError):
        io.run(held(), timeout_s=0.01)
    assert ended.wait(DEADLINE_S)


def test_the_thread_may_not_wait_for_itself(io: LoopThread) -> None:
    def nested() -> None:
        waited = where()
        try:
            io.run(waited)
        finally:
            waited.close()

    with pytest.raises(AssertionError, match="wait for itself"):
        io.call(nested)


def test_close_ends_the_thread_and_may_be_called_again() -> None:
    io = LoopThread("test-io")
    (thread,) = (t for t in threading.enumerate() if t.ident == io.ident)
    assert thread.daemon
    io.close()
    io.close()
    assert not thread.is_alive()
    assert io.loop.is_closed()
