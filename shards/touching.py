"""How whoever relies on a blob that is there keeps a sweep from taking it away.

    blobs/touched/<digest>              somebody relies on the blob since the time of the file
    blobs/condemned/<digest>.<sweep>    a sweep is about to remove the blob

A save and a sweep run beside each other, on different machines, over stores without locks. Each
writes what it means to do before it looks at what the other means to do:

* A save that finds a blob touches it, then looks whether it is condemned, and then whether it is
  still there. Condemned means: wait until the sweep has decided, and look again.
* A sweep (`shards.sweeping`) condemns a blob, then looks when it was touched and written, and only
  then removes it.

What is written is seen by every later look, so at least one of the two sees the other: the sweep
spares the blob, or the save finds it gone and writes it again. A sweep that dies leaves its mark
behind, and a sweep removes nothing later than half the time after which its marks are disregarded.
What is left is a process that stands still for longer than the other half, between its last look
at the clock and the one removal after it: only a store that compares before it removes could
refuse that, and `pyarrow.fs` has no such call.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from time import sleep as pause
from typing import Final

from batching.errors import Unavailable
from shards.shelves import Object, Shelf

__all__ = [
    "BLOBS",
    "CONDEMNED",
    "DISREGARDED_S",
    "TOUCHED",
    "clock_of",
    "is_there",
    "wait_for_sweep",
]

BLOBS: Final = "blobs/blake3"
TOUCHED: Final = "blobs/touched"
CONDEMNED: Final = "blobs/condemned"

#: A mark of a sweep means nothing any more when it is so old, by the store's clock.
DISREGARDED_S: Final = 600.0

_LOOK_S: Final = 0.1
_WAIT_S: Final = 60.0


def is_there(shelf: Shelf, digest: str, look: Callable[[], bool]) -> bool:
    """Whether a blob is there, and will be for as long as a sweep's grace.

    Args:
        shelf: the store's files.
        digest: of the blob.
        look: whether the blob is there, sound as far as can be told.

    Raises:
        Unavailable: the store does not answer, or a sweep does not come to a decision.
    """
    if look():
        shelf.write(f"{TOUCHED}/{digest}", b"")
        wait_for_sweep(shelf, digest)
        return look()
    # A sweep that saw an earlier blob of this name may be about to remove it.
    wait_for_sweep(shelf, digest)
    return False


def wait_for_sweep(shelf: Shelf, digest: str) -> None:
    """Return once no sweep is about to remove the blob.

    Raises:
        Unavailable: the store does not answer, or the sweep does not come to a decision.
    """
    until: float | None = None
    while marks := _marks_of(shelf, digest):
        now_s = clock_of(shelf)
        if all(now_s - mark.mtime_s > DISREGARDED_S for mark in marks):
            return  # of sweeps that died
        now = time.monotonic()
        until = now + _WAIT_S if until is None else until
        if now > until:
            raise Unavailable(f"blob {digest}: a sweep has not decided whether to remove it")
        pause(_LOOK_S)


def _marks_of(shelf: Shelf, digest: str) -> list[Object]:
    # A sweep condemns a few at a time, so the folder is short, and mostly not there.
    found, _ = shelf.list(CONDEMNED, recursive=False)
    return [each for each in found if each.path.startswith(f"{CONDEMNED}/{digest}.")]


def clock_of(shelf: Shelf) -> float:
    """The store's time, in seconds: ages are told by one clock, whoever asks."""
    path = "blobs/clock"
    shelf.write(path, b"")
    found: Object | None = shelf.stat(path)
    if found is None:
        raise Unavailable("the store does not show what was just written")
    return found.mtime_s
