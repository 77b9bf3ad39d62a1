"""The command line, on a benchmark that is made up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bench
from bench import cli, registry


@pytest.fixture(autouse=True)
def fake_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {"fake": "tests.bench.fakes"}
    monkeypatch.setattr(registry, "MODULES", modules)
    monkeypatch.setattr(cli, "MODULES", modules)


def _marks(folder: Path, text: str) -> str:
    path = folder / "marks.json"
    path.write_text(text)
    return str(path)


def test_last_line_is_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["fake", "--seed", "3", "--out", str(tmp_path)]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    expected = {"bench": "fake", "ratios": {"answer": 42.0}, "figures": {"rounds": 5, "seed": 3}}
    assert last == expected
    (folder,) = tmp_path.iterdir()
    assert json.loads((folder / "result.json").read_text()) == expected


@pytest.mark.parametrize(
    ("arguments", "rounds"), [([], 5), (["--quick"], 1), (["--quick", "--rounds", "9"], 9)]
)
def test_rounds(
    arguments: list[str], rounds: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.main(["fake", *arguments, "--out", str(tmp_path)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]["rounds"] == rounds


@pytest.mark.parametrize(("answer", "status"), [("41", 1), ("42", 0), ("nan", 1)])
def test_marks_decide_the_status_and_the_line_stays_last(
    answer: str, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marks = _marks(tmp_path, '{"fake": {"answer": [">=", 42]}}')
    arguments = ["fake", "--answer", answer, "--marks", marks, "--out", str(tmp_path)]
    assert bench.main(arguments) == status
    printed = capsys.readouterr().out
    assert ("MISSED" in printed) == bool(status)
    assert json.loads(printed.splitlines()[-1])["bench"] == "fake"


def test_marks_that_do_not_know_the_benchmark_are_an_error_before_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marks = _marks(tmp_path, '{"other": {}}')
    assert bench.main(["fake", "--marks", marks, "--out", str(tmp_path / "results")]) == 2
    captured = capsys.readouterr()
    assert "sets no marks" in captured.err
    assert captured.out == ""
    assert not (tmp_path / "results").exists()


def test_benchmark_that_cannot_run_says_why_and_prints_no_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(["fake", "--broken", "--out", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.err == "bench fake: as asked\n"
    assert captured.out == ""


def test_plot_is_drawn_into_the_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "deep" / "plot.svg"
    assert bench.main(["fake", "--plot", str(plot), "--out", str(tmp_path)]) == 0
    assert "A plot" in plot.read_text() or "<svg" in plot.read_text()


def test_list_names_each_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--list"]) == 0
    assert capsys.readouterr().out.split() == ["fake", "made", "up"]


@pytest.mark.parametrize(
    "arguments", [[], ["absent"], ["fake", "--absent"], ["fake", "--rounds", "0"]]
)
def test_wrong_usage_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(arguments)
    assert ended.value.code == 2
    assert "usage: shardserve bench" in capsys.readouterr().err


def test_help_of_a_benchmark_shows_its_own_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(["fake", "--help"])
    assert ended.value.code == 0
    assert "--answer" in capsys.readouterr().out
