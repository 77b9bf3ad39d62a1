"""What is written down of a Ray of our own, and read back; starting one is for tests/e2e."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any, Final

import pytest

from batching.errors import FailedPrecondition
from cluster import local_ray
from cluster.environment import MARK
from cluster.local_ray import LocalRay, check_down, find, free_ports, state_directory, stop

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


def test_free_ports_are_distinct_and_neither_those_of_rays_workers_nor_of_clients() -> None:
    ports = free_ports(4)
    assert len(set(ports)) == 4
    assert min(ports) >= 20_000
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert max(ports) < max(first, 21_000)


def test_port_that_somebody_has_on_any_interface_is_not_free() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert not local_ray._is_free(port)
    assert local_ray._is_free(port)
