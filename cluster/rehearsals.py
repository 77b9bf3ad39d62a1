"""When a version's warm-up requests are replayed, and what the outcome means for its life.

A version that carries such requests is not available before they have been answered by the very
processes that it was loaded on. A copy that comes later, as an actor was replaced or versions
change places copy by copy, answers them before an epoch names it, unless it is the only copy of a
part. Decides when a router is asked to replay them, and whether an answer still holds: one that is
about processes that have been replaced meanwhile says nothing. Does not know which router replays,
nor what is in a request (`cluster.rehearsing`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from cluster.epochs import Rehearsal, ServableVersion
from cluster.ledger import Version
from cluster.lifecycle import State
from cluster.placement import Copies
from cluster.published import placed_elsewhere
from cluster.rolling import parts_of
from cluster.signals import Effect, Failure, Rehearse, Rehearsed, Replay
from cluster.world import World
from shards.orders import Endpoint

__all__ = ["Rehearsals"]

logger = logging.getLogger(__name__)


class Rehearsals:
    """Has warm-up requests replayed.

    Args:
        world: what is known.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._number = 0

    def reconcile(self, now: float) -> list[Effect]:
        """The replays that are due. To be called once what is available has been published."""
        effects: list[Effect] = []
        for version in self._world.versions():
            if version.manifest is None or version.manifest.warmups is None:
                continue
            if version.state is State.WARMING and not version.rehearsed:
                effects += self._due(version, now)
            elif version.state is State.AVAILABLE:
                for name in version.live_actors(self._world.fleet):
                    self._world.fleet.actors[name].holds[version.key].is_proven = True
                effects += self._copies_due(version, now)
        return effects

    def is_current(self, effect: Rehearse) -> bool:
        """Whether its answer is waited for."""
        manifest = effect.order.served.manifest
        return self._waiting(manifest.name, manifest.version, effect.number) is not None

    def on_rehearsed(self, event: Rehearsed, now: float) -> Failure | None:
        """A replay has ended.

        Returns:
            Why the version's life fails, where it does.
        """
        version = self._waiting(event.servable, event.version, event.number)
        if version is None or version.rehearsal is None:
            return None
        asked = version.rehearsal.endpoints
        version.rehearsal, version.note = None, ""
        if version.state is not State.WARMING:
            self._on_copies(version, asked, event.error, now)
            return None
        if asked != self._endpoints(version):
            return None
        if event.error is not None:
            return event.error
        version.rehearsed = True
        return None

    def _on_copies(
        self,
        version: Version,
        asked: Mapping[str, Endpoint],
        error: Failure | None,
        now: float,
    ) -> None:
        """Copies have answered, or are asked again later: the version goes on without them."""
        for name, endpoint in asked.items():
            actor = self._world.fleet.actors.get(name)
            if actor is None or actor.endpoint != endpoint or not actor.has_loaded(version.key):
                continue
            hold = actor.holds[version.key]
            if hold.is_proven:
                continue
            if error is None:
                hold.is_proven, hold.attempts, hold.error = True, 0, ""
                continue
            hold.attempts += 1
            hold.error = f"{error.code}: {error.message}"
            hold.at = self._world.asked_again_at(hold.attempts, now)
            version.note = f"{name} does not answer warm-up requests: {error.message}"
            logger.warning("%s: %s", version.life.name, version.note)

    def _waiting(self, servable: str, number: int, replay: int) -> Version | None:
        version = self._world.version((servable, number))
        if version is None or version.rehearsal is None or version.rehearsal.number != replay:
            return None
        return version

    def _due(self, version: Version, now: float) -> list[Effect]:
        endpoints = self._endpoints(version)
        if endpoints is None or self._is_under_way(version, now):
            return []  # an actor that is away loads the version again first
        return self._ask(version, version.live_units(self._world.fleet), endpoints, now)

    def _copies_due(self, version: Version, now: float) -> list[Effect]:
        """The replay for copies of an available version that no epoch has named."""
        fleet, key = self._world.fleet, version.key
        cold = [n for n in version.cold_actors(fleet) if now >= fleet.actors[n].holds[key].at]
        if not cold or self._is_under_way(version, now):
            return []
        # The parts that they do not have are those of a copy that answers.
        live = version.live_actors(fleet)
        units = {
            name: tuple(
                tuple(actor for actor in part if actor in cold)
                or tuple(actor for actor in part if actor in live)[:1]
                for part in parts
            )
            for name, parts in (version.units or {}).items()
        }
        parts = parts_of(units.values())
        if not all(parts):
            return []  # nobody has a part; that actor loads it again first
        endpoints = {name: fleet.actors[name].endpoint for part in parts for name in part}
        there = {name: each for name, each in sorted(endpoints.items()) if each is not None}
        return self._ask(version, units, there, now)

    def _is_under_way(self, version: Version, now: float) -> bool:
        """Whether a replay's answer may still come, and will hold then."""
        replay, actors = version.rehearsal, self._world.fleet.actors
        return (
            replay is not None
            and now < self._world.replayed_by(version, replay)
            and all(
                name in actors and actors[name].endpoint == endpoint
                for name, endpoint in replay.endpoints.items()
            )
        )

    def _ask(
        self,
        version: Version,
        units: Mapping[str, Copies],
        endpoints: Mapping[str, Endpoint],
        now: float,
    ) -> list[Effect]:
        self._number += 1
        version.rehearsal = Replay(self._number, now, endpoints)
        manifest, config = version.manifest, self._world.config
        assert manifest is not None
        assert manifest.warmups is not None
        assert config is not None
        where = "" if version.state is State.WARMING else f" on {', '.join(endpoints)}"
        version.note = f"answers {manifest.warmups.requests} warm-up requests{where}"
        declared = self._world.servables[manifest.name].config
        # What it refers to answers with it, and is available: nothing of that is to be proven.
        fleet = self._world.fleet
        others = placed_elsewhere(version, self._world.servables, fleet)
        there = {name for parts in others.values() for part in parts for name in part}
        elsewhere = {name: fleet.actors[name].endpoint for name in sorted(there)}
        bound = manifest if version.bound is None else version.bound.manifest
        order = Rehearsal(
            store=config.store,
            served=ServableVersion(
                manifest=bound, placement={**units, **others}, deadline_ms=declared.deadline_ms
            ),
            endpoints={n: e for n, e in elsewhere.items() if e is not None} | dict(endpoints),
            timeout_s=declared.warmup_s,
            continuation_bytes_min=self._world.continuation_bytes_min,
        )
        return [Rehearse(number=self._number, order=order)]

    def _endpoints(self, version: Version) -> Mapping[str, Endpoint] | None:
        """Where the processes listen that hold it; None while one of them does not."""
        fleet = self._world.fleet
        if version.live_actors(fleet) != version.actors:
            return None
        found = {name: fleet.actors[name].endpoint for name in sorted(version.actors)}
        return {name: endpoint for name, endpoint in found.items() if endpoint is not None}
