"""Large bodies on one node: lent in shared memory instead of copied through a socket.

Each side of a link may own one segment, a memfd that only it writes. It *lends* a place in it for
each large body, and the peer, which maps the segment for reading alone, *gives the place back* when
the last view of the body has died. Only then is it written again. So a body is copied once, by its
sender, and a receiver reads it where it lies::

    Lender                                     Borrower
      offer()      process's fd and size   →     take up: opens /proc/<pid>/fd/<fd>, maps it
                                           ←     yes or no
      lend()       offset and size         →     borrow(): a read-only view
                                           ←     returned(): offsets whose views have died

Nobody ever waits for memory: where there is no segment, no room or no leave to open the peer's, a
body goes through the socket. The size is fixed and sealed when the segment is made, so that no read
of it can fault, and pages are taken as they are first written. When the peer dies, its mapping
stays good for the views that are left, and ours is dropped with the link.

The peer is of our user, has proven itself, and is still not trusted with our memory: what it
announces is checked against what was mapped. What it lends may change while it is read, if it is
broken; who uses such bytes as indexes copies them first. This file knows no frames and no loop.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import struct
import weakref
from collections import deque
from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

from shards.errors import FrameCorrupt
from shards.transport._places import GRAIN_BYTES, Places

__all__ = ["LOAN_BYTES", "Borrower", "Lender", "Loan"]

logger = logging.getLogger(__name__)

_OFFER: Final = struct.Struct("<IQ")  # descriptor, bytes
_LOAN: Final = struct.Struct("<QQ")  # offset, bytes
_RETURN: Final = struct.Struct("<Q")  # offset
#: A loan as it travels.
LOAN_BYTES: Final = _LOAN.size

#: Readers can neither be made to fault, by a shorter segment, nor be fed a longer one.
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_NAME: Final = "shardserve-link"

_Bytes = npt.NDArray[np.uint8]


class Loan:
    """A place that was taken for one body, being filled by its owner.

    Attributes:
        offset: in the segment.
        nbytes: of the body.
        reference: what the peer is told of it, once all of it is there.
    """

    __slots__ = ("_at", "_place", "nbytes", "offset", "reference")

    def __init__(self, place: _Bytes, offset: int) -> None:
        self.offset = offset
        self.nbytes = place.size
        self.reference = _LOAN.pack(offset, place.size)
        self._place = place
        self._at = 0

    def write(self, data: memoryview) -> None:
        """Copy what comes next, which is not nothing."""
        source = np.frombuffer(data, np.uint8)
        end = self._at + source.size
        self._place[self._at : end] = source
        self._at = end


class Lender:
    """Our side's segment, for one peer.

    Args:
        size: of the segment in bytes, taken by and by; rounded up to whole pages.

    Attributes:
        size: the same, so rounded.
        is_taken_up: whether the peer has mapped the segment; None until it has said so.
    """

    __slots__ = ("_bytes", "_descriptor", "_map", "_places", "is_taken_up", "size")

    def __init__(self, size: int) -> None:
        self.size = -(-size // GRAIN_BYTES) * GRAIN_BYTES
        self._places = Places(self.size)
        self._descriptor = -1
        self._map: mmap.mmap | None = None
        self._bytes: _Bytes | None = None
        self.is_taken_up: bool | None = None

    @property
    def lent_bytes(self) -> int:
        """Bytes that the peer has not given back."""
        return self._places.taken_bytes

    def offer(self) -> bytes:
        """Make the segment; what the peer is to be told of it. Once.

        Raises:
            OSError: this system has no such memory.
        """
        assert self._map is None
        descriptor = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, self.size)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
            self._map = mmap.mmap(descriptor, self.size)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        self._bytes = np.frombuffer(self._map, np.uint8)
        return _OFFER.pack(descriptor, self.size)

    def answered(self, yes: bool) -> None:
        """The peer has taken the offer up, or has not."""
        self._close_descriptor()
        self.is_taken_up = yes and self._map is not None
        if not yes:
            self.close()

    def lend(self, nbytes: int) -> Loan | None:
        """A place for a body, to be written before the peer is told; None if there is none."""
        if not self.is_taken_up:
            return None
        offset = self._places.take(nbytes)
        if offset is None:
            return None
        assert self._bytes is not None
        return Loan(self._bytes[offset : offset + nbytes], offset)

    def take_back(self, loan: Loan) -> None:
        """The peer was not told of this one, and will not be."""
        self._places.give_back(loan.offset)

    def returned(self, offsets: bytes) -> None:
        """The peer gives these back.

        Raises:
            FrameCorrupt: they are not offsets of what was lent.
        """
        try:
            for (offset,) in _RETURN.iter_unpack(offsets):
                self._places.give_back(offset)
        except (struct.error, KeyError):
            raise FrameCorrupt("the peer gives back what was not lent") from None

    def trim(self, nbytes: int) -> bool:
        """Give the system back some pages of a segment of which nothing is lent, highest first.

        Args:
            nbytes: at most, whole pages: freeing them takes time (0.2 ms a megabyte, measured).

        Returns:
            whether there are more.
        """
        places = self._places
        if self._map is None or places or not places.high:
            return False
        start = max(0, places.high - nbytes)
        self._map.madvise(mmap.MADV_REMOVE, start, places.high - start)
        places.lower_high(start)
        return start > 0

    def close(self) -> None:
        """Forget the segment; the peer's mapping is its own."""
        self._close_descriptor()
        self.is_taken_up = False
        # A loan that is being written may still hold it: the memory goes with the last of them.
        self._map = self._bytes = None

    def _close_descriptor(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class _Borrowed(weakref.ref[_Bytes]):
    """Knows, after its place's last view has died, which one that was."""

    __slots__ = ("offset",)
    offset: int


class Borrower:
    """The peer's segment, as this side reads it.

    Args:
        pid: of the peer.
        size_max: of a segment that is taken up.
        on_return: called when a view has died, on whatever thread that was.

    Attributes:
        due: offsets whose views have died; `returned` tells the peer of them.
    """

    __slots__ = ("_borrowed", "_bytes", "_on_return", "_pid", "_size_max", "due")

    def __init__(self, pid: int, size_max: int, on_return: Callable[[], None]) -> None:
        self._pid = pid
        self._size_max = size_max
        self._on_return = on_return
        self._bytes: _Bytes | None = None
        self._borrowed: dict[int, _Borrowed] = {}
        self.due: deque[int] = deque()

    @property
    def borrowed(self) -> int:
        """Places of which views are alive."""
        return len(self._borrowed)

    def take_up(self, offer: bytes) -> bool:
        """Map what the peer offers; False, with a line in the log, where that cannot be.

        Raises:
            FrameCorrupt: this is no offer, or the second one.
        """
        if self._bytes is not None or len(offer) != _OFFER.size:
            raise FrameCorrupt("the peer offers shared memory twice, or none")
        descriptor, size = _OFFER.unpack(offer)
        try:
            self._bytes = _map_peer(self._pid, descriptor, size, self._size_max)
        except OSError as error:
            logger.info("no shared memory with process %d: %s", self._pid, error)
            return False
        return True

    def borrow(self, loan: bytes | memoryview) -> memoryview:
        """A read-only view of what was lent; the place is given back when it and its like die.

        Raises:
            FrameCorrupt: nothing there can have been lent.
        """
        if self._bytes is None or len(loan) != LOAN_BYTES:
            raise FrameCorrupt("a loan of no memory that is shared")
        offset, nbytes = _LOAN.unpack(loan)
        end = offset + nbytes
        if not nbytes or end > self._bytes.size or offset % GRAIN_BYTES:
            raise FrameCorrupt(f"bytes {offset} to {end} of a segment of {self._bytes.size}")
        if offset in self._borrowed:
            raise FrameCorrupt(f"what is lent at {offset} was lent before")
        # Whatever is made of the memoryview holds on to this array, and so keeps the place.
        place = self._bytes[offset:end]
        borrowed = self._borrowed[offset] = _Borrowed(place, self._died)
        borrowed.offset = offset
        return place.data

    def returned(self) -> bytes:
        """What to give back to the peer; b"" if nothing is due."""
        due = self.due
        offsets = []
        while due:  # another thread may add to it meanwhile
            offsets.append(due.popleft())
        return b"".join(map(_RETURN.pack, offsets))

    def close(self) -> None:
        """Forget the peer's segment; it stays mapped for the views that are left."""
        self._bytes = None
        self.due.clear()

    def _died(self, borrowed: weakref.ref[_Bytes]) -> None:
        assert isinstance(borrowed, _Borrowed)
        # In this order: as soon as the peer is told, the same offset may be lent again.
        del self._borrowed[borrowed.offset]
        if self._bytes is not None:  # else there is nobody to give it back to
            self.due.append(borrowed.offset)
            self._on_return()


def _map_peer(pid: int, descriptor: int, size: int, size_max: int) -> _Bytes:
    """The segment, mapped for reading.

    Raises:
        OSError: it cannot be opened, or is not what such a segment must be.
    """
    if not 0 < size <= size_max:
        raise OSError(f"a segment of {size} bytes, the bound is {size_max}")
    path = f"/proc/{pid}/fd/{descriptor}"
    # Asked before it is opened, since opening some files does something.
    if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
        raise OSError(f"{path} is not a segment")
    opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        status = os.fstat(opened)
        # Only a memfd has seals at all: of any other file, this fails.
        seals = fcntl.fcntl(opened, fcntl.F_GET_SEALS)
        if seals & _SEALS != _SEALS or status.st_size != size or status.st_uid != os.geteuid():
            raise OSError(f"{path} has seals {seals:#x}, {status.st_size} bytes")
        mapped = mmap.mmap(opened, size, mmap.MAP_SHARED, mmap.PROT_READ)
    finally:
        os.close(opened)
    return np.frombuffer(mapped, np.uint8)
