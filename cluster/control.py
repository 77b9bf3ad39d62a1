"""The controller's decisions: events in, effects out, nothing else.

`ControlCore.handle` notes what an event says, then compares what should be with what is and asks
for the difference. Every effect follows from that comparison, so an event that is repeated, late
or already known asks for nothing. It decides which versions live and end, which actor loads what,
when an epoch is published and when nobody can be using an old one any more. It does not know Ray,
sockets, files, threads or the time: a shell feeds events and carries effects out, in order.

The rules:

* Load before unloading. An empty or failing listing unloads nothing; a failed load leaves what
  serves; one bad servable is no other's business.
* A version is available when every actor that it is placed on has loaded it. Then one epoch names
  it, and no longer names what it replaces.
* What an epoch no longer names is unloaded once no router can have a request pinned to an epoch
  that did.
* An actor that comes back loads again what is placed on it; nobody else does.
* A new reign first hears what actors hold; it publishes and orders nothing before it knows, or
  has waited long enough. Routers go on with the last epoch meanwhile.

The parts: `cluster.world` is what is known, `cluster.lives` moves versions, `cluster.ordering`
gives orders, `cluster.turns` says who may load, `cluster.fleet` starts actors, `cluster.shown` is
what a status tells, `cluster.signals` are the events and effects.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, assert_never

from batching.errors import Code, FailedPrecondition
from cluster.carrying import merged
from cluster.config import Config, fixed_fields_changed
from cluster.declared import DeclaredState, encode
from cluster.draining import actor_counts, drained_after, take_nodes
from cluster.edits import DrainNode, View
from cluster.epochs import Epoch
from cluster.lifecycle import State
from cluster.lives import Lives
from cluster.ordering import Ordering
from cluster.placement import fits
from cluster.published import logs_of, routing_table, traffic_of
from cluster.servables import Servable
from cluster.shown import cluster_status, statuses
from cluster.signals import (
    AcceleratorsFound,
    ActorLost,
    ActorUp,
    Allowed,
    Declared,
    Effect,
    EnsureActor,
    Event,
    Failure,
    Listed,
    ListStore,
    Load,
    Loaded,
    Look,
    ManifestRead,
    NodesDrained,
    NodesSeen,
    Persist,
    Publish,
    ReadManifest,
    RebalanceAsked,
    Rehearsed,
    RouterGone,
    RouterLeased,
    StopActor,
    Tick,
    Unload,
    Unloaded,
    Warming,
)
from cluster.world import EPOCHS_PER_TERM, WANTING, ControlSettings, World, listing_at

__all__ = [
    "AcceleratorsFound",
    "EPOCHS_PER_TERM",
    "ActorLost",
    "ActorUp",
    "ControlCore",
    "ControlSettings",
    "Declared",
    "Effect",
    "EnsureActor",
    "Event",
    "Failure",
    "ListStore",
    "Listed",
    "Load",
    "Loaded",
    "Look",
    "ManifestRead",
    "Persist",
    "Publish",
    "ReadManifest",
    "RouterGone",
    "RouterLeased",
    "StopActor",
    "Tick",
    "Unload",
    "Unloaded",
    "Warming",
]


class ControlCore:
    """The controller of one reign.

    Args:
        state: what `cluster.declared.claim` returned: the term, and what the last reign left.
        settings: bounds that are not the user's to declare.
    """

    def __init__(self, state: DeclaredState, settings: ControlSettings | None = None) -> None:
        self._world = World(state.term, settings or ControlSettings())
        self._lives = Lives(self._world)
        self._ordering = Ordering(self._world)
        self._seq = state.seq
        self._epoch = Epoch(term=state.term, number=self._world.first_epoch - 1)
        self._now: float | None = None
        self._idle_until = -math.inf
        self._back: list[Effect] = []
        self._world.fleet.drained = self._world.fleet.avoided = frozenset(state.drained)
        self._world.rebalancing = state.rebalancing
        if state.config is not None:
            self._declare(state.config)
        for placed in state.placements:
            self._lives.remember(placed)
        for name, rollout in state.rollouts.items():
            if name in self._world.servables:
                self._world.servables[name].rollout = rollout
        self._world.recovering = bool(state.placements)
        self._kept = self._to_keep()

    @property
    def term(self) -> int:
        """The number of this reign."""
        return self._world.term

    @property
    def config(self) -> Config | None:
        """What is declared."""
        return self._world.config

    @property
    def drained(self) -> frozenset[str]:
        """Nodes on which no actor should be."""
        return self._world.fleet.drained

    @property
    def avoided(self) -> frozenset[str]:
        """Those of them for which there are others."""
        return self._world.fleet.avoided

    def drained_after(self, edit: DrainNode) -> frozenset[str]:
        """These after an edit; raises as `cluster.draining.drained_after`."""
        return drained_after(edit, self._world)

    def behind(self, epoch: int) -> tuple[str, ...]:
        """Routers that answer by an epoch before this one."""
        return self._world.leases.behind(epoch)

    def balance(self) -> dict[str, Any]:
        """What a rebalance would do, see `cluster.rebalancing.Rebalancing.explained`."""
        return self._lives.rebalancing.explained()

    @property
    def epoch(self) -> Epoch | None:
        """The latest epoch of this reign, for a router that has just come; None before it."""
        return self._epoch if self._epoch.number >= self._world.first_epoch else None

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take an event in.

        Args:
            event: what happened.
            now: monotonic seconds, never less than before.

        Returns:
            What to do, in order. Nothing that is under way is asked for again.

        Raises:
            FailedPrecondition: a declaration changes what a running cluster cannot change; the
                core is as before.
        """
        return self.handle_all((event,), now)

    def handle_all(self, events: Sequence[Event], now: float) -> list[Effect]:
        """Take in what happened together, and compare once; as `handle` otherwise.

        Comparing looks at every servable: once for each of their events would be quadratic.
        """
        if self._now is None:
            self._world.recover_by = now + self._world.settings.recovery_timeout_s
            if self._world.term > 1:
                self._world.leases.begin_blind(now)
        assert self._now is None or now >= self._now, (self._now, now)
        self._now = now
        self._world.leases.heed(now)
        # Not all of them, since each must be taken.
        is_news = any([self._take(event, now) for event in events])
        if not is_news and now < self._idle_until:
            return []
        effects = self._reconcile(now)
        self._idle_until = -math.inf
        at = self.next_wakeup()
        self._idle_until = -math.inf if self._world.waits_for_routers() else at or math.inf
        if self._back:
            back = [each for each in self._back if self._ordering.is_current(each)]
            self._back, effects = [], merged(back, effects)
        return effects

    def put_back(self, effects: Sequence[Effect]) -> None:
        """Take back what could not be carried out, such as a `Persist` while the store is away.

        What follows a `Persist` rests on it, so a shell puts back the rest of the list with it.
        All of it comes first in what a later `handle` returns, as far as it still means anything:
        of several states and of several epochs only the last does. A wake-up is due soon.
        """
        self._back = merged(self._back, effects)
        self._idle_until = -math.inf

    def next_wakeup(self) -> float | None:
        """When to send a `Tick` if nothing else happens; None for never."""
        now = self._now
        if now is None or self._world.config is None:
            return None
        if now < self._idle_until:
            return self._idle_until if self._idle_until < math.inf else None
        due = [at for at in self._world.wakeups(now) if now < at < math.inf]
        if self._back:
            due.append(now + self._world.settings.retry_first_s)
        return min(due, default=None)

    def status(self) -> dict[str, Any]:
        """Everything a person may want to know, as plain JSON values."""
        return cluster_status(self._world, self._epoch.number)

    def views(self) -> dict[str, View]:
        """What edits may know of the servables."""
        return {
            name: View(
                aspired=each.aspired(),
                complete=each.complete or (),
                available=frozenset(
                    n for n, version in each.versions.items() if version.state is State.AVAILABLE
                ),
            )
            for name, each in self._world.servables.items()
        }

    def check_invariants(self) -> None:
        """Full check, for tests and simulation."""
        world = self._world
        world.fleet.check_invariants()
        for version in world.versions():
            if version.state in WANTING:
                assert version.manifest is not None, version.key
                assert fits(version.manifest, version.units or {}), version.key
                assert version.actors <= world.fleet.actors.keys(), version.key
                assert version.homes.issuperset(version.moves.values()), version.key
            if version.state is State.END:
                assert version.error is not None, version.key
            if version.retired is not None:
                assert version.exposed, version.key
                assert version.retired <= self._epoch.number, version.key
        for name, versions in self._epoch.servables.items():
            for number, served in versions.items():
                assert fits(served.manifest, served.placement) or self._is_degraded(name, number)
                holders = world.holders((name, number))
                for actor in {a for u in served.placement.values() for part in u for a in part}:
                    assert actor in self._epoch.endpoints, (name, number, actor)
                    loaded = [world.fleet.actors[actor].has_loaded(key) for key in holders]
                    assert any(loaded), (name, actor)
        for name, endpoint in self._epoch.endpoints.items():
            assert world.fleet.actors[name].endpoint == endpoint, name
        for name, labels in self._epoch.labels.items():
            assert set(labels.values()) <= self._epoch.servables[name].keys(), (name, labels)

    # Noting what happened

    def _take(self, event: Event, now: float) -> bool:
        """Note what an event says.

        Returns:
            Whether anything may follow from it. Not from what comes often, unless something waits
            for routers to move on: leases, and listings that say what was known.
        """
        world = self._world
        match event:
            case Declared():
                self._declare(event.config)
            case Listed():
                return self._on_listed(event, now)
            case Look():
                self._on_look(event)
            case ManifestRead():
                self._lives.on_manifest(event, now)
            case ActorUp():
                is_new = world.fleet.up(event.report, now, self._vouched_for(event))
                world.learn(event.report, is_new=is_new)
            case ActorLost():
                self._on_lost(event, now)
            case Warming():
                self._ordering.on_warming(event)
            case Loaded() | Rehearsed():
                failure = self._ordering.on_loaded(event, now)
                version = world.version((event.servable, event.version))
                if failure is not None and version is not None:
                    actor = event.actor if isinstance(event, Loaded) else ""
                    self._lives.on_refused(version, actor, failure, now)
            case Allowed() | Unloaded():
                self._ordering.on_answered(event)
            case RouterLeased() | RouterGone():
                self._on_router(event, now)
                return False
            case AcceleratorsFound() | NodesSeen() | NodesDrained():
                return self._on_nodes(event)
            case RebalanceAsked() | Tick():
                world.rebalancing |= isinstance(event, RebalanceAsked)
            case _:
                assert_never(event)
        return True

    def _declare(self, config: Config) -> None:
        world = self._world
        if world.config is not None:
            changed = fixed_fields_changed(world.config, config)
            if changed:
                raise FailedPrecondition(
                    f"{', '.join(changed)} cannot change while the cluster runs; "
                    "take it down and up again"
                )
        world.config = config
        world.leases.lease_s = config.cluster.lease_s
        self._declare_actors()
        declared = {servable.name: servable for servable in config.servables}
        for name, servable in declared.items():
            if name in world.servables:
                world.servables[name].declare(servable)
            else:
                world.servables[name] = Servable(servable)
        for name in world.servables.keys() - declared.keys():
            world.servables[name].removed = True

    def _on_nodes(self, event: AcceleratorsFound | NodesSeen | NodesDrained) -> bool:
        if not isinstance(event, AcceleratorsFound):
            return take_nodes(self._world, event)
        if event.count > self._world.accelerators:
            self._world.accelerators = event.count
            self._declare_actors()
        return True

    def _declare_actors(self) -> None:
        world = self._world
        if world.config is not None:
            world.fleet.declare(actor_counts(world.config.cluster, world))

    def _on_listed(self, event: Listed, now: float) -> bool:
        servable = self._world.servables.get(event.servable)
        if servable is None or self._world.config is None:
            return False
        servable.list_at = listing_at(self._world.config.cluster.poll_s, now)
        self._idle_until = min(self._idle_until, servable.list_at)
        return servable.take_listing(event)

    def _on_look(self, event: Look) -> None:
        servable = self._world.servables.get(event.servable)
        if servable is not None and not servable.removed:
            servable.list_at = -math.inf
            servable.try_again()

    def _on_router(self, event: RouterLeased | RouterGone, now: float) -> None:
        if isinstance(event, RouterLeased):
            self._world.leases.renew(event.router, event.oldest_live_epoch, now, event.epoch)
        else:
            self._world.leases.forget(event.router)

    def _on_lost(self, event: ActorLost, now: float) -> None:
        for key in self._world.fleet.lost(event, now):
            version = self._world.version(key)
            if version is not None and version.state in (State.LOADING, State.WARMING):
                version.suspect = True
                text = f"{event.name} was lost while loading it: {event.reason or 'no reason'}"
                self._lives.fail(version, Failure(code=str(Code.UNAVAILABLE), message=text), now)

    def _vouched_for(self, event: ActorUp) -> frozenset[tuple[str, int]]:
        """Versions whose parts on this actor are known to be the ones that are placed there."""
        name = event.report.endpoint.actor
        return frozenset(
            version.key
            for version in self._world.versions()
            if version.recovered and name in version.actors
        )

    # Comparing what should be with what is

    def _reconcile(self, now: float) -> list[Effect]:
        world = self._world
        if world.config is None:
            return []
        world.leases.expire(now, world.grace_s())
        # Before lives move, since they wait for starts that are not overdue; and after, since an
        # actor may have lost its last reason to run.
        starts = world.fleet.reconcile(now, world.needed())
        if world.recovering and self._lives.is_all_heard(now):
            world.recovering = False
            self._lives.settle(now)
        published: list[Effect] = []
        orders: list[Effect] = []
        if not world.recovering:
            published = self._publish(now)
            orders = self._ordering.reconcile(now)
        starts += world.fleet.reconcile(now, world.needed())
        return [*self._persist(), *published, *starts, *self._asks(now), *orders]

    def _publish(self, now: float) -> list[Effect]:
        """Move every version as far as it goes, then publish what came of it, once."""
        world = self._world
        number = self._epoch.number + 1
        assert number < (world.term + 1) * EPOCHS_PER_TERM
        self._lives.move(now, number)
        servables = [servable for _, servable in sorted(world.servables.items())]
        table, endpoints = routing_table(servables, world.fleet)
        traffic = traffic_of(servables, table)
        epoch = Epoch(
            term=world.term,
            number=number,
            servables=table,
            labels=traffic.labels,
            pending=traffic.pending,
            splits=traffic.splits,
            copies=traffic.copies,
            logs=logs_of(servables),
            endpoints=endpoints,
            statuses=statuses(servables, world.fleet),
            continuation_bytes_min=world.continuation_bytes_min,
            hot_rows_bytes=0 if world.config is None else world.config.cluster.hot_rows_bytes,
        )
        for version in world.versions():
            version.exposed = version.exposed or version.state is State.AVAILABLE
        if self.epoch is not None and _content(epoch) == _content(self.epoch):
            return []
        self._epoch = epoch
        return [Publish(epoch=epoch)]

    def _persist(self) -> list[Effect]:
        kept = self._to_keep()
        if kept == self._kept:
            return []
        self._kept = kept
        self._seq += 1
        state = replace(kept, seq=self._seq)
        return [Persist(term=state.term, seq=state.seq, data=encode(state))]

    def _to_keep(self) -> DeclaredState:
        """What a later reign must know, but for its number."""
        world = self._world
        rollouts = {n: each.rollout for n, each in sorted(world.servables.items()) if each.rollout}
        return DeclaredState(
            term=world.term,
            seq=0,
            config=world.config,
            placements=world.placements(),
            rollouts=rollouts,
            drained=tuple(sorted(world.fleet.drained)),
            rebalancing=world.rebalancing,
        )

    def _asks(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        again_at = now + self._world.settings.ask_timeout_s
        for name, servable in sorted(self._world.servables.items()):
            if now >= servable.list_at and not servable.removed:
                servable.list_at = again_at
                effects.append(ListStore(servable=name, source=servable.config.source))
            for number, version in sorted(servable.versions.items()):
                if version.is_unread and now >= version.ask_at:
                    version.ask_at = again_at
                    effects.append(ReadManifest(servable=name, version=number))
        return effects

    def _is_degraded(self, name: str, number: int) -> bool:
        found = [self._world.version(key) for key in self._world.holders((name, number))]
        return any(
            each is None or each.units is None or each.is_degraded(self._world.fleet)
            for each in found
        )


def _content(epoch: Epoch) -> tuple[object, ...]:
    """What an epoch says, without its number."""
    traffic = (epoch.labels, epoch.pending, epoch.splits, epoch.copies, epoch.logs)
    return (epoch.servables, traffic, epoch.endpoints, epoch.statuses, epoch.hot_rows_bytes)
