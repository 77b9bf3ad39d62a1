"""What an epoch means for a request: names resolved, graphs flattened into plans.

Built once per epoch, read for every request, never changed: a request that found its plan here
keeps it to its end, so an answer is made of one version of every part. This file decides where a
request goes; it sends nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from batching.errors import InvalidArgument, NotFound, ServingError, Unavailable
from cluster.bunches import Bunch, bunched
from cluster.epochs import Epoch, ServableVersion
from cluster.splits import Split
from shards.levels import node_levels
from shards.manifest import (
    CustomUnit,
    HostUnit,
    Manifest,
    MapUnit,
    Node,
    Pool,
    Signature,
    TableUnit,
    Unit,
)
from shards.specs import STRING, Per, Spec
from shards.tables import plan_of
from shards.wire import TableRef

__all__ = ["REQUEST", "LookUp", "PlannedNode", "Routes", "Served", "SignaturePlan", "Source"]

#: (node index, or -1 for the request's own inputs; name of the input or output)
Source = tuple[int, str]

#: "columns" asks nobody: it puts the pieces of rows side by side that nodes before it looked up.
Kind = Literal["map", "table", "host", "custom", "columns"]

REQUEST: Final = -1


class LookUp(NamedTuple):
    """An input of a unit that is all that a table's rows are for.

    Attributes:
        tensor: which of the unit's inputs.
        node: the table's node.
    """

    tensor: int
    node: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedNode:
    """One unit call of a plan.

    Attributes:
        index: position in the plan, in topological order.
        kind: what sort of unit it is.
        unit: the unit's id.
        inputs: the unit's inputs in order, each with where its value comes from.
        names: for a unit fed by the request alone: the request's input of each.
        specs: specs of those inputs.
        outputs: names of the unit's outputs, in order.
        needs: nodes whose outputs it takes; where it has look-ups, what those need, too.
        feeds: nodes that wait for it.
        look_ups: of a map unit: tables that it begins itself, since their rows are for it alone,
            and may go to its device without passing the router.
        holders: actors by partition; map and host units have one partition.
        limits: largest size of each symbol.
        per_request: whether it runs once for the request, on one row, not once for every row.
        merge: whether rows of several requests may share a frame.
        frame_key: then, where every row has the same shape, what names the frame.
        combine: how the answers of a registered kind's partitions become one.
        is_later: whether a device has worked for the request before this unit is asked.
        plan: hash of how the unit is cut, "" where it is whole.
        table: the table, where the unit is one.
        first_rows: first row of every partition of the table.
        pool: how the rows of each bag of ids become one; None for rows as they are.
        is_replicated: whether some partition has several holders.
        label: of a table: what the bundle calls it; "" of all pieces of one but the first.
        tables: of a look-up in several tables (`cluster.bunches`): which these are.
    """

    index: int
    kind: Kind
    unit: str
    inputs: tuple[tuple[str, Source], ...]
    names: tuple[str, ...]
    specs: dict[str, Spec]
    outputs: tuple[str, ...]
    needs: tuple[int, ...]
    feeds: tuple[int, ...]
    holders: tuple[tuple[str, ...], ...]
    limits: dict[str, int]
    per_request: bool
    merge: bool
    frame_key: tuple[object, ...] | None = None
    combine: str = ""
    look_ups: tuple[LookUp, ...] = ()
    is_later: bool = False
    plan: str = ""
    table: TableUnit | None = None
    first_rows: npt.NDArray[np.int64] | None = None
    pool: Pool | None = None
    is_replicated: bool = False
    label: str = ""
    tables: tuple[TableRef, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SignaturePlan:
    """How one signature of one version is answered.

    Attributes:
        returns: output names, each with where its value comes from.
        roots: nodes that wait for no other node, less the look-ups that others begin.
        bunches: pooled look-ups that are asked for together, by the node that begins them.
        direct: the node, if the whole plan is one map unit fed by the request; such requests skip
            the bookkeeping of a graph.
        direct_returns: then, output names, each with its place among the unit's outputs.
    """

    epoch: int
    servable: str
    version: int
    name: str
    signature: Signature
    nodes: tuple[PlannedNode, ...]
    returns: tuple[tuple[str, Source], ...]
    roots: tuple[int, ...]
    bunches: Mapping[int, Bunch]
    direct: PlannedNode | None
    direct_returns: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One available version.

    Attributes:
        deadline_s: of requests that bring no deadline of their own.
    """

    servable: str
    version: int
    manifest: Manifest
    plans: dict[str, SignaturePlan]
    deadline_s: float


class Routes:
    """An epoch, ready for requests.

    Args:
        epoch: what was published.
        before: of the epoch before; plans of versions that are as they were are taken from it.

    Attributes:
        epoch: the epoch this was built from.
        live: requests that are pinned to it; kept by the router.
    """

    __slots__ = ("_latest", "_splits", "_versions", "epoch", "live")

    def __init__(self, epoch: Epoch, before: Routes | None = None) -> None:
        self.epoch = epoch
        self.live = 0
        self._versions = {
            name: {
                number: _served_again(epoch.number, name, version, before)
                for number, version in versions.items()
            }
            for name, versions in epoch.servables.items()
        }
        self._latest = {
            name: versions[max(versions)] for name, versions in self._versions.items() if versions
        }
        self._splits = {
            name: Split(name, ((share.target, share.version, share.weight) for share in shares))
            for name, shares in epoch.splits.items()
        }

    @property
    def number(self) -> int:
        """The epoch's number."""
        return self.epoch.number

    def has(self, servable: str, version: int) -> bool:
        """Whether this epoch serves a version."""
        return version in self._versions.get(servable, {})

    def find(self, servable: str, version: int | None = None, label: str | None = None) -> Served:
        """The version a request asks for; the newest where it names none.

        Raises:
            NotFound: no such servable, or not in that version.
            InvalidArgument: no such label.
            Unavailable: the label waits for its version, or the router has not heard yet what is
                served.
        """
        if version is None and label is None:
            served = self._latest.get(servable)
            if served is None:
                raise self._unknown(f"Latest({servable})")
            return served
        versions = self._versions.get(servable)
        if label is not None:
            if versions is None:
                raise self._unknown(f"Latest({servable})")
            number = self.epoch.labels.get(servable, {}).get(label)
            if number is None:
                raise self._unlabelled(servable, label)
        else:
            assert version is not None
            number = version
        found = versions.get(number) if versions is not None else None
        if found is None:
            raise self._unknown(f"Specific({servable}, {number})")
        return found

    def is_split(self, servable: str) -> bool:
        """Whether requests that name neither version nor label go to several versions."""
        return servable in self._splits

    def pick(self, servable: str, key: bytes = b"") -> Served:
        """The version for a request that names none: by the split, else the newest.

        Args:
            servable: its name.
            key: requests with the same key get the same version of a split; empty for any.

        Raises:
            ServingError: as `find`.
        """
        split = self._splits.get(servable)
        return self.find(servable, None if split is None else split.pick(key))

    def check_known(self) -> None:
        """Refuse to say what is served before it is known.

        Raises:
            Unavailable: this is what a router begins with, not what a controller published.
        """
        if self.epoch.number == 0:
            raise Unavailable("this router has just started and has no routing table yet", 100)

    def _unlabelled(self, servable: str, label: str) -> ServingError:
        awaited = self.epoch.pending.get(servable, {}).get(label)
        if awaited is None:
            return InvalidArgument(f"Unrecognized servable version label: {label}")
        text = f"label {label} of {servable} waits for version {awaited}, which is not available"
        return Unavailable(text, 1000)

    def _unknown(self, what: str) -> ServingError:
        # A client that hears "not found" takes it for final, and a router that was started again
        # hears of everything a moment after its port is open.
        self.check_known()
        return NotFound(f"Servable not found for request: {what}")


def _served_again(epoch: int, name: str, version: ServableVersion, before: Routes | None) -> Served:
    """A version; where it is as it was, its plans are the old ones but for the epoch."""
    if before is not None:
        number = version.manifest.version
        if before.epoch.servables.get(name, {}).get(number) == version:
            old = before.find(name, number)
            plans = {key: replace(plan, epoch=epoch) for key, plan in old.plans.items()}
            return replace(old, plans=plans)
    return _served(epoch, version)


def _served(epoch: int, version: ServableVersion) -> Served:
    manifest = version.manifest
    return Served(
        servable=manifest.name,
        version=manifest.version,
        manifest=manifest,
        plans={
            name: _plan(epoch, name, signature, version)
            for name, signature in manifest.signatures.items()
        },
        deadline_s=version.deadline_ms / 1000,
    )


def _plan(epoch: int, name: str, signature: Signature, version: ServableVersion) -> SignaturePlan:
    manifest = version.manifest
    planned, moved = _all_planned(signature, version)
    returns = tuple((output, _moved(value, moved)) for output, value in signature.returns.items())
    nodes = _linked(planned, returned={at for _, (at, _) in returns})
    begun = {look_up.node for node in nodes for look_up in node.look_ups}
    bunches = bunched([node for node in nodes if node.pool is not None])
    begun.update(each.index for bunch in bunches.values() for each in bunch.members[1:])
    only = nodes[0] if len(nodes) == 1 else None
    is_direct = only is not None and only.kind == "map" and all(at == 0 for _, (at, _) in returns)
    return SignaturePlan(
        epoch=epoch,
        servable=manifest.name,
        version=manifest.version,
        name=name,
        signature=signature,
        nodes=nodes,
        returns=returns,
        roots=tuple(node.index for node in nodes if not node.needs and node.index not in begun),
        bunches=bunches,
        direct=only if is_direct else None,
        direct_returns=(
            tuple((name, only.outputs.index(source)) for name, (_, source) in returns)
            if only is not None and is_direct
            else ()
        ),
    )


def _all_planned(
    signature: Signature, version: ServableVersion
) -> tuple[list[PlannedNode], list[int]]:
    """The nodes of a signature, and for each of its own which of these has its outputs.

    A table that is cut by columns is a look-up for each piece, and one that puts these together.
    """
    units = version.manifest.units
    planned: list[PlannedNode] = []
    moved: list[int] = []
    for node, level in zip(signature.nodes, node_levels(signature, units), strict=True):
        unit, holders = units[node.unit], version.placement[node.unit]
        inputs = tuple((name, _moved(value, moved)) for name, value in node.inputs.items())
        first = len(planned)
        if isinstance(unit, TableUnit) and unit.columns:
            for piece, names in enumerate(holders):
                narrow = unit.piece(piece)
                made = _planned(first + piece, node, inputs, narrow, (names,), level)
                planned.append(made if piece == 0 else replace(made, label=""))
            planned.append(_side_by_side(unit, planned[first:], level))
        else:
            planned.append(_planned(first, node, inputs, unit, holders, level))
        moved.append(len(planned) - 1)
    return planned, moved


def _side_by_side(unit: TableUnit, pieces: Sequence[PlannedNode], level: Per) -> PlannedNode:
    at = tuple(piece.index for piece in pieces)
    return PlannedNode(
        index=at[-1] + 1,
        kind="columns",
        unit=unit.id,
        inputs=tuple(("rows", (index, "rows")) for index in at),
        names=(),
        specs={},
        outputs=("rows",),
        needs=at,
        feeds=(),
        holders=(),
        limits={},
        per_request=level == "request",
        merge=False,
    )


def _planned(
    index: int,
    node: Node,
    inputs: tuple[tuple[str, Source], ...],
    unit: Unit,
    holders: tuple[tuple[str, ...], ...],
    level: Per,
) -> PlannedNode:
    table: TableUnit | None = None
    first_rows: npt.NDArray[np.int64] | None = None
    limits: dict[str, int] = {}
    match unit:
        case MapUnit():
            # The program takes its inputs in the unit's order, whatever order the call named them.
            by_name = dict(inputs)
            inputs = tuple((name, by_name[name]) for name in unit.inputs)
            kind: Kind = "map"
            specs, outputs = unit.inputs, tuple(unit.outputs)
            limits = {symbol: sizes[-1] for symbol, sizes in unit.length_buckets.items()}
        case TableUnit():
            kind, table, specs, outputs = "table", unit, {}, ("rows",)
            first_rows = np.array([part.first_row for part in unit.partitions], np.int64)
        case HostUnit() | CustomUnit():
            kind = "host" if isinstance(unit, HostUnit) else "custom"
            specs, outputs = unit.inputs, tuple(unit.outputs)
            by_name = dict(inputs)
            inputs = tuple((name, by_name[name]) for name in unit.inputs)
    merge = kind != "host" and all(spec.dtype != STRING for spec in specs.values())
    is_fixed = kind == "map" and all(
        isinstance(size, int) for spec in specs.values() for size in spec.row_shape
    )
    return PlannedNode(
        index=index,
        kind=kind,
        unit=unit.id,
        inputs=inputs,
        names=tuple(name for _, (_, name) in inputs),
        specs=specs,
        outputs=outputs,
        needs=tuple(sorted({at for _, (at, _) in inputs if at != REQUEST})),
        feeds=(),
        holders=holders,
        limits=limits,
        per_request=level == "request",
        merge=merge,
        frame_key=(unit.id,) if merge and is_fixed else None,
        combine=unit.combine if isinstance(unit, CustomUnit) else "",
        plan=plan_of(table) if table is not None else "",
        table=table,
        first_rows=first_rows,
        pool=node.pool,
        is_replicated=any(len(names) > 1 for names in holders),
        label=node.unit if table is not None else "",
    )


def _linked(nodes: Sequence[PlannedNode], returned: Set[int]) -> tuple[PlannedNode, ...]:
    """The nodes with who begins whom: look-ups where there are any, `feeds` for the others."""
    users: list[list[int]] = [[] for _ in nodes]
    for node in nodes:
        for _, (at, _) in node.inputs:
            if at != REQUEST:
                users[at].append(node.index)
    linked = list(nodes)
    for node in nodes:
        found = _look_ups(node, nodes, users, returned)
        if found:
            needs = {need for each in found for need in nodes[each.node].needs}
            needs.update(set(node.needs) - {each.node for each in found})
            linked[node.index] = replace(node, look_ups=found, needs=tuple(sorted(needs)))
    feeds: list[list[int]] = [[] for _ in nodes]
    for node in linked:
        for need in node.needs:
            feeds[need].append(node.index)
        for look_up in node.look_ups:
            feeds[look_up.node] = [node.index]
    begun = {look_up.node for node in linked for look_up in node.look_ups}
    for need in range(len(nodes)):
        # A look-up that is begun by its user is not begun by its ids' source as well.
        feeds[need] = [index for index in feeds[need] if index not in begun]
    later: list[bool] = []
    for node in linked:  # what a node needs comes before it
        later.append(any(nodes[need].kind == "map" or later[need] for need in node.needs))
    return tuple(
        replace(node, feeds=tuple(feeds[node.index]), is_later=later[node.index]) for node in linked
    )


def _look_ups(
    node: PlannedNode,
    nodes: Sequence[PlannedNode],
    users: Sequence[Sequence[int]],
    returned: Set[int],
) -> tuple[LookUp, ...]:
    """The look-ups that a map unit can begin itself without any of them beginning later for it.

    That is so where they all need the same nodes, and the unit needs no others.
    """
    if node.kind != "map":
        return ()
    found = tuple(
        LookUp(tensor, at)
        for tensor, (name, (at, _)) in enumerate(node.inputs)
        if at != REQUEST
        and nodes[at].kind == "table"
        and nodes[at].pool is None
        and len(users[at]) == 1
        and at not in returned
        and _takes_rows(node.specs[name], nodes[at].table)
    )
    needs = {nodes[each.node].needs for each in found}
    others = set(node.needs) - {each.node for each in found}
    if len(needs) != 1 or not others <= set(next(iter(needs))):
        return ()
    return found


def _takes_rows(spec: Spec, table: TableUnit | None) -> bool:
    assert table is not None
    return spec.dtype == table.dtype and spec.shape[1:] != () and spec.shape[-1] == table.dim


def _moved(value: str, moved: Sequence[int]) -> Source:
    """Where a value of a signature comes from, given which node each of its own has become."""
    where, _, name = value.partition(":")
    return (REQUEST if where == "in" else moved[int(where)], name)
