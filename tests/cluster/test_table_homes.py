"""Where partitions of tables go, by each strategy."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import get_args

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec import structs

from batching.errors import ResourceExhausted
from cluster.asked_rows import explained, weights_of
from cluster.control import Declared, Load
from cluster.packing import Strategy
from cluster.placement import place
from cluster.sites import Site
from shards.manifest import CustomUnit, Manifest, Node, Overlay, Partition, Signature, TableUnit
from shards.specs import Spec
from tests.cluster.control_fakes import FOUR_SHARDS, begun, blob, manifest, of, table_unit

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


def sites(*capacities: int, nodes: int = 1) -> list[Site]:
    return [
        Site(name=f"s{index}", kind="shard", node=f"n{index % nodes}", capacity_bytes=capacity)
        for index, capacity in enumerate(capacities)
    ]


def table(unit_id: str, *parts: tuple[int, int]) -> TableUnit:
    """A table of partitions of so many rows and bytes."""
    partitions: list[Partition] = []
    first = 0
    for rows, nbytes in parts:
        partitions.append(Partition(first_row=first, rows=rows, blob=blob(nbytes)))
        first += rows
    return TableUnit(id=unit_id, dtype="float32", dim=16, rows=first, partitions=tuple(partitions))


def asking(ids: dict[str, int], **tables: TableUnit) -> Manifest:
    """A version whose requests have so many ids of each table."""
    signature = Signature(
        method="predict",
        inputs={name: Spec(("b", count), "int64") for name, count in ids.items()},
        outputs={},
        nodes=tuple(Node(unit=name, inputs={"ids": f"in:{name}"}) for name in ids),
        returns={},
    )
    return structs.replace(
        manifest(), units=dict(tables), signatures={"serving_default": signature}
    )


def homes(found: Manifest, actors: list[Site], strategy: Strategy) -> dict[str, int]:
    """Partitions by actor."""
    units = place(found, actors, strategy=strategy).units
    return dict(Counter(a for copies in units.values() for part in copies for a in part))


def test_load_puts_what_is_asked_much_on_actors_of_its_own() -> None:
    hot, cold = table("hot", (10, 8)), table("cold", (100, 96), (100, 96), (100, 96))
    found = asking({"hot": 30, "cold": 1}, hot=hot, cold=cold)
    units = place(found, sites(0, 0), strategy="load").units
    assert {actor for part in units["cold"] for actor in part}.isdisjoint(units["hot"][0])
    units = place(found, sites(0, 0), strategy="capacity").units
    assert len({actor for part in units["cold"] for actor in part}) == 2


def test_load_finds_room_for_large_cold_parts_too() -> None:
    hot, cold = table("hot", (1, 2), (1, 2)), table("cold", (9, 6))
    found = asking({"hot": 9, "cold": 1}, hot=hot, cold=cold)
    assert place(found, sites(6, 4), strategy="load").units["cold"] == (("s0",),)


def test_messages_takes_as_few_actors_as_have_room() -> None:
    found = asking({"t": 1}, t=table("t", *[(1, 10)] * 6))
    assert homes(found, sites(*[100] * 6), "messages") == {"s0": 6}
    assert len(homes(found, sites(*[20] * 6), "messages")) == 3
    assert len(homes(found, sites(*[100] * 6), "capacity")) == 6


def test_messages_packs_where_balancing_finds_no_room() -> None:
    found = asking({"t": 1}, t=table("t", (1, 3), (1, 3), (1, 2), (1, 2), (1, 2)))
    assert len(homes(found, sites(6, 6, 6), "messages")) == 2


def test_messages_puts_copies_on_nodes_of_their_own() -> None:
    found = asking({"t": 1}, t=table("t", (1, 1), (1, 1)))
    placed = place(found, sites(9, 9, 9, 9, nodes=2), strategy="messages", table_replicas=2)
    assert placed.units["t"] == (("s0", "s1"), ("s0", "s1"))


def test_copies_over_one_actor_each_are_on_nodes_of_their_own() -> None:
    found = asking({"t": 1}, t=table("t", (1, 1), (1, 1)))
    actors = [Site(name=f"s{i}", kind="shard", node="ab"[i // 2]) for i in range(4)]
    placed = place(found, actors, shards=1, table_replicas=2)
    assert placed.units["t"] == (("s0", "s2"), ("s0", "s2"))


def test_a_refusal_is_of_as_many_actors_as_there_are() -> None:
    found = asking({"t": 1}, t=table("t", (1, 9), (1, 9), (1, 9)))
    with pytest.raises(ResourceExhausted, match=r"s0 .*; s1 "):
        place(found, sites(9, 9), strategy="messages")


def test_a_new_version_stays_where_its_partitions_are() -> None:
    found = asking({"t": 1}, t=table("t", (1, 4), (1, 4)))
    actors = sites(100, 90, 8)
    pieces = {("t", 0): 4, ("t", 1): 4}
    actors[2] = Site(name="s2", kind="shard", node="n0", capacity_bytes=8, pieces=pieces)
    assert homes(found, actors, "messages") == {"s2": 2}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_overlays_move_no_partition(strategy: Strategy) -> None:
    bare = table("t", (1, 30), (7, 20), (3, 10), (9, 40))
    grown = structs.replace(bare.partitions[2], overlays=(Overlay(rows=1, blob=blob(25)),))
    partitions = (*bare.partitions[:2], grown, bare.partitions[3])
    laid = structs.replace(bare, id="u", partitions=partitions)
    before = place(asking({"t": 5}, t=bare), sites(99, 99, 99), strategy=strategy).units
    after = place(asking({"t": 5}, t=laid), sites(99, 99, 99), strategy=strategy).units
    assert after == before


def test_a_registered_kind_is_balanced_by_bytes() -> None:
    unit = CustomUnit(
        id="c", kind="k", inputs={}, outputs={}, partitions=tuple({"f": blob(4)} for _ in range(2))
    )
    found = manifest(custom=unit)
    assert weights_of(found) is None
    units = place(found, sites(0, 0), strategy="load").units
    assert units == place(found, sites(0, 0), strategy="capacity").units


def test_columns_weigh_what_is_read_of_each() -> None:
    unit = structs.replace(
        table("t", (2, 64), (2, 192)), rows=2, dim=64, scheme="columns", columns=(16, 48)
    )
    parts = tuple(structs.replace(part, first_row=0) for part in unit.partitions)
    found = asking({"t": 3}, t=structs.replace(unit, partitions=parts))
    assert weights_of(found) == {"t": (3 * 64.0, 3 * 192.0)}


def test_without_a_default_signature_all_count() -> None:
    found = asking({"t": 2}, t=table("t", (4, 4)))
    (signature,) = found.signatures.values()
    found = structs.replace(found, signatures={"a": signature, "b": signature})
    assert weights_of(found) == {"t": (4 * 64.0,)}


def test_a_placement_is_explained() -> None:
    found = asking({"t": 2}, t=table("t", (1, 10), (3, 10)))
    placed = place(found, sites(0, 0))
    assert explained(found, placed.units, placed.pieces) == {
        "messages": 2,
        "actors": {"s0": {"bytes": 10, "load": 0.25}, "s1": {"bytes": 10, "load": 0.75}},
    }
    assert explained(manifest(), {"trunk": (("d",),)}, {}) is None


def test_tables_are_placed_as_their_servable_declares() -> None:
    servable = dataclasses.replace(FOUR_SHARDS.servables[0], shards=None, placement="messages")
    shell = begun(dataclasses.replace(FOUR_SHARDS, servables=(servable,)))
    shell.serve("m", 1, manifest("m", 1, words=table_unit("w", [1] * 4)))
    served = shell.epoch.servables["m"][1]
    assert served.placement == {"words": (("shard-0",),) * 4}
    row = shell.core.status()["servables"]["m"]
    assert (row["placement"], row["versions"][0]["tables"]["messages"]) == ("messages", 1)


def test_a_strategy_that_is_declared_anew_moves_nothing_that_serves() -> None:
    shell = begun(FOUR_SHARDS)
    shell.serve("m", 1, manifest("m", 1, words=table_unit("w", [1] * 4)))
    before = shell.epoch.servables["m"][1].placement
    servable = dataclasses.replace(FOUR_SHARDS.servables[0], placement="messages")
    declared = dataclasses.replace(FOUR_SHARDS, servables=(servable,))
    assert of(Load, shell.send(Declared(config=declared))) == []
    assert shell.epoch.servables["m"][1].placement == before
    shell.serve("m", 2, manifest("m", 2, words=table_unit("v", [1] * 4)))
    (placed,) = {part for part in shell.epoch.servables["m"][2].placement["words"]}
    assert len(placed) == 1


@given(
    parts=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=1, max_size=8),
    ids=st.integers(1, 9),
    capacities=st.lists(st.integers(20, 200), min_size=1, max_size=5),
    nodes=st.integers(1, 3),
    copies=st.integers(1, 2),
)
@example(parts=[(1, 1), (1, 21)], ids=1, capacities=[21, 20, 20, 21], nodes=3, copies=2)
def test_every_strategy_keeps_the_promises(
    parts: list[tuple[int, int]], ids: int, capacities: list[int], nodes: int, copies: int
) -> None:
    """Whole, within room, copies apart; fewest actors where that is asked; equal if repeated."""
    found = asking({"t": ids}, t=table("t", *parts))
    actors = sites(*capacities, nodes=nodes)
    counts: dict[Strategy, int] = {}
    for strategy in STRATEGIES:
        try:
            placed = place(found, actors, strategy=strategy, table_replicas=copies)
        except ResourceExhausted:
            continue
        assert placed == place(found, actors[::-1], strategy=strategy, table_replicas=copies)
        assert all(len(set(part)) == copies for part in placed.units["t"])
        for actor in actors:
            used = sum(placed.pieces.get(actor.name, {}).values())
            assert used <= actor.capacity_bytes
        counts[strategy] = len(placed.pieces)
    if "capacity" in counts:
        # Of several copies none may find room where few actors are left to the next one.
        assert counts["messages"] <= counts["capacity"] or copies > 1
        assert "load" in counts
