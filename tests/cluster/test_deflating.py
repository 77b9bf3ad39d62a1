"""Compressed answers: what a client asks for it gets where it pays, and every answer comes once."""

from __future__ import annotations

import asyncio
import gzip
import threading
import time
from typing import Any

import numpy as np
import orjson
import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st

from batching.errors import DeadlineExceeded, ResourceExhausted, ServingError
from cluster.doors import packing as packing_room
from cluster.doors.packing import Packer
from cluster.doors.response import Response
from cluster.forms import NotAcceptable, Packing, forms_of, raw
from cluster.forms.deflating import deflated, packing_asked
from cluster.forms.inflating import inflated
from tests.cluster.routing_fakes import doubled, epoch, plain, turns
from tests.cluster.test_inflating import PACK
from tests.cluster.test_service import BODY, ONE, Door, error_of, play

TEXT = b"the same words again and again, " * 400
#: Larger than what is compressed on the loop.
LARGE = TEXT * 10
NOISE = np.random.default_rng(0).bytes(200_000)
EACH = pytest.mark.parametrize("encoding", PACK)


# What is asked for


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (b"", None),
        (b"gzip", Packing("gzip")),
        (b"x-gzip", Packing("gzip")),
        (b"GZIP ; Q=0.5", Packing("gzip")),
        (b"gzip, deflate, br, zstd", Packing("zstd")),
        (b"gzip;q=1.0, zstd;q=0.9", Packing("gzip")),
        (b"gzip;q=0", None),
        (b"gzip;q=0, zstd", Packing("zstd")),
        (b"gzip;q=2", None),
        (b"gzip;q=nan", None),
        (b"gzip;q=", None),
        (b"br, deflate", None),
        (b"*", Packing("gzip")),
        (b"*;q=0.1, gzip;q=0", Packing("zstd")),
        (b"zstd;q=0.2, *;q=0.3", Packing("gzip")),
        (b"identity", None),
        (b"identity, gzip;q=0.5", None),
        (b"identity;q=0.5, gzip", Packing("gzip")),
        (b"identity;q=0, gzip", Packing("gzip", True)),
        (b"*;q=0, zstd;q=0.001", Packing("zstd", True)),
        (b"identity;q=0, *", Packing("gzip", True)),
        (b"identity, *;q=0", None),
        (b",,;;q=1,\xff", None),
    ],
)
def test_weights_say_how_an_answer_is_compressed(said: bytes, wanted: Packing | None) -> None:
    assert packing_asked(said) == wanted
    found = forms_of({b"accept-encoding": said})
    assert (None if found is None else found.packing) == wanted


@pytest.mark.parametrize("said", [b"identity;q=0", b"*;q=0", b"br, *;q=0", b"identity;q=0, br"])
def test_who_refuses_everything_is_told_so(said: bytes) -> None:
    with pytest.raises(NotAcceptable, match="gzip, zstd"):
        packing_asked(said)


@settings(max_examples=100)
@given(said=st.binary(max_size=60) | st.text("gzipstd*;q=01., identy-", max_size=60))
def test_whatever_is_said_is_a_wish_or_a_refusal(said: bytes | str) -> None:
    try:
        found = packing_asked(said if isinstance(said, bytes) else said.encode())
    except NotAcceptable:
        return
    assert found is None or found.encoding in PACK


# The bytes


@EACH
@settings(deadline=None, max_examples=30)
@given(pieces=st.lists(st.tuples(st.binary(max_size=40), st.integers(0, 20_000)), max_size=4))
def test_what_goes_in_comes_out_of_the_other_end(
    encoding: str, pieces: list[tuple[bytes, int]]
) -> None:
    body = b"".join(data * times for data, times in pieces)
    packed = deflated(body, Packing(encoding, True))
    assert packed is not None
    assert inflated(packed, encoding, len(body)) == body
    voluntary = deflated(body, Packing(encoding))
    assert voluntary is None or len(voluntary) <= 0.9 * len(body)


@EACH
def test_what_would_be_no_smaller_stays_as_it_is_unless_that_is_refused(encoding: str) -> None:
    for noise in (NOISE, NOISE[:2000]):
        assert deflated(noise, Packing(encoding)) is None
        packed = deflated(noise, Packing(encoding, True))
        assert packed is not None
        assert inflated(packed, encoding, len(noise)) == noise


@EACH
def test_a_body_that_nobody_waits_for_is_given_up_between_two_pieces(encoding: str) -> None:
    asked: list[bool] = []

    def is_over() -> bool:
        asked.append(len(asked) >= 2)
        return asked[-1]

    assert deflated(bytes(64 << 20), Packing(encoding), is_over) is None
    assert len(asked) == 3


# The packer


class Packed:
    """A packer on a loop of its own, and what it sent."""

    def __init__(self, **options: Any) -> None:
        self.sent: list[Response] = []
        self._sent = asyncio.Event()
        self.refused: list[ServingError] = []
        self.packer = Packer(1024, self.refusal, time.monotonic, **options)

    def refusal(self, error: ServingError) -> Response:
        self.refused.append(error)
        return Response(400, "application/json", b"", error.message.encode())

    def send(
        self, body: bytes, packing: Packing, within_s: float = 30.0, status: int = 200
    ) -> None:
        deadline = time.monotonic() + within_s
        response = Response(status, "text/plain", b"x-a: 1\r\n", body)
        self.packer.over(self._respond, packing, deadline)(response)

    def _respond(self, response: Response) -> None:
        self.sent.append(response)
        self._sent.set()

    async def wait(self, count: int = 1) -> None:
        async with asyncio.timeout(20):
            while len(self.sent) < count:
                self._sent.clear()
                await self._sent.wait()


def run(scenario: Any, **options: Any) -> None:
    async def play() -> None:
        packed = Packed(**options)
        try:
            await scenario(packed)
        finally:
            packed.packer.close()

    asyncio.run(play())


@EACH
@pytest.mark.parametrize("body", [TEXT[:1024], LARGE, LARGE * 12], ids=["small", "large", "huge"])
def test_an_answer_comes_compressed_and_says_so(encoding: str, body: bytes) -> None:
    async def scenario(packed: Packed) -> None:
        packed.send(body, Packing(encoding))
        # A small one at once, a large one not on the loop.
        assert len(packed.sent) == (len(body) == 1024)
        await packed.wait()
        [response] = packed.sent
        assert inflated(response.body, encoding, len(body)) == body
        said = f"vary: accept-encoding\r\ncontent-encoding: {encoding}\r\n"
        assert response.headers == b"x-a: 1\r\n" + said.encode()

    run(scenario)


def test_answers_that_are_small_or_errors_or_no_smaller_are_not_compressed() -> None:
    async def scenario(packed: Packed) -> None:
        packed.send(TEXT[:1023], Packing("gzip"))
        packed.send(LARGE, Packing("gzip"), status=500)
        assert [response.headers for response in packed.sent] == [b"x-a: 1\r\n"] * 2
        packed.send(NOISE, Packing("gzip"))
        await packed.wait(3)
        assert packed.sent[2].body == NOISE
        assert packed.sent[2].headers == b"x-a: 1\r\nvary: accept-encoding\r\n"
        packed.send(b"x", Packing("gzip", True))
        assert gzip.decompress(packed.sent[3].body) == b"x"

    run(scenario)


@pytest.mark.parametrize("must", [False, True])
def test_an_answer_that_takes_too_long_is_sent_once_and_in_time(
    monkeypatch: pytest.MonkeyPatch, must: bool
) -> None:
    may_end = threading.Event()

    def slow(body: bytes, packing: Packing, is_over: Any) -> bytes | None:
        may_end.wait(20)
        return None if is_over() else b"late"

    async def scenario(packed: Packed) -> None:
        packed.send(LARGE, Packing("gzip", must), within_s=0.02)
        await packed.wait()
        [response] = packed.sent
        if must:
            assert isinstance(packed.refused.pop(), DeadlineExceeded)
        else:
            assert (response.status, response.body) == (200, LARGE)
        may_end.set()
        monkeypatch.undo()
        packed.send(LARGE, Packing("gzip"))  # behind it, on the same thread
        await packed.wait(2)
        assert gzip.decompress(packed.sent[1].body) == LARGE
        assert len(packed.sent) == 2

    monkeypatch.setattr(packing_room, "deflated", slow)
    run(scenario)


def test_bytes_that_wait_are_bounded_and_one_alone_may_be_larger(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    may_end = threading.Event()

    def slow(body: bytes, packing: Packing, is_over: Any) -> bytes | None:
        may_end.wait(20)
        return deflated(body, packing, is_over)

    async def scenario(packed: Packed) -> None:
        packed.send(LARGE, Packing("gzip"))
        assert packed.sent == []
        packed.send(LARGE, Packing("gzip"))
        assert packed.sent[0].body == LARGE
        packed.send(LARGE, Packing("gzip", True))
        assert isinstance(packed.refused.pop(), ResourceExhausted)
        may_end.set()
        await packed.wait(3)
        packed.send(LARGE, Packing("zstd"))
        await packed.wait(4)
        assert [zstd.decompress(packed.sent[3].body), gzip.decompress(packed.sent[2].body)] == [
            LARGE,
            LARGE,
        ]

    monkeypatch.setattr(packing_room, "deflated", slow)
    run(scenario, waiting_bytes_max=1000)


def test_closing_sends_what_waits_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    may_end = threading.Event()

    def slow(body: bytes, packing: Packing, is_over: Any) -> bytes | None:
        may_end.wait(20)
        return None

    async def scenario(packed: Packed) -> None:
        for _ in range(3):
            packed.send(LARGE, Packing("gzip"))
        packed.packer.close()
        assert [response.body for response in packed.sent] == [LARGE] * 3
        may_end.set()

    monkeypatch.setattr(packing_room, "deflated", slow)
    run(scenario)


# The service


def test_a_service_compresses_what_is_large_enough_for_who_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    many = orjson.dumps({"instances": [1.0] * 600})

    async def scenario(door: Door) -> None:
        await door.bench.router.adopt(epoch(1, (plain(version=7), ONE)))
        asks = {b"accept-encoding": b"gzip"}
        for headers, body, is_packed in (
            (asks, many, True),
            (asks, many, True),  # the head is known now
            (asks, BODY, False),
            ({}, many, False),
            ({b"accept-encoding": b"identity"}, many, False),
            ({**asks, b"accept": b"application/octet-stream"}, many, True),
        ):
            door.ask(body, headers=headers)
            await turns()
            doubled(door.bench.actors["a"].take())
            response = door.responses.pop()
            assert (b"content-encoding: gzip\r\n" in response.headers) == is_packed
            found = gzip.decompress(response.body) if is_packed else response.body
            if b"accept" in headers:
                length = int(response.headers.split(b"length: ")[1].split(b"\r\n")[0])
                assert raw.read_answer(found, length)["y"].tolist() == [2.0] * 600
            else:
                wanted = [2.0] * 600 if body is many else [2.0, 4.0]
                assert orjson.loads(found) == {"predictions": wanted}

    play(scenario, monkeypatch)


def test_who_takes_no_answer_is_refused_before_anything_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(door: Door) -> None:
        await door.bench.router.adopt(epoch(1, (plain(), ONE)))
        for path, method in ((b"/v1/models/model:predict", b"POST"), (b"/metrics", b"GET")):
            door.ask(BODY, path, method, {b"accept-encoding": b"identity;q=0"})
            response = door.responses.pop()
            assert response.status == 406
            assert b"accept-encoding: gzip, zstd, identity\r\n" in response.headers
            assert "refuses identity" in error_of(response)
        await turns()
        assert not door.bench.actors["a"].asked

    play(scenario, monkeypatch)


def test_counters_and_descriptions_are_compressed_too_and_always_vary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(door: Door) -> None:
        await door.bench.router.adopt(epoch(1, (plain(), ONE)))
        path = b"/v1/models/model/metadata"
        plainly = door.get(path)
        assert len(plainly.body) < 1024
        assert b"vary" not in plainly.headers
        door.service._packer._bytes_min = 100
        plainly = door.get(path)
        assert plainly.headers == b"vary: accept-encoding\r\n"
        door.ask(b"", path, b"GET", {b"accept-encoding": b"gzip"})
        packed = door.responses[-1]
        assert gzip.decompress(packed.body) == plainly.body

    play(scenario, monkeypatch)


def test_a_long_list_is_read_as_far_as_anybody_writes_one() -> None:
    assert packing_asked(b"x," * 60 + b"gzip") == Packing("gzip")
    assert packing_asked(b"x," * 64 + b"gzip") is None
    assert packing_asked(b"," * 32_000 + b"gzip") is None
    assert packing_asked(b"gzip" + b";a" * 3 + b";q=0") is None
