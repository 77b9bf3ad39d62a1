"""How far loads have come, and how long the rest will take: counted, and told by the books."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batching.errors import Cancelled
from shards.manifest import Unit
from shards.orders import HostedUnit, Loading
from shards.progress import Progress
from shards.saving import save
from shards.specs import Spec
from tests.shards import loading
from tests.shards.serving import DEADLINE_S, DeviceRig, until
from tests.shards.test_hosting import TOKENIZE, TRUNK, WORDS, Actor, FakeOpener


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def test_a_blob_that_is_begun_anew_counts_once() -> None:
    progress = Progress(100)
    progress.note("a", 30)
    progress.note("b", 10)
    progress.note("a", 5)
    assert progress.done == 15


def test_what_is_left_takes_as_long_as_the_pace_so_far_says() -> None:
    clock = Clock()
    progress = Progress(0, clock)
    progress.expect(100)
    assert progress.left_s is None
    clock.now += 2
    assert progress.left_s is None
    progress.note("a", 20)
    assert progress.left_s == pytest.approx(8)
    clock.now += 2
    assert progress.left_s == pytest.approx(16)
    progress.note("a", 100)
    assert progress.left_s == 0


def test_what_was_there_before_it_began_anew_says_nothing_of_the_pace() -> None:
    """After an outage, say: the time of waiting does not count, nor what had come."""
    clock = Clock()
    progress = Progress(0, clock)
    progress.note("a", 60)
    clock.now += 1000
    progress.expect(100)
    clock.now += 2
    assert progress.left_s is None
    progress.note("b", 10)
    assert progress.left_s == pytest.approx(6)


def test_what_is_called_off_takes_no_more_notes() -> None:
    progress = Progress(1)
    progress.cancel("unloaded")
    with pytest.raises(Cancelled, match="unloaded"):
        progress.note("a", 1)


class Compiling(FakeOpener):
    """Has two programs for every unit, and counts those of the one that it opens."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.work: Progress | None = None

    def buckets(self, unit: Unit, wanted: HostedUnit) -> int:
        return 2

    def compiled(self, version: tuple[str, int]) -> Progress | None:
        return self.work

    def begin(self) -> Progress:
        self.work = Progress(0, self.clock)
        self.work.expect(2)
        return self.work


def actor(path: Path) -> tuple[Actor, Compiling]:
    opener = Compiling()
    found = Actor(path, opener=opener)
    return found, opener


def run(scenario: Any) -> None:
    async def main() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await scenario

    asyncio.run(main())


def test_a_load_tells_its_programs_and_when_the_last_will_be_ready(tmp_path: Path) -> None:
    async def scenario() -> None:
        books, opener = actor(tmp_path)
        opener.gates = {WORDS: asyncio.Event(), TRUNK: asyncio.Event()}
        work = opener.begin()
        load = asyncio.ensure_future(books.load(1, WORDS, TRUNK))
        await until(lambda: opener.log == [f"open {WORDS}"])
        [told] = books.books.loading
        assert (told.buckets_done, told.buckets_total, told.eta_s) == (0, 4, None)
        assert 0 < told.bytes_done == told.bytes_total
        opener.clock.now += 3
        work.note("8", 1)
        [told] = books.books.loading
        # One of four took three seconds.
        assert (told.buckets_done, told.buckets_total) == (1, 4)
        assert told.eta_s == pytest.approx(9)
        opener.begin()
        opener.gates[WORDS].set()
        await until(lambda: opener.log == [f"open {WORDS}", f"open {TRUNK}"])
        [told] = books.books.loading
        assert (told.buckets_done, told.buckets_total, told.eta_s) == (2, 4, None)
        opener.gates[TRUNK].set()
        await load
        del load
        await until(lambda: books.books.loading == ())

    run(scenario())


def test_a_load_whose_turn_it_is_not_says_whom_it_waits_for(tmp_path: Path) -> None:
    async def scenario() -> None:
        books, opener = actor(tmp_path)
        gate = opener.gates[TRUNK] = asyncio.Event()
        first = asyncio.ensure_future(books.load(1, TRUNK))
        await until(lambda: bool(opener.log))
        second = asyncio.ensure_future(books.load(2, TOKENIZE))
        await until(lambda: len(books.books.loading) == 2)
        await until(lambda: bool(books.books.loading[1].note))
        told = books.books.loading[1]
        assert (told.version, told.buckets_done, told.buckets_total, told.eta_s) == (2, 0, 2, None)
        assert told.note == "waits for ranker:1 on device-0"
        gate.set()
        await asyncio.gather(first, second)

    run(scenario())


def test_a_load_that_is_called_off_is_told_no_more(tmp_path: Path) -> None:
    async def scenario() -> None:
        books, opener = actor(tmp_path)
        gate = opener.gates[TRUNK] = asyncio.Event()
        load = asyncio.ensure_future(books.load(1, TRUNK))
        await until(lambda: bool(opener.log))
        unload = asyncio.ensure_future(books.unload(1))
        await until(lambda: books.books.loading == ())
        gate.set()
        with pytest.raises(Cancelled):
            await load
        await unload

    run(scenario())


def test_a_device_counts_every_bucket_when_it_is_warm(tmp_path: Path) -> None:
    def layer(params: Any, x: Any) -> Any:
        return x @ params["w"] + 2.5

    w = np.ones((4, 3), np.float32)
    save(
        layer, {"w": w}, tmp_path, "model", 1,
        inputs={"x": Spec(("b", 4))}, batch_buckets=(1, 2, 4),
    )  # fmt: skip
    with DeviceRig(run_now_s=0.001) as rig:
        device = loading.Actor(rig, tmp_path)
        seen: list[Loading] = []
        device.opener._compiler = Watched(lambda: seen.extend(device.books.loading))  # type: ignore[assignment]
        device.load()
    counts = [(each.buckets_done, each.buckets_total) for each in seen]
    assert counts == [(1, 3), (2, 3), (3, 3)]
    assert [each.eta_s is not None for each in seen] == [True, True, False]
    assert all(each.bytes_done == each.bytes_total > w.nbytes for each in seen)


class Watched:
    """A compiler after each of whose buckets somebody looks."""

    def __init__(self, look: Any) -> None:
        self._look = look

    def __getattr__(self, name: str) -> Any:
        return getattr(loading.compiler(), name)

    def load(self, store: Any, unit: Any, written_by: Any, on_ready: Any, *rest: Any) -> None:
        def ready(*found: Any) -> None:
            on_ready(*found)
            self._look()

        loading.compiler().load(store, unit, written_by, ready, *rest)
