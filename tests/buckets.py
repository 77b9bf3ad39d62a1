"""An object store on loopback for tests: `moto`'s server, and ones that misbehave."""

from __future__ import annotations

import contextlib
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs, urlsplit

import pyarrow.fs as pafs

from cluster.ports import free_ports
from shards.cache import NodeCache
from shards.locations import parse_location
from shards.objects import Objects, connect
from shards.remote import RemoteStore

__all__ = ["CREDENTIALS", "Bucket", "BucketServer", "hanging", "paging", "trickling"]

#: What any S3 client asks for; `moto` takes all.
CREDENTIALS: Final = {
    "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE",
    "AWS_SECRET_ACCESS_KEY": "secret-of-the-tests",
    "AWS_EC2_METADATA_DISABLED": "true",
}
_UP_S: Final = 30.0


class BucketServer:
    """A server in a process of its own. It forgets everything when it ends.

    Attributes:
        port: on loopback; the same after a restart.
    """

    def __init__(self) -> None:
        # Not one of clients': who knocks at such a port again and again may reach itself.
        (self.port,) = free_ports(1)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        address = ("-H", "127.0.0.1", "-p", str(self.port))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", *address],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until = time.monotonic() + _UP_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(address[1::2], 1.0):
                return
            assert time.monotonic() < until, "moto's server does not come up"
            assert self._process.poll() is None, "moto's server ended"
            time.sleep(0.02)

    def pause(self) -> None:
        """Let it take connections and answer none, until it is stopped."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def stop(self) -> None:
        """End it by its process id."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @property
    def options(self) -> str:
        """The query of a URL that leads here."""
        return f"endpoint_override=127.0.0.1:{self.port}&scheme=http&region=us-east-1"

    def bucket(self) -> Bucket:
        """A new bucket."""
        bucket = Bucket(self, f"bucket-{secrets.token_hex(6)}")
        bucket.make()
        return bucket


class Bucket:
    """A bucket of a server."""

    def __init__(self, server: BucketServer, name: str) -> None:
        self._server = server
        self.name = name
        self.url = f"s3://{name}/models/prod?{server.options}"

    def make(self) -> None:
        """Make it, again after the server was stopped."""
        maker = pafs.S3FileSystem(
            endpoint_override=f"127.0.0.1:{self._server.port}",
            scheme="http",
            region="us-east-1",
            allow_bucket_creation=True,
        )
        maker.create_dir(self.name)

    def objects(self, timeout_s: float = 20.0) -> Objects:
        """Its objects under the URL's prefix."""
        location = parse_location(self.url)
        return Objects(location.url, connect(location), location.root, timeout_s)

    def store(self, cache: Path, size_bytes: int = 1 << 30) -> RemoteStore:
        """A store in it, with a cache of its own."""
        return RemoteStore(self.objects(), NodeCache(cache, size_bytes))


@contextmanager
def hanging() -> Iterator[str]:
    """A server that takes connections and never answers; gives the query of a URL."""
    with _serving(b"", every_s=0.0) as options:
        yield options


@contextmanager
def trickling() -> Iterator[str]:
    """A server that sends two bytes of an endless answer at a time."""
    with _serving(b"xx", every_s=0.05) as options:
        yield options


@contextmanager
def paging(pages: int) -> Iterator[str]:
    """A server whose every listing comes in pages of one key, as S3's do of a thousand."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            query = parse_qs(urlsplit(self.path).query)
            at = int(query.get("continuation-token", ["0"])[0])
            more = "true" if at + 1 < pages else "false"
            body = (
                '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
                f"<IsTruncated>{more}</IsTruncated><KeyCount>1</KeyCount>"
                f"<NextContinuationToken>{at + 1}</NextContinuationToken>"
                f"<Contents><Key>prefix/many/{at}</Key><Size>1</Size>"
                "<LastModified>2026-01-01T00:00:00Z</LastModified></Contents></ListBucketResult>"
            ).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f"endpoint_override=127.0.0.1:{server.server_port}&scheme=http&region=us-east-1"
        finally:
            server.shutdown()


@contextmanager
def _serving(piece: bytes, every_s: float) -> Iterator[str]:
    ended = threading.Event()

    def serve(peer: socket.socket) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\nContent-Type: text/xml\r\n\r\n"
        with peer, contextlib.suppress(OSError):
            peer.recv(1 << 16)
            if not piece:
                ended.wait()
                return
            peer.sendall(head)
            while not ended.wait(every_s):
                peer.sendall(piece)

    def accept(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                peer, _ = listener.accept()
                threading.Thread(target=serve, args=(peer,), daemon=True).start()

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
        port = listener.getsockname()[1]
        try:
            yield f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
        finally:
            ended.set()
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
