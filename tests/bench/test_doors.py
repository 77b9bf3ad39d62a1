"""The attack of the bench, against a door whose service is a fake: each is told what it must."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

from bench.doors import _Others, _result, _wave
from bench.doors_attack import EXPECTED, SHARES
from bench.report import ROOT
from cluster.doors.rest import RestDoor
from cluster.doors.service import Respond, Response, Service
from cluster.doors.settings import DoorLimits
from shards.loop import LoopThread
from tests.cluster.rest_clients import FakeService

LIMITS = DoorLimits(head_s=0.6, body_s=0.6, read_s=0.6, idle_s=0.6)


class Serving(FakeService):
    """Knows as much of the product's paths as the attack uses."""

    def handle(
        self,
        method: bytes,
        path: bytes,
        headers: Mapping[bytes, bytes],
        body: bytes | bytearray,
        respond: Respond,
    ) -> None:
        if path == b"/healthz":
            respond(Response(200, "text/plain", b"", b"ok\n"))
        elif path == b"/metrics":
            respond(Response(200, "text/plain", b"", b"m" * 50_000))
        else:
            bad = body.startswith(b"[")
            respond(Response(400 if bad else 200, "application/json", b"", b"{}"))


def test_every_kind_of_client_has_its_share_and_its_endings() -> None:
    assert SHARES.keys() == EXPECTED.keys()
    assert sum(share for share, _ in SHARES.values()) == 100


def test_a_door_tells_each_kind_what_it_must_and_serves_the_others() -> None:
    io = LoopThread("door")
    door = io.call(lambda: RestDoor(cast(Service, Serving()), LIMITS))
    url = f"http://127.0.0.1:{io.run(door.open('127.0.0.1', 0))}"
    try:
        others = _Others(url, 0)
        found = _wave(url, 4.0, 200, 0)
        others.end()
    finally:
        io.run(door.close(grace_s=0.1))
        io.close()
    assert found["open_max"] >= 150
    for kind, told in found["told"].items():
        # Those that take no answers stay deaf for longer than this attack.
        assert told or kind == "takes no answers", kind
        assert set(told) <= EXPECTED[kind], (kind, told)
    assert others.errors == Counter()
    assert len(others.latencies_s) > 20
    counted = {kind: Counter(told) for kind, told in found["told"].items()}
    result = _result(others, others, counted, found["open_max"], [50.0, 60.0, 66.0], {}, {})
    assert result.ratios["wrong_endings"] == 0.0
    assert result.ratios["memory_last_vs_first_wave"] == 1.1
    counted["says nothing"]["200"] = 3
    result = _result(others, others, counted, 1, [50.0, 60.0], {}, {})
    assert result.ratios["wrong_endings"] == 3.0


def test_the_attack_says_what_it_found_on_its_last_line_even_where_nobody_listens() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.doors_attack", "127.0.0.1", "1", "0.3", "10", "0"],
        cwd=ROOT,
        capture_output=True,
        timeout=50,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["open_max"] == 0
    assert found["told"]["says nothing"] == {"no connection": 10}
