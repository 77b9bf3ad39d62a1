"""Parameter arrays in a store: packed when written, mapped without a copy when read.

Decides how arrays are laid out in blobs: a large one has a blob to itself, so that two bundles
share it; small ones share a blob, so that a model of a thousand biases is not a thousand files.
Does not know JAX: `jax.device_put` takes what `map_leaves` returns.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from shards.checking import ALIGNMENT, leaf_bytes
from shards.errors import SpecMismatch
from shards.files import digest_of
from shards.manifest import BlobRef, Leaf
from shards.specs import DTYPES, STRING, dtype_of
from shards.store import Buffer, Store

__all__ = [
    "Array",
    "digest_of_leaf",
    "dtype_name",
    "leaf_bytes",
    "map_leaf",
    "map_leaves",
    "map_pages",
    "put_leaves",
]

Array = npt.NDArray[np.generic]

#: Arrays of at least this many bytes have a blob to themselves.
_LARGE: Final = 64 << 10

#: Of Linux 5.14: read the pages of a range and map them, as if each had been touched.
_MADV_POPULATE_READ: Final = 22
#: Pages are mapped in pieces, as whoever maps or unmaps anything else in the process waits.
_PIECE: Final = 8 << 20
_LIBC: Final = ctypes.CDLL(None)

_NAMES: Final = {dtype: name for name, dtype in DTYPES.items() if name != STRING}


def map_pages(array: Array) -> None:
    """Have the pages of a mapped array there, so that its first reader waits for none of them.

    Without holding Python's lock. A kernel that cannot maps them when they are read, as ever.
    """
    first = array.ctypes.data & -mmap.PAGESIZE
    end = array.ctypes.data + array.nbytes
    for start in range(first, end, _PIECE):
        size = min(_PIECE, end - start)
        where, length = ctypes.c_void_p(start), ctypes.c_size_t(size)
        if _LIBC.madvise(where, length, _MADV_POPULATE_READ):
            return


def dtype_name(dtype: Any) -> str:
    """The spec name of a NumPy or JAX dtype.

    Raises:
        SpecMismatch: no array of that dtype can be saved.
    """
    try:
        return _NAMES[np.dtype(dtype)]
    except (KeyError, TypeError):
        known = ", ".join(_NAMES.values())
        raise SpecMismatch(f"dtype {dtype} is not one of {known}") from None


def digest_of_leaf(array: Array, leaf: Leaf) -> str:
    """The digest of an array's bytes in C order, which are stored as the leaf."""
    if leaf.blob.size == array.nbytes:
        return leaf.blob.digest
    return digest_of(_bytes_of(array))


def put_leaves(store: Store, arrays: Sequence[Array]) -> tuple[Leaf, ...]:
    """Write arrays to a store.

    Args:
        store: where.
        arrays: NumPy arrays of any shape; a memory-mapped one is not held in memory.

    Returns:
        One leaf for every array, in the same order.

    Raises:
        SpecMismatch: an array of a dtype that cannot be saved.
    """
    names = [dtype_name(array.dtype) for array in arrays]
    offsets: dict[int, int] = {}
    pieces: list[memoryview] = []
    end = 0
    for index, array in enumerate(arrays):
        if array.nbytes < _LARGE:
            padding = -end % ALIGNMENT
            offsets[index] = end + padding
            pieces += (memoryview(bytes(padding)), _bytes_of(array))
            end += padding + array.nbytes
    pack = store.put(b"".join(pieces)) if offsets else None
    leaves = []
    for index, (array, name) in enumerate(zip(arrays, names, strict=True)):
        shape = tuple(map(int, array.shape))
        if pack is not None and index in offsets:
            leaf = Leaf(dtype=name, shape=shape, blob=pack, offset=offsets[index])
        else:
            leaf = Leaf(dtype=name, shape=shape, blob=store.put(array))
        leaves.append(leaf)
    return tuple(leaves)


def map_leaf(store: Store, leaf: Leaf) -> Array:
    """A leaf as a read-only array over the store's memory, 64-byte aligned."""
    return _view(store.map(leaf.blob), leaf)


def map_leaves(store: Store, leaves: Iterable[Leaf]) -> list[Array]:
    """Leaves as read-only arrays, each blob mapped once."""
    mapped: dict[BlobRef, Buffer] = {}
    arrays = []
    for leaf in leaves:
        if leaf.blob not in mapped:
            mapped[leaf.blob] = store.map(leaf.blob)
        arrays.append(_view(mapped[leaf.blob], leaf))
    return arrays


def _view(buffer: Buffer, leaf: Leaf) -> Array:
    dtype = dtype_of(leaf.dtype)
    # The plain view drops np.memmap, whose every slice costs attribute copies.
    plain = buffer.view(np.ndarray)
    return np.ndarray(leaf.shape, dtype, plain.data, leaf.offset)


def _bytes_of(array: Array) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
