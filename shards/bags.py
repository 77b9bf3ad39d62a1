"""Bags of ids between a router and a shard: what a call of op ``sum`` or ``max`` carries.

A call's tensors are ``counts`` int32 ``[bags]``, how many ids each bag has; ``ids`` int32 or int64
``[n]``, those of one bag after the other; and for weighted sums ``weights`` float32 ``[n]``. A bag
is a row of the call, so items, frames and answers are those of any other rows; only a cut has to
follow the counts, and that is here. Several tables whose rows are of one size may be asked in one
call: an item then has its bags of the first table, those of the second, and so on, and says how
many of each there are. Does not know what the ids mean.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from shards.errors import SpecMismatch
from shards.pooling import Partial
from shards.wire import TableRef

__all__ = ["NO_ID", "POOL_OPS", "ID32_ROWS_MAX", "cut_bags", "offsets_of", "op_of", "set_id"]

Array: TypeAlias = npt.NDArray[np.generic]

#: Fills the place of an id that a bag does not have.
NO_ID: Final = -1
#: Ids of a table of no more rows travel in 32 bits.
ID32_ROWS_MAX: Final = 1 << 31

#: What is asked of a shard for what a signature wants of a bag: a mean is a sum until all of it is
#: together, since no shard knows how many ids the others have.
_OPS: Final[dict[str, Partial]] = {"sum": "sum", "mean": "sum", "max": "max"}
POOL_OPS: Final = frozenset(_OPS.values())


def op_of(pool: str) -> Partial:
    """What shards are asked for, for a node that pools so."""
    return _OPS[pool]


@lru_cache(maxsize=1024)
def set_id(tables: tuple[TableRef, ...]) -> str:
    """What several tables are called where they are asked at once.

    Whoever answers works it out anew, so that an answer says which tables it is of, and how each is
    cut.
    """
    digest = hashlib.blake2b(digest_size=16)
    for table in tables:
        digest.update(f"{table.unit} {table.plan}\n".encode())
    return f"{len(tables)} tables {digest.hexdigest()}"


def offsets_of(counts: Array) -> npt.NDArray[np.int64]:
    """Where each bag begins, and where the last one ends.

    Raises:
        SpecMismatch: these are no counts.
    """
    if counts.dtype != np.int32 or counts.ndim != 1:
        text = f"counts of bags must be int32 [bags], got {counts.dtype}{list(counts.shape)}"
        raise SpecMismatch(text)
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def cut_bags(arrays: Sequence[Array], start: int, stop: int) -> list[Array]:
    """The tensors of the bags from `start` to `stop`, of a call of several requests.

    What is cut is not held against anything: `HostedTable.pool` does so.

    Raises:
        SpecMismatch: the counts are not of the right shape or dtype.
    """
    edges = offsets_of(arrays[0])
    first, last = int(edges[start]), int(edges[stop])
    return [arrays[0][start:stop], *(array[first:last] for array in arrays[1:])]
