"""Versions listed over HTTP: what is believed, what is an error, and that errors unload nothing."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from batching.errors import DataLoss, InvalidArgument, NotFound, ServingError, Unavailable
from cluster.config import Registered
from cluster.control import ListStore
from cluster.http_source import BYTES_MAX, FRESH_S, HttpLists
from cluster.registered import SOURCES, listed
from shards.store import LocalStore
from tests.cluster.control_fakes import begun, config


class Registry(ThreadingHTTPServer):
    """A server that answers what it is told to, and remembers what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Asked)
        self.status = 200
        self.body = json.dumps({"servables": {"m": [3, 1], "n": [7], "empty": []}}).encode()
        self.etag = '"one"'
        self.length: int | None = None
        self.drip = threading.Event()
        self.drip.set()
        self.asked: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/list.json?of=all"


class _Asked(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        registry = self.server
        assert isinstance(registry, Registry)
        registry.asked.append({"path": self.path, **self.headers})
        if registry.etag and self.headers.get("If-None-Match") == registry.etag:
            self.send_response(304)
            self.end_headers()
            return
        self.send_response(registry.status)
        length = len(registry.body) if registry.length is None else registry.length
        self.send_header("Content-Length", str(length))
        if registry.etag:
            self.send_header("ETag", registry.etag)
        self.end_headers()
        registry.drip.wait(20.0)
        self.wfile.write(registry.body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def registry() -> Iterator[Registry]:
    server = Registry()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.drip.set()
    server.shutdown()
    thread.join()
    server.server_close()


class Lists:
    """Lists that are asked by a clock of ours."""

    def __init__(self, registry: Registry, store: Path) -> None:
        self.now = 100.0
        self._lists = HttpLists(lambda: self.now)
        self._registry = registry
        self._store = LocalStore(store)

    def of(self, servable: str, **options: str | float) -> list[int]:
        given = {"url": self._registry.url, **options}
        return self._lists.versions(servable, given, self._store)


@pytest.fixture
def lists(registry: Registry, tmp_path: Path) -> Lists:
    return Lists(registry, tmp_path)


def test_one_answer_is_for_all_that_ask_within_a_second(lists: Lists, registry: Registry) -> None:
    assert lists.of("m") == [3, 1]
    assert lists.of("n") == [7]
    (asked,) = registry.asked
    assert asked["path"] == "/list.json?of=all"
    assert "Authorization" not in asked


def test_a_list_that_has_not_changed_is_not_sent_again(lists: Lists, registry: Registry) -> None:
    lists.of("m")
    lists.now += FRESH_S
    assert lists.of("m") == [3, 1]
    assert registry.asked[1]["If-None-Match"] == '"one"'
    registry.etag, registry.body = '"two"', b'{"servables": {"m": [4]}}'
    lists.now += FRESH_S
    assert lists.of("m") == [4]


def test_a_failure_is_told_and_forgotten_when_the_server_answers(
    lists: Lists, registry: Registry
) -> None:
    registry.status = 503
    for servable in ("m", "n"):
        with pytest.raises(Unavailable, match="answered 503"):
            lists.of(servable)
    assert len(registry.asked) == 1
    registry.status = 200
    lists.now += FRESH_S
    assert lists.of("m") == [3, 1]
    # And what was known before a failure is sent for again, not believed.
    registry.status, registry.etag = 500, '"other"'
    lists.now += FRESH_S
    with pytest.raises(Unavailable, match="answered 500"):
        lists.of("m")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not a list of versions"),
        (b"[]", "Expected `object`"),
        (b'{"servables": {"m": [0]}}', ">= 1"),
        (b'{"servables": {"m": ["1"]}}', "Expected `int`"),
        (b'{"servables": {"m": [1.5]}}', "Expected `int`"),
        (b'{"servables": {"m": 1}}', "Expected `array`"),
        (b'{"servable": {"m": [1]}}', "unknown field `servable`"),
        (b'{"servables": {"m": [1]}, "more": 1}', "unknown field `more`"),
        (b'{"servables": {"m": [1]}', "truncated"),
        (b" " * (BYTES_MAX + 1), "more than 1048576 bytes"),
    ],
)
def test_an_answer_that_is_no_list_is_refused(
    lists: Lists, registry: Registry, body: bytes, says: str
) -> None:
    registry.body = body
    with pytest.raises(DataLoss, match=says):
        lists.of("m")


@pytest.mark.parametrize("servable", ["other", "empty"])
def test_a_servable_without_versions_is_an_error(lists: Lists, servable: str) -> None:
    with pytest.raises(NotFound, match=f"names no version of '{servable}'"):
        lists.of(servable)


def test_a_redirection_is_not_followed(lists: Lists, registry: Registry) -> None:
    registry.status = 302
    with pytest.raises(Unavailable, match="answered 302"):
        lists.of("m")


def test_an_answer_that_is_cut_short_is_not_believed(lists: Lists, registry: Registry) -> None:
    registry.length = len(registry.body) + 10
    with pytest.raises(Unavailable, match=r"IncompleteRead|early|no answer"):
        lists.of("m", timeout_s=2.0)


def test_a_server_that_is_slow_or_away_costs_no_more_than_the_time_out(
    lists: Lists, registry: Registry
) -> None:
    registry.drip.clear()
    with pytest.raises(Unavailable, match=r"no answer in time|timed out"):
        lists.of("m", timeout_s=0.05)
    with pytest.raises(Unavailable, match="ConnectionRefusedError"):
        lists.of("m", url="http://127.0.0.1:1/")


def test_a_token_comes_out_of_the_environment(
    lists: Lists, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REGISTRY_TOKEN", "abc")
    lists.of("m", token="env:REGISTRY_TOKEN")
    assert registry.asked[0]["Authorization"] == "Bearer abc"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"url": "ftp://host/x"}, "must be an http or https address"),
        ({"url": "http://user:secret@host/x"}, "must be an http or https address"),
        ({"url": "http://host:x/"}, "must be an http or https address"),
        ({"url": "http://host/a b"}, "must be an http or https address"),
        ({"url": 7}, "must be an http or https address"),
        ({"timeout_s": 31.0}, "at most 30"),
        ({"timeout_s": 0}, "at most 30"),
        ({"timeout_s": "1"}, "must be seconds"),
        ({"token": "abc"}, "as env:NAME"),
        ({"token": "env:NOT_THERE"}, "no token as NOT_THERE"),
        ({"uri": "http://host"}, "unknown option 'uri'"),
    ],
)
def test_options_that_cannot_be_meant(lists: Lists, options: dict[str, str], says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        lists.of("m", **options)


def test_the_controller_serves_on_whatever_the_list_says(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the registry and the core: a failing, empty or missing listing unloads nothing."""
    assert "http" in SOURCES.names
    now = [100.0]
    monkeypatch.setitem(SOURCES._built_in, "http", HttpLists(lambda: now[0]).versions)
    source = Registered(name="http", options={"url": registry.url})
    declared = config("m")
    servable = dataclasses.replace(declared.servables[0], source=source)
    shell = begun(dataclasses.replace(declared, servables=(servable,)))
    shell.serve("m", 3)
    for body, says in (
        (b'{"servables": {}}', "NOT_FOUND: "),
        (b'{"servables": {"m": []}}', "NOT_FOUND: "),
        (b"?", "DATA_LOSS: "),
    ):
        registry.body, registry.etag = body, ""
        now[0] += FRESH_S
        effect = ListStore(servable="m", source=source)
        with pytest.raises(ServingError) as caught:
            listed("m", source, LocalStore(tmp_path))
        shell.send(effect.failed(caught.value))
        assert shell.versions() == [3]
        assert shell.core.status()["servables"]["m"]["listing"].startswith(says + registry.url)
    assert len(registry.asked) == 3
