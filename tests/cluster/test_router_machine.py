"""Random histories of a router: whatever comes in whatever order, every request ends once.

A seeded machine submits requests of three kinds of model, and lets actors answer, refuse, forget,
lie, die and come back, and epochs change, in random order. The answers are checked against what
the model computes; sinks fail the test when they are told twice.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest

from shards.errors import LinkFull
from shards.manifest import MapUnit
from shards.replies import STALE
from tests.cluster.routing_actors import Asked
from tests.cluster.routing_fakes import (
    Bench,
    Recorder,
    VirtualLoop,
    epoch,
    look_up,
    plain,
    rows_of,
    run_virtually,
    sentence_model,
    sleep_ms,
    table_unit,
    turns,
)

TABLE = table_unit("rows", sizes=(4, 3, 5), missing="zero")
WORDS = rows_of(table_unit())
ACTORS = ("a", "b", "c", "h", "s", "t", "d")
STEPS = 400
#: how rows came to the device, over all histories of this process
WAYS: Counter[str] = Counter()


def expected(model: str, given: Any) -> Any:
    """What an answer must be, computed without a router."""
    if model == "model":
        return given * 2
    table = rows_of(TABLE) if model == "table" else WORDS
    ids = given if model == "table" else np.array([len(text) for text in given])
    known = (ids >= 0) & (ids < len(table))
    rows = np.where(known[:, None], table[np.where(known, ids, 0)], np.float32(0))
    return rows if model == "table" else rows.sum(axis=1)


def compute(asked: Asked) -> Any:
    """What an honest actor answers."""
    [given] = asked.arrays
    match asked.header.unit:
        case "map":
            return given * 2
        case "rows":
            return rows_of(TABLE)[given]
        case "table":
            return WORDS[given]
        case "host":
            return np.array([len(text) for text in given.tolist()], np.int64)
        case "trunk":
            return given.sum(axis=1)
    raise AssertionError(asked.header.unit)


class Machine:
    def __init__(self, loop: VirtualLoop, seed: int) -> None:
        self.random = random.Random(seed)
        sentence, _ = sentence_model()
        trunk = sentence.units["trunk"]
        assert isinstance(trunk, MapUnit)
        self.trunk = trunk
        self.bench = Bench(loop, in_flight_max=40)
        self.bench.actors["d"].host(self.trunk)
        self.loop = loop
        self.number = 0
        self.asked: list[tuple[Recorder, str, Any, float]] = []
        self.lies = 0

    async def new_epoch(self) -> None:
        self.number += 1
        pick = self.random.sample
        sentence, placement = sentence_model()
        generations = {name: self.random.randint(1, 2) for name in ACTORS}
        versions = [
            (plain(), {"unit": [pick("abc", self.random.randint(1, 3))]}),
            (
                look_up(TABLE, name="table"),
                {"unit": [pick("abst", self.random.randint(1, 2)) for _ in range(3)]},
            ),
        ]
        if self.random.random() < 0.8:
            renamed = type(sentence)(**{**_fields(sentence), "name": "sentence"})
            versions.append((renamed, placement))
        await self.bench.router.adopt(
            epoch(
                self.number,
                *versions,
                generations=generations,
                continuation_bytes_min=self.random.choice((None, 0, 0, 20)),
            ),
            timeout_s=0.05,
        )

    def submit(self) -> None:
        models = [name for name in ("model", "table", "sentence") if self.knows(name)]
        model = self.random.choice(models)
        rows = self.random.randint(1, 5)
        given: Any
        if model == "model":
            name, given = "x", np.array([self.random.random() for _ in range(rows)], np.float32)
        elif model == "table":
            name, given = "ids", np.array([self.random.randint(-1, 12) for _ in range(rows)])
        else:
            texts = [b"x" * self.random.randint(0, 13) for _ in range(rows)]
            name, given = "text", np.array(texts, object)
        timeout_s = self.random.choice((0.01, 0.2, 5.0))
        sink = self.bench.ask({name: given}, name=model, timeout_s=timeout_s)
        self.asked.append((sink, model, given, self.loop.time() + timeout_s))

    def knows(self, name: str) -> bool:
        return bool(self.bench.router.routes.epoch.servables.get(name))

    def answer_some(self, *, honestly: bool) -> None:
        for name in self.random.sample(ACTORS, len(ACTORS)):
            actor = self.bench.actors[name]
            self.random.shuffle(actor.asked)
            for _ in range(min(len(actor.asked), self.random.randint(1, 4))):
                self.answer(actor.take(), honestly=honestly)

    def answer(self, asked: Asked, *, honestly: bool) -> None:
        kind = 0.0 if honestly else self.random.random()
        if kind < 0.7:
            asked.answer(compute(asked))
        elif kind < 0.8:
            asked.refuse(STALE)
        elif kind < 0.85:
            asked.refuse("RESOURCE_EXHAUSTED")
        elif kind < 0.9:
            self.lies += 1
            asked.answer(compute(asked), unit="another")
        elif kind < 0.95:
            asked.answer(compute(asked))
            asked.answer(compute(asked))  # and says it again
        elif kind < 0.97:
            self.lies += 1
            asked.answer(compute(asked), plan="another")

    def disturb(self) -> None:
        actor = self.bench.actors[self.random.choice(ACTORS)]
        actor.is_away = self.random.random() < 0.3
        if actor.links:
            if self.random.random() < 0.5:
                actor.asked.clear()  # what it was asked dies with it
                actor.link.break_off()
            else:
                refuses = LinkFull("full") if actor.link.refuses is None else None
                actor.link.refuses = refuses

    def cancel(self) -> None:
        """A client goes away, perhaps one that has its answer."""
        sink = self.random.choice(self.asked)[0]
        if sink.request is not None:
            self.bench.router.cancel(sink.request)

    async def step(self) -> None:
        roll = self.random.random()
        if roll < 0.43 or not self.asked:
            self.submit()
        elif roll < 0.45:
            self.cancel()
        elif roll < 0.75:
            self.answer_some(honestly=False)
        elif roll < 0.85:
            self.disturb()
        elif roll < 0.9:
            await self.new_epoch()
        else:
            await sleep_ms(self.random.choice((0, 1, 20, 300)))
        await turns(self.random.randint(0, 3))

    async def settle(self) -> None:
        """Everybody is well again: whatever is left must end by itself."""
        for name in ACTORS:
            self.bench.actors[name].is_away = False
            for link in self.bench.actors[name].links:
                link.refuses = None
        while self.bench.router.in_flight:
            self.answer_some(honestly=True)
            await sleep_ms(5)

    def check(self) -> Counter[str]:
        ends: Counter[str] = Counter()
        for sink, model, given, _ in self.asked:
            assert sink.is_told, "a request never ended"
            if sink.error is None:
                assert sink.answer.tolist() == expected(model, given).tolist()
            ends[str(sink.error.code) if sink.error else "OK"] += 1
        return ends


def _fields(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__struct_fields__}


async def play(loop: VirtualLoop, seed: int, *, closes: bool = False) -> Counter[str]:
    machine = Machine(loop, seed)
    await machine.new_epoch()
    for _ in range(STEPS):
        await machine.step()
        for sink, _, _, deadline in machine.asked[-60:]:
            assert sink.is_told or loop.time() <= deadline + 0.02, "a deadline did not fire"
        if machine.bench.router.in_flight == 0:
            machine.bench.check_at_rest()
    if not closes:
        await machine.settle()
    machine.bench.router.close()
    machine.bench.check_at_rest()
    ends = machine.check()
    stats = machine.bench.router.stats
    WAYS.update(joined=stats.joined, unjoined=stats.unjoined, mismatched=stats.mismatched)
    assert machine.bench.actors["d"].desk is not None
    WAYS.update(completed=machine.bench.actors["d"].desk._joins.stats.completed)
    await sleep_ms(10_000)
    assert not any(
        link.is_open() for name in ACTORS for link in machine.bench.actors[name].links
    ), "a link outlived the router"
    return ends


@pytest.mark.parametrize("seed", range(30))
def test_every_request_ends_once_with_its_own_answer_or_one_error(seed: int) -> None:
    ends = run_virtually(lambda loop: play(loop, seed))
    assert ends["OK"] > 20, ends


@pytest.mark.parametrize("seed", range(100, 105))
def test_close_in_the_middle_ends_every_request_too(seed: int) -> None:
    run_virtually(lambda loop: play(loop, seed, closes=True))


def test_the_histories_reach_every_kind_of_end_and_both_ways_to_a_device() -> None:
    ends: Counter[str] = Counter()
    WAYS.clear()
    for seed in range(8):
        ends += run_virtually(lambda loop, seed=seed: play(loop, seed))  # type: ignore[misc]
    wanted = {
        "OK", "CANCELLED", "DEADLINE_EXCEEDED", "UNAVAILABLE", "RESOURCE_EXHAUSTED", "INTERNAL",
    }  # fmt: skip
    assert ends.keys() == wanted
    assert WAYS["completed"] > 5, WAYS
    assert WAYS["unjoined"] > 0, WAYS
    assert WAYS["mismatched"] > 0, WAYS
