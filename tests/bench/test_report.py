"""What is printed and what is kept of a result."""

from __future__ import annotations

import csv
import json
import math
from datetime import UTC, datetime
from pathlib import Path

import pytest

from bench.marks import Mark, Verdict
from bench.report import (
    Result,
    Samples,
    Table,
    histogram_samples,
    json_line,
    machine,
    print_result,
    print_verdicts,
    save,
    show,
)
from bench.stats import Estimate, Histogram

_RESULT = Result(
    bench="fake",
    ratios={"ratio": 0.75},
    figures={"rps": 1200.0, "machine": {"cpus": 2}, "interval": [1, 2]},
    tables=(Table(title="A table", columns=("server", "rps"), rows=(("product", 1234.5),)),),
    samples={"raw": Samples(columns=("x", "note"), rows=[(1.5, "a,b"), (2, "c")])},
    notes=("Brackets [stay] as they are.",),
)


def test_json_line_is_one_line_of_the_three_keys() -> None:
    line = json_line(_RESULT)
    assert "\n" not in line
    assert json.loads(line) == {
        "bench": "fake",
        "ratios": {"ratio": 0.75},
        "figures": {"rps": 1200.0, "machine": {"cpus": 2}, "interval": [1, 2]},
    }


def test_json_line_stays_json_when_a_ratio_is_not_finite() -> None:
    line = json_line(Result(bench="fake", ratios={"ratio": math.inf}, figures={}))
    assert json.loads(line)["ratios"] == {"ratio": None}


def test_save_keeps_the_line_and_the_samples(tmp_path: Path) -> None:
    now = datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)
    folder = save(_RESULT, parent=tmp_path / "results", now=now)
    assert folder.name == "fake-20260102T030405.000678Z"
    assert (folder / "result.json").read_text() == json_line(_RESULT) + "\n"
    with (folder / "raw.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["x", "note"], ["1.5", "a,b"], ["2", "c"]]


def test_save_never_overwrites(tmp_path: Path) -> None:
    now = datetime(2026, 1, 2, tzinfo=UTC)
    save(_RESULT, parent=tmp_path, now=now)
    with pytest.raises(FileExistsError):
        save(_RESULT, parent=tmp_path, now=now)


def test_print_result_shows_tables_and_notes(capsys: pytest.CaptureFixture[str]) -> None:
    print_result(_RESULT)
    printed = capsys.readouterr().out
    for text in ("A table", "server", "product", "1,234", "Brackets [stay] as they are."):
        assert text in printed


def test_print_verdicts_shows_what_was_missed(capsys: pytest.CaptureFixture[str]) -> None:
    mark = Mark(comparison=">=", value=0.6)
    verdicts = [
        Verdict(key="one", mark=mark, measured=0.9),
        Verdict(key="two", mark=mark, measured=0.5),
        Verdict(key="three", mark=mark, measured=None),
    ]
    print_verdicts("fake", verdicts)
    rows = {
        line.split("│")[1].strip(): line
        for line in capsys.readouterr().out.splitlines()
        if "│" in line
    }
    assert "met" in rows["one"]
    assert "MISSED" in rows["two"]
    assert "MISSED" in rows["three"]
    assert "not measured" in rows["three"]


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ("text", "text"),
        (1234567, "1,234,567"),
        (12345.6, "12,346"),
        (0.0123456, "0.0123"),
        (-2500.0, "-2,500"),
        (math.nan, "nan"),
        (Estimate(value=0.5, low=0.25, high=1.0, rounds=3), "0.5 [0.25, 1]"),
    ],
)
def test_show(cell: float | int | str | Estimate, text: str) -> None:
    assert show(cell) == text


def test_table_refuses_a_row_of_another_width() -> None:
    with pytest.raises(ValueError, match="'T'"):
        Table(title="T", columns=("a", "b"), rows=((1,),))


def test_histogram_samples_keep_every_sample() -> None:
    samples = histogram_samples(Histogram.of([2.0, 1.0, 2.0]), unit="us")
    assert samples == Samples(columns=("us", "count"), rows=[(1.0, 1), (2.0, 2)])


def test_machine_says_what_a_figure_depends_on() -> None:
    found = machine()
    assert found["cpu"]
    assert isinstance(found["cpus"], int)
    assert found["jax"]
    json.dumps(found)
