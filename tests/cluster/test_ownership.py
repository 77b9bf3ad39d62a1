"""Packages that are not ours, or not all from one place, are refused with what to do."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

import batching
import shards
from batching.errors import FailedPrecondition
from cluster.ownership import check_ownership


def refusal() -> str:
    with pytest.raises(FailedPrecondition) as caught:
        check_ownership()
    return str(caught.value)


def test_our_own_packages_pass() -> None:
    check_ownership()


@pytest.mark.parametrize("marker", ["batching", None])
def test_a_package_of_another_distribution_is_named_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, marker: str | None
) -> None:
    if marker is None:
        monkeypatch.delattr(batching, "__distribution__")
    else:
        monkeypatch.setattr(batching, "__distribution__", marker)
    owners = {"batching": ["shardserve", "batching", "batching"]}
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: owners)
    text = refusal()
    assert "'batching'" in text
    assert str(batching.__file__) in text
    assert "is not ours but of batching" in text
    assert "pip uninstall batching" in text
    assert "pip install --force-reinstall --no-deps shardserve" in text


def test_a_package_of_nobody_is_another_projects(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stray folder of the same name has no distribution."""
    monkeypatch.setattr(shards, "__distribution__", "")
    monkeypatch.setattr(importlib.metadata, "packages_distributions", dict)
    assert "another project" in refusal()


def test_packages_from_two_places_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shards, "__file__", str(tmp_path / "shards" / "__init__.py"))
    text = refusal()
    assert f"shards from {tmp_path}" in text
    assert "change directory" in text
