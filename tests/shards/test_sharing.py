"""Which sizes a shared unit is compiled for: what is declared, and what its users make together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from batching import bucketize
from shards.manifest import BlobRef, MapUnit, Program
from shards.sharing import (
    Member,
    Members,
    admits,
    declared_sizes,
    larger_sizes,
    maker_of,
    sizes_for,
)
from shards.specs import Spec
from tests.shards.serving import map_unit

ANY = Program(blob=BlobRef(digest="0" * 64, size=1), platforms=("cpu",))
WORDS = {"x": Spec(("b", "t", 2))}


def trunk(*buckets: int, lengths: tuple[int, ...] = ()) -> MapUnit:
    inputs = WORDS if lengths else None
    unit = map_unit("trunk", inputs, None, buckets, {"t": lengths} if lengths else None)
    return replace(unit, programs=(ANY,))


def members(*units: MapUnit, bound: int = 256) -> Members:
    return {(f"model-{number}", 1): Member(unit, bound) for number, unit in enumerate(units)}


def test_one_servable_has_what_it_declares() -> None:
    unit = trunk(1, 8, lengths=(16, 32))
    alone = members(unit)
    sizes = sizes_for(alone, lambda _: True)
    assert sizes == declared_sizes(unit)
    assert sizes.buckets == [(1, (16,)), (1, (32,)), (8, (16,)), (8, (32,))]
    assert sizes.largest == 8


@pytest.mark.parametrize(
    ("count", "bound", "larger"),
    [
        (2, 256, [128]),
        (3, 256, [128, 192]),
        (4, 256, [128, 256]),
        (8, 256, [128, 256]),
        (8, 100, [100]),
        (8, 64, []),
        (8, 1, []),
    ],
)
def test_together_they_may_have_batches_of_the_sum_up_to_a_bound(
    count: int, bound: int, larger: list[int]
) -> None:
    users = members(*[trunk(1, 64)] * count, bound=bound)
    assert larger_sizes(users, ()) == larger
    assert sizes_for(users, lambda _: True).batches[()].sizes == (1, 64, *larger)
    assert sizes_for(users).batches[()].sizes == (1, 64)


def test_the_least_bound_counts_and_never_takes_what_is_declared() -> None:
    users = dict(members(trunk(1, 64), trunk(4, 200), trunk(1, 64)))
    users["model-2", 1] = Member(trunk(1, 64), 150)
    assert sizes_for(users, lambda _: True).batches[()].sizes == (1, 4, 64, 200)


def test_versions_of_one_servable_count_once() -> None:
    unit = trunk(1, 64)
    versions = {("model", number): Member(unit, 256) for number in (1, 2, 3)}
    assert larger_sizes(versions, ()) == []
    assert larger_sizes({**versions, ("other", 1): Member(unit, 256)}, ()) == [128]


def test_sizes_that_cannot_be_had_are_left_out() -> None:
    users = members(*[trunk(1, 64)] * 4)
    sizes = sizes_for(users, lambda bucket: bucket[0] <= 128)
    assert sizes.batches[()].sizes == (1, 64, 128)


def test_a_unit_with_a_program_a_size_has_these_sizes_only() -> None:
    fixed = Program(blob=ANY.blob, platforms=("cpu",), batch=8)
    unit = replace(trunk(8), programs=(fixed,))
    users = members(unit, unit)
    assert larger_sizes(users, ()) == ()
    assert maker_of(users, (8, ())) == ("model-1", 1)


def test_lengths_are_put_together_and_rows_are_only_as_long_as_their_servable_says() -> None:
    short, long = trunk(1, 4, lengths=(8, 16)), trunk(2, lengths=(12, 32))
    sizes = sizes_for(members(short, long), lambda _: True)
    assert sizes.symbols["t"].sizes == (8, 12, 16, 32)
    # Rows of either may be as long as 16, those of the second longer.
    assert {shape: ladder.sizes for shape, ladder in sizes.batches.items()} == {
        (8,): (1, 2, 4, 6), (12,): (1, 2, 4, 6), (16,): (1, 2, 4, 6), (32,): (2,),
    }  # fmt: skip
    assert maker_of(members(short, long), (2, (32,))) == ("model-1", 1)
    assert maker_of(members(long, short), (2, (32,))) == ("model-0", 1)


def test_numbers_of_requests_are_those_of_whoever_may_send_the_rows() -> None:
    inputs = {"user": Spec(("b", 4), per="request"), "x": Spec(("b", 2))}
    first = replace(trunk(1, 4), inputs=inputs, request_buckets=(2,))
    second = replace(first, batch_buckets=(4,), request_buckets=(1, 3))
    sizes = sizes_for(members(first, second), lambda _: True)
    assert {batch: ladder.sizes for (batch, _), ladder in sizes.requests.items()} == {
        1: (1,), 4: (1, 2, 3, 4), 8: (1, 2, 3, 8),
    }  # fmt: skip
    assert (8, (3,)) in sizes.buckets
    few = sizes_for(members(first, second), lambda bucket: bucket[1] != (3,))
    assert few.batches[()].sizes == (1, 4)
    assert maker_of(members(first, second), (8, (3,))) == ("model-1", 1)


buckets = st.sets(st.integers(1, 40), min_size=1, max_size=3).map(sorted).map(tuple)


@given(
    st.lists(st.tuples(buckets, buckets, buckets), min_size=1, max_size=4),
    st.integers(1, 100),
    st.data(),
)
def test_whatever_a_member_may_send_has_a_lane_with_its_own_sizes(
    drawn: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]],
    bound: int,
    data: st.DataObject,
) -> None:
    units = []
    for batches, t, u in drawn:
        unit = trunk(*batches, lengths=t)
        inputs = {"x": Spec(("b", "t", "u"))}
        units.append(replace(unit, inputs=inputs, length_buckets={"t": t, "u": u}))
    users = members(*units, bound=bound)
    sizes = sizes_for(users, lambda _: True)
    unit = data.draw(st.sampled_from(units))
    sent = {
        symbol: data.draw(st.integers(0, ladder[-1]))
        for symbol, ladder in unit.length_buckets.items()
    }
    shape = bucketize(sent, sizes.symbols)
    assert admits(unit, shape)
    assert set(unit.batch_buckets) <= set(sizes.batches[shape].sizes)
    together = sum(each.batch_buckets[-1] for each in units if admits(each, shape))
    declared = max(each.batch_buckets[-1] for each in units if admits(each, shape))
    assert sizes.batches[shape].largest == max(declared, min(together, bound))
    for bucket in sizes.buckets:
        assert admits(users[maker_of(users, bucket)].unit, bucket[1])
