"""How a table's mapped pages come to memory and stay there.

`mapped` reads a page from the disk when a row of it is first asked for, and that page alone;
`populated` reads everything before the version is available, and lets the kernel take pages back
where memory is short; `locked` reads everything and keeps it. Decides how each is asked of the
kernel. Does not know units, actors or budgets.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from typing import Final

from batching.errors import FailedPrecondition, ResourceExhausted
from shards.leaves import Array, map_pages
from shards.manifest import BlobRef
from shards.orders import Residency

__all__ = ["settle"]

#: Locked at once: whoever maps or unmaps anything else in the process waits meanwhile.
_PIECE: Final = 8 << 20
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


def settle(rows: Array, ref: BlobRef, residency: Residency) -> None:
    """Have a table's rows in memory as is wanted. May take as long as reading them does.

    Args:
        rows: the whole mapped blob.
        ref: of the blob.
        residency: what is wanted; what another version has locked stays locked.

    Raises:
        FailedPrecondition: a sparse table is not to be mapped: its holes would be memory.
        ResourceExhausted: the process may not lock so much.
    """
    if residency == "mapped":
        _advise(rows, mmap.MADV_RANDOM)
        return
    if ref.data is not None:
        raise FailedPrecondition(
            f"blob {ref.digest} is sparse, {ref.data} bytes in {ref.size}: resident: {residency} "
            "would fill its holes; declare resident: mapped"
        )
    # Read in one go, as large pieces as the disk gives, although a version before read at random;
    # and into huge pages, where kernel and file system have those of files: random rows are found
    # in 0.6 of the time (measured). What is in memory already stays in the pages that it has.
    _advise(rows, mmap.MADV_NORMAL)
    _advise(rows, mmap.MADV_HUGEPAGE)
    map_pages(rows)
    if residency == "locked":
        _lock(rows, ref)


def _advise(rows: Array, advice: int) -> None:
    # Measured with the kernel's usual read-ahead: 2,000 random rows of a large file brought 5.5 GB
    # of it into memory.
    if rows.nbytes:
        first, length = _pages(rows)
        _LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), advice)


def _lock(rows: Array, ref: BlobRef) -> None:
    first, length = _pages(rows)
    for start in range(0, length, _PIECE):
        size = min(_PIECE, length - start)
        if _LIBC.mlock(ctypes.c_void_p(first + start), ctypes.c_size_t(size)) == 0:
            continue
        code = ctypes.get_errno()
        _LIBC.munlock(ctypes.c_void_p(first), ctypes.c_size_t(length))
        reason = os.strerror(code)
        if code in (errno.ENOMEM, errno.EPERM, errno.EAGAIN):
            reason += "; raise the limit of locked memory (ulimit -l) of Ray's processes"
        raise ResourceExhausted(f"{length} bytes of blob {ref.digest} cannot be locked: {reason}")


def _pages(rows: Array) -> tuple[int, int]:
    """The address of the first page, and the bytes from there to the end."""
    first = rows.ctypes.data & -mmap.PAGESIZE
    return first, rows.ctypes.data + rows.nbytes - first
