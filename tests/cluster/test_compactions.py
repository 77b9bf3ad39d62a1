"""Which versions are compacted in the background, and when what fails is tried again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from cluster.compactions import Compactor, due, run_child
from cluster.config import ConfigInvalid, dump, parse, undump
from cluster.epochs import Epoch, ServableVersion
from cluster.servable_settings import CompactConfig
from cluster.settings import Config
from shards.compacting import CompactOrder
from shards.folding import folded
from shards.store import LocalStore
from tests.shards.test_delta import save, update

DEADLINE_S = 30.0


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """A store whose versions 1, 2 and 3 have no, one and two overlays."""
    store = LocalStore(tmp_path / "store")
    save(store, 1)
    update(store, [1], 5.0)
    update(store, [2, 39], 6.0)
    return store


def declared(store: LocalStore, compact: str = "{overlays: 2}") -> Config:
    return parse(f"store: {store.url}\nservables: [{{name: model, compact: {compact}}}]")


def epoch(store: LocalStore, *versions: int) -> Epoch:
    table = {
        number: ServableVersion(manifest=store.read_manifest("model", number), placement={})
        for number in versions
    }
    return Epoch(term=1, number=1, servables={"model": table} if table else {})


def order(store: LocalStore, version: int = 3, overlays: int = 2) -> CompactOrder:
    return CompactOrder(
        store=store.url, servable="model", version=version, overlays=overlays,
        cache="/cache", cache_bytes=20 << 30,
    )  # fmt: skip


def eventually(is_true: Callable[[], bool]) -> None:
    until = time.monotonic() + DEADLINE_S
    while not is_true():
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("compact", "versions", "wanted"),
    [
        ("{overlays: 2}", (1, 2, 3), (3,)),
        ("{overlays: 1}", (1, 2, 3), (3,)),  # the newest alone: deltas are made of it
        ("{overlays: 1}", (2,), (2,)),
        ("{overlays: 2}", (1, 2), ()),
        ("{overlays: 3}", (3,), ()),
        ("{}", (3,), ()),  # four, unless it is said
        ("null", (3,), ()),
        ("{overlays: 1}", (), ()),  # nothing is available
    ],
)
def test_the_newest_available_version_is_due_once_its_chains_are_long_enough(
    store: LocalStore, compact: str, versions: tuple[int, ...], wanted: tuple[int, ...]
) -> None:
    config = declared(store, compact)
    found = due(config, epoch(store, *versions), "/cache")
    assert [(each.servable, each.version) for each in found] == [("model", each) for each in wanted]


def test_an_order_names_the_cache_of_the_node(store: LocalStore) -> None:
    assert due(declared(store), epoch(store, 3), "/cache") == (order(store),)
    config = parse(
        f"store: {store.url}\nservables: [{{name: model, compact: {{overlays: 2}}}}]\n"
        "cluster: {cache: {path: /elsewhere, size: 1GiB}}"
    )
    (found,) = due(config, epoch(store, 3), "/cache")
    assert (found.cache, found.cache_bytes) == ("/elsewhere", 1 << 30)


@pytest.mark.parametrize("overlays", [0, 9])
def test_a_chain_that_cannot_be_is_refused(store: LocalStore, overlays: int) -> None:
    with pytest.raises(ConfigInvalid, match=r"servables\[0\]\.compact\.overlays: must be at"):
        declared(store, f"{{overlays: {overlays}}}")
    assert declared(store).servables[0].compact == CompactConfig(overlays=2)
    assert undump(dump(declared(store))) == declared(store)


def test_every_version_is_compacted_once_and_one_at_a_time(store: LocalStore) -> None:
    ran: list[int] = []
    now: list[int] = []
    go = threading.Semaphore(0)

    def run(order: CompactOrder, ended: threading.Event) -> bool:
        now.append(order.version)
        assert len(now) == 1
        ran.append(order.version)
        go.acquire()
        now.clear()
        return True

    compactor = Compactor("/cache", run)
    compactor.look(None, epoch(store, 3))
    for number in (3, 2, 3, 3):
        compactor.look(declared(store, "{overlays: 1}"), epoch(store, number))
        eventually(lambda: len(ran) > 0)
    assert ran == [3]  # 2 was due only while 3 was under way
    compactor.look(declared(store, "{overlays: 1}"), epoch(store, 2))
    shown = [(row["version"], row["running_s"] is not None) for row in compactor.status()]
    assert shown == [(3, True), (2, False)]
    go.release()
    eventually(lambda: ran == [3, 2])
    compactor.look(declared(store, "{overlays: 2}"), epoch(store, 3))
    go.release(2)
    eventually(lambda: ran == [3, 2, 3])  # another order: it was declared anew
    compactor.close()


def test_what_fails_is_tried_again_after_pauses_that_double(store: LocalStore) -> None:
    clock = [0.0]
    ran: list[float] = []

    def run(order: CompactOrder, ended: threading.Event) -> bool:
        ran.append(clock[0])
        return len(ran) == 4

    compactor = Compactor("/cache", run, lambda: clock[0])
    for at, expected, again_at in (
        (0.0, [0.0], 30.0),
        (29.0, [0.0], 30.0),
        (30.0, [0.0, 30.0], 90.0),
        (89.0, [0.0, 30.0], 90.0),
        (90.0, [0.0, 30.0, 90.0], 210.0),
        (210.0, [0.0, 30.0, 90.0, 210.0], None),
    ):
        clock[0] = at
        compactor.look(declared(store), epoch(store, 3))
        eventually(lambda: ran == expected)  # noqa: B023 - called at once
        eventually(lambda: compactor.retries.get(order(store)) == again_at)  # noqa: B023
        again_s = [None if again_at is None else again_at - at] if again_at else []
        assert [row["again_s"] for row in compactor.status()] == again_s
    compactor.close()


def test_a_process_of_its_own_folds_and_leaves_what_is_served_alone(
    store: LocalStore, tmp_path: Path
) -> None:
    before = store.read_manifest("model", 3)
    asked = msgspec.structs.replace(order(store), cache=str(tmp_path / "cache"))
    assert run_child(asked, threading.Event())
    assert len(folded(store.shelf)) == 1
    assert store.read_manifest("model", 3) == before
    update(store, [0], 7.0)
    assert len(store.read_manifest("model", 4).units["users"].partitions[0].overlays) == 1  # type: ignore[union-attr]


def test_a_process_that_fails_or_is_ended_says_so(store: LocalStore, tmp_path: Path) -> None:
    asked = msgspec.structs.replace(order(store, version=9), cache=str(tmp_path / "cache"))
    assert not run_child(asked, threading.Event())
    ended = threading.Event()
    ended.set()
    asked = msgspec.structs.replace(order(store), cache=str(tmp_path / "cache"))
    assert not run_child(asked, ended)
    assert not folded(store.shelf)
