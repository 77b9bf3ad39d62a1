"""The actors: which should run, which do, and what each of them holds.

Decides when an actor is started, started again or given up, and keeps the book of orders: what an
actor holds is learned once, from the first report of a process, and from then on only from
answers to our own orders, matched by number, so that nothing late or said twice is believed.
Does not know servables' states, placements or epochs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from enum import StrEnum
from typing import Any, Final

import msgspec

from batching.allowance import Allowance
from cluster.pieces import PieceKey
from cluster.rates import rates_between
from cluster.signals import ActorLost, Effect, EnsureActor, StopActor
from cluster.sites import Site
from cluster.supervision import Intensity, judge
from shards.orders import ActorKind, ActorReport, Endpoint, HostedUnit

__all__ = ["Actor", "ActorState", "Fleet", "Hold", "HoldState", "Key", "actor_name", "kind_in"]

#: (servable, version)
Key = tuple[str, int]

#: Of a load, what a status shows.
_LOADING: Final = (
    "bytes_done", "bytes_total", "buckets_done", "buckets_total", "eta_s", "note",
)  # fmt: skip
#: Lost generations that are remembered, so that a late word of one is recognised.
_BURIED_MAX: Final = 16


class ActorState(StrEnum):
    """Whether an actor can be used."""

    STARTING = "STARTING"  # asked for, not heard yet
    UP = "UP"
    WAITING = "WAITING"  # crashed; the next start is later
    FAILED = "FAILED"  # crashed too often; tried again after a pause, or a new declaration
    STOPPING = "STOPPING"  # told to end


class HoldState(StrEnum):
    """What an actor has of a version."""

    LOADING = "LOADING"
    WARMING = "WARMING"
    LOADED = "LOADED"
    UNLOADING = "UNLOADING"
    FAILED = "FAILED"  # it holds nothing; tried again later
    ORPHAN = "ORPHAN"  # held since before this reign, and nothing vouches for which parts


class Hold:
    """One version on one actor.

    Attributes:
        state: see `HoldState`.
        number: of the order that is out.
        at: when that order was last given, or when to try again after a failure.
        attempts: failures in a row.
        error: the latest failure, for people.
        allowance: of the servable, as the actor was last told; None where that is not known.
        is_proven: it has answered warm-up requests, or an epoch has named it for requests.
        ordered: what it was last told to host.
        units: what it has answered to host; None where only an earlier reign could tell.
        is_changing: what it is told to host is another thing than what it hosts, and serves
            meanwhile.
        has_refused: it did not take that.
    """

    __slots__ = (
        "allowance", "at", "attempts", "error", "has_refused", "is_changing", "is_proven",
        "number", "ordered", "state", "units",
    )  # fmt: skip

    def __init__(self, state: HoldState, number: int = 0, at: float = 0.0) -> None:
        self.state = state
        self.number = number
        self.at = at
        self.attempts = 0
        self.error = ""
        self.allowance: Allowance | None = None
        self.is_proven = False
        self.ordered: tuple[HostedUnit, ...] = ()
        self.units: tuple[HostedUnit, ...] | None = None
        self.is_changing = False
        self.has_refused = False

    def holds(self, units: tuple[HostedUnit, ...]) -> bool:
        """Whether it is known to hold exactly these."""
        return self.state is HoldState.LOADED and not self.is_changing and self.units == units

    @property
    def is_coming(self) -> bool:
        """Whether a load order is out."""
        return self.state in (HoldState.LOADING, HoldState.WARMING)


class Actor:
    """One actor. `since` is when its state began or was last pressed for."""

    __slots__ = (
        "buried",
        "crashes",
        "holds",
        "kind",
        "name",
        "overdue",
        "pauses",
        "previous",
        "reason",
        "report",
        "restart_at",
        "since",
        "state",
    )

    def __init__(self, name: str, kind: ActorKind, now: float) -> None:
        self.name = name
        self.kind: ActorKind = kind
        self.state = ActorState.WAITING
        self.since = now
        self.restart_at = now
        self.overdue = False
        self.report: ActorReport | None = None
        #: what the same process said before that
        self.previous: ActorReport | None = None
        self.buried: deque[int] = deque(maxlen=_BURIED_MAX)
        self.crashes: tuple[float, ...] = ()
        self.pauses = 0
        self.reason = ""
        self.holds: dict[Key, Hold] = {}

    @property
    def endpoint(self) -> Endpoint | None:
        """Where its data plane listens, while it is up."""
        return self.report.endpoint if self.report is not None else None

    @property
    def generation(self) -> int:
        """Of the running process, 0 while there is none."""
        return self.report.endpoint.generation if self.report is not None else 0

    def _device(self) -> dict[str, Any] | None:
        """What its device did between its last two reports; None where it has none."""
        report, previous = self.report, self.previous
        if report is None or report.statistics is None:
            return None
        before = None if previous is None else previous.statistics
        found: dict[str, Any] = msgspec.to_builtins(
            rates_between(self.name, before, report.statistics)
        )
        return found

    def has_loaded(self, key: Key) -> bool:
        """Whether it is up and answers for this version."""
        hold = self.holds.get(key)
        return self.state is ActorState.UP and hold is not None and hold.state is HoldState.LOADED

    def status(self, promised_bytes: int) -> dict[str, Any]:
        """What a person may want to know, as plain JSON values.

        Args:
            promised_bytes: memory that versions which are placed on it were promised.
        """
        report = self.report
        return {
            "kind": self.kind,
            "state": str(self.state),
            "generation": self.generation,
            "node": "" if report is None else report.endpoint.node,
            "reason": self.reason,
            "recent_crashes": len(self.crashes),
            "capacity_bytes": 0 if report is None else report.capacity_bytes,
            "promised_bytes": promised_bytes,
            "reserved_bytes": 0 if report is None else report.reserved_bytes,
            "compiles_after_available": 0 if report is None else report.compiles_after_available,
            "mismatches": 0 if report is None else report.mismatches,
            "units": [
                {
                    "id": each.id,
                    "users": list(each.users),
                    "bytes": each.nbytes,
                    "batch_max": each.batch_max,
                    "note": each.note,
                    "cache": None if each.cache is None else msgspec.to_builtins(each.cache),
                }
                for each in (() if report is None else report.units)
            ],
            "costs": [
                {"unit": each.unit, "shape": each.shape, "sizes": each.sizes}
                for each in (() if report is None else report.costs)
            ],
            "device": self._device(),
            "loading": {
                f"{each.servable}:{each.version}": {name: getattr(each, name) for name in _LOADING}
                for each in (() if report is None else report.loading)
            },
            "holds": {
                f"{name}:{version}": str(hold.state)
                for (name, version), hold in sorted(self.holds.items())
            },
        }


def actor_name(kind: ActorKind, index: int) -> str:
    """The name of an actor, e.g. ``shard-3``."""
    return f"{kind}-{index}"


def kind_in(name: str) -> ActorKind:
    """The kind that a name made by `actor_name` tells."""
    for kind in _KINDS:
        if name.startswith(f"{kind}-"):
            return kind
    raise AssertionError(f"{name!r} is not a name of an actor")


def _index(name: str) -> int:
    return int(name.rpartition("-")[2])


_KINDS: Final[tuple[ActorKind, ...]] = ("device", "shard", "host")


class Fleet:
    """All actors.

    Args:
        intensity: bounds on restarts.
        start_timeout_s: a start that is silent for so long is asked for again, and placement no
            longer waits for it.
    """

    def __init__(self, intensity: Intensity, start_timeout_s: float) -> None:
        self.actors: dict[str, Actor] = {}
        self.declared: frozenset[str] = frozenset()
        #: nodes on which no actor should be, and those of them for which there is another
        self.drained: frozenset[str] = frozenset()
        self.avoided: frozenset[str] = frozenset()
        self._counts: Mapping[ActorKind, int] = {}
        self._intensity = intensity
        self._start_timeout_s = start_timeout_s

    def declare(self, counts: Mapping[ActorKind, int]) -> None:
        """Set which actors should run; those that were given up get another chance."""
        self._counts = counts
        self._choose(())
        for actor in self.actors.values():
            if actor.state is ActorState.FAILED:
                actor.state, actor.restart_at = ActorState.WAITING, 0.0
                actor.crashes, actor.pauses = (), 0

    def recount(self, counts: Mapping[ActorKind, int], needed: frozenset[str]) -> bool:
        """Set how many actors should run, and nothing else; whether that is news."""
        is_news = counts != self._counts
        if is_news:
            self._counts = counts
            self._choose(needed)
        return is_news

    @property
    def leaving(self) -> frozenset[str]:
        """Actors that run on a node on which none should."""
        if not self.avoided:
            return frozenset()
        return frozenset(
            name
            for name, actor in self.actors.items()
            if actor.report is not None and actor.report.endpoint.node in self.avoided
        )

    def choose(self, needed: frozenset[str]) -> bool:
        """Settle which names are declared, where nodes are drained or were; whether it changes.

        Args:
            needed: actors that versions are placed on.
        """
        before = self.declared
        if self.avoided or not needed <= before:
            self._choose(needed)
        return self.declared != before

    def _choose(self, needed: Collection[str]) -> None:
        """None that is leaving; such that versions are placed on come before those without.

        Among equals those come first that were declared before.
        """
        leaving = self.leaving
        chosen: list[str] = []
        for kind, count in self._counts.items():
            own = sorted((n for n in self.declared - leaving if kind_in(n) == kind), key=_index)
            used = sorted((n for n in needed if kind_in(n) == kind), key=_index)
            kept = [n for n in own if n in needed]
            fresh = (actor_name(kind, i) for i in range(count + len(leaving) + len(own)))
            names = [n for n in dict.fromkeys((*kept, *used, *own, *fresh)) if n not in leaving]
            chosen += names[:count]
        self.declared = frozenset(chosen)

    def is_up(self, name: str) -> bool:
        """Whether the actor runs."""
        actor = self.actors.get(name)
        return actor is not None and actor.state is ActorState.UP

    def has_loaded(self, name: str, key: Key) -> bool:
        """Whether the actor answers for a version; one that is no longer known does not."""
        actor = self.actors.get(name)
        return actor is not None and actor.has_loaded(key)

    def up(self, report: ActorReport, now: float, vouched: Collection[Key]) -> bool:
        """An actor reported.

        Args:
            report: what it said.
            now: the present instant.
            vouched: versions that a process of an earlier reign, if it holds them, holds in the
                very parts that are placed on it.

        Returns:
            Whether this is a process not seen before.
        """
        name, generation = report.endpoint.actor, report.endpoint.generation
        actor = self.actors.get(name)
        if actor is None:
            # Left by an earlier reign and no longer declared: known, so that it can be ended.
            actor = self.actors[name] = Actor(name, report.kind, now)
        if generation in actor.buried:
            return False
        if actor.report is not None and actor.generation == generation:
            actor.previous, actor.report = actor.report, report
            # It may have ended an order of an earlier reign meanwhile. Not believed to be usable,
            # only noted, so that it is let go of.
            for key in report.loaded:
                actor.holds.setdefault(key, Hold(HoldState.ORPHAN))
            return False
        if actor.report is not None:
            self._bury(actor, now, "replaced by another process")
        actor.report, actor.state, actor.since, actor.overdue = report, ActorState.UP, now, False
        actor.reason = ""
        for key in report.loaded:
            actor.holds[key] = Hold(HoldState.LOADED if key in vouched else HoldState.ORPHAN)
        return True

    def lost(self, event: ActorLost, now: float) -> tuple[Key, ...]:
        """An actor's process is gone.

        Returns:
            The versions that it was loading.
        """
        actor = self.actors.get(event.name)
        if actor is None or (event.generation and event.generation in actor.buried):
            return ()
        if actor.report is not None:
            if event.generation != actor.generation:
                return ()
        elif actor.state is not ActorState.STARTING:
            return ()
        coming = tuple(key for key, hold in actor.holds.items() if hold.is_coming)
        if actor.state is ActorState.STOPPING:
            del self.actors[event.name]
            return coming
        if event.generation:
            actor.buried.append(event.generation)
        self._bury(actor, now, event.reason or "lost")
        return coming

    def reconcile(self, now: float, needed: frozenset[str]) -> list[Effect]:
        """Start what should run, end what nothing needs.

        Args:
            now: the present instant.
            needed: actors that versions are placed on.
        """
        self.choose(needed)
        effects: list[Effect] = []
        for name in sorted(self.declared.union(needed) - self.actors.keys()):
            self.actors[name] = Actor(name, kind_in(name), now)
        for name, actor in sorted(self.actors.items()):
            # What it still holds may be asked for by requests of older epochs.
            wanted = name in self.declared or name in needed or actor.holds
            if not wanted or actor.state is ActorState.STOPPING:
                effects += self._stop(actor, now)
            elif self._is_start_due(actor, now):
                # Nothing waits for one that has been silent, or has crashed too often.
                actor.overdue = actor.overdue or actor.state is not ActorState.WAITING
                actor.state, actor.since = ActorState.STARTING, now
                effects.append(EnsureActor(name=name, kind=actor.kind))
        return effects

    def awaited(self, kinds: Collection[ActorKind]) -> list[str]:
        """Declared actors of these kinds that may come up soon."""
        return sorted(
            name
            for name in self.declared
            if (actor := self.actors.get(name)) is not None
            and actor.kind in kinds
            and not actor.overdue
            and actor.state in (ActorState.STARTING, ActorState.WAITING)
        )

    def sites(self, pieces: Mapping[str, Mapping[PieceKey, int]], without: str = "") -> list[Site]:
        """The actors that may host more.

        Args:
            pieces: actor to what is promised there.
            without: an actor that is left out.
        """
        return [
            Site(
                name=name,
                kind=actor.kind,
                node=actor.report.endpoint.node,
                capacity_bytes=actor.report.capacity_bytes,
                pieces=pieces.get(name, {}),
            )
            for name, actor in sorted(self.actors.items())
            if actor.state is ActorState.UP
            and name in self.declared
            and name != without
            and actor.report is not None
        ]

    def holders(self, key: Key) -> list[str]:
        """Actors that have anything of a version."""
        return sorted(name for name, actor in self.actors.items() if key in actor.holds)

    def distrust(self, key: Key) -> None:
        """What actors have of a version since an earlier reign is not what it is now."""
        for actor in self.actors.values():
            if key in actor.holds:
                actor.holds[key] = Hold(HoldState.ORPHAN)

    def wakeups(self) -> Iterator[float]:
        """When actors are due."""
        for actor in self.actors.values():
            if actor.state in (ActorState.STARTING, ActorState.STOPPING):
                yield actor.since + self._start_timeout_s
            elif actor.state in (ActorState.WAITING, ActorState.FAILED):
                yield actor.restart_at

    def check_invariants(self) -> None:
        """Full check of the book."""
        for name, actor in self.actors.items():
            assert actor.name == name
            running = actor.state in (ActorState.UP, ActorState.STOPPING)
            assert (actor.report is not None) == running, (name, actor.state)
            assert running or not actor.holds, (name, actor.holds)
            assert actor.generation not in actor.buried or actor.generation == 0, name
            assert len(actor.crashes) <= self._intensity.crashes_max + 1, name

    def _bury(self, actor: Actor, now: float, reason: str) -> None:
        if actor.report is not None and actor.generation not in actor.buried:
            actor.buried.append(actor.generation)
        intensity = self._intensity
        lived_s = now - actor.since if actor.state is ActorState.UP else 0.0
        pauses = actor.pauses if lived_s < intensity.window_s else 0
        verdict = judge((*actor.crashes, now), now, intensity, pauses)
        actor.crashes, actor.pauses = verdict.recent, verdict.pauses
        actor.restart_at = verdict.restart_at
        actor.report = actor.previous = None
        actor.holds = {}
        actor.since = now
        actor.reason = reason
        actor.state = ActorState.WAITING
        if verdict.pauses:
            actor.state = ActorState.FAILED
            pause_s = verdict.restart_at - now
            actor.reason = f"{reason}; it crashed too often and is tried again after {pause_s:g} s"

    def _is_start_due(self, actor: Actor, now: float) -> bool:
        if actor.state in (ActorState.WAITING, ActorState.FAILED):
            return now >= actor.restart_at
        return actor.state is ActorState.STARTING and now >= actor.since + self._start_timeout_s

    def _stop(self, actor: Actor, now: float) -> list[Effect]:
        if actor.report is None:
            # It may still come up; its report would make it known, and then it is ended.
            del self.actors[actor.name]
            return []
        pressed = actor.state is ActorState.STOPPING
        if pressed and now < actor.since + self._start_timeout_s:
            return []
        actor.state, actor.since = ActorState.STOPPING, now
        return [StopActor(name=actor.name, generation=actor.generation)]
