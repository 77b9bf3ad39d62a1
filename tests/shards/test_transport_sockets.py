"""What is particular to sockets: paths, permissions, credentials, ways taken, coalescing."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from batching.errors import FailedPrecondition, InvalidArgument
from shards.errors import HandshakeRefused, LinkClosed
from shards.handshake import PeerInfo
from shards.transport import Counters, Limits, Listener, connect, listen, sockets
from shards.transport._session import Session
from shards.wire import Buffer, FrameKind
from tests.shards.transport_planes import (
    NODE,
    SECRET,
    Recorder,
    call,
    client_handshake,
    closed_at_the_end,
    frame_bytes,
    run,
    until,
)


async def serve(handler: Recorder, **changes: Any) -> Listener:
    arguments: Any = {"name": "server", "generation": 7, "node": NODE, "secret": SECRET}
    return closed_at_the_end(await listen(handler=handler, **(arguments | changes)))


async def reach(listener: Listener, handler: Recorder, **changes: Any) -> Any:
    arguments = {"name": "caller", "node": NODE, "secret": SECRET} | changes
    endpoint = arguments.pop("endpoint", listener.endpoint)
    return await connect(endpoint, handler=handler, **arguments)


# Looking at a file takes no time worth an await, and these tests have their loop to themselves.


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def is_there(path: str | Path) -> bool:
    return os.path.lexists(path)


def put(path: str, text: str) -> None:
    Path(path).write_text(text)


def entries_of(directory: Path) -> list[Path]:
    return list(directory.iterdir())


def text_of(path: str) -> str:
    return Path(path).read_text()


def kind_of(link: Any) -> Any:
    return link._pipe.get_extra_info("socket").family


def test_the_socket_is_its_owners_alone_and_goes_with_the_listener(tmp_path: Path) -> None:
    async def scenario(untaken: list[Any]) -> None:
        listener = await serve(Recorder(), directory=tmp_path / "made" / "here")
        path = Path(listener.endpoint.path)
        assert mode_of(path) == 0o600
        assert mode_of(path.parent) == 0o700
        await listener.close()
        assert not is_there(path)
        await listener.close()  # closing again is nothing

    run("unix", scenario)


@pytest.mark.parametrize("plane", ["unix", "unix on the standard loop"])
def test_a_directory_longer_than_a_socket_address_serves(tmp_path: Path, plane: str) -> None:
    async def scenario(untaken: list[Any]) -> None:
        listener = await serve(Recorder(), directory=tmp_path / ("d" * 150))
        assert len(listener.endpoint.path) > 150
        link = await reach(listener, Recorder())
        assert kind_of(link) == socket.AF_UNIX
        await listener.close()
        assert not is_there(listener.endpoint.path)

    run(plane, scenario)


def test_names_that_are_no_file_names_and_generations_do_not_collide(tmp_path: Path) -> None:
    async def scenario(untaken: list[Any]) -> None:
        listeners = [
            await serve(Recorder(), directory=tmp_path, name=name, generation=generation)
            for name in ("a/b", "a_b", "../up", "x" * 300 + "1", "x" * 300 + "2", "é\n")
            for generation in (1, 2)
        ]
        paths = {Path(listener.endpoint.path) for listener in listeners}
        assert len(paths) == len(listeners)
        assert {path.parent for path in paths} == {tmp_path}
        for listener in listeners:
            link = await reach(listener, Recorder())
            assert link.peer.name == listener.endpoint.actor
            await listener.close()

    run("unix", scenario)


def test_a_socket_left_by_a_dead_process_is_replaced(tmp_path: Path) -> None:
    async def scenario(untaken: list[Any]) -> None:
        first = await serve(Recorder(), directory=tmp_path)
        path = first.endpoint.path
        await first.close()
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(path)
        second = await serve(Recorder(), directory=tmp_path)
        assert second.endpoint.path == path
        await reach(second, Recorder())
        await second.close()

    run("unix", scenario)


def test_a_socket_of_a_live_listener_is_not_taken_over(tmp_path: Path) -> None:
    async def scenario(untaken: list[Any]) -> None:
        first = await serve(Recorder(), directory=tmp_path)
        with pytest.raises(FailedPrecondition, match="server cannot listen"):
            await serve(Recorder(), directory=tmp_path)
        await reach(first, Recorder())
        await first.close()

    run("unix", scenario)


def test_a_file_in_the_way_is_not_removed(tmp_path: Path) -> None:
    async def scenario(untaken: list[Any]) -> None:
        listener = await serve(Recorder(), directory=tmp_path)
        await listener.close()
        put(listener.endpoint.path, "somebody's")
        with pytest.raises(FailedPrecondition):
            await serve(Recorder(), directory=tmp_path)
        assert text_of(listener.endpoint.path) == "somebody's"

    run("unix", scenario)


def test_a_listener_needs_somewhere_to_listen() -> None:
    async def scenario(untaken: list[Any]) -> None:
        with pytest.raises(InvalidArgument):
            await serve(Recorder())

    run("unix", scenario)


def test_a_port_that_is_taken_is_reported_and_leaves_no_socket_behind(tmp_path: Path) -> None:
    async def scenario(untaken: list[Any]) -> None:
        first = await serve(Recorder(), tcp_host="127.0.0.1")
        with pytest.raises(FailedPrecondition):
            await serve(
                Recorder(),
                directory=tmp_path,
                tcp_host="127.0.0.1",
                tcp_port=first.endpoint.port,
            )
        assert entries_of(tmp_path) == []
        await first.close()

    run("unix", scenario)


def test_a_peer_on_the_node_comes_by_unix_socket_and_another_by_tcp(tmp_path: Path) -> None:
    async def scenario(untaken: list[Any]) -> None:
        listener = await serve(Recorder(), directory=tmp_path, tcp_host="127.0.0.1")
        near = await reach(listener, Recorder())
        far = await reach(listener, Recorder(), node="node-b")
        assert kind_of(near) == socket.AF_UNIX
        assert kind_of(far) == socket.AF_INET
        far_socket = far._pipe.get_extra_info("socket")
        assert far_socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
        await listener.close()

    run("unix", scenario)


def test_where_the_path_is_not_there_tcp_is_tried(tmp_path: Path) -> None:
    """Two containers of one node do not share a directory."""

    async def scenario(untaken: list[Any]) -> None:
        listener = await serve(Recorder(), directory=tmp_path, tcp_host="127.0.0.1")
        away = msgspec.structs.replace(listener.endpoint, path="/nowhere/at/all.sock")
        link = await reach(listener, Recorder(), endpoint=away)
        assert kind_of(link) == socket.AF_INET
        await listener.close()

    run("unix", scenario)


def test_an_endpoint_that_nobody_serves_says_what_was_tried(tmp_path: Path) -> None:
    async def scenario(untaken: list[Any]) -> None:
        listener = await serve(Recorder(), directory=tmp_path, tcp_host="127.0.0.1")
        await listener.close()
        with pytest.raises(LinkClosed, match=r"server cannot be reached: .*; .*"):
            await reach(listener, Recorder())
        nowhere = msgspec.structs.replace(listener.endpoint, host="", path="")
        with pytest.raises(LinkClosed, match="listens nowhere"):
            await reach(listener, Recorder(), endpoint=nowhere)

    run("unix", scenario)


def test_a_refusal_is_final_whatever_other_way_there_is(tmp_path: Path) -> None:
    async def scenario(untaken: list[Any]) -> None:
        listener = await serve(Recorder(), directory=tmp_path, tcp_host="127.0.0.1")
        with pytest.raises(HandshakeRefused):
            await reach(listener, Recorder(), secret=b"another")
        assert listener.counters.handshakes_refused == 1
        await listener.close()

    run("unix", scenario)


def test_a_server_that_accepts_and_says_nothing_is_given_up(tmp_path: Path) -> None:
    async def scenario(untaken: list[Any]) -> None:
        listener = await serve(Recorder(), directory=tmp_path)
        endpoint = msgspec.structs.replace(listener.endpoint, path=str(tmp_path / "mute"))
        with socket.socket(socket.AF_UNIX) as mute:
            mute.bind(endpoint.path)
            mute.listen()
            with pytest.raises(LinkClosed, match="no handshake within"):
                await reach(
                    listener,
                    Recorder(),
                    endpoint=endpoint,
                    limits=Limits(handshake_timeout_s=0.05),
                )
        await listener.close()

    run("unix", scenario)


def test_a_process_of_another_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel names the peer's user; here it is we who seem to have changed."""
    monkeypatch.setattr(os, "geteuid", lambda: 54321)

    async def scenario(untaken: list[Any]) -> None:
        there = Recorder()
        listener = await serve(there, directory=tmp_path)
        with pytest.raises(HandshakeRefused, match="a process of user"):
            await reach(listener, Recorder())
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(stranger, listener.endpoint.path)
            assert await loop.sock_recv(stranger, 1) == b""
        assert listener.counters.handshakes_refused >= 1
        assert there.closed == []
        await listener.close()

    run("unix", scenario)


def test_refusals_of_a_stranger_who_never_stops_do_not_fill_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(untaken: list[Any]) -> None:
        listener = await serve(Recorder(), directory=tmp_path)
        for _ in range(40):
            with pytest.raises(HandshakeRefused):
                await reach(listener, Recorder(), secret=b"another")
        assert listener.counters.handshakes_refused == 40
        await listener.close()

    run("unix", scenario)
    assert len(caplog.records) == 6  # the 1st, 2nd, 4th, 8th, 16th and 32nd
    assert SECRET.decode() not in caplog.text


def test_links_lists_the_open_ones(tmp_path: Path) -> None:
    async def scenario(untaken: list[Any]) -> None:
        there = Recorder()
        listener = await serve(there, directory=tmp_path)
        first = await reach(listener, Recorder())
        await reach(listener, Recorder(), name="second")
        await until(lambda: len(listener.links) == 2)
        assert {link.peer.name for link in listener.links} == {"caller", "second"}
        first.close()
        await until(lambda: bool(there.closed))
        assert [link.peer.name for link in listener.links] == ["second"]
        await listener.close()

    run("unix", scenario)


class CountingPipe:
    """Stands for a transport: keeps what each write carried."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.aborted = False

    def write(self, data: Buffer) -> None:
        self.writes.append(bytes(data))

    def writelines(self, list_of_data: Sequence[Buffer]) -> None:
        self.writes.append(b"".join(list_of_data))

    def get_write_buffer_size(self) -> int:
        return 0

    def close(self) -> None: ...

    def abort(self) -> None:
        self.aborted = True


class Proven:
    """A handshake that is over after one message."""

    def __init__(self) -> None:
        self.peer: PeerInfo | None = None

    def start(self) -> list[tuple[FrameKind, bytes]]:
        return []

    def receive(self, kind: FrameKind, header: bytes) -> list[tuple[FrameKind, bytes]]:
        self.peer = PeerInfo(name="peer", generation=1, node=NODE)
        return []


def opened(handler: Recorder) -> tuple[Session, CountingPipe]:
    pipe = CountingPipe()
    session = Session(
        loop=asyncio.get_running_loop(),
        handshake=Proven(),
        handler=handler,
        limits=Limits(),
        counters=Counters(),
        on_settled=lambda session, error: None,
        on_lost=lambda session: None,
    )
    session.begin(pipe)
    session.feed(frame_bytes(FrameKind.HELLO, b""))
    return session, pipe


@pytest.mark.parametrize("body", [b"", bytes(100), bytes(50_000)])
def test_frames_sent_in_one_turn_leave_in_one_write(body: bytes) -> None:
    async def scenario(untaken: list[Any]) -> None:
        session, pipe = opened(Recorder())
        for number in range(50):
            session.send(FrameKind.CALL, call(number), [body])
        assert pipe.writes == []
        assert session.waiting_bytes > 50 * len(body)
        await asyncio.sleep(0)
        whole = b"".join(frame_bytes(FrameKind.CALL, call(n), body) for n in range(50))
        assert pipe.writes == [whole]
        session.lost(None)

    run("unix", scenario)


def test_answers_to_what_one_read_brought_leave_in_one_write_at_once() -> None:
    async def scenario(untaken: list[Any]) -> None:
        session, pipe = opened(Recorder(echo=True))
        session.feed(b"".join(frame_bytes(FrameKind.CALL, call(n)) for n in range(20)))
        assert len(pipe.writes) == 1  # without another turn of the loop
        session.lost(None)

    run("unix", scenario)


def test_a_stranger_gets_little_memory_before_it_is_proven() -> None:
    async def scenario(untaken: list[Any]) -> None:
        session, _ = opened(Recorder())
        fresh = Session(
            loop=asyncio.get_running_loop(),
            handshake=client_handshake(),
            handler=Recorder(),
            limits=Limits(),
            counters=Counters(),
            on_settled=lambda session, error: None,
            on_lost=lambda session: None,
        )
        assert len(fresh.get_buffer(65536)) < 5000
        assert len(session.get_buffer(65536)) >= 65536
        session.lost(None)

    run("unix", scenario)


def test_a_session_given_up_before_its_connection_is_there_aborts_it() -> None:
    """A listener may close between the kernel's accept and the loop's telling."""

    async def scenario(untaken: list[Any]) -> None:
        lost: list[Session] = []
        session = Session(
            loop=asyncio.get_running_loop(),
            handshake=Proven(),
            handler=Recorder(),
            limits=Limits(),
            counters=Counters(),
            on_settled=lambda session, error: None,
            on_lost=lost.append,
        )
        session.shut("shutting down")
        pipe = CountingPipe()
        session.begin(pipe)
        assert pipe.aborted
        session.lost(None)
        assert lost == [session]

    run("unix", scenario)


def test_a_handler_that_fails_on_the_end_of_a_link_does_not_hold_up_its_listener(
    tmp_path: Path,
) -> None:
    class Failing(Recorder):
        def on_closed(self, link: Any, error: Exception | None) -> None:
            super().on_closed(link, error)
            raise ZeroDivisionError("a fault")

    async def scenario(untaken: list[Any]) -> None:
        there = Failing()
        listener = await serve(there, directory=tmp_path)
        await reach(listener, Recorder())
        await until(lambda: len(listener.links) == 1)
        await listener.close()
        assert there.errors == [None]
        assert [type(what["exception"]) for what in untaken] == [ZeroDivisionError]
        untaken.clear()

    run("unix", scenario)


def test_limits_refuse_what_makes_no_sense() -> None:
    assert Limits(shared_bytes_max=0).shared_bytes_max == 0  # shares none
    for name in set(Limits.__slots__) - {"shared_bytes_max"}:
        with pytest.raises(ValueError, match=name):
            Limits(**{name: 0})
    with pytest.raises(ValueError, match="header_bytes_max"):
        Limits(header_bytes_max=2 << 20)


def test_the_public_names_are_there() -> None:
    assert set(sockets.__all__) == {"Listener", "connect", "listen"}


def test_a_host_that_is_cut_off_is_noticed_within_seconds_at_both_ends() -> None:
    """By the kernel: with bytes under way it waits for so long, without it asks."""

    async def scenario(untaken: list[Any]) -> None:
        server = Recorder()
        listener = await serve(server, tcp_host="127.0.0.1")
        link = await reach(listener, Recorder())
        await until(lambda: bool(listener.links))
        for end in (link, *listener.links):
            sock = end._pipe.get_extra_info("socket")
            assert sock.family == socket.AF_INET
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 3000
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            idle, interval, count = (
                sock.getsockopt(socket.IPPROTO_TCP, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            )
            assert idle + interval * count <= 4

    run("tcp", scenario)
