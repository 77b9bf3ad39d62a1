from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batching import Ladder, bucketize, shapes
from batching.errors import InvalidArgument
from batching.testing import ladders


@pytest.mark.parametrize(
    ("sizes", "rows", "bucket"),
    [
        ((2, 4), 2, 2),  # TF Serving: AllowedBatchSizesNoPaddingNeeded
        ((1, 3, 4), 2, 3),  # TF Serving: AllowedBatchSizesRequirePadding
        ((4,), 0, 4),
        ((1, 8, 32), 1, 1),
        ((1, 8, 32), 8, 8),
        ((1, 8, 32), 9, 32),
        ((1, 8, 32), 32, 32),
    ],
)
def test_rows_run_in_the_smallest_bucket_that_holds_them(
    sizes: tuple[int, ...], rows: int, bucket: int
) -> None:
    assert Ladder(sizes).bucket_of(rows) == bucket


@pytest.mark.parametrize("rows", [-1, 33])
def test_a_size_outside_the_ladder_is_refused(rows: int) -> None:
    with pytest.raises(InvalidArgument, match=rf"size {rows} fits none of the buckets \(1, 32\)"):
        Ladder((1, 32)).bucket_of(rows)


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [((), "at least one"), ((0, 2), "positive"), ((4, 2), "ascend"), ((2, 2), "ascend")],
)
def test_a_ladder_that_is_none_is_refused(sizes: tuple[int, ...], complaint: str) -> None:
    # TF Serving: UnsortedAllowedBatchSizesRejected
    with pytest.raises(InvalidArgument, match=complaint):
        Ladder(sizes)


@given(ladders(64), st.data())
@settings(derandomize=True)
def test_no_smaller_bucket_would_do(ladder: Ladder, data: st.DataObject) -> None:
    size = data.draw(st.integers(0, ladder.largest))
    bucket = ladder.bucket_of(size)
    assert bucket in ladder.sizes
    assert bucket >= size
    assert all(other < size for other in ladder.sizes if other < bucket)


def test_ladders_are_values() -> None:
    assert Ladder([1, 2]) == Ladder((1, 2))
    assert Ladder((1, 2)) != Ladder((1, 3))
    assert Ladder((1, 2)) != (1, 2)
    assert len({Ladder((1, 2)), Ladder([1, 2])}) == 1
    assert repr(Ladder((1, 2))) == "Ladder((1, 2))"


def test_the_lane_shape_goes_by_symbol_name_whatever_the_order_of_the_mapping() -> None:
    t, s = Ladder((16, 32)), Ladder((8,))
    assert bucketize({"b": 3, "t": 17, "s": 2}, {"t": t, "s": s}) == (8, 32)
    assert bucketize({"s": 2, "t": 17, "b": 3}, {"s": s, "t": t}) == (8, 32)


def test_a_unit_without_length_symbols_has_one_shape() -> None:
    assert bucketize({"b": 3}, {}) == ()
    assert shapes({}) == [()]


def test_a_length_over_the_limit_is_refused_by_name() -> None:
    with pytest.raises(InvalidArgument, match=r"t: size 33 fits none"):
        bucketize({"t": 33}, {"t": Ladder((16, 32))})


def test_a_length_that_is_missing_is_refused_by_name() -> None:
    with pytest.raises(InvalidArgument, match="size of 't' is not known"):
        bucketize({"b": 1}, {"t": Ladder((16,))})


@given(st.dictionaries(st.sampled_from("bst"), ladders(), max_size=3), st.data())
@settings(derandomize=True)
def test_what_a_request_uses_was_compiled(by: dict[str, Ladder], data: st.DataObject) -> None:
    sizes = {symbol: data.draw(st.integers(0, ladder.largest)) for symbol, ladder in by.items()}
    assert bucketize(sizes, by) in shapes(by)
