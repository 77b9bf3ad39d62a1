"""How parts of tables get from one shard actor to another while they are served.

The actor that gets them is ordered to hold them, beside what else it has of the version: it opens
what is new and keeps what it has. When it has answered, the placement names it alone for them; that
is kept durably before any router hears of it. The actor that had them is asked by requests of older
epochs only, and when there can be none is ordered to hold what is left, or to let go of all.

What an actor holds is known by the orders that it has answered in this reign. A later reign cannot
tell whether a report was made before or after an order of the last one, so it orders once more
those that a shift concerns; whoever holds what it is ordered to hold answers at once.

Decides each step of a shift (`cluster.shifts`) and whether it is turned round. Does not know why
anything is shifted (`cluster.rebalancing`), nor routers or time.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

from cluster.fleet import ActorState, HoldState, Key
from cluster.ledger import Version
from cluster.moving import named_until
from cluster.placement import Copies
from cluster.shifts import Shift, added, is_open, removed
from cluster.world import World

__all__ = ["Shifting"]

logger = logging.getLogger(__name__)


class Shifting:
    """Begins shifts and brings them to their ends.

    Args:
        world: what is known.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        #: version, actor that should have got parts, and its process: where that was in vain
        self._refused: dict[tuple[Key, str, int], str] = {}

    def begin(self, version: Version, shift: Shift) -> None:
        """Have one actor get parts of another, too."""
        assert version.units is not None
        assert version.shift is None
        self._place(version, added(shift, version.units), shift)
        logger.info("%s: %s gets parts of %s", version.life.name, shift.new, shift.old)

    def go_on(self, version: Version, epoch: int, leaving: Collection[str]) -> bool:
        """Take the step of a version's shift that can be taken now.

        Args:
            version: one that is available.
            epoch: the number that the next epoch will have.
            leaving: actors on which nothing should be.
        """
        shift, units = version.shift, version.units
        assert shift is not None
        assert units is not None
        if not is_open(shift, units):
            if self._has_given(version, shift):
                version.shift = None
                return True
            return False
        if self._has_got(version, shift):
            until = named_until(version, shift.old, epoch)
            self._place(version, removed(shift, shift.old, units), shift)
            version.given_at = until
            return True
        why = self._obstacle(version, shift, leaving)
        if why:
            logger.warning("%s: not shifted to %s: %s", version.life.name, shift.new, why)
            self._refused[version.key, shift.new, self._generation(shift.new)] = why
            hold = self._world.fleet.actors[shift.new].holds.get(version.key)
            if hold is not None:
                hold.has_refused = False
            # No epoch has named it for these parts.
            self._place(version, removed(shift, shift.new, units), shift.turned())
        return bool(why)

    def refused(self, version: Version) -> dict[str, str]:
        """Actors that could not get parts of a version, with the reasons."""
        return {
            name: why
            for (key, name, generation), why in self._refused.items()
            if key == version.key and generation == self._generation(name)
        }

    def forgive(self) -> None:
        """Forget who refused anything."""
        self._refused.clear()

    def _generation(self, name: str) -> int:
        actor = self._world.fleet.actors.get(name)
        return 0 if actor is None else actor.generation

    def _has_got(self, version: Version, shift: Shift) -> bool:
        if shift.new not in version.live_actors(self._world.fleet):
            return False
        return (
            self._world.fleet.actors[shift.new].holds[version.key].holds(version.orders[shift.new])
        )

    def _has_given(self, version: Version, shift: Shift) -> bool:
        """Whether who gives parts has no more than it should; if it was lost, it gets no more."""
        actor = self._world.fleet.actors.get(shift.old)
        hold = None if actor is None else actor.holds.get(version.key)
        if actor is None or hold is None:
            return True
        if shift.old in version.homes:
            return hold.state is HoldState.FAILED or hold.holds(version.orders[shift.old])
        if hold.state is HoldState.FAILED:
            del actor.holds[version.key]
        return hold.state is HoldState.FAILED

    def _obstacle(self, version: Version, shift: Shift, leaving: Collection[str]) -> str:
        """Why a shift is turned round, or ""."""
        if shift.new in leaving:
            return "it leaves"
        if not version.idle.keys().isdisjoint((shift.old, shift.new)):
            return "the version gives way"
        actor = self._world.fleet.actors[shift.new]
        if actor.state is ActorState.FAILED:
            return actor.reason
        hold = actor.holds.get(version.key)
        if hold is not None and (hold.state is HoldState.FAILED or hold.has_refused):
            return hold.error
        return ""

    def _place(self, version: Version, units: Mapping[str, Copies], shift: Shift) -> None:
        assert version.manifest is not None
        idle = version.idle
        version.settle_on(version.manifest, units, pieces=self._world.pieces_of(version, units))
        version.rest({name: at for name, at in idle.items() if name in version.homes})
        version.shift, version.given_at = shift, 0
