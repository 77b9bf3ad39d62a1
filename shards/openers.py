"""How table and host units are brought up on an actor: mapped, left on disk, or called once.

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
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from batching.errors import FailedPrecondition, InvalidArgument
from shards.cold_rows import ColdRows, base_bytes, open_cold
from shards.crew import Crew
from shards.errands import Errands
from shards.functions import UnitFunction, checked
from shards.hosting import ServableVersion, UnitOpener
from shards.layout import Buffer
from shards.manifest import BlobRef, HostUnit, Partition, TableUnit, Unit
from shards.orders import CacheFigures, HostedUnit, LoadOrder, Residency, UnitState, part_address
from shards.overlays import Patch, index_bytes, read_overlay, view_rows
from shards.residency import settle
from shards.specs import dtype_of
from shards.store import Store
from shards.tables import HostedTable, plan_of
from shards.worker import Handler, WorkerEngine

__all__ = ["HostUnitOpener", "TableOpener", "import_entry_point"]

logger = logging.getLogger(__name__)

Array = npt.NDArray[np.generic]

#: Of all tables that an actor has in memory. Rows of less stay in a processor's cache: compiled
#: look-ups would gain nothing, and their compiler takes half a second to import.
_COMPILED_BYTES_MIN: Final = 8 << 20
#: Of all look-ups of a process together: memory, not threads, is what there is too little of.
_THREADS_MAX: Final = 2
#: Of all tables of a process whose rows are on disk: a disk answers so many at once faster.
_READERS: Final = 8


class TableOpener(UnitOpener):
    """Maps partitions and serves look-ups from where they lie.

    Versions may hold different partitions of one table; the worker is given their union. Tables
    that differ in overlays alone have the base in common: a blob is mapped once, whoever uses it.

    A base is in memory or in the NVMe tier, with one budget, for all of its users: as the first of
    them wants it, until nobody uses it. Overlays are in memory in either. A table with a base in
    the NVMe tier has a thread of its own, so that nobody else waits for its disk.
    """

    def __init__(self, engine: WorkerEngine) -> None:
        self._engine = engine
        self._parts: dict[str, dict[int, _Part]] = {}
        self._uses: Counter[tuple[str, int]] = Counter()
        #: partitions whose rows are locked in memory
        self._locked: set[tuple[str, int]] = set()
        #: by digest, and rows on disk by `_cold_key`: what is open, of how many bases and overlays
        self._blobs: dict[str, Buffer | ColdRows] = {}
        self._blob_uses: Counter[str] = Counter()
        #: by the same: bytes of it, holes of sparse tables and rows that are left on disk apart
        self._stored: dict[str, int] = {}
        self._tables: dict[str, TableUnit] = {}
        #: does compiled look-ups, once tables are large enough; None if nothing can compile them
        self._crew: Crew | None = None
        self._crew_made: asyncio.Future[Crew | None] | None = None
        self._readers = Crew(_READERS, "cold rows")
        self._errands = Errands()

    @property
    def held_bytes(self) -> int:
        """Bytes of the blobs that are open, each counted once, and of indices over them."""
        indices = sum(part.index_bytes for held in self._parts.values() for part in held.values())
        return indices + sum(self._stored[digest] for digest in self._blobs)

    @property
    def caches(self) -> dict[str, CacheFigures]:
        """Of tables in the NVMe tier, by unit; what several share is told of the first of them."""
        told: set[int] = set()
        found: dict[str, CacheFigures] = {}
        for unit_id, parts in self._parts.items():
            cold = {id(p.rows): p.rows for p in parts.values() if isinstance(p.rows, ColdRows)}
            mine = [rows.figures for key, rows in cold.items() if key not in told]
            if mine:
                found[unit_id] = sum(mine, CacheFigures())
            told |= cold.keys()
        return found

    def mapped(self, digest: str) -> Buffer | None:
        """See `UnitOpener.mapped`."""
        blob = self._blobs.get(digest)
        return None if isinstance(blob, ColdRows) else blob

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
        blobs: dict[str, int] = {}
        for part in fresh:
            if _cold_key(part) not in self._blobs:
                blobs[part.blob.digest] = base_bytes(part, wanted.cached)
            blobs.update((each.blob.digest, each.blob.stored) for each in part.overlays)
        return sum(size for digest, size in blobs.items() if digest not in self._blobs) + sum(
            index_bytes(part) for part in fresh
        )

    async def open(self, store: Store, unit: Unit, wanted: HostedUnit, order: LoadOrder) -> None:
        """Map the partitions and serve them."""
        assert isinstance(unit, TableUnit)
        held = self._parts.get(unit.id, {})
        fresh = [index for index in wanted.partitions if index not in held]
        blobs = {blob.digest: blob for index in fresh for blob in unit.partitions[index].blobs}
        # Mapping verifies a blob that was never verified: reading it may take a while.
        opening = _Opening(store, unit, wanted, self._readers)
        opened = await asyncio.to_thread(opening.parts, fresh, dict(self._blobs))
        await asyncio.to_thread(_settle, unit, wanted, {**held, **opened}, order.resident)
        had = self._crew
        if wanted.cached is None and self._mapped_bytes(opened) >= _COMPILED_BYTES_MIN:
            if self._crew_made is None:
                self._crew_made = asyncio.ensure_future(asyncio.to_thread(_make_crew))
            # Loads may wait for it one after the other: one that is called off stops none.
            version = (order.servable, order.version)
            self._crew = await self._errands.wait(version, self._crew_made)
        for part in opened.values():
            self._blobs.update(part.blobs)
            self._blob_uses.update(part.blobs.keys())
            for key, blob in part.blobs.items():
                is_cold = isinstance(blob, ColdRows)
                self._stored[key] = blob.nbytes if is_cold else blobs[key].stored
        for index in wanted.partitions:
            self._uses[unit.id, index] += 1
        self._note_locked(unit, wanted, order)
        self._tables[unit.id] = unit
        self._serve(unit, {**held, **opened})
        if self._crew is not had:
            # Those that were too small by themselves.
            for other in self._parts.keys() - {unit.id}:
                self._serve(self._tables[other], self._parts[other])

    def _mapped_bytes(self, opened: Mapping[int, _Part]) -> int:
        """Bytes of everything in memory, these partitions included."""
        blobs = dict(self._blobs)
        for part in opened.values():
            blobs.update(part.blobs)
        return sum(blob.nbytes for blob in blobs.values() if not isinstance(blob, ColdRows))

    async def join(
        self, store: Store, unit: Unit, wanted: HostedUnit, order: LoadOrder, room_bytes: int
    ) -> None:
        """Have what is mapped already in memory as this version declares it."""
        assert isinstance(unit, TableUnit)
        # What is only mapped is so already; another user may want more of it.
        if order.resident != "mapped":
            held = self._parts[unit.id]
            await asyncio.to_thread(_settle, unit, wanted, held, order.resident)
            self._note_locked(unit, wanted, order)
            self._serve(unit, held)

    def _note_locked(self, unit: TableUnit, wanted: HostedUnit, order: LoadOrder) -> None:
        if order.resident == "locked" and wanted.cached is None:
            self._locked.update((unit.id, index) for index in wanted.partitions)

    def call_off(self, version: ServableVersion, reason: str) -> None:
        """Stop waiting for the compiler of look-ups, which goes on for the next load."""
        self._errands.call_off(version, reason)

    def state(self, unit: Unit, wanted: HostedUnit) -> UnitState:
        """The bytes of its partitions; what another table uses as well is in both."""
        held = self._parts.get(unit.id, {})
        blobs = {d: self._stored[d] for i in wanted.partitions for d in held[i].blobs}
        indices = sum(held[i].index_bytes for i in wanted.partitions)
        bases = [held[i].rows for i in wanted.partitions if len(held[i].rows)]
        cold = [base for base in bases if isinstance(base, ColdRows)]
        note = ""
        if wanted.cached is None and cold:
            note = "its rows stay in the NVMe tier, in which another version has opened them"
        elif wanted.cached is not None and len(cold) < len(bases):
            note = "its rows stay in memory, where another version has opened them"
        return UnitState(
            id=unit.id,
            nbytes=sum(blobs.values()) + indices,
            note=note,
            cache=sum((base.figures for base in cold), CacheFigures()) if cold else None,
        )

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
        self._locked.difference_update((unit.id, index) for index in held.keys() - left.keys())
        if left:
            self._serve(unit, left)
        else:
            self._parts.pop(unit.id, None)
            self._tables.pop(unit.id, None)
        if unit.columns:
            for index in held.keys() - left.keys():
                await self._engine.remove(part_address(unit.id, index))
        elif not left:
            await self._engine.remove(unit.id)

    def _serve(self, unit: TableUnit, parts: dict[int, _Part]) -> None:
        self._parts[unit.id] = parts
        if not unit.columns:
            self._install(unit, parts, self._stay(unit, parts))
            return
        for index, part in parts.items():
            # Nobody asks for some columns of one partition and others of another in one call.
            self._install(unit.piece(index), {0: part}, self._stay(unit, {index: part}))

    def _stay(self, unit: TableUnit, parts: Mapping[int, _Part]) -> bool:
        """Whether all of some partitions is in memory to stay; what lies over a base is not."""
        return all(
            (unit.id, index) in self._locked and part.patch is None for index, part in parts.items()
        )

    def _install(self, unit: TableUnit, parts: Mapping[int, _Part], never_waits: bool) -> None:
        table = HostedTable(
            unit,
            {index: part.rows for index, part in parts.items()},
            {index: part.patch for index, part in parts.items() if part.patch is not None},
            self._crew,
        )
        row_bytes = unit.dim * max(dtype_of(unit.dtype).itemsize, 4)  # what is pooled has 4
        is_cold = any(isinstance(part.rows, ColdRows) for part in parts.values())
        self._engine.install(
            unit.id,
            _look_up(table),
            row_bytes,
            plan_of(unit),
            table,
            own_thread=is_cold,
            never_waits=never_waits,
        )


class _Part(NamedTuple):
    """An open partition: the rows of its base, what lies over them, and every blob of these."""

    rows: Array | ColdRows
    patch: Patch | None
    blobs: Mapping[str, Buffer | ColdRows]

    @property
    def index_bytes(self) -> int:
        return 0 if self.patch is None else self.patch.nbytes


def _look_up(table: HostedTable) -> Handler:
    def rows(inputs: Sequence[Array]) -> Sequence[Array]:
        if len(inputs) != 1 or inputs[0].dtype != np.int64 or inputs[0].ndim != 1:
            raise InvalidArgument("a look-up takes one tensor of int64 ids")
        return [table.rows(inputs[0])]  # type: ignore[arg-type]

    return rows


def _make_crew() -> Crew | None:
    """Compile the look-ups, or read them from disk: nothing is compiled when they are asked for."""
    try:
        importlib.import_module("shards.resident")
    except Exception as error:  # it is not there, or not for this processor: numba says which
        logger.warning("rows are looked up by NumPy, which is slower: %s", error)
        return None
    return Crew(min(len(os.sched_getaffinity(0)), _THREADS_MAX))


def _settle(
    unit: TableUnit, wanted: HostedUnit, parts: Mapping[int, _Part], residency: Residency
) -> None:
    for index in wanted.partitions:
        rows = parts[index].rows
        if not isinstance(rows, ColdRows):
            settle(rows, unit.partitions[index].blob, residency)


def _cold_key(part: Partition) -> str:
    """By what rows on disk are known: tables of other rows may have the same bytes."""
    return f"{part.blob.digest}/{part.rows}"


class _Opening(NamedTuple):
    """Partitions of a table that are being opened."""

    store: Store
    unit: TableUnit
    wanted: HostedUnit
    readers: Crew

    def parts(
        self, indices: Sequence[int], found: dict[str, Buffer | ColdRows]
    ) -> dict[int, _Part]:
        """Open some, given what is open already."""
        return {index: self._part(index, found) for index in indices}

    def _part(self, index: int, found: dict[str, Buffer | ColdRows]) -> _Part:
        unit, partition = self.unit, self.unit.partitions[index]
        key, base = self._base(partition, found)
        blobs = {key: base}
        held = unit.piece(index) if unit.columns else unit
        rows = base if isinstance(base, ColdRows) else view_rows(held, base)
        overlays = []
        for each in partition.overlays:
            raw = blobs[each.blob.digest] = self._map(each.blob, found)
            overlays.append(read_overlay(unit, index, each, raw))
        return _Part(rows, Patch(overlays) if overlays else None, blobs)

    def _base(
        self, part: Partition, found: dict[str, Buffer | ColdRows]
    ) -> tuple[str, Buffer | ColdRows]:
        """As it is open already, or else as it is wanted."""
        key = _cold_key(part)
        cached = self.wanted.cached
        if key not in found:
            if cached is None or not part.rows or part.blob.digest in found:
                return part.blob.digest, self._map(part.blob, found)
            found[key] = open_cold(self.store, part, cached, self.readers)
        return key, found[key]

    def _map(self, ref: BlobRef, found: dict[str, Buffer | ColdRows]) -> Buffer:
        blob = found.get(ref.digest)
        if blob is None:
            blob = found[ref.digest] = self.store.map(ref)
        assert not isinstance(blob, ColdRows), "those have other keys"
        return blob


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
