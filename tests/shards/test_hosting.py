"""The books of an actor: whole orders or none, shared units, capacity, terms."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from batching.allowance import Allowance
from batching.errors import Cancelled, FailedPrecondition, NotFound, ResourceExhausted, Unavailable
from shards.errors import BundleNotFound
from shards.hosting import Hosting, ServableVersion, UnitOpener
from shards.manifest import Unit
from shards.orders import HostedUnit, LoadOrder, UnitState
from shards.store import LocalStore, Store
from tests.shards.bundles import full_manifest
from tests.shards.serving import DEADLINE_S, until

WORDS, TOKENIZE, TRUNK = "words", "tokenize", "trunk"
ALL = (HostedUnit(name=WORDS, partitions=(0, 1)), HostedUnit(name=TOKENIZE), HostedUnit(name=TRUNK))


class FakeOpener(UnitOpener):
    """Opens units that take 100 bytes each, 90 when measured; may be told to fail or to wait."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.shared: list[str] = []
        self.fails: str | None = None
        self.gates: dict[str, asyncio.Event] = {}
        self.open_units: dict[str, int] = {}

    @property
    def held_bytes(self) -> int:
        return 90 * sum(self.open_units.values())

    def estimate(self, unit: Unit, wanted: HostedUnit) -> int:
        return 0 if self.open_units.get(wanted.name) else 100

    async def open(self, store: Store, unit: Unit, wanted: HostedUnit, order: LoadOrder) -> None:
        self.log.append(f"open {wanted.name}")
        if wanted.name in self.gates:
            await self.gates[wanted.name].wait()
        if self.fails == wanted.name:
            raise Unavailable(f"{wanted.name} cannot be opened")
        self.open_units[wanted.name] = self.open_units.get(wanted.name, 0) + 1

    async def join(
        self, store: Store, unit: Unit, wanted: HostedUnit, order: LoadOrder, room_bytes: int
    ) -> None:
        self.shared.append(f"join {wanted.name}, {room_bytes} bytes")
        if self.fails == wanted.name:
            raise Unavailable(f"{wanted.name} cannot be joined")

    async def leave(self, unit: Unit, wanted: HostedUnit, version: ServableVersion) -> None:
        self.shared.append(f"leave {wanted.name} by {version[1]}")

    def state(self, unit: Unit, wanted: HostedUnit) -> UnitState:
        return UnitState(id=wanted.name, nbytes=90)

    async def close(self, unit: Unit, wanted: HostedUnit) -> None:
        self.log.append(f"close {wanted.name}")
        self.open_units[wanted.name] -= 1


class Actor:
    """Books over a store with versions 1 to 3 of a servable, all of the same units."""

    def __init__(
        self, path: Path, capacity_bytes: int = 10_000, opener: FakeOpener | None = None
    ) -> None:
        self.store = LocalStore(path)
        self.store.create()
        for version in (1, 2, 3):
            self.store.write_manifest(full_manifest(self.store, version=version))
        self.opener = opener or FakeOpener()
        self.allowed: list[tuple[str, float | None]] = []
        self.books = Hosting(
            self.opener, "device-0", capacity_bytes, on_allowance=self._on_allowance
        )

    def _on_allowance(self, servable: str, allowance: Allowance | None) -> None:
        self.allowed.append((servable, None if allowance is None else allowance.weight))

    def order(self, version: int = 1, units: tuple[HostedUnit, ...] = ALL, **of: Any) -> LoadOrder:
        values: dict[str, Any] = {"term": 1, "store": str(self.store.path), "servable": "ranker"}
        values |= of
        return LoadOrder(version=version, units=units, **values)

    async def load(self, version: int = 1, *names: str, **of: Any) -> None:
        units = tuple(unit for unit in ALL if unit.name in names) if names else ALL
        await self.books.load(self.order(version, units, **of))

    async def unload(self, version: int = 1, term: int = 1) -> None:
        await self.books.unload(term, "ranker", version)

    @property
    def units(self) -> set[str]:
        return {name for name, count in self.opener.open_units.items() if count}

    def check_empty(self) -> None:
        assert self.books.loaded == ()
        assert self.books.reserved_bytes == 0
        assert not self.units


Scenario = Callable[[Actor], Awaitable[None]]


def run(path: Path, scenario: Scenario, capacity_bytes: int = 10_000) -> None:
    async def main() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await scenario(Actor(path, capacity_bytes))

    asyncio.run(main())


# --- whole orders ------------------------------------------------------------------------------


def test_an_order_opens_its_units_and_its_undoing_closes_them(tmp_path: Path) -> None:
    async def scenario(actor: Actor) -> None:
        await actor.load()
        assert actor.books.loaded == (("ranker", 1),)
        assert actor.books.reserved_bytes == 270
        await actor.unload()
        assert actor.opener.log == [f"{do} {u.name}" for do in ("open", "close") for u in ALL]
        actor.check_empty()

    run(tmp_path, scenario)


def test_an_order_that_was_carried_out_is_not_carried_out_again(tmp_path: Path) -> None:
    async def scenario(actor: Actor) -> None:
        await actor.load()
        before = list(actor.opener.log)
        await actor.load()
        await actor.books.load(actor.order(units=ALL[::-1]))
        assert actor.opener.log == before

    run(tmp_path, scenario)


def test_what_is_not_loaded_is_unloaded_already(tmp_path: Path) -> None:
    async def scenario(actor: Actor) -> None:
        await actor.unload()
        await actor.books.unload(1, "another", 7)
        actor.check_empty()

    run(tmp_path, scenario)


@pytest.mark.parametrize("broken", [unit.name for unit in ALL])
def test_a_unit_that_cannot_be_opened_leaves_nothing_open(tmp_path: Path, broken: str) -> None:
    async def scenario(actor: Actor) -> None:
        actor.opener.fails = broken
        with pytest.raises(Unavailable, match=f"{broken} cannot be opened"):
            await actor.load()
        actor.check_empty()
        actor.opener.fails = None
        await actor.load()
        assert actor.units == {WORDS, TOKENIZE, TRUNK}

    run(tmp_path, scenario)


def test_an_order_that_is_given_up_half_way_leaves_nothing_open(tmp_path: Path) -> None:
    async def scenario(actor: Actor) -> None:
        actor.opener.gates[TRUNK] = asyncio.Event()
        loading = asyncio.ensure_future(actor.load())
        await until(lambda: "open trunk" in actor.opener.log)
        assert actor.units == {WORDS, TOKENIZE}
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading
        actor.check_empty()
        actor.opener.gates.clear()
        await actor.load()

    run(tmp_path, scenario)


def test_a_bundle_or_unit_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    async def scenario(actor: Actor) -> None:
        with pytest.raises(BundleNotFound):
            await actor.load(9)
        with pytest.raises(NotFound, match="ranker version 1 has no unit 'trnk'"):
            await actor.books.load(actor.order(units=(*ALL, HostedUnit(name="trnk"))))
        assert not actor.opener.log
        actor.check_empty()

    run(tmp_path, scenario)


def test_a_later_order_for_a_version_says_exactly_what_it_holds(tmp_path: Path) -> None:
    async def scenario(actor: Actor) -> None:
        await actor.load(1, WORDS, TOKENIZE)
        await actor.load(1, TOKENIZE, TRUNK)
        assert actor.units == {TOKENIZE, TRUNK}
        assert actor.opener.log[2:] == ["open trunk", "close words"]
        assert actor.books.reserved_bytes == 180
        await actor.unload()
        actor.check_empty()

    run(tmp_path, scenario)


def test_a_later_order_that_fails_leaves_the_earlier_one_in_force(tmp_path: Path) -> None:
    async def scenario(actor: Actor) -> None:
        await actor.load(1, WORDS)
        actor.opener.fails = TRUNK
        with pytest.raises(Unavailable):
            await actor.load(1, WORDS, TOKENIZE, TRUNK)
        assert actor.units == {WORDS}
        assert actor.books.loaded == (("ranker", 1),)
        assert actor.books.reserved_bytes == 90

    run(tmp_path, scenario)


# --- shared units ------------------------------------------------------------------------------


def test_who_comes_to_an_open_unit_joins_it_with_what_is_free_and_leaves_it(
    tmp_path: Path,
) -> None:
    async def scenario(actor: Actor) -> None:
        await actor.load(1, TRUNK)
        await actor.load(2, TOKENIZE, TRUNK)
        assert actor.opener.shared == ["join trunk, 120 bytes"]
        await actor.load(2, TOKENIZE, TRUNK)
        [trunk, _] = actor.books.units
        assert (trunk.id, trunk.nbytes, trunk.users) == (TRUNK, 90, ("ranker:1", "ranker:2"))
        await actor.unload(1)
        assert actor.opener.shared[1:] == ["leave trunk by 1"]
        await actor.unload(2)
        assert actor.opener.log[-2:] == ["close tokenize", "close trunk"] or (
            actor.opener.log[-2:] == ["close trunk", "close tokenize"]
        )
        assert actor.opener.shared[2:] == []
        actor.check_empty()

    run(tmp_path, scenario, capacity_bytes=300)


def test_who_cannot_join_leaves_what_it_had_joined_before(tmp_path: Path) -> None:
    async def scenario(actor: Actor) -> None:
        await actor.load(1, TOKENIZE, TRUNK)
        actor.opener.fails = TRUNK
        with pytest.raises(Unavailable, match="trunk cannot be joined"):
            await actor.load(2, TOKENIZE, TRUNK)
        assert actor.opener.shared[-1] == "leave tokenize by 2"
        assert [each.users for each in actor.books.units] == [("ranker:1",)] * 2

    run(tmp_path, scenario)


def test_versions_share_units_and_the_last_one_closes_them(tmp_path: Path) -> None:
    async def scenario(actor: Actor) -> None:
        await actor.load(1)
        await actor.load(2, TRUNK)
        assert actor.opener.log.count("open trunk") == 1
        assert actor.books.loaded == (("ranker", 1), ("ranker", 2))
        assert actor.books.reserved_bytes == 270
        await actor.unload(1)
        assert actor.units == {TRUNK}
        assert actor.books.reserved_bytes == 90
        await actor.unload(2)
        actor.check_empty()

    run(tmp_path, scenario)


def test_a_load_that_fails_takes_nothing_from_those_it_shares_with(tmp_path: Path) -> None:
    async def scenario(actor: Actor) -> None:
        await actor.load(1, WORDS, TOKENIZE)
        actor.opener.fails = TRUNK
        with pytest.raises(Unavailable):
            await actor.load(2)
        assert actor.units == {WORDS, TOKENIZE}
        assert actor.books.loaded == (("ranker", 1),)
        await actor.unload(1)
        actor.check_empty()

    run(tmp_path, scenario)


def test_one_unit_under_two_names_is_opened_once(tmp_path: Path) -> None:
    async def scenario(actor: Actor) -> None:
        manifest = full_manifest(actor.store, version=4)
        units = {**manifest.units, "twin": manifest.units[TRUNK]}
        actor.store.write_manifest(msgspec.structs.replace(manifest, units=units))
        twins = (HostedUnit(name=TRUNK), HostedUnit(name="twin"))
        await actor.books.load(actor.order(4, twins))
        assert len(actor.opener.log) == 1
        await actor.unload(4)
        actor.check_empty()

    run(tmp_path, scenario)


def test_other_partitions_of_a_table_are_another_piece_of_work(tmp_path: Path) -> None:
    async def scenario(actor: Actor) -> None:
        for version, partitions in ((1, (0,)), (2, (1,)), (3, (1,))):
            units = (HostedUnit(name=WORDS, partitions=partitions),)
            await actor.books.load(actor.order(version, units))
        assert actor.opener.log == ["open words", "open words"]
        for version in (1, 2, 3):
            await actor.unload(version)
        actor.check_empty()

    run(tmp_path, scenario)


# --- capacity ----------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_and_says_by_how_much(tmp_path: Path) -> None:
    async def scenario(actor: Actor) -> None:
        await actor.load(1, WORDS)
        with pytest.raises(ResourceExhausted) as refused:
            await actor.load(2)
        assert str(refused.value) == (
            "ranker version 2 needs 200 bytes on device-0, 160 of 250 are free: 40 short"
        )
        assert actor.units == {WORDS}
        assert actor.books.reserved_bytes == 90

    run(tmp_path, scenario, capacity_bytes=250)


def test_what_just_fits_is_loaded_and_what_is_shared_takes_no_room(tmp_path: Path) -> None:
    async def scenario(actor: Actor) -> None:
        assert actor.books.capacity_bytes == 300
        await actor.load(1)
        await actor.load(2)
        await actor.load(3)
        assert len(actor.books.loaded) == 3

    run(tmp_path, scenario, capacity_bytes=300)


def test_room_comes_back_with_an_unload(tmp_path: Path) -> None:
    async def scenario(actor: Actor) -> None:
        await actor.load(1, WORDS)
        with pytest.raises(ResourceExhausted):
            await actor.load(2, TRUNK)
        await actor.unload(1)
        await actor.load(2, TRUNK)

    run(tmp_path, scenario, capacity_bytes=100)


def test_what_is_being_opened_is_promised_and_then_measured(tmp_path: Path) -> None:
    async def scenario(actor: Actor) -> None:
        actor.opener.gates[WORDS] = asyncio.Event()
        loading = asyncio.ensure_future(actor.load())
        await until(lambda: "open words" in actor.opener.log)
        assert actor.books.reserved_bytes == 300
        actor.opener.gates.pop(WORDS).set()
        await loading
        assert actor.books.reserved_bytes == 270

    run(tmp_path, scenario)


def test_while_one_unit_is_opened_those_before_it_are_measured(tmp_path: Path) -> None:
    async def scenario(actor: Actor) -> None:
        actor.opener.gates[TRUNK] = asyncio.Event()
        loading = asyncio.ensure_future(actor.load())
        await until(lambda: "open trunk" in actor.opener.log)
        assert actor.books.reserved_bytes == 90 + 90 + 100
        assert actor.books.loaded == ()
        actor.opener.gates[TRUNK].set()
        await loading

    run(tmp_path, scenario)


# --- terms and turns ---------------------------------------------------------------------------


def test_a_controller_that_was_succeeded_is_refused(tmp_path: Path) -> None:
    async def scenario(actor: Actor) -> None:
        await actor.load(1, term=5)
        for stale in (actor.load(2, term=4), actor.unload(1, term=4)):
            with pytest.raises(
                FailedPrecondition, match="term 4 refused: device-0 has seen term 5"
            ):
                await stale
        assert actor.books.loaded == (("ranker", 1),)
        await actor.unload(1, term=5)
        actor.check_empty()

    run(tmp_path, scenario)


def test_an_order_that_waited_while_its_controller_was_succeeded_is_refused(
    tmp_path: Path,
) -> None:
    async def scenario(actor: Actor) -> None:
        actor.opener.gates[TRUNK] = asyncio.Event()
        await actor.load(3, WORDS, term=1)
        first = asyncio.ensure_future(actor.load(1, TRUNK, term=1))
        await until(lambda: len(actor.opener.log) == 2)
        stale = [
            asyncio.ensure_future(actor.load(2, WORDS, term=1)),
            asyncio.ensure_future(actor.unload(3, term=1)),
        ]
        await asyncio.sleep(0)
        newest = asyncio.ensure_future(actor.load(3, TOKENIZE, term=2))
        await asyncio.sleep(0)
        actor.opener.gates[TRUNK].set()
        await first
        for order in stale:
            with pytest.raises(FailedPrecondition, match="seen term 2"):
                await order
        await newest
        assert actor.units == {TRUNK, TOKENIZE}

    run(tmp_path, scenario)


def test_an_unload_calls_off_the_load_that_goes_on_and_a_later_one_stands(tmp_path: Path) -> None:
    async def scenario(actor: Actor) -> None:
        actor.opener.gates[TRUNK] = asyncio.Event()
        loading = asyncio.ensure_future(actor.load(1, TRUNK))
        await until(lambda: bool(actor.opener.log))
        unloading = asyncio.ensure_future(actor.unload(1))
        again = asyncio.ensure_future(actor.load(1, TRUNK))
        await asyncio.sleep(0)
        actor.opener.gates[TRUNK].set()
        with pytest.raises(Cancelled, match="unloaded while it was loading"):
            await loading
        await asyncio.gather(unloading, again)
        assert actor.opener.log == ["open trunk", "close trunk", "open trunk"]
        assert actor.books.loaded == (("ranker", 1),)

    run(tmp_path, scenario)


def test_an_unload_of_what_waits_for_its_turn_waits_for_nobody(tmp_path: Path) -> None:
    async def scenario(actor: Actor) -> None:
        gate = actor.opener.gates[TRUNK] = asyncio.Event()
        busy = asyncio.ensure_future(actor.load(1, TRUNK))
        await until(lambda: bool(actor.opener.log))
        waiting = asyncio.ensure_future(actor.load(2, WORDS))
        await until(lambda: any("waits for ranker:1" in each.note for each in actor.books.loading))
        await asyncio.wait_for(actor.unload(2), DEADLINE_S)
        assert not busy.done()
        gate.set()
        with pytest.raises(Cancelled):
            await waiting
        await busy
        assert actor.opener.log == ["open trunk"]

    run(tmp_path, scenario)


def test_two_orders_at_once_for_one_version_open_it_once(tmp_path: Path) -> None:
    async def scenario(actor: Actor) -> None:
        await asyncio.gather(actor.load(), actor.load(), actor.load(2))
        assert len(actor.opener.log) == 3

    run(tmp_path, scenario)


def test_a_load_that_comes_after_an_unload_is_carried_out_after_it(tmp_path: Path) -> None:
    """Also where the unload still waits for its turn, and the version seems to be loaded."""

    async def scenario(actor: Actor) -> None:
        await actor.load(1, WORDS)
        gate = actor.opener.gates[TRUNK] = asyncio.Event()
        busy = asyncio.create_task(actor.load(2, TRUNK))
        await until(lambda: f"open {TRUNK}" in actor.opener.log)
        leaving = asyncio.create_task(actor.unload(1))
        await asyncio.sleep(0)
        again = asyncio.create_task(actor.load(1, WORDS))
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(busy, leaving, again)
        assert actor.books.loaded == (("ranker", 1), ("ranker", 2))
        assert actor.units == {WORDS, TRUNK}

    run(tmp_path, scenario)
