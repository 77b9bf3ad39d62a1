"""Who is at the other end: a mutual challenge on the cluster secret, without any I/O.

    client                                      server
      HELLO      protocol, names, nonce   →
                                          ←     CHALLENGE   nonce
      PROOF      HMAC of the above        →
                                          ←     WELCOME     identity, HMAC of the above
                                          ←  or REFUSED     reason

Both sides prove that they know the secret, and neither sends it. The client proves first, so a
stranger learns nothing but the protocol's number. Each proof covers every byte said so far, and the
two sides' proofs can never be equal, so nothing can be replayed or reflected. Generations make sure
that a caller reaches the very process its routing table speaks of, not the one that was started in
its place.

This file authenticates the peer at the start. It does not encrypt, and does not protect what
follows from somebody who can write to the connection; off the host that is the work of TLS. It does
not know deadlines: how long a peer may take is the shell's to say.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import importlib.metadata
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias, TypeVar

import msgspec

from batching.errors import InvalidArgument
from shards.errors import HandshakeRefused
from shards.wire import FrameKind, encode_header

__all__ = [
    "ClientHandshake",
    "HANDSHAKE_BYTES_MAX",
    "Handshake",
    "Identity",
    "Message",
    "NONCE_BYTES",
    "PROTOCOL",
    "PeerInfo",
    "ServerHandshake",
    "distribution",
    "refusal",
]

#: The number of the wire's rules. Peers of different numbers do not talk.
PROTOCOL: Final = 2
NONCE_BYTES: Final = 32
#: No header of a handshake is longer; until it is over, a peer gets no more memory than this.
HANDSHAKE_BYTES_MAX: Final = 4096
_REASON_CHARS_MAX: Final = 200

#: A frame of the handshake: kind and header.
Message: TypeAlias = tuple[FrameKind, bytes]

_UNPROVEN: Final = "the peer did not prove that it knows the cluster secret"

_T = TypeVar("_T", bound=msgspec.Struct)


@functools.cache
def distribution() -> str:
    """Version of the installed distribution, or "unknown" where it runs from bare sources."""
    try:
        return importlib.metadata.version("shardserve")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerInfo:
    """The proven identity of the other end.

    Attributes:
        name: of the actor.
        generation: distinct for every process that bore the name; 0 of a peer that only calls.
        node: Ray's node id.
    """

    name: str
    generation: int
    node: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What one side says of itself.

    Attributes:
        distribution: version of the code; peers of different versions do not talk.
        protocol: differs from `PROTOCOL` only in tests.
    """

    name: str
    generation: int
    node: str
    distribution: str
    protocol: int = PROTOCOL


class Handshake(Protocol):
    """One side of a handshake."""

    @property
    def peer(self) -> PeerInfo | None:
        """The other end, once it has proven itself."""
        ...

    def start(self) -> list[Message]:
        """What to send at once."""
        ...

    def receive(self, kind: FrameKind, header: bytes) -> list[Message]:
        """What to send in answer.

        Raises:
            HandshakeRefused: the peer is not one to talk to. The message may be told to it.
        """
        ...


class _Protocol(msgspec.Struct, frozen=True, array_like=True):
    protocol: int


class _Hello(msgspec.Struct, frozen=True, array_like=True):
    protocol: int
    distribution: str
    name: str
    generation: int
    node: str
    expected_name: str
    expected_generation: int
    nonce: bytes


class _Challenge(msgspec.Struct, frozen=True, array_like=True):
    protocol: int
    nonce: bytes


class _Proof(msgspec.Struct, frozen=True, array_like=True):
    proof: bytes


class _Said(msgspec.Struct, frozen=True, array_like=True):
    distribution: str
    name: str
    generation: int
    node: str


class _Welcome(msgspec.Struct, frozen=True, array_like=True):
    said: bytes  # a _Said, as the bytes that the proof covers
    proof: bytes


class _Refused(msgspec.Struct, frozen=True, array_like=True):
    reason: str


class ClientHandshake:
    """The side that connects.

    Args:
        identity: what this side is.
        expected_name: the actor that must answer.
        expected_generation: and the generation of it.
        secret: the cluster's.
        nonce: `NONCE_BYTES` random bytes, fresh for every handshake.
    """

    __slots__ = (
        "_awaited",
        "_challenge",
        "_expected",
        "_hello",
        "_identity",
        "_secret",
        "peer",
    )

    def __init__(
        self,
        identity: Identity,
        *,
        expected_name: str,
        expected_generation: int,
        secret: bytes,
        nonce: bytes,
    ) -> None:
        _check_entropy(secret, nonce)
        self.peer: PeerInfo | None = None
        self._identity = identity
        self._expected = (expected_name, expected_generation)
        self._secret = secret
        self._awaited = FrameKind.CHALLENGE
        self._challenge = b""
        self._hello = encode_header(
            _Hello(
                identity.protocol,
                identity.distribution,
                identity.name,
                identity.generation,
                identity.node,
                expected_name,
                expected_generation,
                nonce,
            )
        )

    def start(self) -> list[Message]:
        """See `Handshake.start`."""
        return [(FrameKind.HELLO, self._hello)]

    def receive(self, kind: FrameKind, header: bytes) -> list[Message]:
        """See `Handshake.receive`."""
        if kind is FrameKind.REFUSED:
            reason = _decode(header, _Refused).reason[:_REASON_CHARS_MAX]
            raise HandshakeRefused(f"{self._expected[0]} refused: {_printable(reason)}")
        _expect(kind, self._awaited)
        if kind is FrameKind.CHALLENGE:
            return self._prove(header)
        self._accept(header)
        return []

    def _prove(self, header: bytes) -> list[Message]:
        challenge = _decode(header, _Challenge)
        _same_protocol(challenge.protocol, self._identity.protocol)
        if len(challenge.nonce) != NONCE_BYTES:
            raise HandshakeRefused("the challenge is not one")
        self._challenge = header
        self._awaited = FrameKind.WELCOME
        proof = _sign(self._secret, b"client", self._hello, header)
        return [(FrameKind.PROOF, encode_header(_Proof(proof)))]

    def _accept(self, header: bytes) -> None:
        welcome = _decode(header, _Welcome)
        proof = _sign(self._secret, b"server", self._hello, self._challenge, welcome.said)
        if not hmac.compare_digest(proof, welcome.proof):
            raise HandshakeRefused(_UNPROVEN)
        said = _decode(welcome.said, _Said)
        _same_distribution(said.distribution, self._identity.distribution)
        _same_process(self._expected, (said.name, said.generation))
        self.peer = PeerInfo(name=said.name, generation=said.generation, node=said.node)


class ServerHandshake:
    """The side that listens; arguments as of `ClientHandshake`."""

    __slots__ = ("_awaited", "_challenge", "_hello", "_identity", "_peer_hello", "_secret", "peer")

    def __init__(self, identity: Identity, *, secret: bytes, nonce: bytes) -> None:
        _check_entropy(secret, nonce)
        self.peer: PeerInfo | None = None
        self._identity = identity
        self._secret = secret
        self._awaited = FrameKind.HELLO
        self._challenge = encode_header(_Challenge(identity.protocol, nonce))
        self._hello = b""
        self._peer_hello: _Hello | None = None

    def start(self) -> list[Message]:
        """See `Handshake.start`: a server waits to be spoken to."""
        return []

    def receive(self, kind: FrameKind, header: bytes) -> list[Message]:
        """See `Handshake.receive`."""
        _expect(kind, self._awaited)
        if kind is FrameKind.HELLO:
            return self._challenge_peer(header)
        return self._welcome(header)

    def _challenge_peer(self, header: bytes) -> list[Message]:
        # The number comes first, alone: a HELLO of other rules may not even have our fields.
        _same_protocol(_decode(header, _Protocol).protocol, self._identity.protocol)
        hello = _decode(header, _Hello)
        if len(hello.nonce) != NONCE_BYTES:
            raise HandshakeRefused("the HELLO is not one")
        self._hello, self._peer_hello = header, hello
        self._awaited = FrameKind.PROOF
        return [(FrameKind.CHALLENGE, self._challenge)]

    def _welcome(self, header: bytes) -> list[Message]:
        proof = _sign(self._secret, b"client", self._hello, self._challenge)
        if not hmac.compare_digest(proof, _decode(header, _Proof).proof):
            raise HandshakeRefused(_UNPROVEN)
        # Only now may the peer learn anything about this process.
        hello, mine = self._peer_hello, self._identity
        assert hello is not None
        _same_distribution(hello.distribution, mine.distribution)
        _same_process(
            (hello.expected_name, hello.expected_generation), (mine.name, mine.generation)
        )
        self.peer = PeerInfo(name=hello.name, generation=hello.generation, node=hello.node)
        said = encode_header(_Said(mine.distribution, mine.name, mine.generation, mine.node))
        signed = _sign(self._secret, b"server", self._hello, self._challenge, said)
        # A second PROOF or HELLO on this connection is nobody's to send.
        self._awaited = FrameKind.GOODBYE
        return [(FrameKind.WELCOME, encode_header(_Welcome(said, signed)))]


def refusal(error: HandshakeRefused) -> Message:
    """The frame that tells the peer why it is refused."""
    return FrameKind.REFUSED, encode_header(_Refused(error.message[:_REASON_CHARS_MAX]))


def _decode(header: bytes, kind: type[_T]) -> _T:
    try:
        return msgspec.msgpack.decode(header, type=kind)
    except (ValueError, RecursionError):
        raise HandshakeRefused("a frame of the handshake does not parse") from None


def _sign(secret: bytes, role: bytes, *said: bytes) -> bytes:
    mac = hmac.new(secret, role, hashlib.sha256)
    for part in said:
        # With its length before each part, no two transcripts can be the same bytes.
        mac.update(len(part).to_bytes(4, "little"))
        mac.update(part)
    return mac.digest()


def _expect(kind: FrameKind, awaited: FrameKind) -> None:
    if kind is not awaited:
        raise HandshakeRefused(f"{kind.name} came where {awaited.name} was due")


def _same_protocol(theirs: int, mine: int) -> None:
    if theirs != mine:
        raise HandshakeRefused(f"protocol {theirs} meets protocol {mine}")


def _same_distribution(theirs: str, mine: str) -> None:
    if theirs != mine:
        raise HandshakeRefused(
            f"shardserve {_printable(theirs)} meets {mine}: all nodes must run the same version"
        )


def _same_process(expected: tuple[str, int], found: tuple[str, int]) -> None:
    if expected != found:
        raise HandshakeRefused(
            f"{_printable(expected[0])} of generation {expected[1]} was expected, this is "
            f"{_printable(found[0])} of generation {found[1]}"
        )


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:_REASON_CHARS_MAX])


def _check_entropy(secret: bytes, nonce: bytes) -> None:
    if not secret:
        raise InvalidArgument("the cluster secret is empty")
    assert len(nonce) == NONCE_BYTES
