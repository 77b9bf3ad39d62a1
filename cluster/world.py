"""All that the controller of one reign knows, and the questions that need several parts of it.

`World` is the state that `cluster.control` takes events into; `cluster.lives` and
`cluster.ordering` decide over it. It decides nothing itself.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from batching.errors import Code
from cluster.config import Config
from cluster.declared import Placed
from cluster.fleet import Fleet, HoldState, Key
from cluster.leases import Leases
from cluster.ledger import Version
from cluster.lifecycle import State
from cluster.pieces import PieceKey, add_pieces
from cluster.placement import Copies, pieces_on
from cluster.servables import Servable
from cluster.shifts import is_open
from cluster.signals import Failure, Replay
from cluster.sizes import Measured, measured
from cluster.supervision import Intensity, backoff_s
from cluster.tiers import cached_part, with_tier
from shards.manifest import MapUnit
from shards.orders import ActorReport, HostedUnit

__all__ = [
    "EPOCHS_PER_TERM",
    "LETTING_GO",
    "RETRIABLE",
    "WANTING",
    "ControlSettings",
    "World",
    "listing_at",
]

#: Epoch numbers of a reign lie above its term times this, so they grow across reigns without a
#: word between them; at one epoch a second a reign would last thirty years.
EPOCHS_PER_TERM: Final = 10**9

#: States in which every actor that a version is placed on should hold it.
WANTING: Final = frozenset({State.LOADING, State.WARMING, State.AVAILABLE})

#: States in which actors should let go of a version.
LETTING_GO: Final = frozenset({State.UNLOADING, State.ERROR})

#: A part of a period.
_ALMOST: Final = 0.05

#: Codes of failures after which another try may end otherwise.
RETRIABLE: Final = frozenset(
    {str(Code.UNAVAILABLE), str(Code.RESOURCE_EXHAUSTED), str(Code.DEADLINE_EXCEEDED)}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlSettings:
    """Bounds that are not the user's to declare.

    Attributes:
        accelerators: device actors to run, one each, until more are found; 0 for as many as are
            declared.
        intensity: bounds on restarts of actors.
        attempts_max: lives of a version that may fail before it is left alone. Below
            `Intensity.crashes_max`, so that a version that kills its actors is given up first.
        retry_first_s: delay before the second life; doubled for every further one.
        retry_s_max: no delay is longer.
        ask_timeout_s: a listing or a manifest that does not come is asked for again.
        order_timeout_s: an order without an answer is given again.
        start_timeout_s: as of `cluster.fleet.Fleet`.
        recovery_timeout_s: how long a new reign waits for actors to be heard.
    """

    accelerators: int = 0
    intensity: Intensity = field(default_factory=Intensity)
    attempts_max: int = 4
    retry_first_s: float = 1.0
    retry_s_max: float = 60.0
    ask_timeout_s: float = 30.0
    order_timeout_s: float = 600.0
    start_timeout_s: float = 120.0
    recovery_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        assert 1 <= self.attempts_max < self.intensity.crashes_max


class World:
    """The state of one reign.

    Attributes:
        term: the reign.
        settings: bounds.
        config: what is declared.
        accelerators: the most that were seen in the cluster at once.
        fleet: the actors.
        leases: the routers.
        measured: what steps of units allocate.
        servables: by name.
        nodes: those that live, with their bytes of memory.
        accelerators_on: nodes that have any, with how many.
        first_epoch: the number of the reign's first epoch.
        rebalancing: tables are being made even over the actors.
        recovering: what the last reign left is not settled yet.
        recover_by: when to stop waiting for actors that are not heard.
    """

    __slots__ = (
        "accelerators",
        "accelerators_on",
        "config",
        "first_epoch",
        "fleet",
        "leases",
        "measured",
        "nodes",
        "rebalancing",
        "recover_by",
        "recovering",
        "servables",
        "settings",
        "term",
    )

    def __init__(self, term: int, settings: ControlSettings) -> None:
        self.term = term
        self.settings = settings
        self.config: Config | None = None
        self.accelerators = settings.accelerators
        self.fleet = Fleet(settings.intensity, settings.start_timeout_s)
        self.leases = Leases()
        self.measured = Measured()
        self.servables: dict[str, Servable] = {}
        self.nodes: Mapping[str, int] = {}
        self.accelerators_on: Mapping[str, int] = {}
        self.first_epoch = term * EPOCHS_PER_TERM + 1
        self.rebalancing = False
        self.recovering = False
        self.recover_by = math.inf

    def version(self, key: Key) -> Version | None:
        """A version that lives, or failed and is aspired."""
        servable = self.servables.get(key[0])
        return None if servable is None else servable.versions.get(key[1])

    def holders(self, key: Key) -> set[Key]:
        """Versions that may have a unit of this one: itself, and those that it refers to."""
        version = self.version(key)
        return {key} if version is None or version.bound is None else {key, *version.bound.through}

    def versions(self) -> Iterator[Version]:
        """All of them, by name and number."""
        for _, servable in sorted(self.servables.items()):
            if len(servable.versions) == 1:  # most have one
                yield from servable.versions.values()
                continue
            for _, version in sorted(servable.versions.items()):
                yield version

    def _unordered(self) -> Iterator[Version]:
        """All versions, for questions whose answer does not depend on their order."""
        for servable in self.servables.values():
            yield from servable.versions.values()

    def placements(self) -> tuple[Placed, ...]:
        """What to remember for the next reign."""
        return tuple(kept for version in self.versions() if (kept := version.kept()) is not None)

    def needed(self) -> frozenset[str]:
        """Actors that parts of a wanted version are placed on."""
        return frozenset(
            actor
            for version in self._unordered()
            if version.state in WANTING or version.state is State.RESERVED
            for actor in version.homes
        )

    def pieces(self, without: Collection[Version] = ()) -> dict[str, dict[PieceKey, int]]:
        """Actor to everything promised there; equal parts of several versions count once.

        Args:
            without: versions that do not count.
        """
        book: dict[str, dict[PieceKey, int]] = {}
        for version in self.versions():
            if version.state is not State.END and version not in without:
                for name, pieces in version.pieces.items():
                    add_pieces(book.setdefault(name, {}), pieces)
        for name, pieces in book.items():
            actor = self.fleet.actors.get(name)
            book[name] = measured(pieces, None if actor is None else actor.report)
        return book

    def learn(self, report: ActorReport, *, is_new: bool = False) -> None:
        """Note what an actor has measured.

        A process that is new has measured nothing. It is promised what the last one is known to
        have taken: else others were let in where what serves must come back.
        """
        manifests = (version.manifest for version in self.versions())
        units = (unit for each in manifests if each is not None for unit in each.units.values())
        self.measured.take(report, (unit for unit in units if isinstance(unit, MapUnit)))
        if is_new:
            for version in self.versions():
                if report.endpoint.actor in version.pieces and version.manifest is not None:
                    version.pieces = self.pieces_of(version, version.units or {})

    def cached_part(self, version: Version) -> float | None:
        """Of a version whose manifest is known, see `cluster.tiers`."""
        assert version.manifest is not None
        return cached_part(self.servables[version.key[0]].config, version.manifest)

    def pieces_of(
        self, version: Version, units: Mapping[str, Copies]
    ) -> dict[str, dict[PieceKey, int]]:
        """What a version whose manifest is known would put where, with bytes."""
        assert version.manifest is not None
        steps, cached = self.measured.steps, self.cached_part(version)
        return pieces_on(version.manifest, units, steps, cached)

    def order_of(self, version: Version, actor: str) -> tuple[HostedUnit, ...]:
        """What an actor is to host of a version that is placed."""
        assert version.manifest is not None
        return with_tier(version.orders[actor], version.manifest, self.cached_part(version))

    def room(self) -> object:
        """A value that changes when a placement that was refused might succeed."""
        sites = self.fleet.sites(self.pieces())
        return tuple((s.name, s.capacity_bytes, tuple(sorted(s.pieces.items()))) for s in sites)

    def may_unload(self, version: Version, now: float) -> bool:
        """Whether no request can be using it any more."""
        if not version.exposed:
            return True
        return version.retired is not None and self.unload_at(version, now) is None

    def unload_at(self, version: Version, now: float) -> float | None:
        """When at the latest no request can be using a retired version; None for now."""
        assert version.retired is not None
        return self.leases.passes_at(version.retired, self._grace_of(version), now)

    def leaves_at(self, version: Version, actor: str, now: float) -> float | None:
        """When at the latest no request can ask an idle actor for a version; None for now."""
        return self.leases.passes_at(version.idle[actor], self._grace_of(version), now)

    def gives_at(self, version: Version, now: float) -> float | None:
        """When at the latest no request can ask who gives parts for them; None for now."""
        return self.leases.passes_at(version.given_at, self._grace_of(version), now)

    def _giving(self) -> Iterator[Version]:
        """Versions of which an actor is to give parts when no request can be asking it."""
        for version in self._unordered():
            shift = version.shift
            if shift is None or version.units is None or is_open(shift, version.units):
                continue
            actor = self.fleet.actors.get(shift.old)
            if actor is not None and version.key in actor.holds:
                yield version

    def _given_up(self) -> Iterator[tuple[Version, str]]:
        """Versions, and idle actors that hold them still."""
        for version in self._unordered():
            for name in version.idle:  # hardly any has one
                actor = self.fleet.actors.get(name)
                if actor is not None and version.key in actor.holds:
                    yield version, name

    def orphans_unload_at(self, now: float) -> float | None:
        """When at the latest no request can be using what only an earlier reign knew of."""
        return self.leases.passes_at(self.first_epoch, self.grace_s(), now)

    def _grace_of(self, version: Version) -> float:
        """The longest that a request may take that uses a version, or one that refers to it."""
        if any(not each.is_bound or each.bound for each in self._unordered()):
            return self.grace_s()
        return self.servables[version.key[0]].deadline_s

    def grace_s(self) -> float:
        """The longest that any request may take."""
        return max((each.deadline_s for each in self.servables.values()), default=0.0)

    def retry_at(self, failure: Failure, attempts: int, now: float) -> float:
        """When to try again after this many failures in a row; infinity for never."""
        if failure.code not in RETRIABLE or attempts >= self.settings.attempts_max:
            return math.inf
        return now + backoff_s(attempts - 1, self.settings.retry_first_s, self.settings.retry_s_max)

    @property
    def continuation_bytes_min(self) -> int | None:
        """From which size rows go from shards straight to devices; None for never."""
        # Actors reach one another by sockets alone.
        if self.config is None or self.config.cluster.transport == "ray":
            return None
        return self.config.cluster.continuation_bytes_min

    def replayed_by(self, version: Version, replay: Replay) -> float:
        """When a replay that was not heard of is asked for again."""
        declared = self.servables[version.key[0]].config
        return replay.at + declared.warmup_s + self.settings.order_timeout_s

    def again_at(self, failure: Failure, attempts: int, now: float) -> float:
        """When to give an actor back its part of what serves elsewhere; infinity for never.

        It is not given up after so many attempts: what there was no room for may find some.
        """
        if failure.code not in RETRIABLE:
            return math.inf
        return now + backoff_s(attempts - 1, self.settings.retry_first_s, self.settings.retry_s_max)

    def asked_again_at(self, attempts: int, now: float) -> float:
        """When to ask a copy again for warm-up requests that it has failed to answer."""
        return now + backoff_s(attempts - 1, self.settings.retry_first_s, self.settings.retry_s_max)

    def waits_for_routers(self) -> bool:
        """Whether anything is to be unloaded once routers have moved on."""
        return (
            any(
                version.retired is not None and version.state is not State.END
                for version in self._unordered()
            )
            or any(
                hold.state is HoldState.ORPHAN
                for actor in self.fleet.actors.values()
                for hold in actor.holds.values()
            )
            or any(True for _ in self._given_up())
            or any(True for _ in self._giving())
        )

    def _replays_due(self) -> Iterator[float]:
        for version in self._unordered():
            if version.rehearsal is not None and version.state in (State.WARMING, State.AVAILABLE):
                yield self.replayed_by(version, version.rehearsal)

    def wakeups(self, now: float) -> Iterator[float]:
        """When anything is due by time alone; some may lie in the past, or be never."""
        yield self.leases.looks_at if self.waits_for_routers() else math.inf
        yield from self.fleet.wakeups()
        yield from self._replays_due()
        for servable in self.servables.values():
            if not servable.removed:
                yield servable.list_at
        for version in self._unordered():
            if version.is_unread:
                yield version.ask_at
            if version.state is State.END and version.retry_at is not None:
                yield version.retry_at
            if version.retired is not None:
                yield self.unload_at(version, now) or math.inf
        for version, name in self._given_up():
            yield self.leaves_at(version, name, now) or math.inf
        for version in self._giving():
            yield self.gives_at(version, now) or math.inf
        if self.recovering:
            yield self.recover_by
        yield from self._orders_due(now)

    def _orders_due(self, now: float) -> Iterator[float]:
        for actor in self.fleet.actors.values():
            for hold in actor.holds.values():
                if hold.is_coming or hold.is_changing or hold.state is HoldState.UNLOADING:
                    yield hold.at + self.settings.order_timeout_s
                elif hold.state is HoldState.FAILED:
                    yield hold.at
                elif hold.state is HoldState.LOADED and hold.attempts:
                    yield hold.at  # warm-up requests that it did not answer
                elif hold.state is HoldState.ORPHAN:
                    yield self.orphans_unload_at(now) or math.inf


def listing_at(poll_s: float, now: float) -> float:
    """When to list a servable again that was listed just now.

    At a multiple of the period, so that all servables are listed together: each by itself would
    have hundreds of them compared a hundred times a second. A moment before such a multiple the
    next one is meant.
    """
    return math.floor(now / poll_s + 1.0 + _ALMOST) * poll_s
