"""A map unit as its engine needs it on every frame: lanes, layouts, and the check of what came.

Everything that can be worked out when a unit is installed is worked out here, once. This file does
not know links, tickets or the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from batching import Ladder, LaneKey
from batching.errors import InvalidArgument
from shards.compiling.messages import Bucket
from shards.manifest import MapUnit
from shards.programs import shape_of, sizes_of
from shards.sharing import Sizes, declared_sizes
from shards.specs import dtype_of
from shards.staging import Layout

__all__ = ["Hosted", "LaneBounds", "cut", "layouts_of"]

Array = npt.NDArray[np.generic]


class LaneBounds:
    """How much of any one owner may wait in one lane."""

    __slots__ = ("bytes_max", "rows_max")

    def __init__(self, rows_max: int = 4096, bytes_max: int = 256 << 20) -> None:
        self.rows_max = rows_max
        self.bytes_max = bytes_max


class Hosted:
    """One installed unit.

    Attributes:
        costs: seconds that each bucket took when it was warmed.
        symbols: those other than the batch, sorted, as `bucketize` orders them.
        ladders: sizes that each symbol is compiled for.
        lanes: one for every shape.
        sizes: what the unit is compiled for, as far as it is used.
        dtypes: of the inputs.
        row_shapes: of the inputs, without the batch.
        cuts: for every output, the axes whose padding is cut off again, each as (axis, index of
            its symbol).
        layouts: what a staging slot holds, for each bucket that there is or was.
        per_request: where some inputs are per request, for each whether it is; else ().
    """

    __slots__ = (
        "_requests", "costs", "cuts", "dtypes", "ladders", "lanes", "layouts", "per_request",
        "row_shapes", "sizes", "symbols",
    )  # fmt: skip

    def __init__(
        self, unit: MapUnit, costs: Mapping[Bucket, float], sizes: Sizes | None = None
    ) -> None:
        """Take a unit.

        Args:
            unit: as any of its members declares it.
            costs: seconds that each bucket took when it was warmed.
            sizes: what it is compiled for; None for what `unit` declares.
        """
        self.symbols = tuple(sorted(unit.length_buckets))
        self.dtypes = tuple(dtype_of(spec.dtype) for spec in unit.inputs.values())
        self.row_shapes = tuple(spec.row_shape for spec in unit.inputs.values())
        self.cuts = tuple(
            tuple(
                (axis, self.symbols.index(size))
                for axis, size in enumerate(spec.shape)
                if isinstance(size, str) and size in self.symbols
            )
            for spec in unit.outputs.values()
        )
        self.per_request = unit.per_request
        self._requests: dict[Bucket, Ladder] = {}
        self.layouts: dict[Bucket, Layout] = {}
        self.resize(unit, costs, sizes or declared_sizes(unit))

    def resize(self, unit: MapUnit, costs: Mapping[Bucket, float], sizes: Sizes) -> None:
        """Use other sizes. Rows that came before this need no change."""
        self.costs = costs
        self.sizes = sizes
        self.ladders = sizes.symbols
        self.lanes = [LaneKey(unit.id, shape) for shape in sizes.batches]
        self.layouts.update(layouts_of(unit, sizes))
        self._requests.update(sizes.requests)

    def bucket_for(self, batch: int, lengths: tuple[int, ...], requests: int) -> Bucket:
        """The smallest bucket of a batch that has room for this many requests."""
        if not self.per_request:
            return batch, lengths
        return batch, (*lengths, self._requests[batch, lengths].bucket_of(requests))

    def costs_of(self, lane: LaneKey) -> dict[int, float]:
        """Seconds that each batch size of a lane took when it was warmed.

        Where the number of requests matters too, it is not known yet when a batch is chosen: the
        largest is assumed.
        """
        found: dict[int, float] = {}
        for (batch, sizes), cost in self.costs.items():
            if sizes[: len(lane.shape)] == lane.shape:
                found[batch] = max(cost, found.get(batch, 0.0))
        return found

    def bytes_of(self, arrays: Sequence[Array]) -> tuple[int, int]:
        """Bytes of each row in a frame, and those that each request has once."""
        if not self.per_request:
            return sum([array.nbytes for array in arrays]) // max(len(arrays[0]), 1), 0
        of = {False: 0, True: 0}
        for array, per in zip(arrays, self.per_request, strict=True):
            of[per] += array.nbytes // max(len(array), 1)
        return of[False], of[True]

    def bind(self, arrays: Sequence[Array], rows: int, requests: int) -> dict[str, int]:
        """The sizes of the symbols in a frame's arrays.

        Args:
            arrays: of the unit's inputs, in order.
            rows: of all its items.
            requests: its items; they have one row each of what is per request.

        Raises:
            InvalidArgument: arrays that this unit cannot take. Routers check before they send, so
                this guards against a confused or foreign peer.
        """
        if len(arrays) != len(self.dtypes):
            raise InvalidArgument(f"{len(arrays)} tensors, the unit takes {len(self.dtypes)}")
        found: dict[str, int] = {}
        per_request = self.per_request
        for index, array in enumerate(arrays):
            shape, dtype = self.row_shapes[index], self.dtypes[index]
            if array.dtype != dtype or array.ndim != len(shape) + 1:
                raise InvalidArgument(
                    f"a tensor is {array.dtype}{list(array.shape)}, the unit takes "
                    f"{dtype}[rows,{','.join(map(str, shape))}]"
                )
            expected = requests if per_request and per_request[index] else rows
            if len(array) != expected:
                # NumPy would repeat a single row for all when it is laid out, without a word.
                raise InvalidArgument(f"a tensor of {len(array)} rows, the items have {expected}")
            for size, declared in zip(array.shape[1:], shape, strict=True):
                wanted = found.setdefault(declared, size) if isinstance(declared, str) else declared
                if wanted != size:
                    raise InvalidArgument(f"a tensor has size {size} where {declared} is {wanted}")
        return found


def layouts_of(unit: MapUnit, sizes: Sizes) -> dict[Bucket, Layout]:
    """What a staging slot holds, for each bucket."""
    return {
        bucket: tuple(
            shape_of(spec, bucket[0], sizes_of(unit, bucket)) for spec in unit.program_inputs
        )
        for bucket in sizes.buckets
    }


def cut(output: Array, cuts: Sequence[tuple[int, int]], lengths: tuple[int, ...]) -> Array:
    """Rows of an output without what the length bucket added."""
    if not cuts:
        return output
    index: list[slice] = [slice(None)] * output.ndim
    for axis, symbol in cuts:
        index[axis] = slice(0, lengths[symbol])
    return np.ascontiguousarray(output[tuple(index)])
