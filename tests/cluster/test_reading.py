"""Bodies that are read in a process of their own: the same requests, the same words, no harm."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from collections.abc import Coroutine
from typing import Any

import msgspec
import numpy as np
import pytest
import uvloop

from batching.errors import (
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    ServingError,
    Unavailable,
)
from cluster.api import ExamplesParser, Parsed, RequestParser
from cluster.doors.reader import Method
from cluster.doors.reading import Reading, ReadingRoom
from cluster.forms import Columns, Form, Forms, packed, raw
from shards.specs import Spec
from tests.cluster.api_support import assert_same_arrays, signature, texts
from tests.cluster.rest_clients import until

SIGNATURES = {
    "serving_default": signature({"x": Spec(("b", 4)), "n": Spec(("b",), "int64")}),
    "texts": signature({"s": Spec(("b",), "string")}),
    "classes": signature({"x": Spec(("b",))}, {"scores": Spec(("b", 2))}, method="classify"),
    "amounts": signature({"x": Spec(("b",))}, {"outputs": Spec(("b",))}, method="regress"),
}
ENCODED = msgspec.msgpack.encode(SIGNATURES)
#: Takes a while to read.
BOMB = b'{"instances":' + b"[" * 500_000 + b"]" * 500_000 + b"}"


class Asked:
    """A room, and what came of what it was asked."""

    def __init__(self, **options: Any) -> None:
        self.room = ReadingRoom(**options)

    def begin(
        self,
        body: bytes,
        method: Method = "predict",
        within_s: float = 30.0,
        forms: Forms | None = None,
    ) -> tuple[Reading, list[Parsed | ServingError]]:
        found: list[Parsed | ServingError] = []
        deadline = asyncio.get_running_loop().time() + within_s
        return self.room.read(method, ENCODED, body, deadline, found.append, forms), found

    async def read(
        self,
        body: bytes,
        method: Method = "predict",
        within_s: float = 30.0,
        forms: Forms | None = None,
    ) -> Parsed | ServingError:
        _, found = self.begin(body, method, within_s, forms)
        await until(lambda: bool(found), 20.0)
        [outcome] = found
        return outcome


async def held(asked: Asked) -> subprocess.Popen[bytes]:
    """The process that reads small bodies, stopped: whatever it is given, it never reads it."""
    assert isinstance(await asked.read(rows(1)), Parsed)
    process = asked.room._small._process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    return process


def play(scenario: Any, **options: Any) -> None:
    async def run() -> None:
        asked = Asked(**options)
        try:
            await scenario(asked)
        finally:
            asked.room.close()
        assert asked.room._bytes == 0

    coroutine: Coroutine[Any, Any, None] = run()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(coroutine)


def rows(count: int) -> bytes:
    row = {"x": [0.5, -1, 3e40, 1e-9], "n": 2**62 + 1}
    return json.dumps({"instances": [row] * count}).encode()


@pytest.mark.parametrize(
    ("method", "body"),
    [
        ("predict", rows(1)),
        ("predict", rows(20_000)),
        ("predict", b'{"inputs":{"x":[[1,2,3,4]],"n":[5]}}'),
        ("predict", b'{"signature_name":"texts","instances":["a",{"b64":"/w=="},"\\u00e4"]}'),
        ("classify", b'{"signature_name":"classes","examples":[{"x":1.5},{"x":2}]}'),
        ("regress", b'{"signature_name":"amounts","examples":[{"x":1.5}],"context":{"y":1}}'),
    ],
)
def test_a_request_is_the_same_as_if_it_was_read_here(method: Method, body: bytes) -> None:
    parser = RequestParser(SIGNATURES) if method == "predict" else None
    wanted = parser.parse(body) if parser else ExamplesParser(SIGNATURES, method).parse(body)  # type: ignore[arg-type]

    async def scenario(asked: Asked) -> None:
        found = await asked.read(body, method)
        assert isinstance(found, Parsed)
        assert_same_arrays(found.arrays, wanted.arrays)
        assert list(found.arrays) == list(wanted.arrays)
        assert (found.signature_name, found.rows) == (wanted.signature_name, wanted.rows)
        assert found.columnar == wanted.columnar

    play(scenario)


def test_bodies_without_json_are_read_there_too() -> None:
    columns = Columns({"s": texts([b"a", b"\xff", b""] * 5000)}, "texts")
    written = raw.write_request(columns)

    async def scenario(asked: Asked) -> None:
        for body, forms in (
            (b"".join(written.buffers), Forms(Form.RAW, Form.RAW, written.head_bytes)),
            (packed.write_request(columns).buffers[0], Forms(Form.MSGPACK, Form.JSON)),
            (b"{", Forms(Form.RAW, Form.RAW, 1)),
        ):
            _, found = asked.begin(bytes(body), forms=forms)
            await until(lambda found=found: bool(found), 20.0)  # type: ignore[misc]
            if body == b"{":
                assert isinstance(found[0], InvalidArgument)
                continue
            assert isinstance(found[0], Parsed)
            assert (found[0].signature_name, found[0].rows) == ("texts", 15_000)
            assert_same_arrays(found[0].arrays, columns.arrays)

    play(scenario)


@pytest.mark.parametrize(
    "body",
    [b"", b"nonsense", b'{"instances":[{"x":[1,2,3],"n":1}]}', rows(3)[:-1], b'{"instances":[]}'],
)
def test_a_mistake_has_the_same_words_as_if_it_was_read_here(body: bytes) -> None:
    with pytest.raises(InvalidArgument) as caught:
        RequestParser(SIGNATURES).parse(body)

    async def scenario(asked: Asked) -> None:
        found = await asked.read(body)
        assert isinstance(found, InvalidArgument)
        assert found.message == caught.value.message

    play(scenario)


def test_a_process_that_dies_costs_one_request_and_the_next_gets_another() -> None:
    async def scenario(asked: Asked) -> None:
        first = await held(asked)
        _, found = asked.begin(rows(1))
        _, behind = asked.begin(rows(2))
        await asyncio.sleep(0)
        first.kill()
        await until(lambda: bool(found and behind))
        assert isinstance(found[0], Internal)
        assert isinstance(behind[0], Parsed)
        assert asked.room._small._process is not first
        await until(lambda: first.poll() is not None)

    play(scenario)


def test_a_body_that_takes_too_long_is_given_up_and_the_next_is_read() -> None:
    async def scenario(asked: Asked) -> None:
        busy = await held(asked)
        asked.room._small._read_s_max = 0.2  # from now on: a start may take longer
        found = await asked.read(rows(1))
        assert isinstance(found, ResourceExhausted)
        await until(lambda: busy.poll() is not None)
        asked.room._small._read_s_max = 30.0
        assert isinstance(await asked.read(rows(1)), Parsed)

    play(scenario)


def test_a_deadline_ends_a_body_in_hand_and_those_that_wait() -> None:
    async def scenario(asked: Asked) -> None:
        await held(asked)
        _, first = asked.begin(rows(1), within_s=0.3)
        _, second = asked.begin(rows(1), within_s=0.2)
        await until(lambda: bool(first and second))
        assert isinstance(first[0], DeadlineExceeded)
        assert isinstance(second[0], DeadlineExceeded)
        assert isinstance(await asked.read(rows(1)), Parsed)

    play(scenario)


def test_a_cancelled_body_tells_nobody_and_is_not_even_read_if_it_waits() -> None:
    async def scenario(asked: Asked) -> None:
        first, heard = asked.begin(rows(10))
        second, heard_too = asked.begin(BOMB)
        first.cancel()
        second.cancel()
        assert isinstance(await asked.read(rows(1)), Parsed)
        assert heard == heard_too == []

    play(scenario)


def test_what_waits_is_bounded_in_bytes_and_one_alone_may_be_larger() -> None:
    async def scenario(asked: Asked) -> None:
        body = rows(100)
        _, found = asked.begin(body)
        with pytest.raises(ResourceExhausted) as caught:
            asked.begin(body)
        assert caught.value.retry_after_ms > 0
        await until(lambda: bool(found))
        assert isinstance(await asked.read(body), Parsed)

    play(scenario, waiting_bytes_max=1000)


def test_a_large_body_does_not_hold_small_ones_up() -> None:
    async def scenario(asked: Asked) -> None:
        large = b" " * (1 << 20) + BOMB[:200_000] + b"1" + BOMB[-200_000:]
        _, later = asked.begin(large)
        assert isinstance(await asked.read(rows(1)), Parsed)
        await until(lambda: bool(later))

    play(scenario)


def test_closing_ends_processes_and_whoever_waits() -> None:
    async def scenario(asked: Asked) -> None:
        assert isinstance(await asked.read(rows(1)), Parsed)
        process = asked.room._small._process
        assert process is not None
        _, first = asked.begin(BOMB)
        _, second = asked.begin(rows(1))
        await asyncio.sleep(0.05)
        asked.room.close()
        assert process.poll() is not None
        await until(lambda: bool(first and second))
        assert isinstance(first[0], Unavailable)
        assert isinstance(second[0], Unavailable)

    play(scenario)


def test_arrays_are_the_requests_own() -> None:
    async def scenario(asked: Asked) -> None:
        one, two = await asked.read(rows(1)), await asked.read(rows(1))
        assert isinstance(one, Parsed)
        assert isinstance(two, Parsed)
        assert not np.shares_memory(one.arrays["x"], two.arrays["x"])

    play(scenario)
