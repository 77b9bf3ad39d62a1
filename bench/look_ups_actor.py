"""One actor of ``bench look-ups`` and ``fanout``: a device or a shard, a process without Ray.

It is made of what an actor is made of in production; only who starts it, and who tells it what to
load, is the bench. It says where it listens when it has loaded its part.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import threading
import time
from collections.abc import Sequence
from random import Random
from typing import Any, Final

import msgspec

from shards.errors import FrameRefused
from shards.hosting import Hosting
from shards.loop import LoopThread
from shards.orders import ActorSpec, Endpoint, HostedUnit, LoadOrder
from shards.replies import refuse_answer
from shards.transport import Link, LinkHandler, connect, listen
from shards.wire import CancelHeader, Frame, FrameKind, Header, ReplyHeader

__all__ = [
    "CAPACITY_BYTES", "GENERATION", "NODE", "READY", "SECRET_VARIABLE", "SERVABLE", "Frames",
]  # fmt: skip

NODE: Final = "bench"
GENERATION: Final = 1
SERVABLE: Final = "look-ups"
READY: Final = "actor ready"
CAPACITY_BYTES: Final = 8 << 30
#: Takes the links' secret to the process, out of sight of its command line.
SECRET_VARIABLE: Final = "SHARDSERVE_BENCH_SECRET"


class Frames:
    """Passes a link's frames to the engine.

    Attributes:
        calls: frames of calls so far.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.calls = 0

    def on_frame(self, link: Link, frame: Frame) -> None:
        """Calls and cancellations."""
        if frame.kind is FrameKind.CALL:
            self.calls += 1
            self._engine.on_call(link, frame)
        elif isinstance(frame.header, CancelHeader):
            self._engine.on_cancel(link, frame.header.requests)

    def on_refused(self, link: Link, header: Header, error: FrameRefused) -> None:
        """The requests of an answer that its router does not take must still end."""
        if isinstance(header, ReplyHeader):
            refuse_answer(link, header, error)

    def on_closed(self, link: Link, error: Exception | None) -> None:
        """Nobody waits for what this link asked for."""
        self._engine.on_link_closed(link)


def _device(name: str, io: LoopThread) -> tuple[Any, Hosting]:
    from shards.device_host import make_device_host

    spec = ActorSpec(kind="device", name=name, directory="", capacity_bytes=CAPACITY_BYTES)
    host = make_device_host(spec, io, GENERATION)
    return host.engine, Hosting(host.opener, name, CAPACITY_BYTES)


def _shard(
    name: str, io: LoopThread, secret: bytes, node: str, slow_s: float, slow_share: float
) -> tuple[Any, Hosting]:
    from shards.forwarding import Forwarder
    from shards.openers import TableOpener
    from shards.worker import Handler, WorkerEngine

    class Engine(WorkerEngine):
        """Sleeps in some calls, on the thread that does the work, as a page fault would."""

        def install(self, unit_id: str, handler: Handler, *others: Any, **named: Any) -> None:
            super().install(unit_id, _slowed(handler, slow_s, slow_share), *others, **named)

    async def dial(endpoint: Endpoint, handler: LinkHandler) -> Link:
        return await connect(
            endpoint, name=name, node=node, secret=secret, handler=handler, generation=GENERATION
        )

    kind = Engine if slow_share else WorkerEngine
    engine = kind(io.loop, GENERATION, forwarder=Forwarder(dial, io.loop))
    return engine, Hosting(TableOpener(engine), name, CAPACITY_BYTES)


def _slowed(handler: Any, slow_s: float, share: float) -> Any:
    random = Random(0)

    def slowed(arrays: Any) -> Any:
        if random.random() < share:
            time.sleep(slow_s)
        return handler(arrays)

    return slowed


def main(argv: Sequence[str] | None = None) -> None:
    """Load, say so, and serve until told to end.

    Args:
        argv: the arguments without the program's name; `sys.argv` when None.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True, help="its kind and number")
    parser.add_argument("--node", required=True, help="where it says that it is")
    parser.add_argument("--directory", required=True, help="where its Unix socket goes")
    parser.add_argument("--store", required=True)
    parser.add_argument("--units", required=True, help="what to load, as JSON")
    parser.add_argument("--resident", default="mapped", help="how tables are in memory")
    parser.add_argument("--processor", type=int, help="the only one that it runs on, by number")
    parser.add_argument("--slow-ms", type=float, default=0.0, help="what a shard sleeps")
    parser.add_argument("--slow-share", type=float, default=0.0, help="in so many of its calls")
    asked = parser.parse_args(argv)
    if asked.processor is not None:
        own = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {own[asked.processor % len(own)]})
    secret = os.environ[SECRET_VARIABLE].encode()
    io = LoopThread(f"{asked.name}-io")
    if asked.name.startswith("device"):
        engine, hosting = io.call(_device, asked.name, io)
    else:
        slow_s = asked.slow_ms / 1000
        engine, hosting = io.call(
            _shard, asked.name, io, secret, asked.node, slow_s, asked.slow_share
        )
    order = LoadOrder(
        term=1,
        store=asked.store,
        servable=SERVABLE,
        version=1,
        units=msgspec.json.decode(asked.units, type=tuple[HostedUnit, ...]),
        resident=asked.resident,
    )
    io.run(hosting.load(order))
    listener = io.run(
        listen(
            name=asked.name,
            generation=GENERATION,
            node=asked.node,
            secret=secret,
            handler=Frames(engine),
            directory=asked.directory,
            tcp_host="127.0.0.1",
        )
    )
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    gc.collect()
    gc.freeze()
    print(READY, msgspec.json.encode(listener.endpoint).decode(), flush=True)
    ended.wait()
    os._exit(0)


if __name__ == "__main__":
    main()
