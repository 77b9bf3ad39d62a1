"""The prototype's frames: cut as they were packed, computed together, matched by request id."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable
from typing import cast

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.floor_framed import UNIT, FramedDevice, FramedLink, Header, cut, pack, serve
from bench.floor_link import Rows
from bench.mlp import WIDTH


class _Transport:
    """What was written to it."""

    def __init__(self, *, closing: bool = False) -> None:
        self.written: list[bytes] = []
        self._closing = closing

    def write(self, data: bytes) -> None:
        self.written.append(bytes(data))

    def is_closing(self) -> bool:
        return self._closing

    def as_transport(self) -> asyncio.Transport:
        return cast("asyncio.Transport", self)

    def predictions(self) -> list[list[float]]:
        """The rows in the one answer that was written."""
        (answer,) = self.written
        found: list[list[float]] = json.loads(answer.partition(b"\r\n\r\n")[2])["predictions"]
        return found


class _Loop:
    """A loop whose turn ends when the test says so."""

    def __init__(self) -> None:
        self.soon: list[Callable[[], None]] = []
        self.stopped = False

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.soon.append(callback)

    def stop(self) -> None:
        self.stopped = True

    def end_turn(self) -> None:
        turn, self.soon = self.soon, []
        for callback in turn:
            callback()


def _rows(*firsts: float) -> Rows:
    """Rows that are told apart by their number, which fills them."""
    return np.repeat(np.asarray(firsts, np.float32)[:, None], WIDTH, axis=1)


def _frame(unit: str, ids: list[int], counts: list[int], rows: Rows) -> bytes:
    return pack(msgspec.msgpack.encode(Header(unit, ids, counts)), [rows.tobytes()])


def _opened(data: bytes) -> list[tuple[Header, Rows]]:
    """The frames in what was written, and nothing after them."""
    frames, rest = cut(data)
    assert rest == b""
    return [
        (
            msgspec.msgpack.decode(header, type=Header),
            np.frombuffer(body, np.float32).reshape(-1, WIDTH),
        )
        for header, body in frames
    ]


def _link() -> tuple[FramedLink, _Loop, _Transport]:
    loop, transport = _Loop(), _Transport()
    link = FramedLink(cast("asyncio.AbstractEventLoop", loop))
    link.connection_made(transport.as_transport())
    return link, loop, transport


def _device(*names: str) -> tuple[FramedDevice, _Transport, list[int]]:
    """A device whose units double, and the row counts that they were called with."""
    called: list[int] = []

    def double(rows: Rows) -> Rows:
        called.append(len(rows))
        doubled: Rows = rows * np.float32(2)
        return doubled

    device = FramedDevice(dict.fromkeys(names, double), lambda: None)
    transport = _Transport()
    device.connection_made(transport.as_transport())
    return device, transport, called


@given(
    st.lists(st.tuples(st.binary(max_size=20), st.lists(st.binary(max_size=9), max_size=3))),
    st.integers(1, 40),
)
def test_frames_are_cut_as_they_were_packed_however_they_arrive(
    sent: list[tuple[bytes, list[bytes]]], piece: int
) -> None:
    stream = b"".join(pack(header, parts) for header, parts in sent)
    found: list[tuple[bytes, bytes]] = []
    rest = b""
    for start in range(0, len(stream), piece):
        frames, rest = cut(rest + stream[start : start + piece])
        found += frames
    assert found == [(header, b"".join(parts)) for header, parts in sent]
    assert rest == b""


def test_requests_of_a_turn_leave_as_one_frame() -> None:
    link, loop, device = _link()
    client = _Transport().as_transport()
    link.ask(client, _rows(1).tolist())
    link.ask(client, _rows(2, 3).tolist())
    assert device.written == []
    loop.end_turn()
    link.ask(client, _rows(4).tolist())
    loop.end_turn()
    first, second = device.written
    ((header, rows),) = _opened(first)
    assert header == Header(UNIT, [0, 1], [1, 2])
    assert np.array_equal(rows, _rows(1, 2, 3))
    ((header, rows),) = _opened(second)
    assert header == Header(UNIT, [2], [1])
    assert np.array_equal(rows, _rows(4))


def test_answers_find_their_clients_by_id_in_any_order() -> None:
    link, loop, _ = _link()
    clients = [_Transport() for _ in range(3)]
    for number, client in enumerate(clients):
        link.ask(client.as_transport(), _rows(*[number] * (number + 1)).tolist())
    loop.end_turn()
    link.data_received(_frame(UNIT, [2, 0], [3, 1], _rows(20, 21, 22, 0)))
    assert clients[1].written == []
    link.data_received(_frame(UNIT, [1], [2], _rows(10, 11)))
    firsts = [[row[0] for row in client.predictions()] for client in clients]
    assert firsts == [[0], [10, 11], [20, 21, 22]]


def test_answer_in_pieces_is_written_once_when_it_is_whole() -> None:
    link, loop, _ = _link()
    client = _Transport()
    link.ask(client.as_transport(), _rows(5).tolist())
    loop.end_turn()
    answer = _frame(UNIT, [0], [1], _rows(7))
    for start in range(0, len(answer), 50):
        assert client.written == []
        link.data_received(answer[start : start + 50])
    assert client.predictions() == _rows(7).tolist()


def test_answer_for_a_client_that_has_left_is_dropped() -> None:
    link, loop, _ = _link()
    gone, there = _Transport(closing=True), _Transport()
    for client in (gone, there):
        link.ask(client.as_transport(), _rows(1).tolist())
    loop.end_turn()
    link.data_received(_frame(UNIT, [0, 1], [1, 1], _rows(1, 2)))
    assert gone.written == []
    assert there.predictions() == _rows(2).tolist()


def test_router_ends_when_the_device_leaves() -> None:
    link, loop, _ = _link()
    link.connection_lost(None)
    assert loop.stopped


def test_what_has_arrived_is_one_batch_and_each_frame_is_answered() -> None:
    device, router, called = _device("a")
    device.data_received(
        _frame("a", [3, 4], [1, 2], _rows(1, 2, 3)) + _frame("a", [5], [1], _rows(4))
    )
    assert called == [4]
    (written,) = router.written
    answered = _opened(written)
    assert [header for header, _ in answered] == [
        Header("a", [3, 4], [1, 2]),
        Header("a", [5], [1]),
    ]
    assert np.array_equal(answered[0][1], _rows(2, 4, 6))
    assert np.array_equal(answered[1][1], _rows(8))


def test_units_are_computed_apart() -> None:
    device, router, called = _device("a", "b")
    device.data_received(
        _frame("a", [0], [1], _rows(1))
        + _frame("b", [1], [2], _rows(2, 3))
        + _frame("a", [2], [1], _rows(4))
    )
    assert called == [2, 2]
    found = {
        header.ids[0]: rows[:, 0].tolist()
        for written in router.written
        for header, rows in _opened(written)
    }
    assert found == {0: [2], 1: [4, 6], 2: [8]}


def test_frame_that_is_not_whole_waits() -> None:
    device, router, called = _device("a")
    frame = _frame("a", [0], [1], _rows(1))
    device.data_received(frame + frame[:-1])
    assert called == [1]
    device.data_received(frame[-1:])
    assert called == [1, 1]
    assert len(router.written) == 2


@pytest.mark.parametrize("count", [1, 3000])
def test_serve_answers_over_a_socket_until_the_router_leaves(count: int) -> None:
    """Three thousand rows are more than one read or write of the loop."""
    near, far = socket.socketpair()
    thread = threading.Thread(target=serve, args=(far, {"a": lambda rows: rows + np.float32(1)}))
    thread.start()
    with near:
        near.settimeout(20)
        frame = _frame("a", [9], [count], _rows(*range(count)))
        near.sendall(frame)
        received = b""
        while len(received) < len(frame):
            received += near.recv(1 << 16)
    thread.join(20)
    assert not thread.is_alive()
    ((header, rows),) = _opened(received)
    assert header == Header("a", [9], [count])
    assert np.array_equal(rows, _rows(*range(1, count + 1)))
