"""The prototype's way between its processes: frames, and answers that are matched by request id.

A frame is a fixed prefix, a msgpack header and raw rows::

    header bytes u32 | body bytes u32 | header: [unit, [request id, ...], [rows, ...]] | body

A turn's requests share one frame. Both ends are protocols on uvloop: what has arrived at the
device when it reads is one batch for each unit, and every frame is answered by one that repeats
its header. Nothing is checked and nothing is bounded; a peer that misbehaves ends the process.
This file does not know what a unit computes, and does not import JAX.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import struct
from collections.abc import Callable, Mapping
from typing import Final, cast

import msgspec
import numpy as np
import uvloop

from bench.floor_link import Link, Rows, answer
from bench.mlp import WIDTH

__all__ = ["UNIT", "FramedDevice", "FramedLink", "Header", "cut", "pack", "serve"]

#: The one unit that the router asks for.
UNIT: Final = "mlp"

_PREFIX: Final = struct.Struct("<II")


class Header(msgspec.Struct, array_like=True, gc=False):
    """What a frame says of its rows.

    Attributes:
        unit: that computes, or has computed, them.
        ids: of the requests whose rows follow one another in the body.
        counts: how many rows each of them has.
    """

    unit: str
    ids: list[int]
    counts: list[int]


_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(Header).decode


def pack(header: bytes, parts: list[bytes]) -> bytes:
    """The frame of an encoded header over a body in parts."""
    body_bytes = sum(map(len, parts))
    return b"".join((_PREFIX.pack(len(header), body_bytes), header, *parts))


def cut(data: bytes) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """The frames that have arrived whole, as header and body, and the bytes after them."""
    frames = []
    start, arrived = 0, len(data)
    while arrived - start >= _PREFIX.size:
        header_bytes, body_bytes = _PREFIX.unpack_from(data, start)
        middle = start + _PREFIX.size + header_bytes
        end = middle + body_bytes
        if end > arrived:
            break
        # Copied out, so that the body is as aligned as what reads its floats in place wants it.
        frames.append((data[start + _PREFIX.size : middle], data[middle:end]))
        start = end
    return frames, data[start:]


class FramedLink(Link):
    """The router's end: a frame a turn, and a table of who waits for which id."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._next_id = itertools.count().__next__
        self._waiting: dict[int, asyncio.Transport] = {}
        self._turn = Header(UNIT, [], [])
        self._inbox = b""

    def _expect(self, client: asyncio.Transport, count: int) -> None:
        number = self._next_id()
        self._waiting[number] = client
        self._turn.ids.append(number)
        self._turn.counts.append(count)

    def _message(self, packed: list[bytes]) -> bytes:
        header, self._turn = _encode(self._turn), Header(UNIT, [], [])
        return pack(header, packed)

    def data_received(self, data: bytes) -> None:
        """Write back to back the answers that have arrived."""
        frames, self._inbox = cut(self._inbox + data if self._inbox else data)
        take = self._waiting.pop
        for encoded, body in frames:
            header = _decode(encoded)
            rows = np.frombuffer(body, np.float32).reshape(-1, WIDTH)
            start = 0
            for number, count in zip(header.ids, header.counts, strict=True):
                end = start + count
                answer(take(number), rows[start:end])
                start = end


class FramedDevice(asyncio.Protocol):
    """The device's end: what has arrived in a turn is computed together.

    Args:
        units: name to what computes any number of rows.
        left: called when the router has left.
    """

    def __init__(
        self, units: Mapping[str, Callable[[Rows], Rows]], left: Callable[[], None]
    ) -> None:
        self._units = units
        self._left = left
        self._transport: asyncio.Transport | None = None
        self._inbox = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The router is there."""
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """The router is gone."""
        self._left()

    def data_received(self, data: bytes) -> None:
        """Compute what has arrived.

        At once and not at the end of the turn: one connection is read once a turn.
        """
        frames, self._inbox = cut(self._inbox + data if self._inbox else data)
        lanes: dict[str, list[tuple[bytes, bytes]]] = {}
        for frame in frames:
            lanes.setdefault(_decode(frame[0]).unit, []).append(frame)
        for unit, asked in lanes.items():
            self._answer(self._units[unit], asked)

    def _answer(self, compute: Callable[[Rows], Rows], asked: list[tuple[bytes, bytes]]) -> None:
        assert self._transport is not None
        bodies = b"".join([body for _, body in asked])
        rows = np.frombuffer(bodies, np.float32).reshape(-1, WIDTH)
        answers = compute(rows).data.cast("B")
        parts: list[bytes | memoryview] = []
        start = 0
        for header, body in asked:
            end = start + len(body)
            parts += _PREFIX.pack(len(header), len(body)), header, answers[start:end]
            start = end
        self._transport.write(b"".join(parts))


def serve(peer: socket.socket, units: Mapping[str, Callable[[Rows], Rows]]) -> None:
    """Answer the peer on a loop of this thread until it hangs up."""
    loop = uvloop.new_event_loop()
    peer.setblocking(False)
    gone: asyncio.Future[None] = loop.create_future()

    def leave() -> None:
        # A future, for the peer may hang up before the connection is said to be made.
        if not gone.done():
            gone.set_result(None)

    loop.run_until_complete(loop.connect_accepted_socket(lambda: FramedDevice(units, leave), peer))
    loop.run_until_complete(gone)
    loop.close()
