"""Ranges read in parallel: bounded, verified, and harmless when they come too late."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from batching.errors import Cancelled, Unavailable
from shards.calls import Call, Calls
from shards.errors import BundleCorrupt, BundleIncomplete
from shards.files import Bytes, digest_of
from shards.ingest import STREAMS, Gate, fetch
from shards.manifest import BlobRef
from shards.objects import CHUNK
from shards.progress import Progress


class Memory:
    """A source that counts how many ranges are read at once, and may hold some up."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)
        self.begun: list[int] = []
        self.most = 0
        self.held: dict[int, threading.Event] = {}
        self._now = 0
        self._lock = threading.Lock()
        self._calls = Calls(64)

    def start(
        self, offset: int, size: int, then: Callable[[Bytes], memoryview]
    ) -> Call[memoryview]:
        self.begun.append(offset)

        def read() -> memoryview:
            with self._lock:
                self._now += 1
                self.most = max(self.most, self._now)
            if offset in self.held:
                self.held[offset].wait(30)
            with self._lock:
                self._now -= 1
            return then(self.data[offset : offset + size])

        return self._calls.start("reading", read, 30.0)


@pytest.fixture(scope="module")
def data() -> bytes:
    """Three ranges and a bit; the second is nothing but zeros."""
    piece = os.urandom(1 << 16) * (CHUNK >> 16)
    return piece + bytes(CHUNK) + piece[::-1] + b"end"


def bring(
    source: Memory, path: Path, ref: BlobRef, *, timeout_s: float = 30.0, **more: object
) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fetch(source, ref, descriptor, gate=Gate(8), timeout_s=timeout_s, **more)  # type: ignore[arg-type]
    finally:
        os.close(descriptor)


def ref_of(data: bytes) -> BlobRef:
    return BlobRef(digest=digest_of(data), size=len(data))


def test_a_file_is_what_was_read_and_zeros_take_no_disk(tmp_path: Path, data: bytes) -> None:
    progress = Progress(len(data))
    bring(Memory(data), tmp_path / "f", ref_of(data), progress=progress)
    assert (tmp_path / "f").read_bytes() == data
    assert (tmp_path / "f").stat().st_blocks * 512 < len(data) - CHUNK // 2
    assert progress.done == len(data)


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1])
def test_sizes_around_a_range_come_whole(tmp_path: Path, data: bytes, size: int) -> None:
    bring(Memory(data[:size]), tmp_path / "f", ref_of(data[:size]))
    assert (tmp_path / "f").read_bytes() == data[:size]


def test_reads_are_parallel_and_bounded(data: bytes) -> None:
    source = Memory(bytes(CHUNK * 20))
    first = source.held[0] = threading.Event()
    fetching = threading.Thread(
        target=fetch,
        args=(source, ref_of(source.data), None),
        kwargs={"gate": Gate(64), "timeout_s": 30.0},
    )
    fetching.start()
    try:
        while len(source.begun) < STREAMS:
            assert fetching.is_alive()
            threading.Event().wait(0.001)
        assert source.begun == [CHUNK * i for i in range(STREAMS)]  # and not one more
    finally:
        first.set()
        fetching.join(30)
    assert source.most <= STREAMS


def test_blobs_that_share_a_gate_all_come() -> None:
    gate, data = Gate(2), bytes(CHUNK * 6)
    ref = ref_of(data)
    threads = [
        threading.Thread(
            target=fetch, args=(Memory(data), ref, None), kwargs={"gate": gate, "timeout_s": 30.0}
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda data: data[:-1], BundleIncomplete),
        (lambda data: data + b"x", BundleCorrupt),
        (lambda data: data[:-1] + b"x", BundleCorrupt),
        (lambda data: b"x" + data[1:], BundleCorrupt),
    ],
)
def test_other_bytes_are_refused(
    tmp_path: Path, data: bytes, change: Callable[[bytes], bytes], error: type[Exception]
) -> None:
    with pytest.raises(error):
        bring(Memory(change(data)), tmp_path / "f", ref_of(data))


def test_a_range_that_hangs_ends_the_fetch_and_writes_nothing_later(
    tmp_path: Path, data: bytes
) -> None:
    """Its file's number may by then be that of another file."""
    source = Memory(data)
    late = source.held[2 * CHUNK] = threading.Event()
    gate = Gate(8)
    descriptor = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT, 0o600)
    with pytest.raises(Unavailable):
        fetch(source, ref_of(data), descriptor, gate=gate, timeout_s=0.05)
    os.close(descriptor)
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT, 0o600)
    numbers = {os.dup(other) for _ in range(8)}
    late.set()
    while source._now:
        threading.Event().wait(0.001)
    assert (tmp_path / "other").read_bytes() == b""
    for number in (*numbers, other):
        os.close(number)
    for _ in range(8):  # and every place of the gate is free again
        assert gate.enter(wait=False)


def test_a_load_that_is_called_off_stops(tmp_path: Path, data: bytes) -> None:
    progress = Progress(len(data))
    progress.cancel("unloaded while it was loading")
    with pytest.raises(Cancelled, match="unloaded"):
        bring(Memory(data), tmp_path / "f", ref_of(data), progress=progress)
