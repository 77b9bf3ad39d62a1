"""What the demo's tests share: the model read once, an offline `Embed`, and a small web server."""

from __future__ import annotations

import contextlib
import functools
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from cluster.demo import minilm, minilm_files, tokenizer

LIMIT = 128
ROWS = 8

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]
Tokenize = Callable[[tokenizer.Arrays], tokenizer.Arrays]


@functools.cache
def words() -> Floats:
    return minilm_files.read_words(minilm_files.find().weights)


@functools.cache
def params() -> minilm.Params:
    arrays = minilm_files.read_params(minilm_files.find().weights)
    return {name: jax.device_put(array) for name, array in arrays.items()}


def abstract(shape: Sequence[object], dtype: npt.DTypeLike) -> Any:
    """An array without values, of a shape that may have symbols."""
    return jax.ShapeDtypeStruct(tuple(shape), dtype)  # type: ignore[no-untyped-call]


@functools.cache
def tokenizer_file() -> bytes:
    return minilm_files.find().tokenizer.read_bytes()


@functools.cache
def tokenize() -> Tokenize:
    return tokenizer.load({tokenizer.FILE: tokenizer_file()}, {"limit": LIMIT})


def texts(*sentences: str | bytes) -> tokenizer.Arrays:
    """The tokenizer's input."""
    column = np.empty(len(sentences), object)
    column[:] = [s.encode() if isinstance(s, str) else s for s in sentences]
    return {"text": column}


def tokens(sentences: Sequence[str]) -> tuple[Ints, Ints]:
    out = tokenize()(texts(*sentences))
    return out["ids"].astype(np.int32), out["mask"].astype(np.int32)


def pad(ids: Ints, mask: Ints, length: int) -> tuple[Ints, Ints]:
    """Longer by padding, which stands for no token."""
    more = ((0, 0), (0, length - ids.shape[1]))
    return np.pad(ids, more), np.pad(mask, more)


_encode = jax.jit(minilm.encode)


def encode(ids: Ints, mask: Ints) -> Floats:
    return np.asarray(_encode(params(), words()[ids], mask)["embedding"])


def embed(sentences: Sequence[str]) -> Floats:
    """An `Embed` without a server. Two programs: `ROWS` rows of 32 tokens and of `LIMIT`."""
    parts = []
    for at in range(0, len(sentences), ROWS):
        some = list(sentences[at : at + ROWS])
        full = some + some[:1] * (ROWS - len(some))
        ids, mask = tokens(full)
        ids, mask = pad(ids, mask, 32 if ids.shape[1] <= 32 else LIMIT)
        parts.append(encode(ids, mask)[: len(some)])
    return np.concatenate(parts)


#: Verb, path and decoded body (None without one) to a status and what to send as JSON, or bytes.
Respond = Callable[[str, str, object], tuple[int, object]]


@contextlib.contextmanager
def web_server(respond: Respond, *, keep_alive: bool = True) -> Iterator[str]:
    """A real HTTP server on a free port; yields its base URL.

    Args:
        respond: answers each request.
        keep_alive: if False, hangs up after each reply without having said so.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._reply(None)

        def do_POST(self) -> None:
            self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _reply(self, body: object) -> None:
            status, value = respond(self.command, self.path, body)
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            self.close_connection = not keep_alive

        def log_message(self, format: str, *args: object) -> None:
            """Be quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
