"""Which compiled size runs a number of rows, and which compiled shape holds a length.

Compiling and serving must agree on this, or the first odd request compiles on the serving path. So
both call this file: `shapes` lists what to compile, `bucketize` says which of these a request uses,
and nothing else in the project rounds a size up.

It does not know what a bucket costs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from itertools import product
from typing import Final

from batching.errors import InvalidArgument

__all__ = ["Ladder", "bucketize", "shapes"]


class Ladder:
    """The sizes that are compiled, ascending. A value: equal ladders are equal and hash so.

    Attributes:
        sizes: the buckets.
        largest: the last of them.
        places: for every number of rows from 0 to `largest`, the place in `sizes` of the bucket
            that holds them.
    """

    __slots__ = ("largest", "places", "sizes")

    def __init__(self, sizes: Iterable[int]) -> None:
        """Take the sizes.

        Raises:
            InvalidArgument: there are none, one is not positive, or they do not ascend.
        """
        self.sizes: Final = tuple(sizes)
        if not self.sizes:
            raise InvalidArgument("a ladder needs at least one bucket")
        if self.sizes[0] < 1:
            raise InvalidArgument(f"buckets {self.sizes}: a bucket must be positive")
        if any(low >= high for low, high in zip(self.sizes, self.sizes[1:], strict=False)):
            raise InvalidArgument(f"buckets {self.sizes}: buckets must ascend")
        self.largest: Final = self.sizes[-1]
        self.places: Final = tuple(
            bisect_left(self.sizes, size) for size in range(self.largest + 1)
        )

    def bucket_of(self, size: int) -> int:
        """The smallest bucket that holds `size`.

        Raises:
            InvalidArgument: `size` is negative, or above the largest bucket.
        """
        if not 0 <= size <= self.largest:
            raise InvalidArgument(f"size {size} fits none of the buckets {self.sizes}")
        return self.sizes[self.places[size]]

    def __eq__(self, other: object) -> bool:
        return self.sizes == other.sizes if isinstance(other, Ladder) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.sizes)

    def __repr__(self) -> str:
        return f"Ladder({self.sizes})"


def bucketize(sizes: Mapping[str, int], ladders: Mapping[str, Ladder]) -> tuple[int, ...]:
    """The shape of the lane for these sizes: one bucket for each symbol, by symbol name.

    Args:
        sizes: size by symbol; symbols without a ladder, like the batch symbol, are ignored.
        ladders: ladder by symbol.

    Raises:
        InvalidArgument: a size is missing or fits no bucket; the message names the symbol.
    """
    shape = []
    for symbol in sorted(ladders):
        if symbol not in sizes:
            raise InvalidArgument(f"the size of {symbol!r} is not known")
        try:
            shape.append(ladders[symbol].bucket_of(sizes[symbol]))
        except InvalidArgument as error:
            raise InvalidArgument(f"{symbol}: {error}") from None
    return tuple(shape)


def shapes(ladders: Mapping[str, Ladder]) -> list[tuple[int, ...]]:
    """Every shape that `bucketize` can return for these ladders: what to compile."""
    return list(product(*(ladders[symbol].sizes for symbol in sorted(ladders))))
