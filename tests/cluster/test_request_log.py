"""Request logs at a door: which requests are kept, and that they warm the next version up."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from cluster.config import ConfigInvalid, dump, load, parse, undump
from cluster.control import Declared as DeclaredEvent
from cluster.control import Publish, Tick
from cluster.doors import log_files
from cluster.doors.calls import call
from cluster.doors.settings import RequestLog
from cluster.epochs import Epoch, decode_epoch, encode_epoch
from shards.recorded import Recorded, read_requests
from shards.warmups import check_requests
from tests.cluster.control_fakes import Shell, of
from tests.cluster.routing_fakes import doubled, epoch, plain, turns
from tests.cluster.test_service import ONE, Door, play


def logged(number: int, log: RequestLog | None, version: int = 1) -> Epoch:
    """An epoch whose one servable has a log."""
    found = epoch(number, (plain(version=version), ONE))
    return structs.replace(found, logs={} if log is None else {"model": log})


def kept(directory: Path) -> list[Recorded]:
    paths = sorted((directory / "model").glob("*.requests"))
    return [each for path in paths for each in read_requests(path.read_bytes(), path.name)]


def values(directory: Path) -> list[list[float]]:
    return [each.inputs["x"].tolist() for each in kept(directory)]


async def answer(door: Door, respond: Callable[[Any], None] = doubled) -> None:
    await turns()
    while door.bench.actors["a"].asked:
        respond(door.bench.actors["a"].take())


def counts(door: Door) -> dict[str, int]:
    head = 'serving_request_log_total{outcome="'
    lines = [line for line in door.scrape().splitlines() if line.startswith(head)]
    return {
        line.removeprefix(head).partition('"')[0]: int(float(line.rpartition(" ")[2]))
        for line in lines
        if not line.endswith(" 0.0")
    }


def test_answered_requests_are_kept_and_are_warm_up_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(door: Door) -> None:
        log = RequestLog(directory=str(tmp_path), rate=1.0)
        await door.bench.router.adopt(logged(1, log, version=7))
        for number in range(3):
            door.ask(b'{"instances":[%d.0]}' % number)
        door.ask(b'{"signature_name":"serving_default","inputs":{"x":[4.0,5.0]}}')
        door.ask(b"{")
        await answer(door)
        door.service.close()
        assert values(tmp_path) == [[0.0], [1.0], [2.0], [4.0, 5.0]]
        assert {(each.signature, each.version) for each in kept(tmp_path)} == {
            ("serving_default", 7)
        }
        check_requests(plain(version=8), kept(tmp_path), "log")
        assert counts(door) == {"due": 4, "written": 4}

    play(scenario, monkeypatch)


def test_calls_of_a_handle_are_kept_once_they_are_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(door: Door) -> None:
        log = RequestLog(directory=str(tmp_path), rate=1.0)
        await door.bench.router.adopt(logged(1, log))
        calls = [
            asyncio.ensure_future(
                call(door.bench.router, "model", {"x": [number]}, logs=door.service.logs)
            )
            for number in (1.0, 2.0)
        ]
        await turns()
        calls[1].cancel()
        await answer(door)
        _, outputs = await calls[0]
        assert outputs["y"].tolist() == [2.0]
        door.service.close()
        assert values(tmp_path) == [[1.0]]

    play(scenario, monkeypatch)


def test_a_share_of_the_requests_is_kept_evenly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(door: Door) -> None:
        await door.bench.router.adopt(logged(1, RequestLog(directory=str(tmp_path), rate=0.1)))
        for number in range(200):
            door.ask(b'{"instances":[%d.0]}' % number)
        await answer(door)
        door.service.close()
        found = [int(each[0]) for each in values(tmp_path)]
        assert abs(len(found) - 20) <= 1
        assert max(b - a for a, b in itertools.pairwise(found)) <= 20

    play(scenario, monkeypatch)


def test_what_was_answered_with_an_error_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(door: Door) -> None:
        await door.bench.router.adopt(logged(1, RequestLog(directory=str(tmp_path), rate=1.0)))
        door.ask()
        await answer(door, lambda asked: asked.refuse("INTERNAL"))
        door.service.close()
        assert door.responses[0].status == 500
        assert not (tmp_path / "model").exists()
        assert counts(door) == {"due": 1, "unanswered": 1}

    play(scenario, monkeypatch)


def test_a_log_begins_changes_and_ends_with_its_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(door: Door) -> None:
        rules = [
            None,
            RequestLog(directory=str(tmp_path / "a"), rate=1.0),
            RequestLog(directory=str(tmp_path / "b"), rate=1.0),
            None,
        ]
        for number, log in enumerate(rules, start=1):
            await door.bench.router.adopt(logged(number, log))
            door.ask(b'{"instances":[%d.0]}' % number)
            await answer(door)
        door.service.close()
        assert (values(tmp_path / "a"), values(tmp_path / "b")) == ([[2.0]], [[3.0]])

    play(scenario, monkeypatch)


def test_requests_are_dropped_when_too_much_waits_and_clients_are_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(door: Door) -> None:
        monkeypatch.setattr(log_files, "_WAITING_BYTES_MAX", 8)
        await door.bench.router.adopt(logged(1, RequestLog(directory=str(tmp_path), rate=1.0)))
        door.ask(b'{"instances":[1.0, 2.0, 3.0]}')
        door.ask(b'{"instances":[4.0]}')
        await answer(door)
        door.service.close()
        assert [response.status for response in door.responses] == [200, 200]
        assert values(tmp_path) == [[4.0]]
        assert counts(door) == {"due": 2, "dropped": 1, "written": 1}

    play(scenario, monkeypatch)


def test_nothing_is_kept_where_what_is_to_be_redacted_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(door: Door) -> None:
        log = RequestLog(directory=str(tmp_path), rate=1.0, redact=("x", "ttext"))
        await door.bench.router.adopt(logged(1, log))
        door.ask()
        door.ask()
        await answer(door)
        await door.bench.router.adopt(logged(2, without_typo(log)))
        door.ask()
        await answer(door)
        door.service.close()
        assert caplog.text.count("log.redact names ttext") == 1
        assert values(tmp_path) == [[0.0, 0.0]]

    play(scenario, monkeypatch)


def without_typo(log: RequestLog) -> RequestLog:
    return RequestLog(directory=log.directory, rate=log.rate, redact=("x",))


# How it is declared

TEXT = """
store: ./store
servables:
  - name: m
    log: {directory: logs, rate: 0.5, bytes_max: 1MiB, redact: [text]}
"""


def test_a_log_is_declared_with_a_directory_beside_the_file(tmp_path: Path) -> None:
    file = tmp_path / "servables.yaml"
    file.write_text(TEXT)
    found = load(file)
    log = found.servables[0].log
    assert log == RequestLog(
        directory=str(tmp_path / "logs"), rate=0.5, bytes_max=1 << 20, redact=("text",)
    )
    assert undump(dump(found)) == found


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{directory: ''}", "log.directory: must name"),
        ("{rate: 0.5}", "log.directory: is missing"),
        ("{directory: d, rate: 0}", "log.rate: must be above 0"),
        ("{directory: d, rate: 1.5}", "log.rate: must be above 0"),
        ("{directory: d, requests_max: 1001}", "log.requests_max: must be at most 1000"),
        ("{directory: d, bytes_max: 65MiB}", "log.bytes_max: must be at most"),
        ("{directory: d, bytes_max: 1}", "log.bytes_max: must be at least"),
        ("{directory: d, files_max: 0}", "log.files_max: must be at least"),
        ("{directory: d, sample: 1}", "log.sample: unknown key"),
    ],
)
def test_a_log_that_cannot_be_meant_is_refused_with_its_path(line: str, problem: str) -> None:
    with pytest.raises(ConfigInvalid, match=problem):
        parse(f"store: s\nservables: [{{name: m, log: {line}}}]")


def test_a_log_that_is_declared_is_in_the_next_epoch() -> None:
    shell = Shell()
    (publish,) = of(Publish, shell.send(DeclaredEvent(config=parse(TEXT))))
    assert publish.epoch.logs["m"].rate == 0.5
    assert decode_epoch(encode_epoch(publish.epoch)) == publish.epoch
    assert not of(Publish, shell.send(Tick()))
    changed = parse(TEXT.replace("0.5", "0.25"))
    (publish,) = of(Publish, shell.send(DeclaredEvent(config=changed)))
    assert publish.epoch.logs["m"].rate == 0.25
    (publish,) = of(Publish, shell.send(DeclaredEvent(config=parse("store: ./store"))))
    assert publish.epoch.logs == {}
