"""Units of kinds that packages register: a partition's files in, a function over rows out.

A kind is one callable: it is given a `UnitPart` and returns what answers calls, a function from
the unit's inputs to its outputs by name, each ``[rows, ...]``. It runs on the worker thread of a
shard actor, behind the bounds, deadlines, cancels and retries of every other unit. Where a unit
has several partitions each is hosted, asked and replicated by itself, and the router makes one
answer of theirs (`shards.combines`).

Does not know what a kind computes, nor where the partitions lie.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np

from batching.errors import FailedPrecondition, ServingError
from shards.combines import COMBINES, Combine
from shards.errands import Errands
from shards.functions import UnitFunction, checked
from shards.hosting import ServableVersion, UnitOpener
from shards.manifest import CustomUnit, Unit
from shards.orders import HostedUnit, LoadOrder, UnitState, part_address
from shards.registry import Registry
from shards.specs import Spec
from shards.store import Buffer, Store
from shards.worker import Handler, WorkerEngine

__all__ = ["UNIT_KINDS", "CustomUnitOpener", "UnitKind", "UnitPart"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitPart:
    """One partition of a unit, as its kind is given it.

    Attributes:
        index: which partition this is.
        count: how many there are.
        files: the partition's files by name: read-only mapped bytes, verified, valid as long as
            they are referred to. Read in place, they cost no memory of their own.
        options: the unit's options, as they were saved. They come from a store: hold them against
            what you expect.
        inputs: specs of what the function is called with; calls have been held against them.
        outputs: specs of what it must return.
    """

    index: int
    count: int
    files: Mapping[str, Buffer]
    options: Mapping[str, str | int | float | bool]
    inputs: Mapping[str, Spec]
    outputs: Mapping[str, Spec]


#: Opens a partition. Called on a thread of its own; may raise a `ServingError` with a code.
UnitKind: TypeAlias = Callable[[UnitPart], UnitFunction]

#: ``shardserve.units``: the kinds of units that a bundle may name besides ours.
UNIT_KINDS: Final[Registry[UnitKind]] = Registry("shardserve.units", "unit kind")


class CustomUnitOpener(UnitOpener):
    """Opens partitions and serves them on this process's worker thread.

    Args:
        engine: runs the functions.
        kinds: where kinds are looked up.
        combines: where combines are.
    """

    def __init__(
        self,
        engine: WorkerEngine,
        kinds: Registry[UnitKind] = UNIT_KINDS,
        combines: Registry[Combine] = COMBINES,
    ) -> None:
        self._engine = engine
        self._kinds = kinds
        self._combines = combines
        #: (unit, partition) to its bytes and how many orders want it
        self._held: dict[tuple[str, int], tuple[int, int]] = {}
        self._errands = Errands()

    @property
    def held_bytes(self) -> int:
        """Bytes of the files of what is open; what a kind's own code allocates is not in it."""
        return sum(nbytes for nbytes, _ in self._held.values())

    def estimate(self, unit: Unit, wanted: HostedUnit) -> int:
        """Bytes of the wanted partitions that are not open already.

        Raises:
            FailedPrecondition: the unit has no such partition.
        """
        assert isinstance(unit, CustomUnit)
        for index in wanted.partitions:
            if not 0 <= index < len(unit.partitions):
                raise FailedPrecondition(
                    f"partition {index} of unit {wanted.name!r} is wanted, it has "
                    f"{len(unit.partitions)}"
                )
        return sum(
            _size(unit, index) for index in wanted.partitions if (unit.id, index) not in self._held
        )

    async def open(self, store: Store, unit: Unit, wanted: HostedUnit, order: LoadOrder) -> None:
        """Map the partitions' files, have the kind open them, and serve them.

        Raises:
            FailedPrecondition: the kind or the combine is not installed here, or the kind could
                not open a partition.
            ServingError: as the kind raised it, or whatever is wrong with the files.
        """
        assert isinstance(unit, CustomUnit)
        fresh = [index for index in wanted.partitions if (unit.id, index) not in self._held]
        handlers = await self._errands.run(
            (order.servable, order.version),
            f"unit kind {unit.kind!r} for unit {unit.id[:12]}",
            lambda: self._open_parts(store, unit, fresh),
        )
        for index in wanted.partitions:
            nbytes, uses = self._held.get((unit.id, index), (_size(unit, index), 0))
            self._held[unit.id, index] = (nbytes, uses + 1)
        for index, handler in handlers.items():
            self._engine.install(part_address(unit.id, index), handler)

    def call_off(self, version: ServableVersion, reason: str) -> None:
        """Leave a kind that is opening partitions to itself; what it opens is dropped."""
        self._errands.call_off(version, reason)

    def state(self, unit: Unit, wanted: HostedUnit) -> UnitState:
        """The bytes of its partitions' files."""
        held = sum(self._held[unit.id, index][0] for index in wanted.partitions)
        return UnitState(id=unit.id, nbytes=held)

    async def close(self, unit: Unit, wanted: HostedUnit) -> None:
        """Stop serving the partitions that no other order wants."""
        for index in wanted.partitions:
            nbytes, uses = self._held[unit.id, index]
            if uses > 1:
                self._held[unit.id, index] = (nbytes, uses - 1)
                continue
            await self._engine.remove(part_address(unit.id, index))
            del self._held[unit.id, index]

    def _open_parts(
        self, store: Store, unit: CustomUnit, indices: Sequence[int]
    ) -> dict[int, Handler]:
        kind = self._kinds.get(unit.kind)
        if unit.combine:
            # Routers make one answer of the parts; a version that none could answer must not load.
            self._combines.get(unit.combine)
        handlers: dict[int, Handler] = {}
        for index in indices:
            part = UnitPart(
                index=index,
                count=len(unit.partitions),
                files={
                    name: store.map(blob).view(np.ndarray)
                    for name, blob in unit.partitions[index].items()
                },
                options=dict(unit.options),
                inputs=unit.inputs,
                outputs=unit.outputs,
            )
            try:
                handlers[index] = checked(
                    kind(part), unit.inputs, unit.outputs, f"unit kind {unit.kind!r}"
                )
            except ServingError:
                raise
            except Exception as error:
                raise FailedPrecondition(
                    f"unit kind {unit.kind!r} could not open partition {index}: "
                    f"{type(error).__name__}: {error}"
                ) from error
        return handlers


def _size(unit: CustomUnit, index: int) -> int:
    return sum(blob.size for blob in unit.partitions[index].values())
