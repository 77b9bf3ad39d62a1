"""Sealed frames over a socket, one at a time, with a limit on the time that each may take.

Both ends of the pair between an actor and its compile process use this. Does not know what is
said; `shards.compiling.messages` does.
"""

from __future__ import annotations

import select
import socket
import time
from typing import Final, TypeVar

import msgspec

from batching.errors import DataLoss
from shards.compiling.messages import HEADER_BYTES, Sealer, body_bytes

__all__ = ["Channel"]

T = TypeVar("T")

_PIECE: Final = 1 << 20


class Channel:
    """One end of the pair. Not thread-safe.

    Args:
        sock: connected, of type stream; the channel owns it.
        key: shared with the other end.
        is_parent: whether this is the actor's end.
    """

    def __init__(self, sock: socket.socket, key: bytes, *, is_parent: bool) -> None:
        self._sock = sock
        directions = (b"down", b"up") if is_parent else (b"up", b"down")
        self._out, self._in = (Sealer(key, direction) for direction in directions)

    def send(self, message: msgspec.Struct, timeout_s: float | None = None) -> None:
        """Send a message.

        Raises:
            OSError: the other end is gone, or did not read in time (TimeoutError).
        """
        body = msgspec.msgpack.encode(message)
        self._sock.settimeout(timeout_s)
        self._sock.sendall(self._out.seal(body))
        self._sock.sendall(body)

    def receive(self, kind: type[T], timeout_s: float | None = None) -> T:
        """The next message.

        Args:
            kind: a `msgspec.Struct`, or a union of tagged ones.
            timeout_s: seconds for all of it; None waits for ever.

        Raises:
            EOFError: the other end is gone.
            TimeoutError: nothing whole came in time.
            DataLoss: what came is not a message of the other end.
        """
        ends_at = None if timeout_s is None else time.monotonic() + timeout_s
        header = self._read(HEADER_BYTES, ends_at)
        body = self._in.open(header, self._read(body_bytes(header), ends_at))
        try:
            return msgspec.msgpack.decode(body, type=kind)
        except (msgspec.DecodeError, ValueError) as error:
            raise DataLoss(f"the compile process sent what is no message: {error}") from error

    def is_readable(self, timeout_s: float) -> bool:
        """Whether something came, or the other end is gone, within this time."""
        # Not `select.select`, which knows no descriptor beyond 1023: an actor may have many links.
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        return bool(poller.poll(timeout_s * 1000))

    def close(self) -> None:
        """Give the socket up."""
        self._sock.close()

    def _read(self, size: int, ends_at: float | None) -> bytes:
        # Grown as bytes come: a length alone allocates nothing.
        data = bytearray()
        while len(data) < size:
            if ends_at is not None:
                left_s = ends_at - time.monotonic()
                if left_s <= 0:
                    raise TimeoutError
                self._sock.settimeout(left_s)
            try:
                piece = self._sock.recv(min(_PIECE, size - len(data)))
            except ConnectionResetError:
                piece = b""
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)
