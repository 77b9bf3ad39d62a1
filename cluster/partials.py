"""A unit whose partitions are all asked the same: their answers, kept until all are there.

Decides when an answer is whole; the unit's combine then makes it, of the answers in the order of
the partitions, whichever came first. A partition that does not answer fails the request: what is
missing is never taken for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from batching.errors import Internal, ServingError
from cluster.routes import PlannedNode
from shards.combines import COMBINES
from shards.orders import part_address

__all__ = ["Partials", "Parts"]

Array = npt.NDArray[np.generic]


class Parts(Protocol):
    """What several actors are asked for, each a part, until all of it is there."""

    def address(self, partition: int) -> str:
        """What the actor of a part is asked for."""
        ...

    @property
    def is_complete(self) -> bool:
        """Whether every part has been answered."""
        ...

    def sizes(self, partition: int) -> tuple[int, ...]:
        """How many of a part's rows are of each table, where it is of several."""
        ...

    def put(self, partition: int, tensors: Sequence[Array]) -> None:
        """Take the answer to one part."""
        ...

    def outputs(self, rows: int) -> Sequence[tuple[PlannedNode, Mapping[str, Array]]]:
        """What there is then, and of which node; of the rows of one part's call."""
        ...


class Partials:
    """One call of a unit of a registered kind.

    Args:
        node: as it is planned.

    Raises:
        FailedPrecondition: the unit's combine is of a package that is not installed here.
    """

    def __init__(self, node: PlannedNode) -> None:
        self._node = node
        self._unit = node.unit
        self._names = node.outputs
        self._combine = COMBINES.get(node.combine) if len(node.holders) > 1 else None
        self._who = f"combine {node.combine!r}"
        self._parts: list[Mapping[str, Array] | None] = [None] * len(node.holders)

    def address(self, partition: int) -> str:
        """What the holder of a partition is asked for."""
        return part_address(self._unit, partition)

    def sizes(self, partition: int) -> tuple[int, ...]:
        """Not of tables."""
        return ()

    @property
    def is_complete(self) -> bool:
        """Whether every partition has answered."""
        return None not in self._parts

    def put(self, partition: int, tensors: Sequence[Array]) -> None:
        """Take one partition's outputs, in the unit's order."""
        self._parts[partition] = dict(zip(self._names, tensors, strict=True))

    def outputs(self, rows: int) -> Sequence[tuple[PlannedNode, Mapping[str, Array]]]:
        """The unit's outputs, once it is complete.

        Raises:
            ServingError: as the combine raised it, or INTERNAL where what it did is wrong.
        """
        parts = [part for part in self._parts if part is not None]
        assert len(parts) == len(self._parts), "asked before all partitions have answered"
        if self._combine is None:
            return [(self._node, parts[0])]
        for name, first in parts[0].items():
            # NumPy would stretch one to fit the other, and nobody would notice.
            if any((p[name].shape, p[name].dtype) != (first.shape, first.dtype) for p in parts):
                raise Internal(f"partitions answered output {name!r} in different shapes")
        try:
            made = self._combine(parts)
        except ServingError:
            raise
        except Exception as error:
            raise Internal(f"{self._who} failed: {type(error).__name__}: {error}") from error
        if made.keys() != parts[0].keys() or any(a.shape[:1] != (rows,) for a in made.values()):
            raise Internal(f"{self._who} lost an output, or rows of one")
        return [(self._node, made)]
