"""What ``swap`` does to versions, what its answers tell, and what is made of its books."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import orjson
import pytest

from bench import swap
from bench.errors import ContenderFailed
from bench.operating import metric
from bench.swap import Change, Step, plan, rounds_of
from bench.swap_model import SERVABLES, VERSIONS_MAX, kinds, read, save
from bench.traffic import Attempt, Span, latencies_ms
from shards.manifest import MapUnit
from shards.store import LocalStore


def test_versions_only_go_up_and_rollbacks_go_one_back() -> None:
    steps = plan(50, 10)
    assert sum(step.is_rollback for step in steps) == 10
    assert {step.servable for step in steps if step.is_rollback} == set(SERVABLES)
    newest = dict.fromkeys(SERVABLES, 1)
    serving = dict(newest)
    for step in steps:
        assert step.version != serving[step.servable]
        if step.is_rollback:
            assert step.version == newest[step.servable] - 1
        else:
            assert step.version == newest[step.servable] + 1
            newest[step.servable] = step.version
        serving[step.servable] = step.version
    assert max(newest.values()) <= VERSIONS_MAX


@pytest.mark.parametrize(("swaps", "rollbacks"), [(6, 2), (7, 0), (1, 1), (50, 10), (13, 5)])
def test_as_many_changes_are_planned_as_were_asked_for(swaps: int, rollbacks: int) -> None:
    steps = plan(swaps, rollbacks)
    assert sum(not step.is_rollback for step in steps) == swaps
    assert sum(step.is_rollback for step in steps) == rollbacks


def test_there_are_no_more_rollbacks_than_swaps() -> None:
    with pytest.raises(ValueError, match="as many swaps"):
        plan(1, 2)


def body(**told: object) -> bytes:
    return orjson.dumps({"predictions": [told]})


@pytest.mark.parametrize("version", [1, 3, VERSIONS_MAX])
def test_answers_of_one_version_tell_it_by_every_part(version: int) -> None:
    plain = body(first=[float(version)] * 4, both=[float(version**2)] * 4)
    assert read("plain", plain) == (version,) * 8
    both = 4.0 * 16 * version**2
    sharded = body(rows=[float(version)] * 4, both=[both] * 4)
    assert set(read("sharded", sharded)) == {version}


@pytest.mark.parametrize(
    ("servable", "told"),
    [
        ("plain", {"first": [2.0] * 4, "both": [6.0] * 4}),
        ("plain", {"first": [2.0, 2.0, 3.0, 2.0], "both": [4.0, 4.0, 9.0, 4.0]}),
        ("sharded", {"rows": [2.0, 2.0, 3.0, 2.0], "both": [16.0 * 9 * 2] * 4}),
        ("sharded", {"rows": [2.0] * 4, "both": [16.0 * 8 * 3] * 4}),
        ("sharded", {"rows": [2.0] * 4, "both": [300.0] * 4}),
    ],
)
def test_an_answer_of_parts_of_two_versions_is_seen(servable: str, told: dict[str, object]) -> None:
    assert Attempt("a", 0.0, 0.0, 200, read(servable, body(**told))).is_mixed


@pytest.mark.parametrize("text", [b"", b"{}", b'{"predictions": [{"first": [0], "both": [1]}]}'])
def test_what_is_no_answer_is_not_read(text: bytes) -> None:
    with pytest.raises(ValueError, match="not an answer"):
        read("plain", text)


def test_a_sharded_request_asks_every_partition() -> None:
    (_, sharded) = kinds(3)
    ids = orjson.loads(sharded.request.body)["instances"][0]
    assert [number >> 14 for number in ids] == [0, 1, 2, 3]


def test_saved_versions_differ_in_weights_and_share_their_programs(tmp_path: Path) -> None:
    for servable in SERVABLES:
        for version in (1, 2):
            save(tmp_path, servable, version)
        units = [
            [unit for unit in manifest.units.values() if isinstance(unit, MapUnit)]
            for manifest in (LocalStore(tmp_path).read_manifest(servable, at) for at in (1, 2))
        ]
        assert [unit.programs for unit in units[0]] == [unit.programs for unit in units[1]]
        assert [unit.id for unit in units[0]] != [unit.id for unit in units[1]]


def changes() -> list[Change]:
    """Two changes, each after a second of quiet."""
    return [
        Change(Step("plain", 2, False), Span(0.0, 1.0), Span(1.0, 2.0), 0.75),
        Change(Step("plain", 1, True), Span(2.0, 3.0), Span(3.0, 4.0), 0.75),
    ]


def attempts(until: float = 4.0) -> list[Attempt]:
    """A request each tenth of a second: 2 ms when it is quiet, 3 ms within a change."""
    found = []
    for tenth in range(int(10 * until)):
        due = tenth / 10
        version = 2 if 1 <= due < 3 else 1
        took = 0.003 if 1 <= due < 2 or 3 <= due < 4 else 0.002
        found.append(Attempt("plain", due, took, 200, (version, version)))
    return found


def result(found: list[Attempt], failed: int = 0) -> dict[str, float]:
    whole = Span(0.0, 4.0)
    return dict(swap._result(found, changes(), whole, 0.0, {}, failed, 0).ratios)


def test_latency_within_changes_is_held_against_the_quiet_before_them() -> None:
    ratios = result(attempts())
    assert ratios["swapped_model_p99_vs_quiet"] == pytest.approx(1.5)
    assert ratios["failed_requests"] == ratios["mixed_version_answers"] == 0


def test_failed_and_mixed_answers_are_counted_and_no_latency_of_theirs() -> None:
    found = [
        *attempts(),
        Attempt("plain", 0.5, 9.0, 503, ()),
        Attempt("plain", 1.5, 0.003, 200, (1, 2)),
    ]
    ratios = result(found, failed=1)
    assert (ratios["failed_requests"], ratios["mixed_version_answers"]) == (1, 1)
    assert ratios["swapped_model_p99_vs_quiet"] == pytest.approx(1.5)


def test_a_change_that_nobody_saw_measures_nothing() -> None:
    with pytest.raises(ContenderFailed, match="never seen"):
        result([each for each in attempts() if each.told == (1, 1)])


def test_rounds_are_consecutive_and_have_every_change() -> None:
    many = [change._replace(took_s=float(at)) for at, change in enumerate(changes() * 20)]
    rounds = rounds_of(many)
    assert [change.took_s for each in rounds for change in each] == list(map(float, range(40)))
    assert {len(each) for each in rounds} <= {6, 7}
    assert len(rounds_of(many[:3])) == 1


def test_latencies_are_those_of_right_answers_that_were_due_in_the_span() -> None:
    found = [*attempts(), Attempt("other", 1.0, 1.0, 200, (1,))]
    assert latencies_ms(found, ["plain"], Span(0.9, 1.1)) == pytest.approx([2.0, 3.0])
    assert len(latencies_ms(found, ["plain", "other"], Span(0.0, 4.0))) == 41


def test_a_metric_is_summed_over_its_labels_and_not_taken_for_a_longer_name() -> None:
    text = 'a_total{device="0"} 2\na_total{device="1"} 3\na_total_more 9\n# HELP a_total x\n'
    assert metric(text, "a_total") == 5
    assert metric("a_total 7\n", "a_total") == 7
    assert metric(text, "b") == 0


def test_the_plot_shows_every_latency_and_every_change() -> None:
    drawn = swap._plot(attempts(), changes(), Span(0.0, 4.0))
    assert [len(series.x) for series in drawn.series] == [40, 0]
    assert [at for at, _ in drawn.uprights] == [1.0, 3.0]
    assert np.median(drawn.series[0].y) == pytest.approx(2.5, abs=0.6)
