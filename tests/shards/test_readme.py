"""The README's code runs as it is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import shards

README = Path(shards.__file__).with_name("README.md")


def test_the_readmes_examples_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)  # noqa: S102 - our own document
    assert "encoder version 1" in capsys.readouterr().out
    assert shards.LocalStore(tmp_path / "store").servables() == ("digits", "encoder")


def test_the_readme_names_modules_that_exist() -> None:
    table = README.read_text().partition("## Where to find it")[2]
    named = re.findall(r"`(\w+)`", table)
    assert len(named) >= 15
    for name in named:
        assert README.with_name(f"{name}.py").is_file(), name
