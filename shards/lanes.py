"""The units of one device, and what each has in the batcher, the staging pool and the executor.

Decides what these three are told when a unit comes, gets other sizes, or goes. All of it happens in
one turn of the loop, so no batch meets a size that is not ready; what is no longer wanted is taken
away when nothing of it waits or runs. A lane whose shape no servable declares any more takes no new
rows and goes when it is idle.

Does not know frames, deadlines or devices. Every method runs on the loop thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from batching import Batcher, LaneKey
from batching.errors import FailedPrecondition
from shards.executor import Executor, LoadedUnit
from shards.hosted import Hosted, LaneBounds, layouts_of
from shards.manifest import MapUnit
from shards.metering import UnitMeter
from shards.sharing import Sizes
from shards.staging import Layout, StagingPool

__all__ = ["UnitLanes"]


class UnitLanes:
    """See the module.

    Args:
        loop: whose thread this is.
        batcher: gets the lanes.
        staging: gets their layouts.
        meters: of the units, by identity; gets those of units that come.
        offer: puts rows that were read, and are not in a lane yet, there.

    Attributes:
        units: those that take rows, by identity.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        batcher: Batcher,
        staging: StagingPool,
        meters: dict[str, UnitMeter],
        offer: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._batcher = batcher
        self._staging = staging
        self._meters = meters
        self._offer = offer
        self._executor: Executor | None = None
        self.units: Final[dict[str, Hosted]] = {}
        #: every lane of the batcher, with what is reserved for it
        self._lanes: dict[LaneKey, tuple[Layout, ...]] = {}
        #: lanes that take no more rows, until each is idle
        self._retiring: set[LaneKey] = set()
        #: units of which all lanes are retiring
        self._leaving: dict[str, asyncio.Future[None]] = {}

    def attach(self, executor: Executor) -> None:
        """Set the executor, which is made after who owns this."""
        self._executor = executor

    @property
    def is_settling(self) -> bool:
        """Whether `settle` has anything to look at."""
        return bool(self._retiring)

    def growth(self, unit: MapUnit, sizes: Sizes) -> int:
        """Bytes by which the staging pool would grow for these sizes."""
        return self._staging.growth(layouts_of(unit, sizes).values())

    def install(
        self, unit: MapUnit, loaded: LoadedUnit, bounds: LaneBounds, sizes: Sizes | None = None
    ) -> None:
        """Open a lane for every shape of a unit that is loaded and warm.

        Args:
            unit: as its member declares it.
            loaded: with every size.
            bounds: of the lanes.
            sizes: that it has; None for those that it declares.

        Raises:
            FailedPrecondition: it is here, or not gone yet.
            InvalidArgument: a bound is not positive.
        """
        if any(key.unit == unit.id for key in self._lanes):
            raise FailedPrecondition(f"unit {unit.id[:12]} is here already")
        hosted = Hosted(unit, loaded.costs, sizes)
        self._settle_on(hosted, loaded, bounds)
        self.units[unit.id] = hosted
        self._meters[unit.id] = UnitMeter(len(loaded.compiled), loaded.load_s)

    def resize(self, unit: MapUnit, loaded: LoadedUnit, bounds: LaneBounds, sizes: Sizes) -> None:
        """Give a unit other sizes while it serves.

        Args:
            unit: as any of its members declares it.
            loaded: with every size that it had or gets, all of them warm.
            bounds: of lanes that it did not have.
            sizes: that it has from now on.
        """
        hosted = self.units[unit.id]
        hosted.resize(unit, loaded.costs, sizes)
        for key in self._lanes.keys() - set(hosted.lanes):
            if key.unit == unit.id:
                self._retire(key)
        self._settle_on(hosted, loaded, bounds)
        self._meters[unit.id].executables = len(loaded.compiled)
        self.settle()

    def _settle_on(self, hosted: Hosted, loaded: LoadedUnit, bounds: LaneBounds) -> None:
        assert self._executor is not None
        for key in hosted.lanes:
            ladder = hosted.sizes.batches[key.shape]
            before = self._lanes.get(key)
            if before is None:
                self._batcher.add_lane(
                    key, ladder, bounds.rows_max, bounds.bytes_max, hosted.costs_of(key)
                )
            else:
                self._batcher.resize_lane(key, ladder, hosted.costs_of(key))
                self._batcher.reopen_lane(key)
                self._retiring.discard(key)
            self._lanes[key] = tuple(
                hosted.layouts[bucket] for bucket in hosted.sizes.buckets_of(key.shape)
            )
            for layout in self._lanes[key]:
                self._staging.reserve(layout)
            self._forget(before or ())
        self._executor.install(loaded)

    async def remove(self, unit_id: str) -> None:
        """Take no more rows for a unit, finish those it has, and forget it.

        Who stops waiting for this stops nothing: the unit is forgotten when its last row is done.
        """
        if self.units.pop(unit_id, None) is not None:
            for key in self._lanes:
                if key.unit == unit_id:
                    self._retire(key)
            self._leaving[unit_id] = self._loop.create_future()
            self.settle()
        if unit_id in self._leaving:
            await asyncio.shield(self._leaving[unit_id])

    def settle(self) -> None:
        """Forget what is idle of that which takes no more rows."""
        assert self._executor is not None
        for key in [key for key in self._retiring if self._batcher.lane_idle(key)]:
            self._retiring.remove(key)
            self._batcher.remove_lane(key)
            self._forget(self._lanes.pop(key))
        for unit_id in self._leaving.keys() - {key.unit for key in self._lanes}:
            self._executor.remove(unit_id)
            del self._meters[unit_id]
            self._leaving.pop(unit_id).set_result(None)

    def _retire(self, key: LaneKey) -> None:
        self._offer()  # who came before is served
        self._batcher.drain_lane(key)
        self._retiring.add(key)

    def _forget(self, layouts: tuple[Layout, ...]) -> None:
        for layout in layouts:
            self._staging.forget(layout)
