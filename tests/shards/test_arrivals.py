"""Orders wait for a store by themselves: nobody else, and not in vain."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from batching.errors import Cancelled, Unavailable
from shards import arrivals
from shards.arrivals import Arrivals, Arrived
from shards.errors import BundleNotFound
from shards.layout import Buffer
from shards.manifest import BlobRef, Manifest
from shards.orders import HostedUnit, LoadOrder
from shards.progress import Progress
from shards.store import LocalStore
from tests.shards.bundles import full_manifest
from tests.shards.serving import DEADLINE_S, until

ALL = (
    HostedUnit(name="words", partitions=(0, 1)),
    HostedUnit(name="tokenize"),
    HostedUnit(name="trunk"),
)
BUCKET = "s3://bucket/prefix"


class SlowStore(LocalStore):
    """A directory that stands for a bucket: it may be away, or hold blobs up."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.away = False
        self.gate = threading.Event()
        self.gate.set()
        self.mapped: list[str] = []
        self.looked = 0

    def read_manifest(self, name: str, version: int) -> Manifest:
        self.looked += 1
        if self.away:
            raise Unavailable("nobody answers")
        return super().read_manifest(name, version)

    def map(self, ref: BlobRef, progress: Progress | None = None) -> Buffer:
        while not self.gate.wait(0.01):
            assert progress is not None
            progress.check()
        self.mapped.append(ref.digest)
        return super().map(ref, progress)


Scenario = Callable[[SlowStore, Arrivals], Awaitable[None]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Scenario], None]:
    store = SlowStore(tmp_path)
    for version in (1, 2):
        store.write_manifest(full_manifest(store, version=version))
    monkeypatch.setattr(arrivals, "open_store", lambda url, cache: store)
    monkeypatch.setattr(arrivals, "_RETRY_FIRST_S", 0.01)
    store.mapped.clear()

    def run(scenario: Scenario) -> None:
        async def main() -> None:
            async with asyncio.timeout(DEADLINE_S):
                await scenario(store, Arrivals())

        asyncio.run(main())

    return run


def order(version: int = 1, units: tuple[HostedUnit, ...] = ALL, store: str = BUCKET) -> LoadOrder:
    return LoadOrder(term=1, store=store, servable="ranker", version=version, units=units)


def bring(arrivals: Arrivals, what: LoadOrder, **of: Any) -> asyncio.Task[Arrived]:
    return asyncio.create_task(arrivals.bring(what, of.get("is_needed", lambda _: True)))


def test_everything_that_an_order_names_is_brought_and_held(
    run: Callable[[Scenario], None],
) -> None:
    async def scenario(store: SlowStore, arrivals: Arrivals) -> None:
        arrived = await bring(arrivals, order())
        assert arrived.manifest.version == 1
        assert len(arrived.held) == len(set(store.mapped)) == 5
        assert arrivals.loading == ()

    run(scenario)


def test_only_the_partitions_and_units_that_are_wanted_are_brought(
    run: Callable[[Scenario], None],
) -> None:
    async def scenario(store: SlowStore, arrivals: Arrivals) -> None:
        units = (HostedUnit(name="words", partitions=(1, 99)),)
        assert len((await bring(arrivals, order(units=units))).held) == 1
        assert (await bring(arrivals, order(), is_needed=lambda _: False)).held == []

    run(scenario)


def test_a_slow_order_shows_how_far_it_is_and_holds_up_no_other(
    run: Callable[[Scenario], None],
) -> None:
    async def scenario(store: SlowStore, arrivals: Arrivals) -> None:
        store.gate.clear()
        slow = bring(arrivals, order(1))
        await until(lambda: any(each.bytes_total for each in arrivals.loading))
        quick = await bring(arrivals, order(2), is_needed=lambda _: False)
        assert quick.manifest.version == 2
        [loading] = arrivals.loading
        assert (loading.version, loading.bytes_done, slow.done()) == (1, 0, False)
        assert loading.eta_s is None
        store.gate.set()
        await slow

    run(scenario)


def test_an_outage_makes_a_load_late_and_says_so(run: Callable[[Scenario], None]) -> None:
    async def scenario(store: SlowStore, arrivals: Arrivals) -> None:
        store.away = True
        waiting = bring(arrivals, order())
        await until(lambda: any("nobody answers" in each.note for each in arrivals.loading))
        await until(lambda: store.looked > 3)
        assert not waiting.done()
        store.away = False
        assert (await waiting).manifest.version == 1

    run(scenario)


def test_a_directory_that_cannot_be_read_is_a_failure(run: Callable[[Scenario], None]) -> None:
    async def scenario(store: SlowStore, arrivals: Arrivals) -> None:
        store.away = True
        with pytest.raises(Unavailable):
            await bring(arrivals, order(store=str(store.path)))

    run(scenario)


def test_what_is_wrong_with_a_bundle_is_no_reason_to_wait(run: Callable[[Scenario], None]) -> None:
    async def scenario(store: SlowStore, arrivals: Arrivals) -> None:
        with pytest.raises(BundleNotFound):
            await bring(arrivals, order(9))
        assert arrivals.loading == ()

    run(scenario)


@pytest.mark.parametrize("away", [True, False])
def test_a_load_is_called_off_whatever_it_waits_for(
    run: Callable[[Scenario], None], away: bool
) -> None:
    async def scenario(store: SlowStore, arrivals: Arrivals) -> None:
        store.away = away
        store.gate.clear()
        waiting = bring(arrivals, order())
        await until(lambda: any(each.note or each.bytes_total for each in arrivals.loading))
        arrivals.call_off("ranker", 1, "unloaded")
        with pytest.raises(Cancelled, match="unloaded"):
            await waiting
        assert arrivals.loading == ()
        store.gate.set()

    run(scenario)


def test_an_order_that_is_given_again_joins_and_another_takes_its_place(
    run: Callable[[Scenario], None],
) -> None:
    async def scenario(store: SlowStore, arrivals: Arrivals) -> None:
        store.gate.clear()
        first, again = bring(arrivals, order()), bring(arrivals, order(units=ALL[::-1]))
        await until(lambda: len(arrivals.loading) == 1)
        again.cancel()  # who stops waiting calls nothing off
        other = bring(arrivals, order(units=ALL[:1]))
        with pytest.raises(Cancelled, match="another order"):
            await first
        store.gate.set()
        assert len((await other).held) == 2

    run(scenario)
