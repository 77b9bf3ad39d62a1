"""What ``recovery`` makes of its book, and which answers it takes for right."""

from __future__ import annotations

import argparse

import numpy as np
import orjson
import pytest

from bench.recovery import BENCH
from bench.recovery_ends import Ends, ends_of, is_over
from bench.recovery_model import ids_of, kinds, read
from bench.terabyte_model import rows_of
from bench.traffic import WRONG, Attempt

RIGHT = (1,)


def test_two_hosts_may_be_done_without() -> None:
    parser = argparse.ArgumentParser()
    BENCH.add_arguments(parser)
    assert parser.parse_args(["--one-host"]).one_host


def attempt(due: float, status: int = 200, *, took_s: float = 0.25, owner: str = "a") -> Attempt:
    return Attempt(owner, due, took_s, status, RIGHT if status == 200 else WRONG)


def body(ids: np.ndarray, version: int = 1) -> bytes:
    return orjson.dumps({"predictions": rows_of(ids, version).tolist()})


def test_rows_of_the_ids_that_were_asked_for_are_right() -> None:
    ids = np.array([3, 70_000_000])
    assert read(ids, body(ids)) == (1,)


@pytest.mark.parametrize(
    "told",
    [
        body(np.array([3, 70_000_001])),
        body(np.array([3, 70_000_000]), version=2),
        orjson.dumps({"predictions": np.zeros((2, 256)).tolist()}),
        b'{"error": "no"}',
        b"<html>",
    ],
)
def test_other_rows_holes_and_errors_are_not(told: bytes) -> None:
    with pytest.raises(ValueError, match="not "):
        read(np.array([3, 70_000_000]), told)


def test_requests_are_for_rows_that_were_written_and_carry_the_deadline() -> None:
    given = set(ids_of("alone-0", 5).tolist())
    for kind in kinds("alone-0", 5, 2.0):
        asked = orjson.loads(kind.request.body)["instances"]
        assert set(asked) <= given
        assert kind.request.headers["x-request-timeout-ms"] == "2000"


def test_tables_of_other_names_have_other_rows() -> None:
    assert set(ids_of("alone-0", 0).tolist()) != set(ids_of("alone-1", 0).tolist())


def test_ends_are_counted_by_status_and_recovery_from_the_last_that_failed() -> None:
    attempts = [
        attempt(9.0),
        attempt(10.0, 503, took_s=0.5),
        attempt(10.5),  # answered between errors: not recovered yet
        attempt(11.0, 504, took_s=2.0),
        attempt(12.0, took_s=0.25),
        attempt(12.5),
        attempt(11.5, 503, owner="b"),
    ]
    found = ends_of(attempts, "a", 1, at=9.5)
    assert found == Ends(
        table="a", replicas=1, right=4, errors={503: 1, 504: 1}, error_s=2.0, recovered_s=2.75
    )
    assert (found.failed, found.untyped) == (2, 1)


def test_a_wrong_answer_is_a_failure_that_is_not_typed() -> None:
    wrong = Attempt("a", 10.0, 0.1, 200, WRONG)
    found = ends_of([wrong, attempt(11.0)], "a", 2, at=9.5)
    assert (found.right, found.failed, found.untyped) == (1, 1, 1)


def test_a_table_without_a_right_answer_after_its_last_error_has_not_recovered() -> None:
    assert ends_of([attempt(9.0), attempt(10.0, 503)], "a", 1, at=9.5).recovered_s is None


@pytest.mark.parametrize(
    ("attempts", "over"),
    [
        ([attempt(19.0), attempt(19.0, owner="b")], True),
        ([attempt(19.0)], False),  # the other is not answered
        ([attempt(19.0), attempt(19.0, owner="b"), attempt(19.0, 503)], False),
        ([attempt(19.0), attempt(19.0, owner="b"), attempt(17.0, 503)], True),
    ],
)
def test_it_is_over_when_all_tables_have_been_answered_for_a_while(
    attempts: list[Attempt], over: bool
) -> None:
    assert is_over(attempts, ["a", "b"], at=10.0, now=20.0) is over


def test_it_is_not_over_at_once() -> None:
    attempts = [attempt(9.9), attempt(9.9, owner="b")]
    assert not is_over(attempts, ["a", "b"], at=10.0, now=10.1)
