"""Memory in which batches are laid out, and why a slot waits for its step's end."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.specs import DTYPES
from shards.staging import (
    ALIGNMENT,
    Layout,
    Source,
    StagingPool,
    aligned,
    fill,
    layout_bytes,
)
from tests.shards.serving import Array

FLOAT = np.dtype(np.float32)
NUMBERS = [dtype for name, dtype in DTYPES.items() if name != "string"]


def layout(*shapes: tuple[int, ...], dtype: np.dtype[np.generic] = FLOAT) -> Layout:
    return tuple((shape, dtype) for shape in shapes)


# --- the pool ----------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [1, 63, 64, 65, 10_000])
def test_memory_begins_on_the_boundary_zeroed_and_of_the_asked_size(nbytes: int) -> None:
    memory = aligned(nbytes)
    assert memory.nbytes == nbytes
    assert memory.ctypes.data % ALIGNMENT == 0
    assert not memory.any()


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple),
            st.sampled_from(NUMBERS),
        ),
        min_size=1,
        max_size=4,
    ).map(tuple)
)
def test_every_view_is_aligned_and_none_overlaps_another(wanted: Layout) -> None:
    pool = StagingPool(2)
    pool.reserve(wanted)
    assert pool.nbytes == 2 * layout_bytes(wanted)
    views = [*pool.views(0, wanted), *pool.views(1, wanted)]
    for view, (shape, dtype) in zip(views, wanted * 2, strict=True):
        assert (view.shape, view.dtype) == (shape, dtype)
        assert view.ctypes.data % ALIGNMENT == 0 or view.nbytes == 0
    for one in range(len(views)):
        for other in range(one):
            assert not np.may_share_memory(views[one], views[other])


def test_views_of_a_slot_are_the_same_memory_every_time() -> None:
    pool = StagingPool(1)
    wanted = layout((4, 2))
    pool.reserve(wanted)
    pool.views(0, wanted)[0][:] = 5
    assert pool.views(0, wanted)[0].tolist() == [[5.0, 5.0]] * 4
    assert pool.views(0, wanted)[0] is pool.views(0, wanted)[0]


def test_two_layouts_use_the_same_memory_of_a_slot() -> None:
    pool = StagingPool(1)
    small, large = layout((1, 8)), layout((8, 8))
    pool.reserve(small)
    pool.reserve(large)
    assert pool.nbytes == layout_bytes(large)
    pool.views(0, large)[0][:] = 3
    assert pool.views(0, small)[0].tolist() == [[3.0] * 8]


def test_growing_leaves_the_views_that_are_in_flight_alone() -> None:
    pool = StagingPool(1)
    small, large = layout((2, 2)), layout((64, 64))
    pool.reserve(small)
    slot = pool.acquire()
    assert slot == 0
    (in_flight,) = pool.views(slot, small)
    in_flight[:] = 7
    pool.reserve(large)
    pool.views(slot, large)[0][:] = 1
    pool.views(slot, small)[0][:] = 2
    assert in_flight.tolist() == [[7.0, 7.0], [7.0, 7.0]]
    assert not np.shares_memory(in_flight, pool.views(slot, small)[0])


def test_a_layout_that_fits_changes_nothing() -> None:
    pool = StagingPool(1)
    large = layout((8, 8))
    pool.reserve(large)
    (before,) = pool.views(0, large)
    pool.reserve(layout((1, 1)))
    assert pool.views(0, large)[0] is before


def test_a_forgotten_layout_keeps_no_views() -> None:
    pool = StagingPool(2)
    gone, kept = layout((2, 2)), layout((3, 3))
    pool.reserve(kept)
    pool.reserve(gone)
    before = [pool.views(slot, wanted)[0] for wanted in (gone, kept) for slot in (0, 1)]
    pool.forget(gone)
    after = [pool.views(slot, wanted)[0] for wanted in (gone, kept) for slot in (0, 1)]
    assert [one is other for one, other in zip(before, after, strict=True)] == [False] * 2 + [
        True
    ] * 2


SHAPES = [(1, 1), (2, 9), (8, 8), (5, 7, 3)]


@given(st.lists(st.tuples(st.booleans(), st.sampled_from(SHAPES)), max_size=30))
def test_memory_is_what_the_largest_reserved_layout_needs(
    moves: list[tuple[bool, tuple[int, ...]]],
) -> None:
    pool = StagingPool(3)
    reserved: list[Layout] = []
    for is_reserve, shape in moves:
        wanted = layout(shape)
        if is_reserve:
            growth = pool.growth([wanted])
            before = pool.nbytes
            pool.reserve(wanted)
            reserved.append(wanted)
            assert pool.nbytes == before + growth
        elif wanted in reserved:
            pool.forget(wanted)
            reserved.remove(wanted)
        assert pool.nbytes == 3 * max(map(layout_bytes, reserved), default=0)
        for each in reserved:
            pool.views(0, each)[0][:] = 1


def test_shrinking_leaves_the_views_that_are_in_flight_alone() -> None:
    pool = StagingPool(1)
    small, large = layout((2, 2)), layout((64, 64))
    pool.reserve(small)
    pool.reserve(large)
    slot = pool.acquire()
    assert slot == 0
    (in_flight,) = pool.views(slot, small)
    in_flight[:] = 7
    pool.forget(large)
    pool.views(slot, small)[0][:] = 2
    assert in_flight.tolist() == [[7.0, 7.0], [7.0, 7.0]]


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 4))
def test_slots_are_conserved(takes: list[bool], slots: int) -> None:
    pool = StagingPool(slots)
    out: list[int] = []
    for take in takes:
        if take:
            slot = pool.acquire()
            assert (slot is None) == (len(out) == slots)
            if slot is not None:
                assert slot not in out
                out.append(slot)
        elif out:
            pool.release(out.pop(0))
        assert pool.free + len(out) == slots


def test_a_slot_is_released_once() -> None:
    pool = StagingPool(2)
    slot = pool.acquire()
    assert slot is not None
    pool.release(slot)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(slot)


def test_a_layout_that_nobody_reserved_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="not reserved"):
        StagingPool(1).views(0, layout((4, 4)))


def test_a_pool_has_a_slot() -> None:
    with pytest.raises(ValueError, match="at least one slot"):
        StagingPool(0)


# --- filling -----------------------------------------------------------------------------------


def dirty(*shape: int) -> Array:
    """A view with the rows of an earlier step in it."""
    return np.full(shape, -7.0, np.float32)


def test_rows_are_laid_out_back_to_back_and_the_rest_repeats_the_first_row() -> None:
    one = np.arange(8, dtype=np.float32).reshape(4, 2)
    two = one + 100
    view = dirty(6, 2)
    fill([view], [Source([one], 1, 3), Source([two], 0, 1)], [0.0])
    assert view.tolist() == [[2, 3], [4, 5], [100, 101], [2, 3], [2, 3], [2, 3]]


def test_rows_that_fill_the_bucket_are_not_padded() -> None:
    array = np.arange(3, dtype=np.float32)[:, None]
    view = dirty(3, 1)
    fill([view], [Source([array], 0, 3)], [5.0])
    assert view[:, 0].tolist() == [0, 1, 2]


def test_short_rows_are_padded_with_the_value_of_their_input() -> None:
    word, mask = np.ones((2, 2), np.float32), np.ones((2, 2), np.int32)
    views = [dirty(3, 4), np.full((3, 4), 99, np.int32)]
    fill(views, [Source([word, mask], 0, 2)], [5.0, 0])
    assert views[0].tolist() == [[1, 1, 5, 5]] * 3
    assert views[1].tolist() == [[1, 1, 0, 0]] * 3


def test_padding_rows_repeat_the_padding_of_the_first_row_too() -> None:
    short, full = np.zeros((1, 1), np.float32), np.full((1, 3), 2, np.float32)
    view = dirty(4, 3)
    fill([view], [Source([short], 0, 1), Source([full], 0, 1)], [9.0])
    assert view.tolist() == [[0, 9, 9], [2, 2, 2], [0, 9, 9], [0, 9, 9]]


def test_every_short_dimension_is_padded() -> None:
    array = np.ones((1, 1, 2), np.float32)
    view = dirty(1, 2, 3)
    fill([view], [Source([array], 0, 1)], [4.0])
    assert view.tolist() == [[[1, 1, 4], [4, 4, 4]]]


@given(st.data())
def test_a_bucket_equals_what_numpy_puts_together(data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    lengths = data.draw(st.lists(st.integers(0, 3), min_size=len(counts), max_size=len(counts)))
    bucket = sum(counts) + data.draw(st.integers(0, 3))
    sources: list[Source] = []
    expected: list[Array] = []
    for number, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        start = data.draw(st.integers(0, 2))
        array = np.full((count + start + 1, length), number, np.float32)
        array += np.arange(len(array), dtype=np.float32)[:, None] / 100
        sources.append(Source([array], start, start + count))
        part = array[start : start + count]
        expected.append(np.pad(part, ((0, 0), (0, 3 - length)), constant_values=-1))
    rows = np.concatenate(expected)
    rows = np.concatenate([rows, np.repeat(rows[:1], bucket - len(rows), axis=0)])
    view = dirty(bucket, 3)
    fill([view], sources, [-1.0])
    np.testing.assert_array_equal(view, rows)


# --- the hazard --------------------------------------------------------------------------------

_REWRITE = """
import jax, jax.numpy as jnp, numpy as np
from shards.staging import aligned

def slow(x):
    late = jax.lax.fori_loop(0, 10_000_000, lambda _, y: jnp.sin(y) + 1e-3, jnp.zeros(4))
    return x + 0 * late[0]

run = jax.jit(slow).lower(jax.ShapeDtypeStruct((64, 64), jnp.float32)).compile()
memory = aligned(64 * 64 * 4).view(np.float32).reshape(64, 64)

def read(rewrite):
    memory[:] = 1
    out = run(memory)
    running = not out.is_ready()
    if rewrite == "before the end":
        memory[:] = 2
    out.block_until_ready()
    memory[:] = 3
    return running, float(np.asarray(out)[0, 0])

print(read("before the end"), read("after the end"))
"""


def test_a_cpu_program_reads_aligned_memory_after_the_call_returned() -> None:
    # Why there is a ring of slots at all. In a process of its own: whether a CPU computes while
    # the caller goes on is settled when its backend starts.
    said = run_python(_REWRITE)
    assert said == ["(True, 2.0)", "(True, 1.0)"], "a rewrite must show, unless it waits"


def run_python(code: str) -> Sequence[str]:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=True
    )
    return done.stdout.strip().replace(") (", ")|(").split("|")
