"""What a person may set about doors: bounds, time-outs, keys, certificates. Values only.

The controller hands these values to routers, on whatever node they are, so every path in here is
one on the node of the door. Imports no pydantic: a router only reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final

from cluster.fields import FieldError, Size, check_at_least
from shards.recorded import BYTES_MAX, REQUESTS_MAX

__all__ = [
    "BODY_BYTES_MAX",
    "COMPRESS_BYTES_MIN",
    "Address",
    "Auth",
    "DoorLimits",
    "RequestLog",
    "Tls",
    "is_loopback",
]

_STRICT: Final[dict[str, Any]] = {"extra": "forbid", "strict": True}

#: Smaller answers fit a packet or two, whatever is made of them.
COMPRESS_BYTES_MIN: Final = 1024
#: What a door takes as one body unless declared otherwise.
BODY_BYTES_MAX: Final = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a door listens.

    Attributes:
        host: interface; ``0.0.0.0`` for all.
        port: TCP port; 0 lets the system choose one.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    host: str = "127.0.0.1"
    port: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise FieldError("port", f"must be between 0 and 65535, got {self.port}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DoorLimits:
    """Bounds and time-outs of a direct port.

    A sender that is slow must keep up an average of ``rate_min_bytes`` a second after its first
    seconds; so must a reader that leaves its answers lying.

    Attributes:
        body_bytes_max: largest request body, as it comes and as it was before it was compressed;
            more is answered 413.
        head_bytes_max: largest request line plus headers; more is answered 431.
        connections_max: open connections; one more is answered 503. Held below the number of
            files that the process may open.
        pipelined_max: requests of one connection that wait their turn before no more are read.
        bodies_bytes_max: bytes of all unfinished or waiting requests; one more is answered 503.
        unread_bytes_max: bytes of all answers that clients do not take; beyond, those that have
            kept theirs waiting the longest are cut.
        head_s: from the first byte of a request to the end of its headers, else 408; also for
            the TLS handshake, and how long a new connection may say nothing.
        body_s: seconds that a body may take beyond what its size allows, else 408.
        read_s: the same for a client that takes its answers, else it is cut.
        idle_s: how long a connection stays open between two requests.
        rate_min_bytes: bytes a second that count as progress.
        compress_bytes_min: answers of so many bytes are compressed for clients that ask for it.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    body_bytes_max: Size = BODY_BYTES_MAX
    head_bytes_max: Size = 32 << 10
    connections_max: int = 16_384
    pipelined_max: int = 64
    bodies_bytes_max: Size = 1 << 30
    unread_bytes_max: Size = 256 << 20
    head_s: float = 10.0
    body_s: float = 20.0
    read_s: float = 20.0
    idle_s: float = 120.0
    rate_min_bytes: Size = 4096
    compress_bytes_min: Size = COMPRESS_BYTES_MIN

    def __post_init__(self) -> None:
        check_at_least(self, 1, "body_bytes_max", "connections_max", "pipelined_max")
        check_at_least(self, 1, "unread_bytes_max", "rate_min_bytes")
        check_at_least(self, 64, "head_bytes_max")
        check_at_least(self, COMPRESS_BYTES_MIN, "compress_bytes_min")
        check_at_least(self, 0.01, "head_s", "body_s", "read_s", "idle_s")
        if self.bodies_bytes_max < self.body_bytes_max:
            raise FieldError("bodies_bytes_max", "must be at least body_bytes_max")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """Certificates of a direct port: PEM files, read again when they change.

    Attributes:
        certificate: the chain, its own certificate first.
        key: its private key, not encrypted.
        client_ca: where given, clients must show a certificate that one of these has signed.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    certificate: str
    key: str
    client_ca: str = ""

    def __post_init__(self) -> None:
        for name in ("certificate", "key"):
            if not getattr(self, name):
                raise FieldError(name, "must name a file")


@dataclass(frozen=True, slots=True, kw_only=True)
class Auth:
    """Who may use the doors.

    Attributes:
        keys: the keys file; see `cluster.keyfile`. Read again when it changes.
        open_metrics: whether ``/metrics`` needs no key.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    keys: str
    open_metrics: bool = False

    def __post_init__(self) -> None:
        if not self.keys:
            raise FieldError("keys", "must name a file")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLog:
    """Some of a servable's answered requests, kept in files that are warm-up requests as well.

    Attributes:
        directory: of each node; a directory for the servable is made in it.
        rate: which share of the requests is kept, above 0 and at most 1.
        requests_max: of a file; the next ones go into another.
        bytes_max: of a file; bytes, or a size such as ``16MiB``.
        files_max: files of the servable on a node; older ones are removed.
        redact: inputs whose values are not kept: numbers become 0, and texts as many ``x``.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    directory: str
    rate: float = 0.001
    requests_max: int = REQUESTS_MAX
    bytes_max: Size = BYTES_MAX
    files_max: int = 8
    redact: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.directory:
            raise FieldError("directory", "must name a directory")
        if not 0 < self.rate <= 1:
            raise FieldError("rate", f"must be above 0 and at most 1, got {self.rate}")
        check_at_least(self, 1, "requests_max", "files_max")
        check_at_least(self, 4096, "bytes_max")
        # A file that is fuller could not be replayed.
        for name, most in (("requests_max", REQUESTS_MAX), ("bytes_max", BYTES_MAX)):
            if getattr(self, name) > most:
                raise FieldError(name, f"must be at most {most}, got {getattr(self, name)}")


def is_loopback(host: str) -> bool:
    """Whether an interface, as declared, is reached from this machine alone."""
    return host == "localhost" or host == "::1" or host.startswith("127.")
