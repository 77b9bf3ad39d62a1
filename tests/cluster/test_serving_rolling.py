"""Versions change places copy by copy under real requests: real tables, sockets, router and door,
driven by the real control core.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import shards
from cluster.config import Config
from cluster.control import (
    ActorUp,
    ControlCore,
    Declared,
    Effect,
    EnsureActor,
    Event,
    Listed,
    Load,
    Publish,
    ReadManifest,
    RouterLeased,
    Tick,
    Unload,
)
from cluster.declared import DeclaredState
from shards.orders import ActorReport
from shards.specs import Spec
from tests.cluster.control_fakes import config
from tests.cluster.serving import Cluster

ROWS, DIM, PARTITIONS = 64, 4, 4
TABLE_BYTES = ROWS * DIM * 4
NAMES = ("shard-0", "shard-1")
#: One id of every partition, so that an answer has a part of each.
IDS = [0, 17, 34, 51]


def rows_of(version: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    return np.arange(ROWS * DIM, dtype=np.float32).reshape(ROWS, DIM) + 1000 * version


def declared(store: Path) -> Config:
    """Two copies of every partition on two actors."""
    found = config("rows", devices=0, shards=2)
    rolling = dataclasses.replace(found.servables[0], transition="shard-rolling", table_replicas=2)
    return dataclasses.replace(found, store=str(store), servables=(rolling,))


class Driver:
    """A controller's shell over a cluster without Ray: carries effects out, one after the other.

    Attributes:
        held: for every actor, the sets of versions that it held after an order.
        homes: for every epoch, version to the actors that it names.
    """

    def __init__(self, cluster: Cluster, store: Path) -> None:
        self._cluster = cluster
        self._store = shards.LocalStore(store)
        self._core = ControlCore(DeclaredState(term=1, seq=0))
        self.held: dict[str, set[frozenset[int]]] = {name: set() for name in NAMES}
        self.homes: list[dict[int, set[str]]] = []

    def send(self, event: Event) -> None:
        """Tell the core something, and do what follows."""
        events = [event]
        while events:
            for effect in self._core.handle(events.pop(0), time.monotonic()):
                answer = self._carry_out(effect)
                if answer is not None:
                    events.append(answer)

    def until(self, holds: Callable[[], bool]) -> None:
        """Let time pass, as a shell does, until something holds."""
        deadline, pause = time.monotonic() + 20.0, threading.Event()
        while not holds():
            assert time.monotonic() < deadline, self._core.status()
            oldest = self._cluster.io.call(self._cluster.router.oldest_live_epoch)
            self.send(RouterLeased(router="r", oldest_live_epoch=oldest))
            self.send(Tick())
            pause.wait(0.002)

    def _carry_out(self, effect: Effect) -> Event | None:
        cluster = self._cluster
        match effect:
            case EnsureActor():
                if effect.name in NAMES:
                    return ActorUp(report=self._report(effect.name))
            case ReadManifest():
                return effect.done(self._store.read_manifest(effect.servable, effect.version))
            case Load():
                cluster.io.run(cluster.actors[effect.actor].hosting.load(effect.order))
                self._note(effect.actor)
                return effect.done()
            case Unload():
                hosting = cluster.actors[effect.actor].hosting
                cluster.io.run(hosting.unload(effect.term, effect.servable, effect.version))
                self._note(effect.actor)
                return effect.done()
            case Publish():
                cluster.io.run(cluster.router.adopt(effect.epoch))
                self.homes.append(
                    {
                        number: {actor for part in served.placement["table"] for actor in part}
                        for number, served in effect.epoch.servables.get("rows", {}).items()
                    }
                )
            case _:
                pass  # what is kept, listed and allowed is other tests' business
        return None

    def _report(self, name: str) -> ActorReport:
        """An actor with room for one version, and not for two."""
        endpoint = self._cluster.endpoints[name]
        capacity = TABLE_BYTES * 3 // 2
        return ActorReport(kind="shard", endpoint=endpoint, pid=1, capacity_bytes=capacity)

    def _note(self, name: str) -> None:
        loaded = self._cluster.actors[name].hosting.loaded
        self.held[name].add(frozenset(version for _, version in loaded))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    for version in (1, 2):
        with shards.Bundle.create(tmp_path / "store", "rows", version) as bundle:
            table = bundle.table("table", rows_of(version), partitions=PARTITIONS)
            bundle.signature(inputs={"ids": Spec(("b",), "int64")})(
                lambda ids, table=table: {"y": table.rows(ids)}
            )
    cluster = Cluster(tmp_path / "store", tmp_path, shards=2)
    try:
        yield cluster
    finally:
        cluster.close()


def test_while_copies_change_places_every_request_is_answered_by_one_version(
    cluster: Cluster, tmp_path: Path
) -> None:
    driver = Driver(cluster, tmp_path / "store")
    driver.send(Declared(config=declared(tmp_path / "store")))
    driver.send(Listed(servable="rows", versions=(1,)))
    driver.until(lambda: driver.homes[-1:] == [{1: set(NAMES)}])
    done = threading.Event()
    answered: list[int] = []

    def ask_on() -> list[int]:
        """The versions that answered, until it is over."""
        found: list[int] = []
        while not done.is_set():
            answer = cluster.ask("/v1/models/rows:predict", json.dumps({"instances": IDS}))
            assert answer.status == 200, answer.body
            version = int(answer.headers["x-servable-version"])
            assert answer.json["predictions"] == rows_of(version)[IDS].tolist()
            found.append(version)
            answered.append(version)
        return found

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask_on) for _ in range(4)]
        try:
            driver.until(lambda: any(each.done() for each in asking) or len(answered) >= 8)
            driver.send(Listed(servable="rows", versions=(1, 2)))
            driver.until(lambda: driver.homes[-1] == {2: set(NAMES)})
            driver.until(lambda: any(each.done() for each in asking) or 2 in answered)
        finally:
            done.set()
        answers = [each.result() for each in asking]
    for found in answers:
        assert found == sorted(found), "an old version answered after its successor had"
    assert {version for found in answers for version in found} == {1, 2}
    # One copy at a time, and never both versions on one actor. Some epochs change statuses alone.
    copies = [{n: len(homes) for n, homes in each.items()} for each in driver.homes]
    changes = [each for each, _ in itertools.groupby(copies)]
    assert changes[-4:] == [{1: 2}, {1: 1}, {2: 1}, {2: 2}]
    assert all(len(held) <= 1 for name in NAMES for held in driver.held[name])
    stats = cluster.router.stats
    assert (stats.failed, stats.mismatched) == (0, 0)
