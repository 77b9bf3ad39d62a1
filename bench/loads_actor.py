"""The process of ``bench load``: the books of a shard or a device, without Ray, and the floors.

Jobs come as lines over a socket, and so do answers. A load is what an order of the controller
starts, from its arrival until every unit is open. Every job is done by books of its own, which have
seen nothing: what is remembered between loads is what the store remembers on the disk. The floors
run here as well, so that both have the same process, processors and page cache.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Literal

import blake3
import msgspec
import numpy as np

from bench.loads_start import start
from shards.cache import NodeCache
from shards.checking import blobs_of
from shards.hosting import Hosting
from shards.layout import Buffer
from shards.local import LocalStore
from shards.loop import LoopThread
from shards.manifest import BlobRef, TableUnit
from shards.openers import TableOpener
from shards.orders import ActorSpec, HostedUnit, LoadOrder
from shards.worker import WorkerEngine

__all__ = ["READY", "Do", "Done", "Job"]

READY: Final = "loads ready"
_CAPACITY_BYTES: Final = 64 << 30
_PIECE: Final = 8 << 20
_PAGE: Final = 4096
#: As many as an actor brings at the same time (`shards.arrivals`).
_BLOBS: Final = 4
_SAMPLE_S: Final = 0.005

Do = Literal["read", "digest", "load", "delta", "copy", "bring", "start"]


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What to do.

    Attributes:
        do: ``read`` and ``copy`` are floors over a version's blobs, one piece after the other, into
            memory and into files; ``digest`` is the digest of as many resident bytes; ``load``
            opens versions; ``delta`` opens version 1, and is timed while it opens version 2;
            ``bring`` copies blobs from a bucket that is a directory into a node's cache; ``start``
            has a controller's core start many servables (`bench.loads_start`), and unloads them.
        servables: whose version 1 it is about.
        verified: whether the store may remember which blobs were verified.
        together: whether ``start`` may load all at once, and not one after the other.
        touched: whether every page is touched after the load, within its time.
        sampled: whether the process's memory is watched; it takes time itself.
        bytes_max: of ``copy`` and ``bring``: blobs are taken until they have so many bytes.
    """

    do: Do
    servables: tuple[str, ...]
    verified: bool = True
    together: bool = False
    touched: bool = False
    sampled: bool = False
    bytes_max: int = 1 << 62


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """How it went.

    Attributes:
        seconds: of the job.
        nbytes: that were read, hashed, opened or brought.
        pss_bytes: by how much this process's share of memory grew until the end of the job.
        peak_bytes: and at its highest, where the job was ``sampled``.
        anonymous_bytes: the part of the growth that no file is behind.
    """

    seconds: float
    nbytes: int
    pss_bytes: int = 0
    peak_bytes: int = 0
    anonymous_bytes: int = 0


class _Actor:
    """Books that have seen nothing, of a shard or a device.

    Args:
        io: the loop they live on.
        device: what opens map units, or None on a shard.
    """

    def __init__(self, io: LoopThread, device: Any | None) -> None:
        self._io = io
        self._engine = None if device is not None else io.call(WorkerEngine, io.loop, 1)
        self.opener = device if device is not None else TableOpener(self._engine)  # type: ignore[arg-type]
        self.books = io.call(Hosting, self.opener, "loads", _CAPACITY_BYTES)

    async def load(self, store: Path, servable: str, version: int = 1) -> None:
        manifest = LocalStore(store).read_manifest(servable, version)
        units = tuple(
            HostedUnit(
                name=name,
                partitions=tuple(range(len(unit.partitions)))
                if isinstance(unit, TableUnit)
                else (),
            )
            for name, unit in manifest.units.items()
        )
        await self.books.load(
            LoadOrder(term=1, store=str(store), servable=servable, version=version, units=units)
        )

    async def unload(self, servable: str, version: int = 1) -> None:
        await self.books.unload(1, servable, version)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()


class _Jobs:
    """Does jobs, one after the other.

    Args:
        store: has the bundles.
        scratch: where ``copy`` and ``bring`` write; emptied after each.
        kind: of the actor.
    """

    def __init__(self, store: Path, scratch: Path, kind: str) -> None:
        self._store = store
        self._scratch = scratch
        self._io = LoopThread("loads-io")
        self._device: Any | None = None
        if kind == "device":
            from shards.device_host import make_device_host

            spec = ActorSpec(kind="device", name="loads", directory="", capacity_bytes=1 << 36)
            self._device = self._io.call(make_device_host, spec, self._io, 1).opener

    def do(self, job: Job) -> Done:
        """One job."""
        refs = [ref for name in job.servables for ref in self._refs(name, 1)]
        match job.do:
            case "read":
                return _timed(lambda: sum(_read(self._path(ref)) for ref in refs))
            case "digest":
                return _digest(refs)
            case "copy" | "bring":
                return self._brought(job, _first(refs, job.bytes_max))
            case "load" | "delta" | "start":
                return self._loaded(job)

    def _refs(self, servable: str, version: int) -> list[BlobRef]:
        return list(blobs_of(LocalStore(self._store).read_manifest(servable, version)).values())

    def _path(self, ref: BlobRef) -> Path:
        return self._store / "blobs" / "blake3" / ref.digest

    def _brought(self, job: Job, refs: Sequence[BlobRef]) -> Done:
        self._scratch.mkdir()
        try:
            if job.do == "copy":
                return _timed(lambda: sum(self._copy(ref) for ref in refs))
            bucket = _bucket(self._store, self._scratch)
            with ThreadPoolExecutor(_BLOBS) as pool:
                return _timed(lambda: sum(each.nbytes for each in pool.map(bucket.map, refs)))
        finally:
            shutil.rmtree(self._scratch)

    def _copy(self, ref: BlobRef) -> int:
        with open(self._scratch / ref.digest, "wb", buffering=0) as out:
            return _read(self._path(ref), out.write)

    def _loaded(self, job: Job) -> Done:
        version = 2 if job.do == "delta" else 1
        refs = {ref.digest: ref for name in job.servables for ref in self._refs(name, version)}
        actor = _Actor(self._io, self._device)
        if version == 2:
            [servable] = job.servables
            self._io.run(actor.load(self._store, servable))
            for ref in self._refs(servable, 1):
                _touch(actor.opener.mapped(ref.digest))
                del refs[ref.digest]
        if not job.verified:
            shutil.rmtree(self._store / ".verified", ignore_errors=True)

        async def orders() -> None:
            if job.do == "start":
                parallel = len(job.servables) if job.together else 1
                await start(actor.books, self._store, job.servables, parallel)
            else:
                for servable in job.servables:
                    await actor.load(self._store, servable, version)

        def work() -> int:
            self._io.run(orders())
            if job.touched:
                for digest in refs:
                    _touch(actor.opener.mapped(digest))
            return sum(ref.size for ref in refs.values())

        try:
            return _timed(work, sampled=job.sampled)
        finally:
            for each in {version, 1}:
                for servable in job.servables:
                    self._io.run(actor.unload(servable, each))
            actor.close()


def _bucket(store: Path, scratch: Path) -> Any:
    """The store as if it were a bucket without a network, over an empty cache."""
    import pyarrow.fs as pafs

    from shards.objects import Objects
    from shards.remote import RemoteStore

    objects = Objects("bucket", pafs.LocalFileSystem, str(store))
    return RemoteStore(objects, NodeCache(scratch / "cache", 1 << 40))


def _first(refs: Sequence[BlobRef], bytes_max: int) -> list[BlobRef]:
    taken: list[BlobRef] = []
    for ref in refs:
        if sum(each.size for each in taken) + ref.size > bytes_max:
            break
        taken.append(ref)
    return taken or list(refs[:1])


def _read(path: Path, then: Any = len) -> int:
    """Read a file piece by piece into one buffer, as `cat` would."""
    memory = memoryview(bytearray(_PIECE))
    at = 0
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(memory):
            then(memory[:count])
            at += count
    return at


def _digest(refs: Sequence[BlobRef]) -> Done:
    """The digest alone, on all processors, of resident bytes."""
    data = np.random.default_rng(0).bytes(max(ref.size for ref in refs))
    view = memoryview(data)

    def work() -> int:
        for ref in refs:
            blake3.blake3(view[: ref.size], max_threads=blake3.blake3.AUTO).digest()
        return sum(ref.size for ref in refs)

    return _timed(work)


def _touch(memory: Buffer | None) -> None:
    """Read from every page of a blob."""
    assert memory is not None, "it is not mapped"
    int(memory[::_PAGE].max())


def _timed(work: Any, *, sampled: bool = False) -> Done:
    before, anonymous = _memory()
    with _sampler() if sampled else contextlib.nullcontext([0]) as peak:
        began = time.perf_counter()
        nbytes = work()
        seconds = time.perf_counter() - began
    after, anonymous_after = _memory()
    return Done(
        seconds=seconds,
        nbytes=nbytes,
        pss_bytes=after - before,
        peak_bytes=max(peak[0], after) - before,
        anonymous_bytes=anonymous_after - anonymous,
    )


@contextlib.contextmanager
def _sampler() -> Iterator[list[int]]:
    """Watches this process's memory; the highest that was seen, in a list of one."""
    peak = [0]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_SAMPLE_S):
            peak[0] = max(peak[0], _memory()[0])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def _memory() -> tuple[int, int]:
    """This process's proportional share of memory, and the part without files, in bytes."""
    found = {"Pss": 0, "Pss_Anon": 0}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in found:
            found[name] = int(rest.split()[0]) << 10
    return found["Pss"], found["Pss_Anon"]


def main(argv: Sequence[str] | None = None) -> None:
    """Say that it is ready, then do a job for every line until there are no more.

    Args:
        argv: the arguments without the program's name; `sys.argv` when None.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--socket", required=True, type=int, help="descriptor that jobs come by")
    parser.add_argument("--store", required=True, type=Path)
    parser.add_argument("--scratch", required=True, type=Path)
    parser.add_argument("--kind", required=True, choices=("shard", "device"))
    asked = parser.parse_args(argv)
    jobs = _Jobs(asked.store, asked.scratch, asked.kind)
    with socket.socket(fileno=asked.socket) as link, link.makefile("rwb") as lines:
        print(READY, flush=True)
        for line in lines:
            lines.write(msgspec.json.encode(jobs.do(msgspec.json.decode(line, type=Job))) + b"\n")
            lines.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
