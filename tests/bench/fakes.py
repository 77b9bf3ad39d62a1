"""Stand-ins for the benchmark tests: a scripted HTTP server, and a benchmark that is made up."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import cast

import httptools

from bench.errors import LoadFailed
from bench.registry import Bench, Options
from bench.report import Plot, Result, Samples, Series, Table


def eventually(holds: Callable[[], bool], *, timeout_s: float = 20.0) -> bool:
    """Whether something comes true within a time; asked again and again."""
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not holds():
        if time.monotonic() > deadline:
            return False
        pause.wait(0.005)
    return True


async def hung_up(connections: set[asyncio.Transport]) -> None:
    """End all connections of a server that takes no more, until the last has let go of its socket.

    One that was accepted in the loop's last turn is in no set yet: a task makes it a connection.
    """
    while (accepting := asyncio.all_tasks() - {asyncio.current_task()}) or connections:
        for transport in tuple(connections):
            transport.abort()
        if accepting:
            await asyncio.wait(accepting)
        else:
            await asyncio.sleep(0)


class TinyServer:
    """An HTTP server in a thread, which does with its requests what the test scripts.

    Args:
        status: of every answer.
        stall_first_s: how long the first request waits for its answer.
        hang_up_on: number of the request that is answered by closing the connection.
        silent_on: number of the request that is never answered.
        close: whether answers say ``Connection: close``.
    """

    def __init__(
        self,
        *,
        status: int = 200,
        stall_first_s: float = 0.0,
        hang_up_on: int | None = None,
        silent_on: int | None = None,
        close: bool = False,
    ) -> None:
        self.status = status
        self.stall_first_s = stall_first_s
        self.hang_up_on = hang_up_on
        self.silent_on = silent_on
        self.close = close
        self.bodies: list[bytes] = []
        self.paths: list[bytes] = []
        self.connections = 0
        self.open: set[asyncio.Transport] = set()

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        loop = asyncio.new_event_loop()
        server = loop.run_until_complete(
            loop.create_server(lambda: _Answering(self), "127.0.0.1", 0)
        )
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(10)
            assert not thread.is_alive()
            server.close()
            loop.run_until_complete(hung_up(self.open))
            loop.close()


class _Answering(asyncio.Protocol):
    def __init__(self, owner: TinyServer) -> None:
        self._owner = owner
        self._parser = httptools.HttpRequestParser(self)
        self._body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._owner.connections += 1
        self._owner.open.add(self._transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._owner.open.discard(self._transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._owner.paths.append(url)

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        body, self._body = self._body, b""
        owner = self._owner
        number = len(owner.bodies)
        owner.bodies.append(body)
        if number == owner.hang_up_on:
            self._transport.close()
        elif number == owner.silent_on:
            return
        elif number == 0 and owner.stall_first_s:
            asyncio.get_running_loop().call_later(owner.stall_first_s, self._answer, body)
        else:
            self._answer(body)

    def _answer(self, body: bytes) -> None:
        """The body back, reversed."""
        if self._transport.is_closing():
            return
        connection = "close" if self._owner.close else "keep-alive"
        head = (
            f"HTTP/1.1 {self._owner.status} X\r\nConnection: {connection}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        self._transport.write(head.encode() + body[::-1])
        if self._owner.close:
            self._transport.close()


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--answer", type=float, default=42.0)
    parser.add_argument("--broken", action="store_true")


def _run(options: Options) -> Result:
    if options.own.broken:
        raise LoadFailed("as asked")
    line = Series(label="line", x=(1.0, 2.0), y=(3.0, 4.0))
    return Result(
        bench="fake",
        ratios={"answer": options.own.answer},
        figures={"rounds": options.rounds_or(quick=1, full=5), "seed": options.seed},
        tables=(Table(title="A table", columns=("what", "value"), rows=(("answer", 42),)),),
        samples={"raw": Samples(columns=("x", "y"), rows=[(1, 2.5)])},
        plot=Plot(title="A plot", x_label="x", y_label="y", series=(line,)),
        notes=("A note [with brackets].",),
    )


BENCH = Bench(name="fake", summary="made up", run=_run, add_arguments=_add_arguments)
