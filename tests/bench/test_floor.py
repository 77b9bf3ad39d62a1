"""Both floors answer what the model answers, whatever way the requests come."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import numpy as np
import pytest

from bench.errors import ContenderFailed
from bench.floor import PATH, Prototype, Raw, noop, predict_request
from bench.load import own_closed_loop
from bench.mlp import BUCKETS, WIDTH, parameters, rows
from bench.peers import Answers, Peer, ask

_SEED: Final = 11

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[Prototype, Raw], ids=lambda kind: kind.name)
def floor(request: pytest.FixtureRequest) -> Peer:
    found: Peer = request.param(_SEED)
    return found


@pytest.fixture(scope="module")
def url(floor: Peer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with floor.running(tmp_path_factory.mktemp("floor")) as found:
        yield found


def _expected(instances: list[list[float]]) -> Answers:
    """The model in float64, by NumPy."""
    params = {name: array.astype(np.float64) for name, array in parameters(_SEED).items()}
    hidden = np.tanh(np.asarray(instances) @ params["w1"] + params["b1"])
    answers: Answers = (hidden @ params["w2"] + params["b2"]).astype(np.float32)
    return answers


@pytest.mark.parametrize("count", [1, 2, 8, 9, 32, 127, 128, 129, 300])
def test_answers_are_the_models(floor: Peer, url: str, count: int) -> None:
    asked = rows(count, seed=count)
    answers = floor.answers(ask(url, floor.request(asked)))
    assert answers.shape == (count, WIDTH)
    np.testing.assert_allclose(answers, _expected(asked), rtol=1e-4, atol=1e-5)


def test_many_connections_each_get_their_own_answer(floor: Peer, url: str) -> None:
    asked = [rows(count, seed=count) for count in (1, 2, 3, 7, 40)]

    def right(index: int, body: bytes) -> bool:
        answers, expected = floor.answers(body), _expected(asked[index])
        return answers.shape == expected.shape and np.allclose(answers, expected, atol=1e-4)

    outcome = own_closed_loop(
        url,
        [floor.request(instances) for instances in asked],
        connections=16,
        duration_s=0.5,
        check=right,
    )
    assert outcome.failed == 0
    assert outcome.answered > 16


def _connect(url: str) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname or "", parts.port or 0), timeout=20)


def _read_answer(peer: socket.socket) -> bytes:
    """One HTTP answer's body."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += peer.recv(65536)
    head, _, body = received.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].split()[0])
    while len(body) < length:
        body += peer.recv(65536)
    return body


def test_request_that_comes_in_pieces_is_answered(floor: Peer, url: str) -> None:
    asked = rows(3, seed=1)
    wire = floor.request(asked).wire("x")
    with _connect(url) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(wire), 700):
            peer.sendall(wire[start : start + 700])
        answers = floor.answers(_read_answer(peer))
    np.testing.assert_allclose(answers, _expected(asked), atol=1e-4)


def test_client_that_leaves_before_its_answer_disturbs_nobody(floor: Peer, url: str) -> None:
    wire = floor.request(rows(128, seed=2)).wire("x")
    for _ in range(20):
        with _connect(url) as peer:
            peer.sendall(wire)
    asked = rows(2, seed=3)
    answers = floor.answers(ask(url, floor.request(asked)))
    np.testing.assert_allclose(answers, _expected(asked), atol=1e-4)


def test_floor_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "device.sock").touch()
    with (
        pytest.raises(ContenderFailed, match="Address already in use"),
        Prototype(_SEED).running(tmp_path),
    ):
        pytest.fail("it started on a path that was taken")


def test_noop_answers_at_once(tmp_path: Path) -> None:
    with noop(tmp_path) as found:
        assert json.loads(ask(found, predict_request(rows(1, seed=0)))) == {}


def test_rows_and_parameters_repeat_for_a_seed() -> None:
    assert rows(2, seed=4) == rows(2, seed=4) != rows(2, seed=5)
    for name, array in parameters(4).items():
        assert array.dtype == np.float32
        assert np.array_equal(array, parameters(4)[name])
    assert list(BUCKETS) == sorted(BUCKETS)
    assert PATH.endswith(":predict")
