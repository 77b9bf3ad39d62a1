"""The NVMe tier as the cluster sees it: what a budget is to partitions, orders and placements."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batching.errors import ResourceExhausted
from cluster.control import ActorUp, Load
from cluster.fields import FieldError
from cluster.pieces import piece_sizes
from cluster.placement import place
from cluster.servable_settings import ServableConfig
from cluster.tiers import cached_part, with_tier
from shards.manifest import BlobRef, Overlay, TableUnit
from shards.orders import CacheFigures, HostedUnit, UnitState
from tests.cluster.control_fakes import (
    begun,
    config,
    host_unit,
    manifest,
    of,
    report,
)
from tests.cluster.control_fakes import table_unit as unit_of_rows
from tests.cluster.test_placement import sites

MB = 1_000_000


def table_unit(unit_id: str, sizes: Sequence[int]) -> TableUnit:
    """A table of rows of 100 bytes."""
    unit = unit_of_rows(unit_id, sizes)
    parts = [
        msgspec.structs.replace(part, first_row=0, rows=size // 100)
        for part, size in zip(unit.partitions, sizes, strict=True)
    ]
    return msgspec.structs.replace(unit, partitions=tuple(parts))


def tiered(budget: int = MB) -> ServableConfig:
    return ServableConfig(name="m", tier="nvme", budget=budget)


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("budget", {"tier": "nvme"}),
        ("budget", {"tier": "nvme", "budget": 0}),
        ("budget", {"budget": MB}),
        ("resident", {"tier": "nvme", "budget": MB, "resident": "locked"}),
    ],
)
def test_what_cannot_be_meant_is_refused_by_its_field(field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(FieldError) as caught:
        ServableConfig(name="m", **fields)
    assert caught.value.field_name == field


def test_tables_in_memory_have_no_part() -> None:
    assert cached_part(ServableConfig(name="m"), manifest(w=table_unit("w", [MB]))) is None


@given(
    st.lists(st.lists(st.integers(1, 100).map(lambda n: n * MB), min_size=1, max_size=6),
             min_size=1, max_size=4),
    st.integers(MB, 100 * MB),
)  # fmt: skip
def test_partitions_of_all_tables_share_the_budget_by_their_bytes(
    tables: list[list[int]], budget: int
) -> None:
    units: dict[str, Any] = {
        f"t{index}": table_unit(f"t{index}", sizes) for index, sizes in enumerate(tables)
    }
    cached = cached_part(tiered(budget), manifest(**units, other=host_unit("h")))
    shares = [size for unit in units.values() for size in piece_sizes(unit, cached)]
    # What one read needs is taken in any case.
    assert sum(shares) <= budget + len(shares) * 3 * 4096
    assert sum(shares) >= budget - len(shares)


def test_overlays_are_in_memory_beside_the_budget() -> None:
    plain = table_unit("w", [MB])
    part = msgspec.structs.replace(
        plain.partitions[0], overlays=(Overlay(rows=1, blob=BlobRef(digest="o", size=300)),)
    )
    unit = msgspec.structs.replace(plain, partitions=(part,))
    assert piece_sizes(unit, 0.25) == (MB // 4 + 300,)


def test_a_table_that_no_actor_has_memory_for_is_placed_by_its_budget() -> None:
    table = manifest(w=table_unit("w", [8 * MB, 8 * MB]))
    room = sites("shard", 2, capacity=2 * MB)
    with pytest.raises(ResourceExhausted):
        place(table, room)
    placement = place(table, room, cached=cached_part(tiered(3 * MB), table))
    assert sorted(sum(pieces.values()) for pieces in placement.pieces.values()) == [1_500_000] * 2


def test_only_tables_are_told_their_share() -> None:
    units = manifest(w=table_unit("w", [MB]), h=host_unit("h"))
    order = (HostedUnit(name="w", partitions=(0,)), HostedUnit(name="h"))
    assert with_tier(order, units, None) == order
    assert with_tier(order, units, 0.5) == (
        HostedUnit(name="w", partitions=(0,), cached=0.5),
        HostedUnit(name="h"),
    )


def test_an_order_says_the_share_and_status_what_came_of_it() -> None:
    declared = config("m", devices=0)
    servable = dataclasses.replace(declared.servables[0], tier="nvme", budget=2 * MB)
    shell = begun(dataclasses.replace(declared, servables=(servable,)))
    shell.serve("m", 1, manifest("m", 1, words=table_unit("w", [8 * MB])))
    (load,) = of(Load, shell.effects)
    assert load.order.units == (HostedUnit(name="words", partitions=(0,), cached=0.25),)
    cache = CacheFigures(nbytes=7, hits=3, misses=2, reads=1, read_bytes=4096, direct=False)
    state = UnitState(id="w", users=("m:1",), nbytes=7, cache=cache)
    found = msgspec.structs.replace(report("shard-0", loaded=[("m", 1)]), units=(state,))
    shell.send(ActorUp(report=found))
    actor = shell.core.status()["actors"]["shard-0"]
    assert actor["promised_bytes"] == 2 * MB
    assert actor["units"][0]["cache"] == {
        "budget": 0, "nbytes": 7, "used": 0, "hits": 3, "misses": 2, "reads": 1,
        "read_bytes": 4096, "wait_s": 0.0, "direct": False,
    }  # fmt: skip
