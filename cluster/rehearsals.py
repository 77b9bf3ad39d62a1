"""When a version's warm-up requests are replayed, and what the outcome means for its life.

A version that carries such requests is not available before they have been answered by the very
processes that it was loaded on. Decides when a router is asked to replay them, and whether an
answer still holds: one that is about processes that have been replaced meanwhile says nothing.
Does not know which router replays, nor what is in a request (`cluster.rehearsing`).
"""

from __future__ import annotations

from collections.abc import Mapping

from cluster.epochs import Rehearsal, ServableVersion
from cluster.ledger import Replay, Version
from cluster.lifecycle import State
from cluster.signals import Effect, Failure, Rehearse, Rehearsed
from cluster.world import World
from shards.orders import Endpoint

__all__ = ["Rehearsals"]


class Rehearsals:
    """Has warm-up requests replayed.

    Args:
        world: what is known.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._number = 0

    def reconcile(self, now: float) -> list[Effect]:
        """The replays that are due."""
        return [
            effect
            for version in self._world.versions()
            if version.state is State.WARMING and version.is_unrehearsed
            for effect in self._due(version, now)
        ]

    def is_current(self, effect: Rehearse) -> bool:
        """Whether its answer is waited for."""
        manifest = effect.order.served.manifest
        return self._waiting(manifest.name, manifest.version, effect.number) is not None

    def on_rehearsed(self, event: Rehearsed) -> Failure | None:
        """A replay has ended.

        Returns:
            Why the version's life fails, where it does.
        """
        version = self._waiting(event.servable, event.version, event.number)
        if version is None or version.rehearsal is None:
            return None
        asked = version.rehearsal.endpoints
        version.rehearsal, version.note = None, ""
        if version.state is not State.WARMING or asked != self._endpoints(version):
            return None
        if event.error is not None:
            return event.error
        version.rehearsed = True
        return None

    def _waiting(self, servable: str, number: int, replay: int) -> Version | None:
        version = self._world.version((servable, number))
        if version is None or version.rehearsal is None or version.rehearsal.number != replay:
            return None
        return version

    def _due(self, version: Version, now: float) -> list[Effect]:
        endpoints = self._endpoints(version)
        if endpoints is None:
            return []  # an actor is away; it loads the version again first
        replay = version.rehearsal
        is_same = replay is not None and replay.endpoints == endpoints
        if replay is not None and is_same and now < self._world.replayed_by(version, replay):
            return []
        self._number += 1
        version.rehearsal = Replay(self._number, now, endpoints)
        manifest, config = version.manifest, self._world.config
        assert manifest is not None
        assert manifest.warmups is not None
        assert config is not None
        version.note = f"answers {manifest.warmups.requests} warm-up requests"
        declared = self._world.servables[manifest.name].config
        order = Rehearsal(
            store=config.store,
            served=ServableVersion(
                manifest=manifest,
                placement=version.live_units(self._world.fleet),
                deadline_ms=declared.deadline_ms,
            ),
            endpoints=dict(endpoints),
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
