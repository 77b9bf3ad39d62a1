"""Pooled look-ups taken apart and put together, against rows pooled in one place."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import shards
from batching.errors import InvalidArgument
from cluster import pooled
from cluster.bunches import TABLES_MAX, Bunch
from cluster.pooled import Pool
from cluster.routes import Routes
from shards.bags import set_id
from shards.errors import SpecMismatch
from shards.manifest import TableUnit
from shards.pooling import Partial
from shards.specs import Spec
from shards.table_sets import TableSet
from shards.tables import HostedTable
from tests.cluster.routing_fakes import epoch, manifest, table_unit
from tests.cluster.serving import Cluster

How = Literal["sum", "mean", "max"]
#: Of look-ups that are asked for together.
HOWS: list[list[How]] = [["sum"] * 3, ["mean", "sum", "mean"], ["max"] * 3]


def bunches_of(
    tables: Sequence[TableUnit], hows: Sequence[How], holders: Sequence[list[list[str]]]
) -> list[Bunch]:
    """How a plan asks for a look-up in each of these tables."""
    names = [f"t{number}" for number in range(len(tables))]
    inputs = {name: Spec(("b", "t"), "int64") for name in names}
    found = manifest(
        dict(zip(names, tables, strict=True)),
        [(name, {"ids": f"in:{name}"}) for name in names],
        inputs,
        {name: Spec(("b", table.dim)) for name, table in zip(names, tables, strict=True)},
        {name: f"{number}:rows" for number, name in enumerate(names)},
    )
    signature = found.signatures["serving_default"]
    nodes = tuple(
        msgspec.structs.replace(node, pool=how)
        for node, how in zip(signature.nodes, hows, strict=True)
    )
    found.signatures["serving_default"] = msgspec.structs.replace(signature, nodes=nodes)
    placed = dict(zip(names, holders, strict=True))
    plan = Routes(epoch(1, (found, placed))).find("model").plans["serving_default"]
    assert set(plan.roots) == set(plan.bunches)
    return list(plan.bunches.values())


def bunch_of(
    sizes: list[int], how: How, missing: Literal["error", "zero"] = "error", dim: int = 2
) -> Bunch:
    """Of one table, each of its partitions at an actor of its own."""
    unit = table_unit("t0", sizes=sizes, missing=missing, dim=dim)
    [found] = bunches_of([unit], [how], [[[f"a{n}"] for n in range(len(sizes))]])
    return found


def hosted(unit: TableUnit, rows: Any) -> HostedTable:
    parts = enumerate(unit.partitions)
    return HostedTable(unit, {i: rows[p.first_row : p.first_row + p.rows] for i, p in parts})


def fetch(pool: Pool, holders: list[str], tables: TableSet, op: Partial, order: Any) -> list[Any]:
    """Ask every holder and put the answers in, in some order."""
    parts = list(enumerate(pool.split(holders)))
    order.shuffle(parts)
    for number, part in parts:
        assert not pool.is_complete
        counts, ids, *weights = part.arrays
        found = tables.pool(np.array([part.sizes]), counts, ids, op, *weights)
        pool.put(number, [found])
    assert pool.is_complete
    return [outputs["rows"] for _, outputs in pool.outputs(0)]


def expected(rows: Any, ids: Any, how: How, weights: Any = None) -> Any:
    """What a table whose missing rows are zeros yields, one bag after the other."""
    ones = np.ones(ids.shape[-1])
    out = np.zeros((*ids.shape[:-1], rows.shape[1]), np.float32)
    for at in np.ndindex(ids.shape[:-1]):
        found = [
            (rows[i] if 0 <= i < len(rows) else np.zeros(rows.shape[1], np.float32)) * w
            for i, w in zip(ids[at], ones if weights is None else weights[at], strict=True)
            if i != -1
        ]
        if found:
            stack = np.array(found, np.float32)
            out[at] = stack.max(0) if how == "max" else stack.sum(0)
            out[at] /= np.float32(len(found) if how == "mean" else 1)
    return out


def ids_of(data: st.DataObject, rows: int) -> Any:
    shape = data.draw(st.sampled_from([(1, 1), (3, 4), (2, 3, 5), (4, 0), (0, 3), (6, 9)]), "shape")
    count = int(np.prod(shape))
    drawn = data.draw(st.lists(st.integers(-3, rows + 1), min_size=count, max_size=count), "ids")
    if data.draw(st.booleans(), "all exist"):
        drawn = [abs(ident) % rows for ident in drawn]
    dtype = data.draw(st.sampled_from(["int64", "int32", "int16"]), "dtype")
    return np.array(drawn, dtype).reshape(shape)


@given(data=st.data(), holders=st.sampled_from([1, 2, 4, 8]))
def test_bags_over_any_number_of_shards_are_bit_equal_to_bags_in_one_place(
    data: st.DataObject, holders: int
) -> None:
    count = data.draw(st.integers(1, 3), "tables")
    hows = data.draw(st.sampled_from(HOWS), "hows")[:count]
    seed = data.draw(st.integers(0, 2**16), "seed")
    names = [f"shard-{index % holders}" for index in range(8)]
    random.Random(seed).shuffle(names)
    units: list[TableUnit] = []
    for number in range(count):
        sizes = data.draw(st.lists(st.integers(0, 6), min_size=8, max_size=8), "partitions")
        sizes[0] += 1
        units.append(table_unit(f"t{number}", sizes=sizes, missing="zero", dim=3))
    [bunch] = bunches_of(units, hows, [[[name] for name in names]] * count)
    draw = np.random.default_rng(seed)
    values = [draw.integers(-9, 9, (unit.rows, 3)).astype(np.float32) for unit in units]
    ids = [ids_of(data, unit.rows) for unit in units]
    weights: list[Any] = [None] * count
    if set(hows) == {"sum"} and data.draw(st.booleans(), "weighted"):
        weights = [draw.integers(-2, 3, each.shape).astype(np.float32) for each in ids]
    pool = Pool(bunch, list(zip(ids, weights, strict=True)))
    tables = TableSet([hosted(*each) for each in zip(units, values, strict=True)])
    asked = names[: len(bunch.node.holders)]  # one for all where there is one
    answers = fetch(pool, asked, tables, bunch.op, random.Random(seed))
    lost = 0
    for found, rows, own, how, weighed in zip(answers, values, ids, hows, weights, strict=True):
        assert found.dtype == np.float32
        assert np.array_equal(found, expected(rows, own, how, weighed))
        lost += int(np.count_nonzero(((own < 0) & (own != -1)) | (own >= len(rows))))
    assert pool.missing == lost == sum(number for _, number in pool.missing_by)


def test_look_ups_that_are_alike_are_asked_for_in_one_call_and_others_apart() -> None:
    alike = [table_unit(f"t{number}", sizes=[4, 4]) for number in range(3)]
    other = table_unit("t3", sizes=[4, 4], dim=5)
    found = bunches_of([*alike, other], ["sum", "max", "mean", "sum"], [[["a"], ["a"]]] * 4)
    # A mean is a sum to a shard; rows of another size are another answer.
    kinds = [([each.index for each in bunch.members], bunch.op) for bunch in found]
    assert kinds == [([0, 2], "sum"), ([1], "max"), ([3], "sum")]
    both = found[0]
    assert [table.unit for table in both.node.tables] == ["t0", "t2"]
    assert (both.node.holders, both.node.unit) == ((("a",),), set_id(both.node.tables))
    assert found[1].node.unit == "t1"
    elsewhere = bunches_of(alike, ["sum"] * 3, [[["a"], ["b"]], [["a"], ["a"]], [["a"], ["b"]]])
    assert [[each.index for each in bunch.members] for bunch in elsewhere] == [[0, 2], [1]]


def test_no_more_tables_are_asked_in_one_call_than_answers_may_wait_for() -> None:
    units = [table_unit(f"t{number}", sizes=[4]) for number in range(TABLES_MAX + 2)]
    found = bunches_of(units, ["sum"] * len(units), [[["a"]]] * len(units))
    assert [len(bunch.members) for bunch in found] == [TABLES_MAX, 2]


def test_outlines_of_very_many_bags_are_not_kept() -> None:
    bunch = bunch_of([9], "sum")
    pooled._outline_before.cache_clear()
    for bags in (3, 3, 20_000):
        assert (
            len(Pool(bunch, [(np.zeros((bags, 2), np.int64), None)]).split(["a"])[0].bags) == bags
        )
    assert pooled._outline_before.cache_info()[:2] == (1, 1)


def test_rows_that_are_missing_are_those_that_each_table_declares() -> None:
    units = [
        msgspec.structs.replace(
            table_unit(f"t{number}", sizes=[4], missing="zero"), missing=missing, default=default
        )
        for number, (missing, default) in enumerate(
            [("zero", ()), ("default", (5.0, 7.0)), ("zero", ())]
        )
    ]
    [bunch] = bunches_of(units, ["sum"] * 3, [[["a"]]] * 3)
    pool = Pool(
        bunch, [(np.array([[9, 1]]), None), (np.array([[9, 9]]), None), (np.array([[0]]), None)]
    )
    tables = TableSet([hosted(unit, np.full((4, 2), 3.0, np.float32)) for unit in units])
    found = fetch(pool, ["a"], tables, "sum", random.Random(0))
    assert [rows.tolist() for rows in found] == [[[3.0, 3.0]], [[10.0, 14.0]], [[3.0, 3.0]]]
    assert [number for _, number in pool.missing_by] == [1, 2, 0]


def test_each_shard_is_asked_for_the_bags_that_have_ids_there_and_no_others() -> None:
    pool = Pool(bunch_of([4, 4], "sum"), [(np.array([[0, 1], [5, -1], [-1, -1], [3, 7]]), None)])
    first, second = pool.split(["a", "b"])
    assert (first.holder, first.bags.tolist()) == ("a", [0, 3])
    assert [array.tolist() for array in first.arrays] == [[2, 1], [0, 1, 3]]
    assert (second.holder, second.bags.tolist()) == ("b", [1, 3])
    assert [array.tolist() for array in second.arrays] == [[1, 1], [5, 7]]
    assert {array.dtype.name for part in (first, second) for array in part.arrays} == {"int32"}


def test_parts_are_added_in_the_order_of_the_partitions_whichever_comes_first() -> None:
    big = np.float32(2**24)
    parts = [np.array([[big]]), np.array([[np.float32(1)]]), np.array([[-big]])]
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        pool = Pool(bunch_of([1, 1, 1], "sum", dim=1), [(np.array([[0, 1, 2]]), None)])
        pool.split(["a", "b", "c"])
        for number in order:
            pool.put(number, [parts[number]])
        [(_, outputs)] = pool.outputs(0)
        assert outputs["rows"].tolist() == [[0.0]]  # (2**24 + 1) - 2**24, in 32 bits


@pytest.mark.parametrize("wrong", [-2, 8, 2**40])
def test_a_missing_id_fails_a_request_of_a_table_that_says_so(wrong: int) -> None:
    with pytest.raises(InvalidArgument, match=f"id {wrong} is not in a table of 8 rows"):
        Pool(bunch_of([4, 4], "mean"), [(np.array([[1, wrong]]), None)])
    units = [table_unit("t0", sizes=[9, 9]), table_unit("t1", sizes=[4, 4])]
    [bunch] = bunches_of(units, ["sum", "sum"], [[["a"], ["b"]]] * 2)
    with pytest.raises(InvalidArgument, match=f"id {wrong} is not in a table of 8 rows"):
        Pool(bunch, [(np.array([[1]]), None), (np.array([[1, wrong]]), None)])


@pytest.mark.parametrize(
    ("ids", "weights"),
    [
        (np.zeros((2, 2), np.float32), None),
        (np.zeros((2, 2), np.int64), np.zeros((2, 2))),
        (np.zeros((2, 2), np.int64), np.zeros((2, 1), np.float32)),
    ],
)
def test_ids_and_weights_of_other_dtypes_or_shapes_are_refused(ids: Any, weights: Any) -> None:
    with pytest.raises(SpecMismatch):
        Pool(bunch_of([4, 4], "sum"), [(ids, weights)])


@pytest.mark.parametrize("rows", [np.zeros((1, 2)), np.zeros((2, 2), np.float32)])
def test_an_answer_of_another_shape_or_dtype_is_never_merged(rows: Any) -> None:
    pool = Pool(bunch_of([4, 4], "sum"), [(np.array([[1, 2]]), None)])
    pool.split(["a", "a"])
    with pytest.raises(SpecMismatch, match="a shard answered"):
        pool.put(0, [rows])


# --- in a bundle, served -----------------------------------------------------------------------

USERS = np.random.default_rng(1).integers(-9, 9, (40, 4)).astype(np.float32)
ITEMS = np.random.default_rng(2).integers(-9, 9, (1_000, 2)).astype(np.float16)


def save(store: Path) -> None:
    ids = Spec(("b", "t"), "int32")
    inputs = {"history": ids, "items": ids, "weights": Spec(("b", "t"))}
    with shards.Bundle.create(str(store), "bags", version=1) as bundle:
        users = bundle.table("users", USERS, partitions=4, missing="zero")
        items = bundle.table("items", ITEMS, partitions=3)

        @bundle.signature("serving_default", inputs=inputs)
        def bags(history: Any, items: Any, weights: Any, tables: Any = (users, items)) -> Any:
            users, things = tables
            return {
                "mean": users.pool(history, "mean"),
                "max": users.pool(history, "max"),
                "sum": things.pool(items, "sum", weights=weights),
            }


def test_a_bundle_that_pools_is_served_over_http_and_moves_what_it_must(tmp_path: Path) -> None:
    save(tmp_path / "store")
    cluster = Cluster(tmp_path / "store", tmp_path, shards=3)
    try:
        cluster.load("bags", 1)
        cluster.publish()
        draw = np.random.default_rng(3)
        history = draw.integers(0, 40, (16, 6)).astype(np.int32)
        history[::3, 4:] = -1
        history[5, 0] = 77
        items = draw.integers(0, 1_000, (16, 6)).astype(np.int32)
        weights = draw.integers(0, 3, (16, 6)).astype(np.float32)
        columns = {"history": history, "items": items, "weights": weights}
        body = json.dumps({"inputs": {name: rows.tolist() for name, rows in columns.items()}})
        answer = cluster.ask("/v1/models/bags:predict", body)
        assert answer.status == 200, answer.body
        told = {name: np.array(rows, np.float32) for name, rows in answer.json["outputs"].items()}
        assert np.array_equal(told["mean"], expected(USERS, history, "mean"))
        assert np.array_equal(told["max"], expected(USERS, history, "max"))
        assert np.array_equal(
            told["sum"], expected(ITEMS.astype(np.float32), items, "sum", weights)
        )
        assert cluster.router.stats.missing_rows == 2  # in each of the two look-ups
        sent, received = moved_by(history, items)
        peers = [peer for peer in cluster.router.peers if "shard" in peer.endpoint.actor]
        assert [peer.sent_bytes for peer in peers] == sent
        assert [peer.received_bytes for peer in peers] == received
        metrics = cluster.ask("/metrics").body.decode()
        line = 'serving_router_tensor_bytes_total{actor="shard-0",direction="sent"}'
        assert f"{line} {float(sent[0])}\n" in metrics
    finally:
        cluster.close()


def moved_by(history: Any, items: Any) -> tuple[list[int], list[int]]:
    """Bytes to and from three shards: 4 an id, 8 a weighted one, 4 and one row a bag touched."""
    sent, received = [0] * 3, [0] * 3
    for ids, rows, parts, dim, id_bytes, times in (
        (history, 40, 4, 4, 4, 2),
        (items, 1_000, 3, 2, 8, 1),
    ):
        edges = [rows * index // parts for index in range(parts + 1)]
        part = np.searchsorted(edges, ids, side="right") - 1
        shard = np.where((ids >= 0) & (ids < rows), part % 3, -1)
        for index in range(3):
            here = shard == index
            bags = int(here.any(axis=1).sum())
            sent[index] += times * (id_bytes * int(here.sum()) + 4 * bags)
            received[index] += times * 4 * dim * bags
    return sent, received
