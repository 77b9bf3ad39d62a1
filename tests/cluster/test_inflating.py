"""Compressed bodies: what is in them comes out, up to a bound, and what is wrong is refused."""

from __future__ import annotations

import gzip
import tracemalloc
from collections.abc import Callable

import orjson
import pytest
from backports import zstd as zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from batching.errors import InvalidArgument
from cluster.api import Parsed
from cluster.forms import BodyTooLarge, Columns, Form, Forms, UnknownEncoding, forms_of, raw
from cluster.forms.inflating import inflated
from tests.cluster.api_support import assert_same_arrays
from tests.cluster.routing_fakes import doubled, epoch, plain, turns
from tests.cluster.test_reading import Asked, rows
from tests.cluster.test_reading import play as play_room
from tests.cluster.test_service import BODY, ONE, Door, error_of, play
from tests.cluster.test_service_reading import with_room

PACK: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "zstd": zstandard.compress,
}
EACH = pytest.mark.parametrize("encoding", PACK)
LIMIT = 1 << 20


@EACH
@settings(deadline=None, max_examples=50)
@given(pieces=st.lists(st.tuples(st.binary(max_size=40), st.integers(0, 4000)), max_size=4))
def test_what_was_compressed_comes_out(encoding: str, pieces: list[tuple[bytes, int]]) -> None:
    parts = [data * times for data, times in pieces] or [b""]
    packed = b"".join(PACK[encoding](part) for part in parts)  # one after the other is one body
    assert inflated(packed, encoding, LIMIT) == b"".join(parts)


@EACH
@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_whatever_comes_ends_in_bytes_or_a_refusal(encoding: str, data: st.DataObject) -> None:
    body = bytearray(PACK[encoding](bytes(range(256)) * 20))
    for at, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(body) - 1), st.integers(0, 255)), max_size=4)
    ):
        body[at] = value
    body = body[: data.draw(st.integers(0, len(body)))] + data.draw(st.binary(max_size=8))
    try:
        found = inflated(body, encoding, LIMIT)
    except InvalidArgument:
        return
    assert len(found) <= LIMIT


@EACH
def test_a_body_that_ends_early_is_refused(encoding: str) -> None:
    whole = PACK[encoding](bytes(range(256)) * 1000)
    for end in (5, len(whole) // 2, len(whole) - 1):
        with pytest.raises(InvalidArgument, match=encoding):
            inflated(whole[:end], encoding, LIMIT)


@EACH
def test_a_body_may_hold_as_much_as_the_limit_and_no_more(encoding: str) -> None:
    whole = PACK[encoding](bytes(1000))
    assert inflated(whole, encoding, 1000) == bytes(1000)
    with pytest.raises(BodyTooLarge, match="more than the limit of 999 bytes"):
        inflated(whole, encoding, 999)


@EACH
def test_a_bomb_takes_no_more_memory_than_the_limit(encoding: str) -> None:
    bomb = PACK[encoding](bytes(64 << 20))
    assert len(bomb) < 100_000
    tracemalloc.start()
    try:
        with pytest.raises(InvalidArgument, match="more than the limit"):
            inflated(bomb, encoding, LIMIT)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * LIMIT


def test_thousands_of_empty_members_are_refused() -> None:
    assert inflated(gzip.compress(b"") * 1000 + gzip.compress(b"x"), "gzip", LIMIT) == b"x"
    with pytest.raises(InvalidArgument, match="members"):
        inflated(gzip.compress(b"") * 2000, "gzip", LIMIT)
    with pytest.raises(InvalidArgument, match="frames"):
        inflated(zstandard.compress(b"") * 2000, "zstd", LIMIT)


def test_a_zstd_window_that_decoders_need_not_have_is_refused() -> None:
    size = zstandard.CompressionParameter.window_log
    packer = zstandard.ZstdCompressor(options={size: 27})
    wide = packer.compress(bytes(1000)) + packer.flush()
    with pytest.raises(InvalidArgument, match="not a zstd body"):
        inflated(wide, "zstd", LIMIT)


# Heads


@pytest.mark.parametrize(
    ("said", "encoding"),
    [(b"gzip", "gzip"), (b" GZip ", "gzip"), (b"x-gzip", "gzip"), (b"zstd", "zstd")],
)
def test_a_head_says_what_a_body_is_compressed_with(said: bytes, encoding: str) -> None:
    headers = {b"content-encoding": said}
    assert forms_of(headers) == Forms(Form.JSON, Form.JSON, 0, encoding)
    headers[b"content-type"] = b"application/x-msgpack"
    assert forms_of(headers) == Forms(Form.MSGPACK, Form.MSGPACK, 0, encoding)


@pytest.mark.parametrize("said", [b"", b"identity", b"Identity "])
def test_identity_is_the_body_itself(said: bytes) -> None:
    assert forms_of({b"content-encoding": said}) is None


@pytest.mark.parametrize(
    "said", [b"br", b"deflate", b"gzip, gzip", b"gzip;q=1", b"*", b"\xff", b"x" * 1000]
)
def test_what_is_not_known_is_not_guessed(said: bytes) -> None:
    with pytest.raises(UnknownEncoding, match="none of gzip, zstd, identity"):
        forms_of({b"content-encoding": said})


# The service


def test_an_unknown_encoding_is_answered_415_with_those_that_are_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(door: Door) -> None:
        await door.bench.router.adopt(epoch(1, (plain(), ONE)))
        for _ in range(2):  # the second time the path is known
            door.ask(headers={b"content-encoding": b"br"})
            response = door.responses.pop()
            assert response.status == 415
            assert b"accept-encoding: gzip, zstd, identity\r\n" in response.headers
            assert b"x-error-code: INVALID_ARGUMENT\r\n" in response.headers
            assert "'br'" in error_of(response)

    play(scenario, monkeypatch)


def test_a_compressed_body_is_never_read_on_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(door: Door) -> None:
        room = with_room(door)
        await door.bench.router.adopt(epoch(1, (plain(), ONE)))
        headers = {b"content-encoding": b"gzip"}
        for _ in range(3):  # the head and the path are known at last
            door.ask(gzip.compress(BODY), headers=headers)
            method, signatures, body = room.asked.pop()
            assert body == gzip.compress(BODY)
            room.asked.append((method, signatures, BODY))
            room.answer()
            await turns()
            doubled(door.bench.actors["a"].take())
            assert orjson.loads(door.responses.pop().body) == {"predictions": [2.0, 4.0]}

    play(scenario, monkeypatch)


@EACH
def test_the_process_that_reads_bodies_takes_compressed_ones_of_every_form(encoding: str) -> None:
    async def scenario(asked: Asked) -> None:
        plain = await asked.read(rows(3))
        assert isinstance(plain, Parsed)
        forms = Forms(Form.JSON, Form.JSON, 0, encoding)
        found = await asked.read(PACK[encoding](rows(3)), forms=forms)
        assert isinstance(found, Parsed)
        assert_same_arrays(found.arrays, plain.arrays)
        arrays = dict(plain.arrays)
        written = raw.write_request(Columns(arrays))
        forms = Forms(Form.RAW, Form.RAW, written.head_bytes, encoding)
        found = await asked.read(PACK[encoding](b"".join(written.buffers)), forms=forms)
        assert isinstance(found, Parsed)
        assert_same_arrays(found.arrays, arrays)
        bomb = await asked.read(PACK[encoding](bytes(65 << 10)), forms=forms)
        assert isinstance(bomb, BodyTooLarge)
        assert "more than the limit of 65536 bytes" in bomb.message
        assert isinstance(await asked.read(rows(1)), Parsed)

    play_room(scenario, inflated_bytes_max=64 << 10)


def test_small_bodies_do_not_wait_behind_compressed_ones() -> None:
    async def scenario(asked: Asked) -> None:
        forms = Forms(Form.JSON, Form.JSON, 0, "gzip")
        assert isinstance(await asked.read(gzip.compress(rows(1)), forms=forms), Parsed)
        # However few bytes come, it is the reader of the large ones that may be held up.
        assert asked.room._small._process is None
        assert asked.room._large._process is not None

    play_room(scenario)
