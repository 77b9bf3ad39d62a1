"""What ingress-floor makes of outcomes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import pytest

from bench import ingress_floor
from bench.load import Outcome
from bench.registry import Options
from bench.report import Figure, Result, json_line
from bench.stats import Histogram


def _outcome(rate: int, latency_us: float) -> Outcome:
    return Outcome(
        answered=rate,
        elapsed_s=1.0,
        latency_us=Histogram.of([latency_us] * 100),
        errors={"read": 0},
    )


_PROTOTYPE = {
    ("prototype", "c1"): [_outcome(100, 50.0), _outcome(50, 100.0), _outcome(80, 60.0)],
    ("prototype", "c32"): [_outcome(1000, 300.0), _outcome(500, 600.0), _outcome(800, 400.0)],
}
_RAW = {
    ("raw", "c1"): [_outcome(200, 25.0), _outcome(100, 50.0), _outcome(160, 30.0)],
    ("raw", "c32"): [_outcome(1400, 200.0), _outcome(700, 400.0), _outcome(1120, 300.0)],
}
_PRODUCT = {
    ("product", "c1"): [_outcome(50, 75.0), _outcome(25, 150.0), _outcome(40, 90.0)],
    ("product", "c32"): [_outcome(700, 400.0), _outcome(350, 800.0), _outcome(560, 500.0)],
}
_CONDITIONS: dict[str, Figure] = {
    "answers_bit_equal": True,
    "generator": "wrk",
    "generator_ceiling_c32_rps": 4000.0,
    "machine": {"load_1min": 0.1, "cpus": 2},
}


def _result(outcomes: dict[tuple[str, str], list[Outcome]], **changed: Figure) -> Result:
    return ingress_floor._result(outcomes, _CONDITIONS | changed, seed=0)


def test_ratios_are_the_marked_ones_paired_by_round() -> None:
    result = _result(_PROTOTYPE | _PRODUCT)
    assert result.ratios == {
        "rps32_vs_prototype": pytest.approx(0.7),
        "p50_1_vs_prototype": pytest.approx(1.5),
    }
    figures = json.loads(json_line(result))["figures"]
    assert figures["prototype_c32_rps"] == 800
    assert figures["product_c1_p50_us"] == 90
    assert figures["intervals"]["rps32_vs_prototype"] == pytest.approx([0.7, 0.7])
    assert figures["generator_headroom"] == 5.0
    assert figures["rounds"] == 3


def test_raw_floor_is_in_figures_and_notes_and_not_in_the_ratios() -> None:
    result = _result(_RAW | _PROTOTYPE | _PRODUCT)
    assert set(result.ratios) == {"rps32_vs_prototype", "p50_1_vs_prototype"}
    figures = json.loads(json_line(result))["figures"]
    assert figures["raw_c32_rps"] == 1120
    assert figures["rps32_vs_raw"] == pytest.approx(0.5)
    assert figures["p50_1_vs_raw"] == pytest.approx(3.0)
    assert figures["intervals"]["rps32_vs_raw"] == pytest.approx([0.5, 0.5])
    assert [row[0] for row in result.tables[0].rows] == ["raw"] * 2 + ["prototype"] * 2 + [
        "product"
    ] * 2
    assert sum("rps32_vs_raw 0.5 [0.5, 0.5]" in note for note in result.notes) == 1


def test_floors_alone_have_figures_and_no_ratio() -> None:
    result = _result(_RAW | _PROTOTYPE)
    assert result.ratios == {}
    assert "raw_c1_rps" in result.figures
    assert "product_c1_rps" not in result.figures
    assert "rps32_vs_raw" not in result.figures
    assert not any("rps32" in note for note in result.notes)


@pytest.mark.parametrize(
    ("quick", "floor_only", "names"),
    [
        (False, False, ["raw", "prototype", "product"]),
        (True, False, ["prototype", "product"]),
        (False, True, ["raw", "prototype"]),
        (True, True, ["raw", "prototype"]),
    ],
)
def test_raw_floor_is_left_out_only_where_time_is_short(
    quick: bool, floor_only: bool, names: list[str]
) -> None:
    options = Options(quick=quick, own=argparse.Namespace(floor_only=floor_only))
    assert [peer.name for peer in ingress_floor._peers(options)] == names


def test_raw_samples_hold_every_latency_of_every_round() -> None:
    samples = _result(_PROTOTYPE | _PRODUCT).samples
    assert len(samples["rounds"].rows) == 12
    assert samples["latency-product-c32-1"].rows == [(800.0, 100)]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({}, "wrk -t1"),
        ({}, "agree bit for bit"),
        ({"generator": "own"}, "wrk is not installed"),
        ({"answers_bit_equal": False}, "not bit for bit"),
        ({"generator_ceiling_c32_rps": 900.0}, "ratio flatters"),
        ({"machine": {"load_1min": 1.5, "cpus": 2}}, "machine was busy"),
    ],
)
def test_notes_tell_the_conditions(changed: dict[str, Figure], told: str) -> None:
    notes: Sequence[str] = _result(_PROTOTYPE | _PRODUCT, **changed).notes
    assert sum(told in note for note in notes) == 1


def test_clean_conditions_raise_no_alarm() -> None:
    notes = " ".join(_result(_PROTOTYPE | _PRODUCT).notes)
    assert "flatters" not in notes
    assert "busy" not in notes


@pytest.mark.slow
def test_floors_are_measured_end_to_end() -> None:
    own = argparse.Namespace(floor_only=True)
    result = ingress_floor.BENCH.run(Options(quick=True, rounds=1, own=own))
    assert result.ratios == {}
    for floor in ("prototype", "raw"):
        rate = result.figures[f"{floor}_c32_rps"]
        assert isinstance(rate, float)
        assert rate > 0
