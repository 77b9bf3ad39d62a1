"""The raw floor's way between its processes: rows in a row, and nothing else.

Rows of float32 go out, 256 bytes each, and answers of the same size come back in the same order.
What the prototype's frames have is left out here: lengths, request ids and the unit's name, so one
router, one model and one order are all that this can ever serve, and a request cannot be answered
before those ahead of it. The device has no event loop either, but blocks. Nothing is checked; a
peer that misbehaves ends the process. This file does not know what computes the rows.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from typing import Final

import numpy as np

from bench.floor_link import ROW_BYTES, Link, Rows, answer
from bench.mlp import BUCKETS, WIDTH

__all__ = ["RawLink", "serve"]

_ROWS_MAX: Final = BUCKETS[-1]


class RawLink(Link):
    """The router's end: who asked first is answered first."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._waiting: deque[tuple[asyncio.Transport, int]] = deque()
        self._inbox = b""

    def _expect(self, client: asyncio.Transport, count: int) -> None:
        self._waiting.append((client, count))

    def _message(self, packed: list[bytes]) -> bytes:
        return b"".join(packed)

    def data_received(self, data: bytes) -> None:
        """Write back to back the answers that have arrived whole."""
        if self._inbox:
            data = self._inbox + data
        arrived = len(data) // ROW_BYTES
        rows = np.frombuffer(data, np.float32, arrived * WIDTH).reshape(arrived, WIDTH)
        waiting = self._waiting
        start = 0
        while waiting:
            client, count = waiting[0]
            end = start + count
            if end > arrived:
                break
            waiting.popleft()
            answer(client, rows[start:end])
            start = end
        self._inbox = data[start * ROW_BYTES :]


def serve(peer: socket.socket, compute: Callable[[Rows], Rows]) -> None:
    """Answer the peer until it hangs up.

    A plain blocking loop: the one peer is a router that reads at all times, so a blocking send
    cannot lock both up, and an event loop would only add a turn to every batch.
    """
    inbox = memoryview(bytearray(_ROWS_MAX * ROW_BYTES))
    inbox_rows: Rows = np.frombuffer(inbox, np.float32).reshape(_ROWS_MAX, WIDTH)
    filled = 0
    while received := peer.recv_into(inbox[filled:]):
        filled += received
        rows, rest = divmod(filled, ROW_BYTES)
        if rows:
            peer.sendall(compute(inbox_rows[:rows]).data)
            inbox[:rest] = inbox[rows * ROW_BYTES : filled]
            filled = rest
