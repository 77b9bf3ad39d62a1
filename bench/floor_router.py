"""The router process of both floors: REST in front of the device process, and nothing else.

``{"instances": [[64 floats], ...]}`` becomes rows on a Unix socket, and rows that come back become
``{"predictions": [...]}``. No validation, versions, metrics, deadlines or errors: any POST is a
request for the one model. This is a ceiling to measure against, so it is as fast as this process,
on uvloop and httptools, can be made over the wire that it is given, `bench.floor_framed` or
`bench.floor_raw`; with ``--noop`` it answers without a device, which shows what the load generator
can do.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Final, cast

import httptools
import orjson
import uvloop

from bench.floor_framed import FramedLink
from bench.floor_link import HEAD, Link
from bench.floor_raw import RawLink

__all__ = ["main"]

_LINKS: Final[dict[str, Callable[[asyncio.AbstractEventLoop], Link]]] = {
    "framed": FramedLink,
    "raw": RawLink,
}
_SOCKET_BYTES: Final = 4 << 20
_NOOP: Final = HEAD % (2, b"{}")


class Client(asyncio.Protocol):
    """One HTTP connection; its parser's callbacks are this object's methods."""

    def __init__(self, device: Link) -> None:
        self._device = device
        self._feed = httptools.HttpRequestParser(self).feed_data
        self._body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._feed(data)

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        body, self._body = self._body, b""
        self._device.ask(self._transport, orjson.loads(body)["instances"])


class Noop(asyncio.Protocol):
    """One HTTP connection that is answered at once."""

    def __init__(self) -> None:
        self._feed = httptools.HttpRequestParser(self).feed_data

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._feed(data)

    def on_message_complete(self) -> None:
        self._transport.write(_NOOP)


async def _listen(wire: str | None, path: Path | None) -> asyncio.Server:
    loop = asyncio.get_running_loop()
    if wire is None:
        server = await loop.create_server(Noop, "127.0.0.1", 0)
    else:
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
        link.connect(str(path))
        link.setblocking(False)
        make = _LINKS[wire]
        _, device = await loop.create_unix_connection(lambda: make(loop), sock=link)
        server = await loop.create_server(lambda: Client(device), "127.0.0.1", 0)
    print(f"router ready http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    return server


def main() -> None:
    """Serve on a free port of the loopback until ended, or until the device leaves."""
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--wire", choices=tuple(_LINKS))
    what.add_argument("--noop", action="store_true")
    parser.add_argument("--socket", type=Path)
    arguments = parser.parse_args()
    loop = uvloop.new_event_loop()
    # Held, since a server that nothing refers to is collected and closes its connections.
    server = loop.run_until_complete(_listen(arguments.wire, arguments.socket))
    gc.freeze()
    if arguments.wire != "framed":
        # Nothing on the way of a request makes a cycle, so there is nothing to collect.
        gc.disable()
    loop.run_forever()
    server.close()


if __name__ == "__main__":
    main()
