"""The far end of ``bench transport``: a process that answers calls over the product's own links.

What a call asks for is its op: `ECHO` sends the body back, `SINK` answers with none, and `GIVE`
answers with as many bytes as the first item has rows. There is no unit, batch or queue behind it,
so what a caller measures is the link.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import signal
from collections.abc import Sequence
from typing import Final

import msgspec
import uvloop

from shards.errors import FrameRefused
from shards.orders import TlsFiles
from shards.transport import Limits, Link, TlsContexts, listen
from shards.wire import (
    Buffer,
    CallHeader,
    Frame,
    FrameKind,
    Header,
    ReplyHeader,
    TensorHeader,
)

__all__ = [
    "ECHO",
    "GENERATION",
    "GIVE",
    "LIMITS",
    "NAME",
    "NODE",
    "SECRET_VARIABLE",
    "SINK",
    "Echo",
]

NAME: Final = "echo"
NODE: Final = "bench"
GENERATION: Final = 1
ECHO: Final = "echo"
SINK: Final = "sink"
GIVE: Final = "give"

#: Takes the links' secret to the process, out of sight of its command line.
SECRET_VARIABLE: Final = "SHARDSERVE_BENCH_SECRET"

#: Small frames must be taken while one of 256 MB waits; all else is as in production.
LIMITS: Final = Limits(waiting_bytes_max=1 << 30)


class Echo:
    """Answers every call at once, on the loop's thread."""

    def __init__(self) -> None:
        self._given = b""

    def on_frame(self, link: Link, frame: Frame) -> None:
        """Answer a call; anything else is ignored."""
        header = frame.header
        if not isinstance(header, CallHeader):
            return
        item = header.items[0]
        tensors: list[TensorHeader] = []
        body: Sequence[Buffer] = ()
        if header.op == ECHO:
            tensors, body = header.tensors, [frame.body]
        elif header.op == GIVE:
            tensors, body = (
                [TensorHeader("uint8", (item.rows,), item.rows)],
                [self._give(item.rows)],
            )
        reply = ReplyHeader(header.unit, GENERATION, [(item.request, item.rows)], tensors)
        link.send(FrameKind.REPLY, reply, body)

    def on_refused(self, link: Link, header: Header, error: FrameRefused) -> None:
        """The caller has left the answer: it will say so itself."""

    def on_closed(self, link: Link, error: Exception | None) -> None:
        """A caller has left; another may come."""

    def _give(self, nbytes: int) -> memoryview:
        if len(self._given) < nbytes:
            # Not zeros: those would all be read from the one page that the kernel keeps of them.
            self._given = b"\x5a" * nbytes
        return memoryview(self._given)[:nbytes]


async def _serve(directory: str, tls: TlsFiles | None) -> None:
    listener = await listen(
        name=NAME,
        generation=GENERATION,
        node=NODE,
        secret=os.environ[SECRET_VARIABLE].encode(),
        handler=Echo(),
        directory=directory,
        tcp_host="127.0.0.1",
        tls=TlsContexts(tls) if tls is not None else None,
        limits=LIMITS,
    )
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    gc.freeze()
    print("echo ready", msgspec.json.encode(listener.endpoint).decode(), flush=True)
    await ended.wait()
    await listener.close()


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until told to end.

    Args:
        argv: the arguments without the program's name; `sys.argv` when None.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", required=True, help="where the Unix socket goes")
    parser.add_argument("--tls", metavar="FILE", help="of certificate, key and CA, all in one")
    arguments = parser.parse_args(argv)
    tls = None
    if arguments.tls is not None:
        tls = TlsFiles(certificate=arguments.tls, key=arguments.tls, ca=arguments.tls)
    uvloop.run(_serve(arguments.directory, tls))


if __name__ == "__main__":
    main()
