"""What a controller tells an actor to host, and what the actor answers: values only.

Orders travel as msgpack inside Ray actor calls. Every order carries the controller's term, and an
actor refuses an order of a lower term than the highest it has seen.
"""

from __future__ import annotations

from typing import Literal, TypeVar

import msgspec

__all__ = ["ActorKind", "ActorReport", "Endpoint", "HostedUnit", "LoadOrder", "decode", "encode"]

T = TypeVar("T", bound=msgspec.Struct)

ActorKind = Literal["device", "shard", "host"]


class _Value(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the orders' values."""


class Endpoint(_Value):
    """Where an actor's data plane listens.

    Attributes:
        actor: the actor's name, unique in the cluster.
        generation: distinct for every process that ever bore the name.
        node: Ray's node id; peers on the same node use ``path``.
        path: Unix socket, or "" where there is none.
        host: TCP address, or "" where there is none.
        port: TCP port, 0 where there is none.
    """

    actor: str
    generation: int
    node: str
    path: str = ""
    host: str = ""
    port: int = 0


class HostedUnit(_Value):
    """One unit an actor is to host: of a table, only the named partitions."""

    name: str
    partitions: tuple[int, ...] = ()


class LoadOrder(_Value):
    """Host these units of one servable version, all or none."""

    term: int
    store: str
    servable: str
    version: int
    units: tuple[HostedUnit, ...]


class ActorReport(_Value):
    """What an actor is and holds.

    Attributes:
        loaded: ``(servable, version)`` of every order carried out and not undone.
        reserved_bytes: memory promised to those.
        capacity_bytes: the most it will promise.
        compiles_after_available: programs compiled on the serving path; must stay 0.
    """

    kind: ActorKind
    endpoint: Endpoint
    pid: int
    loaded: tuple[tuple[str, int], ...] = ()
    reserved_bytes: int = 0
    capacity_bytes: int = 0
    compiles_after_available: int = 0


def encode(value: msgspec.Struct) -> bytes:
    """The value as msgpack."""
    return msgspec.msgpack.encode(value)


def decode(data: bytes, kind: type[T]) -> T:
    """The value back; refuses what does not fit ``kind``."""
    return msgspec.msgpack.decode(data, type=kind)
