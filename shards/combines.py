"""How the answers of a unit's partitions become one answer.

Every partition is asked the same and answers for its part alone; a combine makes one answer of
them, always in the order of the partitions, so that the same answers give the same bits wherever
the partitions lie. Sums of 16-bit floats are kept in 32 bits until all are in.

Does not know where the answers come from. Packages add combines of their own (`shards.registry`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from shards.errors import SpecMismatch
from shards.registry import Registry

__all__ = ["COMBINES", "Combine", "concat", "maximum", "mean", "total", "topk"]

Array: TypeAlias = npt.NDArray[np.generic]
Outputs: TypeAlias = Mapping[str, Array]

#: The partitions' outputs, in the order of the partitions, to the unit's outputs.
Combine: TypeAlias = Callable[[Sequence[Outputs]], Outputs]


def total(parts: Sequence[Outputs]) -> Outputs:
    """The sum of every output.

    Raises:
        SpecMismatch: an output is of text.
    """
    return {name: _sum(name, arrays).astype(arrays[0].dtype) for name, arrays in _by_name(parts)}


def mean(parts: Sequence[Outputs]) -> Outputs:
    """The mean of every output over the partitions; of integers, rounded towards zero.

    Raises:
        SpecMismatch: an output is of text.
    """
    return {
        name: np.divide(_sum(name, arrays), np.float32(len(arrays))).astype(arrays[0].dtype)
        for name, arrays in _by_name(parts)
    }


def maximum(parts: Sequence[Outputs]) -> Outputs:
    """The greatest value of every element; NaN where any partition has it.

    Raises:
        SpecMismatch: an output is of text.
    """
    found: dict[str, Array] = {}
    for name, arrays in _by_name(parts):
        _numbers(name, arrays[0])
        greatest = arrays[0]
        for array in arrays[1:]:
            greatest = np.maximum(greatest, array)
        found[name] = greatest
    return found


def concat(parts: Sequence[Outputs]) -> Outputs:
    """Every output's rows side by side, along their first axis after the batch.

    Raises:
        SpecMismatch: an output has no such axis.
    """
    found: dict[str, Array] = {}
    for name, arrays in _by_name(parts):
        if arrays[0].ndim < 2:
            raise SpecMismatch(f"output {name!r} has no axis but the batch to be joined along")
        found[name] = np.concatenate(arrays, axis=1)
    return found


def topk(parts: Sequence[Outputs]) -> Outputs:
    """The k best of all partitions by ``scores`` [b, k], best first; other outputs go with them.

    Equal scores keep the order of the partitions.

    Raises:
        SpecMismatch: there are no scores, or an output is not of their shape.
    """
    arrays = dict(_by_name(parts))
    scores = arrays.get("scores")
    if scores is None or scores[0].ndim != 2:
        raise SpecMismatch("topk needs an output 'scores' [b,k]")
    for name, pieces in arrays.items():
        if any(piece.shape[:2] != s.shape for piece, s in zip(pieces, scores, strict=True)):
            raise SpecMismatch(f"output {name!r} has not the shape of the scores")
    joined = np.concatenate(scores, axis=1)
    k = scores[0].shape[1]
    # A stable sort of the negated scores would turn unsigned ones round; this one reads backwards.
    order = joined.shape[1] - 1 - np.argsort(joined[:, ::-1], axis=1, kind="stable")
    best = order[:, ::-1][:, :k]
    rows = np.arange(joined.shape[0])[:, None]
    return {name: np.concatenate(pieces, axis=1)[rows, best] for name, pieces in arrays.items()}


#: ``shardserve.combines``: the combines that a bundle may name.
COMBINES: Final[Registry[Combine]] = Registry(
    "shardserve.combines",
    "combine",
    {"sum": total, "mean": mean, "max": maximum, "concat": concat, "topk": topk},
)


def _by_name(parts: Sequence[Outputs]) -> list[tuple[str, list[Array]]]:
    return [(name, [part[name] for part in parts]) for name in parts[0]]


def _numbers(name: str, array: Array) -> None:
    if array.dtype == object:
        raise SpecMismatch(f"output {name!r} is text, which cannot be added or compared")


def _sum(name: str, arrays: Sequence[Array]) -> npt.NDArray[Any]:
    _numbers(name, arrays[0])
    # Not for `kind == "f"` alone: NumPy does not count bfloat16 among its floats.
    is_short = arrays[0].dtype.itemsize == 2 and arrays[0].dtype.kind not in "iu"
    kept: npt.NDArray[Any] = arrays[0].astype(np.float32 if is_short else arrays[0].dtype)
    for array in arrays[1:]:
        kept = np.add(kept, array.astype(kept.dtype))
    return kept
