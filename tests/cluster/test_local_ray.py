"""What is written down of a Ray of our own, and read back; starting one is for tests/e2e."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from batching.errors import FailedPrecondition
from cluster import local_ray
from cluster.environment import MARK
from cluster.local_ray import LocalRay, check_down, find, state_directory, stop
from cluster.ports import PortClaim

NOTE: Final[dict[str, Any]] = {
    "mark": "no-process-has-this",
    "address": "127.0.0.1:1",
    "directory": "/nowhere",
}


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDSERVE_STATE", str(tmp_path))


def note(**more: object) -> None:
    (state_directory("mine") / "ray.json").write_text(json.dumps({**NOTE, **more}))


def test_nothing_is_found_where_nothing_was_started() -> None:
    assert find("mine") is None
    assert stop("mine") == 0


def test_state_is_the_users_own(tmp_path: Path) -> None:
    assert state_directory("mine").parent == tmp_path
    assert state_directory("mine").stat().st_mode & 0o777 == 0o700


def test_note_without_ports_is_one_of_an_earlier_version() -> None:
    note()
    assert find("mine") == LocalRay(**NOTE)


def test_ports_that_were_moved_reach_whoever_talks_to_it() -> None:
    note(ports={"RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": 23456})
    local = find("mine")
    assert local is not None
    environment = local.environment()
    assert environment["RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"] == "23456"
    assert environment[MARK] == NOTE["mark"]


def test_ray_that_ended_by_itself_is_no_hindrance_and_its_note_can_be_taken_away() -> None:
    note()
    check_down("mine")
    assert stop("mine") == 0
    assert find("mine") is None


def test_ray_that_runs_is_a_hindrance(monkeypatch: pytest.MonkeyPatch) -> None:
    note()
    monkeypatch.setattr(local_ray, "marked", lambda name, value: [(name, value)])
    with pytest.raises(FailedPrecondition, match="'mine' is up already"):
        check_down("mine")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[LocalRay]]:
    """What was started, of which nothing listens yet; it has its claims until the test's end."""
    found: list[LocalRay] = []
    held: list[int] = []

    def run_head(local: LocalRay, command: object, claims: Sequence[PortClaim]) -> None:
        del command
        found.append(local)
        held.extend(os.dup(claim.fileno()) for claim in claims)  # as a process inherits them

    monkeypatch.setattr(local_ray, "_run_head", run_head)
    yield found
    for descriptor in held:
        os.close(descriptor)
    for local in found:
        shutil.rmtree(local.directory)


def test_clusters_that_start_at_once_have_no_port_in_common(started: list[LocalRay]) -> None:
    for cluster in ("mine", "theirs"):
        local_ray.start(cluster)
    ports = [{*one.ports.values(), int(one.address.rpartition(":")[2])} for one in started]
    assert [len(each) for each in ports] == [5, 5]
    assert ports[0].isdisjoint(ports[1])
