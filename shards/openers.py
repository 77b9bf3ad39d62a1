"""How table and host units are brought up on an actor: mapped, or imported and called once.

Neither needs a device; the opener of map units is `shards.device_units`.
"""

from __future__ import annotations

import asyncio
import fnmatch
import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from batching.errors import FailedPrecondition, InvalidArgument
from shards.functions import UnitFunction, checked
from shards.hosting import ServableVersion, UnitOpener
from shards.manifest import HostUnit, TableUnit, Unit
from shards.orders import HostedUnit, LoadOrder, UnitState
from shards.specs import dtype_of
from shards.store import Store
from shards.tables import HostedTable, plan_of
from shards.worker import Handler, WorkerEngine

__all__ = ["HostUnitOpener", "OpenerByKind", "TableOpener", "import_entry_point"]

logger = logging.getLogger(__name__)

Array = npt.NDArray[np.generic]


class OpenerByKind(UnitOpener):
    """Passes every unit to the opener of its kind.

    Args:
        openers: type of unit to the opener of such units.
    """

    def __init__(self, openers: Mapping[type[Unit], UnitOpener]) -> None:
        self._openers = dict(openers)

    @property
    def held_bytes(self) -> int:
        """Bytes that all of them hold."""
        return sum(opener.held_bytes for opener in self._openers.values())

    def estimate(self, unit: Unit, wanted: HostedUnit) -> int:
        """See `UnitOpener.estimate`."""
        return self._of(unit).estimate(unit, wanted)

    async def open(self, store: Store, unit: Unit, wanted: HostedUnit, order: LoadOrder) -> None:
        """See `UnitOpener.open`."""
        await self._of(unit).open(store, unit, wanted, order)

    async def join(
        self, store: Store, unit: Unit, wanted: HostedUnit, order: LoadOrder, room_bytes: int
    ) -> None:
        """See `UnitOpener.join`."""
        await self._of(unit).join(store, unit, wanted, order, room_bytes)

    async def leave(self, unit: Unit, wanted: HostedUnit, version: ServableVersion) -> None:
        """See `UnitOpener.leave`."""
        await self._of(unit).leave(unit, wanted, version)

    def state(self, unit: Unit, wanted: HostedUnit) -> UnitState:
        """See `UnitOpener.state`."""
        return self._of(unit).state(unit, wanted)

    async def close(self, unit: Unit, wanted: HostedUnit) -> None:
        """See `UnitOpener.close`."""
        await self._of(unit).close(unit, wanted)

    def _of(self, unit: Unit) -> UnitOpener:
        opener = self._openers.get(type(unit))
        if opener is None:
            raise FailedPrecondition(f"units of type {type(unit).__name__} are not hosted here")
        return opener


class TableOpener(UnitOpener):
    """Maps partitions and serves look-ups from where they lie.

    Versions may hold different partitions of one table; the worker is given their union.
    """

    def __init__(self, engine: WorkerEngine) -> None:
        self._engine = engine
        self._partitions: dict[str, dict[int, Array]] = {}
        self._uses: dict[tuple[str, int], int] = {}

    @property
    def held_bytes(self) -> int:
        """Bytes of the partitions that are mapped, each counted once."""
        return sum(array.nbytes for held in self._partitions.values() for array in held.values())

    def estimate(self, unit: Unit, wanted: HostedUnit) -> int:
        """Bytes of the wanted partitions that are not mapped already.

        Raises:
            FailedPrecondition: the table has no such partition.
        """
        assert isinstance(unit, TableUnit)
        for index in wanted.partitions:
            if not 0 <= index < len(unit.partitions):
                raise FailedPrecondition(
                    f"partition {index} of table {wanted.name!r} is wanted, it has "
                    f"{len(unit.partitions)}"
                )
        held = self._partitions.get(unit.id, {})
        return sum(unit.partitions[i].blob.size for i in wanted.partitions if i not in held)

    async def open(self, store: Store, unit: Unit, wanted: HostedUnit, order: LoadOrder) -> None:
        """Map the partitions and serve them."""
        assert isinstance(unit, TableUnit)
        held = self._partitions.get(unit.id, {})
        fresh = [index for index in wanted.partitions if index not in held]
        # Mapping verifies a blob that was never verified: reading it may take a while.
        mapped = await asyncio.to_thread(_map_partitions, store, unit, fresh)
        partitions = {**self._partitions.get(unit.id, {}), **mapped}
        for index in wanted.partitions:
            self._uses[unit.id, index] = self._uses.get((unit.id, index), 0) + 1
        self._serve(unit, partitions)

    def state(self, unit: Unit, wanted: HostedUnit) -> UnitState:
        """The bytes of its partitions."""
        held = self._partitions.get(unit.id, {})
        return UnitState(id=unit.id, nbytes=sum(held[i].nbytes for i in wanted.partitions))

    async def close(self, unit: Unit, wanted: HostedUnit) -> None:
        """Unmap the partitions that no other version uses."""
        assert isinstance(unit, TableUnit)
        for index in wanted.partitions:
            self._uses[unit.id, index] -= 1
            if not self._uses[unit.id, index]:
                del self._uses[unit.id, index]
        held = self._partitions.get(unit.id, {})
        left = {i: array for i, array in held.items() if (unit.id, i) in self._uses}
        if left:
            self._serve(unit, left)
        else:
            self._partitions.pop(unit.id, None)
            await self._engine.remove(unit.id)

    def _serve(self, unit: TableUnit, partitions: dict[int, Array]) -> None:
        self._partitions[unit.id] = partitions
        table = HostedTable(unit, partitions)
        row_bytes = unit.dim * dtype_of(unit.dtype).itemsize
        self._engine.install(unit.id, _look_up(table), row_bytes, plan_of(unit))


def _look_up(table: HostedTable) -> Handler:
    def rows(inputs: Sequence[Array]) -> Sequence[Array]:
        if len(inputs) != 1 or inputs[0].dtype != np.int64 or inputs[0].ndim != 1:
            raise InvalidArgument("a look-up takes one tensor of int64 ids")
        return [table.rows(inputs[0])]  # type: ignore[arg-type]

    return rows


def _map_partitions(store: Store, unit: TableUnit, indices: Sequence[int]) -> dict[int, Array]:
    mapped: dict[int, Array] = {}
    for index in indices:
        partition = unit.partitions[index]
        # The plain view drops np.memmap, whose every slice copies attributes.
        raw = store.map(partition.blob).view(np.ndarray)
        mapped[index] = raw.view(dtype_of(unit.dtype)).reshape(partition.rows, unit.dim)
    return mapped


class HostUnitOpener(UnitOpener):
    """Imports registered entry points and calls them on the worker thread of this process.

    Args:
        engine: runs the functions.
        allowed: patterns of entry points that may be imported, as in `fnmatch`. A manifest is
            data from a store: what it names is imported only if the cluster's owner listed it.
    """

    def __init__(self, engine: WorkerEngine, allowed: Sequence[str]) -> None:
        self._engine = engine
        self._allowed = tuple(allowed)
        self._held: dict[str, int] = {}

    @property
    def held_bytes(self) -> int:
        """Bytes of the files of the units that are open."""
        return sum(self._held.values())

    def estimate(self, unit: Unit, wanted: HostedUnit) -> int:
        """Bytes of the unit's files, if it is not open; what its code allocates is its own."""
        return 0 if unit.id in self._held else _files_bytes(unit)

    async def open(self, store: Store, unit: Unit, wanted: HostedUnit, order: LoadOrder) -> None:
        """Import and call the entry point, then serve what it returned."""
        assert isinstance(unit, HostUnit)
        fn = await asyncio.to_thread(_call_entry_point, store, unit, self._allowed)
        handler = checked(fn, unit.inputs, unit.outputs, f"host unit {unit.entry_point!r}")
        self._engine.install(unit.id, handler)
        self._held[unit.id] = _files_bytes(unit)

    def state(self, unit: Unit, wanted: HostedUnit) -> UnitState:
        """The bytes of its files."""
        return UnitState(id=unit.id, nbytes=self._held[unit.id])

    async def close(self, unit: Unit, wanted: HostedUnit) -> None:
        """Stop serving the unit."""
        await self._engine.remove(unit.id)
        self._held.pop(unit.id, None)


def _files_bytes(unit: Unit) -> int:
    assert isinstance(unit, HostUnit)
    return sum(ref.size for ref in unit.files.values())


def import_entry_point(entry_point: str, allowed: Sequence[str]) -> Callable[..., Any]:
    """The object that ``module:attribute`` names.

    Raises:
        FailedPrecondition: it is not allowed, or cannot be imported.
    """
    if not any(fnmatch.fnmatchcase(entry_point, pattern) for pattern in allowed):
        raise FailedPrecondition(
            f"host unit {entry_point!r} is not allowed on this cluster; add it to "
            "cluster.allow_entry_points"
        )
    module, _, attribute = entry_point.partition(":")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise FailedPrecondition(
            f"host unit {entry_point!r} cannot be imported: {error}"
        ) from error
    return found


def _call_entry_point(store: Store, unit: HostUnit, allowed: Sequence[str]) -> UnitFunction:
    load = import_entry_point(unit.entry_point, allowed)
    files = {name: store.map(ref).tobytes() for name, ref in unit.files.items()}
    fn: UnitFunction = load(files, dict(unit.options))
    return fn
