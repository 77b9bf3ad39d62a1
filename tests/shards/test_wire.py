"""Frames and tensors: what goes in comes out, and nothing else gets through."""

from __future__ import annotations

import struct
import subprocess
import sys
import weakref
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batching.errors import InvalidArgument
from shards.errors import FrameCorrupt, SpecMismatch
from shards.specs import DTYPES, STRING
from shards.wire import (
    ALIGNMENT,
    HEADER_BYTES_MAX,
    PREFIX_BYTES,
    SLAB_BYTES,
    Buffer,
    CallHeader,
    CancelHeader,
    Continuation,
    Frame,
    FrameFlag,
    FrameKind,
    FrameOversize,
    FrameReader,
    Item,
    ItemError,
    ReplyHeader,
    TensorHeader,
    decode_tensors,
    encode_frame,
    encode_header,
    encode_prefix,
    encode_tensors,
)

ITEM = Item(7, 2, -3, b"trace", Continuation("router-1", 9, 1, "sum"))
CALL = CallHeader(3, "trunk", "predict", [ITEM, Item(8, 0, 5)], [TensorHeader("int8", (2,), 2)])
REPLY = ReplyHeader("trunk", 4, [(7, 2)], [], [ItemError(8, "INTERNAL", "no", 20)], "plan")


def joined(kind: FrameKind, header: bytes, body: Buffer = b"", stream: int = 0) -> bytes:
    return b"".join(encode_frame(kind, stream, header, [body]))


def told(frame: Frame) -> tuple[Any, ...]:
    return frame.kind, frame.stream, frame.header, bytes(frame.body)


def cut(data: bytes, at: list[int]) -> list[bytes]:
    ends = [*sorted(at), len(data)]
    return [data[a:b] for a, b in zip([0, *ends], ends, strict=False)]


def prefix(
    kind: int = FrameKind.CALL, flags: int = 0, reserved: int = 0, header: int = 0, body: int = 0
) -> bytes:
    return struct.pack("<BBHIII", kind, flags, reserved, 0, header, body)


# Frames.


@pytest.mark.parametrize(
    ("kind", "header"),
    [
        (FrameKind.CALL, CALL),
        (FrameKind.REPLY, REPLY),
        (FrameKind.CANCEL, CancelHeader([1, 2**63])),
    ],
)
def test_a_header_comes_back_equal(kind: FrameKind, header: msgspec.Struct) -> None:
    (frame,) = FrameReader().feed(joined(kind, encode_header(header), b"body", stream=2**32 - 1))
    assert told(frame) == (kind, 2**32 - 1, header, b"body")


def test_the_prefix_is_what_the_docstring_says() -> None:
    """A fixed reading of the bytes: peers of another build must agree on it for ever."""
    (data,) = encode_frame(FrameKind.CANCEL, 5, encode_header(CancelHeader([1])), [b"xy"])
    fields = ("12 00 0000", "05000000", "03000000", "02000000", "91 91 01", "7879")
    assert data == bytes.fromhex("".join(fields))


def test_a_header_of_a_later_version_is_read_without_what_is_new() -> None:
    later = msgspec.msgpack.encode([*msgspec.to_builtins(REPLY), {"new": [1, 2]}, "newer"])
    (frame,) = FrameReader().feed(joined(FrameKind.REPLY, later))
    assert frame.header == REPLY


def test_a_header_of_an_earlier_version_gets_the_defaults() -> None:
    earlier = msgspec.msgpack.encode(["trunk", 4, [], []])
    (frame,) = FrameReader().feed(joined(FrameKind.REPLY, earlier))
    assert frame.header == ReplyHeader("trunk", 4, [], [], [], "")


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xc1",
        b"\x91\x91\xff",  # a negative request
        b"\x91\x91\xa11",  # a request that is text
        b"\x90",  # a field that has no default is missing
        b"\x81\xa8requests\x90",  # named fields
        b"\x91\x90\x00",  # something follows
        b"\x92\x90" + b"\x91" * 5000,  # deeper than any reader follows
    ],
)
def test_a_header_that_does_not_fit_is_corrupt(header: bytes) -> None:
    with pytest.raises(FrameCorrupt):
        list(FrameReader().feed(joined(FrameKind.CANCEL, header)))


def test_text_in_a_header_must_be_utf8() -> None:
    header = encode_header(CALL).replace(b"trunk", b"tr\xffnk")
    with pytest.raises(FrameCorrupt):
        list(FrameReader().feed(joined(FrameKind.CALL, header)))


@pytest.mark.parametrize("kind", [0, 6, 49, 255])
def test_an_unknown_or_reserved_kind_is_corrupt(kind: int) -> None:
    with pytest.raises(FrameCorrupt, match=f"kind {kind}"):
        list(FrameReader().feed(prefix(kind)))


@pytest.mark.parametrize("bits", [{"flags": 1}, {"flags": 2}, {"flags": 128}, {"reserved": 1}])
def test_a_reserved_bit_is_corrupt(bits: dict[str, int]) -> None:
    assert list(FrameReader().feed(prefix(FrameKind.PING)))
    with pytest.raises(FrameCorrupt):
        list(FrameReader().feed(prefix(FrameKind.PING, **bits)))


@pytest.mark.parametrize(("header", "body"), [(101, 0), (0, 1001)])
def test_a_frame_over_the_bounds_is_refused_on_its_prefix_alone(header: int, body: int) -> None:
    reader = FrameReader(header_bytes_max=100, body_bytes_max=1000)
    with pytest.raises(FrameOversize):
        list(reader.feed(prefix(FrameKind.PING, header=header, body=body)))
    with pytest.raises(FrameOversize):
        list(FrameReader().feed(prefix(header=HEADER_BYTES_MAX + 1)))


def test_a_frame_at_the_bounds_passes() -> None:
    reader = FrameReader(header_bytes_max=100, body_bytes_max=5000)
    (frame,) = reader.feed(joined(FrameKind.PING, bytes(100), bytes(5000)))
    assert (len(frame.body), frame.header) == (5000, bytes(100))


def test_good_frames_before_a_bad_one_are_given_first() -> None:
    good = joined(FrameKind.PING, b"1") + joined(FrameKind.PING, b"2")
    came = []
    with pytest.raises(FrameCorrupt):  # noqa: PT012 -- the frames before are the point
        for frame in FrameReader().feed(good + prefix(99)):
            came.append(frame.header)  # noqa: PERF401 -- a comprehension would lose them
    assert came == [b"1", b"2"]


def test_a_header_longer_than_the_slab_is_read_and_the_slab_shrinks_again() -> None:
    reader = FrameReader()
    long = bytes(HEADER_BYTES_MAX)
    data = joined(FrameKind.PING, long, b"tail") + joined(FrameKind.PING, b"next")
    assert [frame.header for frame in reader.feed(data)] == [long, b"next"]
    assert len(reader.get_buffer()) == SLAB_BYTES


def test_a_large_body_owns_aligned_memory_and_is_received_into_it() -> None:
    reader = FrameReader()
    body = np.arange(100_000, dtype=np.uint32)
    data = memoryview(joined(FrameKind.PING, b"", body.view(np.uint8).data))
    head = PREFIX_BYTES + 100
    reader.get_buffer()[:head] = data[:head]
    reader.buffer_updated(head)
    assert reader.next_frame() is None
    rest = reader.get_buffer()
    assert len(rest) == len(data) - head  # no byte of the next frame can come in between
    rest[:] = data[head:]
    reader.buffer_updated(len(rest))
    frame = reader.next_frame()
    assert frame is not None
    back = np.frombuffer(frame.body, np.uint32)
    assert back.ctypes.data % ALIGNMENT == 0
    assert not back.flags.writeable
    assert np.array_equal(back, body)
    assert reader.next_frame() is None


def test_a_body_in_shared_memory_is_asked_for_once_its_frame_is_whole() -> None:
    asked: list[bytes] = []

    def borrow(reference: memoryview) -> memoryview:
        asked.append(bytes(reference))
        return memoryview(b"where it lies")

    header = encode_header(CallHeader(1, "unit", "predict", [], []))
    prefix = encode_prefix(FrameKind.CALL, FrameFlag.SHARED_MEMORY, 0, len(header), 5)
    data = prefix + header + b"there"
    reader = FrameReader(borrow=borrow)
    for at in range(len(data)):
        assert not asked
        frames = list(reader.feed(data[at : at + 1]))
    assert asked == [b"there"]
    assert [(frame.header, bytes(frame.body)) for frame in frames] == [
        (CallHeader(1, "unit", "predict", [], []), b"where it lies")
    ]
    with pytest.raises(FrameOversize):
        list(FrameReader(borrow=borrow, header_bytes_max=5).feed(data))
    with pytest.raises(FrameCorrupt):
        list(FrameReader().feed(data))


@pytest.mark.parametrize("size", [10, 4096, 200_000])
def test_what_comes_later_does_not_touch_a_body(size: int) -> None:
    reader = FrameReader()
    frames = [f for _ in range(20) for f in reader.feed(joined(FrameKind.PING, b"", b"a" * size))]
    list(reader.feed(joined(FrameKind.PING, b"", b"z" * 500_000)))
    assert all(bytes(frame.body) == b"a" * size for frame in frames)


def test_large_buffers_are_not_copied_and_small_ones_are_joined() -> None:
    large = np.zeros((100, 100), np.float32)
    out = encode_frame(FrameKind.PING, 0, b"header", [b"a", b"b", large.data, b"c", large.data])
    assert [len(buffer) for buffer in out] == [PREFIX_BYTES + 8, 40_000, 1, 40_000]
    large[0, 0] = 1.0
    assert bytes(out[1])[:4] == struct.pack("<f", 1.0)


def test_a_frame_without_large_buffers_is_one_buffer() -> None:
    (data,) = encode_frame(FrameKind.PING, 0, b"header", [b"a"] * 100)
    assert len(data) == PREFIX_BYTES + 106


def test_a_header_over_the_bound_is_not_encoded() -> None:
    with pytest.raises(InvalidArgument, match="fewer requests"):
        encode_frame(FrameKind.PING, 0, bytes(HEADER_BYTES_MAX + 1))


FRAMES = st.lists(
    st.tuples(
        st.sampled_from([FrameKind.PING, FrameKind.GOODBYE, FrameKind.HELLO]),
        st.integers(0, 2**32 - 1),
        st.binary(max_size=60),
        st.one_of(
            st.binary(max_size=100),
            st.integers(0, 255).flatmap(
                lambda n: st.integers(4000, 200_000).map(lambda size: bytes([n]) * size)
            ),
        ),
    ),
    max_size=8,
)


@settings(max_examples=150, deadline=None)
@given(frames=FRAMES, data=st.data(), slab=st.sampled_from([PREFIX_BYTES + 60, 4200, SLAB_BYTES]))
def test_frames_cut_anywhere_are_put_together_again(
    frames: list[tuple[FrameKind, int, bytes, bytes]], data: st.DataObject, slab: int
) -> None:
    stream = b"".join(joined(kind, h, body, stream=s) for kind, s, h, body in frames)
    at = data.draw(st.lists(st.integers(0, len(stream)), max_size=20))
    reader = FrameReader(slab_bytes=slab)
    back = [told(frame) for piece in cut(stream, at) for frame in reader.feed(piece)]
    assert back == frames


@settings(max_examples=30, deadline=None)
@given(frames=FRAMES.filter(lambda frames: sum(len(f[3]) for f in frames) < 3000))
def test_frames_that_come_byte_by_byte_are_put_together(
    frames: list[tuple[FrameKind, int, bytes, bytes]],
) -> None:
    stream = b"".join(joined(kind, h, body, stream=s) for kind, s, h, body in frames)
    reader = FrameReader()
    back = [told(frame) for byte in stream for frame in reader.feed(bytes([byte]))]
    assert back == frames


def survive(data: bytes) -> None:
    """Read as a device actor would: nothing but `FrameCorrupt` may come of it."""
    reader = FrameReader(body_bytes_max=1 << 20)
    try:
        for frame in reader.feed(data):
            if isinstance(frame.header, CallHeader | ReplyHeader):
                decode_tensors(frame.header.tensors, frame.body)
    except FrameCorrupt:
        pass


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=300))
def test_arbitrary_bytes_give_frames_or_the_typed_error(data: bytes) -> None:
    survive(data)
    survive(prefix(FrameKind.CALL, header=len(data)) + data)
    survive(prefix(FrameKind.REPLY, header=len(data) // 2, body=len(data) - len(data) // 2) + data)


ARRAYS: list[npt.NDArray[np.generic]] = [
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.array([b"a", b"", b"\xff\x00\x00"], object),
]


@settings(max_examples=500, deadline=None)
@given(flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=6))
def test_a_good_frame_with_wrong_bytes_gives_frames_or_the_typed_error(
    flips: list[tuple[int, int]],
) -> None:
    headers, buffers = encode_tensors(ARRAYS)
    header = CallHeader(3, "trunk", "predict", [ITEM], headers)
    data = bytearray(b"".join(encode_frame(FrameKind.CALL, 0, encode_header(header), buffers)))
    for at, value in flips:
        data[at % len(data)] = value
    survive(bytes(data) + bytes(data))


# Tensors.


def round_trip(*arrays: npt.NDArray[np.generic]) -> list[npt.NDArray[np.generic]]:
    headers, buffers = encode_tensors(arrays)
    header = ReplyHeader("unit", 1, [], headers)
    data = b"".join(encode_frame(FrameKind.REPLY, 0, encode_header(header), buffers))
    (frame,) = FrameReader().feed(data)
    assert isinstance(frame.header, ReplyHeader)
    return decode_tensors(frame.header.tensors, frame.body)


@pytest.mark.parametrize("name", [name for name in DTYPES if name != STRING])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (7, 5), (1000, 9)])
def test_every_dtype_comes_back_bit_by_bit(name: str, shape: tuple[int, ...]) -> None:
    size = int(np.prod(shape)) * DTYPES[name].itemsize
    raw = np.random.default_rng(size).integers(0, 2, size, np.uint8)
    array = raw.view(DTYPES[name]).reshape(shape)
    first, second = round_trip(array, array)
    for back in (first, second):
        assert back.dtype == array.dtype
        assert back.shape == shape
        assert back.tobytes() == array.tobytes()
        assert not back.flags.writeable


def test_tensors_of_a_large_body_are_aligned_views_of_it() -> None:
    arrays = [np.ones(n, np.int8) for n in (1, 40_000, 63, 64, 65)]
    headers, buffers = encode_tensors(arrays)
    data = b"".join(encode_frame(FrameKind.PING, 0, b"", buffers))
    (frame,) = FrameReader().feed(data)
    backs = decode_tensors(headers, frame.body)
    body = np.frombuffer(frame.body, np.uint8)
    for back in backs:
        assert back.ctypes.data % ALIGNMENT == 0
        assert np.shares_memory(back, body)


def test_tensors_keep_the_memory_that_their_body_lies_in() -> None:
    # A place in shared memory is known to be free when the array that stands for it has died.
    segment = np.zeros(256, np.uint8)
    segment.flags.writeable = False
    place = segment[64:128]
    is_alive = weakref.ref(place)
    tensors = decode_tensors([TensorHeader("float32", (16,), 64)], place.data)
    del place
    assert is_alive() is not None
    del tensors
    assert is_alive() is None


def test_contiguous_arrays_are_sent_without_a_copy_and_others_are_packed() -> None:
    array = np.zeros((4, 6), ml_dtypes.bfloat16)
    _, (buffer,) = encode_tensors([array])
    assert np.shares_memory(np.frombuffer(buffer, np.uint8), array)
    (back,) = round_trip(np.arange(24).reshape(4, 6).T[::2])
    assert np.array_equal(back, np.arange(24).reshape(4, 6).T[::2])


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.binary(max_size=20), max_size=30))
def test_strings_come_back(values: list[bytes]) -> None:
    array = np.empty(len(values), object)
    array[:] = values
    (back, number) = round_trip(array, np.ones(1, np.float32))
    assert back.dtype == object
    assert back.tolist() == values
    assert number.tolist() == [1.0]


def test_strings_keep_their_shape() -> None:
    array = np.array([[b"a", b"bc"], [b"", b"\x00"]], object)
    (back,) = round_trip(array)
    assert back.tolist() == array.tolist()


@pytest.mark.parametrize(
    "array",
    [
        np.array(["text"], object),
        np.array([b"bytes", None], object),
        np.array([object()]),
        np.array(["text"]),
        np.array([b"bytes"]),
        np.zeros(2, ">f4"),
        np.zeros(2, np.complex64),
        np.zeros(2, "datetime64[s]"),
        np.zeros(2, [("a", "i4")]),
    ],
    ids=lambda array: str(array.dtype),
)
def test_what_does_not_travel_is_refused_by_the_sender(array: npt.NDArray[np.generic]) -> None:
    with pytest.raises(SpecMismatch):
        encode_tensors([array])


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ([TensorHeader("float32", (2,), 8)], bytes(7)),
        ([TensorHeader("float32", (2,), 8)], bytes(9)),
        ([TensorHeader("float32", (2,), 4)], bytes(4)),
        ([TensorHeader("float32", (2**62, 4), 0)], b""),
        ([TensorHeader("float32", (0, 2**64 - 1), 0)], b""),
        ([TensorHeader("float32", (0, 2**62, 2**62), 0)], b""),
        ([TensorHeader("float32", (1,) * 33, 4)], bytes(4)),
        ([TensorHeader("object", (1,), 8)], bytes(8)),
        ([TensorHeader("O", (1,), 8)], bytes(8)),
        ([TensorHeader("float128", (1,), 16)], bytes(16)),
        ([TensorHeader("int8", (1,), 1), TensorHeader("int8", (1,), 1)], bytes(2)),
        ([], b"x"),
        ([TensorHeader("string", (1,), 8)], struct.pack("<II", 0, 1)),
        ([TensorHeader("string", (1,), 9)], struct.pack("<II", 1, 1) + b"x"),
        ([TensorHeader("string", (2,), 13)], struct.pack("<III", 0, 5, 1) + b"x"),
        ([TensorHeader("string", (2**62,), 8)], bytes(8)),
        ([TensorHeader("string", (1,), 3)], bytes(3)),
    ],
)
def test_headers_that_do_not_describe_the_body_are_corrupt(
    headers: list[TensorHeader], body: bytes
) -> None:
    with pytest.raises(FrameCorrupt):
        decode_tensors(headers, memoryview(body))


def test_the_wire_does_not_import_jax() -> None:
    """Routers and the command line read frames; they must not pay for JAX."""
    code = "import sys, shards.wire, shards.transport; print('jax' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
