"""The floor's router process: REST in front of the device process, and nothing else.

``{"instances": [[64 floats], ...]}`` becomes rows on a Unix socket, and rows that come back become
``{"predictions": [...]}``. No validation, versions, metrics, deadlines or errors: any POST is a
request for the one model. This is the ceiling that the product is held against, so it is as fast
as this process, on uvloop and httptools, can be made; with ``--noop`` it answers without a device,
which shows what the load generator can do.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import socket
import struct
from collections import deque
from pathlib import Path
from typing import Final, cast

import httptools
import numpy as np
import orjson
import uvloop

from bench.mlp import WIDTH

__all__ = ["main"]

_ROW_BYTES: Final = 4 * WIDTH
_AS_NUMPY: Final = orjson.OPT_SERIALIZE_NUMPY
_PACK: Final = struct.Struct(f"{WIDTH}f").pack
_SOCKET_BYTES: Final = 4 << 20
_HEAD: Final = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
_NOOP: Final = _HEAD % (2, b"{}")


class Device(asyncio.Protocol):
    """The link to the device: rows out in one write a turn, answers back in the same order."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._outbox: list[bytes] = []
        self._waiting: deque[tuple[asyncio.Transport, int]] = deque()
        self._inbox = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._loop.stop()

    def ask(self, client: asyncio.Transport, instances: list[list[float]]) -> None:
        if not self._outbox:
            # What arrives in this turn of the loop leaves together at its end.
            self._loop.call_soon(self._flush)
        for row in instances:
            self._outbox.append(_PACK(*row))
        self._waiting.append((client, len(instances)))

    def _flush(self) -> None:
        assert self._transport is not None
        self._transport.write(b"".join(self._outbox))
        self._outbox.clear()

    def data_received(self, data: bytes) -> None:
        if self._inbox:
            data = self._inbox + data
        arrived = len(data) // _ROW_BYTES
        rows = np.frombuffer(data, np.float32, arrived * WIDTH).reshape(arrived, WIDTH)
        waiting = self._waiting
        start = 0
        while waiting:
            client, count = waiting[0]
            end = start + count
            if end > arrived:
                break
            waiting.popleft()
            # A client may have left in the meantime; its answer is dropped in its turn.
            if not client.is_closing():
                body = orjson.dumps({"predictions": rows[start:end]}, option=_AS_NUMPY)
                client.write(_HEAD % (len(body), body))
            start = end
        self._inbox = data[start * _ROW_BYTES :]


class Client(asyncio.Protocol):
    """One HTTP connection; its parser's callbacks are this object's methods."""

    def __init__(self, device: Device) -> None:
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


async def _listen(path: Path | None) -> asyncio.Server:
    loop = asyncio.get_running_loop()
    if path is None:
        server = await loop.create_server(Noop, "127.0.0.1", 0)
    else:
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
        link.connect(str(path))
        link.setblocking(False)
        _, device = await loop.create_unix_connection(lambda: Device(loop), sock=link)
        server = await loop.create_server(lambda: Client(device), "127.0.0.1", 0)
    print(f"router ready http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    return server


def main() -> None:
    """Serve on a free port of the loopback until ended, or until the device leaves."""
    parser = argparse.ArgumentParser(description=__doc__)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--socket", type=Path)
    where.add_argument("--noop", action="store_true")
    arguments = parser.parse_args()
    loop = uvloop.new_event_loop()
    # Held, since a server that nothing refers to is collected and closes its connections.
    server = loop.run_until_complete(_listen(arguments.socket))
    # Nothing on the way of a request makes a cycle, so there is nothing to collect.
    gc.freeze()
    gc.disable()
    loop.run_forever()
    server.close()


if __name__ == "__main__":
    main()
