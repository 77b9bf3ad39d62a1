"""What ``isolation-load`` makes of its book: latency within loads against the quiet before."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import isolation_load, large_model
from bench.errors import ContenderFailed
from bench.isolation_load import Round
from bench.traffic import Attempt, Span
from shards.manifest import MapUnit
from shards.store import LocalStore

ROUNDS = [
    Round(Span(0.0, 1.0), Span(1.0, 2.0)),
    Round(Span(3.0, 4.0), Span(4.0, 5.0)),
]


def book() -> list[Attempt]:
    """2 ms when it is quiet, 3 ms within a load, 9 ms while the large model is unloaded."""
    took = {0: 0.002, 1: 0.003, 2: 0.009, 3: 0.002, 4: 0.003}
    return [
        Attempt(owner, second + part / 10, took[second], 200, (1,))
        for second in took
        for part in range(10)
        for owner in ("plain", "sharded")
    ]


def test_only_what_was_due_within_a_load_is_held_against_the_quiet() -> None:
    result = isolation_load._result(book(), ROUNDS, {}, 0)
    assert result.ratios == {"p99_inside_load_window_vs_quiet": pytest.approx(1.5)}
    assert result.figures["load_s"] == 1.0
    assert result.plot is not None
    assert [at for at, _ in result.plot.uprights] == [1.0, 2.0, 4.0, 5.0]


def test_a_round_without_answers_measures_nothing() -> None:
    early = [each for each in book() if each.due < 4]
    with pytest.raises(ContenderFailed, match="nothing was answered"):
        isolation_load._result(early, ROUNDS, {}, 0)


def test_versions_of_the_large_model_have_equal_weights_and_other_programs(tmp_path: Path) -> None:
    large_model.save(tmp_path, (1, 2), 0, seed=0)
    units = []
    for version in (1, 2):
        [unit] = LocalStore(tmp_path).read_manifest(large_model.NAME, version).units.values()
        assert isinstance(unit, MapUnit)
        units.append(unit)
    assert units[0].params == units[1].params
    assert units[0].programs != units[1].programs
    assert units[0].batch_buckets == large_model.BUCKETS
