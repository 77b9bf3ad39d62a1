"""Which bodies a service reads on the loop, and what becomes of those that it has read apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import msgspec
import pytest

from batching.errors import InvalidArgument, ResourceExhausted, ServingError
from cluster.api import Parsed, RequestParser
from cluster.doors.reader import Method
from cluster.doors.reading import Reading, ReadingRoom
from cluster.forms import Forms
from shards.manifest import Signature
from tests.cluster.routing_fakes import doubled, epoch, plain, turns
from tests.cluster.test_service import ONE, PREDICT, Door, error_of, play


class FakeRoom:
    """Keeps what it is asked; a test reads when it likes."""

    def __init__(self) -> None:
        self.asked: list[tuple[Method, bytes, bytes]] = []
        self.done: list[Callable[[Parsed | ServingError], None]] = []
        self.cancelled = 0
        self.is_full = False

    def read(
        self,
        method: Method,
        signatures: bytes,
        body: bytes,
        deadline: float,
        done: Any,
        forms: Forms | None = None,
    ) -> Reading:
        if self.is_full:
            raise ResourceExhausted("too many large bodies wait to be read", 1000)
        self.asked.append((method, signatures, body))
        self.done.append(done)
        return cast(Reading, self)

    def cancel(self) -> None:
        self.cancelled += 1

    def answer(self) -> None:
        """Read the oldest body, as the process would."""
        _, signatures, body = self.asked.pop(0)
        known = msgspec.msgpack.decode(signatures, type=dict[str, Signature])
        try:
            outcome: Parsed | ServingError = RequestParser(known).parse(body)
        except ServingError as error:
            outcome = error
        self.done.pop(0)(outcome)


def with_room(door: Door) -> FakeRoom:
    room = FakeRoom()
    door.service._room = cast(ReadingRoom, room)
    return room


def usual(nbytes: int) -> bytes:
    return b'{"instances":[1.0' + b",1.0" * ((nbytes - 20) // 4) + b"]}"


def unusual(nbytes: int) -> bytes:
    """Its extra key sends it to the complete reading."""
    return b'{"more":0,"instances":[1.0' + b",1.0" * ((nbytes - 30) // 4) + b"]}"


@pytest.mark.parametrize(
    ("body", "path", "is_apart"),
    [
        (usual(1 << 10), PREDICT, False),
        (unusual(8 << 10), PREDICT, False),
        (unusual(9 << 10), PREDICT, True),
        (usual(128 << 10), PREDICT, False),
        (usual(129 << 10), PREDICT, True),
        (b"[" * (100 << 10), PREDICT, True),
        (b"[" * (8 << 20), PREDICT, True),
        (b'{"examples":[' + b'{"x":1},' * 2000 + b'{"x":1}]}', b"/v1/models/model:regress", True),
    ],
)
def test_only_what_is_quick_for_sure_is_read_on_the_loop(
    monkeypatch: pytest.MonkeyPatch, body: bytes, path: bytes, is_apart: bool
) -> None:
    read_here: list[int] = []

    def counting(name: str) -> None:
        real = getattr(RequestParser, name)

        def parse(self: RequestParser, body: bytes) -> Any:
            read_here.append(len(body))
            return real(self, body)

        monkeypatch.setattr(RequestParser, name, parse)

    counting("parse")
    counting("parse_usual")

    async def scenario(door: Door) -> None:
        room = with_room(door)
        await door.bench.router.adopt(epoch(1, (plain(), ONE)))
        for _ in range(2):  # the second time the path is known
            door.ask(body, path)
        assert len(room.asked) == (2 if is_apart else 0)
        assert door.responses == []
        if is_apart:
            assert all(nbytes <= 128 << 10 for nbytes in read_here)

    play(scenario, monkeypatch)


def test_the_complete_reading_of_a_body_beyond_its_bound_happens_nowhere_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(body: bytes) -> dict[str, object]:
        raise AssertionError(f"{len(body)} bytes were read by the complete reading")

    monkeypatch.setattr("cluster.api.predict.load", load)
    monkeypatch.setattr("cluster.api.examples.load", load)

    async def scenario(door: Door) -> None:
        room = with_room(door)
        await door.bench.router.adopt(epoch(1, (plain(), ONE)))
        for nbytes in (9 << 10, 100 << 10, 2 << 20):
            for character in (b"[", b"{", b"1", b'"', b" ", b"\xff", b"\\"):
                door.ask(character * nbytes)
        assert len(room.asked) == 21
        assert door.responses == []

    play(scenario, monkeypatch)


def test_a_request_read_apart_is_answered_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(door: Door) -> None:
        room = with_room(door)
        await door.bench.router.adopt(epoch(1, (plain(version=7), ONE)))
        door.ask(unusual(20_000))
        room.answer()
        await turns()
        doubled(door.bench.actors["a"].take())
        [response] = door.responses
        assert (response.status, response.body[:20]) == (200, b'{"predictions":[2.0,')
        assert response.headers == b"x-servable-version: 7\r\n"

    play(scenario, monkeypatch)


def test_mistakes_and_a_full_room_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(door: Door) -> None:
        room = with_room(door)
        await door.bench.router.adopt(epoch(1, (plain(), ONE)))
        door.ask(b"nonsense" * 5000)
        room.answer()
        room.is_full = True
        door.ask(unusual(20_000))
        wrong, full = door.responses
        assert (wrong.status, error_of(wrong)) == (400, str(_complaint(b"nonsense" * 5000)))
        assert full.status == 429
        assert full.headers.startswith(b"retry-after: 1\r\nretry-after-ms: 1000\r\n")

    play(scenario, monkeypatch)


def _complaint(body: bytes) -> ServingError:
    with pytest.raises(InvalidArgument) as caught:
        RequestParser({}).parse(body)
    return caught.value


def test_a_request_goes_on_under_the_routes_of_when_it_was_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(door: Door) -> None:
        room = with_room(door)
        await door.bench.router.adopt(epoch(1, (plain(), ONE)))
        door.ask(unusual(20_000))
        await door.bench.router.adopt(epoch(2, (plain(), {"unit": [["b"]]})))
        room.answer()
        await turns()
        doubled(door.bench.actors["b"].take())
        assert [response.status for response in door.responses] == [200]

    play(scenario, monkeypatch)


def test_a_request_whose_version_went_while_it_was_read_may_come_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(door: Door) -> None:
        room = with_room(door)
        await door.bench.router.adopt(epoch(1, (plain(version=1), ONE)))
        door.ask(unusual(20_000))
        await door.bench.router.adopt(epoch(2, (plain(version=2), ONE)))
        room.answer()
        [response] = door.responses
        assert response.status == 503
        assert response.headers.startswith(b"retry-after: 1\r\nretry-after-ms: 100\r\n")

    play(scenario, monkeypatch)


def test_a_client_that_goes_ends_its_request_before_and_after_it_was_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(door: Door) -> None:
        room = with_room(door)
        await door.bench.router.adopt(epoch(1, (plain(), ONE)))
        requests = [
            door.service.handle(b"POST", PREDICT, {}, unusual(20_000), door.responses.append)
            for _ in range(2)
        ]
        assert requests[0] is not None
        assert requests[1] is not None
        door.service.cancel(requests[0])
        assert room.cancelled == 1
        room.asked.pop(0)
        room.done.pop(0)
        room.answer()
        await turns()
        assert door.bench.router.in_flight == 1
        door.service.cancel(requests[1])
        assert (door.bench.router.in_flight, room.cancelled) == (0, 1)
        assert [response.status for response in door.responses] == [499]

    play(scenario, monkeypatch)
