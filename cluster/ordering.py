"""Orders to actors: what each should hold against what it holds.

Decides who is told to load or to let go, and what an answer means for the book. An actor that
holds a version is never told to load it; a version that may have killed an actor loads alone, so
that no other is blamed for it. Does not know why a version is wanted.
"""

from __future__ import annotations

import logging

from cluster.fleet import Actor, ActorState, Hold, HoldState, Key
from cluster.ledger import Version
from cluster.lifecycle import State
from cluster.rehearsals import Rehearsals
from cluster.shifts import is_open
from cluster.signals import (
    Allow,
    Allowed,
    Effect,
    Failure,
    Load,
    Loaded,
    Rehearse,
    Rehearsed,
    Unload,
    Unloaded,
    Warming,
)
from cluster.turns import in_the_way
from cluster.world import LETTING_GO, WANTING, World
from shards.orders import AllowOrder, LoadOrder

__all__ = ["Ordering"]

logger = logging.getLogger(__name__)


class Ordering:
    """Gives orders and takes their answers.

    Args:
        world: what is known.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._rehearsals = Rehearsals(world)
        self._number = 0

    def reconcile(self, now: float) -> list[Effect]:
        """The orders that are due."""
        effects: list[Effect] = []
        # Parts of what is available come first: their absence is felt by requests now.
        versions = sorted(
            self._world.versions(),
            key=lambda v: (v.state is not State.AVAILABLE, v.suspect, v.key),
        )
        for _, actor in sorted(self._world.fleet.actors.items()):
            if actor.state is not ActorState.UP:
                continue
            for key in sorted(actor.holds):
                effects += self._let_go(actor, key, now)
            for version in versions:
                if version.state in WANTING and actor.name in version.actors:
                    effects += self._load(actor, version, now)
                    effects += self._allow(actor, version)
        return effects + self._rehearsals.reconcile(now)

    def is_current(self, effect: Effect) -> bool:
        """Whether an effect from earlier is still meant; orders to lost processes are not."""
        if isinstance(effect, Allow):
            actor = self._world.fleet.actors.get(effect.actor)
            return actor is not None and actor.generation == effect.generation
        if isinstance(effect, Rehearse):
            return self._rehearsals.is_current(effect)
        if not isinstance(effect, Load | Unload):
            return True
        hold = self._hold_of(effect.actor, effect.generation, effect.number)
        if hold is None:
            return False
        return (hold.is_coming or hold.is_changing) == isinstance(effect, Load)

    def on_warming(self, event: Warming) -> None:
        """An actor has the weights in place."""
        hold = self._hold_of(event.actor, event.generation, event.number)
        if hold is not None and hold.state is HoldState.LOADING:
            hold.state = HoldState.WARMING

    def on_loaded(self, event: Loaded | Rehearsed, now: float) -> Failure | None:
        """An actor answered a load order, or a router one to replay warm-up requests.

        Returns:
            Why the version's life fails, where it does.
        """
        if isinstance(event, Rehearsed):
            return self._rehearsals.on_rehearsed(event, now)
        hold = self._hold_of(event.actor, event.generation, event.number)
        if hold is None or not (hold.is_coming or hold.is_changing):
            return None
        if hold.is_changing:
            self._on_changed(event, hold)
            return None
        if event.error is None:
            hold.state, hold.attempts, hold.error = HoldState.LOADED, 0, ""
            hold.units = hold.ordered
            return None
        key = (event.servable, event.version)
        version = self._world.version(key)
        if version is not None and version.state in (State.LOADING, State.WARMING):
            del self._world.fleet.actors[event.actor].holds[key]
            text = f"{event.actor}: {event.error.message}"
            return Failure(code=event.error.code, message=text)
        # It serves elsewhere, or did before the actor was lost: not a reason to take it down.
        hold.state, hold.error = HoldState.FAILED, f"{event.error.code}: {event.error.message}"
        hold.attempts += 1
        hold.at = self._world.again_at(event.error, hold.attempts, now)
        logger.warning("%s cannot load %s:%d again: %s", event.actor, *key, hold.error)
        return None

    def _on_changed(self, event: Loaded, hold: Hold) -> None:
        """An actor that serves a version answered an order to hold other parts of it."""
        if event.error is None:
            hold.is_changing, hold.units = False, hold.ordered
            return
        hold.error = f"{event.error.code}: {event.error.message}"
        logger.warning(
            "%s cannot change what it holds of %s:%d: %s",
            event.actor, event.servable, event.version, hold.error,
        )  # fmt: skip
        version = self._world.version((event.servable, event.version))
        if version is None or version.shift is None or is_open(version.shift, version.units or {}):
            # It has what it had. One that is to give parts is told again in time.
            hold.is_changing, hold.has_refused = False, True

    def on_answered(self, event: Allowed | Unloaded) -> None:
        """An actor answered an order other than to load."""
        if isinstance(event, Unloaded):
            self._on_unloaded(event)
        elif event.error is not None:  # it has heard a later reign than this one
            logger.warning(
                "%s will not heed what %s is allowed: %s",
                event.actor, event.servable, event.error.message,
            )  # fmt: skip

    def _on_unloaded(self, event: Unloaded) -> None:
        hold = self._hold_of(event.actor, event.generation, event.number)
        if hold is None or hold.state is not HoldState.UNLOADING:
            return
        if event.error is None:
            del self._world.fleet.actors[event.actor].holds[event.servable, event.version]
            return
        # It still holds it, and the order is given again when its time is over.
        hold.error = f"{event.error.code}: {event.error.message}"
        logger.warning(
            "%s cannot unload %s:%d: %s", event.actor, event.servable, event.version, hold.error
        )

    def _hold_of(self, name: str, generation: int, number: int) -> Hold | None:
        """The hold that an answer speaks of, or None where the answer is of another time."""
        actor = self._world.fleet.actors.get(name)
        if actor is None or actor.generation != generation:
            return None
        return next((hold for hold in actor.holds.values() if hold.number == number), None)

    def _load(self, actor: Actor, version: Version, now: float) -> list[Effect]:
        hold = actor.holds.get(version.key)
        if hold is None or (hold.state is HoldState.FAILED and now >= hold.at):
            if self._must_wait(actor, version) or self._is_in_the_way(actor, version):
                return []
            self._number += 1
            version.note = ""
            hold = actor.holds.setdefault(version.key, Hold(HoldState.LOADING))
            hold.state, hold.number = HoldState.LOADING, self._number
        elif self._is_to_change(hold, actor, version, now):
            self._number += 1
            hold.is_changing, hold.has_refused, hold.number = True, False, self._number
        elif not ((hold.is_coming or hold.is_changing) and self._is_unanswered(hold, now)):
            return []
        hold.at = now
        config = self._world.config
        assert config is not None
        declared = self._world.servables[version.key[0]].config
        batching = declared.batching
        hold.allowance = batching.allowance
        hold.ordered = version.orders[actor.name]
        order = LoadOrder(
            term=self._world.term,
            store=config.store,
            servable=version.key[0],
            version=version.key[1],
            units=self._world.order_of(version, actor.name),
            allowance=hold.allowance,
            shared_bucket_max=batching.shared_bucket_max,
            resident=declared.resident,
        )
        return [
            Load(actor=actor.name, generation=actor.generation, number=hold.number, order=order)
        ]

    def _is_to_change(self, hold: Hold, actor: Actor, version: Version, now: float) -> bool:
        """Whether an actor that holds a version is to be told of parts that it gets or gives."""
        shift, units = version.shift, version.units
        if shift is None or units is None or hold.state is not HoldState.LOADED:
            return False
        if hold.is_changing or hold.has_refused or hold.units == version.orders[actor.name]:
            return False
        if is_open(shift, units):
            return actor.name == shift.new
        return actor.name == shift.old and self._world.gives_at(version, now) is None

    def _allow(self, actor: Actor, version: Version) -> list[Effect]:
        """Tell a device that holds a version what has been declared anew for its servable."""
        hold = actor.holds.get(version.key)
        if actor.kind != "device" or hold is None or hold.state is not HoldState.LOADED:
            return []
        allowance = self._world.servables[version.key[0]].config.batching.allowance
        if hold.allowance == allowance:
            return []
        hold.allowance = allowance
        order = AllowOrder(term=self._world.term, servable=version.key[0], allowance=allowance)
        return [Allow(actor=actor.name, generation=actor.generation, order=order)]

    def _must_wait(self, actor: Actor, version: Version) -> bool:
        coming = [self._world.version(key) for key, hold in actor.holds.items() if hold.is_coming]
        return bool(coming) and (
            version.suspect or any(other is not None and other.suspect for other in coming)
        )

    def _is_in_the_way(self, actor: Actor, version: Version) -> bool:
        number = in_the_way(self._world, actor, version)
        if number is not None:
            version.note = f"waits until version {number} has left {actor.name}"
        return number is not None

    def _let_go(self, actor: Actor, key: Key, now: float) -> list[Effect]:
        hold = actor.holds[key]
        if hold.state is HoldState.UNLOADING:
            if not self._is_unanswered(hold, now):
                return []
        elif not self._may_let_go(actor, key, now):
            return []
        elif hold.state is HoldState.FAILED:
            del actor.holds[key]
            return []
        else:
            self._number += 1
            hold.state, hold.number = HoldState.UNLOADING, self._number
            hold.is_changing = False
        hold.at = now
        return [
            Unload(
                actor=actor.name,
                generation=actor.generation,
                number=hold.number,
                servable=key[0],
                version=key[1],
                term=self._world.term,
            )
        ]

    def _may_let_go(self, actor: Actor, key: Key, now: float) -> bool:
        hold, version = actor.holds[key], self._world.version(key)
        if hold.state is HoldState.ORPHAN or version is None:
            return self._world.orphans_unload_at(now) is None
        if version.state in WANTING and actor.name in version.idle:
            return self._world.leaves_at(version, actor.name, now) is None
        if version.state in WANTING and actor.name not in version.homes:
            return self._world.gives_at(version, now) is None
        return version.state in LETTING_GO and self._world.may_unload(version, now)

    def _is_unanswered(self, hold: Hold, now: float) -> bool:
        return now >= hold.at + self._world.settings.order_timeout_s
