"""Bags of ids: traced and checked, and answered by a shard, several requests in one call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import pytest

import shards
from batching.errors import InvalidArgument
from shards.checking import check_manifest, decode_manifest, encode_manifest
from shards.errors import BundleCorrupt, SpecMismatch
from shards.inspection import describe
from shards.manifest import Manifest, Node, TableUnit
from shards.openers import TableOpener
from shards.orders import HostedUnit
from shards.specs import Spec
from shards.tracing import TableCall, Value, trace
from tests.shards.opening import Actor, run
from tests.shards.serving import Array, call, until

ROWS = np.arange(24, dtype=np.float32).reshape(12, 2)
IDS, WEIGHTS = Spec(("b", "t"), "int32"), Spec(("b", "t"))
INPUTS = {"ids": IDS, "weights": WEIGHTS}
HOSTED = HostedUnit(name="words", partitions=(0, 1))

words = TableCall("words", 2, "float32")
numbers = TableCall("numbers", 2, "int32")


# --- traced and checked ------------------------------------------------------------------------


def test_a_bag_becomes_one_row_of_floats_and_the_same_bag_is_pooled_once() -> None:
    seen: list[Value] = []

    def fn(ids: Value, weights: Value) -> Any:
        halves = TableCall("halves", 3, "float16")
        seen.extend([words.pool(ids, "mean"), words.pool(ids, "mean"), words.pool(ids, "max")])
        seen.append(halves.pool(ids, weights=weights))
        return {"a": seen[0], "b": seen[2], "c": seen[3]}

    signature = trace(fn, INPUTS)
    assert [value.spec for value in seen] == [Spec(("b", 2))] * 3 + [Spec(("b", 3))]
    ids = {"ids": "in:ids"}
    assert signature.nodes == (
        Node(unit="words", inputs=ids, pool="mean"),
        Node(unit="words", inputs=ids, pool="max"),
        Node(unit="halves", inputs={**ids, "weights": "in:weights"}, pool="sum"),
    )


UNFIT: list[tuple[Callable[[Value, Value], Any], type[Exception], str]] = [
    (lambda i, w: words.pool(w), SpecMismatch, "needs integers"),
    (lambda i, w: words.pool(cast(Any, 3)), InvalidArgument, "no value"),
    (lambda i, w: words.pool(i, cast(Any, "median")), InvalidArgument, "sum, mean, max"),
    (lambda i, w: words.pool(i, "mean", w), InvalidArgument, "weights are for sums"),
    (lambda i, w: words.pool(i, weights=i), SpecMismatch, "weights must be float32"),
    (lambda i, w: words.pool(i, weights=cast(Any, 1.0)), SpecMismatch, "weights must be float32"),
    (lambda i, w: numbers.pool(i), SpecMismatch, "rows of int32 cannot be pooled"),
]


@pytest.mark.parametrize("case", range(len(UNFIT)))
def test_what_cannot_be_pooled_is_refused_when_it_is_saved(case: int) -> None:
    fn, error, says = UNFIT[case]
    with pytest.raises(error, match=says):
        trace(lambda ids, weights: fn(ids, weights), INPUTS)


def test_ids_without_a_dimension_for_the_bag_are_refused() -> None:
    with pytest.raises(SpecMismatch, match="besides the batch"):
        trace(lambda ids: words.pool(ids), {"ids": Spec(("b",), "int32")})


def save(store: Path) -> Manifest:
    with shards.Bundle.create(store, "model", 1) as bundle:
        table = bundle.table("words", ROWS, partitions=2)

        @bundle.signature(inputs=INPUTS)
        def answer(ids: Value, weights: Value) -> Any:
            return {"y": table.pool(ids, "sum", weights), "z": table.rows(ids)}

    return bundle.manifest


def test_a_manifest_that_pools_is_read_back_and_shown(tmp_path: Path) -> None:
    manifest = save(tmp_path)
    assert decode_manifest(encode_manifest(manifest), "model/1") == manifest
    calls = describe(manifest)["signatures"]["serving_default"]["calls"]
    assert calls == ["0 = words.sum(ids=in:ids, weights=in:weights)", "1 = words(ids=in:ids)"]


@pytest.mark.parametrize(
    ("node", "dtype", "says"),
    [
        (Node(unit="words", inputs={"ids": "in:ids"}, pool="sum"), "int32", "pools rows of int32"),
        (
            Node(unit="words", inputs={"ids": "in:ids", "weights": "in:weights"}, pool="max"),
            "float32",
            "it takes \\['ids'\\]",
        ),
        (
            Node(unit="words", inputs={"ids": "in:ids", "weights": "in:weights"}),
            "float32",
            "it takes \\['ids'\\]",
        ),
    ],
)
def test_a_manifest_that_pools_what_it_cannot_is_corrupt(
    tmp_path: Path, node: Node, dtype: str, says: str
) -> None:
    replace = msgspec.structs.replace
    manifest = save(tmp_path)
    signature = replace(
        manifest.signatures["serving_default"],
        nodes=(node,),
        returns={"y": "0:rows", "z": "0:rows"},
    )
    table = manifest.units["words"]
    assert isinstance(table, TableUnit)
    spoilt = replace(
        manifest,
        signatures={"serving_default": signature},
        units={"words": replace(table, dtype=dtype)},
    )
    with pytest.raises(BundleCorrupt, match=says):
        check_manifest(spoilt, "model/1")


# --- answered by a shard -----------------------------------------------------------------------


def bags(*lists: list[int]) -> tuple[Array, Array]:
    flat = [ident for each in lists for ident in each]
    return np.array([len(each) for each in lists], np.int32), np.array(flat, np.int32)


def answers(
    tmp_path: Path, op: str, rows: dict[int, int], *arrays: Array
) -> tuple[dict[int, Any], dict[int, str]]:
    """What requests of one call get: the rows of each, or its code."""
    unit = save(tmp_path).units["words"]
    found: tuple[dict[int, Any], dict[int, str]] = ({}, {})

    async def scenario(actor: Actor) -> None:
        await actor.load(1, HOSTED)
        actor.engine.on_call(actor.link, call(unit.id, rows, *arrays, op=op))
        await until(lambda: len(actor.link.ended) == len(rows))
        for number, [answer] in actor.link.answers.items():
            assert answer.dtype == np.float32
            found[0][number] = answer.tolist()
        found[1].update(actor.link.codes)

    run(tmp_path, TableOpener, scenario)
    return found


def test_each_request_of_a_call_gets_the_bags_that_are_its_own(tmp_path: Path) -> None:
    counts, ids = bags([0, 11], [5], [], [1, 1, 7])
    told, refused = answers(tmp_path, "sum", {1: 1, 2: 3}, counts, ids)
    assert not refused
    assert told[1] == [(ROWS[0] + ROWS[11]).tolist()]
    assert told[2] == [ROWS[5].tolist(), [0.0, 0.0], (2 * ROWS[1] + ROWS[7]).tolist()]


def test_weights_are_multiplied_and_the_greatest_is_taken(tmp_path: Path) -> None:
    counts, ids = bags([0, 3], [2])
    weights = np.array([1, -2, 0.5], np.float32)
    told, _ = answers(tmp_path / "sum", "sum", {1: 2}, counts, ids, weights)
    assert told[1] == [(ROWS[0] - 2 * ROWS[3]).tolist(), (ROWS[2] / 2).tolist()]
    told, _ = answers(tmp_path / "max", "max", {1: 2}, counts, ids)
    assert told[1] == [ROWS[3].tolist(), ROWS[2].tolist()]


def test_an_id_that_is_not_held_fails_its_own_request_alone(tmp_path: Path) -> None:
    counts, ids = bags([0, 1], [99], [2])
    told, refused = answers(tmp_path, "sum", {1: 1, 2: 1, 3: 1}, counts, ids)
    assert told == {1: [(ROWS[0] + ROWS[1]).tolist()], 3: [ROWS[2].tolist()]}
    assert refused.keys() == {2}


@pytest.mark.parametrize(
    ("op", "arrays"),
    [
        ("sum", (np.array([2], np.int32), np.array([1], np.int32))),
        ("sum", (np.array([-1], np.int32), np.array([1], np.int32))),
        ("sum", (np.array([1], np.int64), np.array([1], np.int32))),
        ("sum", (np.array([1], np.int32), np.array([1.0], np.float32))),
        ("sum", (np.array([1], np.int32),)),
        ("sum", (np.array([1, 1], np.int32), np.array([1, 2], np.int32))),
        ("max", (np.array([1], np.int32), np.array([1], np.int32), np.ones(1, np.float32))),
    ],
)
def test_what_are_no_bags_is_the_callers_mistake(
    tmp_path: Path, op: str, arrays: tuple[Array, ...]
) -> None:
    assert answers(tmp_path, op, {1: 1}, *arrays) == ({}, {1: "INVALID_ARGUMENT"})
