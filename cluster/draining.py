"""Nodes that actors are to leave, and how what they hold gets elsewhere while it is served.

A node is drained when a person says so, and remembered as such. Its actors are then no longer
declared, and as many others of their kind are, which are started elsewhere (`cluster.fleet`).
Versions that are placed on a leaving actor are given the same parts on another one, beside it: two
copies, both served once the second has been loaded and has answered its warm-up requests. Then the
leaving one is given up, like an actor that gives way to another version (`cluster.lives`), and lets
go when no request can be asking it. One copy is under way at a time, in the whole cluster. An
actor that holds nothing more is ended.

Decides what is copied where, and what is given up. Everything follows from what is placed and who
holds it, so a later reign goes on where the last one stopped. Does not know routers or time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

from batching.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from cluster.edits import DrainNode
from cluster.fleet import HoldState
from cluster.ledger import Version
from cluster.lifecycle import State
from cluster.placement import Copies, Site, cost_on, kind_of
from cluster.signals import NodesDrained, NodesSeen
from cluster.world import World

__all__ = ["Draining", "NoRoomElsewhere", "drained_after", "nodes_status", "take_nodes"]

#: Of a node's id, so much says which is meant.
_PREFIX_MIN: Final = 4


class NoRoomElsewhere(ResourceExhausted):
    """A node cannot be drained: the others have no memory for what it holds.

    Attributes (positional): the node, the actor for whose parts there is no room, and the bytes
    that are short on the node that has most.
    """

    def __init__(self, node: str, actor: str, short_bytes: int) -> None:
        super().__init__(
            f"node {node} cannot be drained: what {actor} holds has no room on another node, "
            f"{short_bytes:,} bytes are short where most is free"
        )
        self.args = (node, actor, short_bytes)  # What pickle calls the class with.
        self.node = node
        self.actor = actor
        self.short_bytes = short_bytes


def take_nodes(world: World, event: NodesSeen | NodesDrained) -> bool:
    """Note which nodes there are, or which are drained.

    Returns:
        Whether anything may follow.
    """
    before = world.fleet.drained
    if isinstance(event, NodesDrained):
        world.fleet.drained = event.nodes
    else:
        world.nodes = event.memory_bytes
        # A node's id is not given again, so one that is gone need not be remembered.
        world.fleet.drained = before.intersection(event.memory_bytes)
    return before != world.fleet.drained


def drained_after(edit: DrainNode, world: World) -> frozenset[str]:
    """The nodes that are drained after an edit.

    Raises:
        NotFound: there is no such node, or it is not drained and should no longer be.
        InvalidArgument: several nodes may be meant.
        FailedPrecondition: there is no other node, or accelerators are in use there.
        NoRoomElsewhere: the others have too little memory.
    """
    drained = world.fleet.drained
    known = drained if edit.undo else frozenset(world.nodes)
    node = _named(edit.node, known, "drained node" if edit.undo else "node")
    if edit.undo:
        return drained - {node}
    if node in drained:
        return drained
    others = world.nodes.keys() - drained - {node}
    if not others:
        raise FailedPrecondition(f"node {node} cannot be drained: there is no other to go to")
    on = _actors_on(world)
    if world.accelerators and any(name.startswith("device-") for name in on.get(node, ())):
        raise FailedPrecondition(
            f"node {node} cannot be drained: its device actors use accelerators, and there is one "
            "for each"
        )
    _check_room(world, node, others, on)
    return drained | {node}


def _named(text: str, nodes: Collection[str], what: str) -> str:
    if text in nodes:
        return text
    found = [n for n in nodes if n.startswith(text)] if len(text) >= _PREFIX_MIN else []
    if len(found) > 1:
        raise InvalidArgument(f"{text!r} may be any of the {what}s {', '.join(sorted(found))}")
    if not found:
        raise NotFound(f"no {what} {text!r}; there are: {', '.join(sorted(nodes)) or 'none'}")
    return found[0]


def _actors_on(world: World) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, actor in sorted(world.fleet.actors.items()):
        if actor.report is not None:
            found.setdefault(actor.report.endpoint.node, []).append(name)
    return found


def _check_room(
    world: World, node: str, others: Collection[str], on: Mapping[str, list[str]]
) -> None:
    """Whether the others have memory for what actors of a node hold, the largest first."""
    promised = {name: sum(pieces.values()) for name, pieces in world.pieces().items()}
    # A node that does not say what it has is taken to have enough.
    free = {
        other: world.nodes[other] - sum(promised.get(name, 0) for name in on.get(other, ()))
        for other in sorted(others)
        if world.nodes[other]
    }
    if len(free) < len(others):
        return
    for name in sorted(on.get(node, ()), key=lambda name: -promised.get(name, 0)):
        best = max(free, key=lambda other: free[other])
        short = promised.get(name, 0) - free[best]
        if short > 0:
            raise NoRoomElsewhere(node, name, short)
        free[best] -= promised.get(name, 0)


def nodes_status(world: World) -> dict[str, Any]:
    """Every node with its actors, and whether it is ``serving``, ``draining`` or ``drained``."""
    on = _actors_on(world)
    found: dict[str, Any] = {}
    for node in sorted({*world.nodes, *on, *world.fleet.drained}):
        state = "serving"
        if node in world.fleet.drained:
            state = "draining" if on.get(node) else "drained"
        found[node] = {"state": state, "actors": on.get(node, [])}
    return found


class Draining:
    """Moves what leaving actors hold.

    Args:
        world: what is known.
    """

    def __init__(self, world: World) -> None:
        self._world = world

    def move(self, epoch: int) -> bool:
        """Take every step that can be taken now.

        Args:
            epoch: the number that the next epoch will have.
        """
        leaving = self._world.fleet.leaving
        if not leaving:
            return False
        moved = False
        is_free = not any(self._is_under_way(each, leaving) for each in self._settled(leaving))
        for version in list(self._settled(leaving)):
            moved |= self._drop(version, leaving) or self._give_up(version, leaving, epoch)
            if is_free and self._copy(version, leaving):
                moved, is_free = True, False
        return moved

    def _settled(self, leaving: frozenset[str]) -> Iterable[Version]:
        """Versions that serve, stay, and do not give way to others."""
        for version in self._world.versions():
            if (
                version.state is State.AVAILABLE
                and version.manifest is not None
                and not leaving.isdisjoint(version.homes)
                and version.key[1] in self._world.servables[version.key[0]].aspired()
                and version.idle.keys() <= leaving
            ):
                yield version

    def _is_under_way(self, version: Version, leaving: frozenset[str]) -> bool:
        """Whether an actor that should have parts of it has them not yet."""
        actors = self._world.fleet.actors
        for name in version.actors.difference(leaving):
            hold = actors[name].holds.get(version.key)
            if hold is None or hold.state is not HoldState.LOADED:
                return True
        return False

    def _drop(self, version: Version, leaving: frozenset[str]) -> bool:
        """Forget actors that were given up and have let go."""
        actors = self._world.fleet.actors
        gone = {
            name
            for name in version.idle.keys() & leaving
            if name not in actors or version.key not in actors[name].holds
        }
        if gone:
            assert version.units is not None
            self._place(
                version,
                {
                    unit: tuple(tuple(a for a in part if a not in gone) for part in parts)
                    for unit, parts in version.units.items()
                },
            )
        return bool(gone)

    def _give_up(self, version: Version, leaving: frozenset[str], epoch: int) -> bool:
        """From the next epoch on a leaving actor is not named, where others can answer for it."""
        live = version.live_actors(self._world.fleet).difference(leaving)
        found = [
            name
            for name in sorted(version.actors.intersection(leaving))
            if not self._missing(version, name, live)
        ]
        if found:
            has_loaded = self._world.fleet.actors
            version.rest(
                {
                    **version.idle,
                    **{n: epoch if has_loaded[n].has_loaded(version.key) else 0 for n in found},
                }
            )
        return bool(found)

    def _copy(self, version: Version, leaving: frozenset[str]) -> bool:
        """Give the parts of one leaving actor to another, too."""
        staying = version.actors.difference(leaving)
        for name in sorted(version.actors.intersection(leaving)):
            missing = self._missing(version, name, staying)
            if not missing:
                continue  # Somebody has been told to load them.
            kind = self._world.fleet.actors[name].kind
            found = self._find(version, kind, missing)
            if found is None:
                awaited = self._world.fleet.awaited({kind})
                text = f"waits for {', '.join(awaited)}" if awaited else "no other has room for it"
                version.note = f"cannot leave {name} yet: {text}"
                continue
            version.note = ""
            assert version.units is not None
            self._place(version, _with(version.units, missing, found))
            return True
        return False

    def _missing(
        self, version: Version, name: str, holders: Collection[str]
    ) -> frozenset[tuple[str, int]]:
        """Parts on an actor of which there are fewer copies on these others than are declared."""
        assert version.units is not None
        assert version.manifest is not None
        declared = self._world.servables[version.key[0]].config
        found: set[tuple[str, int]] = set()
        for unit, parts in version.units.items():
            is_part = kind_of(version.manifest.units[unit]) == "shard"
            most = max(declared.table_replicas if is_part else declared.replicas, 1)
            for index, part in enumerate(parts):
                wanted = min(most, len(part))
                if name in part and sum(actor in holders for actor in part) < wanted:
                    found.add((unit, index))
        return frozenset(found)

    def _find(self, version: Version, kind: str, parts: Collection[tuple[str, int]]) -> str | None:
        """An actor that has nothing of a version, and room; away from other copies of the parts."""
        world = self._world
        assert version.units is not None
        assert version.manifest is not None
        here = _with({u: ((),) * len(p) for u, p in version.units.items()}, parts, "here")
        pieces = world.pieces_of(version, here)["here"]
        holders = {actor for unit, index in parts for actor in version.units[unit][index]}
        nodes = {
            actor.report.endpoint.node
            for name in holders
            if (actor := world.fleet.actors.get(name)) is not None and actor.report is not None
        }

        def rank(site: Site) -> tuple[bool, int, int, str]:
            used = sum(site.pieces.values())
            return site.node in nodes, cost_on(site, pieces), used, site.name

        usable = [
            site
            for site in world.fleet.sites(world.pieces())
            if site.kind == kind
            and site.name not in version.homes
            and version.key not in world.fleet.actors[site.name].holds
            and (
                not site.capacity_bytes
                or cost_on(site, pieces) <= site.capacity_bytes - sum(site.pieces.values())
            )
        ]
        return min(usable, key=rank).name if usable else None

    def _place(self, version: Version, units: Mapping[str, Copies]) -> None:
        """Take another placement; epochs at which actors were given up stay as they are."""
        assert version.manifest is not None
        idle = version.idle
        version.settle_on(
            version.manifest,
            units,
            pieces=self._world.pieces_of(version, units),
        )
        version.rest({name: at for name, at in idle.items() if name in version.homes})


def _with(
    units: Mapping[str, Copies], parts: Collection[tuple[str, int]], actor: str
) -> dict[str, Copies]:
    return {
        unit: tuple(
            (*part, actor) if (unit, index) in parts else part for index, part in enumerate(copies)
        )
        for unit, copies in units.items()
    }
