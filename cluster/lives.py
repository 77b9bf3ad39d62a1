"""The lives of versions: which step each takes next.

Decides when a version begins, is placed, becomes available, is drained, fails and ends, by the
policy and by what actors hold and routers use. Every step goes through the table of
`cluster.lifecycle`. Gives no orders and publishes nothing: those follow from the states.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from typing import assert_never

from batching.errors import Code, ResourceExhausted, ServingError
from cluster.config import ServableConfig
from cluster.declared import Placed
from cluster.draining import Draining
from cluster.fleet import ActorState, HoldState, kind_in
from cluster.ledger import Version
from cluster.lifecycle import State, Step
from cluster.pieces import kind_of
from cluster.placement import Placement, fits, pieces_on, place
from cluster.rebalancing import Rebalancing
from cluster.references import settle
from cluster.rolling import place_rolling
from cluster.servables import Servable
from cluster.signals import Failure, ManifestRead
from cluster.tiers import cached_part
from cluster.turns import Turns
from cluster.versions import TRANSITIONS, Action, ActionKind
from cluster.world import LETTING_GO, RETRIABLE, World
from shards.manifest import Manifest

__all__ = ["Lives"]

logger = logging.getLogger(__name__)


class Lives:
    """Moves versions through their lives.

    Args:
        world: what is known.

    Attributes:
        rebalancing: makes the load of shard actors even.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._turns = Turns(world)
        self._draining = Draining(world)
        self.rebalancing = Rebalancing(world)
        self._came = 0

    def move(self, now: float, epoch: int) -> None:
        """Take every step that can be taken now.

        Args:
            now: the present instant.
            epoch: the number that the next epoch will have.
        """
        while True:
            while self._decide(now, epoch) or self._advance(now) or self._begin(now):
                pass
            if self._draining.move(epoch) or self._world.fleet.choose(self._world.needed()):
                continue
            if self.rebalancing.move(epoch):
                continue
            # The next epoch is without these, and that may be all that they waited for.
            leaving = [
                version
                for version in self._world.versions()
                if version.exposed
                and version.retired is None
                and version.state is not State.AVAILABLE
            ]
            if not leaving:
                return
            for version in leaving:
                version.retired = epoch

    def fail(
        self, version: Version, failure: Failure, now: float, blocked: object | None = None
    ) -> None:
        """End a life in failure.

        Args:
            version: whose.
            failure: why.
            now: the present instant.
            blocked: where it did not fit, the room there was: it is tried again when that
                changes, however often, since nothing was tried in vain.
        """
        version.error = failure
        version.blocked = blocked
        if blocked is None:
            version.attempts += 1
            at = self._world.retry_at(failure, version.attempts, now)
            version.retry_at = at if at < math.inf else None
        self._step(version, Step.FAIL, now, f"{failure.code}: {failure.message}")

    def on_refused(self, version: Version, actor: str, failure: Failure, now: float) -> None:
        """An actor could not load it; "" where that is no single actor's doing.

        One that has less room than it seemed is not asked a second time: the version is placed
        once more at once, without it. If that fails too, it is tried again like any other.
        """
        is_full = actor and failure.code == str(Code.RESOURCE_EXHAUSTED)
        others = self._world.fleet.sites({}, actor) if is_full else ()
        again = version.refusal is None and any(s.kind == kind_in(actor) for s in others)
        version.refusal = (actor, failure.message) if again else None
        self.fail(version, failure, now)
        if again:
            version.retry_at = now

    def on_manifest(self, event: ManifestRead, now: float) -> None:
        """A manifest came, or did not."""
        version = self._world.version((event.servable, event.version))
        if version is None or not version.is_unread:
            return
        manifest, error = event.manifest, event.error
        if manifest is not None and (manifest.name, manifest.version) != version.key:
            text = f"the manifest says that it is {manifest.name} version {manifest.version}"
            manifest, error = None, Failure(code=str(Code.DATA_LOSS), message=text)
        version.note = ""
        if manifest is not None:
            version.manifest = manifest
            if version.units is not None:
                if fits(manifest, version.units):
                    cached = self._world.cached_part(version)
                    pieces = pieces_on(manifest, version.units, cached=cached)
                    version.settle_on(manifest, version.units, version.idle, pieces)
                else:
                    # Written anew under the same number: what actors hold is another thing.
                    version.recovered = False
        elif error is not None and self._is_outage(error):
            # Routers may still use it: an outage of the store must not make an epoch without it.
            # And it is no fault of a new version, which would be left alone after a few.
            version.note = f"its manifest cannot be read: {error.message}"
            version.ask_at = now + self._world.settings.retry_first_s
        elif error is not None and not self._world.recovering:
            self.fail(version, error, now)
        else:
            version.error = error

    def _is_outage(self, error: Failure) -> bool:
        retriable = RETRIABLE if self._world.recovering else {str(Code.UNAVAILABLE)}
        return error.code in retriable

    # The version of an earlier reign

    def remember(self, placed: Placed) -> None:
        """A version that an earlier reign placed; what has become of it is settled later."""
        name, servables = placed.servable, self._world.servables
        if name not in servables:
            servables[name] = Servable(ServableConfig(name=name), removed=True)
        version = Version((name, placed.version))
        version.place_on(placed.units, placed.idle)
        version.moves, version.shift = placed.moves, placed.shift
        version.recovered = True
        version.was_available = version.exposed = placed.available
        version.life.take(Step.RESERVE, 0.0, "kept from an earlier reign")
        servables[name].versions[placed.version] = version

    def is_all_heard(self, now: float) -> bool:
        """Whether it is known what the last reign left, as far as it can be."""
        world = self._world
        if any(version.is_unread for version in world.versions()):
            return False
        actors = world.fleet.actors
        silent = [
            name
            for name in world.fleet.declared | world.needed()
            if name not in actors or actors[name].state in (ActorState.STARTING, ActorState.WAITING)
        ]
        return not silent or now >= world.recover_by

    def settle(self, now: float) -> None:
        """Versions of the earlier reign live on as far as actors still hold them."""
        for servable in self._world.servables.values():
            for number, version in list(servable.versions.items()):
                held = self._world.fleet.holders(version.key)
                vouched = version.recovered and version.manifest is not None
                # One that has all its units from others holds nothing itself. Where all that it is
                # placed on have died with the last reign, and are there again, it is as after the
                # death of all under one reign: there, and without any part for a while.
                is_back = all(self._world.fleet.is_up(name) for name in version.homes)
                if vouched and (held or is_back or not version.was_available):
                    # Where nothing is held yet, orders of the last reign may be under way: the
                    # same orders join them, others would meet them.
                    self._step(version, Step.LOAD, now, "placed in an earlier reign")
                    if version.was_available:
                        self._step(version, Step.WARM, now)
                        self._step(version, Step.SERVE, now, "served since an earlier reign")
                elif version.error is not None and held:
                    self.fail(version, version.error, now)
                else:
                    # Nothing of it is left, or nothing that can be trusted: begin anew.
                    self._world.fleet.distrust(version.key)
                    del servable.versions[number]
                version.was_available = False

    # Steps

    def _decide(self, now: float, epoch: int) -> bool:
        """Ask the policy about each servable until it has nothing more to say."""
        servables = self._world.servables
        # First, since what is in effect decides which versions may go, and so do those who refer.
        for servable in servables.values():
            servable.settle_rollout(self._world.fleet, servables)
        decided = self._bind(now)
        for servable in servables.values():
            if (servable.complete is None and not servable.removed) or servable.is_at_rest:
                continue
            blocked = any(each.blocked is not None for each in servable.versions.values())
            room = self._world.room() if blocked else None
            transition = TRANSITIONS[servable.config.transition]
            while action := transition(
                servable.snapshots(self._world.fleet, now, room), removed=servable.is_going
            ):
                self._act(servable, action, now, epoch)
                decided = True
        return decided

    def _bind(self, now: float) -> bool:
        """Let references mean what is there now; whether a life began or ended over it."""
        found = settle(self._world.servables)
        for version, error in found.refused:
            version.refused = error
            self.fail(version, Failure.of(error), now)
        for version in found.mended:
            version.refused, version.retry_at = None, now
        return bool(found.refused or found.mended)

    def _act(self, servable: Servable, action: Action, now: float, epoch: int) -> None:
        number = action.version
        match action.kind:
            case ActionKind.LOAD:
                version = Version((servable.config.name, number))
                failed = servable.versions.get(number)
                if failed is not None:
                    version.attempts, version.suspect = failed.attempts, failed.suspect
                    version.refusal = failed.refusal
                self._came += 1
                version.came = self._came
                servable.versions[number] = version
                servable.ended.pop(number, None)
            case ActionKind.CANCEL:
                cause = "to begin anew" if number in servable.aspired() else "no longer aspired"
                self._step(servable.versions[number], Step.UNLOAD, now, cause)
            case ActionKind.DRAIN:
                self._step(servable.versions[number], Step.DRAIN, now, "no longer aspired")
            case ActionKind.REVIVE:
                servable.versions[number].retired = None
                self._step(servable.versions[number], Step.SERVE, now, "aspired again")
            case ActionKind.GIVE_UP:
                self._give_up(servable.versions[number], action.actor, epoch)
            case ActionKind.SPREAD:
                version = servable.versions[number]
                back = version.may_come_back(self._world.fleet)
                version.rest({n: at for n, at in version.idle.items() if n not in back})
            case _:
                assert_never(action.kind)

    def _give_up(self, version: Version, actor: str, epoch: int) -> None:
        """From the next epoch on it is not named there; then nobody can be asking for it."""
        # Where it has not loaded it, no epoch has named this process for it.
        live = self._world.fleet.actors[actor].has_loaded(version.key)
        version.rest({**version.idle, actor: epoch if live else 0})
        logger.info("%s: given up on %s", version.life.name, actor)

    def _advance(self, now: float) -> bool:
        """Take the steps that follow from what actors hold and routers use."""
        moved = False
        for name, servable in list(self._world.servables.items()):
            for version in list(servable.versions.values()):
                moved |= self._advance_one(servable, version, now)
            if servable.removed and not servable.versions:
                del self._world.servables[name]
        return moved

    def _advance_one(self, servable: Servable, version: Version, now: float) -> bool:
        before = version.state
        match before:
            case State.NEW:
                pass
            case State.RESERVED:
                self._step(version, Step.LOAD, now)
            case State.LOADING | State.WARMING:
                self._see_loaded(version, now)
            case State.AVAILABLE:
                pass
            case State.DRAINING:
                if self._world.may_unload(version, now):
                    self._step(version, Step.UNLOAD, now, "no request can be using it")
            case State.UNLOADING | State.ERROR:
                if not self._world.fleet.holders(version.key):
                    self._step(version, Step.FINISH, now)
            case State.END:
                if version.error is None or version.key[1] not in servable.aspired():
                    servable.bury(version)
                    return True
            case _:
                assert_never(before)
        return version.state is not before

    def _begin(self, now: float) -> bool:
        """Find room for those whose turn it is to load."""
        most = self._turns.most
        waiting = self._turns.waiting()
        before = self._turns.under_way() if waiting else 0
        moved = False
        for version in waiting:
            if before < most:
                self._try_place(self._world.servables[version.key[0]], version, now)
                before += version.state is State.RESERVED
                moved |= version.state is not State.NEW
            else:
                version.note = f"waits for {before} load{'s' if before > 1 else ''} before it"
                before += 1
        return moved

    def _try_place(self, servable: Servable, version: Version, now: float) -> None:
        assert version.manifest is not None
        world = self._world
        holders = world.fleet.holders(version.key)
        if holders:
            # What an earlier life has left there may be other parts of it. A reign that follows
            # could not tell: it would believe that they are those which are placed now.
            version.note = f"waits until {', '.join(sorted(holders))} let go of an earlier life"
            return
        kinds = {kind_of(unit) for unit in version.manifest.units.values()}
        awaited = world.fleet.awaited(kinds)
        if awaited:
            version.note = f"waits for {', '.join(awaited)}"
            return
        try:
            without = "" if version.refusal is None else version.refusal[0]
            placement, later = self._place(servable, version.manifest, without)
        except ResourceExhausted as error:
            if version.refusal is not None:
                # Not for want of what is known here, so it is tried again after a while.
                text = f"{version.refusal[1]}; and elsewhere: {error}"
                version.refusal = None
                self.fail(version, Failure(code=str(error.code), message=text), now)
            elif any(each.state in LETTING_GO for each in world.versions()):
                version.note = f"waits for room: {error}"
            else:
                self.fail(version, Failure.of(error), now, blocked=world.room())
            return
        except ServingError as error:
            self.fail(version, Failure.of(error), now)
            return
        version.settle_on(version.manifest, placement.units, later, placement.pieces)
        version.note = ""
        self._step(version, Step.RESERVE, now)

    def _place(
        self, servable: Servable, manifest: Manifest, without: str
    ) -> tuple[Placement, Collection[str]]:
        """Where a version goes, and those of the actors that it gets once it is available.

        Args:
            servable: whose.
            manifest: of the version.
            without: an actor that is not asked; "" for none.
        """
        config, world = servable.config, self._world
        sites = world.fleet.sites(world.pieces(), without)
        leaving = servable.leaving() if config.transition == "shard-rolling" else []
        if not leaving:
            placement = place(
                manifest,
                sites,
                replicas=config.replicas,
                table_replicas=config.table_replicas,
                shards=config.shards,
                steps=world.measured.steps,
                cached=cached_part(config, manifest),
                strategy=config.placement,
            )
            return placement, ()
        return place_rolling(
            manifest,
            tuple(part for version in leaving for part in version.parts),
            sites,
            world.fleet.sites(world.pieces(without=leaving), without),
            replicas=config.replicas,
            table_replicas=config.table_replicas,
            shards=config.shards,
            steps=world.measured.steps,
            cached=cached_part(config, manifest),
            strategy=config.placement,
        )

    def _see_loaded(self, version: Version, now: float) -> None:
        actors = [self._world.fleet.actors[name] for name in sorted(version.actors)]
        for actor in actors:
            if actor.state is ActorState.FAILED:
                text = f"{actor.name}, where a part of it is placed, failed: {actor.reason}"
                self.fail(version, Failure(code=str(Code.UNAVAILABLE), message=text), now)
                return
        holds = [actor.holds.get(version.key) for actor in actors]
        states = {None if hold is None else hold.state for hold in holds}
        if version.state is State.LOADING and states <= {HoldState.WARMING, HoldState.LOADED}:
            self._step(version, Step.WARM, now)
        if version.state is State.WARMING and states <= {HoldState.LOADED}:
            if version.is_unrehearsed or not version.is_bound:
                return
            version.attempts, version.suspect = 0, False
            answered = " and it has answered its warm-up requests" if version.rehearsed else ""
            self._step(version, Step.SERVE, now, f"every actor has loaded it{answered}")

    def _step(self, version: Version, step: Step, now: float, cause: str = "") -> None:
        before = version.state
        after = version.life.take(step, now, cause)
        level = logging.WARNING if step is Step.FAIL else logging.INFO
        logger.log(level, "%s: %s -> %s %s", version.life.name, before, after, cause)
