"""What one actor hosts: which units, for which versions, and how much memory that is.

Units are counted by the versions that use them: two versions (or two models) with the same trunk
share one copy, and unloading one takes nothing from the other. An order is carried out whole or
not at all. The kinds of hosting differ only in how a unit is opened and closed; `UnitOpener` is
that seam. This file does not know sockets, frames or Ray.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Collection
from typing import Protocol, TypeAlias

import msgspec

from batching.allowance import Allowance
from batching.errors import FailedPrecondition, ResourceExhausted
from shards.arrivals import Arrivals, Arrived, WantedUnits, wanted_units
from shards.cache import NodeCache
from shards.layout import Buffer
from shards.manifest import Unit
from shards.orders import AllowOrder, HostedUnit, Loading, LoadOrder, UnitState
from shards.progress import Progress
from shards.store import Store

__all__ = ["Hosting", "ServableVersion", "UnitOpener"]

logger = logging.getLogger(__name__)

ServableVersion: TypeAlias = tuple[str, int]
#: A unit's identity, and for a table the partitions of it.
_Key: TypeAlias = tuple[str, tuple[int, ...]]


class UnitOpener(Protocol):
    """How units of one kind are brought up and down."""

    @property
    def held_bytes(self) -> int:
        """Measured bytes of everything that is open. What several units share counts once."""
        ...

    def mapped(self, digest: str) -> Buffer | None:
        """The blob of a digest, if it is open here and any unit may use it as it is."""
        del digest  # most kinds have nothing to share
        return None

    def estimate(self, unit: Unit, wanted: HostedUnit) -> int:
        """The bytes that the unit will add to `held_bytes`, as far as its manifest tells.

        Of what is open already, only what another user of it adds.
        """

    async def open(self, store: Store, unit: Unit, wanted: HostedUnit, order: LoadOrder) -> None:
        """Load and warm the unit, so that its first request is served like its thousandth."""

    async def join(
        self, store: Store, unit: Unit, wanted: HostedUnit, order: LoadOrder, room_bytes: int
    ) -> None:
        """Another version uses a unit that is open, and its first request is served like any.

        One that fails changes nothing.

        Args:
            store: has the bundle.
            unit: as the version's own bundle declares it.
            wanted: which.
            order: whose.
            room_bytes: by how much `held_bytes` may grow.
        """
        del store, unit, wanted, order, room_bytes  # most kinds have nothing to do

    async def leave(self, unit: Unit, wanted: HostedUnit, version: ServableVersion) -> None:
        """A version uses a unit no more that others go on using."""
        del unit, wanted, version  # most kinds have nothing to do

    def call_off(self, version: ServableVersion, reason: str) -> None:
        """End what `open` or `join` does for a version, if anything; it raises `Cancelled` soon.

        What it has not begun to wait for may still be finished: whoever calls it off takes that
        back.
        """
        del version, reason  # most kinds are quick

    def buckets(self, unit: Unit, wanted: HostedUnit) -> int:
        """Programs that `open` will make ready, as far as the manifest tells."""
        del unit, wanted  # most kinds have none
        return 0

    def compiled(self, version: ServableVersion) -> Progress | None:
        """How many of them are ready, of the unit that is being opened for a version, if any."""
        del version  # most kinds have none
        return None

    def give_back(self) -> None:
        """Give back memory of what is open that nobody needs to be served: a load wants it."""
        return  # most kinds have nothing to give

    def state(self, unit: Unit, wanted: HostedUnit) -> UnitState:
        """How an open unit is held, for people."""
        ...

    async def close(self, unit: Unit, wanted: HostedUnit) -> None:
        """Finish what the unit still has to do, and give its memory back."""


class _Held:
    """One open unit."""

    __slots__ = ("unit", "users", "wanted")

    def __init__(self, unit: Unit, wanted: HostedUnit) -> None:
        self.unit = unit
        self.wanted = wanted
        self.users: set[ServableVersion] = set()


class _Call:
    """Loads of one version that were ordered since it was last unloaded.

    Attributes:
        buckets: programs of those of its units that are open.
    """

    __slots__ = ("__weakref__", "arrived", "buckets", "progress")

    def __init__(self) -> None:
        self.progress = Progress(0)
        self.arrived: list[Arrived] = []
        self.buckets = 0


class Hosting:
    """The books of an actor.

    Args:
        opener: brings units up and down.
        actor: the actor's name, for messages.
        capacity_bytes: the most it may hold.
        cache: keeps blobs of remote stores on this node; None for the user's own.
        on_allowance: told what a servable's rows are allowed, while a version of it is loaded;
            None for no longer anything. For actors that queue rows.
    """

    def __init__(
        self,
        opener: UnitOpener,
        actor: str,
        capacity_bytes: int,
        cache: NodeCache | None = None,
        on_allowance: Callable[[str, Allowance | None], None] = lambda servable, allowance: None,
    ) -> None:
        self._opener = opener
        self._on_allowance = on_allowance
        self._actor = actor
        self._capacity_bytes = capacity_bytes
        self._held: dict[_Key, _Held] = {}
        self._loaded: dict[ServableVersion, frozenset[HostedUnit]] = {}
        #: unloads that wait for their turn: a load that comes after them must come after them
        self._leaving: Counter[ServableVersion] = Counter()
        self._term = 0
        self._arrivals = Arrivals(cache, opener.buckets)
        # Orders are carried out one at a time, in the order in which what they need has come.
        self._turn = asyncio.Lock()
        #: the loads that are under way, those of one version together; kept by the loads
        self._calls: weakref.WeakValueDictionary[ServableVersion, _Call] = (
            weakref.WeakValueDictionary()
        )
        #: the version whose load has its turn
        self._opening: ServableVersion | None = None
        self._promised = 0

    @property
    def loaded(self) -> tuple[ServableVersion, ...]:
        """Versions whose units are all open here."""
        return tuple(sorted(self._loaded))

    @property
    def loading(self) -> tuple[Loading, ...]:
        """Orders that are not carried out yet, and how far they have come."""
        found = {(each.servable, each.version): each for each in self._arrivals.loading}
        for version, call in self._calls.items():
            if version not in found and call.arrived:
                found[version] = self._arrived(version, call)
        return tuple(each for _, each in sorted(found.items()))

    def _arrived(self, version: ServableVersion, call: _Call) -> Loading:
        """How far a load has come whose blobs are here."""
        arrived = call.arrived[-1]
        work = self._opener.compiled(version)
        done = call.buckets + (0 if work is None else work.done)
        total = max(arrived.buckets, done)
        eta_s, note = None, ""
        if self._opening != version:
            other = "another load" if self._opening is None else "{}:{}".format(*self._opening)
            note = f"waits for {other} on {self._actor}"
        elif work is not None and work.left_s is not None and work.done < work.total:
            # What comes after this unit, at the pace of this one.
            eta_s = work.left_s * (total - done) / (work.total - work.done)
        return Loading(
            servable=version[0],
            version=version[1],
            bytes_done=arrived.nbytes,
            bytes_total=arrived.nbytes,
            buckets_done=done,
            buckets_total=total,
            eta_s=eta_s,
            note=note,
        )

    @property
    def units(self) -> tuple[UnitState, ...]:
        """What is open here, and for whom."""
        return tuple(
            msgspec.structs.replace(
                self._opener.state(held.unit, held.wanted),
                users=tuple(f"{name}:{number}" for name, number in sorted(held.users)),
            )
            for held in self._held.values()
        )

    @property
    def capacity_bytes(self) -> int:
        """The most this actor may hold."""
        return self._capacity_bytes

    @property
    def reserved_bytes(self) -> int:
        """Measured bytes of open units plus the estimates of those that are to be opened."""
        return self._opener.held_bytes + self._promised

    def check_term(self, term: int) -> None:
        """Refuse a controller that has been succeeded.

        Raises:
            FailedPrecondition: a higher term was seen.
        """
        if term < self._term:
            raise FailedPrecondition(
                f"order of term {term} refused: {self._actor} has seen term {self._term}"
            )
        self._term = term

    async def load(self, order: LoadOrder) -> None:
        """Carry out an order, whole or not at all. An order already carried out is fine.

        Afterwards the version holds exactly the order's units, whatever an earlier order named.

        Raises:
            FailedPrecondition: the term is over.
            NotFound: there is no such bundle, or the bundle has no such unit.
            ResourceExhausted: it does not fit; says what is short and by how much.
            Cancelled: the version was unloaded while it was loading.
            ServingError: whatever is wrong with the bundle.
        """
        self.check_term(order.term)
        version = (order.servable, order.version)
        if self._loaded.get(version) == frozenset(order.units) and not self._leaving[version]:
            self._on_allowance(order.servable, order.allowance)
            return
        call = self._calls.setdefault(version, _Call())
        # Not in turn: a store that is slow or away holds up nobody but this order.
        arrived = await self._arrivals.bring(
            order, lambda key: key not in self._held, self._opener.mapped
        )
        call.arrived.append(arrived)
        try:
            call.progress.check()
            async with self._turn:
                # While this order waited for its turn, its controller may have been succeeded.
                self.check_term(order.term)
                call.progress.check()
                if self._loaded.get(version) != frozenset(order.units):
                    await self._load(arrived, order, call)
        finally:
            arrived.held.clear()

    async def _load(self, arrived: Arrived, order: LoadOrder, call: _Call) -> None:
        version = (order.servable, order.version)
        wanted = wanted_units(arrived.manifest, order)
        self._reserve(wanted, order)
        self._opening = version
        try:
            await self._open_all(arrived.store, wanted, order, call)
        finally:
            self._promised = 0
            self._opening = None
        self._loaded[version] = frozenset(order.units)
        self._on_allowance(order.servable, order.allowance)
        await self._release(version, keep=wanted.keys())
        logger.info("%s: %s version %d is loaded", self._actor, *version)

    def allow(self, order: AllowOrder) -> None:
        """Change what a servable's rows are allowed. One that is not loaded is fine.

        Raises:
            FailedPrecondition: the term is over.
        """
        self.check_term(order.term)
        if any(name == order.servable for name, _ in self._loaded):
            self._on_allowance(order.servable, order.allowance)

    async def unload(self, term: int, servable: str, version: int) -> None:
        """Undo an order, or call it off. A version that is not loaded is fine.

        A load of the version ends at the step that it is at, and what it has taken is given back.
        If it still waits for its turn, this does not wait for what others load meanwhile.

        Raises:
            FailedPrecondition: the term is over.
        """
        self.check_term(term)
        self._call_off((servable, version), "unloaded while it was loading")
        if self._has_nothing_of((servable, version)):
            return
        self._leaving[servable, version] += 1
        try:
            async with self._turn:
                self.check_term(term)
                self._loaded.pop((servable, version), None)
                await self._release((servable, version))
                if not any(name == servable for name, _ in self._loaded):
                    self._on_allowance(servable, None)
                logger.info("%s: %s version %d is unloaded", self._actor, servable, version)
        finally:
            self._leaving[servable, version] -= 1
            self._leaving += Counter()  # forgets what is at zero

    def _call_off(self, version: ServableVersion, reason: str) -> None:
        """End the loads of a version, wherever they are."""
        self._arrivals.call_off(*version, reason)
        call = self._calls.pop(version, None)
        if call is None:
            return
        call.progress.cancel(f"{version[0]} version {version[1]}: {reason}")
        if self._opening == version:
            self._opener.call_off(version, reason)
        else:
            # It may wait long for the turn in which it sees that; what it holds goes back now.
            for arrived in call.arrived:
                arrived.held.clear()

    def _has_nothing_of(self, version: ServableVersion) -> bool:
        """Whether nothing of a version is open, or is being opened or closed."""
        return (
            version not in self._loaded
            and self._opening != version
            and not self._leaving[version]
            and not any(version in held.users for held in self._held.values())
        )

    def _reserve(self, wanted: WantedUnits, order: LoadOrder) -> None:
        version = (order.servable, order.version)
        need = sum(
            self._opener.estimate(unit, hosted)
            for key, (unit, hosted) in wanted.items()
            if not self._is_user(version, key)
        )
        if need > self._capacity_bytes - self.reserved_bytes:
            self._opener.give_back()
        free = self._capacity_bytes - self.reserved_bytes
        if need > free:
            raise ResourceExhausted(
                f"{order.servable} version {order.version} needs {need} bytes on {self._actor}, "
                f"{max(free, 0)} of {self._capacity_bytes} are free: {need - free} short"
            )
        self._promised = need

    def _check_measured(self, order: LoadOrder) -> None:
        """Refuse what turned out to need more than was reserved, if there is no more."""
        if self._opener.held_bytes > self._capacity_bytes:
            self._opener.give_back()
        short = self._opener.held_bytes - self._capacity_bytes
        if short > 0:
            raise ResourceExhausted(
                f"{order.servable} version {order.version} needs more memory on {self._actor} "
                f"than its manifest tells: {short} of {self._capacity_bytes} bytes short"
            )

    async def _open_all(
        self, store: Store, wanted: WantedUnits, order: LoadOrder, call: _Call
    ) -> None:
        version = (order.servable, order.version)
        before = [key for key, held in self._held.items() if version in held.users]
        try:
            for key, (unit, hosted) in wanted.items():
                if self._is_user(version, key):
                    continue
                call.progress.check()
                estimate = self._opener.estimate(unit, hosted)
                if key not in self._held:
                    await self._opener.open(store, unit, hosted, order)
                    self._held[key] = _Held(unit, hosted)
                    call.buckets += self._opener.buckets(unit, hosted)
                else:
                    room = self._capacity_bytes - self.reserved_bytes + estimate
                    await self._opener.join(store, unit, hosted, order, room)
                self._promised -= estimate
                self._held[key].users.add(version)
            call.progress.check()
            self._check_measured(order)
        except BaseException:
            await self._release(version, keep=before)
            raise

    async def _release(self, version: ServableVersion, keep: Collection[_Key] = ()) -> None:
        for key, held in list(self._held.items()):
            if key in keep or version not in held.users:
                continue
            held.users.remove(version)
            if held.users:
                await self._opener.leave(held.unit, held.wanted, version)
            else:
                del self._held[key]
                await self._opener.close(held.unit, held.wanted)

    def _is_user(self, version: ServableVersion, key: _Key) -> bool:
        return key in self._held and version in self._held[key].users
