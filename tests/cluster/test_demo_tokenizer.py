"""The tokenizer as a host unit: shapes, its one limit, refusals, threads."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from batching.errors import DataLoss, FailedPrecondition, InvalidArgument
from cluster.demo import tokenizer
from tests.cluster import demo_support as demo

BEGIN, END, UNKNOWN = 101, 102, 100


def test_rows_are_padded_to_the_longest_of_the_call() -> None:
    out = demo.tokenize()(demo.texts("hello world", "hello"))

    assert out["ids"].tolist() == [[BEGIN, 7592, 2088, END], [BEGIN, 7592, END, 0]]
    assert out["mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert [out[name].dtype for name in ("ids", "mask")] == [np.dtype(np.int32)] * 2


def test_case_and_accents_do_not_matter_to_this_vocabulary() -> None:
    out = demo.tokenize()(demo.texts("CAFÉ", "cafe"))
    assert out["ids"][0].tolist() == out["ids"][1].tolist()


@pytest.mark.parametrize(("repeats", "length"), [(125, 127), (126, 128), (127, 128), (9000, 128)])
def test_a_row_is_cut_at_the_limit_and_keeps_its_end_mark(repeats: int, length: int) -> None:
    out = demo.tokenize()(demo.texts("hello " * repeats))
    assert out["ids"].shape == (1, length)
    assert out["ids"][0, [0, -1]].tolist() == [BEGIN, END]
    assert out["mask"].all()


def test_the_limit_is_the_option_and_not_the_files_own() -> None:
    long = demo.texts("hello " * 400)
    for limit in (3, 200):
        load = tokenizer.load({tokenizer.FILE: demo.tokenizer_file()}, {"limit": limit})
        assert load(long)["ids"].shape == (1, limit)


def test_no_text_makes_no_rows_and_empty_text_makes_two_marks() -> None:
    assert demo.tokenize()(demo.texts())["ids"].shape == (0, 0)
    assert demo.tokenize()(demo.texts(""))["ids"].tolist() == [[BEGIN, END]]


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (b"\xff\xfe", r"text\[1\] is not UTF-8"),
        (b"a" * (tokenizer.BYTES_MAX + 1), r"text\[1\] has 65537 bytes, the limit is 65536"),
    ],
)
def test_a_bad_row_is_refused_by_its_place(bad: bytes, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why):
        demo.tokenize()(demo.texts("fine", bad))


def test_a_row_that_is_not_bytes_is_refused() -> None:
    column: npt.NDArray[Any] = np.array([7], object)
    with pytest.raises(InvalidArgument, match=r"text\[0\] must be bytes, not int"):
        demo.tokenize()({"text": column})


@pytest.mark.parametrize("limit", [None, 2, 0, -1, True, 128.0, "128"])
def test_a_senseless_limit_is_refused_at_load(limit: str | int | float | bool | None) -> None:
    options = {} if limit is None else {"limit": limit}
    with pytest.raises(FailedPrecondition, match="'limit' must be an integer of at least 3"):
        tokenizer.load({tokenizer.FILE: demo.tokenizer_file()}, options)


def test_a_missing_or_broken_file_is_refused_at_load() -> None:
    with pytest.raises(FailedPrecondition, match=r"tokenizer\.json"):
        tokenizer.load({}, {"limit": 128})
    for broken in (b"{}", b"\xff"):
        with pytest.raises(DataLoss, match="is not a tokenizer"):
            tokenizer.load({tokenizer.FILE: broken}, {"limit": 128})


def test_threads_get_the_answers_they_would_get_alone() -> None:
    requests = [demo.texts(f"request {i} " * (i % 7 + 1), "and a friend") for i in range(64)]
    alone = [demo.tokenize()(request)["ids"].tolist() for request in requests]

    with ThreadPoolExecutor(8) as pool:
        together = pool.map(demo.tokenize(), requests)

    assert [out["ids"].tolist() for out in together] == alone


def test_the_library_is_kept_from_starting_threads_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    threads = len(os.listdir("/proc/self/task"))
    load = tokenizer.load({tokenizer.FILE: demo.tokenizer_file()}, {"limit": 128})

    load(demo.texts(*["many rows"] * 500))

    assert len(os.listdir("/proc/self/task")) <= threads
