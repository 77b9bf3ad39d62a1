"""What is moved from one actor to another while it is served, and how each move ends.

A move is known by two actors of one version: a newcomer, and the one whose place it takes. The
newcomer gets the same parts beside it: two copies, both served once the newcomer has loaded them
and has answered its warm-up requests. From the next epoch on only one of the two is named: the
newcomer, or, where the reason to move is gone or the newcomer cannot do it, the one that was there.
The other is idle, as an actor that gives way to another version is (`cluster.lives`); it lets go
when no request can be asking it, and is then forgotten. Who is idle in a move never comes back.

Moves are kept with the placement that they change, so a later reign ends what the last one began.
Decides where parts go and which of the two stays. Does not know why anything is moved
(`cluster.draining`), nor routers or time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from cluster.fleet import ActorState, HoldState, Key
from cluster.ledger import Version
from cluster.placement import Copies, cost_on
from cluster.sites import Site
from cluster.world import World

__all__ = ["Moving", "named_until"]


class Moving:
    """Begins moves and brings them to their ends.

    Args:
        world: what is known.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        #: version, newcomer and its process: where it could not be loaded
        self._refused: set[tuple[Key, str, int]] = set()
        #: version to what its note says for us
        self._said: dict[Key, str] = {}

    def begin(self, version: Version, old: str) -> bool:
        """Give the parts of an actor to another, too, where one has room.

        Returns:
            Whether there is one; else the version's note says what it waits for.
        """
        assert version.units is not None
        found = self._find(version, old)
        if found is None:
            # Whoever refused it is better than nobody.
            self._forgive(version)
            found = self._find(version, old)
        if found is None:
            awaited = self._world.fleet.awaited({self._world.fleet.actors[old].kind})
            text = f"waits for {', '.join(awaited)}" if awaited else "no other has room for it"
            self._say(version, f"cannot leave {old} yet: {text}")
            return False
        self._say(version, "")
        units = {
            unit: tuple((*part, found) if old in part else part for part in parts)
            for unit, parts in version.units.items()
        }
        self._place(version, units, {**version.moves, found: old})
        return True

    def go_on(self, version: Version, epoch: int, leaving: Collection[str]) -> bool:
        """Take every step of a version's moves that can be taken now.

        Args:
            version: one that is available.
            epoch: the number that the next epoch will have.
            leaving: actors on which nothing should be.
        """
        moved = False
        for newcomer, old in version.moves.items():
            if old in version.idle or newcomer in version.idle:
                gone = old if old in version.idle else newcomer
                moved |= self._forget(version, newcomer, gone)
                continue
            gone = self._who_goes(version, newcomer, old, leaving)
            if gone:
                version.rest({**version.idle, gone: named_until(version, gone, epoch)})
                moved = True
        return moved

    def is_under_way(self, version: Version) -> bool:
        """Whether a newcomer is to load parts of it, and nothing has kept it from that yet."""
        fleet = self._world.fleet
        for newcomer, old in version.moves.items():
            if newcomer in version.actors and old in version.actors:
                hold = fleet.actors[newcomer].holds.get(version.key)
                if hold is None or hold.is_coming:
                    return True
        return False

    def forget_others(self, moving: Collection[Version]) -> None:
        """Take back what notes of other versions say of moves."""
        keys = {version.key for version in moving}
        for key in [key for key in self._said if key not in keys]:
            version = self._world.version(key)
            if version is not None and version.note == self._said[key]:
                version.note = ""
            del self._said[key]
        self._refused = {each for each in self._refused if each[0] in keys}

    def _say(self, version: Version, text: str) -> None:
        version.note = self._said[version.key] = text

    def _who_goes(self, version: Version, newcomer: str, old: str, leaving: Collection[str]) -> str:
        """Which of the two is not named from the next epoch on; "" while that is open."""
        live = version.live_actors(self._world.fleet)
        if newcomer in leaving and (newcomer not in live or old in live):
            return newcomer
        if newcomer in live:
            # It has every part that the other has.
            return old
        if old in live and old not in leaving:
            return newcomer
        return newcomer if self._is_refused(version, newcomer, old) else ""

    def _is_refused(self, version: Version, newcomer: str, old: str) -> bool:
        """Whether a newcomer cannot load the parts, and somebody else may be able to."""
        actor = self._world.fleet.actors[newcomer]
        hold = actor.holds.get(version.key)
        has_failed = hold is not None and hold.state is HoldState.FAILED
        if not has_failed and actor.state is not ActorState.FAILED:
            return False
        self._refused.add((version.key, newcomer, actor.generation))
        if self._find(version, old) is not None:
            return True
        why = hold.error if hold is not None and has_failed else actor.reason
        self._say(version, f"cannot leave {old} yet: {newcomer} cannot load it: {why}")
        return False

    def _forgive(self, version: Version) -> None:
        self._refused = {each for each in self._refused if each[0] != version.key}

    def _forget(self, version: Version, newcomer: str, gone: str) -> bool:
        """Drop an idle actor of a move that has let go, and the move with it."""
        actor = self._world.fleet.actors.get(gone)
        hold = None if actor is None else actor.holds.get(version.key)
        if actor is not None and hold is not None:
            if hold.state is not HoldState.FAILED:
                return False
            del actor.holds[version.key]
        assert version.units is not None
        if gone != newcomer:
            self._forgive(version)
        units = {
            unit: tuple(tuple(each for each in part if each != gone) for part in parts)
            for unit, parts in version.units.items()
        }
        self._place(version, units, {n: o for n, o in version.moves.items() if n != newcomer})
        return True

    def _find(self, version: Version, old: str) -> str | None:
        """An actor that has nothing of a version, and room; away from other copies of the parts."""
        world = self._world
        assert version.units is not None
        moved = {
            unit: tuple(("here",) if old in part else () for part in parts)
            for unit, parts in version.units.items()
        }
        pieces = world.pieces_of(version, moved)["here"]
        holders = {actor for part in version.parts if old in part for actor in part}
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
            if site.kind == world.fleet.actors[old].kind
            and site.name not in version.homes
            and self._may_ask(version, site.name)
            and (
                not site.capacity_bytes
                or cost_on(site, pieces) <= site.capacity_bytes - sum(site.pieces.values())
            )
        ]
        return min(usable, key=rank).name if usable else None

    def _may_ask(self, version: Version, name: str) -> bool:
        actor = self._world.fleet.actors[name]
        return (
            version.key not in actor.holds
            and (version.key, name, actor.generation) not in self._refused
        )

    def _place(
        self, version: Version, units: Mapping[str, Copies], moves: Mapping[str, str]
    ) -> None:
        """Take another placement; epochs at which actors were given up stay as they are."""
        assert version.manifest is not None
        idle = version.idle
        version.settle_on(version.manifest, units, pieces=self._world.pieces_of(version, units))
        version.rest({name: at for name, at in idle.items() if name in version.homes})
        version.moves = moves


def named_until(version: Version, actor: str, epoch: int) -> int:
    """The first epoch that does not name an actor that is given up now.

    The next one where the latest names it: leaving it out makes a next one. Else the latest, since
    there may be no next one for long, and nobody would be believed to have reached it.
    """
    if not version.is_bound:
        return epoch  # Others may be using what it has; of itself no epoch says anything.
    served = version.served
    parts = () if served is None else (p for c in served.placement.values() for p in c)
    return epoch if any(actor in part for part in parts) else epoch - 1
