"""How table and host units are brought up on an actor: mapped, or imported and called once.

Neither needs a device; the opener of map units is `shards.device_units`.
"""

from __future__ import annotations

import asyncio
import fnmatch
import importlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from batching.errors import FailedPrecondition, InvalidArgument
from shards.bags import POOL_OPS, offsets_of
from shards.errands import Errands
from shards.functions import UnitFunction, checked
from shards.hosting import ServableVersion, UnitOpener
from shards.layout import Buffer
from shards.manifest import HostUnit, TableUnit, Unit
from shards.orders import HostedUnit, LoadOrder, Residency, UnitState, part_address
from shards.overlays import Patch, index_bytes, read_overlay, view_rows
from shards.pooling import Partial
from shards.progress import Progress
from shards.residency import settle
from shards.specs import dtype_of
from shards.store import Store
from shards.tables import HostedTable, plan_of
from shards.worker import Handler, WorkerEngine

if TYPE_CHECKING:
    from shards.resident import Crew

__all__ = ["HostUnitOpener", "OpenerByKind", "TableOpener", "import_entry_point"]

logger = logging.getLogger(__name__)

Array = npt.NDArray[np.generic]

#: Rows of a smaller table stay in a processor's cache: compiled look-ups would gain nothing, and
#: their compiler takes half a second to import.
_COMPILED_BYTES_MIN: Final = 8 << 20
#: Of all look-ups of a process together: memory, not threads, is what there is too little of.
_THREADS_MAX: Final = 2


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

    def mapped(self, digest: str) -> Buffer | None:
        """See `UnitOpener.mapped`."""
        found = (opener.mapped(digest) for opener in self._openers.values())
        return next((blob for blob in found if blob is not None), None)

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

    def call_off(self, version: ServableVersion, reason: str) -> None:
        """See `UnitOpener.call_off`."""
        for opener in self._openers.values():
            opener.call_off(version, reason)

    def buckets(self, unit: Unit, wanted: HostedUnit) -> int:
        """See `UnitOpener.buckets`."""
        return self._of(unit).buckets(unit, wanted)

    def compiled(self, version: ServableVersion) -> Progress | None:
        """See `UnitOpener.compiled`."""
        found = (opener.compiled(version) for opener in self._openers.values())
        return next((each for each in found if each is not None), None)

    def give_back(self) -> None:
        """See `UnitOpener.give_back`."""
        for opener in self._openers.values():
            opener.give_back()

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

    Versions may hold different partitions of one table; the worker is given their union. Tables
    that differ in overlays alone have the base in common: a blob is mapped once, whoever uses it.
    """

    def __init__(self, engine: WorkerEngine) -> None:
        self._engine = engine
        self._parts: dict[str, dict[int, _Part]] = {}
        self._uses: Counter[tuple[str, int]] = Counter()
        #: by digest: what is mapped, and how many bases and overlays it is
        self._blobs: dict[str, Buffer] = {}
        self._blob_uses: Counter[str] = Counter()
        #: by digest: bytes of what is mapped, the holes of sparse tables apart
        self._stored: dict[str, int] = {}
        #: does compiled look-ups, once a table is large enough; None if nothing can compile them
        self._crew: Crew | None = None
        self._crew_made: asyncio.Future[Crew | None] | None = None
        self._errands = Errands()

    @property
    def held_bytes(self) -> int:
        """Bytes of the blobs that are mapped, each counted once, and of indices over them."""
        indices = sum(part.index_bytes for held in self._parts.values() for part in held.values())
        return indices + sum(self._stored[digest] for digest in self._blobs)

    def mapped(self, digest: str) -> Buffer | None:
        """See `UnitOpener.mapped`."""
        return self._blobs.get(digest)

    def estimate(self, unit: Unit, wanted: HostedUnit) -> int:
        """Bytes of what the wanted partitions need and is not mapped already.

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
        held = self._parts.get(unit.id, {})
        fresh = [unit.partitions[index] for index in wanted.partitions if index not in held]
        blobs = {blob.digest: blob.stored for part in fresh for blob in part.blobs}
        return sum(size for digest, size in blobs.items() if digest not in self._blobs) + sum(
            index_bytes(part) for part in fresh
        )

    async def open(self, store: Store, unit: Unit, wanted: HostedUnit, order: LoadOrder) -> None:
        """Map the partitions and serve them."""
        assert isinstance(unit, TableUnit)
        held = self._parts.get(unit.id, {})
        fresh = [index for index in wanted.partitions if index not in held]
        blobs = {blob.digest: blob for index in fresh for blob in unit.partitions[index].blobs}
        here = {digest: self._blobs[digest] for digest in blobs if digest in self._blobs}
        # Mapping verifies a blob that was never verified: reading it may take a while.
        opened = await asyncio.to_thread(_open_parts, store, unit, fresh, here)
        await asyncio.to_thread(_settle, unit, wanted, {**held, **opened}, order.resident)
        if sum(blob.size for blob in blobs.values()) >= _COMPILED_BYTES_MIN:
            if self._crew_made is None:
                self._crew_made = asyncio.ensure_future(asyncio.to_thread(_make_crew))
            # Loads may wait for it one after the other: one that is called off stops none.
            version = (order.servable, order.version)
            self._crew = await self._errands.wait(version, self._crew_made)
        for part in opened.values():
            self._blobs.update(part.blobs)
            self._blob_uses.update(part.blobs.keys())
        self._stored.update((ref.digest, ref.stored) for ref in blobs.values())
        for index in wanted.partitions:
            self._uses[unit.id, index] += 1
        self._serve(unit, {**held, **opened})

    async def join(
        self, store: Store, unit: Unit, wanted: HostedUnit, order: LoadOrder, room_bytes: int
    ) -> None:
        """Have what is mapped already in memory as this version declares it."""
        assert isinstance(unit, TableUnit)
        # What is only mapped is so already; another user may want more of it.
        if order.resident != "mapped":
            held = self._parts[unit.id]
            await asyncio.to_thread(_settle, unit, wanted, held, order.resident)

    def call_off(self, version: ServableVersion, reason: str) -> None:
        """Stop waiting for the compiler of look-ups, which goes on for the next load."""
        self._errands.call_off(version, reason)

    def state(self, unit: Unit, wanted: HostedUnit) -> UnitState:
        """The bytes of its partitions; what another table uses as well is in both."""
        held = self._parts.get(unit.id, {})
        blobs = {d: self._stored[d] for i in wanted.partitions for d in held[i].blobs}
        indices = sum(held[i].index_bytes for i in wanted.partitions)
        return UnitState(id=unit.id, nbytes=sum(blobs.values()) + indices)

    async def close(self, unit: Unit, wanted: HostedUnit) -> None:
        """Unmap the partitions that no other version uses, and what nobody else needs of them."""
        assert isinstance(unit, TableUnit)
        self._uses.subtract((unit.id, index) for index in wanted.partitions)
        self._uses += Counter()  # forgets what is at zero
        held = self._parts.get(unit.id, {})
        for index, part in held.items():
            if (unit.id, index) not in self._uses:
                self._blob_uses.subtract(part.blobs.keys())
        self._blob_uses += Counter()
        self._blobs = {d: blob for d, blob in self._blobs.items() if d in self._blob_uses}
        self._stored = {digest: self._stored[digest] for digest in self._blobs}
        left = {i: part for i, part in held.items() if (unit.id, i) in self._uses}
        if left:
            self._serve(unit, left)
        else:
            self._parts.pop(unit.id, None)
        if unit.columns:
            for index in held.keys() - left.keys():
                await self._engine.remove(part_address(unit.id, index))
        elif not left:
            await self._engine.remove(unit.id)

    def _serve(self, unit: TableUnit, parts: dict[int, _Part]) -> None:
        self._parts[unit.id] = parts
        if not unit.columns:
            self._install(unit, parts)
            return
        for index, part in parts.items():
            # Nobody asks for some columns of one partition and others of another in one call.
            self._install(unit.piece(index), {0: part})

    def _install(self, unit: TableUnit, parts: Mapping[int, _Part]) -> None:
        table = HostedTable(
            unit,
            {index: part.rows for index, part in parts.items()},
            {index: part.patch for index, part in parts.items() if part.patch is not None},
            self._crew,
        )
        row_bytes = unit.dim * max(dtype_of(unit.dtype).itemsize, 4)  # what is pooled has 4
        ops = POOL_OPS if table.can_pool else ()
        pools: dict[str, Handler] = {op: _pool(table, op) for op in ops}
        self._engine.install(unit.id, _look_up(table), row_bytes, plan_of(unit), pools)


class _Part(NamedTuple):
    """An open partition: the rows of its base, what lies over them, and every blob of these."""

    rows: Array
    patch: Patch | None
    blobs: Mapping[str, Buffer]

    @property
    def index_bytes(self) -> int:
        return 0 if self.patch is None else self.patch.nbytes


def _look_up(table: HostedTable) -> Handler:
    def rows(inputs: Sequence[Array]) -> Sequence[Array]:
        if len(inputs) != 1 or inputs[0].dtype != np.int64 or inputs[0].ndim != 1:
            raise InvalidArgument("a look-up takes one tensor of int64 ids")
        return [table.rows(inputs[0])]  # type: ignore[arg-type]

    return rows


def _pool(table: HostedTable, op: Partial) -> Handler:
    def rows(inputs: Sequence[Array]) -> Sequence[Array]:
        counts, ids, weights = (*inputs, None) if len(inputs) == 2 else inputs
        assert counts is not None
        assert ids is not None
        return [table.pool(ids, offsets_of(counts), op, weights)]

    return rows


def _make_crew() -> Crew | None:
    """Compile the look-ups, or read them from disk: nothing is compiled when they are asked for."""
    try:
        from shards.resident import Crew
    except Exception as error:  # it is not there, or not for this processor: numba says which
        logger.warning("rows are looked up by NumPy, which is slower: %s", error)
        return None
    return Crew(min(len(os.sched_getaffinity(0)), _THREADS_MAX))


def _settle(
    unit: TableUnit, wanted: HostedUnit, parts: Mapping[int, _Part], residency: Residency
) -> None:
    for index in wanted.partitions:
        settle(parts[index].rows, unit.partitions[index].blob, residency)


def _open_parts(
    store: Store, unit: TableUnit, indices: Sequence[int], here: Mapping[str, Buffer]
) -> dict[int, _Part]:
    mapped = dict(here)
    parts: dict[int, _Part] = {}
    for index in indices:
        partition = unit.partitions[index]
        for ref in partition.blobs:
            if ref.digest not in mapped:
                mapped[ref.digest] = store.map(ref)
        blobs = {ref.digest: mapped[ref.digest] for ref in partition.blobs}
        overlays = [
            read_overlay(unit, index, each, blobs[each.blob.digest]) for each in partition.overlays
        ]
        held = unit.piece(index) if unit.columns else unit
        rows = view_rows(held, blobs[partition.blob.digest])
        parts[index] = _Part(rows, Patch(overlays) if overlays else None, blobs)
    return parts


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
        self._errands = Errands()

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
        fn = await self._errands.run(
            (order.servable, order.version),
            f"entry point {unit.entry_point!r} of unit {unit.id[:12]}",
            lambda: _call_entry_point(store, unit, self._allowed),
        )
        handler = checked(fn, unit.inputs, unit.outputs, f"host unit {unit.entry_point!r}")
        self._engine.install(unit.id, handler)
        self._held[unit.id] = _files_bytes(unit)

    def call_off(self, version: ServableVersion, reason: str) -> None:
        """Leave an entry point that is being called to itself; what it returns is dropped."""
        self._errands.call_off(version, reason)

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
