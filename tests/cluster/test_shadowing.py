"""Shadow copies: sent after the answer, compared, counted, never seen by a client."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from batching.allowance import BEST_EFFORT
from batching.errors import Code
from cluster.doors import shadowing
from cluster.doors.shadowing import agree
from cluster.epochs import Copies, Epoch
from tests.cluster.routing_actors import Asked
from tests.cluster.routing_fakes import epoch, floats, look_up, plain, table_unit, turns
from tests.cluster.test_service import ONE, Door, play

OLD, NEW = plain(version=1, unit_id="old"), plain(version=2, unit_id="new")


def shadowed(number: int = 1, percent: float = 100.0, tolerance: float = 0.0) -> Epoch:
    """Version 1 answers, version 2 is the candidate."""
    return epoch(
        number,
        (OLD, ONE),
        (NEW, ONE),
        splits={"model": {1: 1}},
        copies={"model": Copies(version=2, percent=percent, tolerance=tolerance)},
    )


def of(door: Door, unit: str) -> list[Asked]:
    return [one for one in door.bench.actors["a"].asked if one.header.unit == unit]


async def answer(door: Door, unit: str, factor: float = 2.0) -> None:
    await turns()
    for one in of(door, unit):
        one.answer(np.multiply(one.arrays[0], np.float32(factor), dtype=np.float32))
        door.bench.actors["a"].asked.remove(one)
    await turns()


def counts(door: Door) -> dict[str, int]:
    """Outcomes that were counted, without those that were not."""
    found = {}
    for line in door.scrape().splitlines():
        if line.startswith("serving_shadow_total{") and 'version="2"' in line:
            outcome = line.partition('outcome="')[2].partition('"')[0]
            found[outcome] = int(float(line.rpartition(" ")[2]))
    return {outcome: count for outcome, count in found.items() if count}


@pytest.mark.parametrize(("factor", "outcome"), [(2.0, "agreed"), (3.0, "differed")])
def test_a_copy_is_sent_after_the_answer_and_compared(
    monkeypatch: pytest.MonkeyPatch, factor: float, outcome: str
) -> None:
    async def scenario(door: Door) -> None:
        await door.bench.router.adopt(shadowed())
        door.ask()
        await turns()
        assert of(door, "new") == [], "sent before its request was answered"
        await answer(door, "old")
        [response] = door.responses
        assert (response.status, response.headers) == (200, b"x-servable-version: 1\r\n")
        [copy] = of(door, "new")
        assert np.array_equal(copy.arrays[0], floats(1.0, 2.0))
        await answer(door, "new", factor)
        assert counts(door) == {"due": 1, outcome: 1}
        assert len(door.responses) == 1
        door.bench.check_at_rest()

    play(scenario, monkeypatch)


def test_a_copy_has_the_least_criticality(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(door: Door) -> None:
        await door.bench.router.adopt(shadowed())
        asked: list[int] = []
        submit = door.bench.router.submit

        def noted(*args: Any) -> Any:
            asked.append(args[-1])
            return submit(*args)

        monkeypatch.setattr(door.bench.router, "submit", noted)
        door.ask()
        await answer(door, "old")
        assert asked[1:] == [BEST_EFFORT]
        assert asked[0] > BEST_EFFORT

    play(scenario, monkeypatch)


def test_only_the_declared_part_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(door: Door) -> None:
        await door.bench.router.adopt(shadowed(percent=10.0))
        for _ in range(50):
            door.ask()
            await answer(door, "old")
            await answer(door, "new")
        assert abs(counts(door)["due"] - 5) <= 1

    play(scenario, monkeypatch)


def test_requests_for_the_candidate_and_failed_ones_are_not_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(door: Door) -> None:
        await door.bench.router.adopt(shadowed())
        door.ask(path=b"/v1/models/model/versions/2:predict")
        await answer(door, "new")
        door.ask()
        await turns()
        of(door, "old")[0].refuse(Code.UNAVAILABLE)
        await turns()
        assert counts(door) == {}
        assert [response.status for response in door.responses] == [200, 503]

    play(scenario, monkeypatch)


def test_what_goes_wrong_with_a_copy_is_counted_and_nobodys_trouble(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(door: Door) -> None:
        await door.bench.router.adopt(shadowed())
        door.ask()
        await answer(door, "old")
        of(door, "new")[0].refuse(Code.INTERNAL)
        await turns()
        assert counts(door) == {"due": 1, "failed": 1}
        door.ask()
        await answer(door, "old")
        # The candidate goes while its copy is under way; the deadline ends it.
        await door.bench.router.adopt(epoch(2, (OLD, ONE)))
        assert [response.status for response in door.responses] == [200, 200]
        door.ask()
        await answer(door, "old")
        assert counts(door) == {"due": 2, "failed": 1}

    play(scenario, monkeypatch)


def test_copies_are_bounded_in_number_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(door: Door) -> None:
        await door.bench.router.adopt(shadowed())
        monkeypatch.setattr(shadowing, "_UNDER_WAY_MAX", 2)
        for _ in range(3):
            door.ask()
        await answer(door, "old")
        assert counts(door) == {"due": 3, "dropped": 1}
        await answer(door, "new")
        assert counts(door) == {"due": 3, "dropped": 1, "agreed": 2}
        monkeypatch.setattr(shadowing, "_BYTES_MAX", 8)
        door.ask()
        await answer(door, "old")
        monkeypatch.setattr(shadowing, "_BYTES_MAX", 16)
        monkeypatch.setattr(shadowing, "_COMPARED_BYTES_MAX", 4)
        door.ask()
        await answer(door, "old")
        assert counts(door)["dropped"] == 3
        assert len(door.responses) == 5

    play(scenario, monkeypatch)


def test_a_candidate_with_another_signature_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(door: Door) -> None:
        table = (look_up(table_unit(), version=2), {"unit": [["a"], ["a"], ["a"]]})
        found = epoch(
            1,
            (OLD, ONE),
            table,
            splits={"model": {1: 1}},
            copies={"model": Copies(version=2, percent=100.0, tolerance=0.0)},
        )
        await door.bench.router.adopt(found)
        door.ask()
        await answer(door, "old")
        assert counts(door) == {"due": 1, "failed": 1}
        assert door.bench.actors["a"].asked == []

    play(scenario, monkeypatch)


NAN = float("nan")


@pytest.mark.parametrize(
    ("expected", "found", "tolerance", "same"),
    [
        (floats(1.0, 2.0), floats(1.0, 2.0), 0.0, True),
        (floats(1.0), floats(1.0000001), 0.0, False),
        (floats(1.0), floats(1.0000001), 1e-5, True),
        (floats(0.0), floats(-0.0), 0.0, False),
        (floats(0.0), floats(-0.0), 1e-9, True),
        (floats(NAN), floats(NAN), 0.0, True),
        (floats(NAN), floats(NAN), 1e-5, True),
        (floats(NAN), floats(1.0), 1e-5, False),
        (floats(1.0), floats(1.0, 1.0), 1e-5, False),
        (floats(1.0), np.array([1.0]), 1e-5, False),
        (np.array([10**18]), np.array([10**18 + 1]), 0.5, False),
        (np.array([b"a"], object), np.array([b"a"], object), 0.0, True),
        (np.array([b"a"], object), np.array([b"b"], object), 0.5, False),
        (np.array([1.0], ml_dtypes.bfloat16), np.array([1.01], ml_dtypes.bfloat16), 0.1, True),
        (np.array([1.0], ml_dtypes.bfloat16), np.array([2.0], ml_dtypes.bfloat16), 0.1, False),
    ],
)
def test_which_answers_agree(expected: Any, found: Any, tolerance: float, same: bool) -> None:
    assert agree({"y": expected}, {"y": found}, tolerance) is same
    assert not agree({"y": expected}, {"z": found}, tolerance)
