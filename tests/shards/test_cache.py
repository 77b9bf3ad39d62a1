"""The node's cache: one ingest a blob, a budget that holds, nothing left behind."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np
import pytest

from batching.errors import Cancelled, Unavailable
from shards.cache import NodeCache
from shards.errors import BundleCorrupt, CacheFull
from shards.files import digest_of
from shards.manifest import BlobRef
from shards.progress import Progress
from tests.test_tidy import ROOT

MIB: Final = 1 << 20


def blob(seed: int, size: int = MIB) -> tuple[BlobRef, bytes]:
    data = np.random.default_rng(seed).bytes(size)
    return BlobRef(digest=digest_of(data), size=size), data


class Fetch:
    """Writes a blob's bytes, and counts how often."""

    def __init__(self, data: bytes, before: Callable[[], None] = lambda: None) -> None:
        self.data = data
        self.before = before
        self.times = 0

    def __call__(self, descriptor: int) -> None:
        self.times += 1
        self.before()
        os.pwrite(descriptor, self.data, 0)


def names(cache: NodeCache, folder: str = "blobs") -> set[str]:
    path = cache.directory / folder
    return set(os.listdir(path)) if path.exists() else set()


def test_a_blob_is_brought_once_and_mapped_read_only(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path)
    ref, data = blob(1)
    fetch = Fetch(data)
    mapped = cache.map(ref, fetch)
    assert mapped.tobytes() == data
    assert not mapped.flags.writeable
    assert mapped.ctypes.data % 64 == 0
    assert NodeCache(tmp_path).map(ref, fetch).tobytes() == data
    assert fetch.times == 1
    assert cache.usage() == (MIB, 0)
    assert names(cache, "partial") == set()


def test_many_who_want_one_blob_bring_it_once(tmp_path: Path) -> None:
    ref, data = blob(1)
    everyone = threading.Barrier(8)
    fetch = Fetch(data, lambda: time.sleep(0.05))  # long enough for the others to come

    def want(_: int) -> bytes:
        everyone.wait(30)
        return NodeCache(tmp_path).map(ref, fetch).tobytes()

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(want, range(8))) == {data}
    assert fetch.times == 1


def test_the_least_recently_used_goes_and_what_is_held_stays(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 3 * MIB)
    refs = [blob(seed) for seed in range(4)]
    held = cache.map(refs[0][0], Fetch(refs[0][1]))
    for ref, data in refs[1:3]:
        cache.map(ref, Fetch(data))
    used_again = refs[1][0]
    cache.map(used_again, Fetch(b""))
    cache.map(refs[3][0], Fetch(refs[3][1]))
    assert names(cache) == {refs[i][0].digest for i in (0, 1, 3)}
    assert held.tobytes() == refs[0][1]


def test_what_does_not_fit_says_what_is_short_and_takes_nothing(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 3 * MIB)
    (kept, kept_data), (loose, loose_data) = blob(1, 2 * MIB), blob(2)
    held = cache.map(kept, Fetch(kept_data))
    cache.map(loose, Fetch(loose_data))
    large, large_data = blob(3, 2 * MIB)
    with pytest.raises(CacheFull, match=rf"{MIB} bytes short; {2 * MIB} are in use"):
        cache.map(large, Fetch(large_data))
    assert names(cache) == {kept.digest, loose.digest}
    # Letting go is all it takes; views count as holding.
    view = held[10:20]
    del held
    with pytest.raises(CacheFull):
        cache.map(large, Fetch(large_data))
    del view
    gc.collect()
    assert cache.map(large, Fetch(large_data)).tobytes() == large_data


@pytest.mark.parametrize("error", [Unavailable("away"), BundleCorrupt("broken")])
def test_a_failed_ingest_leaves_nothing_and_the_next_succeeds(
    tmp_path: Path, error: Exception
) -> None:
    cache = NodeCache(tmp_path)
    ref, data = blob(1)

    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        cache.map(ref, Fetch(data, fail))
    assert names(cache) == names(cache, "partial") == set()
    assert cache.usage() == (0, 0)
    assert cache.map(ref, Fetch(data)).tobytes() == data


def test_a_full_disk_is_a_clear_error_that_harms_nobody(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path)
    (other, other_data), (ref, data) = blob(1), blob(2)
    held = cache.map(other, Fetch(other_data))

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CacheFull, match=rf"disk of the cache {tmp_path} is full.*{MIB} bytes"):
        cache.map(ref, Fetch(data, full))
    assert names(cache, "partial") == set()
    assert names(cache) == {other.digest}
    assert held.tobytes() == other_data


FULL_DISK: Final = """
import os, sys, time
from shards.cache import NodeCache
from shards.errors import CacheFull
from shards.files import copy_sparsely, digest_of
from shards.manifest import BlobRef
cache = NodeCache(sys.argv[1] + "/cache")
def blob(byte, size):
    data = byte * size
    def fetch(file):
        copy_sparsely(data, file, lambda done: None)
    return BlobRef(digest=digest_of(data), size=size), fetch
kept, loose = blob(b"k", 1 << 20), blob(b"l", 1 << 20)
large, huge = blob(b"m", 2 << 20), blob(b"h", 8 << 20)
held = cache.map(*kept)
cache.map(*loose)
assert cache.map(*large)[-1] == ord("m")  # the loose one went
try:
    cache.map(*huge)
except CacheFull as error:
    print(error)
assert held.tobytes() == b"k" * (1 << 20)
print(sorted(os.listdir(cache.directory / "partial")), len(os.listdir(cache.directory / "blobs")))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_disk_that_is_really_full_is_emptied_of_what_is_loose_and_then_refuses(
    tmp_path: Path,
) -> None:
    disk = f"mount -t tmpfs -o size=3600k none {tmp_path}"
    mount = f'{disk} && exec {sys.executable} -c "$0" {tmp_path}'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mount, FULL_DISK],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no mounts here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    refusal, left = done.stdout.splitlines()
    assert "is full" in refusal
    assert f"needs {8 << 20} bytes" in refusal
    assert left in ("[] 1", "[] 2")


def test_a_disk_smaller_than_the_budget_is_emptied_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = NodeCache(tmp_path)
    (loose, loose_data), (ref, data) = blob(1), blob(2)
    cache.map(loose, Fetch(loose_data))
    monkeypatch.setattr("shards.cache._free", lambda _: 0)

    def full_while_the_other_is_there() -> None:
        if loose.digest in names(cache):
            raise OSError(errno.ENOSPC, "No space left on device")

    fetch = Fetch(data, full_while_the_other_is_there)
    assert cache.map(ref, fetch).tobytes() == data
    assert names(cache) == {ref.digest}


def test_a_damaged_blob_is_brought_anew(tmp_path: Path) -> None:
    ref, data = blob(1)
    cache = NodeCache(tmp_path)
    cache.map(ref, Fetch(data))
    path = tmp_path / "blobs" / ref.digest
    path.chmod(0o600)
    path.write_bytes(b"x" + data[1:])
    fetch = Fetch(data)
    assert NodeCache(tmp_path).map(ref, fetch).tobytes() == data
    assert fetch.times == 1


def test_after_a_boot_blobs_are_verified_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were not synced to the disk: a crash of the machine may have cut them off."""
    ref, data = blob(1)
    NodeCache(tmp_path).map(ref, Fetch(data))
    hashed: list[int] = []

    def digest(file: int) -> str:
        hashed.append(file)
        return ref.digest

    monkeypatch.setattr("shards.cache.digest_of_file", digest)
    monkeypatch.setattr("shards.cache._boot", lambda: "another-boot")
    for _ in range(2):
        assert NodeCache(tmp_path).map(ref, Fetch(b"")).tobytes() == data
    assert len(hashed) == 1


def test_who_waits_for_anothers_ingest_may_be_called_off(tmp_path: Path) -> None:
    ref, data = blob(1)
    begun, release = threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        release.wait(30)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(NodeCache(tmp_path).map, ref, Fetch(data, hang))
        begun.wait(30)
        progress = Progress(ref.size)
        progress.cancel("enough")
        with pytest.raises(Cancelled):
            NodeCache(tmp_path).map(ref, Fetch(data), progress)
        release.set()
        assert first.result(30).tobytes() == data


INGESTING: Final = """
import os, sys, time
from shards.cache import NodeCache
from shards.manifest import BlobRef
def hang(descriptor):
    os.pwrite(descriptor, b"half", 0)
    print("begun", flush=True)
    time.sleep(600)
NodeCache(sys.argv[1]).map(BlobRef(digest=sys.argv[2], size=int(sys.argv[3])), hang)
"""
HOLDING: Final = """
import os, sys, time
from shards.cache import NodeCache
from shards.manifest import BlobRef
def missing(descriptor): raise AssertionError("it is there")
held = NodeCache(sys.argv[1]).map(BlobRef(digest=sys.argv[2], size=int(sys.argv[3])), missing)
print("begun", flush=True)
time.sleep(600)
"""


def process(script: str, cache: Path, ref: BlobRef) -> subprocess.Popen[str]:
    started = subprocess.Popen(
        [sys.executable, "-c", script, str(cache), ref.digest, str(ref.size)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert started.stdout is not None
    assert started.stdout.readline() == "begun\n"
    return started


def killed(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_when_the_process_that_brings_a_blob_is_killed_a_waiting_one_takes_over(
    tmp_path: Path,
) -> None:
    ref, data = blob(1)
    other = process(INGESTING, tmp_path, ref)
    try:
        assert NodeCache(tmp_path).usage() == (0, MIB)
        fetch = Fetch(data)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(NodeCache(tmp_path).map, ref, fetch)
            until = time.monotonic() + 0.2
            while time.monotonic() < until:
                assert not waiting.done()
            assert fetch.times == 0
            killed(other)
            assert waiting.result(30).tobytes() == data
    finally:
        killed(other)
    assert fetch.times == 1
    assert names(NodeCache(tmp_path), "partial") == set()


def test_what_a_killed_process_held_may_go_and_what_it_left_is_swept(tmp_path: Path) -> None:
    (ref, data), (large, large_data) = blob(1), blob(2, 2 * MIB)
    NodeCache(tmp_path).map(ref, Fetch(data))
    cache = NodeCache(tmp_path, 2 * MIB)
    other = process(HOLDING, tmp_path, ref)
    try:
        with pytest.raises(CacheFull):
            cache.map(large, Fetch(large_data))
    finally:
        killed(other)
    (tmp_path / "partial" / "0123").write_bytes(b"left over")
    assert cache.map(large, Fetch(large_data)).tobytes() == large_data
    assert names(cache) == {large.digest}
    assert names(cache, "partial") == set()
