"""The model of ``faults``: an answer says for what it was asked and which version each part is."""

from __future__ import annotations

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.faults_model import NUMBERS, read_answer, request
from bench.faults_unit import GROUP_ROWS, GROUPS, ids_of, load


def chain(number: int, **changed: object) -> bytes:
    """The body of the right answer of version 3, by life 9, with some of it changed."""
    told = {
        "stamp": [float(number), 9.0, 3.0],
        "ids": [float(row) for row in ids_of(number)],
        "table": [3.0] * GROUPS,
        "versions": [3.0],
        **changed,
    }
    return orjson.dumps({"predictions": [told]})


@given(st.integers(0, NUMBERS - 1))
def test_every_number_asks_one_row_of_every_partition(number: int) -> None:
    assert [row // GROUP_ROWS for row in ids_of(number)] == list(range(GROUPS))
    assert read_answer("chain", chain(number)) == (number, (3,) * (GROUPS + 2), 9)
    assert np.float32(number) == number


def test_host_unit_tells_number_version_and_a_life_of_its_own() -> None:
    first, second = (load({}, {"version": 4})({"number": np.asarray([b"17"])}) for _ in range(2))
    assert first["stamp"][0, [0, 2]].tolist() == [17.0, 4.0]
    assert first["stamp"][0, 1] != second["stamp"][0, 1] > 0
    assert first["ids"].tolist() == [ids_of(17)]


def test_a_part_of_another_version_is_seen() -> None:
    reading = read_answer("chain", chain(5, table=[3.0, 3.0, 2.0, 3.0]))
    assert set(reading.versions) == {2, 3}
    assert set(read_answer("chain", chain(5, versions=[1.0])).versions) == {1, 3}


def test_rows_of_another_request_are_no_answer() -> None:
    with pytest.raises(ValueError, match=r"rows .* for number 5"):
        read_answer("chain", chain(5, ids=[float(row) for row in ids_of(6)]))


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", b'{"predictions": []}', b'{"predictions": [1]}', chain(5, stamp=[5.0, 1.5, 3.0])],
)
def test_what_is_no_answer_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_answer("chain", body)


def test_plain_answer_tells_number_and_version() -> None:
    assert read_answer("plain", b'{"predictions": [[41.0, 2.0]]}') == (41, (2,), 0)
    assert orjson.loads(request("plain", 41).body) == {"instances": [[41.0, 0.0]]}
    assert orjson.loads(request("chain", 41).body) == {"instances": ["41"]}
