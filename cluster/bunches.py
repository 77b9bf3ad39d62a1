"""Which pooled look-ups of a plan are asked for together: one object, one call to each shard.

What a request does for each of 26 tables it does 26 times, in Python, at each end. So look-ups that
the request's own inputs feed, in tables that are cut alike over the same actors and have rows of
one size, are one look-up to the router, and one call to an actor. Decided once for a plan. Does not
know a request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from shards.bags import ID32_ROWS_MAX, op_of, set_id
from shards.manifest import TableUnit
from shards.pooling import Partial
from shards.wire import TableRef

if TYPE_CHECKING:
    from cluster.routes import PlannedNode

__all__ = ["TABLES_MAX", "Bunch", "bunched"]

#: Tables of one call: the first answers of a large request have waited for long enough then.
TABLES_MAX: Final = 16
_SHORT: Final = np.dtype(np.int32)
_LONG: Final = np.dtype(np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bunch:
    """Pooled look-ups that are asked for together, or one alone.

    Attributes:
        members: the look-ups, in the order of the plan.
        tables: of each.
        node: what is asked for: the only member, or one that stands for all. Its holders are those
            of every partition, of whichever table; or of all of them, where these are the same.
        op: what shards are asked for.
        dim: elements of a row.
        ids: dtype in which places travel.
        rows: int64 ``[members]``, of each table.
        base: int64 ``[members]``: the first row of each table, were they one after the other.
        first_rows: int64: first row of every partition, were they one after the other.
        defaults: float32 ``[members, dim]``, the row of what is missing in each; None where all are
            zeros.
    """

    members: tuple[PlannedNode, ...]
    tables: tuple[TableUnit, ...]
    node: PlannedNode
    op: Partial
    dim: int
    ids: np.dtype[np.generic]
    rows: npt.NDArray[np.int64]
    base: npt.NDArray[np.int64]
    first_rows: npt.NDArray[np.int64]
    defaults: npt.NDArray[np.float32] | None


def bunched(nodes: Sequence[PlannedNode]) -> Mapping[int, Bunch]:
    """Pooled nodes of a plan as bunches, by the index of the first member of each."""
    found: list[list[PlannedNode]] = []
    last: dict[object, list[PlannedNode]] = {}
    for node in nodes:
        kind = _kind(node)
        if len(last.get(kind, ())) % TABLES_MAX == 0:
            last[kind] = []
            found.append(last[kind])
        last[kind].append(node)
    return {members[0].index: _bunch(tuple(members)) for members in found}


def _kind(node: PlannedNode) -> object:
    """What look-ups have in common that are asked for together."""
    table = node.table
    assert table is not None
    assert node.pool is not None
    # Where ids come from another unit each look-up begins when its own are there; and only rows by
    # number are found for several tables in one pass.
    if node.needs or not _is_plain(node):
        return node.index
    weights = "weights" in dict(node.inputs)
    is_short = table.rows <= ID32_ROWS_MAX
    return (op_of(node.pool), table.dim, is_short, weights, _holders(node), node.per_request)


def _is_plain(node: PlannedNode) -> bool:
    return node.table is not None and node.table.keys == "rows" and node.table.scheme != "hash"


def _holders(node: PlannedNode) -> tuple[tuple[str, ...], ...]:
    """Of every partition; once where they are the same for all."""
    return node.holders[:1] if len(set(node.holders)) == 1 else node.holders


def _bunch(members: tuple[PlannedNode, ...]) -> Bunch:
    first = members[0]
    tables = [member.table for member in members if member.table is not None]
    assert first.pool is not None
    node = replace(first, holders=_holders(first))
    if len(members) > 1:
        refs = tuple(TableRef(member.unit, member.plan) for member in members)
        feeds = tuple(sorted({index for member in members for index in member.feeds}))
        node = replace(
            node, unit=set_id(refs), plan="", feeds=feeds, table=None, label="", tables=refs
        )
    rows = np.array([table.rows for table in tables], np.int64)
    base = np.concatenate(([0], np.cumsum(rows)[:-1])).astype(np.int64)
    defaults: npt.NDArray[np.float32] | None = None
    if any(table.default for table in tables):
        empty = (0.0,) * tables[0].dim
        defaults = np.array([table.default or empty for table in tables], np.float32)
    return Bunch(
        members=members,
        tables=tuple(tables),
        node=node,
        op=op_of(first.pool),
        dim=tables[0].dim,
        ids=_SHORT if tables[0].rows <= ID32_ROWS_MAX else _LONG,
        rows=rows,
        base=base,
        first_rows=np.concatenate(
            [
                member.first_rows + start
                for member, start in zip(members, base, strict=True)
                if member.first_rows is not None
            ]
        ),
        defaults=defaults,
    )
