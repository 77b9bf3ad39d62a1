"""What a simulated cluster is made of: actors and routers as their shells promise them."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cluster.config import ClusterConfig, Config, ServableConfig, Transition
from cluster.epochs import Epoch
from cluster.fleet import kind_in
from cluster.packing import Strategy
from cluster.pieces import PieceKey, add_pieces, piece_sizes
from cluster.placement import pieces_on
from cluster.rolling import Parts, parts_of
from shards.manifest import Manifest
from shards.orders import ActorReport, Endpoint, HostedUnit
from tests.cluster.control_models import Key, model

DEADLINE_S = 4.0
LEASE_S = 3.0
RECOVERY_S = 10.0
WARMUP_S = 5.0
#: The longest that a controller stands still.
STALL_S = 60.0
SERVABLES = ("ranker", "encoder")
#: How tables are placed, so that stories tell of every way.
PLACEMENTS: dict[Transition, Strategy] = {
    "availability": "capacity",
    "resource": "load",
    "shard-rolling": "messages",
}


@dataclass(frozen=True)
class Faults:
    """Probabilities, and the spread of delays in seconds."""

    lose: float = 0.05
    repeat: float = 0.1
    fail: float = 0.05
    die: float = 0.02
    usurp: float = 0.01
    stall: float = 0.0
    late_s: float = 2.0


NONE = Faults(lose=0.0, repeat=0.0, fail=0.0, die=0.0, usurp=0.0, late_s=0.1)


def declared(transition: Transition, copies: int, parallel: int, deadline_ms: int) -> Config:
    """What is declared: every servable alike, enough shards, how many versions load at once."""
    return Config(
        store="/s",
        servables=tuple(
            ServableConfig(
                name=name,
                deadline_ms=deadline_ms,
                warmup_s=WARMUP_S,
                transition=transition,
                replicas=copies,
                table_replicas=copies,
                placement=PLACEMENTS[transition],
            )
            for name in SERVABLES
        ),
        cluster=ClusterConfig(
            devices=2,
            shards=2 + copies,
            hosts=0,
            lease_s=LEASE_S,
            poll_s=5.0,
            load_parallel_start=parallel,
            load_parallel=parallel,
        ),
    )


class Timeline:
    """Virtual time: what is to happen, by when and by who came first."""

    def __init__(self) -> None:
        self.now = 0.0
        self._sequence = 0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []

    def run(self, until: float) -> None:
        """Let virtual time pass."""
        while self._heap and self._heap[0][0] <= until:
            self.now, _, action = heapq.heappop(self._heap)
            action()
        self.now = until

    def _at(self, at: float, action: Callable[[], None]) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, (at, self._sequence, action))

    def _every(self, seconds: float, action: Callable[[], None]) -> None:
        def again() -> None:
            action()
            self._at(self.now + seconds, again)

        self._at(self.now + seconds, again)


def occupied(
    hosted: Mapping[Key, tuple[HostedUnit, ...]], made_of: Callable[[Key], Manifest]
) -> int:
    """Bytes of parts of versions on one actor; what they have in common is held once."""
    pieces: dict[PieceKey, int] = {}
    for key, units in hosted.items():
        manifest = made_of(key)
        here = {
            each.name: tuple(
                ("here",) if part in each.partitions or not each.partitions else ()
                for part in range(len(piece_sizes(manifest.units[each.name])))
            )
            for each in units
        }
        add_pieces(pieces, pieces_on(manifest, here).get("here", {}))
    return sum(pieces.values())


@dataclass
class Process:
    """An actor's process as it really is."""

    name: str
    generation: int
    node: str
    capacity: int
    term: int = 0
    held: dict[Key, tuple[HostedUnit, ...]] = field(default_factory=dict)
    held_since: dict[Key, float] = field(default_factory=dict)
    loading: dict[Key, tuple[HostedUnit, ...]] = field(default_factory=dict)
    waiting: dict[Key, list[Callable[[], None]]] = field(default_factory=dict)
    #: of what it has answered warm-up requests, or was named for requests
    proven: set[Key] = field(default_factory=set)

    def report(self) -> ActorReport:
        return ActorReport(
            kind=kind_in(self.name),
            endpoint=Endpoint(
                actor=self.name, generation=self.generation, node=self.node, path="/s"
            ),
            pid=self.generation,
            loaded=tuple(sorted(self.held)),
            capacity_bytes=self.capacity,
        )

    def has_room(self, key: Key, units: tuple[HostedUnit, ...]) -> bool:
        """Whether it could hold this, too; equal parts of several versions are held once."""
        return occupied({**self.held, **self.loading, key: units}, model) <= self.capacity

    def is_at(self, endpoint: Endpoint) -> bool:
        """Whether the endpoint is of this process, and not of an earlier one of the name."""
        return (self.name, self.generation) == (endpoint.actor, endpoint.generation)

    def check_part(self, key: Key, unit: str, partition: int) -> None:
        """It holds what an epoch names it for."""
        assert key in self.held, (self.name, key)
        (hosted,) = (each for each in self.held[key] if each.name == unit)
        assert not hosted.partitions or partition in hosted.partitions, (self.name, key, partition)


def check_named(epoch: Epoch, processes: Mapping[str, Process], *, begins: bool) -> None:
    """Whoever is named and lives holds exactly what it is named for, and has been asked before.

    Who has answered no warm-up request is named only for want of anybody else with one of its
    parts.

    Args:
        epoch: that is published.
        processes: that run.
        begins: it is the first of its reign, which does not know who has answered what.
    """
    for name, versions in epoch.servables.items():
        for number, served in versions.items():
            key = (name, number)
            there: dict[str, Process] = {}
            for unit, parts in served.placement.items():
                for partition, actors in enumerate(parts):
                    for actor in actors:
                        process = processes.get(actor)
                        if process is not None and process.is_at(epoch.endpoints[actor]):
                            process.check_part(key, unit, partition)
                            there[actor] = process
            if served.manifest.warmups is not None and not begins:
                _check_proven(key, parts_of(served.placement.values()), there)
            for process in there.values():
                process.proven.add(key)


def _check_proven(key: Key, parts: Parts, there: Mapping[str, Process]) -> None:
    proven = {actor for actor, process in there.items() if key in process.proven}
    for actor in there.keys() - proven:
        assert any(actor in part and proven.isdisjoint(part) for part in parts), (actor, key)


@dataclass
class Router:
    """A router: the epoch that new requests take, and those that requests are pinned to."""

    name: str
    epoch: Epoch | None = None
    pinned: list[tuple[Epoch, float]] = field(default_factory=list)
    sent_at: float = -1e9
    answering: set[str] = field(default_factory=set)

    def check_answered(self, epoch: Epoch, processes: Mapping[str, Process]) -> None:
        """Whatever it has answered for it can answer for, and every part is where it asks."""
        self.answering.update(epoch.servables)
        assert self.answering <= epoch.servables.keys(), (self.name, epoch.number)
        for name, versions in epoch.servables.items():
            for number, served in versions.items():
                for part in (part for parts in served.placement.values() for part in parts):
                    assert part, (name, number, "a part that nobody has")
                    for actor in part:
                        assert (name, number) in processes[actor].held, (actor, name, number)

    def check_done_with(self, process: Process, key: Key, now: float) -> None:
        """No request of its can come to ask the process for this version."""
        for epoch, until in self.pinned:
            served = epoch.servables.get(key[0], {}).get(key[1])
            if until <= now or served is None:
                continue
            named = {
                actor for parts in served.placement.values() for part in parts for actor in part
            }
            if process.name in named:
                at = epoch.endpoints[process.name]
                assert not process.is_at(at), (process.name, key, self.name, epoch.number)


def check_parallel(processes: Mapping[str, Process], most: int) -> None:
    """No more versions load at once than may."""
    under_way = {key for each in processes.values() for key in each.loading}
    assert len(under_way) <= most, under_way
