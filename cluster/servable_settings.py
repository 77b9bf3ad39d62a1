"""What a declaration may say of one servable: frozen values that refuse what cannot be meant.

As `cluster.settings`, which has the rest.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import ClassVar, Final, Literal, TypeAlias

from pydantic import ConfigDict

from batching.allowance import CRITICALITIES, Allowance
from cluster.doors.settings import RequestLog
from cluster.fields import FieldError, Size, check_at_least
from cluster.packing import Strategy
from cluster.tiers import Tier, check_tier
from cluster.traffic import Rollout, Shadow, check_rollout
from shards.checking import OVERLAYS_MAX
from shards.orders import Residency

__all__ = [
    "BatchingConfig",
    "CompactConfig",
    "Registered",
    "ServableConfig",
    "Transition",
    "VersionPolicy",
    "check_name",
]

#: How versions take each other's place: loads before unloads, the other way round, or so for a
#: part of the copies at a time.
Transition: TypeAlias = Literal["availability", "resource", "shard-rolling"]

_STRICT: Final = ConfigDict(extra="forbid", strict=True)
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def check_name(name: str) -> None:
    """Refuse what is no name of a servable or a cluster.

    Raises:
        FieldError: it is none.
    """
    if _NAME.fullmatch(name) is None:
        raise FieldError(
            "name",
            f"{name!r} is not a name; use letters, digits, '.', '_' and '-', at most 128, "
            "and begin with a letter or a digit",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Registered:
    """Something that an installed package offers by name.

    Attributes:
        name: as it is registered.
        options: plain values that it is given.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    name: str
    options: dict[str, str | int | float | bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionPolicy:
    """Which versions of a servable should be loaded. Exactly one field is given.

    Attributes:
        latest: the n highest complete versions.
        specific: these versions, as far as they are complete.
        all: every complete version.
        registered: whatever a policy of an installed package says (`cluster.registered`).
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    latest: int | None = None
    specific: tuple[int, ...] = ()
    all: bool = False
    registered: Registered | None = None

    def __post_init__(self) -> None:
        given = (self.latest is not None) + bool(self.specific) + self.all
        if given + (self.registered is not None) != 1:
            raise ValueError(
                "give exactly one of latest: N, specific: [N, ...] with at least one version, "
                "all: true, registered: {name: ...}"
            )
        check_at_least(self, 1, "latest")
        if any(version < 1 for version in self.specific):
            raise FieldError("specific", f"a version is at least 1, got {min(self.specific)}")
        if len(set(self.specific)) != len(self.specific):
            raise FieldError("specific", "a version is named twice")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchingConfig:
    """What a servable's rows are allowed on the devices, whoever else's rows are there.

    Attributes:
        weight: a servable of weight 2 is protected up to twice the device time of one of weight 1,
            and a row of it counts as two.
        criticality: ``critical``, ``default``, ``sheddable`` or ``best-effort``: of requests that
            do not say, and the most that any may ask for (``x-request-criticality``).
        rows_max: rows of it that may wait in a lane; more are refused with RESOURCE_EXHAUSTED.
        bytes_max: bytes of it that may wait in a lane; bytes, or a size such as ``256MiB``.
        shared_bucket_max: the largest batch that its rows may run in with those of other servables
            that use the same unit, beyond the sizes that it declares; 1 for none.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    weight: float = 1.0
    criticality: str = "default"
    rows_max: int = 4096
    bytes_max: Size = 256 << 20
    shared_bucket_max: int = 256

    def __post_init__(self) -> None:
        check_at_least(self, 1, "rows_max", "bytes_max", "shared_bucket_max")
        if not 0 < self.weight < math.inf:
            raise FieldError("weight", f"must be positive, got {self.weight}")
        if self.criticality not in CRITICALITIES:
            known = ", ".join(CRITICALITIES)
            raise FieldError("criticality", f"no criticality {self.criticality!r}; use {known}")

    @property
    def allowance(self) -> Allowance:
        """As device actors are told of it."""
        return Allowance(
            weight=self.weight,
            criticality=CRITICALITIES[self.criticality],
            rows_max=self.rows_max,
            bytes_max=self.bytes_max,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactConfig:
    """When tables are compacted, in the background, for the deltas that will be saved next.

    Attributes:
        overlays: that a partition of the newest available version has at least.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    overlays: int = 4

    def __post_init__(self) -> None:
        check_at_least(self, 1, "overlays")
        if self.overlays > OVERLAYS_MAX:
            raise FieldError(
                "overlays", f"must be at most {OVERLAYS_MAX}, as many as a partition may have"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServableConfig:
    """One servable. Replicas, shards and placement take effect when a version is placed.

    Attributes:
        name: its name in the store and in URLs.
        policy: which versions should be loaded.
        source: what lists its versions, where it is not the store itself; what the source names
            must be in the store all the same.
        replicas: copies of each map and host unit, on as many actors.
        table_replicas: copies of each table partition, on as many shard actors.
        shards: shard actors over which one copy of a version's table partitions is spread; unset
            means as many as there are partitions and shard actors.
        placement: what is made even where these are placed: ``capacity`` the bytes of a version's
            partitions, ``load`` what its look-ups read of them; ``messages`` asks as few shard
            actors as have room for them.
        batching: what its rows are allowed on the devices.
        deadline_ms: how long a request may take that brings no deadline of its own; also how
            long an old version is kept for requests of routers that no longer report.
        labels: names for versions. A version that has one is loaded and kept, whatever the policy
            says; with ``specific`` it must be listed there.
        split: labels or versions to weights, of requests that name neither; unset sends them to
            the newest version.
        shadow: copies of requests for a candidate, whose answers are compared and dropped.
        transition: ``availability`` loads before it unloads, which needs room for both;
            ``resource`` unloads first, and answers nothing in between; ``shard-rolling`` does
            so for one actor at a time, and answers from the other copies.
        warmup_s: how long a version's warm-up requests may take, all together, before it fails.
        compact: when its tables are compacted for deltas to come; unset for never. What is served
            stays as it is (``shardserve bundle compact --ahead``).
        log: which of its requests the doors keep, or None.
        resident: how its tables are in memory, see `shards.residency`; takes effect with a load.
        tier: ``nvme`` leaves the rows of its tables on disk, see `cluster.tiers`; likewise.
        budget: bytes of memory that these may take then, for one copy of all its tables, and for
            each copy once more; bytes, or a size such as ``2GiB``.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    name: str
    policy: VersionPolicy = field(default_factory=lambda: VersionPolicy(latest=1))
    source: Registered | None = None
    replicas: int = 1
    table_replicas: int = 1
    shards: int | None = None
    placement: Strategy = "capacity"
    batching: BatchingConfig = field(default_factory=BatchingConfig)
    deadline_ms: int = 10_000
    labels: dict[str, int] = field(default_factory=dict)
    split: dict[str, int] = field(default_factory=dict)
    shadow: Shadow | None = None
    transition: Transition = "availability"
    warmup_s: float = 60.0
    compact: CompactConfig | None = None
    log: RequestLog | None = None
    resident: Residency = "mapped"
    tier: Tier = "memory"
    budget: Size | None = None

    def __post_init__(self) -> None:
        check_name(self.name)
        check_at_least(self, 1, "replicas", "table_replicas", "shards", "deadline_ms")
        check_at_least(self, 0.001, "warmup_s")
        if self.transition == "shard-rolling" and max(self.replicas, self.table_replicas) < 2:
            raise FieldError(
                "transition",
                "shard-rolling answers from the other copies meanwhile; set replicas, or "
                "table_replicas, to 2 or more",
            )
        if self.placement == "messages" and self.shards is not None:
            raise FieldError(
                "placement",
                "messages takes as few shard actors as have room; leave shards out, or use load "
                "or capacity",
            )
        check_rollout(self.rollout, self.policy.specific)
        check_tier(self)

    @property
    def rollout(self) -> Rollout:
        """Which version should answer what."""
        return Rollout(labels=self.labels, split=self.split, shadow=self.shadow)
