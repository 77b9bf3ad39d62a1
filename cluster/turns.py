"""Whose turn it is to load: how many versions load at once, cluster-wide, and who comes first.

A version waits before it is placed: it holds no room, no actor has heard of it, and if it is no
longer wanted nothing is to be undone. What is at its turn and cannot be placed keeps nobody back.

A version is under way while an actor works for it or is about to, or a router replays its warm-up
requests. One that only waits, for an actor that is away or for another version to leave, does not
count: whoever it waits for might be in line behind it. So there may for a moment be more than are
declared, when several such go on together; nobody begins then. Parts of a version that serves,
which an actor has lost and loads again, are not in line: requests miss them now.

Does not place anything, and gives no orders.
"""

from __future__ import annotations

from cluster.fleet import Actor, ActorState
from cluster.ledger import Version
from cluster.lifecycle import State
from cluster.rolling import given_up
from cluster.servables import Servable
from cluster.world import WANTING, World

__all__ = ["Turns", "in_the_way"]

#: Placed, and not available yet.
_COMING = frozenset({State.RESERVED, State.LOADING, State.WARMING})


class Turns:
    """The line of those that are to load.

    Args:
        world: what is known.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        #: servables of the first declaration that have neither come up yet nor failed to
        self._starting: set[str] | None = None

    @property
    def most(self) -> int:
        """How many may be under way now: while the cluster starts, more than later."""
        assert self._world.config is not None
        cluster = self._world.config.cluster
        return cluster.load_parallel_start if self._is_starting() else cluster.load_parallel

    def under_way(self) -> int:
        """How many load."""
        return sum(self._is_under_way(version) for version in self._world.versions())

    def waiting(self) -> list[Version]:
        """Those that could begin, in the order in which they are to.

        A version without which its servable answers nothing goes before those that replace or
        join another; otherwise who was wanted first is first.
        """
        versions = list(self._world.versions())
        line = [
            each
            for each in versions
            if each.state is State.NEW and each.manifest is not None and each.is_bound
        ]
        if not line:
            return line
        line.sort(key=lambda version: version.came)
        answered = {
            each.key[0] for each in versions if each.state is State.AVAILABLE or _is_coming(each)
        }
        needed: list[Version] = []
        others: list[Version] = []
        for version in line:
            (others if version.key[0] in answered else needed).append(version)
            answered.add(version.key[0])
        return needed + others

    def _is_starting(self) -> bool:
        servables = self._world.servables
        if self._starting is None:
            self._starting = {name for name, each in servables.items() if not each.removed}
        if self._starting:
            self._starting = {
                name
                for name in self._starting
                if name in servables and not _has_settled(servables[name])
            }
        return bool(self._starting)

    def _is_under_way(self, version: Version) -> bool:
        if not _is_coming(version):
            return False
        if version.state is State.RESERVED:
            return True
        fleet = self._world.fleet
        if version.state is State.WARMING and version.live_actors(fleet) == version.actors:
            return version.is_unrehearsed
        return any(self._works(fleet.actors[name], version) for name in version.actors)

    def _works(self, actor: Actor, version: Version) -> bool:
        """Whether an actor loads a version, or is about to be told to."""
        if actor.state is not ActorState.UP:
            return False
        hold = actor.holds.get(version.key)
        if hold is None:
            return in_the_way(self._world, actor, version) is None
        return hold.is_coming


def in_the_way(world: World, actor: Actor, version: Version) -> int | None:
    """The version that must leave an actor before this one, where versions change in turns.

    One that is available may have begun to, whatever is declared now.
    """
    servable = world.servables[version.key[0]]
    is_available = version.state is State.AVAILABLE
    others = [key for key in actor.holds if key[0] == version.key[0] and key != version.key]
    if not is_available:
        # What serves is loaded first on an actor that has come back: it is as good as there.
        others += [
            each.key
            for each in servable.versions.values()
            if each.state is State.AVAILABLE and actor.name in each.actors
        ]
    rolls = servable.config.transition == "shard-rolling" or is_available
    if not (rolls and others):
        return None
    leaving = servable.leaving()
    turns = given_up(part for each in leaving for part in each.parts)
    must_go = is_available or actor.name in turns
    for key in others:
        other = world.version(key)
        if other is None or other.state not in WANTING or actor.name not in other.actors:
            is_going = True
        else:
            is_going = must_go and other in leaving
        if is_going:
            return key[1]
    return None


def _is_coming(version: Version) -> bool:
    return version.state in _COMING


def _has_settled(servable: Servable) -> bool:
    """Whether everything that is wanted of it has come up, or failed to, once."""
    if servable.removed or servable.list_error or servable.policy_error:
        return True
    versions = [servable.versions.get(number) for number in servable.aspired()]
    return servable.complete is not None and all(
        each is not None
        and (each.state is State.AVAILABLE or each.attempts > 0 or each.error or not each.is_bound)
        for each in versions
    )
