"""Bytes of tensors between a router and its shards, held against what each way of cutting costs.

B bags of L ids in each of T tables of rows of d elements of e bytes, over S shards; k bytes an id
and 4 for the length of a bag. These are the formulas by which a placement is chosen.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

import shards
from cluster.repeats import distinct
from shards.specs import Spec
from tests.cluster.serving import Cluster

S, T, B, L, D = 4, 3, 64, 10, 8
ROWS = 4096
WIDE = 128
TABLES = [f"t{number}" for number in range(T)]


class Sink:
    """Who asks."""

    def __init__(self) -> None:
        self.answer: Future[Mapping[str, Any]] = Future()

    def done(self, outputs: Mapping[str, Any], frame: Any) -> None:
        self.answer.set_result(outputs)

    def failed(self, error: Exception) -> None:
        self.answer.set_exception(error)


def rows_of(number: int) -> Any:
    return np.random.default_rng(number).integers(-9, 9, (ROWS, D)).astype(np.float32)


def wide_rows() -> Any:
    return np.random.default_rng(9).integers(-9, 9, (ROWS, WIDE)).astype(np.float32)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three tables whole, each at one shard, and the same in four pieces over four."""
    folder = tmp_path_factory.mktemp("b")
    ids = {name: Spec(("b", "t"), "int32") for name in TABLES}
    found = Cluster(folder / "store", folder, shards=S)
    try:
        for way, partitions in (("tables", 1), ("rows", S)):
            with shards.Bundle.create(str(folder / "store"), way, version=1) as bundle:
                made = {
                    name: bundle.table(name, rows_of(number), partitions=partitions)
                    for number, name in enumerate(TABLES)
                }

                @bundle.signature("pooled", inputs=ids)
                def pooled(t0: Any, t1: Any, t2: Any, made: Any = made) -> Any:
                    bags = dict(zip(TABLES, (t0, t1, t2), strict=True))
                    return {name: made[name].pool(bags[name], "sum") for name in TABLES}

                @bundle.signature("raw", inputs=ids)
                def raw(t0: Any, t1: Any, t2: Any, made: Any = made) -> Any:
                    bags = dict(zip(TABLES, (t0, t1, t2), strict=True))
                    return {name: made[name].rows(bags[name]) for name in TABLES}

            found.load(way, 1)
        with shards.Bundle.create(str(folder / "store"), "wide", version=1) as bundle:
            wide = bundle.table("wide", wide_rows(), partitions=S)

            @bundle.signature("raw", inputs={"ids": Spec(("b", "t"), "int32")})
            def wide_raw(ids: Any) -> Any:
                return {"rows": wide.rows(ids)}

        found.load("wide", 1)
        found.publish()
        yield found
    finally:
        found.close()


def moved(cluster: Cluster, way: str, signature: str) -> tuple[int, int, dict[str, Any]]:
    """Bytes up and down for one request, and its ids; the answer is right."""
    draw = np.random.default_rng(7)
    ids = {name: draw.integers(0, ROWS, (B, L)).astype(np.int32) for name in TABLES}
    up, down, answer = asked(cluster, way, signature, ids)
    for number, name in enumerate(TABLES):
        expected = rows_of(number)[ids[name]]
        assert np.array_equal(answer[name], expected if signature == "raw" else expected.sum(1))
    return up, down, ids


def asked(
    cluster: Cluster, way: str, signature: str, inputs: Mapping[str, Any]
) -> tuple[int, int, Mapping[str, Any]]:
    """Bytes up and down for one request, and its answer."""
    router = cluster.router
    sink = Sink()

    def ask() -> tuple[int, int]:
        before = totals(cluster)
        plan = router.routes.find(way).plans[signature]
        router.submit(plan, inputs, B, time.monotonic() + 20, sink)
        return before

    sent, received = cluster.io.call(ask)
    answer = sink.answer.result(20)
    now = cluster.io.call(lambda: totals(cluster))
    return now[0] - sent, now[1] - received, answer


def totals(cluster: Cluster) -> tuple[int, int]:
    peers = list(cluster.router.peers)
    return sum(peer.sent_bytes for peer in peers), sum(peer.received_bytes for peer in peers)


def test_whole_tables_pooled_at_their_shard_send_ids_up_and_one_row_a_bag_down(
    cluster: Cluster,
) -> None:
    up, down, _ = moved(cluster, "tables", "pooled")
    assert up == 4 * B * T * L + 4 * B * T  # k N + o
    assert down == B * T * D * 4  # B T d e


def test_tables_cut_by_rows_send_a_partial_row_for_every_shard_that_a_bag_touches(
    cluster: Cluster,
) -> None:
    up, down, ids = moved(cluster, "rows", "pooled")
    touched = sum(len(set((bag // (ROWS // S)).tolist())) for bags in ids.values() for bag in bags)
    assert down == touched * D * 4
    assert up == 4 * B * T * L + 4 * touched
    expected = B * T * S * (1 - (1 - 1 / S) ** L)  # B T E, of ids that fall anywhere alike
    assert touched == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("way", ["tables", "rows"])
def test_rows_as_they_are_cost_the_same_however_tables_are_cut(cluster: Cluster, way: str) -> None:
    up, down, _ = moved(cluster, way, "raw")
    assert up == 8 * B * T * L  # k N: so few bytes are not worth a look for what comes twice
    assert down == B * T * L * D * 4  # N d e


def test_wide_rows_that_are_wanted_several_times_come_once(cluster: Cluster) -> None:
    few = np.random.default_rng(3).choice(ROWS, 150, replace=False).astype(np.int32)
    ids = np.random.default_rng(4).choice(few, (B, L))
    up, down, answer = asked(cluster, "wide", "raw", {"ids": ids})
    assert np.array_equal(answer["rows"], wide_rows()[ids])
    found = distinct(ids.reshape(-1).astype(np.int64), B * L)
    assert found is not None
    once = len(found.first)
    assert (up, down) == (8 * once, once * WIDE * 4)  # k U and U d e
    assert once <= 1.1 * len(np.unique(ids)) <= B * L / 3
