"""Where the bytes of an array lie, said so that another process can map them.

Parameters may be large, so the compile process gets none: it maps the files that the actor has
mapped. Which files these are is asked of the kernel, since a store may map its blobs from where it
likes. Bytes that lie in no file are copied to memory that has a name.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping

import numpy as np

from shards.compiling.messages import FileSpan
from shards.store import Buffer

__all__ = ["spans_of"]


@contextlib.contextmanager
def spans_of(buffers: Mapping[str, Buffer]) -> Iterator[dict[str, FileSpan]]:
    """Name the bytes of buffers for a process of the same user, while the context is open.

    Args:
        buffers: contiguous bytes, by any key; empty ones are left out.
    """
    with contextlib.ExitStack() as stack:
        files = _mapped_files()
        spans = {}
        for key, buffer in buffers.items():
            if buffer.nbytes:
                spans[key] = _in_file(buffer, files) or stack.enter_context(_in_memory(buffer))
        yield spans


#: First and last address, inode, and what lies there.
_Mapping = tuple[int, int, int, FileSpan]


def _mapped_files() -> list[_Mapping]:
    """Every file that this process maps."""
    found = []
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            parts = line.rstrip("\n").split(maxsplit=5)
            if len(parts) < 6 or not parts[5].startswith("/"):
                continue
            first, _, last = parts[0].partition("-")
            span = FileSpan(path=parts[5], offset=int(parts[2], 16))
            found.append((int(first, 16), int(last, 16), int(parts[4]), span))
    return found


def _in_file(buffer: Buffer, files: list[_Mapping]) -> FileSpan | None:
    start = buffer.ctypes.data
    for first, last, inode, span in files:
        if first <= start and start + buffer.nbytes <= last and _has_inode(span.path, inode):
            return FileSpan(path=span.path, offset=span.offset + start - first)
    return None


def _has_inode(path: str, inode: int) -> bool:
    """Whether the name still leads to the file: one that was evicted cannot be opened by it."""
    try:
        return os.stat(path).st_ino == inode
    except OSError:
        return False


@contextlib.contextmanager
def _in_memory(buffer: Buffer) -> Iterator[FileSpan]:
    descriptor = os.memfd_create("shardserve-parameters", os.MFD_CLOEXEC)
    try:
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            file.write(np.ascontiguousarray(buffer).data)
        yield FileSpan(path=f"/proc/{os.getpid()}/fd/{descriptor}", offset=0)
    finally:
        os.close(descriptor)
