"""The combines of partitions' answers: what each makes of them, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.combines import COMBINES
from shards.errors import SpecMismatch

Array = npt.NDArray[Any]


def combined(name: str, arrays: Sequence[Array]) -> Array:
    return COMBINES.get(name)([{"y": array} for array in arrays])["y"]


parts = st.integers(1, 5).flatmap(
    lambda count: st.lists(
        st.lists(st.integers(-999, 999), min_size=6, max_size=6), min_size=count, max_size=count
    )
)


@given(parts, st.sampled_from(["int32", "float32", "float64"]))
def test_sums_of_whole_numbers_are_exact(numbers: list[list[int]], dtype: str) -> None:
    arrays = [np.array(each, dtype).reshape(3, 2) for each in numbers]
    assert combined("sum", arrays).tolist() == np.sum(arrays, axis=0).tolist()


@given(parts)
def test_the_greatest_of_every_element_is_kept(numbers: list[list[int]]) -> None:
    arrays = [np.array(each, np.float32).reshape(3, 2) for each in numbers]
    assert combined("max", arrays).tolist() == np.max(arrays, axis=0).tolist()


@given(parts)
def test_partitions_lie_side_by_side_in_their_order(numbers: list[list[int]]) -> None:
    arrays = [np.array(each, np.int64).reshape(3, 2) for each in numbers]
    assert combined("concat", arrays).tolist() == np.hstack(arrays).tolist()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_short_floats_are_added_in_32_bits(dtype: Any) -> None:
    # In 16 bits every one of the small ones would be rounded away.
    arrays = [np.array([[2048.0]], dtype), *[np.array([[1.0]], dtype)] * 64]
    found = combined("sum", arrays)
    assert (found.dtype, float(found[0, 0])) == (np.dtype(dtype), 2112.0)


def test_a_mean_is_over_the_partitions() -> None:
    arrays = [np.array([[1.0, 4.0]], np.float32), np.array([[2.0, 8.0]], np.float32)]
    assert combined("mean", arrays).tolist() == [[1.5, 6.0]]


def test_nan_is_the_greatest_of_all() -> None:
    arrays = [np.array([[np.nan]], np.float32), np.array([[1.0]], np.float32)]
    assert np.isnan(combined("max", arrays)[0, 0])


@given(st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=4))
def test_topk_is_what_a_stable_sort_of_everything_gives(scores: list[list[int]]) -> None:
    """Of equal scores those of earlier partitions come first; names go with their scores."""
    answers = [
        {
            "scores": np.array([row], np.float32),
            "ids": np.array([[10 * part + place for place in range(3)]]),
        }
        for part, row in enumerate(scores)
    ]
    found = COMBINES.get("topk")(answers)
    everything = [
        (-score, 10 * part + place)
        for part, row in enumerate(scores)
        for place, score in enumerate(row)
    ]
    best = sorted(everything, key=lambda each: each[0])[:3]
    assert found["scores"].tolist() == [[-score for score, _ in best]]
    assert found["ids"].tolist() == [[number for _, number in best]]


@pytest.mark.parametrize("name", ["sum", "mean", "max"])
def test_text_is_neither_added_nor_compared(name: str) -> None:
    text = np.array([[b"a"]], object)
    with pytest.raises(SpecMismatch, match="'y' is text"):
        combined(name, [text, text])


def test_what_has_no_axis_but_the_batch_is_not_joined() -> None:
    with pytest.raises(SpecMismatch, match="no axis but the batch"):
        combined("concat", [np.zeros(3), np.zeros(3)])


def test_topk_needs_scores_and_outputs_of_their_shape() -> None:
    topk = COMBINES.get("topk")
    with pytest.raises(SpecMismatch, match="needs an output 'scores'"):
        topk([{"y": np.zeros((1, 2))}])
    with pytest.raises(SpecMismatch, match="'y' has not the shape"):
        topk([{"scores": np.zeros((1, 2)), "y": np.zeros((1, 3))}])
