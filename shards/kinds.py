"""One opener for actors that host units of several kinds.

Decides which opener a unit goes to. Does not know how any of them brings units up.
"""

from __future__ import annotations

from collections.abc import Mapping

from batching.errors import FailedPrecondition
from shards.hosting import ServableVersion, UnitOpener
from shards.layout import Buffer
from shards.manifest import Unit
from shards.orders import HostedUnit, LoadOrder, UnitState
from shards.progress import Progress
from shards.store import Store

__all__ = ["OpenerByKind"]


class OpenerByKind(UnitOpener):
    """Passes every unit to the opener of its kind.

    Args:
        openers: type of unit to the opener of such units.
    """

    def __init__(self, openers: Mapping[type[Unit], UnitOpener]) -> None:
        self._openers = dict(openers)

    @property
    def held_bytes(self) -> int:
        """Bytes that all of them hold."""
        return sum(opener.held_bytes for opener in self._openers.values())

    def mapped(self, digest: str) -> Buffer | None:
        """See `UnitOpener.mapped`."""
        found = (opener.mapped(digest) for opener in self._openers.values())
        return next((blob for blob in found if blob is not None), None)

    def estimate(self, unit: Unit, wanted: HostedUnit) -> int:
        """See `UnitOpener.estimate`."""
        return self._of(unit).estimate(unit, wanted)

    async def open(self, store: Store, unit: Unit, wanted: HostedUnit, order: LoadOrder) -> None:
        """See `UnitOpener.open`."""
        await self._of(unit).open(store, unit, wanted, order)

    async def join(
        self, store: Store, unit: Unit, wanted: HostedUnit, order: LoadOrder, room_bytes: int
    ) -> None:
        """See `UnitOpener.join`."""
        await self._of(unit).join(store, unit, wanted, order, room_bytes)

    async def leave(self, unit: Unit, wanted: HostedUnit, version: ServableVersion) -> None:
        """See `UnitOpener.leave`."""
        await self._of(unit).leave(unit, wanted, version)

    def call_off(self, version: ServableVersion, reason: str) -> None:
        """See `UnitOpener.call_off`."""
        for opener in self._openers.values():
            opener.call_off(version, reason)

    def buckets(self, unit: Unit, wanted: HostedUnit) -> int:
        """See `UnitOpener.buckets`."""
        return self._of(unit).buckets(unit, wanted)

    def compiled(self, version: ServableVersion) -> Progress | None:
        """See `UnitOpener.compiled`."""
        found = (opener.compiled(version) for opener in self._openers.values())
        return next((each for each in found if each is not None), None)

    def give_back(self) -> None:
        """See `UnitOpener.give_back`."""
        for opener in self._openers.values():
            opener.give_back()

    def state(self, unit: Unit, wanted: HostedUnit) -> UnitState:
        """See `UnitOpener.state`."""
        return self._of(unit).state(unit, wanted)

    async def close(self, unit: Unit, wanted: HostedUnit) -> None:
        """See `UnitOpener.close`."""
        await self._of(unit).close(unit, wanted)

    def _of(self, unit: Unit) -> UnitOpener:
        opener = self._openers.get(type(unit))
        if opener is None:
            raise FailedPrecondition(f"units of type {type(unit).__name__} are not hosted here")
        return opener
