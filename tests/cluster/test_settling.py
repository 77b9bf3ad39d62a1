"""When a change of a servable is done, by what the controller's core says of itself."""

from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console

from batching.errors import FailedPrecondition, InvalidArgument, NotFound
from cluster.config import Config, VersionPolicy
from cluster.control import Declared, ReadManifest
from cluster.display import show_versions
from cluster.settling import shares, unsettled
from tests.cluster.control_fakes import Shell, begun, config, loading, manifest, of


def declared(*versions: int, **fields: object) -> Config:
    found = config("m", policy=VersionPolicy(specific=versions))
    servable = dataclasses.replace(found.servables[0], **fields)  # type: ignore[arg-type]
    return dataclasses.replace(found, servables=(servable,))


def serving(*versions: int, **fields: object) -> Shell:
    shell = begun(declared(*versions, **fields))
    shell.carry_out(loading(shell, *versions))
    return shell


def waits(shell: Shell, version: int | None = None, *, listed: bool = True) -> str:
    return unsettled(shell.core.status(), "m", version, listed=listed)


def test_what_serves_as_declared_is_settled() -> None:
    shell = serving(1, 2)
    assert waits(shell) == waits(shell, 2) == ""


def test_a_version_on_its_way_is_waited_for_and_the_old_one_until_it_is_gone() -> None:
    shell = serving(1)
    shell.router(epoch=1)
    shell.listed("m", 1, 2)
    (read,) = of(ReadManifest, shell.send(Declared(config=declared(2))))
    assert waits(shell) == "version 2 NEW"
    effects = shell.send(read.done(manifest("m", 2)))
    assert waits(shell) == "version 2 LOADING"
    shell.carry_out(effects)
    assert waits(shell) == "version 1 DRAINING"
    shell.carry_out(shell.router())
    assert waits(shell) == ""


def test_a_failed_version_ends_the_wait_with_its_words() -> None:
    shell = begun(declared(1))
    (order,) = loading(shell, 1)
    shell.send(order.done(InvalidArgument("shapes do not fit")))
    with pytest.raises(FailedPrecondition, match=r"version 1: .*shapes do not fit; what served"):
        waits(shell)


def test_a_version_that_the_store_has_not_is_waited_for_until_it_was_looked_at() -> None:
    shell = serving(1)
    assert waits(shell, 9, listed=False) == "the store has no complete version 9 of m"
    with pytest.raises(NotFound, match="no complete version 9 of m; it stays declared"):
        waits(shell, 9)


def test_a_label_that_waits_is_waited_for() -> None:
    shell = serving(1, labels={"a": 1})
    shell.send(Declared(config=declared(1, 9, labels={"a": 9})))
    assert waits(shell) == "waits for version 9 (label a)"


def test_a_servable_that_is_unloaded_is_settled_when_nothing_is_left() -> None:
    shell = serving(1)
    shell.router(epoch=1)
    shell.send(Declared(config=config()))
    assert waits(shell) == "version 1 DRAINING"
    shell.carry_out(shell.router())
    assert waits(shell) == ""
    assert waits(shell, 1) == "m is not declared"


def test_shares_are_of_what_answers() -> None:
    shell = serving(1, 2, labels={"a": 1}, split={"a": 3, "2": 1})
    assert shares(shell.core.status()["servables"]["m"]) == {1: 0.75, 2: 0.25}
    shell = serving(1, 2)
    assert shares(shell.core.status()["servables"]["m"]) == {2: 1.0}


def test_versions_are_shown_with_labels_and_shares() -> None:
    shell = serving(1, 2, labels={"old": 1}, split={"old": 3, "2": 1})
    out = io.StringIO()
    show_versions(shell.core.status()["servables"], Console(file=out, width=120))
    lines = out.getvalue().splitlines()
    (first,) = (line for line in lines if "│ 1 " in line)
    assert "old" in first
    assert "75.0%" in first
    assert "m: complete in the store: 1, 2; labels, split: ok" in out.getvalue()
