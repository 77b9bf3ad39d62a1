"""Builders for tests of the controller core: small manifests, reports and a shell in miniature."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from cluster.config import ClusterConfig, Config, ServableConfig, VersionPolicy
from cluster.control import (
    ActorLost,
    ActorUp,
    ControlCore,
    ControlSettings,
    Declared,
    Effect,
    EnsureActor,
    Event,
    Listed,
    ListStore,
    Load,
    Publish,
    ReadManifest,
    RouterLeased,
    Tick,
    Unload,
)
from cluster.declared import DeclaredState
from cluster.epochs import Epoch
from shards.manifest import (
    BlobRef,
    Created,
    HostUnit,
    Leaf,
    Manifest,
    MapUnit,
    Partition,
    TableUnit,
    Unit,
)
from shards.orders import ActorKind, ActorReport, Endpoint

E = TypeVar("E", bound=Effect)


def blob(size: int = 1) -> BlobRef:
    return BlobRef(digest="00", size=size)


def map_unit(unit_id: str, size: int = 4) -> MapUnit:
    assert size % 4 == 0
    leaf = Leaf(dtype="float32", shape=(size // 4,), blob=blob(size))
    return MapUnit(
        id=unit_id, inputs={}, outputs={}, programs=(), params=(leaf,), batch_buckets=(1,)
    )


def table_unit(unit_id: str, sizes: Sequence[int]) -> TableUnit:
    partitions = tuple(
        Partition(first_row=index, rows=1, blob=blob(size)) for index, size in enumerate(sizes)
    )
    return TableUnit(id=unit_id, dtype="float32", dim=1, rows=len(sizes), partitions=partitions)


def host_unit(unit_id: str, size: int = 1) -> HostUnit:
    return HostUnit(id=unit_id, entry_point="m:a", inputs={}, outputs={}, files={"f": blob(size)})


def manifest(name: str = "m", version: int = 1, **units: Unit) -> Manifest:
    return Manifest(
        schema=1,
        name=name,
        version=version,
        units=units or {"trunk": map_unit(f"{name}-{version}-trunk")},
        signatures={},
        created=Created(shardserve="0", jax="0", at="2026-01-01T00:00:00Z"),
    )


def report(
    name: str,
    generation: int = 1,
    loaded: Iterable[tuple[str, int]] = (),
    node: str = "n1",
    capacity: int = 0,
) -> ActorReport:
    kind: ActorKind = name.rsplit("-", 1)[0]  # type: ignore[assignment]
    endpoint = Endpoint(actor=name, generation=generation, node=node, path=f"/{name}.{generation}")
    return ActorReport(
        kind=kind, endpoint=endpoint, pid=generation, loaded=tuple(loaded), capacity_bytes=capacity
    )


def config(
    *names: str,
    policy: VersionPolicy | None = None,
    devices: int = 1,
    shards: int = 1,
    hosts: int = 0,
    replicas: int = 1,
    deadline_ms: int = 10_000,
) -> Config:
    return Config(
        store="/store",
        servables=tuple(
            ServableConfig(
                name=name,
                policy=policy or VersionPolicy(latest=1),
                replicas=replicas,
                deadline_ms=deadline_ms,
            )
            for name in names
        ),
        cluster=ClusterConfig(devices=devices, shards=shards, hosts=hosts),
    )


def of(kind: type[E], effects: Iterable[Effect]) -> list[E]:
    return [effect for effect in effects if isinstance(effect, kind)]


class Shell:
    """Feeds a core and answers nothing by itself; every step checks the invariants.

    Keeps all effects, so that a test can count them.
    """

    def __init__(
        self, state: DeclaredState | None = None, settings: ControlSettings | None = None
    ) -> None:
        self.core = ControlCore(state or DeclaredState(term=1, seq=0), settings)
        self.now = 100.0
        self.effects: list[Effect] = []

    def send(self, *events: Event) -> list[Effect]:
        """Send events in order; the effects of all of them."""
        found: list[Effect] = []
        for event in events:
            found += self.core.handle(event, self.now)
            self.core.check_invariants()
        self.effects += found
        return found

    def sleep(self, seconds: float) -> list[Effect]:
        """Let time pass, with a tick at every wakeup that was asked for, like a real shell."""
        end = self.now + seconds
        found: list[Effect] = []
        while (at := self.core.next_wakeup()) is not None and at <= end:
            self.now = at
            found += self.send(Tick())
        self.now = end
        return found + self.send(Tick())

    def up(self, *names: str, generation: int = 1) -> list[Effect]:
        return self.send(*(ActorUp(report=report(name, generation)) for name in names))

    def up_holding(self, name: str, *held: tuple[str, int], generation: int = 1) -> list[Effect]:
        """An actor that a new reign finds running."""
        return self.send(ActorUp(report=report(name, generation, held)))

    def lost(self, name: str, generation: int = 1) -> list[Effect]:
        return self.send(ActorLost(name=name, generation=generation, reason="killed"))

    def listed(self, name: str, *versions: int) -> list[Effect]:
        return self.send(Listed(servable=name, versions=versions))

    def router(self, name: str = "r", epoch: int | None = None) -> list[Effect]:
        oldest = self.epoch.number if epoch is None else epoch
        return self.send(RouterLeased(router=name, oldest_live_epoch=oldest))

    @property
    def epoch(self) -> Epoch:
        assert self.core.epoch is not None
        return self.core.epoch

    def versions(self, name: str = "m") -> list[int]:
        """Versions that the latest epoch serves."""
        return sorted(self.epoch.servables.get(name, {}))

    def states(self, name: str = "m") -> dict[int, tuple[str, str]]:
        """Version to public state and error code, of the latest epoch."""
        return {
            status.version: (status.state, status.error_code)
            for status in self.epoch.statuses
            if status.servable == name
        }

    def begin(self, declared: Config, generation: int = 1) -> None:
        """Declare, and bring every actor up that is asked for."""
        for effect in of(EnsureActor, self.send(Declared(config=declared))):
            self.up(effect.name, generation=generation)

    def serve(self, name: str, version: int, value: Manifest | None = None) -> list[Effect]:
        """List one more version, and answer everything until it is available."""
        known = self.core.status()["servables"][name]["complete"]
        effects = self.listed(name, *known, version)
        (read,) = of(ReadManifest, effects)
        effects = self.send(read.done(value or manifest(name, version)))
        return self.carry_out(effects)

    def carry_out(self, effects: Iterable[Effect]) -> list[Effect]:
        """Answer loads and unloads with success until none is asked for."""
        found: list[Effect] = []
        effects = list(effects)
        while effects:
            answers = [e.done() for e in effects if isinstance(e, Load | Unload)]
            effects = self.send(*answers)
            found += effects
        return found


FOUR_SHARDS = config("m", devices=0, shards=4)


def begun(declared: Config | None = None, settings: ControlSettings | None = None) -> Shell:
    """A shell whose actors are up."""
    shell = Shell(settings=settings)
    shell.begin(declared or config("m"))
    return shell


def loading(shell: Shell, *versions: int, name: str = "m") -> list[Load]:
    """List versions and give their manifests; the load orders that follow."""
    reads = of(ReadManifest, shell.listed(name, *versions))
    answers = [read.done(manifest(name, read.version)) for read in reads]
    return of(Load, shell.send(*answers))


def sharded(version: int = 1) -> Shell:
    """A shell that serves a table over four shards."""
    shell = begun(FOUR_SHARDS)
    shell.serve("m", version, manifest("m", version, words=table_unit(f"w{version}", [8] * 4)))
    assert shell.versions() == [version]
    shell.effects.clear()
    return shell


__all__ = [
    "FOUR_SHARDS",
    "begun",
    "loading",
    "sharded",
    "Declared",
    "ListStore",
    "Publish",
    "Shell",
    "blob",
    "config",
    "host_unit",
    "manifest",
    "map_unit",
    "of",
    "report",
    "table_unit",
]
