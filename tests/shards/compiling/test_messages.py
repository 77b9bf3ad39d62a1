"""Seals of the frames between an actor and its compile process."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batching.errors import DataLoss
from shards.compiling.messages import FRAME_BYTES_MAX, HEADER_BYTES, KEY_BYTES, Sealer, body_bytes

KEY = bytes(range(KEY_BYTES))


@given(st.lists(st.binary(max_size=100), max_size=5))
def test_frames_are_opened_in_the_order_in_which_they_were_sealed(bodies: list[bytes]) -> None:
    sender, receiver = Sealer(KEY, b"up"), Sealer(KEY, b"up")
    for body in bodies:
        header = sender.seal(body)
        assert len(header) == HEADER_BYTES
        assert body_bytes(header) == len(body)
        assert receiver.open(header, body) == body


@given(st.binary(min_size=1, max_size=100), st.data())
def test_a_changed_bit_breaks_the_seal(body: bytes, data: st.DataObject) -> None:
    header = Sealer(KEY, b"up").seal(body)
    # The length is checked against the body that was read, so its bits are not in question.
    frame = bytearray(header[8:] + body)
    bit = data.draw(st.integers(0, len(frame) * 8 - 1))
    frame[bit // 8] ^= 1 << bit % 8
    changed = header[:8] + bytes(frame[: HEADER_BYTES - 8])
    with pytest.raises(DataLoss, match="seal"):
        Sealer(KEY, b"up").open(changed, bytes(frame[HEADER_BYTES - 8 :]))


@pytest.mark.parametrize("other", [Sealer(bytes(KEY_BYTES), b"up"), Sealer(KEY, b"down")])
def test_another_key_or_direction_does_not_fit(other: Sealer) -> None:
    with pytest.raises(DataLoss, match="seal"):
        other.open(Sealer(KEY, b"up").seal(b"body"), b"body")


def test_a_frame_is_taken_once() -> None:
    receiver = Sealer(KEY, b"up")
    header = Sealer(KEY, b"up").seal(b"body")
    receiver.open(header, b"body")
    with pytest.raises(DataLoss, match="seal"):
        receiver.open(header, b"body")


def test_a_length_beyond_the_bound_is_refused_before_anything_is_read() -> None:
    header = struct.pack("<Q", FRAME_BYTES_MAX + 1) + bytes(HEADER_BYTES - 8)
    with pytest.raises(DataLoss, match="1,073,741,825 bytes"):
        body_bytes(header)
