"""What the routers of both floors do alike on their way to the device and back to the client.

Rows are packed as requests come and leave in one write a turn of the loop. How a message looks,
and how an answer finds its client, is for `bench.floor_framed` and `bench.floor_raw` to say.
"""

from __future__ import annotations

import abc
import asyncio
import struct
from typing import Final, cast

import numpy as np
import numpy.typing as npt
import orjson

from bench.mlp import WIDTH

__all__ = ["HEAD", "ROW_BYTES", "Link", "Rows", "answer"]

Rows = npt.NDArray[np.float32]

ROW_BYTES: Final = 4 * WIDTH
#: Before a body: with its length, then the body itself.
HEAD: Final = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"

_AS_NUMPY: Final = orjson.OPT_SERIALIZE_NUMPY
_PACK: Final = struct.Struct(f"{WIDTH}f").pack


class Link(asyncio.Protocol, abc.ABC):
    """The router's end of the socket to the device.

    Args:
        loop: that it runs on, and that it stops when the device leaves.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._outbox: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The device is there."""
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """The device is gone, and with it the reason to be."""
        self._loop.stop()

    def ask(self, client: asyncio.Transport, instances: list[list[float]]) -> None:
        """Send a request's rows with those of this turn; the client is written its answer."""
        if not self._outbox:
            # What arrives in this turn of the loop leaves together at its end.
            self._loop.call_soon(self._flush)
        for row in instances:
            self._outbox.append(_PACK(*row))
        self._expect(client, len(instances))

    def _flush(self) -> None:
        assert self._transport is not None
        self._transport.write(self._message(self._outbox))
        self._outbox.clear()

    @abc.abstractmethod
    def _expect(self, client: asyncio.Transport, count: int) -> None:
        """Note that this client waits for the answers of this turn's next ``count`` rows."""

    @abc.abstractmethod
    def _message(self, packed: list[bytes]) -> bytes:
        """What carries this turn's rows."""


def answer(client: asyncio.Transport, rows: Rows) -> None:
    """Write a client its predictions, unless it has left in the meantime."""
    if not client.is_closing():
        body = orjson.dumps({"predictions": rows}, option=_AS_NUMPY)
        client.write(HEAD % (len(body), body))
