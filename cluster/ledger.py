"""What the controller core remembers of servables and versions, and how it shows them.

Values and the questions that can be answered from them alone: which versions a servable aspires,
which actors answer for a part. What an epoch says is in `cluster.published`, what a status says in
`cluster.shown`.
Decides no step of a life.

A version that lost actors stays in the epoch, without them: a part whose last copy is away has an
empty tuple of actors there, which a router answers with UNAVAILABLE. So a request gets a typed
error at once, and the version's other parts and signatures go on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Final

from batching.errors import Code, ServingError
from cluster.config import ServableConfig
from cluster.declared import Placed
from cluster.epochs import ServableVersion, VersionStatus
from cluster.fleet import Fleet, HoldState, Key
from cluster.lifecycle import Lifecycle, State, public_state
from cluster.pieces import PieceKey
from cluster.placement import Copies, orders_of, pieces_on
from cluster.references import Bound, unfit
from cluster.rolling import Parts, parts_of
from cluster.signals import Failure, Listed, Replay
from cluster.traffic import Rollout, settle
from cluster.versions import VersionSnapshot, aspired
from shards.manifest import Manifest
from shards.orders import HostedUnit

__all__ = [
    "Servable",
    "Version",
    "is_whole",
]

_NO_ROLLOUT: Final = Rollout()
#: Statuses of versions that are gone, which a servable keeps for those who ask.
_ENDED_MAX: Final = 16


class Version:
    """One life of one version.

    Attributes:
        key: servable and version.
        came: its place among all, in the order in which they came to be wanted.
        life: where it is.
        manifest: what it is made of, once read.
        bound: what it refers to, where it does; None while that is not there.
        refused: why that can never be.
        served: what the latest epoch says of it; equal ones are one value.
        units: where its parts are placed, once they are.
        homes: the actors that its parts are placed on.
        idle: those of them that it has given up to another version, or is to get later, with the
            first epoch that does not name it there.
        moves: actor to the one whose place it takes, see `cluster.moving`.
        actors: the rest of them: those that should hold it while it is wanted.
        pieces: actor to bytes promised there.
        orders: actor to what it is told to host.
        error: why it failed, or fails to get back a part.
        note: what it waits for, for people.
        attempts: failed lives in a row, this one included.
        retry_at: when a failed life may be tried again; None for not by time.
        blocked: the room there was when it did not fit; tried again when that changes.
        suspect: an actor died while loading it; it loads alone from then on.
        exposed: some epoch names or named it.
        retired: the first epoch that no longer names it, after it was exposed.
        refusal: the actor that had less room for it than it seemed, and what it said.
        recovered: its placement was kept from an earlier reign.
        was_available: it was available in that reign.
        rehearsal: the replay of its warm-up requests that is under way.
        rehearsed: they have been answered in this life.
        ask_at: when to ask for its manifest (again).
    """

    __slots__ = (
        "_live",
        "_placed",
        "_status",
        "actors",
        "ask_at",
        "attempts",
        "blocked",
        "bound",
        "came",
        "error",
        "exposed",
        "homes",
        "idle",
        "key",
        "life",
        "manifest",
        "moves",
        "note",
        "orders",
        "pieces",
        "recovered",
        "refusal",
        "refused",
        "rehearsal",
        "rehearsed",
        "retired",
        "retry_at",
        "served",
        "suspect",
        "units",
        "was_available",
    )

    def __init__(self, key: Key) -> None:
        self.key = key
        self.came = 0
        self.life = Lifecycle(f"{key[0]}:{key[1]}")
        self.manifest: Manifest | None = None
        self.bound: Bound | None = None
        self.refused: ServingError | None = None
        self.served: ServableVersion | None = None
        self.units: Mapping[str, Copies] | None = None
        self.homes: frozenset[str] = frozenset()
        self.idle: Mapping[str, int] = {}
        self.moves: Mapping[str, str] = {}
        self.actors: frozenset[str] = frozenset()
        # Asked for in every comparison, changed by few: equal answers are one value, so that
        # comparing them is cheap, too.
        self._live: tuple[frozenset[str], dict[str, Copies]] | None = None
        self._placed: Placed | None = None
        self._status: VersionStatus | None = None
        self.pieces: Mapping[str, Mapping[PieceKey, int]] = {}
        self.orders: Mapping[str, tuple[HostedUnit, ...]] = {}
        self.error: Failure | None = None
        self.note = ""
        self.attempts = 0
        self.retry_at: float | None = None
        self.blocked: object | None = None
        self.suspect = False
        self.exposed = False
        self.retired: int | None = None
        self.recovered = False
        self.refusal: tuple[str, str] | None = None
        self.was_available = False
        self.rehearsal: Replay | None = None
        self.rehearsed = False
        self.ask_at = -math.inf

    @property
    def state(self) -> State:
        """Where it is in its life."""
        return self.life.state

    @property
    def is_unread(self) -> bool:
        """Whether its manifest is still to be read."""
        return (
            self.manifest is None
            and self.error is None
            and self.state in (State.NEW, State.RESERVED)
        )

    @property
    def is_bound(self) -> bool:
        """Whether what it refers to has been there."""
        return self.manifest is None or not self.manifest.references or self.bound is not None

    @property
    def is_unrehearsed(self) -> bool:
        """Whether it has warm-up requests that are still to be answered."""
        manifest = self.manifest
        return manifest is not None and manifest.warmups is not None and not self.rehearsed

    def place_on(self, units: Mapping[str, Copies], idle: Iterable[str] = ()) -> None:
        """Take a placement whose manifest is still to be read."""
        self.units = units
        self._live = self._placed = None
        self.homes = frozenset(actor for part in parts_of(units.values()) for actor in part)
        self.rest(dict.fromkeys(idle, 0))

    def rest(self, idle: Mapping[str, int]) -> None:
        """Set which of its actors should not hold it."""
        assert idle.keys() <= self.homes, (self.key, idle)
        self.idle = idle
        self.actors = self.homes - idle.keys()

    def settle_on(
        self,
        manifest: Manifest,
        units: Mapping[str, Copies],
        idle: Iterable[str] = (),
        pieces: Mapping[str, Mapping[PieceKey, int]] | None = None,
    ) -> None:
        """Take a placement and what it means for each actor."""
        self.place_on(units, idle)
        self.pieces = pieces_on(manifest, units) if pieces is None else pieces
        self.orders = orders_of(manifest, units)

    def kept(self) -> Placed | None:
        """What to remember of its placement, or None for nothing.

        A version that is being unloaded is forgotten *before* any actor is told to let go: a
        later reign must not believe a report that crossed such an order.
        """
        if self.units is None or self.state not in _KEPT:
            return None
        available = self.was_available or self.state in (State.AVAILABLE, State.DRAINING)
        found, idle = self._placed, tuple(sorted(self.idle))
        known = None if found is None else (found.available, found.idle, found.moves)
        if found is None or known != (available, idle, self.moves):
            found = self._placed = Placed(
                servable=self.key[0],
                version=self.key[1],
                available=available,
                units=dict(self.units),
                idle=idle,
                moves=dict(self.moves),
            )
        return found

    @property
    def parts(self) -> Parts:
        """The actors of every part: idle ones, too, but for those that it is moved away from."""
        return parts_of((self.units or {}).values(), self.moved_away)

    @property
    def moved_away(self) -> frozenset[str]:
        """Of each move that has been decided, the actor that goes."""
        idle, moves = self.idle, self.moves.items()
        return frozenset(o if o in idle else n for n, o in moves if o in idle or n in idle)

    def may_come_back(self, fleet: Fleet) -> frozenset[str]:
        """Idle actors that can be told at once that they should hold it.

        Not those of a move, nor those that are being told to let go: a later reign could not tell
        whether the report of such an actor was made before it did.
        """
        idle = self.idle.keys() - fleet.leaving - self.moved_away
        actors = {name: fleet.actors.get(name) for name in idle}
        holds = {n: None if a is None else a.holds.get(self.key) for n, a in actors.items()}
        return frozenset(n for n, h in holds.items() if h is None or h.state is HoldState.LOADED)

    def live_actors(self, fleet: Fleet) -> frozenset[str]:
        """Those of its actors that answer for it now.

        Of those that are still to answer warm-up requests only such as nobody else has a part of.
        """
        loaded = self._loaded_actors(fleet)
        if self.manifest is None or self.manifest.warmups is None:
            return loaded
        proven = frozenset(n for n in loaded if fleet.actors[n].holds[self.key].is_proven)
        if proven == loaded:
            return loaded
        alone = (actor for part in self.parts if proven.isdisjoint(part) for actor in part)
        return proven | loaded.intersection(alone)

    def cold_actors(self, fleet: Fleet) -> frozenset[str]:
        """Those that have loaded it, and are still to answer warm-up requests."""
        return self._loaded_actors(fleet) - self.live_actors(fleet)

    def _loaded_actors(self, fleet: Fleet) -> frozenset[str]:
        return frozenset(name for name in self.actors if fleet.has_loaded(name, self.key))

    def live_units(self, fleet: Fleet) -> dict[str, Copies]:
        """Its placement without the actors that do not answer for it now."""
        loaded = self.live_actors(fleet)
        if self._live is None or self._live[0] != loaded:
            live = {
                name: tuple(tuple(actor for actor in part if actor in loaded) for part in parts)
                for name, parts in (self.units or {}).items()
            }
            self._live = (loaded, live)
        return self._live[1]

    def status(self, degraded: str) -> VersionStatus:
        """Its state as users see it.

        Args:
            degraded: which parts have no copy left, where it is available.
        """
        code, message = "OK", ""
        if degraded:
            code, message = str(Code.UNAVAILABLE), f"degraded: {degraded}"
        elif self.error is not None and self.state is not State.AVAILABLE:
            code, message = self.error.code, self.error.message
        state, found = public_state(self.state), self._status
        if found is None or (found.state, found.error_code, found.error_message) != (
            state, code, message,
        ):  # fmt: skip
            found = self._status = VersionStatus(
                servable=self.key[0],
                version=self.key[1],
                state=state,
                error_code=code,
                error_message=message,
            )
        return found

    def is_degraded(self, fleet: Fleet) -> bool:
        """Whether a part of it has no copy left that answers."""
        is_whole = self.live_actors(fleet) == self.actors
        return not (is_whole or all(p for parts in self.live_units(fleet).values() for p in parts))


class Servable:
    """A servable and its versions.

    Attributes:
        config: what was declared last.
        removed: it is declared no longer.
        complete: versions of the latest listing that had any; None before the first.
        list_error: why the latest listing failed or is not believed, for people.
        list_at: when to list (again).
        policy_error: why the policy could not say which versions to load, for people.
        rollout: the labels, split and shadow copies that are in effect.
        versions: those that live, and failed ones that are aspired.
        ended: statuses of those that are gone, bounded.
        deadline_s: the longest deadline declared in this reign.
        needed: versions that those of other servables refer to.
        unfit: versions that labels may not move to, with why, for people.
    """

    __slots__ = (
        "_aspired",
        "complete",
        "config",
        "deadline_s",
        "ended",
        "list_at",
        "list_error",
        "needed",
        "policy_error",
        "removed",
        "rollout",
        "unfit",
        "versions",
    )

    def __init__(self, config: ServableConfig, *, removed: bool = False) -> None:
        self.config = config
        self.removed = removed
        self.complete: tuple[int, ...] | None = None
        self.list_error = ""
        self.policy_error = ""
        self.list_at = -math.inf
        self.rollout = Rollout()
        self.versions: dict[int, Version] = {}
        self.ended: dict[int, VersionStatus] = {}
        self.deadline_s = config.deadline_ms / 1000
        self.needed: frozenset[int] = frozenset()
        self.unfit: Mapping[int, str] = {}
        self._aspired: tuple[object, tuple[int, ...]] | None = None

    def declare(self, config: ServableConfig) -> None:
        """Take a new declaration; what failed under another one is tried again."""
        if config != self.config:
            self.try_again()
        self.config, self.removed = config, False
        self.deadline_s = max(self.deadline_s, config.deadline_ms / 1000)

    def take_listing(self, event: Listed) -> bool:
        """Note which versions there are; a listing that fails or is empty is not believed.

        Returns:
            Whether it says anything new. Policies of packages may change their minds without.
        """
        before = (self.list_error, self.complete)
        if event.error is not None:
            self.list_error = f"{event.error.code}: {event.error.message}"
        elif not event.versions:
            self.list_error = "the store lists no complete version"
        else:
            self.list_error = ""
            self.complete = tuple(sorted(set(event.versions)))
        return before != (self.list_error, self.complete) or bool(self.config.policy.registered)

    def try_again(self) -> None:
        """Forget the failures of versions, so that each has a new life."""
        for number in [n for n, v in self.versions.items() if v.state is State.END]:
            del self.versions[number]

    def aspired(self) -> tuple[int, ...]:
        """Versions that should be loaded, highest first: the policy's, and named or needed ones.

        Where a package's policy fails these are the ones that live: it loads and unloads nothing.
        """
        there = self.versions.keys() & self.needed
        if self.removed:
            return tuple(sorted(there, reverse=True))
        asked = (self.config, self.complete, self.needed)
        if self._aspired is not None and self._aspired[0] == asked:
            self.policy_error = ""
            return self._aspired[1]
        try:
            found = aspired(self.config.policy, self.complete or ())
        except Exception as error:  # of a package: it must not take the controller with it
            self.policy_error = f"{type(error).__name__}: {error}"
            return tuple(sorted(self.versions, reverse=True))
        self.policy_error = ""
        named = (self.config.rollout.versions | self.needed).intersection(self.complete or ())
        found = tuple(sorted(named.union(found, there), reverse=True))
        if self.config.policy.registered is None:
            self._aspired = (asked, found)
        return found

    @property
    def is_going(self) -> bool:
        """Whether it is no longer declared, and nobody refers to it."""
        return self.removed and not self.aspired()

    @property
    def is_at_rest(self) -> bool:
        """Whether no policy has anything to do: what is aspired is there whole, and nothing else.

        Most are, in most comparisons. Where actors of a version are lost it is still so: giving
        them what they held is no policy's business.
        """
        return (
            not self.removed
            and self.versions.keys() == set(self.aspired())
            and all(v.state is State.AVAILABLE and not v.idle for v in self.versions.values())
        )

    def settle_rollout(self, fleet: Fleet, servables: Mapping[str, Servable]) -> None:
        """Let what is declared about labels, split and shadow take effect, if it can now."""
        declared = _NO_ROLLOUT if self.removed else self.config.rollout
        if not declared and not self.rollout:
            return
        available = {n: v for n, v in self.versions.items() if v.state is State.AVAILABLE}
        whole = {number for number, version in available.items() if is_whole(version, fleet)}
        self.unfit = unfit(self, whole, servables)
        ready = whole - self.unfit.keys()
        self.rollout = settle(declared, self.rollout, ready, available.keys())

    def _held(self) -> set[int]:
        """Versions that serve something which is in effect, and stay until it has moved on."""
        if self.config.transition == "resource":
            return set()
        named = self.rollout.versions & self.versions.keys()
        return {number for number in named if self.versions[number].state is State.AVAILABLE}

    def snapshots(self, fleet: Fleet, now: float, room: object) -> list[VersionSnapshot]:
        """The versions as a policy sees them."""
        held, wanted = self._held(), self.aspired()
        found: list[VersionSnapshot] = []
        for number in sorted({*wanted, *self.versions}):
            snapshot = VersionSnapshot(
                version=number,
                state=self._state_for_policy(number, now, room),
                aspired=number in wanted,
                held=number in held,
            )
            version = self.versions.get(number)
            if version is not None:
                snapshot = replace(
                    snapshot,
                    ready=is_whole(version, fleet),
                    parts=version.parts,
                    idle=frozenset(version.idle),
                    live=version.live_actors(fleet),
                    back=version.may_come_back(fleet),
                )
            found.append(snapshot)
        return found

    def leaving(self) -> list[Version]:
        """Versions that answer, and go when what is aspired does."""
        wanted = self.aspired()
        return [
            version
            for number, version in sorted(self.versions.items())
            if version.state is State.AVAILABLE and number not in wanted
        ]

    def bury(self, version: Version) -> None:
        """Forget a life that has ended, keeping what a status request would show."""
        number = version.key[1]
        del self.versions[number]
        self.ended.pop(number, None)
        self.ended[number] = version.status("")
        while len(self.ended) > _ENDED_MAX:
            del self.ended[next(iter(self.ended))]

    def _state_for_policy(self, number: int, now: float, room: object) -> State | None:
        version = self.versions.get(number)
        if version is None or version.state is not State.END:
            return None if version is None else version.state
        due = version.retry_at is not None and now >= version.retry_at
        return None if due or version.blocked not in (None, room) else State.END


_KEPT: Final = frozenset(
    {State.RESERVED, State.LOADING, State.WARMING, State.AVAILABLE, State.DRAINING}
)


def is_whole(version: Version, fleet: Fleet) -> bool:
    """Whether it is available and every part has a copy that answers."""
    return version.state is State.AVAILABLE and not version.is_degraded(fleet)
