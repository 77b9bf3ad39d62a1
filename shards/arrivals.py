"""What orders need, brought near before their turn: manifests read, blobs verified and mapped.

An actor carries its orders out one at a time. Waiting for a store is not part of that: a slow one
would hold up every other order. Here each order waits by itself, on threads, and shows how far it
has come. Where a bucket does not answer the order goes on trying, ever more seldom, until it is
called off: an outage makes a load late, it does not make it fail.

Decides what an order waits for, and who is called off by whom. Does not know units' openers.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from batching.errors import Cancelled, NotFound, Unavailable
from shards.cache import NodeCache
from shards.checking import unit_blobs
from shards.layout import Buffer
from shards.locations import is_url
from shards.manifest import BlobRef, CustomUnit, Manifest, TableUnit, Unit
from shards.orders import HostedUnit, Loading, LoadOrder
from shards.progress import Progress
from shards.store import Store, open_store

__all__ = ["Arrivals", "Arrived", "WantedUnits", "wanted_units"]

logger = logging.getLogger(__name__)

#: By identity, and for what is partitioned the partitions: the unit, and how the order names it.
WantedUnits: TypeAlias = dict[tuple[str, tuple[int, ...]], tuple[Unit, HostedUnit]]

#: Orders that wait for a store at the same time, and blobs of one order.
_ORDERS: Final = 8
_BLOBS: Final = 4
_RETRY_FIRST_S: Final = 0.5
_RETRY_S_MAX: Final = 15.0


@dataclass(frozen=True, slots=True)
class Arrived:
    """What an order needs, all of it here.

    Attributes:
        store: where its units' blobs are to be mapped from.
        manifest: of the version.
        held: keeps blobs from being given up before the units have mapped them. To be cleared
            then: whoever waits for the same order, or keeps an error of it, would hold on to them.
        nbytes: that had to come.
        buckets: programs that are to be made ready, as far as the manifest tells.
    """

    store: Store
    manifest: Manifest
    held: list[Buffer]
    nbytes: int = 0
    buckets: int = 0


@dataclass(slots=True)
class _Arriving:
    order: LoadOrder
    progress: Progress = field(default_factory=lambda: Progress(0))
    note: str = ""
    buckets: int = 0
    task: asyncio.Task[Arrived] | None = None

    @property
    def left_s(self) -> float | None:
        # How long a program takes to compile is not known before the first.
        if self.note or self.buckets or not self.progress.total:
            return None
        return self.progress.left_s


class Arrivals:
    """Orders that wait for a store. Lives on one event loop.

    Args:
        cache: keeps blobs of remote stores on this node; None for the user's own.
        buckets: how many programs are made ready when a unit is opened.
    """

    def __init__(
        self,
        cache: NodeCache | None = None,
        buckets: Callable[[Unit, HostedUnit], int] = lambda unit, wanted: 0,
    ) -> None:
        self._cache = cache
        self._buckets = buckets
        # A cluster has one; opened once, since bounds of threads and memory are a store's.
        self._stores: dict[str, Store] = {}
        self._arriving: dict[tuple[str, int], _Arriving] = {}
        self._threads = ThreadPoolExecutor(_ORDERS, thread_name_prefix="arrivals")

    @property
    def loading(self) -> tuple[Loading, ...]:
        """How far each order has come."""
        return tuple(
            Loading(
                servable=servable,
                version=version,
                bytes_done=each.progress.done,
                bytes_total=each.progress.total,
                buckets_total=each.buckets,
                eta_s=each.left_s,
                note=each.note,
            )
            for (servable, version), each in sorted(self._arriving.items())
        )

    async def bring(
        self,
        order: LoadOrder,
        is_needed: Callable[[tuple[str, tuple[int, ...]]], bool],
        mapped: Callable[[str], Buffer | None] = lambda digest: None,
    ) -> Arrived:
        """Wait until everything that an order needs is here.

        An order that is given again joins the one that waits; another one for the same version
        takes its place.

        Args:
            order: what is to be loaded.
            is_needed: whether a unit is not open already.
            mapped: the blob of a digest, where another unit has it open: it need not come.

        Raises:
            Cancelled: called off, or another order came.
            NotFound: there is no such bundle, or the bundle has no such unit.
            ServingError: whatever is wrong with the bundle, or the room for it.
        """
        key = (order.servable, order.version)
        arriving = self._arriving.get(key)
        if arriving is None or not _is_same(arriving.order, order):
            self.call_off(*key, "another order for the version came")
            arriving = self._arriving[key] = _Arriving(order)
            arriving.task = asyncio.create_task(self._bring(arriving, is_needed, mapped))
            arriving.task.add_done_callback(_look_at)
        assert arriving.task is not None
        try:
            # Whoever stops waiting does not call off what others wait for.
            return await asyncio.shield(arriving.task)
        finally:
            if arriving.task.done() and self._arriving.get(key) is arriving:
                del self._arriving[key]

    def call_off(self, servable: str, version: int, reason: str) -> None:
        """End the waiting for a version; whoever waits is told why."""
        arriving = self._arriving.pop((servable, version), None)
        if arriving is not None:
            arriving.progress.cancel(f"{servable} version {version}: {reason}")

    async def _bring(
        self,
        arriving: _Arriving,
        is_needed: Callable[[tuple[str, tuple[int, ...]]], bool],
        mapped: Callable[[str], Buffer | None],
    ) -> Arrived:
        order = arriving.order
        store = self._stores.get(order.store)
        if store is None:
            store = self._stores[order.store] = open_store(order.store, self._cache)
        loop = asyncio.get_running_loop()
        delay_s = _RETRY_FIRST_S
        while True:
            arriving.progress.check()
            try:
                manifest = await loop.run_in_executor(
                    self._threads, store.read_manifest, order.servable, order.version
                )
                units = wanted_units(manifest, order)
                wanted = [(ref, mapped(ref.digest)) for ref in _refs(units, is_needed)]
                refs = tuple(ref for ref, buffer in wanted if buffer is None)
                arriving.buckets = sum(
                    self._buckets(unit, hosted)
                    for key, (unit, hosted) in units.items()
                    if is_needed(key)
                )
                arriving.progress.expect(sum(ref.size for ref in refs))
                held = await loop.run_in_executor(
                    self._threads, _map_all, store, refs, arriving.progress
                )
                held += [buffer for _, buffer in wanted if buffer is not None]
                return Arrived(store, manifest, held, arriving.progress.total, arriving.buckets)
            except Unavailable as error:
                # A directory that cannot be read is for a person to look at.
                if not is_url(order.store):
                    raise
                arriving.note = f"waits for the store: {error.message}"
                logger.warning("%s version %d %s", order.servable, order.version, arriving.note)
            await _pause(delay_s * random.SystemRandom().uniform(0.5, 1.0), arriving.progress)
            delay_s = min(2 * delay_s, _RETRY_S_MAX)
            arriving.note = ""


def wanted_units(manifest: Manifest, order: LoadOrder) -> WantedUnits:
    """The units that an order names.

    Raises:
        NotFound: the bundle does not have one of them.
    """
    found: WantedUnits = {}
    for hosted in order.units:
        unit = manifest.units.get(hosted.name)
        if unit is None:
            raise NotFound(f"{order.servable} version {order.version} has no unit {hosted.name!r}")
        found[unit.id, hosted.partitions] = (unit, hosted)
    return found


def _refs(
    units: WantedUnits, is_needed: Callable[[tuple[str, tuple[int, ...]]], bool]
) -> Iterator[BlobRef]:
    """Every blob that an order's units map, once."""
    seen: set[str] = set()
    for key, (unit, hosted) in units.items():
        if not is_needed(key):
            continue
        for ref in _blobs(unit, hosted):
            if ref.digest not in seen:
                seen.add(ref.digest)
                yield ref


def _blobs(unit: Unit, hosted: HostedUnit) -> Iterator[BlobRef]:
    # A partition that is not there is refused by who opens the unit, with the right words.
    match unit:
        case TableUnit():
            wanted = [i for i in hosted.partitions if 0 <= i < len(unit.partitions)]
            yield from (blob for i in wanted for blob in unit.partitions[i].blobs)
        case CustomUnit():
            wanted = [i for i in hosted.partitions if 0 <= i < len(unit.partitions)]
            yield from (blob for i in wanted for blob in unit.partitions[i].values())
        case _:
            yield from unit_blobs(unit)


def _map_all(store: Store, refs: tuple[BlobRef, ...], progress: Progress) -> list[Buffer]:
    if not refs:
        return []
    with ThreadPoolExecutor(min(_BLOBS, len(refs)), thread_name_prefix="blobs") as pool:
        try:
            return list(pool.map(lambda ref: store.map(ref, progress), refs))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _is_same(order: LoadOrder, other: LoadOrder) -> bool:
    return (order.store, frozenset(order.units)) == (other.store, frozenset(other.units))


async def _pause(delay_s: float, progress: Progress) -> None:
    """Sleep, but not through being called off."""
    until = asyncio.get_running_loop().time() + delay_s
    while (left := until - asyncio.get_running_loop().time()) > 0:
        try:
            progress.check()
        except Cancelled:
            return  # the caller checks, and raises it
        await asyncio.sleep(min(left, 0.05))


def _look_at(task: asyncio.Task[Arrived]) -> None:
    """What an order failed of is told to whoever waits; that may be nobody any more."""
    if not task.cancelled():
        task.exception()
