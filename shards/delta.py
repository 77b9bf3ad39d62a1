"""Writing a version as what is different from another: a few rows of tables, perhaps a unit.

    with shards.Bundle.delta("store", "ranker", base=7, version=8) as bundle:
        bundle.update_rows("users", ids, rows)

Decides which overlays a table gets and what of the base may be replaced. Everything else is taken
over by reference: no blob of the base is read or copied. The new version is whole by itself: the
base may be removed, and `gc` keeps the blobs that are still referred to.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from batching.errors import InvalidArgument, NotFound
from shards.bundle import Bundle
from shards.checking import OVERLAYS_MAX, blobs_of
from shards.errors import SpecMismatch
from shards.folding import Folds, put_folded
from shards.identity import table_identity
from shards.keys import places_of
from shards.leaves import dtype_name
from shards.manifest import Manifest, Overlay, Partition, TableUnit, Unit, Warmups
from shards.overlays import Replaced, merged, put_overlay, read_overlay
from shards.progress import Progress
from shards.store import Store
from shards.stored_rows import encoded
from shards.warmups import put_warmups, read_warmups

__all__ = ["Delta"]

#: Blobs of the base that are looked for at the same time.
_THREADS: Final = 8

Array = npt.NDArray[np.generic]


class Delta(Bundle):
    """A bundle that begins as a copy of another version; `Bundle.delta` makes one.

    Units are replaced by adding one of the same name that takes and yields the same; units and
    signatures may be added; none can be removed.

    Args:
        store: has the base, and takes the new version.
        base: what the new version begins as.
        version: of the new version.
        overwrite: replace a version that exists.

    Raises:
        ServingError: a blob of the base is missing, or the store does not answer.
    """

    def __init__(
        self, store: Store, base: Manifest, version: int, *, overwrite: bool = False
    ) -> None:
        super().__init__(store, base.name, version, overwrite=overwrite)
        self._base = base
        #: by table and partition, one for each call
        self._updates: dict[str, dict[int, list[Replaced]]] = {}
        self._folds = Folds(store)
        self._units.update(base.units)
        self._references.update(base.references)
        self._signatures.update(base.signatures)
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="delta") as pool:
            # Touched, as if written now: whoever removes the base meanwhile, and sweeps, must not
            # take away what is relied on here.
            list(pool.map(lambda ref: store.bring(ref, store), blobs_of(base).values()))

    def update_rows(self, table: str, ids: Any, rows: Any) -> None:
        """Replace rows of a table.

        They are kept in memory until the bundle is committed, and are copied now. Of several calls
        that give one row, the last counts.

        Args:
            table: a table of the base.
            ids: ``[n]`` integers: which rows, by number; of keys `shards.hashed_rows` has them.
                Rows are not added: what an id means to the routers is how the base is cut.
            rows: ``[n, dim]``, of the table's dtype: what they are from now on.

        Raises:
            NotFound: the base has no such table.
            InvalidArgument: an id is outside the table or comes twice, or the table is replaced.
            SpecMismatch: ids are no integers, or rows have another shape or dtype than the table's.
        """
        unit = self._table(table)
        where, values = _checked(table, unit, np.asarray(ids), np.asarray(rows))
        if unit.columns:
            stops = np.cumsum(unit.columns)
            for index, stop in enumerate(stops.tolist()):
                columns = values[:, stop - unit.columns[index] : stop]
                self._update(table, unit, index, Replaced(where, columns))
            return
        first_rows = np.array([part.first_row for part in unit.partitions], np.int64)
        edges = np.searchsorted(where, [*first_rows[1:], unit.rows])
        start = 0
        for index, stop in enumerate(edges.tolist()):
            if stop > start:
                positions = where[start:stop] - first_rows[index]
                self._update(table, unit, index, Replaced(positions, values[start:stop]))
            start = stop

    def _update(self, table: str, unit: TableUnit, index: int, given: Replaced) -> None:
        stored = Replaced(given.positions, encoded(unit.stored, given.rows))
        self._updates.setdefault(table, {}).setdefault(index, []).append(stored)

    def compact(self, progress: Progress | None = None) -> tuple[str, ...]:
        """Write the partitions that have overlays anew, without them.

        The rows stay what they are. Each partition becomes one new blob, written in pieces; the
        base's blobs stay for whoever refers to them, and go by `gc` when nobody does.

        Args:
            progress: told of every piece, and asked whether to go on.

        Returns:
            The names of the tables that were written.

        Raises:
            InvalidArgument: rows of such a table are updated.
            Cancelled: `progress` says so.
            ServingError: a blob is missing or corrupt.
        """
        tables = {
            name: unit
            for name, unit in self._base.units.items()
            if isinstance(unit, TableUnit) and any(part.overlays for part in unit.partitions)
        }
        if progress is not None:
            parts = [part for unit in tables.values() for part in unit.partitions if part.overlays]
            progress.total = sum(part.blob.size for part in parts)
        for name, unit in tables.items():
            self._check_new(name)
            parts_of = enumerate(unit.partitions)
            folded = tuple(self._folded(unit, index, part, progress) for index, part in parts_of)
            identity = table_identity(unit.dtype, unit.dim, folded, unit.stored)
            self._units[name] = msgspec.structs.replace(unit, id=identity, partitions=folded)
        return tuple(tables)

    def commit(self) -> Manifest:
        """Write the overlays and the manifest; see `Bundle.commit`.

        Raises:
            SpecMismatch: a unit was replaced by one that takes or yields something else.
        """
        for name, unit in self._base.units.items():
            _check_replaced(name, unit, self._units[name])
        for name, updates in self._updates.items():
            self._units[name] = self._updated(name, updates)
        self._updates.clear()
        return super().commit()

    def _put_warmups(self) -> Warmups | None:
        # The signatures are the base's, so what warms it up warms this, too.
        if not self._recorded:
            return self._base.warmups
        where = f"{self.name}/{self.version}"
        return put_warmups(
            self._store, self._recorded, where, read_warmups(self._store, self._base)
        )

    def _check_new(self, name: str) -> None:
        if name in self._updates:
            raise InvalidArgument(f"rows of {name!r} are updated: it cannot be replaced as well")
        if name not in self._base.units or self._units[name] is not self._base.units[name]:
            super()._check_new(name)

    def _table(self, name: str) -> TableUnit:
        unit = self._base.units.get(name)
        if not isinstance(unit, TableUnit):
            raise NotFound(f"{self.name}/{self._base.version} has no table {name!r}")
        if self._units.get(name) is not unit:
            raise InvalidArgument(f"table {name!r} is replaced: its rows cannot be updated as well")
        return unit

    def _folded(
        self, unit: TableUnit, index: int, part: Partition, progress: Progress | None
    ) -> Partition:
        if not part.overlays:
            return part

        ahead = self._folds.base_of(unit, part)
        if not ahead.overlays:
            return ahead
        blob = put_folded(self._store, unit, index, progress)
        return msgspec.structs.replace(part, blob=blob, overlays=())

    def _updated(self, name: str, updates: dict[int, list[Replaced]]) -> TableUnit:
        unit = self._table(name)
        parts = tuple(
            self._overlaid(name, unit, index, updates[index]) if index in updates else part
            for index, part in enumerate(unit.partitions)
        )
        identity = table_identity(unit.dtype, unit.dim, parts, unit.stored)
        return msgspec.structs.replace(unit, id=identity, partitions=parts)

    def _overlaid(
        self, name: str, unit: TableUnit, index: int, updates: list[Replaced]
    ) -> Partition:
        part = self._folds.base_of(unit, unit.partitions[index])
        if folded := len(unit.partitions[index].overlays) - len(part.overlays):
            self.notices.append(
                f"table {name!r}, partition {index}: {folded} overlays were folded into its base "
                f"ahead of time"
            )
        overlays: tuple[Overlay, ...] = part.overlays
        if len(overlays) == OVERLAYS_MAX:
            self.notices.append(
                f"table {name!r}, partition {index}: its {OVERLAYS_MAX} overlays and the new rows "
                f"are written as one"
            )
            before = [
                read_overlay(unit, index, each, self._store.map(each.blob)) for each in overlays
            ]
            overlays, updates = (), [*before, *updates]
        overlay = put_overlay(self._store, merged(updates))
        return msgspec.structs.replace(part, overlays=(*overlays, overlay))


def _checked(
    name: str, unit: TableUnit, ids: Array, rows: Array
) -> tuple[npt.NDArray[np.int64], Array]:
    """Where rows are to lie, ascending, and the rows, copied."""
    if ids.ndim != 1 or (ids.dtype.kind not in "iu" and ids.size):
        raise SpecMismatch(f"table {name!r}: ids must be [n] integers, got {ids.dtype}{ids.shape}")
    if rows.shape != (len(ids), unit.dim):
        raise SpecMismatch(
            f"table {name!r}: rows for {len(ids)} ids must be [{len(ids)}, {unit.dim}], got "
            f"{list(rows.shape)}"
        )
    if dtype_name(rows.dtype) != unit.dtype:
        raise SpecMismatch(f"table {name!r}: rows must be {unit.dtype}, got {rows.dtype}")
    where = ids.astype(np.int64)
    outside = (where < 0) | (where >= unit.rows)
    if outside.any():
        raise InvalidArgument(
            f"table {name!r}: id {ids[outside][0]} is not in a table of {unit.rows} rows; a table "
            f"of other rows is a new table"
        )
    places = places_of(where, unit.rows) if unit.scheme == "hash" else where
    order = np.argsort(places, kind="stable")
    ordered = places[order]
    again = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(again):
        raise InvalidArgument(f"table {name!r}: id {where[order][again[0]]} comes twice")
    return ordered, rows[order]


def _check_replaced(name: str, base: Unit, unit: Unit) -> None:
    """The signatures were traced over the base's units: what they call must look the same."""
    fits = type(base) is type(unit)
    if fits and isinstance(base, TableUnit) and isinstance(unit, TableUnit):
        fits = (base.dtype, base.dim) == (unit.dtype, unit.dim)
        # Text is another input of the signature than numbers are.
        fits = fits and (base.keys == "string") == (unit.keys == "string")
    elif fits and not isinstance(base, TableUnit) and not isinstance(unit, TableUnit):
        fits = (base.inputs, base.outputs) == (unit.inputs, unit.outputs)
    if not fits:
        raise SpecMismatch(
            f"unit {name!r} is replaced by one that takes or yields something else: signatures of "
            f"the base call it, so this is a version to be saved whole"
        )
