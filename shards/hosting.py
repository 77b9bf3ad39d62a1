"""What one actor hosts: which units, for which versions, and how much memory that is.

Units are counted by the versions that use them: two versions (or two models) with the same trunk
share one copy, and unloading one takes nothing from the other. An order is carried out whole or
not at all. The kinds of hosting differ only in how a unit is opened and closed; `UnitOpener` is
that seam. This file does not know sockets, frames or Ray.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from batching.errors import FailedPrecondition, ResourceExhausted
from shards.manifest import Manifest, Unit
from shards.orders import HostedUnit, LoadOrder
from shards.store import Store, open_store

__all__ = ["Hosting", "UnitOpener"]

logger = logging.getLogger(__name__)

ServableVersion = tuple[str, int]


class UnitOpener(Protocol):
    """How units of one kind are brought up and down."""

    def estimate(self, unit: Unit, wanted: HostedUnit) -> int:
        """An upper bound of the bytes that the unit will take here."""

    async def open(self, store: Store, unit: Unit, wanted: HostedUnit, order: LoadOrder) -> int:
        """Load and warm the unit, so that its first request is served like its thousandth.

        Returns:
            The bytes that it takes.
        """

    async def close(self, unit: Unit, wanted: HostedUnit) -> None:
        """Finish what the unit still has to do, and give its memory back."""


class _Held:
    """One open unit."""

    __slots__ = ("nbytes", "unit", "users", "wanted")

    def __init__(self, unit: Unit, wanted: HostedUnit, nbytes: int) -> None:
        self.unit = unit
        self.wanted = wanted
        self.nbytes = nbytes
        self.users: set[ServableVersion] = set()


class Hosting:
    """The books of an actor.

    Args:
        opener: brings units up and down.
        actor: the actor's name, for messages.
        capacity_bytes: the most it may hold.
    """

    def __init__(self, opener: UnitOpener, actor: str, capacity_bytes: int) -> None:
        self._opener = opener
        self._actor = actor
        self._capacity_bytes = capacity_bytes
        self._held: dict[tuple[str, tuple[int, ...]], _Held] = {}
        self._loaded: set[ServableVersion] = set()
        self._term = 0
        # Orders are carried out one at a time, in the order in which they came.
        self._turn = asyncio.Lock()
        self._promised = 0

    @property
    def loaded(self) -> tuple[ServableVersion, ...]:
        """Versions whose units are all open here."""
        return tuple(sorted(self._loaded))

    @property
    def capacity_bytes(self) -> int:
        """The most this actor may hold."""
        return self._capacity_bytes

    @property
    def reserved_bytes(self) -> int:
        """Measured bytes of open units plus the estimates of those that are being opened."""
        return sum(held.nbytes for held in self._held.values()) + self._promised

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

        Raises:
            FailedPrecondition: the term is over.
            ResourceExhausted: it does not fit; says what is short and by how much.
            ServingError: whatever is wrong with the bundle.
        """
        self.check_term(order.term)
        async with self._turn:
            version = (order.servable, order.version)
            if version in self._loaded:
                return
            store = open_store(order.store)
            manifest = await asyncio.to_thread(store.read_manifest, order.servable, order.version)
            self._reserve(manifest, order)
            try:
                await self._open_all(store, manifest, order)
            finally:
                self._promised = 0
            self._loaded.add(version)
            logger.info("%s: %s version %d is loaded", self._actor, *version)

    async def unload(self, term: int, servable: str, version: int) -> None:
        """Undo an order. A version that is not loaded is fine.

        Raises:
            FailedPrecondition: the term is over.
        """
        self.check_term(term)
        async with self._turn:
            self._loaded.discard((servable, version))
            await self._release((servable, version))
            logger.info("%s: %s version %d is unloaded", self._actor, servable, version)

    def _reserve(self, manifest: Manifest, order: LoadOrder) -> None:
        need = sum(
            self._opener.estimate(manifest.units[wanted.name], wanted)
            for wanted in order.units
            if _key(manifest.units[wanted.name], wanted) not in self._held
        )
        free = self._capacity_bytes - self.reserved_bytes
        if need > free:
            raise ResourceExhausted(
                f"{order.servable} version {order.version} needs {need} bytes on {self._actor}, "
                f"{max(free, 0)} of {self._capacity_bytes} are free: {need - free} short"
            )
        self._promised = need

    async def _open_all(self, store: Store, manifest: Manifest, order: LoadOrder) -> None:
        version = (order.servable, order.version)
        try:
            for wanted in order.units:
                unit = manifest.units[wanted.name]
                key = _key(unit, wanted)
                held = self._held.get(key)
                if held is None:
                    nbytes = await self._opener.open(store, unit, wanted, order)
                    held = self._held[key] = _Held(unit, wanted, nbytes)
                held.users.add(version)
        except BaseException:
            await self._release(version)
            raise

    async def _release(self, version: ServableVersion) -> None:
        for key, held in list(self._held.items()):
            held.users.discard(version)
            if not held.users:
                del self._held[key]
                await self._opener.close(held.unit, held.wanted)


def _key(unit: Unit, wanted: HostedUnit) -> tuple[str, tuple[int, ...]]:
    return (unit.id, wanted.partitions)
