"""Tables of every scheme and key over shards, served, against the same rows in one place."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shards
from shards.interchange import table_to_arrow
from shards.keys import hashed_rows
from shards.manifest import Pool
from shards.specs import Spec
from tests.cluster.serving import Cluster

Floats = Any
NUMBERS = itertools.count(1)
HOWS: tuple[Pool, ...] = ("sum", "mean", "max")


class Served(NamedTuple):
    cluster: Cluster
    store: Path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("s")
    cluster = Cluster(directory / "store", directory, shards=8)
    cluster.hot_rows_bytes = 1 << 14  # of rows, not of bags
    yield Served(cluster, directory / "store")
    cluster.close()


def add(served: Served, rows: Any, ids: str = "int64", **form: Any) -> int:
    """Save, load and publish a version that looks a table up in every way."""
    version = next(NUMBERS)
    inputs = {"ids": Spec(("b", "t"), ids), "weights": Spec(("b", "t"))}
    with shards.Bundle.create(str(served.store), "m", version) as bundle:
        table = bundle.table("users", rows, **form)

        @bundle.signature("serving_default", inputs=inputs)
        def answer(ids: Any, weights: Any) -> Any:
            pooled = {how: table.pool(ids, how) for how in HOWS}
            return {**pooled, "weighted": table.pool(ids, "sum", weights)}

        @bundle.signature("rows", inputs={"ids": inputs["ids"]})
        def rows_of(ids: Any) -> Any:
            return {"rows": table.rows(ids)}

    publish(served, version)
    return version


def publish(served: Served, version: int) -> None:
    served.cluster.load("m", version)
    served.cluster.publish()


def ask(served: Served, version: int, signature: str, **inputs: Any) -> dict[str, Any]:
    columns = {name: np.asarray(each).tolist() for name, each in inputs.items()}
    body = json.dumps({"signature_name": signature, "inputs": columns})
    path = f"/v1/models/m/versions/{version}:predict"
    answer = served.cluster.ask(path, body)
    assert answer.status == 200, answer.body
    if signature == "rows":  # many of which the router has kept by now
        assert served.cluster.ask(path, body).body == answer.body
    found = answer.json["outputs"]
    found = found if isinstance(found, dict) else {"rows": found}
    return {name: np.array(each, np.float32) for name, each in found.items()}


def check(served: Served, version: int, table: Any, ids: Any, numbers: Any, filled: Any) -> None:
    """Hold every look-up against the table in one place.

    Args:
        served: who answers.
        version: of the model.
        table: all rows.
        ids: ``[b, t]``, as they are asked for.
        numbers: their rows; -1 for what is none, and what is outside the table is missing.
        filled: the row of what is missing.
    """
    weights = np.random.default_rng(version).integers(-2, 3, numbers.shape).astype(np.float32)
    known = (numbers >= 0) & (numbers < len(table))
    found = np.where(known[..., None], table[np.where(known, numbers, 0)], filled)
    found = found.astype(np.float32)
    is_id = (numbers != -1)[..., None]
    counts = np.maximum(is_id.sum(1), 1).astype(np.float32)
    added = (found * is_id).sum(1)
    greatest = np.where(is_id, found, -np.inf).max(1)
    told = ask(served, version, "serving_default", ids=ids, weights=weights)
    assert told["sum"].tobytes() == added.tobytes()
    assert told["mean"].tobytes() == (added / counts).tobytes()
    assert np.array_equal(told["max"], np.where(is_id.any(1), greatest, 0))
    assert np.array_equal(told["weighted"], (found * is_id * weights[..., None]).sum(1))


@settings(max_examples=20)
@given(
    scheme=st.sampled_from(["range", "hash", "columns"]),
    partitions=st.sampled_from([1, 2, 4, 8, 11]),
    dtype=st.sampled_from([None, None, "float16", "bfloat16", "int8"]),
    missing=st.sampled_from(["error", "zero", "default"]),
    is_changed=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_a_table_cut_in_any_way_answers_bit_for_bit_as_in_one_place(
    served: Served, scheme: str, partitions: int, dtype: Any, missing: Any, is_changed: bool,
    seed: int,
) -> None:  # fmt: skip
    draw = np.random.default_rng(seed)
    rows, dim = int(draw.integers(1, 50)), int(draw.integers(11, 15))
    # Of these an int8 row has a scale of 1, in each of its pieces: nothing is rounded.
    values = 127 * draw.integers(-1, 2, (rows, dim)).astype(np.float32)
    default = draw.integers(-9, 9, dim).astype(np.float32) if missing == "default" else None
    version = add(
        served, values, partitions=partitions, partition=scheme, dtype=dtype, missing=missing,
        default=default,
    )  # fmt: skip
    if is_changed:
        which = draw.permutation(rows)[: rows // 2 + 1]
        values[which] = 127 * draw.integers(-1, 2, (len(which), dim))
        changed = values[which].astype({"bfloat16": bfloat16()}.get(dtype, dtype or "f4"))
        with shards.Bundle.delta(str(served.store), "m", version, next(NUMBERS)) as bundle:
            given_rows = values[which] if dtype == "int8" else changed
            bundle.update_rows("users", which, given_rows)
        version = bundle.version
        publish(served, version)
    shape = (int(draw.integers(1, 6)), int(draw.integers(1, 6)))
    ids = (
        draw.integers(-1, rows, shape) if missing == "error" else draw.integers(-3, rows + 3, shape)
    )
    check(served, version, values, ids, ids, 0 if default is None else default)
    known = np.maximum(ids, 0) % rows
    assert np.array_equal(ask(served, version, "rows", ids=known)["rows"], values[known])


def bfloat16() -> Any:
    import ml_dtypes

    return ml_dtypes.bfloat16


VALUES = np.random.default_rng(5).integers(-9, 9, (40, 6)).astype(np.float32)


@pytest.mark.parametrize("scheme", ["range", "hash", "columns"])
def test_integers_of_any_size_are_keys_of_some_row(served: Served, scheme: str) -> None:
    version = add(served, VALUES, keys="hashed", partition=scheme, partitions=3)
    keys = np.array([[-1, 7, 2**62], [-(2**63), 5, -1]])
    numbers = np.where(keys == -1, -1, hashed_rows(keys, 40))
    check(served, version, VALUES, keys, numbers, 0)
    rows = ask(served, version, "rows", ids=keys)["rows"]
    assert np.array_equal(rows, VALUES[hashed_rows(keys, 40)])  # outside bags -1 is a key, too


def test_a_key_beyond_int64_is_a_key(served: Served) -> None:
    version = add(served, VALUES, "uint64", keys="hashed", partition="hash", partitions=4)
    keys = np.array([[2**64 - 2, 3]], np.uint64)
    assert np.array_equal(
        ask(served, version, "rows", ids=keys)["rows"], VALUES[hashed_rows(keys, 40)]
    )


@pytest.mark.parametrize("scheme", ["range", "hash", "columns"])
def test_text_is_a_key_and_none_in_a_bag_where_it_is_empty(served: Served, scheme: str) -> None:
    version = add(served, VALUES, "string", keys="string", partition=scheme, partitions=5)
    keys = np.array([["alice", "", "zoë"], ["", "", ""], ["bob", "alice", "bob"]], object)
    numbers = np.where(keys == "", -1, hashed_rows(keys, 40))
    check(served, version, VALUES, keys, numbers, 0)
    rows = ask(served, version, "rows", ids=keys)["rows"]
    assert np.array_equal(rows, VALUES[hashed_rows(keys, 40)])


def test_sparse_rows_are_spread_by_hash_like_any_others(served: Served) -> None:
    ids = np.array([3, 39, 11])
    rows = shards.SparseRows(rows=40, dim=6, given=[(ids, VALUES[ids])])
    version = add(served, rows, partition="hash", partitions=4)
    whole = np.zeros_like(VALUES)
    whole[ids] = VALUES[ids]
    asked = np.arange(40).reshape(8, 5)
    assert np.array_equal(ask(served, version, "rows", ids=asked)["rows"], whole[asked])


@pytest.mark.parametrize("scheme", ["hash", "columns"])
def test_a_default_row_is_in_the_place_of_every_missing_one_and_counted_once_an_id(
    served: Served, scheme: str
) -> None:
    default = np.arange(6) + 0.5
    version = add(
        served, VALUES, partition=scheme, partitions=3, missing="default", default=default
    )
    counted = served.cluster.router.stats.missing_by.get(("m", "users"), 0)
    told = ask(served, version, "rows", ids=[[3, 40], [-1, 99]])["rows"]
    assert np.array_equal(told[0, 0], VALUES[3])
    assert (told[[0, 1, 1], [1, 0, 1]] == default.astype(np.float32)).all()
    assert served.cluster.router.stats.missing_by["m", "users"] == counted + 2 * 3  # asked twice


def test_bags_of_different_length_are_answered_as_if_they_had_been_filled(served: Served) -> None:
    version = add(served, VALUES, partition="hash", partitions=3)
    ids, weights = [[3, 1, 2], [], [39]], [[1, 2, 3], [], [4]]
    body = json.dumps({"inputs": {"ids": ids, "weights": weights}})
    answer = served.cluster.ask(f"/v1/models/m/versions/{version}:predict", body)
    assert answer.status == 200, answer.body
    even = {"ids": [[3, 1, 2], [-1] * 3, [39, -1, -1]], "weights": [[1, 2, 3], [0] * 3, [4, 0, 0]]}
    told = ask(served, version, "serving_default", **even)
    for name, rows in answer.json["outputs"].items():
        assert np.array_equal(np.array(rows, np.float32), told[name])


@pytest.mark.parametrize("scheme", ["range", "hash", "columns"])
def test_a_table_is_exported_in_the_order_of_its_rows(served: Served, scheme: str) -> None:
    version = add(served, VALUES, partition=scheme, partitions=3)
    manifest = shards.read(str(served.store), "m", version)
    store = shards.open_store(str(served.store))
    column = table_to_arrow(manifest, store, "users")["rows"]
    assert np.array_equal(np.array(column.to_pylist(), np.float32), VALUES)
