"""Names that packages add: which object each is, and what is said where it is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from batching.errors import FailedPrecondition
from shards.registry import Registry
from tests.plugins import importable

GROUP = "shardserve.tests"


def ours() -> str:
    return "ours"


def package(folder: Path, name: str, entries: str, code: str = "") -> Path:
    """A package as pip leaves it: a module and what describes it."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{entries}\n")
    (folder / f"{name}.py").write_text(code)
    return folder


def registry() -> Registry[Any]:
    return Registry(GROUP, "greeting", {"ours": ours})


def test_a_name_of_ours_is_found() -> None:
    assert registry().get("ours") is ours


def test_a_package_adds_a_name(tmp_path: Path) -> None:
    package(tmp_path, "polite", "hello = polite:hello", "def hello(): return 'hello'")
    with importable(tmp_path, "polite"):
        assert registry().get("hello")() == "hello"


def test_names_are_listed_without_importing_anything(tmp_path: Path) -> None:
    package(tmp_path, "broken", "hello = broken:hello", "raise RuntimeError('imported')")
    with importable(tmp_path, "broken"):
        assert registry().names == ("hello", "ours")


def test_a_package_does_not_replace_a_name_of_ours(tmp_path: Path) -> None:
    package(tmp_path, "bold", "ours = bold:ours", "def ours(): return 'theirs'")
    with importable(tmp_path, "bold"):
        assert registry().get("ours") is ours


def test_an_unknown_name_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(FailedPrecondition, match=r"no greeting 'hallo' here; known are: ours\."):
        registry().get("hallo")


def test_a_name_that_two_packages_claim_is_refused_and_both_are_named(tmp_path: Path) -> None:
    package(tmp_path / "1", "first", "hello = first:hello", "def hello(): ...")
    package(tmp_path / "2", "second", "hello = second:hello", "def hello(): ...")
    with (
        importable(tmp_path / "1", "first"),
        importable(tmp_path / "2", "second"),
        pytest.raises(FailedPrecondition, match="'hello' is offered by first and second"),
    ):
        registry().get("hello")


def test_a_package_found_twice_claims_a_name_once(tmp_path: Path) -> None:
    for copy in ("1", "2"):
        package(tmp_path / copy, "twin", "hello = twin:hello", "def hello(): return 'hello'")
    with importable(tmp_path / "1", "twin"), importable(tmp_path / "2", "twin"):
        assert registry().get("hello")() == "hello"


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("raise RuntimeError('no luck')", "RuntimeError: no luck"),
        ("", "has no attribute 'hello'"),
        ("hello = 'text'", "cannot be called"),
    ],
)
def test_a_package_that_cannot_be_used_is_named_with_the_reason(
    tmp_path: Path, code: str, why: str
) -> None:
    package(tmp_path, "broken", "hello = broken:hello", code)
    with (
        importable(tmp_path, "broken"),
        pytest.raises(FailedPrecondition, match=rf"'hello' \(broken:hello of broken\).*{why}"),
    ):
        registry().get("hello")
