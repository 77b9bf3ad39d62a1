"""The run of ``faults``: who is struck when, what is waited for, and what is made of it."""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest

from bench import faults
from bench.errors import ContenderFailed
from bench.faults import strike_all
from bench.faults_client import Client
from bench.faults_cluster import Moment, Status, Versions, Watch, available, declaration, is_whole
from bench.faults_kinds import DEVICE_KILLED, ONE_HOST, QUICK, Fault, Struck
from bench.faults_ledger import Attempt, Bounds, Ending, Phase
from bench.marks import Mark, judge
from cluster import config

STATUS: dict[str, Any] = {
    "term": 1,
    "recovering": False,
    "servables": {
        name: {
            "aspired": [1],
            "listing": "ok",
            "versions": [{"version": 1, "state": "AVAILABLE", "actors": ["device-0", "shard-0"]}],
        }
        for name in ("chain", "plain")
    },
    "actors": {
        name: {
            "state": "UP",
            "generation": 7,
            "pid": 70,
            "node": "n",
            "holds": {"chain:1": "LOADED"},
        }
        for name in ("device-0", "shard-0")
    },
    "doors": [{"node": "n", "pid": 80, "error": ""}],
    "addresses": {"n": "127.0.0.1"},
}


def changed(path: str, value: object) -> dict[str, Any]:
    """The status with one thing in it changed."""
    status = copy.deepcopy(STATUS)
    *way, last = path.split("/")
    where: Any = status
    for step in way:
        where = where[int(step) if isinstance(where, list) else step]
    where[int(last) if isinstance(where, list) else last] = value
    return status


def test_a_whole_cluster_is_whole() -> None:
    assert is_whole(STATUS)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("recovering", True),
        ("doors", []),
        ("doors/0/error", "cannot listen"),
        ("actors/shard-0/state", "STARTING"),
        ("actors/device-0/holds/chain:1", "WARMING"),
        ("servables/plain/versions", []),
        ("servables/plain/aspired", [1, 2]),
        ("servables/plain/versions/0/state", "LOADING"),
    ],
)
def test_a_cluster_that_lacks_anything_is_not(path: str, value: object) -> None:
    assert not is_whole(changed(path, value))


def test_versions_are_available_when_they_are_what_should_be() -> None:
    assert available(STATUS, "chain") == [1]
    assert available(STATUS, "nobody") == []


class FakeWatch:
    """Statuses from a script, the last for ever."""

    def __init__(self, *statuses: Status) -> None:
        self.statuses = list(statuses)

    def until(self, what: str, holds: Any, since: float, timeout_s: float) -> Any:
        while True:
            if holds(self.statuses[0]):
                return Moment(time.monotonic(), self.statuses[0])
            if len(self.statuses) == 1:
                raise ContenderFailed(f"{what}: not within {timeout_s:g} s")
            self.statuses.pop(0)


class FakeSite:
    rest = serve = "http://127.0.0.1:1"

    def __init__(self, *statuses: Status) -> None:
        self.watch = FakeWatch(*statuses)
        self.signals: list[tuple[int, int]] = []

    def process(self, node: str, pid: int) -> int:
        return pid

    def signal(self, pid: int, number: signal.Signals) -> None:
        self.signals.append((pid, number))


class HappyClient:
    def bad_since(self, instant: float) -> bool:
        return False


def run(site: FakeSite, *struck: Fault, monkeypatch: pytest.MonkeyPatch) -> tuple[Phase, ...]:
    monkeypatch.setattr("bench.faults._SETTLE_S", 0.0)
    monkeypatch.setattr("bench.faults._BOUNDS", Bounds(deadline_s=0.0, grace_s=0.0))
    return strike_all(cast("Any", site), cast("Client", HappyClient()), struck)


def test_a_killed_actor_must_be_another_process_and_the_others_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    back = changed("actors/device-0/generation", 9)
    site = FakeSite(STATUS, back)
    [phase] = run(site, DEVICE_KILLED, monkeypatch=monkeypatch)
    assert site.signals == [(70, signal.SIGKILL)]
    assert (phase.fault, phase.reloaded) == ("device actor killed", ())
    assert phase.whole_s is not None


def test_an_actor_that_was_not_touched_and_is_another_process_was_reloaded_without_need(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    back = changed("actors/device-0/generation", 9)
    back["actors"]["shard-0"]["generation"] = 8
    site = FakeSite(STATUS, back)
    [phase] = run(site, DEVICE_KILLED, monkeypatch=monkeypatch)
    assert phase.reloaded == ("shard-0",)


def test_what_does_not_come_back_is_told_and_nothing_strikes_after_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site = FakeSite(STATUS, changed("actors/device-0/state", "FAILED"))
    [phase] = run(site, DEVICE_KILLED, DEVICE_KILLED, monkeypatch=monkeypatch)
    assert phase.whole_s is None
    assert "device actor killed: not within" in capsys.readouterr().err


def test_phases_follow_one_another_without_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = Fault(name="nothing", strike=lambda *_: Struck(frozenset(), lambda _: True))
    began = time.monotonic()
    first, second = run(FakeSite(STATUS), nothing, nothing, monkeypatch=monkeypatch)
    assert began <= first.struck < first.until == second.struck < second.until


def test_the_router_that_is_killed_is_the_one_that_clients_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    two = copy.deepcopy(STATUS)
    two["doors"] = [
        {"node": "far", "pid": 81, "error": ""},
        {"node": "n", "pid": 80, "error": ""},
    ]
    two["addresses"] = {"n": "127.0.0.1", "far": "10.0.0.2"}
    back = copy.deepcopy(two)
    back["doors"][1]["pid"] = 90
    site = FakeSite(two, back)
    [router] = [fault for fault in ONE_HOST if fault.name == "router killed"]
    [phase] = run(site, router, monkeypatch=monkeypatch)
    assert site.signals == [(80, signal.SIGKILL)]
    assert phase.whole_s is not None
    assert phase.breaks == {"direct"}


def test_result_has_the_keys_that_marks_are_set_on() -> None:
    attempts = [
        Attempt(request=1, door="direct", sent=1.0, ended=1.1, ending=Ending.ANSWER, told=1),
        Attempt(request=2, door="direct", sent=1.2, ended=1.3, ending=Ending.RESET),
        Attempt(request=2, door="direct", sent=1.4, ended=1.5, ending=Ending.ANSWER, told=2),
    ]
    phase = Phase(fault="nothing", struck=0.0, until=5.0, whole_s=0.1)
    result = faults._result(attempts, 0, [phase], {"quick": True})
    marks = {
        name: Mark(comparison="<=", value=0.0)
        for name in ("lost", "answered_twice", "mixed_version_answers", "never_recovered")
    }
    missed = [verdict.key for verdict in judge(result.ratios, marks) if not verdict.met]
    assert missed == ["lost"]
    assert result.ratios["lost"] == 1
    assert faults._result(attempts, 0, [phase], {}, unfinished=2).ratios["lost"] == 3
    json.dumps(result.figures)
    assert result.plot is not None
    assert {series.label for series in result.plot.series} == {"answer", "reset"}


def test_the_short_form_is_a_part_of_the_long_one() -> None:
    assert set(QUICK) < set(ONE_HOST)
    assert len({fault.name for fault in ONE_HOST}) == len(ONE_HOST)


def test_declaration_is_one_that_the_product_accepts(tmp_path: Path) -> None:
    text = declaration(str(tmp_path), {"devices": 2}, {"plain": 2})
    declared = config.parse(text)
    assert [(one.name, one.replicas) for one in declared.servables] == [("chain", 1), ("plain", 2)]


def test_watch_keeps_the_latest_status_and_skips_what_is_none() -> None:
    script = (
        "import sys; print('Ray says'); print('{\"n\": 1}'); print('{\"n\": 2}', flush=True); "
        "sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    watch = Watch(process)
    try:
        began = time.monotonic()
        assert watch.until("two", lambda status: bool(status["n"] == 2), 0.0, 20.0).status["n"] == 2
        assert watch.since(time.monotonic()) is None
        with pytest.raises(ContenderFailed, match="three: not within"):
            watch.until("three", lambda status: bool(status["n"] == 3), began - 60.0, 0.05)
    finally:
        watch.close()
    assert process.returncode == 0, "it ends when its input does"


@pytest.mark.slow
def test_saved_models_answer_as_they_are_read(tmp_path: Path) -> None:
    """Both versions are saved; the second appears, whole, when it is published."""
    versions = Versions(tmp_path)
    found = sorted(str(p.relative_to(versions.store)) for p in versions.store.glob("[a-z]*/[12]"))
    assert found == ["chain/1", "plain/1"]
    versions.publish(2)
    assert (versions.store / "chain" / "2" / "servable.json").is_file()
