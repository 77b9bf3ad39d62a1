"""Text in, numbers out, over host, shards and device with real sockets between: under load,
under changes of version and under links that break.
"""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shards
from shards.specs import Spec
from tests.cluster.serving import Answer, Cluster

WIDTH, DIM, ROWS = 6, 4, 128
PATH = "/v1/models/reader:predict"
#: What a version multiplies by: every number of an answer shows which version made it.
FACTORS = {1: 1.0, 2: -3.0}


def table_of(version: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    numbers = np.arange(ROWS * DIM, dtype=np.float32).reshape(ROWS, DIM) % 97
    return numbers * np.float32(FACTORS[version])


def save(store: Path, version: int) -> None:
    with shards.Bundle.create(store, "reader", version) as bundle:
        ids = {"ids": Spec(("b", WIDTH), "int64")}
        texts = {"text": Spec(("b",), "string")}
        reader = bundle.host(
            "reader", "tests.cluster.serving_units:load", inputs=texts, outputs=ids,
            options={"width": WIDTH},
        )  # fmt: skip
        table = bundle.table("table", table_of(version), partitions=5, missing="zero")
        trunk = bundle.unit(
            "trunk",
            lambda p, rows: {"y": (rows.sum((1, 2)) * p["factor"])},
            {"factor": np.float32(FACTORS[version])},
            inputs={"rows": Spec(("b", WIDTH, DIM))},
            batch_buckets=(1, 4, 16),
            platforms=("cpu",),
        )

        @bundle.signature(inputs=texts)
        def serving_default(text: Any) -> Any:
            return trunk(rows=table.rows(reader(text=text)))


def expected(texts: list[str], version: int) -> list[float]:
    """Sums of whole numbers: exact, in whatever order they are added."""
    table = table_of(version)
    found = []
    for text in texts:
        rows = table[[byte for byte in text.encode()[:WIDTH]]]
        found.append(float(rows.sum()) * FACTORS[version])
    return found


@pytest.fixture(params=["rows straight to the device", "rows through the router"])
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    for version in FACTORS:
        save(tmp_path / "store", version)
    cluster = Cluster(tmp_path / "store", tmp_path, shards=3)
    straight = request.param == "rows straight to the device"
    cluster.continuation_bytes_min = 0 if straight else None
    try:
        cluster.load("reader", 1)
        cluster.publish()
        yield cluster
        assert bool(cluster.router.stats.joined) == straight
    finally:
        cluster.close()


def ask(cluster: Cluster, seed: int) -> tuple[list[str], Answer]:
    chosen = random.Random(seed)
    texts = [
        "".join(chosen.choices("abcxyz 0189", k=chosen.randint(0, 9)))
        for _ in range(chosen.randint(1, 20))
    ]
    body = json.dumps({"instances": texts})
    return texts, cluster.ask(PATH, body, {"x-request-timeout-ms": "15000"})


def test_many_clients_get_each_their_own_exact_answer(cluster: Cluster) -> None:
    with ThreadPoolExecutor(8) as pool:
        for texts, answer in pool.map(lambda seed: ask(cluster, seed), range(120)):
            assert answer.status == 200, answer.body
            assert answer.json["predictions"] == expected(texts, 1)
    stats = cluster.router.stats
    assert (stats.answered, stats.failed, stats.retried) == (120, 0, 0)
    assert (stats.unjoined, stats.mismatched) == (0, 0)
    assert stats.missing_rows > 0


def test_under_changes_of_version_every_answer_is_of_one_version_and_says_which(
    cluster: Cluster,
) -> None:
    cluster.load("reader", 2)
    done = threading.Event()

    def change() -> None:
        """Publish one epoch after the other: version 2 comes and goes."""
        while not done.is_set():
            cluster.publish()
            if done.wait(0.003):
                break
            cluster.publish(without={("reader", 2)})
            done.wait(0.003)

    changing = threading.Thread(target=change)
    changing.start()
    versions: list[int] = []
    try:
        with ThreadPoolExecutor(6) as pool:
            for texts, answer in pool.map(lambda seed: ask(cluster, seed), range(150)):
                assert answer.status == 200, answer.body
                version = int(answer.headers["x-servable-version"])
                assert answer.json["predictions"] == expected(texts, version)
                versions.append(version)
    finally:
        done.set()
        changing.join()
    assert set(versions) == {1, 2}
    assert cluster.io.call(cluster.router.oldest_live_epoch) == cluster.router.routes.number


def test_links_that_break_cost_retries_or_typed_errors_and_come_back(cluster: Cluster) -> None:
    done = threading.Event()

    def cut_all(name: str) -> None:
        for link in cluster.actors[name].listener.links:
            link.close()

    def cut() -> None:
        for name in itertools.cycle(sorted(cluster.actors)):
            if done.wait(0.005):
                return
            cluster.io.call(cut_all, name)

    cutting = threading.Thread(target=cut)
    cutting.start()
    statuses: set[int] = set()
    try:
        with ThreadPoolExecutor(6) as pool:
            for round_ in range(40):
                seeds = range(60 * round_, 60 * (round_ + 1))
                for texts, answer in pool.map(lambda seed: ask(cluster, seed), seeds):
                    assert answer.status in (200, 503), answer.body
                    if answer.status == 200:
                        assert answer.json["predictions"] == expected(texts, 1)
                    statuses.add(answer.status)
                if statuses == {200, 503}:
                    break
    finally:
        done.set()
        cutting.join()
    assert statuses == {200, 503}, "no link broke under a request, or none came back"
    deadline = time.monotonic() + 10.0
    while ask(cluster, 1)[1].status != 200:
        assert time.monotonic() < deadline, "it does not come back"
    assert cluster.router.in_flight == 0


def test_a_version_with_a_few_other_rows_is_served_beside_its_base(tmp_path: Path) -> None:
    store, path = tmp_path / "store", "/v1/models/rows"
    rows = np.arange(40, dtype=np.float32).reshape(20, 2)
    with shards.Bundle.create(store, "rows", 1) as bundle:
        table = bundle.table("table", rows, partitions=3)
        bundle.signature(inputs={"ids": Spec(("b",), "int64")})(lambda ids: {"y": table.rows(ids)})
    with shards.Bundle.delta(store, "rows") as bundle:
        bundle.update_rows("table", [0, 7, 19], np.full((3, 2), -1, np.float32))
    changed = rows.copy()
    changed[[0, 7, 19]] = -1
    cluster = Cluster(store, tmp_path, shards=2)
    try:
        for version in (1, 2):
            cluster.load("rows", version)
        cluster.publish()
        body = json.dumps({"instances": list(range(20))})
        for version, expected in ((1, rows), (2, changed)):
            answer = cluster.ask(f"{path}/versions/{version}:predict", body)
            assert answer.json["predictions"] == expected.tolist(), answer.body
    finally:
        cluster.close()
