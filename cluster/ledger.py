"""What the controller core remembers of versions, and how it shows them.

Values and the questions that can be answered from them alone, such as which actors answer for a
part; of servables likewise `cluster.servables`. What an epoch says is in `cluster.published`, what
a status says in `cluster.shown`.
Decides no step of a life.

A version that lost actors stays in the epoch, without them: a part whose last copy is away has an
empty tuple of actors there, which a router answers with UNAVAILABLE. So a request gets a typed
error at once, and the version's other parts and signatures go on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

from batching.errors import Code, ServingError
from cluster.declared import Placed
from cluster.epochs import ServableVersion, VersionStatus
from cluster.fleet import Fleet, HoldState, Key
from cluster.lifecycle import Lifecycle, State, public_state
from cluster.pieces import PieceKey
from cluster.placement import Copies, orders_of, pieces_on
from cluster.references import Bound
from cluster.rolling import Parts, parts_of
from cluster.shifts import Shift, is_open, removed
from cluster.signals import Failure, Replay
from shards.manifest import Manifest
from shards.orders import HostedUnit

__all__ = ["Version", "is_whole"]


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
        shift: parts that go from one actor to another, see `cluster.shifting`.
        given_at: the first epoch that does not name the one that gives them; 0 for all of them.
        actors: the rest of them: those that should hold it while it is wanted.
        pieces: actor to bytes promised there.
        orders: actor to what it is told to host.
        explained: what a status tells of its placement, once that was asked for; None before.
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
        "explained",
        "exposed",
        "given_at",
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
        "shift",
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
        self.shift: Shift | None = None
        self.given_at = 0
        self.actors: frozenset[str] = frozenset()
        # Asked for in every comparison, changed by few: equal answers are one value, so that
        # comparing them is cheap, too.
        self._live: tuple[frozenset[str], dict[str, Copies]] | None = None
        self._placed: Placed | None = None
        self._status: VersionStatus | None = None
        self.pieces: Mapping[str, Mapping[PieceKey, int]] = {}
        self.orders: Mapping[str, tuple[HostedUnit, ...]] = {}
        self.explained: dict[str, Any] | None = None
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
        self._live = self._placed = self.explained = None
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
        known = None if found is None else (found.available, found.idle, found.moves, found.shift)
        if found is None or known != (available, idle, self.moves, self.shift):
            found = self._placed = Placed(
                servable=self.key[0],
                version=self.key[1],
                available=available,
                units=dict(self.units),
                idle=idle,
                moves=dict(self.moves),
                shift=self.shift,
            )
        return found

    @property
    def parts(self) -> Parts:
        """The actors of every part: idle ones, too, but for those that it is moved away from."""
        return parts_of(self._named.values(), self.moved_away)

    @property
    def _named(self) -> Mapping[str, Copies]:
        """Its placement without what an actor is still to get from another."""
        units, shift = self.units or {}, self.shift
        if shift is None or not is_open(shift, units):
            return units
        return removed(shift, shift.new, units)

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
                for name, parts in self._named.items()
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


_KEPT: Final = frozenset(
    {State.RESERVED, State.LOADING, State.WARMING, State.AVAILABLE, State.DRAINING}
)


def is_whole(version: Version, fleet: Fleet) -> bool:
    """Whether it is available and every part has a copy that answers."""
    return version.state is State.AVAILABLE and not version.is_degraded(fleet)
