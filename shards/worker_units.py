"""What a worker engine can be asked for: units, and several tables in one call.

Decides what a call is for and whether it is fit. Does not know threads, and answers nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from batching.errors import InvalidArgument
from shards.bags import POOL_OPS, set_id
from shards.errors import NotHosted
from shards.table_sets import TableSet
from shards.tables import HostedTable
from shards.together import SHAREABLE_OPS
from shards.wire import CallHeader, TableRef

__all__ = ["Handler", "Units", "WorkerUnit", "arguments_of", "pooling"]

Array = npt.NDArray[np.generic]
#: A unit's inputs to its outputs, in declared order.
Handler = Callable[[Sequence[Array]], Sequence[Array]]

#: Sets of tables that are remembered; there are a few for every signature.
_SETS_MAX: Final = 256
#: How many bags are of which table, where there is one.
_OF_ONE: Final = np.empty((0, 1), np.int64)


class WorkerUnit(NamedTuple):
    """What answers calls.

    Attributes:
        handler: of calls that are not of bags; None where all are.
        tables: of calls of bags; None where there are none.
        row_bytes: of answer for a row of input, for the queue's bound.
        plan: hash of the sharding plan, of a unit that has one.
        own_thread: whether it is to hold up nobody but itself.
        never_waits: whether a call takes no longer than its arithmetic.
        is_table: whether calls look rows up.
        names: units that are at work while this one is.
    """

    handler: Handler | None
    tables: TableSet | None
    row_bytes: int
    plan: str
    own_thread: bool
    never_waits: bool
    is_table: bool
    names: tuple[str, ...]


class Units:
    """Units by id, and sets of tables by what they are.

    Attributes:
        plans_mismatched: calls refused because they meant another sharding plan.
    """

    def __init__(self) -> None:
        self.plans_mismatched = 0
        self._units: dict[str, WorkerUnit] = {}
        self._tables: dict[str, HostedTable] = {}
        self._sets: dict[tuple[TableRef, ...], WorkerUnit] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._units or any(set_id(tables) == name for tables in self._sets)

    def install(
        self,
        unit_id: str,
        handler: Handler,
        row_bytes: int,
        plan: str,
        table: HostedTable | None,
        own_thread: bool,
        never_waits: bool,
    ) -> None:
        """Serve a unit, from now on so; see `WorkerEngine.install`."""
        self._sets.clear()
        self._tables.pop(unit_id, None)
        tables = None
        if table is not None and table.can_pool:
            self._tables[unit_id] = table
            tables = TableSet([table])
        had = self._units.get(unit_id)
        own_thread = own_thread or (had is not None and had.own_thread)
        self._units[unit_id] = WorkerUnit(
            handler, tables, row_bytes, plan, own_thread, never_waits, table is not None, (unit_id,)
        )

    def remove(self, unit_id: str) -> None:
        """Serve it no longer."""
        self._sets.clear()
        self._units.pop(unit_id, None)
        self._tables.pop(unit_id, None)

    def find(self, header: CallHeader, arrays: Sequence[Array]) -> WorkerUnit:
        """What a call is for.

        Raises:
            NotHosted: it is not here, or not so.
            InvalidArgument: this is no call that it could answer.
        """
        unit = self._set(header) if header.tables else self._unit(header.unit, header.plan)
        if header.also and header.op not in SHAREABLE_OPS:
            raise InvalidArgument(f"a call of {header.op} shares no frame")
        rows = (sum([item.rows for item in header.items]),)
        if header.op not in POOL_OPS:
            if unit.handler is None or any([array.shape[:1] != rows for array in arrays]):
                raise InvalidArgument("the items' rows do not add up to the tensors' rows")
            return unit
        # Of bags the first tensor alone has a row for each: the others have one for each id.
        if unit.tables is None or len(arrays) not in (2, 3):
            raise InvalidArgument(f"this is no {header.op} of bags that the unit can answer")
        if arrays[0].shape[:1] != rows:
            raise InvalidArgument("the items' rows do not add up to the tensors' rows")
        return unit

    def _unit(self, name: str, plan: str) -> WorkerUnit:
        unit = self._units.get(name)
        if unit is None:
            raise NotHosted("the unit is not hosted here")
        if plan and plan != unit.plan:
            self.plans_mismatched += 1
            raise NotHosted(f"the unit is cut by plan {unit.plan} here, not by {plan}")
        return unit

    def _set(self, header: CallHeader) -> WorkerUnit:
        tables = header.tables
        found = self._sets.get(tables)
        if found is None:
            found = self._made(tables)
            if len(self._sets) >= _SETS_MAX:
                self._sets.clear()
            self._sets[tables] = found
        if header.unit != set_id(tables):
            raise InvalidArgument("several tables are called what they are not")
        for item in header.items:
            if len(item.bags) != len(tables) or sum(item.bags) != item.rows:
                raise InvalidArgument("an item's bags do not add up to its rows")
        return found

    def _made(self, tables: tuple[TableRef, ...]) -> WorkerUnit:
        units = [self._unit(table.unit, table.plan) for table in tables]
        names = tuple([table.unit for table in tables])
        if any(name not in self._tables for name in names):
            raise InvalidArgument("not all of these units are tables whose rows can be pooled")
        asked = TableSet([self._tables[name] for name in names])
        own_thread = any(unit.own_thread for unit in units)
        never_waits = all(unit.never_waits for unit in units)
        return WorkerUnit(None, asked, units[0].row_bytes, "", own_thread, never_waits, True, names)


def arguments_of(header: CallHeader, arrays: Sequence[Array]) -> Sequence[Array]:
    """What the handler of a call is given: of bags, first how many each item has in each table."""
    if header.op not in POOL_OPS:
        return arrays
    bags = np.array([item.bags for item in header.items], np.int64) if header.tables else _OF_ONE
    return [bags, *arrays]


def pooling(tables: TableSet, op: str) -> Handler:
    """What answers calls of bags, given `arguments_of` them."""

    def rows(inputs: Sequence[Array]) -> Sequence[Array]:
        bags, counts, ids, *weights = inputs
        return [tables.pool(bags, counts, ids, op, *weights)]  # type: ignore[arg-type]

    return rows
