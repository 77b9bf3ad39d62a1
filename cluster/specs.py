"""How the cluster's own actors are to start: values that cross Ray as msgpack."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from cluster.doors.settings import Auth, DoorLimits, Tls, is_loopback
from shards.orders import TlsFiles

__all__ = [
    "ControllerSpec",
    "Membership",
    "RouterAddress",
    "RouterSpec",
    "ServeDoorSpec",
    "Transport",
    "warnings_about",
]

#: How routers reach actors: ``auto`` is sockets, and Ray calls to those that no socket reaches.
Transport: TypeAlias = Literal["auto", "sockets", "ray"]


class _Value(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the values."""


class ControllerSpec(_Value, frozen=True):
    """What a controller must know before anything is declared.

    Attributes:
        cluster: its name; part of Ray's namespace and of the state's path.
        store: where bundles and the declared state are.
        directory: for Unix sockets, on every node.
        cache_directory: for compiled programs, on every node.
    """

    cluster: str
    store: str
    directory: str
    cache_directory: str


class RouterSpec(_Value, frozen=True):
    """What a router actor must know.

    Attributes:
        cluster: whose controller to ask.
        host: interface of the direct REST port.
        port: 0 takes a free one, and the same again after a restart.
        directory: where the node's actors keep small files of their own; made if need be.
        tls: of links to actors of other nodes.
        transport: see `cluster.dialing`.
        limits: of its door.
        certificates: of its door.
        auth: who may use it.
        admin: whether it answers the admin API.
        index: which router of its node it is.
        processes: of its node, which share the port; 0 for as many as its processors are good for.
    """

    cluster: str
    host: str
    port: int
    directory: str
    tls: TlsFiles | None = None
    transport: Transport = "auto"
    limits: DoorLimits = DoorLimits()
    certificates: Tls | None = None
    auth: Auth | None = None
    admin: bool = False
    index: int = 0
    processes: int = 1


class Membership(_Value, frozen=True):
    """What a router that the controller did not make needs to open links.

    Attributes:
        secret: the cluster's.
        tls: as of a `RouterSpec`.
        transport: as of a `RouterSpec`.
    """

    secret: bytes
    tls: TlsFiles | None = None
    transport: Transport = "auto"

    @property
    def planes(self) -> Transport:
        """By which planes a router may reach actors."""
        # Who can keep a port from answering must not bring about that rows go in the clear.
        return "sockets" if self.tls is not None and self.transport == "auto" else self.transport

    def __repr__(self) -> str:
        return "<Membership>"  # never the secret


class ServeDoorSpec(_Value, frozen=True):
    """What the replica of the Ray Serve door must know.

    Attributes:
        host: interface of the door, which Ray Serve opens.
        body_bytes_max: largest request body.
        compress_bytes_min: as of `DoorLimits`.
        auth: who may use it.
    """

    host: str
    body_bytes_max: int
    compress_bytes_min: int
    auth: Auth | None = None


class RouterAddress(_Value, frozen=True):
    """Where a router's direct REST port is, or why it is not; and what is not as it should be.

    Attributes:
        processes: routers that its node should have.
    """

    router: str
    node: str
    host: str
    port: int
    pid: int
    scheme: str = "http"
    error: str = ""
    warnings: tuple[str, ...] = ()
    processes: int = 1


def warnings_about(host: str, auth: Auth | None, *, has_tls: bool) -> tuple[str, ...]:
    """What is dangerous about a door that listens on this interface."""
    if is_loopback(host):
        return ()
    if auth is None:
        return (f"open on {host} to anybody: set cluster.auth, or host: 127.0.0.1",)
    if not has_tls:
        return (f"keys cross the network in clear on {host}: set tls, or put TLS in front",)
    return ()
