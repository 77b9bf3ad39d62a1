"""Rows that a router keeps: always the right ones, never more than declared, and who stays."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shards
from cluster.hot_rows import HotRows
from cluster.tables import Gather, Thrift
from shards.manifest import BlobRef, Partition, TableUnit
from shards.specs import Spec
from tests.cluster.serving import Cluster
from tests.cluster.test_tables import fetch, node_of


def table(name: str, digests: str, rows: int = 100, dim: int = 2, dtype: str = "float32") -> Any:
    parts = tuple(
        Partition(first_row=rows * at, rows=rows, blob=BlobRef(digest=64 * digest, size=0))
        for at, digest in enumerate(digests)
    )
    return TableUnit(id=name, dtype=dtype, dim=dim, rows=rows * len(parts), partitions=parts)


def contents(unit: TableUnit) -> Any:
    """Rows that say which partition they are of, by content, and where they lie in it."""
    rows = np.empty((unit.rows, unit.dim), np.float32)
    for part in unit.partitions:
        at = np.arange(part.rows)
        rows[part.first_row + at, 0] = ord(part.blob.digest[0])
        rows[part.first_row + at, 1:] = at[:, None]
    return rows


def ask(hot: HotRows, unit: TableUnit, places: Any) -> tuple[int, bool]:
    """One look-up as a router makes it; how many rows were kept, and whether those were right."""
    first_rows = np.array([part.first_row for part in unit.partitions], np.int64)
    key = hot.key_of(unit, first_rows, places)
    found = hot.find(unit, key)
    at, kept = (np.empty(0, np.intp), np.empty((0, unit.dim))) if found is None else found
    is_right = np.array_equal(kept, contents(unit)[places[at]])
    rest = np.delete(np.arange(len(places)), at)
    hot.keep(unit, key.at(rest), contents(unit)[places[rest]])
    return len(at), is_right


@settings(max_examples=40)
@given(data=st.data(), bytes_max=st.sampled_from([0, 100, 1_000, 5_000, 100_000]))
def test_rows_are_always_those_of_their_tables_and_no_more_than_declared(
    data: st.DataObject, bytes_max: int
) -> None:
    # Versions that share some partitions, and tables of other widths.
    units = [table("1", "ab"), table("2", "ac"), table("3", "ba"), table("4", "aa", dim=3)]
    hot = HotRows(bytes_max)
    for _ in range(data.draw(st.integers(1, 8))):
        unit = data.draw(st.sampled_from(units))
        seed = data.draw(st.integers(0, 99))
        places = np.random.default_rng(seed).integers(0, unit.rows, 40)
        _, is_right = ask(hot, unit, places)
        assert is_right
        assert hot.nbytes <= bytes_max


def test_a_version_with_other_rows_finds_those_of_the_partitions_that_it_shares() -> None:
    hot = HotRows(1 << 20)
    places = np.arange(0, 200, 7)
    for _ in range(4):  # rows of one set come one after the other
        ask(hot, table("1", "ab"), places)
    assert ask(hot, table("1", "ab"), places) == (len(places), True)
    assert ask(hot, table("2", "ac"), places) == (int((places < 100).sum()), True)


def test_rows_that_are_asked_for_again_stay_while_others_pass() -> None:
    unit = table("1", "a", rows=100_000)
    hot = HotRows(20_000)
    often = np.arange(100)
    for _ in range(4):
        ask(hot, unit, often)
    found = 0
    for turn in range(1, 50):
        found += ask(hot, unit, often)[0]
        ask(hot, unit, np.arange(1_000 * turn, 1_000 * turn + 100))
    assert found > 0.9 * 49 * len(often)


def test_rows_of_more_widths_than_a_few_are_not_kept() -> None:
    hot = HotRows(1 << 20)
    for dim in range(2, 14):
        unit = table(str(dim), "a", dim=dim)
        ask(hot, unit, np.array([5]))
        assert ask(hot, unit, np.array([5])) == (1 if dim < 10 else 0, True)


def test_a_look_up_asks_for_the_rest_alone() -> None:
    node, thrift = node_of([50, 50], "zero"), Thrift()
    hot = thrift.hot = HotRows(1 << 20)
    assert node.table is not None
    rows = np.arange(200, dtype=np.float32).reshape(100, 2)
    first = Gather(node, np.array([3, 70, 200]))
    first.save(thrift)
    assert (hot.found, hot.missed) == (0, 2)
    fetch(first, ["a", "b"], rows, random.Random(0))
    again = Gather(node, np.array([[70, -1], [4, 3]]))
    again.save(thrift)
    assert (hot.found, hot.missed) == (2, 3)
    parts = again.split(["a", "b"])
    assert {name: again.ids_at(at).tolist() for name, at in parts.items()} == {"a": [4]}
    again.put(parts["a"], rows[[4]])
    assert again.is_complete
    assert again.rows().tolist() == [
        [rows[70].tolist(), [0, 0]],
        [rows[4].tolist(), rows[3].tolist()],
    ]
    whole = Gather(node, np.array([3, 4]))
    whole.save(thrift)
    assert (hot.found, hot.missed) == (4, 3)
    assert whole.is_complete
    assert whole.split(["a", "b"]) == {}
    assert whole.rows().tolist() == rows[[3, 4]].tolist()


ROWS = np.random.default_rng(1).integers(-9, 9, (60, 4)).astype(np.float32)


@pytest.mark.parametrize("scheme", ["range", "hash", "columns"])
def test_a_router_keeps_rows_over_versions_and_answers_with_those_of_each(
    tmp_path: Path, scheme: Any
) -> None:
    store = tmp_path / "store"
    with shards.Bundle.create(str(store), "m", 1) as bundle:
        users = bundle.table("users", ROWS, partition=scheme, partitions=3)

        @bundle.signature("serving_default", inputs={"ids": Spec(("b",), "int32")})
        def answer(ids: Any) -> Any:
            return {"rows": users.rows(ids)}

    with shards.Bundle.delta(str(store), "m", 1, 2) as delta:
        delta.update_rows("users", [7], np.full((1, 4), 99, np.float32))
    cluster = Cluster(store, tmp_path, shards=2)
    try:
        cluster.load("m", 1)
        cluster.load("m", 2)
        cluster.hot_rows_bytes = 1 << 16
        cluster.publish()
        changed = ROWS.copy()
        changed[7] = 99
        ids = [7, 8, 7, 59]
        for version, rows in ((1, ROWS), (2, changed), (1, ROWS), (2, changed)):
            body = json.dumps({"instances": ids})
            told = cluster.ask(f"/v1/models/m/versions/{version}:predict", body)
            assert told.json["predictions"] == rows[ids].tolist()
        sent = sum(peer.sent_bytes for peer in cluster.router.peers)
        told = cluster.ask("/v1/models/m/versions/2:predict", json.dumps({"instances": ids}))
        assert told.json["predictions"] == changed[ids].tolist()
        assert sum(peer.sent_bytes for peer in cluster.router.peers) == sent  # nobody was asked
        hot = cluster.router.hot_rows
        assert hot is not None
        assert hot.found >= 3 * len(ids)
        text = cluster.metrics.render(cluster.router).decode()
        assert f"serving_router_hot_rows_total {float(hot.found)}" in text
        assert f"serving_router_hot_rows_bytes {float(hot.nbytes)}" in text
        cluster.hot_rows_bytes = 0
        cluster.publish()
        assert cluster.router.hot_rows is None
        assert "hot_rows" not in cluster.metrics.render(cluster.router).decode()
    finally:
        cluster.close()
