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


def test_prototype_alone_has_figures_and_no_ratio() -> None:
    result = _result(_PROTOTYPE, answers_bit_equal=None)
    assert result.ratios == {}
    assert "product_c1_rps" not in result.figures
    assert not any("agree" in note for note in result.notes)


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
def test_prototype_is_measured_end_to_end() -> None:
    own = argparse.Namespace(floor_only=True)
    result = ingress_floor.BENCH.run(Options(quick=True, rounds=1, own=own))
    assert result.ratios == {}
    rate = result.figures["prototype_c32_rps"]
    assert isinstance(rate, float)
    assert rate > 100
