"""What a map unit needs of a device's memory, as far as its manifest tells.

Parameters, the outputs of its largest step, and the slots in which batches are laid out. What a
step allocates for itself is known only once its program was compiled; whoever has measured that
adds it. Actors and whoever places units on them count by the same numbers. Does not know JAX,
devices or what is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import numpy as np

from shards.checking import leaf_bytes
from shards.manifest import MapUnit
from shards.specs import REQUESTS, Spec, dtype_of
from shards.staging import layout_bytes

__all__ = ["IN_FLIGHT_MAX", "outputs_bytes", "parameter_bytes", "shape_of", "staging_bytes"]

#: One step runs while the next is launched; more would only make late binding earlier.
IN_FLIGHT_MAX: Final = 2


def shape_of(
    spec: Spec, batch: int, sizes: Mapping[str, int]
) -> tuple[tuple[int, ...], np.dtype[np.generic]]:
    """Shape and dtype of a tensor in a bucket; see `shards.programs.buckets_of`."""
    row = (sizes[size] if isinstance(size, str) else size for size in spec.row_shape)
    first = sizes[REQUESTS] if spec.per_request else batch
    return (first, *row), dtype_of(spec.dtype)


def parameter_bytes(unit: MapUnit) -> int:
    """Bytes of the parameters."""
    return sum(map(leaf_bytes, unit.params))


def outputs_bytes(unit: MapUnit) -> int:
    """Bytes of the outputs of the largest bucket."""
    batch, sizes = _largest(unit)
    tensors = [shape_of(spec, batch, sizes) for spec in unit.outputs.values()]
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors)


def staging_bytes(unit: MapUnit) -> int:
    """Bytes of the slots that hold its largest batch. All units of a device have them in common."""
    batch, sizes = _largest(unit)
    layout = tuple(shape_of(spec, batch, sizes) for spec in unit.program_inputs)
    return (IN_FLIGHT_MAX + 1) * layout_bytes(layout)


def _largest(unit: MapUnit) -> tuple[int, dict[str, int]]:
    batch = unit.batch_buckets[-1]
    lengths = {symbol: ladder[-1] for symbol, ladder in unit.length_buckets.items()}
    return batch, {**lengths, REQUESTS: batch}
