"""Messages over a socket pair."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from batching.errors import DataLoss
from shards.compiling.channel import Channel
from shards.compiling.messages import KEY_BYTES, Compiled, Doing, Done, FromChild

KEY = bytes(range(KEY_BYTES))


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel, socket.socket]]:
    ours, theirs = socket.socketpair()
    parent, child = Channel(ours, KEY, is_parent=True), Channel(theirs, KEY, is_parent=False)
    yield parent, child, theirs
    parent.close()
    child.close()


Pair = tuple[Channel, Channel, socket.socket]


def test_messages_arrive_as_they_are(pair: Pair) -> None:
    parent, child, _ = pair
    parent.send(Doing(step="one"))
    assert child.receive(Doing, 1) == Doing(step="one")
    for message in (Doing(step="two"), Compiled(bucket=(8, (16,)), data=b"\0" * 5), Done()):
        child.send(message)
        assert parent.receive(FromChild, 1) == message  # type: ignore[arg-type]


def test_a_message_larger_than_the_sockets_buffers_arrives(pair: Pair) -> None:
    parent, child, _ = pair
    large = Compiled(bucket=(1, ()), data=bytes(5 << 20))
    sender = threading.Thread(target=child.send, args=(large,))
    sender.start()
    assert parent.receive(Compiled, 10) == large
    sender.join(10)


def test_silence_is_a_timeout(pair: Pair) -> None:
    parent, _, theirs = pair
    with pytest.raises(TimeoutError):
        parent.receive(Done, 0.01)
    theirs.sendall(b"half a header")
    with pytest.raises(TimeoutError):
        parent.receive(Done, 0.01)


def test_a_peer_that_does_not_read_is_a_timeout(pair: Pair) -> None:
    parent, _, _ = pair
    with pytest.raises(TimeoutError):
        parent.send(Compiled(bucket=(1, ()), data=bytes(5 << 20)), 0.01)


def test_the_end_of_the_peer_is_the_end(pair: Pair) -> None:
    parent, child, theirs = pair
    theirs.sendall(b"half a header")
    child.close()
    with pytest.raises(EOFError):
        parent.receive(Done, 1)


def test_sealed_nonsense_is_no_message(pair: Pair) -> None:
    parent, child, _ = pair
    child.send(Doing(step="x"))
    with pytest.raises(DataLoss, match="no message"):
        parent.receive(Compiled, 1)
