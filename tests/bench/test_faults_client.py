"""The client of ``faults`` against a server that treats each request as the test says."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import cast

import httptools
import orjson
import pytest

from bench.faults_client import Client, Door, Reply, judge
from bench.faults_ledger import Attempt, Bounds, Ending, answered_twice
from bench.faults_unit import GROUPS, ids_of
from tests.bench.fakes import eventually, hung_up

#: Longer than any answer takes, and so short that a test can wait for it.
PATIENT, SHORT = Bounds(deadline_s=20.0, grace_s=20.0), Bounds(deadline_s=0.2, grace_s=0.2)
DOOR = Door("direct", "", 200.0)
#: What a server does with a request: the complete answers that it writes, or None to hang up.
Treat = Callable[[str, int], list[bytes] | None]


def answer(servable: str, number: int, *, version: int = 1) -> bytes:
    """A right answer."""
    told: object = [float(number), float(version)]
    if servable == "chain":
        told = {
            "stamp": [float(number), 7.0, version],
            "ids": ids_of(number),
            "table": [version] * GROUPS,
            "versions": [version],
        }
    return http(200, orjson.dumps({"predictions": [told]}), f"X-Servable-Version: {version}\r\n")


def http(status: int, body: bytes, headers: str = "") -> bytes:
    return f"HTTP/1.1 {status} X\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body


class _Scripted(asyncio.Protocol):
    def __init__(self, treat: Treat, connections: set[asyncio.Transport]) -> None:
        self._treat = treat
        self._connections = connections
        self._parser = httptools.HttpRequestParser(self)
        self._path = self._body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._connections.add(self._transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self._transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._path = url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        [instance] = orjson.loads(self._body)["instances"]
        self._body = b""
        is_chain = self._path == b"/v1/models/chain:predict"
        servable = "chain" if is_chain else "plain"
        replies = self._treat(servable, int(instance if is_chain else instance[0]))
        if replies is None:
            self._transport.abort()
        else:
            self._transport.writelines(replies)


@contextlib.contextmanager
def server(treat: Treat) -> Iterator[Door]:
    loop = asyncio.new_event_loop()
    connections: set[asyncio.Transport] = set()
    listening = loop.run_until_complete(
        loop.create_server(lambda: _Scripted(treat, connections), "127.0.0.1", 0)
    )
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        port = listening.sockets[0].getsockname()[1]
        yield DOOR._replace(url=f"http://127.0.0.1:{port}")
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        assert not thread.is_alive()
        listening.close()
        loop.run_until_complete(hung_up(connections))
        loop.close()


def ask(treat: Treat, requests: int = 20, bounds: Bounds = PATIENT) -> tuple[list[Attempt], int]:
    """What a client writes down of at least so many ended requests."""
    with server(treat) as door, Client([door], bounds, seed=1) as client:
        assert eventually(lambda: len({a.request for a in client.attempts}) >= requests)
    return client.attempts, client.unasked


def test_answers_are_read_and_every_request_is_asked_once() -> None:
    attempts, unasked = ask(lambda servable, number: [answer(servable, number)])
    assert {a.ending for a in attempts} == {Ending.ANSWER}
    assert Counter(a.request for a in attempts).most_common(1)[0][1] == 1
    assert {a.versions for a in attempts} == {(1, 1), (1,) * (GROUPS + 3)}
    assert {a.life for a in attempts} == {0, 7}
    assert answered_twice(attempts, unasked) == 0


def test_a_reset_connection_is_followed_by_another_attempt() -> None:
    seen: Counter[int] = Counter()

    def treat(servable: str, number: int) -> list[bytes] | None:
        seen[number] += 1
        return None if seen[number] == 1 and number % 2 else [answer(servable, number)]

    attempts, _ = ask(treat)
    ends = {n: [a.ending for a in attempts if a.request == n] for n in range(1, 11)}
    assert ends[1] == ends[3] == [Ending.RESET, Ending.ANSWER]
    assert ends[2] == ends[4] == [Ending.ANSWER]


def test_a_typed_error_ends_a_request() -> None:
    body = orjson.dumps({"error": "away"})
    attempts, _ = ask(lambda *_: [http(503, body)])
    assert {(a.ending, a.detail) for a in attempts} == {(Ending.ERROR, "UNAVAILABLE")}
    assert Counter(a.request for a in attempts).most_common(1)[0][1] == 1


def test_an_answer_on_an_idle_connection_is_one_too_many() -> None:
    def treat(servable: str, number: int) -> list[bytes]:
        return [answer(servable, number)] * (2 if number == 3 else 1)

    attempts, unasked = ask(treat)
    assert answered_twice(attempts, unasked) == 1


def test_what_is_never_answered_is_silent() -> None:
    attempts, _ = ask(lambda *_: [], requests=1, bounds=SHORT)
    assert {a.ending for a in attempts} == {Ending.SILENT}
    assert min(a.ended - a.sent for a in attempts) > SHORT.late_s


def test_no_connection_is_a_refusal() -> None:
    with server(lambda *_: []) as door:
        pass
    with Client([door], PATIENT, seed=1) as client:
        assert eventually(lambda: len(client.attempts) > 3)
        assert client.bad_since(0.0)
    assert {a.ending for a in client.attempts} == {Ending.REFUSED}


@pytest.mark.parametrize(
    ("status", "body", "is_proxied", "ending"),
    [
        (429, b'{"error": "full"}', False, Ending.ERROR),
        (504, b'{"error": "late"}', True, Ending.ERROR),
        (404, b'{"error": "unknown"}', False, Ending.WRONG),
        (500, b'{"error": "internal"}', False, Ending.WRONG),
        (503, b"<html>no server</html>", True, Ending.REFUSED),
        (503, b"<html>no server</html>", False, Ending.WRONG),
        (200, b"{}", False, Ending.WRONG),
        (200, b'{"predictions": [[6.0, 1.0]]}', False, Ending.WRONG),
        (200, b'{"predictions": [[5.0, 1.0]]}', False, Ending.ANSWER),
    ],
)
def test_replies_are_judged(status: int, body: bytes, is_proxied: bool, ending: Ending) -> None:
    door = DOOR._replace(is_proxied=is_proxied)
    reply = Reply(status, body, 1)
    assert judge(door, "plain", 5, reply, sent=1.0, ended=2.0).ending is ending
