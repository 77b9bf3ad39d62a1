"""Files with holes: a digest that does not read them, copies that keep them, rows written to them.

The digest of a sparse blob is the blake3 of its size and, in order, of the number and the bytes of
every block of 4 KiB that is not all zeros. So it depends on the bytes alone, not on where a file
happens to have holes, and is found in the time that the data takes: a hole is not even looked at.
Decides this, and nothing about what the bytes mean. Does not know stores.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from shards.files import Hasher, extents

__all__ = ["BLOCK", "copy_data", "digest_of_blocks", "write_rows"]

Array = npt.NDArray[np.generic]
Positions = npt.NDArray[np.int64]

#: Bytes of a block. As small as file systems allocate: 1 KiB rows at random ids are a block each.
BLOCK: Final = 4096

#: Begins what is hashed, so that no plain blob has the digest of a sparse one by design.
_RULES: Final = b"shardserve sparse 1\0"
_BATCH: Final = 4096
_WORDS: Final = BLOCK // 8
_ENTRY: Final = np.dtype([("number", "<i8"), ("words", "<u8", (_WORDS,))])
_COPIED: Final = 4 << 20


def digest_of_blocks(descriptor: int) -> tuple[str, int]:
    """The digest of an open regular file as a sparse blob, and the bytes of its data.

    Returns:
        The hex digest, and how many bytes the blocks have that are not all zeros.
    """
    size = os.fstat(descriptor).st_size
    hasher = Hasher()
    hasher.update(_RULES + struct.pack("<q", size))
    data = 0
    for entries in _batches(descriptor, size):
        found = entries[entries["words"].any(axis=1)]
        if len(found):
            hasher.update(found.view(np.uint8).data)
            data += len(found) * BLOCK
    return hasher.hexdigest(), data


def _batches(descriptor: int, size: int) -> Iterator[npt.NDArray[np.void]]:
    """Blocks that are not in holes, some at a time; the same memory is used for all."""
    entries = np.zeros(_BATCH, _ENTRY)
    # Read into memory of their own: those of the entries are not one after the other.
    blocks = np.zeros(_BATCH * BLOCK, np.uint8)
    held = 0
    for first, stop in _block_runs(descriptor, size):
        while first < stop:
            count = min(stop - first, _BATCH - held)
            place = blocks[held * BLOCK : (held + count) * BLOCK]
            _read_whole(descriptor, place.data, first * BLOCK)
            entries["number"][held : held + count] = np.arange(first, first + count)
            held += count
            first += count
            if held == _BATCH:
                entries["words"] = blocks.view("<u8").reshape(_BATCH, _WORDS)
                yield entries
                held = 0
    entries["words"][:held] = blocks[: held * BLOCK].view("<u8").reshape(held, _WORDS)
    yield entries[:held]


def _block_runs(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """First and past-the-last number of blocks that have data, ascending and apart."""
    done = 0
    for start, stop, is_hole in extents(descriptor, size):
        if is_hole:
            continue
        # A file system may have holes that are smaller than a block.
        first, last = max(start // BLOCK, done), -(-stop // BLOCK)
        if first < last:
            yield first, last
            done = last


def _read_whole(descriptor: int, place: memoryview, offset: int) -> None:
    """Fill a place; what is behind the end of the file is zeros."""
    while place:
        count = os.preadv(descriptor, [place], offset)
        if count == 0:
            place[:] = bytes(len(place))
            return
        place = place[count:]
        offset += count


def copy_data(source: int, target: int, wrote: Callable[[int], None]) -> None:
    """Copy an open file into an empty one, with its holes.

    Args:
        source: open for reading.
        target: open for writing.
        wrote: told how much of the source is done, holes included; it may raise.
    """
    size = os.fstat(source).st_size
    os.truncate(target, size)
    place = memoryview(bytearray(_COPIED))
    told = 0
    for start, stop, is_hole in extents(source, size):
        for at in range(start, start if is_hole else stop, _COPIED):
            count = min(stop - at, _COPIED)
            _read_whole(source, place[:count], at)
            _write_new(target, place[:count], at)
        if stop - told >= _COPIED:
            wrote(stop)
            told = stop
    wrote(size)


def write_rows(descriptor: int, positions: Positions, rows: Array) -> None:
    """Write rows into a file of rows.

    Args:
        descriptor: open for writing, large enough.
        positions: ``[n]``, strictly ascending: which rows of the file.
        rows: ``[n, dim]``.
    """
    if not len(positions):
        return
    plain = np.ascontiguousarray(rows)
    row_bytes = plain.shape[1] * plain.itemsize
    data = plain.reshape(-1).view(np.uint8).data
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    starts = np.concatenate([[0], breaks]).tolist()
    stops = np.concatenate([breaks, [len(positions)]]).tolist()
    offsets = (positions[starts] * row_bytes).tolist()
    for start, stop, offset in zip(starts, stops, offsets, strict=True):
        _write_new(descriptor, data[start * row_bytes : stop * row_bytes], offset)


def _write_new(descriptor: int, data: memoryview, offset: int) -> None:
    """Write bytes, most likely into a hole."""
    # Asked for now and exactly: left to the flush, ext4 looks for megabytes around each block of a
    # large file. Measured for 50,000 blocks in 16 files: 0.6 s to flush instead of 14.
    os.posix_fallocate(descriptor, offset, len(data))
    while data:
        count = os.pwrite(descriptor, data, offset)
        data = data[count:]
        offset += count
