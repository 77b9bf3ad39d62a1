"""What a controller tells an actor to host, and what the actor answers: values only.

Orders travel as msgpack inside Ray actor calls. Every order carries the controller's term, and an
actor refuses an order of a lower term than the highest it has seen.
"""

from __future__ import annotations

from typing import Literal, TypeVar

import msgspec

from batching import DEFAULT_POLICY
from batching.allowance import Allowance
from shards.figures import DeviceStatistics

__all__ = [
    "ActorKind",
    "ActorReport",
    "ActorSpec",
    "AllowOrder",
    "CacheFigures",
    "Endpoint",
    "HostedUnit",
    "LoadOrder",
    "Loading",
    "MeasuredLane",
    "Outcome",
    "Residency",
    "TlsFiles",
    "UnitState",
    "decode",
    "encode",
    "part_address",
]

T = TypeVar("T", bound=msgspec.Struct)

ActorKind = Literal["device", "shard", "host"]
#: How pages of tables are held, see `shards.residency`.
Residency = Literal["mapped", "populated", "locked"]


class _Value(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the orders' values."""


class Endpoint(_Value, frozen=True):
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


class TlsFiles(_Value, frozen=True):
    """What a process needs for mutual TLS, as paths on its own node.

    ``env:NAME`` stands for the PEM text in a variable of the process. The text itself is never in a
    value: values are logged.

    Attributes:
        certificate: its chain, its own certificate first.
        key: its private key, not encrypted.
        ca: of everybody's certificates.
    """

    certificate: str
    key: str
    ca: str


class HostedUnit(_Value, frozen=True):
    """One unit an actor is to host: of a table, only the named partitions.

    Attributes:
        cached: of a table in the NVMe tier (`shards.cold_rows`), bytes of memory for each byte of
            its partitions' bases; None for a table in memory.
    """

    name: str
    partitions: tuple[int, ...] = ()
    cached: float | None = None


class LoadOrder(_Value, frozen=True):
    """Host these units of one servable version, all or none.

    Attributes:
        allowance: of the servable's rows on a device.
        shared_bucket_max: the largest batch that its rows may run in with those of other servables
            that use the same unit, beyond the sizes that it declares.
        resident: how pages of its tables are held.
    """

    term: int
    store: str
    servable: str
    version: int
    units: tuple[HostedUnit, ...]
    allowance: Allowance = Allowance()
    shared_bucket_max: int = 256
    resident: Residency = "mapped"


class AllowOrder(_Value, frozen=True):
    """Treat a servable's rows by this allowance from now on."""

    term: int
    servable: str
    allowance: Allowance


class Loading(_Value, frozen=True):
    """How far an order has come that is not carried out yet.

    Attributes:
        bytes_done: verified and on this node, of ``bytes_total``.
        buckets_done: programs that are compiled and warm, of ``buckets_total``.
        eta_s: seconds until it is done, at the pace so far; None where nothing tells.
        note: why nothing comes, or "".
    """

    servable: str
    version: int
    bytes_done: int = 0
    bytes_total: int = 0
    buckets_done: int = 0
    buckets_total: int = 0
    eta_s: float | None = None
    note: str = ""


class CacheFigures(_Value, frozen=True):
    """What a table in the NVMe tier has in memory, and what was asked of it since it was opened.

    Attributes:
        budget: bytes of memory that it may take.
        nbytes: of the cache, its indices and the buffers to read into, once the cache is full.
        used: bytes of the rows that are cached now.
        hits: rows that were in the cache.
        misses: rows that were not.
        reads: calls that have read the others from the disk.
        read_bytes: that these have read.
        wait_s: seconds that look-ups have waited for these.
        direct: whether they go past the page cache.
    """

    budget: int = 0
    nbytes: int = 0
    used: int = 0
    hits: int = 0
    misses: int = 0
    reads: int = 0
    read_bytes: int = 0
    wait_s: float = 0.0
    direct: bool = True

    def __add__(self, other: CacheFigures) -> CacheFigures:
        return CacheFigures(
            budget=self.budget + other.budget,
            nbytes=self.nbytes + other.nbytes,
            used=self.used + other.used,
            hits=self.hits + other.hits,
            misses=self.misses + other.misses,
            reads=self.reads + other.reads,
            read_bytes=self.read_bytes + other.read_bytes,
            wait_s=self.wait_s + other.wait_s,
            direct=self.direct and other.direct,
        )


class UnitState(_Value, frozen=True):
    """A unit that is open on an actor, once for all who use it.

    Attributes:
        id: the unit's identity.
        users: versions that use it, as ``servable:version``.
        nbytes: parameters, partitions or files, and what a step allocates.
        batch_max: rows of the largest batch, 0 where there are no batches.
        note: why batches are not as large as those of its users together might be, or why a table
            is not in the tier that a user declares, or "".
        cache: of a table in the NVMe tier.
    """

    id: str
    users: tuple[str, ...] = ()
    nbytes: int = 0
    batch_max: int = 0
    note: str = ""
    cache: CacheFigures | None = None


class MeasuredLane(_Value, frozen=True):
    """What batches of one lane of a device have taken.

    Attributes:
        sizes: of every compiled size (size, mean seconds, what one will hardly exceed, how many
            were measured); 0 measured is a guess.
    """

    unit: str
    shape: tuple[int, ...]
    sizes: tuple[tuple[int, float, float, int], ...]


class ActorReport(_Value, frozen=True):
    """What an actor is and holds.

    Attributes:
        loading: orders that are not carried out yet.
        loaded: ``(servable, version)`` of every order carried out and not undone.
        reserved_bytes: memory promised to those.
        capacity_bytes: the most it will promise.
        compiles_after_available: programs compiled on the serving path; must stay 0.
        mismatches: parts and calls refused since they meant another process, epoch or plan.
        units: what is open.
        costs: what batches take, of a device actor.
        statistics: of a device.
    """

    kind: ActorKind
    endpoint: Endpoint
    pid: int
    loaded: tuple[tuple[str, int], ...] = ()
    loading: tuple[Loading, ...] = ()
    reserved_bytes: int = 0
    capacity_bytes: int = 0
    compiles_after_available: int = 0
    mismatches: int = 0
    units: tuple[UnitState, ...] = ()
    costs: tuple[MeasuredLane, ...] = ()
    statistics: DeviceStatistics | None = None


class ActorSpec(_Value, frozen=True):
    """How an actor is to start.

    Attributes:
        name: unique in the cluster.
        directory: where its Unix socket goes.
        capacity_bytes: the most it may host.
        device: index among the process's devices, for device actors.
        tcp_host: address to listen on for peers of other nodes, "auto" for the one by which Ray
            knows the node, or "" for none.
        allow_entry_points: patterns of host-unit entry points that may be imported.
        cache_directory: where compiled programs are kept between processes, or "".
        tls: for peers of other nodes; without it, they are spoken to in the clear.
        blob_cache: where blobs of remote stores are kept on the node, or "" for the user's own.
        blob_cache_bytes: the most that they may take there.
        policy: how a device actor chooses the next batch, a name of `batching.policies`.
        guard_s: of that policy, None for its own.
        credit_s: device seconds by which an owner may be ahead and still be in share, None for a
            few batches' worth.
        admission: whether a device actor refuses rows that it would answer too late; None where
            the policy is the default one.
        platforms: what JAX may use, as in its ``JAX_PLATFORMS``; "" for what the process has.
        log: the least level that is logged.
    """

    kind: ActorKind
    name: str
    directory: str
    capacity_bytes: int
    device: int = 0
    tcp_host: str = ""
    allow_entry_points: tuple[str, ...] = ()
    cache_directory: str = ""
    tls: TlsFiles | None = None
    blob_cache: str = ""
    blob_cache_bytes: int = 0
    policy: str = DEFAULT_POLICY
    guard_s: float | None = None
    credit_s: float | None = None
    admission: bool | None = None
    platforms: str = ""
    log: str = "INFO"


class Outcome(_Value, frozen=True):
    """How an order ended: ``code`` is "OK" or a canonical code."""

    code: str = "OK"
    message: str = ""


def encode(value: msgspec.Struct) -> bytes:
    """The value as msgpack."""
    return msgspec.msgpack.encode(value)


def decode(data: bytes, kind: type[T]) -> T:
    """The value back; refuses what does not fit ``kind``."""
    return msgspec.msgpack.decode(data, type=kind)


def part_address(unit_id: str, index: int) -> str:
    """What calls are addressed to for one partition of a unit whose partitions are all asked.

    Such are units of registered kinds, and tables that are cut by columns.
    """
    return f"{unit_id}/{index}"
