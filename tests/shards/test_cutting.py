"""Tables cut into partitions."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from batching.errors import InvalidArgument
from shards.cutting import Rows, Width, cut
from shards.errors import SpecMismatch

TABLE = np.arange(22, dtype=np.float32).reshape(11, 2)


def gathered(rows: Rows, partitions: int) -> list[np.ndarray]:
    width = Width("words")
    parts = [b"".join(width.checked(pieces)) for pieces in cut(rows, partitions)]
    dtype, dim = width.kind
    return [np.frombuffer(part, dtype).reshape(-1, dim) for part in parts]


@pytest.mark.parametrize("partitions", [1, 2, 3, 4, 11, 15])
def test_an_array_is_cut_into_consecutive_ranges_of_nearly_one_size(partitions: int) -> None:
    parts = gathered(TABLE, partitions)
    assert len(parts) == partitions
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    np.testing.assert_array_equal(np.concatenate(parts), TABLE)


def test_a_callable_gives_partitions_whole_or_in_pieces() -> None:
    def source(index: int) -> np.ndarray | Iterator[np.ndarray]:
        part = TABLE[index * 4 : index * 4 + 4]
        return part if index % 2 else iter([part[:1], part[1:1], part[1:]])

    parts = gathered(source, 3)
    assert [len(part) for part in parts] == [4, 4, 3]
    np.testing.assert_array_equal(np.concatenate(parts), TABLE)


def test_lists_and_strided_arrays_are_rows_too() -> None:
    np.testing.assert_array_equal(gathered([[1.0, 2.0], [3.0, 4.0]], 1)[0], [[1, 2], [3, 4]])
    np.testing.assert_array_equal(gathered(TABLE[::2], 2)[0], TABLE[::2][:3])


def test_an_empty_table_has_a_width() -> None:
    assert [len(part) for part in gathered(np.empty((0, 3), np.float32), 2)] == [0, 0]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (np.arange(3.0), r"\[rows, dim\], got \[1\]"),
        (np.empty((3, 0)), r"\[rows, dim\], got \[1, 0\]"),
        (np.array([["x"]]), "dtype"),
        (lambda index: TABLE[:, : index + 1], "after rows of"),
        (lambda index: TABLE.astype(f"f{4 * (index + 1)}"), "after rows of"),
    ],
)
def test_rows_that_are_no_table_are_refused(rows: Rows, says: str) -> None:
    with pytest.raises(SpecMismatch, match=says):
        gathered(rows, 2)


def test_a_table_of_nothing_has_no_width() -> None:
    with pytest.raises(InvalidArgument, match="'words' was given no array"):
        gathered(lambda _: (), 2)
