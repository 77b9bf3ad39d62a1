"""Marks: what is read, what is refused, what is met."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from bench.errors import MarksUnreadable
from bench.marks import Mark, judge, read_marks


def _write(folder: Path, text: str) -> Path:
    path = folder / "marks.json"
    path.write_text(text)
    return path


def test_read_marks_leaves_remarks_out(tmp_path: Path) -> None:
    text = '{"_about": "x", "load": {"_issue": "Versions", "ratio": [">=", 0.7]}}'
    assert read_marks(_write(tmp_path, text)) == {
        "load": {"ratio": Mark(comparison=">=", value=0.7)}
    }


@pytest.mark.parametrize(
    ("text", "blamed"),
    [
        ("{", "unexpected end"),
        ("[]", "not an object of benchmarks"),
        ('{"load": 3}', "load: not an object of marks"),
        ('{"load": {"ratio": [">="]}}', r"load\.ratio: not \[comparison, value\]"),
        ('{"load": {"ratio": [">=", true]}}', r"load\.ratio: not \[comparison, value\]"),
        ('{"load": {"ratio": ["~", 1]}}', r"load\.ratio: '~' is not one of"),
    ],
)
def test_read_marks_refuses_and_says_where(tmp_path: Path, text: str, blamed: str) -> None:
    with pytest.raises(MarksUnreadable, match=blamed):
        read_marks(_write(tmp_path, text))


def test_read_marks_names_the_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MarksUnreadable, match=r"absent\.json"):
        read_marks(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("comparison", "below", "at", "above"),
    [
        ("<=", True, True, False),
        ("<", True, False, False),
        (">=", False, True, True),
        (">", False, False, True),
        ("==", False, True, False),
    ],
)
def test_comparisons(comparison: str, *, below: bool, at: bool, above: bool) -> None:
    mark = Mark(comparison=comparison, value=2.0)
    assert (mark.met_by(1.0), mark.met_by(2.0), mark.met_by(3.0)) == (below, at, above)
    assert not mark.met_by(math.nan)


def test_judge_takes_a_ratio_that_was_not_measured_for_missed() -> None:
    marks = {"a": Mark(comparison="<=", value=0), "b": Mark(comparison=">=", value=1)}
    verdicts = judge({"a": 0.0, "unmarked": 9.0}, marks)
    assert [(verdict.key, verdict.measured, verdict.met) for verdict in verdicts] == [
        ("a", 0.0, True),
        ("b", None, False),
    ]
