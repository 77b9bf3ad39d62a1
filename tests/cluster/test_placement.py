"""Where parts go: by bytes, over nodes, all of it or nothing, and the same every time."""

from __future__ import annotations

import random
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batching.errors import ResourceExhausted
from cluster.pieces import STAGING, piece_sizes, programs_of
from cluster.placement import fits, orders_of, pieces_on, place
from cluster.sites import Site
from shards.identity import table_identity
from shards.manifest import BlobRef, Leaf, Manifest, MapUnit, Overlay, Program, TableUnit
from shards.orders import ActorKind, HostedUnit
from shards.specs import Spec
from tests.cluster.control_fakes import blob, host_unit, manifest, map_unit, table_unit

MIB = 1 << 20


def sites(kind: ActorKind, count: int, capacity: int = 0, nodes: int = 1) -> list[Site]:
    return [
        Site(name=f"{kind}-{i}", kind=kind, node=f"n{i % nodes}", capacity_bytes=capacity)
        for i in range(count)
    ]


def used(model: Manifest, units: dict[str, tuple[tuple[str, ...], ...]]) -> dict[str, int]:
    return {actor: sum(pieces.values()) for actor, pieces in pieces_on(model, units).items()}


def test_each_kind_goes_to_its_actors() -> None:
    model = manifest(trunk=map_unit("t"), words=table_unit("w", [4, 4]), tok=host_unit("h"))
    placement = place(model, [*sites("device", 1), *sites("shard", 2), *sites("host", 1)])
    assert placement.units == {
        "trunk": (("device-0",),),
        "words": (("shard-0",), ("shard-1",)),
        "tok": (("host-0",),),
    }


def test_bytes_are_estimated_from_the_manifest() -> None:
    leaves = (
        Leaf(dtype="bfloat16", shape=(3, 5), blob=blob()),
        Leaf(dtype="float32", shape=(), blob=blob()),
        Leaf(dtype="int8", shape=(0, 7), blob=blob()),
    )
    unit = MapUnit(id="u", inputs={}, outputs={}, programs=(), params=leaves, batch_buckets=(1,))
    assert piece_sizes(unit) == (3 * 5 * 2 + 4,)
    assert piece_sizes(table_unit("w", [7, 0, 9])) == (7, 0, 9)
    assert piece_sizes(host_unit("h", 11)) == (11,)


def test_partitions_are_balanced_by_bytes() -> None:
    model = manifest(words=table_unit("w", [50, 40, 30, 20, 10, 10]))
    placement = place(model, sites("shard", 2))
    assert used(model, dict(placement.units)) == {"shard-0": 80, "shard-1": 80}


def test_equal_partitions_of_several_tables_go_one_to_each_actor() -> None:
    model = manifest(a=table_unit("a", [8] * 4), b=table_unit("b", [2] * 4))
    placement = place(model, sites("shard", 4))
    for name in ("a", "b"):
        assert sorted(placement.units[name]) == [(f"shard-{i}",) for i in range(4)]


@pytest.mark.parametrize(("shards", "expected"), [(1, 1), (2, 2), (3, 3), (None, 4)])
def test_a_table_is_spread_over_as_many_actors_as_declared(
    shards: int | None, expected: int
) -> None:
    model = manifest(words=table_unit("w", [4] * 6))
    placement = place(model, sites("shard", 4), shards=shards)
    assert len({actor for (actor,) in placement.units["words"]}) == expected


def test_fewer_partitions_than_actors_use_fewer_actors() -> None:
    placement = place(manifest(words=table_unit("w", [4, 4])), sites("shard", 4))
    assert placement.units["words"] == (("shard-0",), ("shard-1",))


def test_shards_are_spread_over_nodes_before_bytes_are_balanced() -> None:
    busy = {("other", 0): 100}
    found = [
        Site(name="shard-0", kind="shard", node="a"),
        Site(name="shard-1", kind="shard", node="a"),
        Site(name="shard-2", kind="shard", node="b", pieces=busy),
    ]
    placement = place(manifest(words=table_unit("w", [4, 4])), found, shards=2)
    assert {actor for (actor,) in placement.units["words"]} == {"shard-0", "shard-2"}


def test_copies_are_on_distinct_actors_of_distinct_nodes() -> None:
    placement = place(manifest(trunk=map_unit("t")), sites("device", 4, nodes=2), replicas=2)
    assert placement.units["trunk"] == (("device-0", "device-1"),)


def test_a_third_copy_comes_back_to_the_first_node() -> None:
    placement = place(manifest(trunk=map_unit("t")), sites("device", 4, nodes=2), replicas=3)
    assert placement.units["trunk"] == (("device-0", "device-1", "device-2"),)


def test_the_emptiest_actor_is_taken() -> None:
    found = [
        Site(name="device-0", kind="device", node="a", capacity_bytes=100, pieces={("x", 0): 60}),
        Site(name="device-1", kind="device", node="a", capacity_bytes=100, pieces={("y", 0): 40}),
    ]
    assert place(manifest(trunk=map_unit("t", 8)), found).units["trunk"] == (("device-1",),)


def test_what_an_actor_holds_already_costs_nothing_and_stays_together() -> None:
    """Two versions with the same trunk share one copy, even where there is no room for two."""
    found = [
        Site(name="device-0", kind="device", node="a", capacity_bytes=9, pieces={("t", 0): 8}),
        Site(name="device-1", kind="device", node="a", capacity_bytes=9),
    ]
    placement = place(manifest(version=2, trunk=map_unit("t", 8), head=map_unit("h", 8)), found)
    assert placement.units == {"trunk": (("device-0",),), "head": (("device-1",),)}


def test_a_new_version_finds_the_partitions_it_shares() -> None:
    held = {("w", 0): 8, ("w", 1): 8}
    found = [
        Site(name="shard-0", kind="shard", node="a"),
        Site(name="shard-1", kind="shard", node="a", pieces={("w", 0): 8}),
        Site(name="shard-2", kind="shard", node="a"),
        Site(name="shard-3", kind="shard", node="a", pieces={("w", 1): 8}),
    ]
    assert sum(held.values()) == 16
    placement = place(manifest(version=2, words=table_unit("w", [8, 8])), found, shards=2)
    assert placement.units["words"] == (("shard-1",), ("shard-3",))


def test_large_units_find_room_before_small_ones() -> None:
    model = manifest(a=map_unit("a", 4), b=map_unit("b", 4), c=map_unit("c", 8))
    placement = place(model, sites("device", 2, capacity=8))
    assert placement.units == {
        "a": (("device-1",),), "b": (("device-1",),), "c": (("device-0",),)
    }  # fmt: skip


@pytest.mark.parametrize(("size", "fit"), [(8, True), (12, False)])
def test_a_unit_fits_up_to_the_last_byte(size: int, fit: bool) -> None:
    model = manifest(trunk=map_unit("t", size))
    if fit:
        assert place(model, sites("device", 1, capacity=8)).pieces == {"device-0": {("t", 0): 8}}
    else:
        with pytest.raises(ResourceExhausted):
            place(model, sites("device", 1, capacity=8))


def test_the_refusal_says_what_is_short_where_and_by_how_much() -> None:
    found = [
        Site(name="device-0", kind="device", node="n7", capacity_bytes=4 * MIB,
             pieces={("x", 0): 3 * MIB}),
    ]  # fmt: skip
    with pytest.raises(ResourceExhausted) as caught:
        place(manifest("ranker", 7, trunk=map_unit("t", 2 * MIB)), found)
    assert str(caught.value) == (
        "ranker version 7: unit 'trunk', copy 1 of 1, fits nowhere: device-0 needs 2 MiB of "
        "device memory, 1 MiB free of 4 MiB: 1 MiB short"
    )


def test_the_refusal_lists_actors_by_how_little_they_lack_and_counts_the_rest() -> None:
    found = [
        Site(name=f"device-{i}", kind="device", node="n", capacity_bytes=size)
        for i, size in enumerate((4, 6, 5, 3, 2, 1))
    ]
    with pytest.raises(ResourceExhausted) as caught:
        place(manifest(trunk=map_unit("t", 8)), found)
    assert [word for word in str(caught.value).split() if word.startswith("device-")] == [
        "device-1", "device-2", "device-0", "device-3",
    ]  # fmt: skip
    assert str(caught.value).endswith("; and 2 more")


# --- what a step allocates, and where batches are laid out ---------------------------------------


def wide_unit(unit_id: str, row: int, batch: int = 4, program: str = "aa") -> MapUnit:
    """A unit of 4 bytes of parameters, with so many floats in and as many out a row."""
    return msgspec.structs.replace(
        map_unit(unit_id),
        inputs={"x": Spec(("b", row))},
        outputs={"y": Spec(("b", row))},
        programs=(Program(blob=BlobRef(digest=program, size=1), platforms=("cpu",)),),
        batch_buckets=(1, batch),
    )


def test_outputs_and_three_slots_of_the_largest_batch_count() -> None:
    model = manifest(trunk=wide_unit("t", 16))
    pieces = place(model, sites("device", 1)).pieces["device-0"]
    assert pieces == {("t", 0): 4 + 4 * 16 * 4, STAGING: 3 * 4 * 16 * 4}
    assert sum(pieces.values()) == 4 + 256 + 768


def test_slots_are_as_large_as_the_largest_unit_needs_not_as_all_together() -> None:
    small, large = wide_unit("s", 16), wide_unit("l", 32)
    both = place(manifest(a=small, b=large), sites("device", 1)).pieces["device-0"]
    assert both[STAGING] == 3 * 4 * 32 * 4
    # With the larger one there, the smaller needs no slots of its own.
    alone = place(manifest(a=large), sites("device", 1)).pieces["device-0"]
    used_bytes = sum(alone.values())
    room = Site(
        name="device-0", kind="device", node="n", pieces=alone, capacity_bytes=used_bytes + 260
    )
    assert place(manifest(version=2, a=small), [room]).units["a"] == (("device-0",),)
    tight = replace(room, capacity_bytes=used_bytes + 259)
    with pytest.raises(ResourceExhausted, match=r"needs 260 B of device memory.*: 1 B short"):
        place(manifest(version=2, a=small), [tight])


def test_what_a_step_of_equal_programs_allocated_is_expected_again() -> None:
    first, second = wide_unit("v1", 16), wide_unit("v2", 16)
    other = wide_unit("v3", 16, program="bb")
    steps = {programs_of(first): 5000}
    for unit, step in ((second, 5000), (other, 256)):
        pieces = place(manifest(t=unit), sites("device", 1), steps=steps).pieces["device-0"]
        assert pieces[unit.id, 0] == 4 + step


def test_the_index_over_several_overlays_counts() -> None:
    base = plain_table(90)
    (part,) = base.partitions
    twice = msgspec.structs.replace(
        part, overlays=(Overlay(rows=3, blob=blob(10)), Overlay(rows=2, blob=BlobRef("01", 5)))
    )
    table = msgspec.structs.replace(base, id="twice", partitions=(twice,))
    pieces = place(manifest(words=table), sites("shard", 1)).pieces["shard-0"]
    assert sum(pieces.values()) == 90 + 10 + 5 + 16 * 5


def test_a_partition_that_does_not_fit_is_named() -> None:
    with pytest.raises(
        ResourceExhausted,
        match=r"partition 1 of 'words' fits nowhere: shard-\d needs 9 B of shard memory",
    ):
        place(manifest(words=table_unit("w", [1, 9])), sites("shard", 2, capacity=8))


def test_too_few_actors_for_the_copies_are_counted() -> None:
    with pytest.raises(ResourceExhausted, match="needs 3 device actors for its copies, 2 are up"):
        place(manifest(trunk=map_unit("t")), sites("device", 2), replicas=3)


def test_too_few_actors_for_the_shards_are_counted() -> None:
    with pytest.raises(ResourceExhausted, match="its partitions need 4 shard actors, 1 are up"):
        place(manifest(words=table_unit("w", [1])), sites("shard", 1), shards=4)


def test_a_table_of_no_rows_has_a_place() -> None:
    placement = place(manifest(words=table_unit("w", [0])), sites("shard", 1, capacity=1))
    assert placement.units["words"] == (("shard-0",),)


def test_orders_name_the_partitions_of_tables_only() -> None:
    model = manifest(trunk=map_unit("t"), words=table_unit("w", [4, 4, 4]))
    placement = place(model, [*sites("device", 1), *sites("shard", 2)])
    assert orders_of(model, placement.units) == {
        "device-0": (HostedUnit(name="trunk"),),
        "shard-0": (HostedUnit(name="words", partitions=(0, 2)),),
        "shard-1": (HostedUnit(name="words", partitions=(1,)),),
    }


def test_a_kept_placement_fits_only_the_manifest_it_was_made_for() -> None:
    model = manifest(words=table_unit("w", [4, 4]))
    units = place(model, sites("shard", 2)).units
    assert fits(model, units)
    assert not fits(manifest(words=table_unit("w", [4, 4, 4])), units)
    assert not fits(manifest(words=table_unit("w", [4, 4]), t=map_unit("t")), units)
    assert not fits(model, {"words": (("shard-0",), ())})


@given(
    sizes=st.lists(st.integers(0, 100), min_size=1, max_size=12),
    units=st.lists(st.integers(0, 25), max_size=4),
    actors=st.integers(1, 5),
    nodes=st.integers(1, 3),
    replicas=st.integers(1, 3),
    capacity=st.integers(0, 300),
    seed=st.integers(0, 99),
)
def test_a_placement_is_whole_within_bounds_and_does_not_depend_on_order(
    sizes: list[int], units: list[int], actors: int, nodes: int, replicas: int, capacity: int,
    seed: int,
) -> None:  # fmt: skip
    trunks = {f"u{i}": map_unit(f"u{i}", 4 * size) for i, size in enumerate(units)}
    model = manifest("m", 1, words=table_unit("w", sizes), **trunks)
    found = [*sites("shard", actors, capacity, nodes), *sites("device", actors, capacity, nodes)]
    try:
        placement = place(model, found, replicas=replicas)
    except ResourceExhausted as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        # It may only refuse where something is short.
        assert (replicas > actors and units) or (capacity and "short" in refusal)
        return
    assert fits(model, placement.units)
    for name, copies in placement.units.items():
        for part in copies:
            assert len(set(part)) == len(part) == (1 if name == "words" else replicas)
    if capacity:
        assert max(used(model, dict(placement.units)).values()) <= capacity
    else:
        load = used(model, dict(placement.units))
        shares = [load.get(f"shard-{i}", 0) for i in range(actors)]
        assert max(shares) - min(shares) <= max(sizes)
    shuffled = found.copy()
    random.Random(seed).shuffle(shuffled)
    assert place(model, shuffled, replicas=replicas) == placement


def test_servables_that_share_a_trunk_meet_on_the_devices_that_hold_it() -> None:
    promised: dict[str, dict[tuple[str, int], int]] = {}
    homes = []
    for number, replicas in enumerate((1, 1, 2, 1, 2)):
        model = manifest(
            name=f"model-{number}", trunk=map_unit("trunk", 8), head=map_unit(f"head-{number}", 4)
        )
        found = [
            Site(name=f"device-{i}", kind="device", node=f"n{i}", capacity_bytes=64,
                 pieces=promised.get(f"device-{i}", {}))
            for i in range(3)
        ]  # fmt: skip
        placement = place(model, found, replicas=replicas)
        for actor, pieces in placement.pieces.items():
            promised.setdefault(actor, {}).update(pieces)
        homes.append(set(placement.units["trunk"][0]))
    # Who comes later goes where the trunk is; more copies are made only where more are asked for.
    holders = {name for name, pieces in promised.items() if ("trunk", 0) in pieces}
    assert homes[0] == homes[1] < homes[2] == homes[4] == holders
    assert homes[3] < holders
    assert len(holders) == 2


# --- overlays ------------------------------------------------------------------------------------


def overlaid(table: TableUnit, *sizes: int) -> TableUnit:
    """The table with an overlay of this size on each partition; none where it is 0."""
    parts = tuple(
        msgspec.structs.replace(part, overlays=(Overlay(rows=1, blob=blob(size)),) if size else ())
        for part, size in zip(table.partitions, sizes, strict=True)
    )
    return msgspec.structs.replace(
        table, id=table_identity(table.dtype, table.dim, parts), partitions=parts
    )


def plain_table(*sizes: int) -> TableUnit:
    table = table_unit("", sizes)
    identity = table_identity(table.dtype, table.dim, table.partitions)
    return msgspec.structs.replace(table, id=identity)


@given(st.data(), st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(1, 4))
def test_a_delta_goes_where_its_base_is_and_costs_its_overlays_alone(
    data: st.DataObject, bases: list[int], count: int
) -> None:
    table = plain_table(*bases)
    first = place(manifest(words=table), sites("shard", count, capacity=1000))
    added = [data.draw(st.integers(0, 30)) for _ in bases]
    delta = manifest(version=2, words=overlaid(table, *added))
    books = [
        replace(site, pieces=first.pieces.get(site.name, {}), capacity_bytes=1000)
        for site in sites("shard", count)
    ]
    second = place(delta, books)
    assert second.units == first.units
    for actor, pieces in second.pieces.items():
        both = {**first.pieces[actor], **pieces}
        mine = [i for i, (home,) in enumerate(second.units["words"]) if home == actor]
        assert sum(both.values()) - sum(first.pieces[actor].values()) == sum(added[i] for i in mine)
    assert piece_sizes(delta.units["words"]) == tuple(map(sum, zip(bases, added, strict=True)))


def test_a_delta_fits_where_a_second_base_would_not() -> None:
    table = plain_table(90)
    site = Site(name="shard-0", kind="shard", node="n", capacity_bytes=100,
                pieces={(table.id, 0): 90})  # fmt: skip
    assert place(manifest(version=2, words=overlaid(table, 10)), [site]).units["words"] == (
        ("shard-0",),
    )
    with pytest.raises(ResourceExhausted, match=r"needs 11 B of shard memory.*: 1 B short"):
        place(manifest(version=2, words=overlaid(table, 11)), [site])


def test_a_sparse_table_takes_the_room_of_its_data() -> None:
    whole = table_unit("w", [1 << 40, 1 << 40])
    parts = tuple(
        msgspec.structs.replace(part, blob=msgspec.structs.replace(part.blob, data=4096))
        for part in whole.partitions
    )
    sparse = msgspec.structs.replace(whole, partitions=parts)
    assert piece_sizes(sparse) == (4096, 4096)
    place(manifest(words=sparse), sites("shard", 1, capacity=8192))
