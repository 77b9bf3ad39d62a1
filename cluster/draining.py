"""Nodes that actors are to leave, and how what they hold gets elsewhere while it is served.

A node is drained when a person says so, and remembered as such. Its actors are then no longer
declared, and as many others of their kind are, which are started elsewhere (`cluster.fleet`).
What versions have on a leaving actor is moved to another (`cluster.moving`), one move at a time in
the whole cluster. An actor that holds nothing more is ended.

Decides which nodes may be drained and what is moved next. Does not know how a move is made, nor
routers or time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from batching.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from cluster.edits import DrainNode
from cluster.fleet import kind_in
from cluster.ledger import Version
from cluster.lifecycle import State
from cluster.moving import Moving
from cluster.pieces import PieceKey
from cluster.placement import cost_on
from cluster.settings import ClusterConfig
from cluster.signals import NodesDrained, NodesSeen
from cluster.sites import Site
from cluster.world import WANTING, World
from shards.orders import ActorKind

__all__ = [
    "Draining",
    "NoRoomElsewhere",
    "actor_counts",
    "drained_after",
    "is_to_stay",
    "nodes_status",
    "take_nodes",
]

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
    fleet = world.fleet
    before = (fleet.drained, fleet.avoided)
    if isinstance(event, NodesDrained):
        fleet.drained = event.nodes
    else:
        world.nodes, world.accelerators_on = event.memory_bytes, event.accelerators
        # A node's id is not given again, so one that is gone need not be remembered.
        fleet.drained = fleet.drained.intersection(event.memory_bytes)
    # Where all others are gone, a drained one is better than none.
    is_elsewhere = not world.nodes or world.nodes.keys() - fleet.drained
    fleet.avoided = fleet.drained if is_elsewhere else frozenset()
    is_news = before != (fleet.drained, fleet.avoided)
    if world.config is not None:
        is_news |= fleet.recount(actor_counts(world.config.cluster, world), world.needed())
    return is_news


def actor_counts(cluster: ClusterConfig, world: World) -> dict[ActorKind, int]:
    """How many actors of each kind should run: as declared; of devices one for each accelerator.

    Where there are any, but for those of drained nodes.
    """
    away = sum(world.accelerators_on.get(node, 0) for node in world.fleet.avoided)
    devices = max(world.accelerators - away, 0) if world.accelerators else cluster.devices
    return {"device": devices, "shard": cluster.shards, "host": cluster.hosts}


def drained_after(edit: DrainNode, world: World) -> frozenset[str]:
    """The nodes that are drained after an edit.

    Raises:
        NotFound: there is no such node, or it is not drained and should no longer be.
        InvalidArgument: several nodes may be meant.
        FailedPrecondition: there is no other node, or no accelerator to go to.
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
    if world.accelerators:
        _check_devices(world, node, others, on)
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


def _check_devices(
    world: World, node: str, others: Collection[str], on: Mapping[str, list[str]]
) -> None:
    """Whether other accelerators can take what is on those of a node: no actor is added there."""
    sites = [
        site
        for site in world.fleet.sites(world.pieces())
        if site.kind == "device" and site.node in others
    ]
    here = {name for name in on.get(node, ()) if kind_in(name) == "device"}
    for version in world.versions():
        leaving = sorted(here & version.homes) if version.state in WANTING else []
        free = [site for site in sites if site.name not in version.homes]
        if len(free) < len(leaving):
            raise FailedPrecondition(
                f"node {node} cannot be drained: {version.life.name} is on {len(leaving)} of its "
                f"accelerators, and {len(free)} elsewhere have nothing of it yet"
            )
        for name in leaving:
            pieces = version.pieces.get(name, {})
            short = min(_short(site, pieces) for site in free)
            if short > 0:
                raise NoRoomElsewhere(node, name, short)


def _short(site: Site, pieces: Mapping[PieceKey, int]) -> int:
    """Bytes that are missing where these are to go."""
    if not site.capacity_bytes:
        return 0
    return cost_on(site, pieces) - (site.capacity_bytes - sum(site.pieces.values()))


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
    # What is still on nodes that are drained already goes to the same others.
    leaving = [name for each in (node, *world.fleet.drained) for name in on.get(each, ())]
    for name in sorted(leaving, key=lambda name: -promised.get(name, 0)):
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


def is_to_stay(world: World, version: Version) -> bool:
    """Whether no other version is about to take the place of one that serves."""
    servable = world.servables[version.key[0]]
    wanted = servable.aspired()
    if version.key[1] in wanted:
        return True
    # Where the one that is wanted has failed, or is not there, the older one serves on.
    others = [servable.versions.get(number) for number in wanted]
    return not servable.removed and all(each is None or each.state is State.END for each in others)


class Draining:
    """Moves what leaving actors hold.

    Args:
        world: what is known.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._moving = Moving(world)

    def move(self, epoch: int) -> bool:
        """Take every step that can be taken now.

        Args:
            epoch: the number that the next epoch will have.
        """
        leaving = self._world.fleet.leaving
        settled = [each for each in self._world.versions() if self._is_settled(each, leaving)]
        self._moving.forget_others(settled)
        moved = False
        for version in settled:
            moved |= self._moving.go_on(version, epoch, leaving)
        if not any(self._moving.is_under_way(version) for version in settled):
            moved |= any(self._begin(version, leaving) for version in settled)
        return moved

    def _is_settled(self, version: Version, leaving: frozenset[str]) -> bool:
        """Whether something of a version moves, and it serves and does not give way to another."""
        if not version.moves and leaving.isdisjoint(version.homes):
            return False
        is_served = version.state is State.AVAILABLE and version.manifest is not None
        return is_served and is_to_stay(self._world, version)

    def _begin(self, version: Version, leaving: frozenset[str]) -> bool:
        """Begin to move one leaving actor's parts of a version, those that it is to get, too."""
        if version.shift is not None:
            return False  # which ends first
        moving = {*version.moves, *version.moves.values()}
        names = sorted(version.homes.intersection(leaving) - moving)
        return any(self._moving.begin(version, name) for name in names)
