"""The NVMe tier: a table's rows stay on disk, and those asked for lately in a bounded cache.

One of these stands for one base, whichever versions use it: deltas share it with what they change.
All that it has, cache, indices and buffers to read into, is no more than its share of the budget,
as far as this is enough for one buffer. Rows are bytes here. Decides what a look-up reads, and
counts. Does not know ids, dtypes, overlays or units.
"""

from __future__ import annotations

import threading
import time
from typing import Final

import numpy as np
import numpy.typing as npt

from shards.cold_file import ColdFile, buffer_bytes
from shards.crew import Crew
from shards.manifest import Partition
from shards.orders import CacheFigures
from shards.row_cache import RowCache
from shards.store import Store

__all__ = ["ColdRows", "base_bytes", "open_cold"]

RawRows = npt.NDArray[np.uint8]
Positions = npt.NDArray[np.int64]

#: Rows that are looked up at once: what this takes beside the answer is bounded by them.
_STEP: Final = 4096


def base_bytes(part: Partition, cached: float | None) -> int:
    """Bytes of memory that the base of a partition takes.

    Args:
        part: the partition.
        cached: bytes of memory for each byte of rows on disk; None where they are in memory.
    """
    if cached is None or not part.rows:
        return part.blob.stored
    share = _share(part, cached)
    return max(share, buffer_bytes(_row_bytes(part), share))


def _share(part: Partition, cached: float) -> int:
    return int(part.blob.stored * cached)


def _row_bytes(part: Partition) -> int:
    return part.blob.size // part.rows


class ColdRows:
    """Stored rows of a base. Safe to use from several threads.

    Args:
        file: has the rows.
        cache: keeps some.
        rows: how many there are.
        budget: bytes of memory that all this may take.
    """

    def __init__(self, file: ColdFile, cache: RowCache, rows: int, budget: int) -> None:
        self._file = file
        self._cache = cache
        self._rows = rows
        self._budget = budget
        # One look-up at a time: each changes the cache, and the buffers are those of one.
        self._lock = threading.Lock()
        self._hits = self._misses = 0
        self._wait_s = 0.0

    def __len__(self) -> int:
        return self._rows

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is in memory, once the cache is full."""
        return self._cache.nbytes + self._file.nbytes

    @property
    def figures(self) -> CacheFigures:
        """What was asked for so far."""
        return CacheFigures(
            budget=self._budget,
            nbytes=self.nbytes,
            used=self._cache.used,
            hits=self._hits,
            misses=self._misses,
            reads=self._file.calls,
            read_bytes=self._file.read_bytes,
            wait_s=self._wait_s,
            direct=self._file.is_direct,
        )

    def take(self, positions: Positions) -> RawRows:
        """Rows ``[n, row_bytes]`` of positions ``[n]``, in their order; each inside the base.

        Raises:
            ServingError: the file cannot be read.
        """
        out = np.empty((len(positions), self._file.row_bytes), np.uint8)
        for start in range(0, len(positions), _STEP):
            with self._lock:
                self._take(positions[start : start + _STEP], out[start : start + _STEP])
        return out

    def _take(self, positions: Positions, out: RawRows) -> None:
        slots = self._cache.find(positions)
        here = np.flatnonzero(slots >= 0)
        out[here] = self._cache.read(slots[here])
        self._hits += len(here)
        if len(here) == len(positions):
            return
        away = np.flatnonzero(slots < 0)
        missing, which = np.unique(positions[away], return_inverse=True)
        began = time.perf_counter()
        rows = self._file.read(missing)
        self._wait_s += time.perf_counter() - began
        self._cache.put(missing, rows)
        out[away] = rows[which]
        self._misses += len(away)


def open_cold(store: Store, part: Partition, cached: float, crew: Crew) -> ColdRows:
    """The rows of a base, verified, none of them in memory.

    Args:
        store: has the blob.
        part: the partition, which has rows.
        cached: bytes of memory for each byte of rows.
        crew: threads to read with.

    Raises:
        ServingError: the blob is missing or corrupt, or the store does not answer.
    """
    share, size = _share(part, cached), _row_bytes(part)
    file = ColdFile(store.open(part.blob), size, share, crew, part.blob.digest)
    return ColdRows(file, RowCache(share - file.nbytes, size), part.rows, share)
