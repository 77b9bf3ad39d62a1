"""Bodies of rows of floats: the compiled reading against the one that knows all of JSON."""

from __future__ import annotations

import json
import random
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api import PredictCodec, make_ready
from cluster.api.jsontext import load
from cluster.api.reading_rows import reads_rows
from shards.specs import Spec
from tests.cluster.api_support import signature

make_ready()

NUMBER = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.floats(width=32, allow_nan=False, allow_infinity=False).map(repr),
    st.integers(-(10**25), 10**25).map(str),
    st.decimals(allow_nan=False, allow_infinity=False, places=12).map(str),
    st.tuples(st.integers(0, 10**20), st.integers(-99, 99)).map(lambda p: f"{p[0]}E{p[1]:+d}"),
    st.sampled_from(["-0", "-0.0", "0.5e1", "1e-400", "1e400", "3.4028235e38", "3.4028236e38"]),
)
SPACE = st.sampled_from(["", "", "", " ", "\n\t ", "\r"])
#: What is not a number in JSON, or not in a row.
BROKEN = ["01", "+1", ".5", "5.", "1e", "1e+", "-", "- 1", "0x1", "NaN", '"1"', "null", "[1]", ""]


def read(body: bytes, size: int, dtype: str) -> np.ndarray | None:
    reader = reads_rows(size, dtype)
    assert reader is not None, "what reads rows was not made ready"
    return reader(body)


def of_json(body: bytes, size: int, dtype: str) -> np.ndarray:
    """By the complete reading alone."""
    codec = PredictCodec(signature({"x": Spec(("b", size), dtype)}))
    return codec.parse_document(load(body)).arrays["x"]


@given(
    st.lists(st.lists(NUMBER, min_size=2, max_size=2), min_size=1, max_size=3),
    SPACE,
    st.sampled_from(["float32", "float64"]),
)
def test_whatever_is_read_is_what_the_complete_reading_says(
    rows: list[list[str]], space: str, dtype: str
) -> None:
    parts = ["{", '"instances"', ":", "["]
    for index, (one, other) in enumerate(rows):
        parts += [*([","] if index else []), "[", one, ",", other, "]"]
    body = space.join([*parts, "]", "}", ""]).encode()
    found = read(body, 2, dtype)
    if found is not None:
        expected = of_json(body, 2, dtype)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.tobytes() == expected.tobytes()


def test_usual_numbers_are_rounded_to_the_nearest_double() -> None:
    drawn = random.Random(7)
    texts = [repr(drawn.gauss(0, 10.0 ** drawn.randrange(-6, 6))) for _ in range(4000)]
    texts += [
        repr(struct.unpack("f", struct.pack("I", drawn.getrandbits(32) & 0xC7FFFFFF | 1 << 29))[0])
        for _ in range(4000)
    ]
    texts += [f"{drawn.randrange(10**19)}e{drawn.randrange(-60, 15)}" for _ in range(4000)]
    body = b'{"instances": [[%s]]}' % ",".join(texts).encode()
    found = read(body, len(texts), "float64")
    assert found is not None
    assert found.tolist() == [[float(text) for text in texts]]


def test_halves_go_to_the_even_neighbour() -> None:
    # 2**53 + 1 lies between two doubles, and so do these.
    texts = ["9007199254740993", "9007199254740995", "4503599627370496.5", "4503599627370497.5"]
    found = read(b'{"instances":[[%s]]}' % ",".join(texts).encode(), 4, "float64")
    assert found is not None
    assert found.tolist() == [[float(text) for text in texts]]


@pytest.mark.parametrize("word", BROKEN)
def test_what_is_no_number_is_left_to_the_complete_reading(word: str) -> None:
    assert read(b'{"instances":[[1,%s]]}' % word.encode(), 2, "float32") is None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"instances":[[1,2]]',
        b'{"instances":[[1,2]]} x',
        b'{"instances":[[1,2],]}',
        b'{"instances":[[1,2,3]]}',
        b'{"instances":[[1],[2]]}',
        b'{"instances":[[1,2]],"signature_name":"other"}',
        b'{"inputs":[[1,2]]}',
        b'{"instances":[{"x":[1,2]}]}',
        b'{"instances":[]}',
        b'{"instances":[' + b"[" * 100_000,
        b'{"instances":[[1,2]],"instances":[[3,4]]}',
    ],
)
def test_other_bodies_are_left_to_the_complete_reading(body: bytes) -> None:
    assert read(body, 2, "float32") is None


def test_every_beginning_of_a_body_is_refused_without_reading_beyond_it() -> None:
    body = json.dumps({"instances": [[1.25e-3, -17.5]]}).encode()
    for stop in range(len(body)):
        assert read(body[:stop], 2, "float32") is None
    assert read(body, 2, "float32") is not None


def test_a_body_of_brackets_takes_no_memory_for_rows_that_it_cannot_hold() -> None:
    assert read(b'{"instances":' + b"[" * 4096, 1 << 40, "float32") is None
