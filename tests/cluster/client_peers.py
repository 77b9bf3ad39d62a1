"""A server that plays what a test tells it, connection by connection: answers, halves, resets."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np

from cluster.forms import raw

#: What the server does with one request: the bytes that it answers, or one of the words below.
Act = bytes | str
#: Reset the connection without an answer.
RESET = "reset"
#: Close it in good order without an answer.
CLOSE = "close"
#: Say nothing until the test is over.
SILENCE = "silence"


def response(
    status: int, body: bytes = b"", headers: str = "", *, length: int | None = None
) -> bytes:
    size = len(body) if length is None else length
    return f"HTTP/1.1 {status} X\r\n{headers}content-length: {size}\r\n\r\n".encode() + body


def answer(value: float = 7.0, *, headers: str = "") -> bytes:
    """What a door says to `predict` whose output ``y`` is one number."""
    written = raw.write_answer({"y": np.array([value], np.float32)})
    head = f"inference-header-content-length: {written.head_bytes}\r\n{headers}"
    return response(200, b"".join(written.buffers), head)


def refusal(status: int, code: str = "", retry_after_ms: int = 0) -> bytes:
    headers = f"x-error-code: {code}\r\n" if code else ""
    if retry_after_ms:
        headers += f"retry-after: 1\r\nretry-after-ms: {retry_after_ms}\r\n"
    return response(status, msgspec.json.encode({"error": "why"}), headers)


class Peer:
    """A listening socket; every request takes the next act.

    Attributes:
        requests: heads of the requests that came.
        connections: how many were made.
    """

    def __init__(
        self, acts: Sequence[Act | Sequence[Act]], tls: ssl.SSLContext | None = None
    ) -> None:
        self._acts = list(acts)
        self._over = threading.Event()
        self._tls = tls
        self._open: set[socket.socket] = set()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.requests: list[bytes] = []
        self.connections = 0
        port = self._listening.getsockname()[1]
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{port}"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        self._over.set()
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5.0)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            self.connections += 1
            thread = threading.Thread(target=self._serve, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection, server_side=True)
            self._open.add(connection)
            with connection:
                self._play(connection)
        self._open.discard(connection)
        connection.close()

    def _play(self, connection: socket.socket) -> None:
        while (request := _request(connection)) and self._acts:
            self.requests.append(request)
            acts = self._acts.pop(0)
            for act in [acts] if isinstance(acts, bytes | str) else acts:
                if isinstance(act, bytes):
                    connection.sendall(act)
                elif act == RESET:
                    linger = struct.pack("ii", 1, 0)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    return
                elif act == CLOSE:
                    return
                else:
                    self._over.wait(10.0)
                    return


def _request(connection: socket.socket) -> bytes:
    """The head of the next request; its body is read and dropped."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = connection.recv(1 << 16)
        if not more:
            return b""
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    _, found, length = head.lower().partition(b"content-length: ")
    missing = int(length.split(b"\r\n")[0]) - len(body) if found else 0
    while missing > 0:
        missing -= len(connection.recv(1 << 16))
    return head


@contextlib.contextmanager
def peer(*acts: Act | Sequence[Act], tls: ssl.SSLContext | None = None) -> Iterator[Peer]:
    made = Peer(acts, tls)
    try:
        yield made
    finally:
        made.close()


#: Calls a method of a client, blocking or not, and gives its result.
Ask = Callable[..., Any]
