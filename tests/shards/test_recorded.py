"""Recorded requests: what goes into a file comes out, and nothing else gets through."""

from __future__ import annotations

import pickle
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from batching.errors import InvalidArgument
from shards.errors import BundleCorrupt, BundleForeign
from shards.recorded import (
    BYTES_MAX,
    FILE_HEAD,
    REQUESTS_MAX,
    Recorded,
    encode_request,
    encode_requests,
    read_requests,
    salvage_requests,
)
from shards.specs import DTYPES

TEXTS = np.array([b"a", b"", b"\xff\0"], object)
REQUESTS = [
    Recorded(signature="embed", inputs={"text": TEXTS}, version=7),
    Recorded(
        signature="score",
        inputs={
            "x": np.arange(6, dtype=np.float32).reshape(2, 3),
            "half": np.array([[1.5]], ml_dtypes.bfloat16),
            "none": np.empty((0, 4), np.int64),
            "scalar": np.array(True),
        },
    ),
]


def whole(requests: Sequence[Recorded]) -> bytes:
    return b"".join(encode_requests(requests, "file"))


def told(request: Recorded) -> tuple[Any, ...]:
    values = {
        name: (array.dtype, array.shape, array.tolist()) for name, array in request.inputs.items()
    }
    return request.signature, request.version, values


def test_requests_come_back_as_they_were_written() -> None:
    found = read_requests(whole(REQUESTS), "file")
    assert [told(each) for each in found] == [told(each) for each in REQUESTS]
    assert read_requests(whole([]), "file") == []


def test_what_was_read_cannot_be_written_to_and_is_aligned() -> None:
    array = read_requests(whole(REQUESTS), "file")[1].inputs["x"]
    assert not array.flags.writeable
    assert array.flags.aligned


def test_a_file_is_its_head_and_one_piece_a_request() -> None:
    pieces = [b"".join(encode_request(each)) for each in REQUESTS]
    assert whole(REQUESTS) == b"".join([FILE_HEAD, *pieces])
    assert all(len(piece) % 64 == 0 for piece in (FILE_HEAD, *pieces))


@pytest.mark.parametrize("data", [b"", b"x", b"\0" * 64, b"shardserve requests\n", b"PK\3\4" * 32])
def test_another_file_is_foreign(data: bytes) -> None:
    with pytest.raises(BundleForeign, match="log: not a file of recorded requests"):
        read_requests(data, "log")


def test_a_newer_schema_is_foreign_and_both_numbers_are_said() -> None:
    data = bytearray(whole(REQUESTS))
    struct.pack_into("<I", data, len(b"shardserve requests\n"), 2)
    with pytest.raises(BundleForeign, match=r"schema 2 .*reads 1"):
        read_requests(data, "log")


def test_a_request_that_is_cut_off_is_corrupt_and_those_before_it_can_be_salvaged() -> None:
    data = whole(REQUESTS)
    first = len(FILE_HEAD) + len(b"".join(encode_request(REQUESTS[0])))
    for end in (first + 1, first + 15, first + 70, len(data) - 1):
        with pytest.raises(BundleCorrupt, match=f"log: request 2, at byte {first}: .*cut off"):
            read_requests(data[:end], "log")
        kept, damage = salvage_requests(data[:end], "log")
        assert [told(each) for each in kept] == [told(REQUESTS[0])]
        assert "request 2" in damage
    assert salvage_requests(data[:first], "log")[1] == ""


def test_every_flipped_byte_of_a_request_is_found_or_is_padding() -> None:
    data = whole(REQUESTS[:1])
    expected = told(REQUESTS[0])
    for at in range(len(FILE_HEAD), len(data)):
        broken = bytearray(data)
        broken[at] ^= 0x20
        try:
            (found,) = read_requests(broken, "log")
        except BundleCorrupt:
            continue
        assert data[at] == 0
        assert told(found) == expected


def test_a_later_version_may_append_fields_to_a_header() -> None:
    header = msgspec.msgpack.encode(["embed", [], [], 7, {"more": [1]}])
    prefix = struct.pack("<IIII", len(header), 0, zlib.crc32(header), 0)
    record = (prefix + header).ljust(64, b"\0")
    (found,) = read_requests(FILE_HEAD + record, "log")
    assert told(found) == ("embed", 7, {})


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        (["s", ["x"], []], "0 tensors"),
        (["s", ["x", "x"], [["int8", [1], 0], ["int8", [0], 0]]], "tensor"),
        (["s", ["x"], [["object", [1], 0]]], "dtype 'object'"),
        (["s", ["x"], [["int8", [-1], 0]]], "Expected `int` >= 0"),
        (["s", ["x"], [["string", [1 << 60], 0]]], "strings in 0 bytes"),
        ({"signature": "s"}, "Expected `array`"),
    ],
)
def test_a_header_that_means_no_request_is_corrupt(header: Any, problem: str) -> None:
    data = msgspec.msgpack.encode(header)
    prefix = struct.pack("<IIII", len(data), 0, zlib.crc32(data), 0)
    record = prefix + data
    record += b"\0" * (-len(record) % 64)
    with pytest.raises(BundleCorrupt, match=problem):
        read_requests(FILE_HEAD + record, "log")


def test_no_more_requests_are_written_or_read_than_a_file_may_have() -> None:
    one = Recorded(signature="s")
    data = whole([one] * REQUESTS_MAX)
    assert len(read_requests(data, "log")) == REQUESTS_MAX
    with pytest.raises(InvalidArgument, match=f"more than {REQUESTS_MAX}"):
        whole([one] * (REQUESTS_MAX + 1))
    with pytest.raises(InvalidArgument, match=f"log: more than {REQUESTS_MAX}"):
        read_requests(data + b"".join(encode_request(one)), "log")


def test_no_more_bytes_are_written_or_read_than_a_file_may_have() -> None:
    half = Recorded(signature="s", inputs={"x": np.zeros(BYTES_MAX // 2, np.uint8)})
    with pytest.raises(InvalidArgument, match="over the bound"):
        encode_requests([half, half], "file")
    with pytest.raises(InvalidArgument, match="cannot be recorded"):
        encode_request(Recorded(signature="s", inputs={"x": np.zeros(BYTES_MAX + 1, np.uint8)}))
    with pytest.raises(InvalidArgument, match="cannot be recorded"):
        encode_request(Recorded(signature="s" * (65 << 10)))
    too_large = np.zeros(BYTES_MAX + 64, np.uint8)
    too_large[: len(FILE_HEAD)] = np.frombuffer(FILE_HEAD, np.uint8)
    with pytest.raises(InvalidArgument, match=r"log: .*over the bound"):
        read_requests(too_large.data, "log")


_arrays = st.sampled_from([name for name in DTYPES if name != "string"]).flatmap(
    lambda name: st.lists(st.integers(0, 100), max_size=5).map(
        lambda values: np.array(values).astype(DTYPES[name])
    )
)


def _texts(values: list[bytes]) -> npt.NDArray[np.generic]:
    array = np.empty(len(values), object)
    array[:] = values
    return array


_requests = st.lists(
    st.builds(
        Recorded,
        signature=st.text(max_size=8),
        inputs=st.dictionaries(
            st.text(max_size=8), _arrays | st.lists(st.binary(max_size=9)).map(_texts), max_size=3
        ),
        version=st.integers(0, 1 << 60),
    ),
    max_size=4,
)


@given(_requests)
@settings(max_examples=30, deadline=None)
def test_any_requests_come_back(requests: list[Recorded]) -> None:
    found = read_requests(whole(requests), "log")
    assert [told(each) for each in found] == [told(each) for each in requests]


class _Bomb:
    def __reduce__(self) -> Any:
        return pytest.fail, ("something was unpickled",)


@given(st.binary(max_size=300), st.booleans(), st.booleans())
@example(pickle.dumps(_Bomb()), True, False)
@example(pickle.dumps(_Bomb()), True, True)
@settings(max_examples=200, deadline=None)
def test_whatever_bytes_come_a_reader_answers_with_requests_or_a_typed_error(
    data: bytes, has_head: bool, is_sealed: bool
) -> None:
    if is_sealed:  # the bytes are a header whose check is right: what is read is up to them
        prefix = struct.pack("<IIII", len(data), 0, zlib.crc32(data), 0)
        data = prefix + data
        data += b"\0" * (-len(data) % 64)
    try:
        found = read_requests(FILE_HEAD + data if has_head else data, "log")
    except (BundleCorrupt, BundleForeign, InvalidArgument):
        return
    assert all(type(value) is bytes for each in found for value in _objects(each))


def _objects(request: Recorded) -> list[object]:
    return [
        value
        for array in request.inputs.values()
        if array.dtype == object
        for value in array.reshape(-1).tolist()
    ]
