"""Bytes named for another process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from shards.compiling.messages import FileSpan
from shards.compiling.spans import spans_of
from shards.store import LocalStore

READ = """
import sys
with open(sys.argv[1], "rb") as file:
    file.seek(int(sys.argv[2]))
    sys.stdout.buffer.write(file.read(int(sys.argv[3])))
"""


def read_elsewhere(span: FileSpan, size: int) -> bytes:
    """What another process finds there."""
    command = [sys.executable, "-c", READ, span.path, str(span.offset), str(size)]
    return subprocess.run(command, capture_output=True, check=True, timeout=30).stdout


def test_a_mapped_blob_is_named_by_its_file(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    data = np.random.default_rng(0).bytes(100_000)
    buffer = store.map(store.put(data))
    with spans_of({"blob": buffer, "part": buffer[5000:]}) as spans:
        assert spans["blob"].path.startswith(str(tmp_path))
        assert read_elsewhere(spans["blob"], len(data)) == data
        assert read_elsewhere(spans["part"], len(data) - 5000) == data[5000:]


def test_bytes_in_no_file_are_given_a_name_for_a_while() -> None:
    data = np.arange(256, dtype=np.uint8)
    with spans_of({"memory": data, "empty": data[:0]}) as spans:
        assert spans.keys() == {"memory"}
        assert read_elsewhere(spans["memory"], 256) == data.tobytes()
    assert not Path(spans["memory"].path).exists()


def test_a_file_that_was_deleted_meanwhile_is_copied_from_where_it_is_mapped(
    tmp_path: Path,
) -> None:
    store = LocalStore(tmp_path)
    ref = store.put(b"kept in memory")
    buffer = store.map(ref)
    (tmp_path / "blobs" / "blake3" / ref.digest).unlink()
    with spans_of({"blob": buffer}) as spans:
        assert read_elsewhere(spans["blob"], ref.size) == b"kept in memory"
