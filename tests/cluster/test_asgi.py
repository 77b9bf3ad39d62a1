"""The ASGI door: what an ASGI server sees of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from cluster.doors.asgi import AsgiDoor
from cluster.doors.service import Service
from tests.cluster.rest_clients import FakeService, until


class Server:
    """As much of an ASGI server as the door needs."""

    def __init__(self, app: AsgiDoor) -> None:
        self._app = app
        self.lifespan_sent: list[dict[str, Any]] = []
        self._to_lifespan: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def start(self) -> None:
        async def send(message: Any) -> None:
            self.lifespan_sent.append(message)
            self._answered.set()

        self._answered = asyncio.Event()
        scope = {"type": "lifespan"}
        self._lifespan = asyncio.create_task(self._app(scope, self._to_lifespan.get, send))
        self._to_lifespan.put_nowait({"type": "lifespan.startup"})
        await self._answered.wait()

    async def stop(self) -> None:
        self._to_lifespan.put_nowait({"type": "lifespan.shutdown"})
        await self._lifespan

    async def ask(
        self, *messages: dict[str, Any], method: str = "POST", **scope: Any
    ) -> list[dict[str, Any]]:
        """What the door sends for one request."""
        sent: list[dict[str, Any]] = []
        left = list(messages or [body(b"")])

        async def receive() -> dict[str, Any]:
            return left.pop(0)

        async def send(message: Any) -> None:
            sent.append(message)

        full = {"type": "http", "method": method, "path": "/echo", "headers": [], **scope}
        await self._app(full, receive, send)
        return sent


def body(data: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": data, "more_body": more}


def json_of(sent: list[dict[str, Any]]) -> Any:
    start, end = sent
    assert start["type"] == "http.response.start"
    headers = dict(start["headers"])
    assert headers[b"content-length"] == b"%d" % len(end["body"])
    return json.loads(end["body"])


def serve(
    scenario: Callable[[Server, FakeService], Coroutine[Any, Any, None]],
    body_bytes_max: int = 1 << 20,
) -> None:
    async def run() -> None:
        service = FakeService()

        @asynccontextmanager
        async def opening() -> AsyncIterator[Service]:
            yield cast(Service, service)

        server = Server(AsgiDoor(opening, lambda: body_bytes_max))
        await server.start()
        await scenario(server, service)
        await server.stop()

    asyncio.run(run())


def test_a_request_reaches_the_service_as_it_was_sent() -> None:
    async def scenario(server: Server, service: FakeService) -> None:
        sent = await server.ask(
            body(b"text"), raw_path=b"/echo/%20", query_string=b"a=b", headers=[(b"x-a", b"1")]
        )
        seen = json_of(sent)
        assert sent[0]["status"] == 200
        assert (seen["method"], seen["path"]) == ("POST", "/echo/%20?a=b")
        assert (seen["body"], seen["headers"]) == ("text", {"x-a": "1"})

    serve(scenario)


@pytest.mark.parametrize(
    ("scope", "wanted"),
    [
        ({"path": "/echo/ü"}, "/echo/ü"),
        ({"raw_path": b"/echo?a=b", "query_string": b"a=b"}, "/echo?a=b"),
        ({"raw_path": b"", "path": "/echo"}, "/echo"),
    ],
)
def test_servers_that_differ_over_paths_are_understood(scope: Any, wanted: str) -> None:
    async def scenario(server: Server, service: FakeService) -> None:
        assert json_of(await server.ask(**scope))
        assert service.paths == [wanted.encode()]

    serve(scenario)


def test_a_body_that_comes_in_pieces_is_put_together() -> None:
    async def scenario(server: Server, service: FakeService) -> None:
        pieces = [body(b"one ", more=True), body(b"", more=True), body(b"two")]
        assert json_of(await server.ask(*pieces))["body"] == "one two"

    serve(scenario)


@pytest.mark.parametrize(
    ("pieces", "status"),
    [
        ([body(b"x" * 10)], 200),
        ([body(b"x" * 5, more=True), body(b"x" * 5)], 200),
        ([body(b"x" * 11)], 413),
        ([body(b"x" * 5, more=True), body(b"x" * 6)], 413),
        ([body(b"x" * 11, more=True)], 413),
    ],
)
def test_a_body_over_the_bound_is_refused_as_soon_as_that_is_known(
    pieces: list[dict[str, Any]], status: int
) -> None:
    async def scenario(server: Server, service: FakeService) -> None:
        sent = await server.ask(*pieces)
        assert sent[0]["status"] == status
        assert bool(service.paths) == (status == 200)

    serve(scenario, body_bytes_max=10)


@pytest.mark.parametrize(
    "messages",
    [
        [{"type": "http.disconnect"}],
        [body(b"half", more=True), {"type": "http.disconnect"}],
    ],
)
def test_a_client_that_goes_before_its_request_is_whole_is_not_served(
    messages: list[dict[str, Any]],
) -> None:
    async def scenario(server: Server, service: FakeService) -> None:
        assert await server.ask(*messages) == []
        assert service.paths == []

    serve(scenario)


def test_extra_headers_are_passed_on() -> None:
    async def scenario(server: Server, service: FakeService) -> None:
        asking = asyncio.create_task(server.ask(raw_path=b"/later"))
        await until(lambda: bool(service.waiting))
        service.answer_one()
        start, end = await asking
        assert (b"x-late", b"yes") in start["headers"]
        assert end["body"] == b'"late"'

    serve(scenario)


def test_an_answer_after_the_server_gave_up_is_dropped() -> None:
    async def scenario(server: Server, service: FakeService) -> None:
        asking = asyncio.create_task(server.ask(raw_path=b"/later"))
        await until(lambda: bool(service.waiting))
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert service.cancelled == [b"/later"]
        service.answer_one()

    serve(scenario)


def test_other_protocols_are_closed() -> None:
    async def scenario(server: Server, service: FakeService) -> None:
        assert await server.ask(type="websocket") == [{"type": "websocket.close", "code": 1003}]

    serve(scenario)


# Lifespan


def test_before_start_and_after_the_end_requests_are_answered_503() -> None:
    closed: list[str] = []

    @asynccontextmanager
    async def opening() -> AsyncIterator[Service]:
        yield cast(Service, FakeService())
        closed.append("closed")

    async def run() -> None:
        server = Server(AsgiDoor(opening, lambda: 1 << 20))
        assert (await server.ask())[0]["status"] == 503
        await server.start()
        assert (await server.ask())[0]["status"] == 200
        await server.stop()
        assert (await server.ask())[0]["status"] == 503
        assert closed == ["closed"]
        kinds = [message["type"] for message in server.lifespan_sent]
        assert kinds == ["lifespan.startup.complete", "lifespan.shutdown.complete"]

    asyncio.run(run())


@pytest.mark.parametrize("phase", ["startup", "shutdown"])
def test_a_failure_is_told_for_the_phase_in_which_it_happened(phase: str) -> None:
    @asynccontextmanager
    async def opening() -> AsyncIterator[Service]:
        if phase == "startup":
            raise RuntimeError("no controller")
        yield cast(Service, FakeService())
        raise RuntimeError("no controller")

    async def run() -> None:
        server = Server(AsgiDoor(opening, lambda: 1 << 20))
        await server.start()
        with pytest.raises(RuntimeError):
            await server.stop()
        last = server.lifespan_sent[-1]
        assert last == {"type": f"lifespan.{phase}.failed", "message": "no controller"}

    asyncio.run(run())
