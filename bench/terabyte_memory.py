"""What processes hold of mapped blobs, as the kernel counts it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["Memory", "disk_bytes", "memory_of", "read_memory"]

_BLOBS: Final = "/blobs/blake3/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of some processes together; what several share is divided among them.

    Attributes:
        blobs: pages of mapped blobs.
        own: anonymous memory.
        page_tables: what the kernel needs to map it all.
    """

    blobs: int
    own: int
    page_tables: int


def read_memory(smaps: str, status: str) -> Memory:
    """What one process holds.

    Args:
        smaps: its ``/proc/PID/smaps``.
        status: its ``/proc/PID/status``.
    """
    blobs = 0
    is_blob = False
    for line in smaps.splitlines():
        key, _, rest = line.partition(" ")
        if not key.endswith(":"):  # a mapping's first line, which ends in its path
            is_blob = _BLOBS in line
        elif is_blob and key == "Pss:":
            blobs += _bytes(rest)
    told = {key: rest for key, _, rest in (line.partition(":") for line in status.splitlines())}
    return Memory(blobs=blobs, own=_bytes(told["RssAnon"]), page_tables=_bytes(told["VmPTE"]))


def memory_of(pids: Iterable[int]) -> Memory:
    """What processes hold together.

    Raises:
        OSError: one of them is gone.
    """
    found = [
        read_memory(Path(f"/proc/{pid}/smaps").read_text(), Path(f"/proc/{pid}/status").read_text())
        for pid in pids
    ]
    return Memory(
        blobs=sum(each.blobs for each in found),
        own=sum(each.own for each in found),
        page_tables=sum(each.page_tables for each in found),
    )


def disk_bytes(folder: Path) -> int:
    """What the files of a folder really take on the disk."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))


def _bytes(text: str) -> int:
    number, unit = text.split()
    assert unit == "kB", text
    return int(number) << 10
