"""Two sides that know the secret meet; nobody else gets in, by whatever they say."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batching.errors import InvalidArgument
from shards.errors import HandshakeRefused
from shards.handshake import (
    NONCE_BYTES,
    PROTOCOL,
    ClientHandshake,
    Handshake,
    Identity,
    Message,
    PeerInfo,
    ServerHandshake,
    distribution,
    refusal,
)
from shards.wire import FrameKind

SECRET = b"the cluster's secret"
CLIENT = Identity(name="router-1", generation=0, node="node-a", distribution="1.2.3")
SERVER = Identity(name="device-1", generation=5, node="node-b", distribution="1.2.3")


def client(identity: Identity = CLIENT, nonce: bytes = b"c", **changes: Any) -> ClientHandshake:
    arguments: dict[str, Any] = {
        "expected_name": "device-1",
        "expected_generation": 5,
        "secret": SECRET,
    }
    return ClientHandshake(identity, nonce=nonce * NONCE_BYTES, **(arguments | changes))


def server(
    identity: Identity = SERVER, nonce: bytes = b"s", secret: bytes = SECRET
) -> ServerHandshake:
    return ServerHandshake(identity, nonce=nonce * NONCE_BYTES, secret=secret)


def meet(one: Handshake, other: Handshake) -> list[Message]:
    """Pass messages until neither has more to say; gives all that was said."""
    said: list[Message] = []
    messages, listener, speaker = one.start(), other, one
    while messages:
        said += messages
        messages = [m for kind, data in messages for m in listener.receive(kind, data)]
        listener, speaker = speaker, listener
    return said


def test_both_sides_learn_who_the_other_is() -> None:
    one, other = client(), server()
    said = meet(one, other)
    assert [kind.name for kind, _ in said] == ["HELLO", "CHALLENGE", "PROOF", "WELCOME"]
    assert one.peer == PeerInfo(name="device-1", generation=5, node="node-b")
    assert other.peer == PeerInfo(name="router-1", generation=0, node="node-a")


def test_the_secret_is_neither_sent_nor_shown() -> None:
    one, other = client(), server()
    said = meet(one, other)
    assert all(SECRET not in data for _, data in said)
    assert SECRET.decode() not in f"{one!r} {other!r} {one.peer!r}"


def test_the_server_says_nothing_of_itself_before_the_client_has_proven_itself() -> None:
    other = server()
    ((_, challenge),) = other.receive(*client().start()[0])
    assert b"device-1" not in challenge
    assert b"1.2.3" not in challenge
    with pytest.raises(HandshakeRefused) as refused:
        other.receive(FrameKind.PROOF, msgspec.msgpack.encode([b"x" * 32]))
    assert "device-1" not in str(refused.value)


@pytest.mark.parametrize(
    ("one", "other", "reason"),
    [
        (client(secret=b"wrong"), server(), "did not prove"),
        (client(), server(secret=b"wrong"), "did not prove"),
        (client(expected_generation=4), server(), "generation 4 was expected, this is device-1"),
        (client(expected_generation=6), server(), "generation 6 was expected"),
        (client(expected_name="device-2"), server(), "device-2 of generation 5 was expected"),
        (
            client(dataclasses.replace(CLIENT, distribution="1.2.4")),
            server(),
            "shardserve 1.2.4 meets 1.2.3",
        ),
        (
            client(dataclasses.replace(CLIENT, protocol=PROTOCOL + 1)),
            server(),
            f"protocol {PROTOCOL + 1} meets protocol {PROTOCOL}",
        ),
    ],
)
def test_a_mismatch_is_refused_by_the_server(
    one: ClientHandshake, other: ServerHandshake, reason: str
) -> None:
    with pytest.raises(HandshakeRefused, match=reason):
        meet(one, other)
    assert other.peer is None
    assert one.peer is None


class Impostor:
    """A server that does not know the secret and lets everybody in."""

    peer = None

    def __init__(self, proof: bytes = b"p" * 32, protocol: int = PROTOCOL) -> None:
        self._proof = proof
        self._protocol = protocol

    def start(self) -> list[Message]:
        return []

    def receive(self, kind: FrameKind, header: bytes) -> list[Message]:
        if kind is FrameKind.HELLO:
            challenge = msgspec.msgpack.encode([self._protocol, b"n" * NONCE_BYTES])
            return [(FrameKind.CHALLENGE, challenge)]
        said = msgspec.msgpack.encode(["1.2.3", "device-1", 5, "node-b"])
        # The client's own proof is the best an impostor can offer.
        proof = self._proof or msgspec.msgpack.decode(header)[0]
        return [(FrameKind.WELCOME, msgspec.msgpack.encode([said, proof]))]


@pytest.mark.parametrize("impostor", [Impostor(), Impostor(proof=b"")], ids=["guess", "reflect"])
def test_a_server_that_does_not_know_the_secret_is_refused(impostor: Impostor) -> None:
    one = client()
    with pytest.raises(HandshakeRefused, match="did not prove"):
        meet(one, impostor)
    assert one.peer is None


def test_a_server_of_another_protocol_is_refused_before_anything_is_signed_for_it() -> None:
    with pytest.raises(HandshakeRefused, match=f"protocol 9 meets protocol {PROTOCOL}"):
        meet(client(), Impostor(protocol=9))


@pytest.mark.parametrize(
    "changes", [{"distribution": "9"}, {"name": "device-2"}, {"generation": 6}]
)
def test_a_server_that_proves_to_be_another_is_refused_by_the_client(
    changes: dict[str, Any],
) -> None:
    """A server that knows the secret but does not check what was expected of it."""
    one, other = client(), server(dataclasses.replace(SERVER, **changes))
    hello = one.start()[0][1]
    ((_, challenge),) = other.receive(FrameKind.HELLO, hello)
    one.receive(FrameKind.CHALLENGE, challenge)
    fields = dataclasses.asdict(SERVER) | changes
    said = msgspec.msgpack.encode(
        [fields[name] for name in ("distribution", "name", "generation", "node")]
    )
    mac = hmac.new(SECRET, b"server", hashlib.sha256)
    for part in (hello, challenge, said):
        mac.update(len(part).to_bytes(4, "little") + part)
    with pytest.raises(HandshakeRefused, match=r"expected|meets"):
        one.receive(FrameKind.WELCOME, msgspec.msgpack.encode([said, mac.digest()]))
    assert one.peer is None


def test_a_recorded_proof_is_of_no_use_with_another_challenge() -> None:
    said = meet(client(), server())
    other = server(nonce=b"t")
    other.receive(*said[0])
    with pytest.raises(HandshakeRefused, match="did not prove"):
        other.receive(*said[2])


def test_a_recorded_welcome_is_of_no_use_with_another_hello() -> None:
    said = meet(client(), server())
    one = client(nonce=b"d")
    one.receive(*said[1])
    with pytest.raises(HandshakeRefused, match="did not prove"):
        one.receive(*said[3])


def test_a_changed_hello_is_noticed() -> None:
    """Somebody between the two who makes the caller look like another."""
    one, other = client(), server()
    hello = one.start()[0][1].replace(b"router-1", b"router-2")
    (challenge,) = other.receive(FrameKind.HELLO, hello)
    (proof,) = one.receive(*challenge)
    with pytest.raises(HandshakeRefused, match="did not prove"):
        other.receive(*proof)


@pytest.mark.parametrize("kind", [k for k in FrameKind if k is not FrameKind.HELLO])
def test_a_server_takes_nothing_before_the_hello(kind: FrameKind) -> None:
    with pytest.raises(HandshakeRefused, match="came where HELLO was due"):
        server().receive(kind, b"")


def test_a_finished_handshake_takes_nothing_more() -> None:
    one, other = client(), server()
    said = meet(one, other)
    for kind, data in (said[0], said[2]):
        with pytest.raises(HandshakeRefused):
            other.receive(kind, data)


def test_the_reason_of_a_refusal_is_told_but_not_trusted() -> None:
    kind, header = refusal(HandshakeRefused("no\x1b[2J" + "x" * 10_000))
    with pytest.raises(HandshakeRefused, match=r"device-1 refused: no\?\[2Jx+$") as refused:
        client().receive(kind, header)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_nonce_of_another_size_is_refused(size: int) -> None:
    hello = msgspec.msgpack.encode([1, "1.2.3", "r", 0, "n", "device-1", 5, bytes(size)])
    with pytest.raises(HandshakeRefused):
        server().receive(FrameKind.HELLO, hello)
    with pytest.raises(HandshakeRefused):
        client().receive(FrameKind.CHALLENGE, msgspec.msgpack.encode([1, bytes(size)]))


def test_an_empty_secret_is_refused_at_once() -> None:
    with pytest.raises(InvalidArgument):
        client(secret=b"")
    with pytest.raises(InvalidArgument):
        server(secret=b"")


MESSAGES = st.lists(
    st.tuples(
        st.sampled_from(FrameKind),
        st.one_of(
            st.binary(max_size=80),
            st.recursive(
                st.one_of(st.integers(-10, 10), st.text(max_size=5), st.binary(max_size=33)),
                lambda inner: st.lists(inner, max_size=9),
                max_leaves=12,
            ).map(msgspec.msgpack.encode),
        ),
    ),
    max_size=4,
)


@settings(max_examples=200, deadline=None)
@given(messages=MESSAGES, greet=st.booleans())
def test_whatever_is_said_without_the_secret_nobody_gets_in(
    messages: list[Message], greet: bool
) -> None:
    for side in (server(), client()):
        if greet:
            first = client().start()[0] if isinstance(side, ServerHandshake) else None
            side.receive(*(first or server().receive(*client().start()[0])[0]))
        for kind, header in messages:
            try:
                side.receive(kind, header)
            except HandshakeRefused:
                break
        assert side.peer is None


def test_the_distribution_has_a_version() -> None:
    assert distribution() != ""
