"""Servables that save the same trunk, each by itself: their rows meet in it and part for heads."""

from __future__ import annotations

import gc
import json
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shards
from batching import LaneKey
from shards.specs import Spec
from tests.cluster.serving import Cluster
from tests.shards.serving import eventually

WIDTH = 773  # by which the trunk's array is told from all others
TRUNK = np.random.default_rng(0).standard_normal((4, WIDTH)).astype(np.float32)
X = {"x": Spec(("b", 4))}


def trunk_of(params: Any, x: Any) -> Any:
    return {"h": jnp.tanh(x @ params["w"])}


def head_of(params: Any, h: Any) -> Any:
    return {"y": h @ params["w"]}


def head_weights(seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal((WIDTH, 2)).astype(np.float32)


def save(store: Path, name: str, version: int, seed: int) -> None:
    """What each team's script does, knowing nothing of the others'."""
    with shards.Bundle.create(store, name, version) as bundle:
        trunk = bundle.unit("trunk", trunk_of, {"w": TRUNK}, inputs=X, batch_buckets=(1, 4))
        head = bundle.unit(
            "head", head_of, {"w": head_weights(seed)},
            inputs={"h": Spec(("b", WIDTH))}, batch_buckets=(1, 4),
        )  # fmt: skip

        @bundle.signature(name="serving_default", inputs=X)
        def predict(x: Any) -> Any:
            return {"y": head(trunk(x))}


MODELS = (("a", 1, 11), ("a", 2, 12), ("b", 1, 13), ("c", 1, 14))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    tmp_path = tmp_path_factory.mktemp("trunks")
    for model in MODELS:
        save(tmp_path / "store", *model)
    made = Cluster(tmp_path / "store", tmp_path, shards=0)
    try:
        for name, version, _ in MODELS:
            made.load(name, version)
        made.publish()
        yield made
    finally:
        made.close()


def trunks_held() -> int:
    gc.collect()
    arrays = jax.live_arrays()  # type: ignore[no-untyped-call]
    return sum(array.shape == (4, WIDTH) for array in arrays)


def ask(cluster: Cluster, name: str, version: int, seed: int, x: list[list[float]]) -> None:
    answer = cluster.ask(
        f"/v1/models/{name}/versions/{version}:predict", json.dumps({"instances": x})
    )
    expected = np.tanh(np.array(x, np.float32) @ TRUNK) @ head_weights(seed)
    np.testing.assert_allclose(answer.json["predictions"], expected, rtol=1e-3, atol=1e-3)


def test_rows_of_several_servables_and_versions_meet_in_one_trunk(
    cluster: Cluster,
) -> None:
    assert trunks_held() == 1
    hosting = cluster.actors["device-0"].hosting
    opener: Any = hosting._opener
    states = {len(state.users): state for state in hosting.units}
    trunk = states[4]
    assert trunk.users == ("a:1", "a:2", "b:1", "c:1")
    # Three servables of batches of 4, two versions of one of them; heads are everyone's own.
    assert trunk.batch_max == 12
    assert [state.batch_max for state in hosting.units] == [12, 4, 4, 4, 4]
    random = np.random.default_rng(1)
    requests = [
        (*MODELS[number % 4], random.standard_normal((1 + number % 3, 4)).round(3).tolist())
        for number in range(60)
    ]
    with ThreadPoolExecutor(12) as pool:
        for done in [pool.submit(ask, cluster, *request) for request in requests]:
            done.result()
    lane = cluster.io.call(opener._engine._batcher.stats).lanes[LaneKey(trunk.id)]
    rows = {owner: line.tally.rows_run for owner, line in lane.owners.items()}
    assert rows == {
        name: sum(len(request[3]) for request in requests if request[0] == name) for name in "abc"
    }
    assert all(line.tally.busy_s > 0 for line in lane.owners.values())
    assert lane.batches < len(requests), "no two requests met"
    # One that goes leaves the trunk to the others, in batches of those who stay.
    cluster.publish(without={("b", 1)})
    cluster.io.run(hosting.unload(1, "b", 1))
    trunk = hosting.units[0]
    assert (len(trunk.users), trunk.batch_max) == (3, 8)
    for model in (MODELS[1], MODELS[3]):
        ask(cluster, *model, random.standard_normal((5, 4)).tolist())
    assert trunks_held() == 1
    cluster.load("b", 1)
    cluster.publish()


def refer(store: Path, name: str, seed: int, label: str) -> None:
    """What a team does that knows of the encoder."""
    with shards.Bundle.create(store, name, 1) as bundle:
        trunk = bundle.refer("trunk", servable="a", unit="trunk", label=label)
        head = bundle.unit(
            "head", head_of, {"w": head_weights(seed)},
            inputs={"h": Spec(("b", WIDTH))}, batch_buckets=(1, 4),
        )  # fmt: skip

        @bundle.signature(name="serving_default", inputs=X)
        def predict(x: Any) -> Any:
            return {"y": head(trunk(x))}


def test_rows_of_who_refers_to_a_trunk_meet_those_of_who_has_it(cluster: Cluster) -> None:
    held = trunks_held()
    refer(Path(cluster.store.path), "d", 15, "stable")
    cluster.load("d", 1, {"trunk": ("a", 1)})
    cluster.publish()
    x = np.random.default_rng(2).standard_normal((3, 4)).round(3).tolist()
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(ask, cluster, *who, x) for who in (("d", 1, 15), ("a", 1, 11))]:
            done.result()
    users = [state.users for state in cluster.actors["device-0"].hosting.units]
    assert users[0] == ("a:1", "a:2", "b:1", "c:1"), "nothing was loaded for who refers"
    assert users[-1] == ("d:1",)
    assert trunks_held() == held


def test_requests_under_way_of_others_outlive_an_unload_of_the_trunks_first_user(
    cluster: Cluster,
) -> None:
    """The version that opened the trunk goes, then all but one; nobody else has an error."""
    random = np.random.default_rng(3)
    stop = threading.Event()
    asked: Counter[str] = Counter()

    def keep_asking() -> None:
        while not stop.is_set():
            ask(cluster, "c", 1, 14, random.standard_normal((2, 4)).round(3).tolist())
            asked["while unloading" if unloading.is_set() else "before"] += 1

    def answered_since(count: int) -> bool:
        return asked["while unloading"] > count

    unloading = threading.Event()
    leaving = [(name, version) for name, version, _ in MODELS if name != "c"]
    device = cluster.actors["device-0"].hosting
    with ThreadPoolExecutor(4) as pool:
        askers = [pool.submit(keep_asking) for _ in range(4)]
        try:
            eventually(lambda: asked["before"] > 8)
            unloading.set()
            for name, version in leaving:
                before = asked["while unloading"]
                cluster.publish(without={*leaving, ("d", 1)})
                cluster.io.run(device.unload(1, name, version))
                eventually(partial(answered_since, before + 4))
        finally:
            stop.set()
        for asker in askers:
            asker.result()
    assert ("c:1",) in {state.users for state in device.units}
    assert not {f"{name}:{n}" for name, n in leaving} & {u for s in device.units for u in s.users}
    for name, version in leaving:
        cluster.load(name, version)
    cluster.publish()
