"""What a declaration may say: frozen values that refuse what cannot be meant.

Every value checks itself when it is made, and names the field that is wrong. Where a declaration is
silent the defaults here hold. Does not know YAML, files or anything that runs; `cluster.config`
reads and writes declarations.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Final, Literal

from pydantic import ConfigDict

from batching import DEFAULT_POLICY, POLICIES
from batching.errors import InvalidArgument, ServingError
from cluster.doors.settings import Address, Auth, DoorLimits, Tls, is_loopback
from cluster.fields import FieldError, Size, check_at_least
from cluster.servable_settings import ServableConfig, check_name
from cluster.specs import Transport
from shards.locations import is_url, parse_location
from shards.orders import TlsFiles

__all__ = [
    "Address",
    "CacheConfig",
    "ClusterConfig",
    "Config",
    "ConfigInvalid",
    "HttpConfig",
    "LinkTls",
    "SchedulingConfig",
]

_STRICT: Final = ConfigDict(extra="forbid", strict=True)


class ConfigInvalid(InvalidArgument):
    """A declaration that cannot be meant; every line names a path and what is wrong there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulingConfig:
    """How device actors choose the next batch.

    Attributes:
        policy: a name of `batching.policies`.
        guard_ms: milliseconds by which batches of owners in share are to be early; unset: what one
            row of the most expensive other lane costs. Only ``effsafe`` has a guard.
        credit_ms: device milliseconds by which a servable may be ahead of the least served and
            still be in share; unset: what five batches take.
        admission: whether rows are refused that would be answered too late; unset: with the policy
            ``effsafe``, and not with those that it is compared with.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    policy: str = DEFAULT_POLICY
    guard_ms: float | None = None
    credit_ms: float | None = None
    admission: bool | None = None

    def __post_init__(self) -> None:
        check_at_least(self, 0, "guard_ms", "credit_ms")
        if self.policy not in POLICIES:
            raise FieldError("policy", f"no policy {self.policy!r}; use {', '.join(POLICIES)}")
        if self.guard_ms is not None and self.policy != "effsafe":
            raise FieldError("guard_ms", f"policy {self.policy} has no guard; only effsafe has")

    @property
    def guard_s(self) -> float | None:
        """The guard in seconds, None where it is unset."""
        return None if self.guard_ms is None else self.guard_ms / 1000

    @property
    def credit_s(self) -> float | None:
        """The credit in seconds, None where it is unset."""
        return None if self.credit_ms is None else self.credit_ms / 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkTls:
    """Mutual TLS between the cluster's own processes on different nodes.

    Each is the path of a PEM file, there on every node, or ``env:NAME`` for text in a variable of
    the environment that Ray was started with.

    Attributes:
        certificate: its chain, for servers and clients alike.
        key: its private key, not encrypted.
        ca: that has issued the certificates of all nodes.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    certificate: str
    key: str
    ca: str

    def __post_init__(self) -> None:
        for name in ("certificate", "key", "ca"):
            if getattr(self, name) in ("", "env:"):
                raise FieldError(name, "must name a file, or a variable as env:NAME")

    def files(self) -> TlsFiles:
        """As actors and routers are told of them."""
        return TlsFiles(certificate=self.certificate, key=self.key, ca=self.ca)


_ROUTERS_MAX: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpConfig:
    """The direct REST door.

    Attributes:
        host: interface; ``0.0.0.0`` for all.
        port: TCP port; 0 lets the system choose one.
        tls: certificates; plain HTTP where there are none.
        limits: bounds and time-outs.
        admin: answer the admin API, by which what is declared can be read and changed; asks for a
            key with the right ``admin``, or, without ``cluster.auth``, for a loopback ``host``.
        processes: routers on each node, which share the port; ``auto``: one for each eight
            processors, eight at most. Limits are each one's own.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    host: str = "127.0.0.1"
    port: int = 8501
    tls: Tls | None = None
    limits: DoorLimits = field(default_factory=DoorLimits)
    admin: bool = False
    processes: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        Address(host=self.host, port=self.port)
        if self.processes != "auto" and not 1 <= self.processes <= _ROUTERS_MAX:
            raise FieldError("processes", f"auto, or 1 to {_ROUTERS_MAX}, not {self.processes}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """Where a node keeps blobs of a remote store. Stores in directories need none.

    Attributes:
        path: a directory of each node, on a disk (reading a hole of a file in a tmpfs that is full
            ends a process), not shared between nodes; "" for one beside the compiled programs, in
            the user's cache directory.
        size: the most that blobs may take there; bytes, or a size such as ``500GiB``.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    path: str = ""
    size: Size = 20 << 30

    def __post_init__(self) -> None:
        check_at_least(self, 1, "size")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """The actors and doors of the cluster.

    Attributes:
        name: names the cluster's durable state in the store and its actors in Ray.
        devices: device actors where there is no accelerator; with accelerators there is one per
            accelerator, whatever this says.
        shards: shard actors; they hold table partitions.
        hosts: host actors; they run pre- and post-processing.
        http: the direct REST door.
        serve: the Ray Serve door.
        tls: of links between nodes; without it they are authenticated, and in the clear. With it,
            ``transport: auto`` never falls back to Ray's calls, which are outside of it.
        transport: how routers reach actors: ``sockets``, ``ray`` (Ray's own calls, much slower), or
            ``auto``: sockets, and Ray calls to those actors whose ports are closed to it. With
            ``ray`` there are no continuations: actors reach one another by sockets alone.
        auth: who may use the doors; anybody who reaches them, where unset.
        allow_entry_points: patterns (``package.module.*``) of entry points that host units may
            name; anything else is refused by the host actors.
        device_memory: bytes that one device actor may promise to parameters, to what steps
            allocate and to staging, e.g. ``4GiB``.
        shard_memory: bytes of table partitions that one shard actor may promise.
        host_memory: bytes of files that one host actor may promise.
        batching: how device actors choose the next batch.
        cache: the node's cache of a remote store.
        poll_s: seconds between two looks into the store for new versions.
        load_parallel_start: versions that load at once, in the whole cluster, from the start of
            the controller until every servable that is declared then has come up or failed to.
        load_parallel: the same later, when loads should not be felt by what serves.
        lease_s: seconds for which a router's report of its oldest live epoch is believed.
        continuation_bytes_min: rows of look-ups that are for one unit alone go from the shards
            straight to its device where they have so many bytes or more, e.g. ``64KiB``; null
            for never. The default is the smallest size at which latency, throughput and the
            router's work were all found to gain (``shardserve bench look-ups``).
        hot_rows_bytes: of rows of tables that every router may keep, e.g. ``256MiB``; 0 for none.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    name: str = "default"
    devices: int = 1
    shards: int = 1
    hosts: int = 1
    http: HttpConfig = field(default_factory=HttpConfig)
    serve: Address = field(default_factory=lambda: Address(port=8000))
    tls: LinkTls | None = None
    transport: Transport = "auto"
    auth: Auth | None = None
    allow_entry_points: tuple[str, ...] = ("cluster.demo.*",)
    device_memory: Size = 4 << 30
    shard_memory: Size = 4 << 30
    host_memory: Size = 1 << 30
    batching: SchedulingConfig = field(default_factory=SchedulingConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    poll_s: float = 2.0
    load_parallel_start: int = 16
    load_parallel: int = 2
    lease_s: float = 10.0
    continuation_bytes_min: Size | None = 64 << 10
    hot_rows_bytes: Size = 0

    def __post_init__(self) -> None:
        check_name(self.name)
        check_at_least(self, 0, "devices", "shards", "hosts", "hot_rows_bytes")
        check_at_least(self, 1, "device_memory", "shard_memory", "host_memory")
        check_at_least(self, 1, "load_parallel_start", "load_parallel")
        if self.continuation_bytes_min is not None:
            check_at_least(self, 0, "continuation_bytes_min")
        check_at_least(self, 0.05, "poll_s")
        check_at_least(self, 1.0, "lease_s")
        if self.http.admin and self.auth is None and not is_loopback(self.http.host):
            raise FieldError(
                "http.admin",
                f"would let anybody on {self.http.host} change what is served: set cluster.auth, "
                "or host: 127.0.0.1",
            )
        for pattern in self.allow_entry_points:
            if not pattern.strip("*. :"):
                raise FieldError(
                    "allow_entry_points",
                    f"{pattern!r} would allow every entry point; name a package",
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A whole declaration.

    Attributes:
        store: of bundles and blobs: a directory, or a URL (``s3://bucket/prefix?region=...``).
        servables: what should be served; a servable that is left out is unloaded.
        cluster: actors and doors.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    store: str
    servables: tuple[ServableConfig, ...] = ()
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        if not self.store:
            raise FieldError("store", "must name a directory or a bucket")
        if is_url(self.store) and not self.store.startswith("file://"):
            try:
                parse_location(self.store)
            except ServingError as error:
                raise FieldError("store", error.message) from None
        seen: set[str] = set()
        for index, servable in enumerate(self.servables):
            path = f"servables[{index}]"
            if servable.name in seen:
                raise FieldError(f"{path}.name", f"{servable.name!r} is declared twice")
            seen.add(servable.name)
            if servable.shards is not None:
                needed = servable.shards * servable.table_replicas
                if needed > self.cluster.shards:
                    raise FieldError(
                        f"{path}.shards",
                        f"{needed} shard actors are asked for, but cluster.shards is "
                        f"{self.cluster.shards}; raise that or lower this",
                    )
