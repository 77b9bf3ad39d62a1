"""What both doors share: paths to answers, errors to statuses, versions kept across epochs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from batching.allowance import BEST_EFFORT, CRITICAL, SHEDDABLE
from batching.errors import Code
from cluster.doors.service import CRITICALITY_HEADER, DEADLINE_HEADER, Response, Service
from cluster.epochs import VersionStatus
from cluster.metrics import Metrics
from tests.cluster.routing_fakes import (
    Bench,
    VirtualLoop,
    doubled,
    epoch,
    floats,
    look_up,
    plain,
    rows_of,
    run_virtually,
    sleep_ms,
    table_unit,
    turns,
)

ONE = {"unit": [["a"]]}
PREDICT = b"/v1/models/model:predict"
BODY = b'{"instances":[1.0,2.0]}'


class Door:
    """A service over a router among fakes, and the responses it gave."""

    def __init__(self, loop: VirtualLoop, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("time.monotonic", loop.time)
        self.bench = Bench(loop)
        self.metrics = Metrics()
        self.service = Service(self.bench.router, self.metrics)
        self.responses: list[Response] = []

    def ask(
        self,
        body: bytes = BODY,
        path: bytes = PREDICT,
        method: bytes = b"POST",
        headers: Mapping[bytes, bytes] | None = None,
    ) -> None:
        self.service.handle(method, path, headers or {}, body, self.responses.append)

    def get(self, path: bytes) -> Response:
        """The answer of a request that is answered at once."""
        before = len(self.responses)
        self.ask(b"", path, b"GET")
        assert len(self.responses) == before + 1, "not answered, or twice"
        return self.responses[-1]

    def scrape(self) -> str:
        return self.metrics.render(self.bench.router).decode()


def error_of(response: Response) -> str:
    return str(json.loads(response.body)["error"])


def play(scenario: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(loop: VirtualLoop) -> None:
        door = Door(loop, monkeypatch)
        await scenario(door)
        door.bench.router.close()

    run_virtually(run)


def test_a_predict_request_goes_to_the_actor_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(door: Door) -> None:
        await door.bench.router.adopt(epoch(1, (plain(version=7), ONE)))
        door.ask()
        await turns()
        doubled(door.bench.actors["a"].take())
        [response] = door.responses
        assert (response.status, response.body) == (200, b'{"predictions":[2.0,4.0]}')
        assert response.headers == b"x-servable-version: 7\r\n"

    play(scenario, monkeypatch)


def test_columns_are_answered_by_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(door: Door) -> None:
        await door.bench.router.adopt(epoch(1, (plain(), ONE)))
        door.ask(b'{"inputs":[1.0]}')
        await turns()
        doubled(door.bench.actors["a"].take())
        assert door.responses[0].body == b'{"outputs":[2.0]}'

    play(scenario, monkeypatch)


@pytest.mark.parametrize(
    ("code", "retry_after_ms", "status", "header"),
    [
        (Code.INVALID_ARGUMENT, 0, 400, b""),
        (Code.RESOURCE_EXHAUSTED, 1, 429, b"retry-after: 1\r\nretry-after-ms: 1\r\n"),
        (Code.RESOURCE_EXHAUSTED, 2500, 429, b"retry-after: 3\r\nretry-after-ms: 2500\r\n"),
        (Code.UNAVAILABLE, 1000, 503, b"retry-after: 1\r\nretry-after-ms: 1000\r\n"),
        (Code.UNAVAILABLE, 0, 503, b""),
        (Code.DEADLINE_EXCEEDED, 0, 504, b""),
        (Code.INTERNAL, 5, 500, b""),
    ],
)
def test_an_actors_error_becomes_a_status_and_says_when_to_come_back(
    monkeypatch: pytest.MonkeyPatch, code: Code, retry_after_ms: int, status: int, header: bytes
) -> None:
    async def scenario(door: Door) -> None:
        await door.bench.router.adopt(epoch(1, (plain(), ONE)))
        door.ask()
        await turns()
        door.bench.actors["a"].take().refuse(code, "why", retry_after_ms)
        [response] = door.responses
        assert (response.status, error_of(response)) == (status, "why")
        said = b"x-error-code: %b\r\n" % code.encode()
        assert response.headers == b"x-servable-version: 1\r\n" + header + said
        assert f'serving_errors_total{{code="{code}"}} 1.0' in door.scrape()

    play(scenario, monkeypatch)


@pytest.mark.parametrize("text", [b"20", b"0000020"])
def test_the_clients_deadline_reaches_the_actor_and_ends_the_request(
    monkeypatch: pytest.MonkeyPatch, text: bytes
) -> None:
    async def scenario(door: Door) -> None:
        await door.bench.router.adopt(epoch(1, (plain(), ONE)))
        door.ask(headers={DEADLINE_HEADER: text})
        await turns()
        assert door.bench.actors["a"].take().item.remaining_us == pytest.approx(20_000, abs=2)
        await sleep_ms(30)
        assert [response.status for response in door.responses] == [504]

    play(scenario, monkeypatch)


def test_without_a_deadline_the_servables_own_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(door: Door) -> None:
        await door.bench.router.adopt(epoch(1, (plain(), ONE)))
        door.ask()
        await turns()
        remaining_us = door.bench.actors["a"].take().item.remaining_us
        assert remaining_us == pytest.approx(10_000_000, abs=2)

    play(scenario, monkeypatch)


def test_a_deadline_of_one_request_is_not_kept_for_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(door: Door) -> None:
        await door.bench.router.adopt(epoch(1, (plain(), ONE)))
        for headers in ({}, {DEADLINE_HEADER: b"50"}, {}, {DEADLINE_HEADER: b"70"}):
            door.ask(headers=headers)
        await turns()
        remaining = [asked.item.remaining_us for asked in door.bench.actors["a"].asked]
        assert remaining == pytest.approx([10_000_000, 50_000, 10_000_000, 70_000], abs=2)

    play(scenario, monkeypatch)


def test_how_critical_a_request_is_reaches_the_actor_and_is_not_kept_for_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(door: Door) -> None:
        await door.bench.router.adopt(epoch(1, (plain(), ONE)))
        for name in ("", "best-effort", "", "sheddable"):
            door.ask(headers={CRITICALITY_HEADER: name.encode()} if name else {})
        await turns()
        calls = door.bench.actors["a"].link.calls
        assert sorted(header.criticality for header, _ in calls) == [
            BEST_EFFORT,
            SHEDDABLE,
            CRITICAL,
        ]
        assert [len(header.items) for header, _ in calls if header.criticality == CRITICAL] == [2]

    play(scenario, monkeypatch)


@pytest.mark.parametrize("name", [b"urgent", b"", b"\xff"])
def test_a_criticality_that_is_none_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: bytes
) -> None:
    async def scenario(door: Door) -> None:
        await door.bench.router.adopt(epoch(1, (plain(), ONE)))
        door.ask(headers={CRITICALITY_HEADER: name})
        (response,) = door.responses
        assert response.status == 400
        assert "critical, default, sheddable, best-effort" in error_of(response)

    play(scenario, monkeypatch)


@pytest.mark.parametrize(("length", "kept"), [(55, True), (128, True), (129, False)])
def test_a_trace_context_is_passed_on_unless_it_crowds_others_out(
    monkeypatch: pytest.MonkeyPatch, length: int, kept: bool
) -> None:
    async def scenario(door: Door) -> None:
        await door.bench.router.adopt(epoch(1, (plain(), ONE)))
        door.ask(headers={b"traceparent": b"t" * length})
        await turns()
        wanted = b"t" * length if kept else b""
        assert door.bench.actors["a"].take().item.trace == wanted

    play(scenario, monkeypatch)


def test_one_request_may_want_many_rows_of_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    table = table_unit(sizes=(4, 4))

    async def scenario(door: Door) -> None:
        placement = {"unit": [["a"], ["b"]]}
        await door.bench.router.adopt(epoch(1, (look_up(table), placement)))
        door.ask(b'{"instances":[7,0]}')
        await turns()
        for name in ("b", "a"):
            asked = door.bench.actors[name].take()
            asked.answer(rows_of(table)[asked.arrays[0].astype(int)])
        assert door.responses[0].body == b'{"predictions":[[14.0,15.0],[0.0,1.0]]}'

    play(scenario, monkeypatch)


def test_an_answer_that_is_not_what_the_method_promises_is_an_error_with_the_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = plain()
    signature = found.signatures["serving_default"]
    classify = structs.replace(signature, method="classify", returns={"scores": "0:y"})
    found = structs.replace(found, signatures={"serving_default": classify})

    async def scenario(door: Door) -> None:
        await door.bench.router.adopt(epoch(1, (found, ONE)))
        door.ask(b'{"examples":[{"x":1.0}]}', b"/v1/models/model:classify")
        await turns()
        doubled(door.bench.actors["a"].take())
        [response] = door.responses
        assert (response.status, "num_classes" in error_of(response)) == (400, True)
        code = b"x-error-code: INVALID_ARGUMENT\r\n"
        assert response.headers == b"x-servable-version: 1\r\n" + code

    play(scenario, monkeypatch)


def test_an_answer_that_we_fail_to_print_is_an_internal_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a secret of ours")

    async def scenario(door: Door) -> None:
        await door.bench.router.adopt(epoch(1, (plain(), ONE)))
        door.ask(b'{"inputs":[1.0]}')
        await turns()
        monkeypatch.setattr("cluster.doors.answers.render_predictions", broken)
        doubled(door.bench.actors["a"].take())
        [response] = door.responses
        assert (response.status, error_of(response)) == (500, "internal error")
        assert "a secret of ours" in caplog.text

    play(scenario, monkeypatch)


def test_two_versions_of_one_name_are_read_by_their_own_signatures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids = look_up(table_unit(sizes=(4,)), version=2)

    async def scenario(door: Door) -> None:
        await door.bench.router.adopt(epoch(1, (plain(version=1), ONE), (ids, ONE)))
        door.ask(b'{"instances":[1.5]}', b"/v1/models/model/versions/1:predict")
        door.ask(b'{"instances":[1.5]}', b"/v1/models/model/versions/2:predict")
        await turns()
        [refused] = door.responses
        assert (refused.status, "expected type: int64" in error_of(refused)) == (400, True)

    play(scenario, monkeypatch)


def test_a_path_means_the_version_of_the_epoch_that_is_current(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    labels = {"model": {"stable": 1}}

    async def scenario(door: Door) -> None:
        label = b"/v1/models/model/labels/stable:predict"
        both = [(plain(version=number), ONE) for number in (1, 2)]
        await door.bench.router.adopt(epoch(1, both[0], labels=labels))
        for path in (PREDICT, label):
            door.ask(path=path)
        await door.bench.router.adopt(epoch(2, *both, labels=labels))
        for path in (PREDICT, label):
            door.ask(path=path)
        await door.bench.router.adopt(epoch(3, *both, labels={"model": {"stable": 2}}))
        for path in (PREDICT, label):
            door.ask(path=path)
        await turns()
        asked = door.bench.actors["a"].asked
        assert [one.header.epoch for one in asked] == [1, 1, 2, 2, 3, 3]
        for one in list(asked):
            doubled(one)
        versions = [response.headers for response in door.responses]
        wanted = [1, 1, 2, 1, 2, 2]
        assert versions == [b"x-servable-version: %d\r\n" % number for number in wanted]

    play(scenario, monkeypatch)


def test_a_version_that_is_unloaded_is_not_found_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(door: Door) -> None:
        await door.bench.router.adopt(epoch(1, (plain(), ONE)))
        door.ask()
        await door.bench.router.adopt(epoch(2))
        door.ask()
        await turns()
        assert [response.status for response in door.responses] == [404]

    play(scenario, monkeypatch)


def test_a_bug_of_ours_is_an_internal_error_that_tells_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a secret of ours")

    async def scenario(door: Door) -> None:
        await door.bench.router.adopt(epoch(1, (plain(), ONE)))
        monkeypatch.setattr(door.bench.router, "submit", broken)
        door.ask()
        [response] = door.responses
        assert (response.status, error_of(response)) == (500, "internal error")
        assert "a secret of ours" in caplog.text

    play(scenario, monkeypatch)


def test_the_fast_check_of_a_frame_holds_for_that_frame_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Small floats print in long form; whether a frame has any is asked once for its requests."""

    async def scenario(door: Door) -> None:
        await door.bench.router.adopt(epoch(1, (plain(), ONE)))
        for _ in range(4):
            door.ask(b'{"instances":[1.0]}')
        await turns()
        asked = door.bench.actors["a"].asked
        link = asked[0].link
        items = [(one.item.request, 1) for one in asked]
        link.reply(items[:2], [floats(0.5, 2)], "map")
        link.reply(items[2:], [floats(1e-30, np.nan)], "map")
        bodies = [response.body for response in door.responses]
        assert bodies == [
            b'{"predictions":[0.5]}',
            b'{"predictions":[2.0]}',
            b'{"predictions":[1e-30]}',
            b'{"predictions":[NaN]}',
        ]

    play(scenario, monkeypatch)


# Readiness


def status(servable: str, state: str, code: str = "OK") -> VersionStatus:
    return VersionStatus(servable=servable, version=1, state=state, error_code=code)


@pytest.mark.parametrize(
    ("statuses", "ready"),
    [
        pytest.param([], 200, id="nothing else is declared"),
        pytest.param([status("model", "AVAILABLE")], 200, id="available"),
        pytest.param([status("other", "LOADING")], 503, id="another loads"),
        pytest.param([status("other", "START")], 503, id="another is about to load"),
        pytest.param([status("model", "LOADING")], 200, id="a next version loads"),
        pytest.param([status("other", "UNLOADING")], 200, id="another is on its way out"),
        pytest.param([status("other", "END")], 200, id="another has gone"),
        pytest.param([status("other", "END", "DATA_LOSS")], 200, id="another has failed"),
        pytest.param([status("other", "START", "INTERNAL")], 200, id="another is tried again"),
    ],
)
def test_readiness_waits_for_what_is_coming_and_for_nothing_else(
    monkeypatch: pytest.MonkeyPatch, statuses: list[VersionStatus], ready: int
) -> None:
    async def scenario(door: Door) -> None:
        await door.bench.router.adopt(epoch(1, (plain(), ONE), statuses=statuses))
        response = door.get(b"/readyz")
        assert response.status == ready
        assert ready == 200 or b"other" in response.body

    play(scenario, monkeypatch)


def test_before_the_first_epoch_it_lives_but_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(door: Door) -> None:
        assert door.get(b"/healthz").status == 200
        assert door.get(b"/readyz").status == 503
        # Not 404, which clients take for final: it has just started, and will know in a moment.
        assert door.get(b"/v1/models").status == 503
        assert door.get(b"/v1/models/model").status == 503
        door.ask()
        assert (door.responses[-1].status, "just started" in error_of(door.responses[-1])) == (
            503,
            True,
        )
        assert b"retry-after: 1" in door.responses[-1].headers

    play(scenario, monkeypatch)


@pytest.mark.parametrize("path", [b"/healthz", b"/readyz", b"/metrics"])
def test_the_other_rooms_are_read_only(monkeypatch: pytest.MonkeyPatch, path: bytes) -> None:
    async def scenario(door: Door) -> None:
        door.ask(b"{}", path)
        assert [response.status for response in door.responses] == [404]

    play(scenario, monkeypatch)


# Counting


def test_an_answer_is_counted_with_its_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(door: Door) -> None:
        await door.bench.router.adopt(epoch(1, (plain(), ONE)))
        door.ask()
        await sleep_ms(40)
        doubled(door.bench.actors["a"].take())
        text = door.scrape()
        labels = 'servable="model",version="1"'
        assert f'serving_requests_total{{code="OK",{labels}}} 1.0' in text
        assert f'serving_request_latency_seconds_bucket{{le="0.03",{labels}}} 0.0' in text
        assert f'serving_request_latency_seconds_bucket{{le="0.05",{labels}}} 1.0' in text

    play(scenario, monkeypatch)


def test_what_is_served_keeps_its_counts_however_many_versions_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(door: Door) -> None:
        door.metrics._versions_max = 3
        stable = plain("stable")
        for number in range(1, 8):
            await door.bench.router.adopt(
                epoch(number, (stable, ONE), (plain("rolling", number), ONE))
            )
            for name in (b"stable", b"rolling"):
                door.ask(path=b"/v1/models/%b:predict" % name)
            await turns()
            for asked in list(door.bench.actors["a"].asked):
                doubled(asked)
            door.bench.actors["a"].asked.clear()
        text = door.scrape()
        assert 'serving_requests_total{code="OK",servable="stable",version="1"} 7.0' in text
        assert text.count("serving_requests_total{") == 3

    play(scenario, monkeypatch)
