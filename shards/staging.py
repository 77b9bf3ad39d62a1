"""Host memory in which batches are laid out for the device.

XLA may read a NumPy buffer after the call that took it has returned, and on a CPU it aliases
64-byte-aligned memory instead of copying it. So a slot that has been handed to the device is not
written again until that step's outputs are ready: the pool owns a fixed number of slots, and the
caller releases one only on completion. All memory is taken when a unit is loaded (`reserve`), never
while serving, and given back when the last unit that needs it is gone (`forget`).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["ALIGNMENT", "Layout", "Source", "StagingPool", "aligned", "fill", "layout_bytes"]

ALIGNMENT = 64

Array = npt.NDArray[np.generic]
#: Shape and dtype of one input of a step.
Layout = tuple[tuple[tuple[int, ...], np.dtype[np.generic]], ...]


class Source(NamedTuple):
    """Rows ``[start, stop)`` of one frame's arrays, in the order of the unit's inputs.

    Attributes:
        requests: where inputs are per request: whose the rows are, in their order: the request's
            row of these inputs, and how many rows are its own.
    """

    arrays: Sequence[Array]
    start: int
    stop: int
    requests: tuple[tuple[int, int], ...] = ()


def aligned(nbytes: int) -> npt.NDArray[np.uint8]:
    """Zeroed memory of ``nbytes`` that starts on an `ALIGNMENT` boundary."""
    raw = np.zeros(nbytes + ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % ALIGNMENT
    return raw[offset : offset + nbytes]


def layout_bytes(layout: Layout) -> int:
    """Bytes that a layout takes in a slot, alignment included."""
    return sum(_round_up(_nbytes(shape, dtype)) for shape, dtype in layout)


class StagingPool:
    """``slots`` equal pieces of aligned memory, each able to hold any reserved layout.

    Not thread-safe by itself: `acquire` and `release` belong to the scheduling thread, `fill` to
    the executor; a slot is in one hand at a time.
    """

    def __init__(self, slots: int) -> None:
        if slots < 1:
            raise ValueError(f"a staging pool needs at least one slot, got {slots}")
        self._buffers = [aligned(0) for _ in range(slots)]
        self._free: deque[int] = deque(range(slots))
        self._views: dict[tuple[int, Layout], tuple[Array, ...]] = {}
        self._reserved: Counter[Layout] = Counter()

    @property
    def nbytes(self) -> int:
        """Memory held by all slots."""
        return sum(buffer.nbytes for buffer in self._buffers)

    @property
    def free(self) -> int:
        """Slots that nobody holds."""
        return len(self._free)

    def growth(self, layouts: Iterable[Layout]) -> int:
        """By how much `nbytes` would grow if these were reserved."""
        need = max(map(layout_bytes, layouts), default=0)
        return sum(max(0, need - buffer.nbytes) for buffer in self._buffers)

    def reserve(self, layout: Layout) -> None:
        """Make every slot large enough for ``layout``, until it was forgotten as often.

        A slot that is in flight keeps its old memory alive through the views that were handed
        out, so resizing is safe while serving; it is still only done by loads and unloads.
        """
        self._reserved[layout] += 1
        need = layout_bytes(layout)
        for index, buffer in enumerate(self._buffers):
            if buffer.nbytes < need:
                self._resize(index, need)

    def acquire(self) -> int | None:
        """A free slot, or None if all are in flight."""
        return self._free.popleft() if self._free else None

    def release(self, slot: int) -> None:
        """Give a slot back; its memory may be overwritten from here on."""
        assert slot not in self._free, f"slot {slot} released twice"
        self._free.append(slot)

    def views(self, slot: int, layout: Layout) -> tuple[Array, ...]:
        """The slot's memory as arrays of ``layout``, each aligned."""
        key = (slot, layout)
        found = self._views.get(key)
        if found is None:
            found = self._views[key] = self._carve(self._buffers[slot], layout)
        return found

    def forget(self, layout: Layout) -> None:
        """Undo a `reserve`: memory that no layout needs any more is given back."""
        self._reserved[layout] -= 1
        if self._reserved[layout]:
            return
        del self._reserved[layout]
        need = max(map(layout_bytes, self._reserved), default=0)
        for index, buffer in enumerate(self._buffers):
            self._views.pop((index, layout), None)
            if buffer.nbytes > need:
                self._resize(index, need)

    def _resize(self, index: int, nbytes: int) -> None:
        self._buffers[index] = aligned(nbytes)
        for key in [key for key in self._views if key[0] == index]:
            del self._views[key]

    @staticmethod
    def _carve(buffer: npt.NDArray[np.uint8], layout: Layout) -> tuple[Array, ...]:
        arrays: list[Array] = []
        offset = 0
        for shape, dtype in layout:
            size = _nbytes(shape, dtype)
            assert offset + size <= buffer.nbytes, "layout was not reserved"
            arrays.append(buffer[offset : offset + size].view(dtype).reshape(shape))
            offset += _round_up(size)
        return tuple(arrays)


def fill(
    views: Sequence[Array],
    sources: Sequence[Source],
    pads: Sequence[float],
    per_request: Sequence[bool] = (),
) -> None:
    """Lay rows out back to back and fill what is left of the bucket.

    Rows shorter than the bucket in other dimensions are padded with ``pads``; rows that are
    missing to the batch size repeat the batch's first row, never zeros: a row that occurs in real
    traffic cannot produce a NaN or take a slow path that real traffic would not.

    Args:
        views: one array a unit input, ``[bucket, ...]``.
        sources: at least one, their rows adding up to at most the bucket.
        pads: one value a unit input.
        per_request: for each unit input whether it has a row for every request, not for every row;
            then the view after those of the inputs is an index: whose each row is. () if none has.
    """
    if per_request:
        _fill_index(views[-1], sources)
        views = views[:-1]
    for index, view in enumerate(views):
        if per_request and per_request[index]:
            _fill_requests(view, index, sources, pads[index])
            continue
        at = 0
        for source in sources:
            array = source.arrays[index]
            stop = at + source.stop - source.start
            if array.shape[1:] == view.shape[1:]:
                view[at:stop] = array[source.start : source.stop]
            else:
                _put_padded(view[at:stop], array[source.start : source.stop], pads[index])
            at = stop
        if at < view.shape[0]:
            view[at:] = view[0]


def _fill_index(view: Array, sources: Sequence[Source]) -> None:
    """Say whose each row is; what fills the bucket repeats the first row, so it is that one's."""
    at = number = 0
    for source in sources:
        for _, rows in source.requests:
            view[at : at + rows] = number
            at += rows
            number += 1
    view[at:] = 0


def _fill_requests(view: Array, index: int, sources: Sequence[Source], pad: float) -> None:
    """Lay out one row for every request. No row's index leads to what is left of the view."""
    number = 0
    for source in sources:
        array = source.arrays[index]
        for row, _ in source.requests:
            _put_padded(view[number : number + 1], array[row : row + 1], pad)
            number += 1


def _put_padded(view: Array, rows: Array, pad: float) -> None:
    if rows.shape != view.shape:
        view[:] = pad
    view[tuple(slice(0, size) for size in rows.shape)] = rows


def _nbytes(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def _round_up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
