"""The object store of ``faults``: a server that can be silent or slow, and bundles put into it.

The server is `moto`'s, in a process of its own on a network of our choice. Stopped, it is a store
that takes connections and never answers; stopped most of the time, one that trickles. Usage of the
program in here: ``python -m bench.faults_bucket SOURCE URL VERSION`` copies a version of every
servable from a directory.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from bench.errors import ContenderFailed, ToolMissing
from bench.faults_model import SERVABLES
from bench.processes import python
from bench.report import ROOT

__all__ = ["CREDENTIALS", "Bucket"]

#: What any client asks for; the server takes all.
CREDENTIALS: Final = {
    "AWS_ACCESS_KEY_ID": "faults",
    "AWS_SECRET_ACCESS_KEY": "faults",
    "AWS_EC2_METADATA_DISABLED": "true",
}
_NAME: Final = "models"
_COMMAND_S: Final = 60.0
_RETRY_S: Final = 0.2
#: Of a slow server, by turns.
_FROZEN_S: Final = 0.45
_THAWED_S: Final = 0.05


class Bucket:
    """A bucket on a server, for as long as the context lasts.

    Args:
        source: a store in a directory, with all versions.
        network: a process in whose network the server and the copying run.
        address: of the server there.
        port: of the server.
    """

    def __init__(self, source: Path, *, network: int, address: str, port: int) -> None:
        self.url = f"s3://{_NAME}?endpoint_override={address}:{port}&scheme=http&region=us-east-1"
        self._source = source
        self._enter = ["nsenter", "-t", str(network), "--net"]
        self._listen = ["-H", address, "-p", str(port)]
        self._pid = 0

    @contextlib.contextmanager
    def running(self) -> Iterator[Bucket]:
        """The server, with an empty bucket.

        Raises:
            ToolMissing: moto is not installed.
        """
        if find_spec("moto") is None:
            raise ToolMissing("an object store to hurt needs moto: pip install 'shardserve[bench]'")
        server = subprocess.Popen(
            [*self._enter, *python("moto.server", *self._listen)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._pid = server.pid
        try:
            self._copy("")
            yield self
        finally:
            server.kill()
            server.wait()

    def publish(self, version: int) -> None:
        """Let a version of every servable appear in the bucket, its manifest last."""
        self._copy(str(version))

    def freeze(self) -> None:
        """From now on the server takes connections and says nothing."""
        os.kill(self._pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """It answers again."""
        os.kill(self._pid, signal.SIGCONT)

    @contextlib.contextmanager
    def slow(self) -> Iterator[None]:
        """Within it, the server answers for a tenth of the time only."""
        ended = threading.Event()

        def stutter() -> None:
            while not ended.wait(_THAWED_S):
                self.freeze()
                ended.wait(_FROZEN_S)
                self.thaw()

        thread = threading.Thread(target=stutter, name="faults-slow")
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _copy(self, version: str) -> None:
        command = python("bench.faults_bucket", str(self._source), self.url, version)
        done = subprocess.run(
            [*self._enter, *command],
            cwd=ROOT,
            env={**os.environ, **CREDENTIALS},
            capture_output=True,
            text=True,
            timeout=_COMMAND_S,
        )
        if done.returncode:
            raise ContenderFailed(f"cannot fill {self.url}: {done.stderr[-2000:]}")


def _main(source: str, url: str, version: str) -> None:
    """Copy a version; without one, make the bucket once its server answers."""
    # Here: they take a while to load, and the class needs neither.
    import pyarrow.fs

    from shards.checking import blobs_of
    from shards.store import open_store

    if not version:
        _, _, options = url.partition("?")
        settings = dict(option.split("=") for option in options.split("&"))
        system = pyarrow.fs.S3FileSystem(**settings, allow_bucket_creation=True)
        until = time.monotonic() + _COMMAND_S / 2
        while True:
            try:
                system.create_dir(_NAME)
                return
            except OSError:
                if time.monotonic() > until:
                    raise
            time.sleep(_RETRY_S)
    here, there = open_store(source), open_store(url)
    for name in SERVABLES:
        manifest = here.read_manifest(name, int(version))
        for blob in blobs_of(manifest).values():
            there.bring(blob, here)
        there.write_manifest(manifest)


if __name__ == "__main__":
    _main(*sys.argv[1:])
