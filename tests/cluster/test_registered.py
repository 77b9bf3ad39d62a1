"""Policies and sources of packages: what the controller makes of them, and of their failures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.config import Registered, VersionPolicy
from cluster.control import Declared, ListStore, ReadManifest
from cluster.registered import POLICIES, SOURCES, listed
from shards.store import LocalStore
from tests.cluster.control_fakes import Shell, begun, config, of

AT_MOST = VersionPolicy(registered=Registered(name="at-most", options={"version": 1}))


def test_where_a_packages_policy_fails_nothing_is_loaded_or_unloaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers: list[Any] = [(1,), RuntimeError("no idea"), (2,)]

    def at_most(complete: Sequence[int], options: object) -> Sequence[int]:
        if isinstance(answers[0], Exception):
            raise answers[0]
        found: Sequence[int] = answers[0]
        return found

    monkeypatch.setitem(POLICIES._built_in, "at-most", at_most)
    shell = begun(config("m", policy=AT_MOST))
    shell.serve("m", 1)
    assert shell.versions() == [1]
    answers.pop(0)
    assert of(ReadManifest, shell.listed("m", 1, 2)) == []
    assert shell.versions() == [1]
    assert shell.core.status()["servables"]["m"]["policy"] == "RuntimeError: no idea"
    answers.pop(0)
    assert of(ReadManifest, shell.listed("m", 1, 2)) == [ReadManifest(servable="m", version=2)]
    assert shell.core.status()["servables"]["m"]["policy"] == "ok"


def test_a_policy_that_is_not_installed_is_told_in_the_status() -> None:
    shell = begun(config("m", policy=AT_MOST))
    assert of(ReadManifest, shell.listed("m", 1)) == []
    told = shell.core.status()["servables"]["m"]["policy"]
    assert "there is no version policy 'at-most' here" in told


def test_a_declared_source_is_asked_for_the_versions() -> None:
    source = Registered(name="released")
    declared = config("m")
    servable = dataclasses.replace(declared.servables[0], source=source)
    shell = Shell()
    effects = shell.send(Declared(config=dataclasses.replace(declared, servables=(servable,))))
    assert of(ListStore, effects) == [ListStore(servable="m", source=source)]


@pytest.mark.parametrize("wrong", [0, -1, "7", True, 1.0])
def test_a_source_that_answers_something_else_than_versions_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wrong: Any
) -> None:
    monkeypatch.setitem(SOURCES._built_in, "odd", lambda name, options, store: [3, wrong])
    with pytest.raises(TypeError, match=r"source 'odd' answered .*, which is no version"):
        listed("m", Registered(name="odd"), LocalStore(tmp_path))


def test_what_a_source_names_is_sorted_and_each_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(SOURCES._built_in, "odd", lambda name, options, store: [3, 1, 3])
    assert listed("m", Registered(name="odd"), LocalStore(tmp_path)) == (1, 3)
