"""What holds for any story: events in any order, repeated, late, failed or made up."""

from __future__ import annotations

import dataclasses

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from batching.errors import DataLoss, InvalidArgument, ResourceExhausted, Unavailable
from cluster.config import Transition, VersionPolicy
from cluster.control import (
    ActorLost,
    ActorUp,
    Declared,
    Effect,
    EnsureActor,
    Event,
    Listed,
    Load,
    Loaded,
    Publish,
    ReadManifest,
    RouterGone,
    RouterLeased,
    StopActor,
    Tick,
    Unload,
    Unloaded,
)
from cluster.lifecycle import TABLE
from cluster.traffic import Rollout
from shards.manifest import Manifest
from shards.orders import ActorReport, HostedUnit
from tests.cluster.control_fakes import Shell, config, manifest, map_unit, of, report, table_unit
from tests.cluster.simulated_parts import occupied

NAMES = ("m", "n")
POLICIES = (
    VersionPolicy(latest=1),
    VersionPolicy(latest=2),
    VersionPolicy(all=True),
    VersionPolicy(specific=(2, 3)),
)
ROLLOUTS = (
    Rollout(),
    Rollout(labels={"a": 2}),
    Rollout(labels={"a": 3, "b": 2}, split={"a": 1, "b": 1}),
    Rollout(labels={"b": 3}, split={"2": 9, "3": 1}),
)
TRANSITIONS: tuple[Transition, ...] = ("availability", "resource", "shard-rolling")
ERRORS = (
    None,
    None,
    Unavailable("away"),
    ResourceExhausted("full"),
    InvalidArgument("shapes"),
    DataLoss("bits"),
)
names = st.sampled_from(NAMES)
versions = st.integers(1, 4)


def model(name: str, version: int) -> Manifest:
    """36 bytes, 20 of them over shards: two versions fit beside each other in 64, not in 32."""
    return manifest(
        name,
        version,
        trunk=map_unit(f"{name}-{version}", 16),
        words=table_unit(f"{name}-words-{version}", [8, 8, 4]),
    )


class Stories(RuleBasedStateMachine):
    """A shell that answers what it was asked for, or not, in any order."""

    @initialize(capacity=st.sampled_from([32, 64]))
    def begin(self, capacity: int) -> None:
        self.shell = Shell()
        self.capacity = capacity
        self.hosted: dict[tuple[str, int], dict[tuple[str, int], tuple[HostedUnit, ...]]] = {}
        self.reads: list[ReadManifest] = []
        self.orders: list[Load | Unload] = []
        self.starts: list[EnsureActor] = []
        self.past: list[Event] = []
        self.running: dict[str, int] = {}
        self.holds: set[tuple[str, int, str, int]] = set()
        self.generation = 0
        self.number = 0
        self.declared: tuple[str, ...] = ()
        self.transitions: dict[str, Transition] = {}
        self.serving: set[str] = set()
        self.whole: set[str] = set()
        self.named: dict[tuple[str, str], int] = {}
        self.declare(NAMES, POLICIES[0], 1)

    @property
    def kept(self) -> set[str]:
        """Declared servables that do not give up answering for want of room."""
        return {name for name in self.declared if self.transitions[name] != "resource"}

    # What the world does

    @rule(
        listed=st.sampled_from([NAMES, NAMES, ("m",), ("n",)]),
        policy=st.sampled_from(POLICIES),
        replicas=st.integers(1, 2),
        rollout=st.sampled_from(ROLLOUTS),
        transition=st.sampled_from(TRANSITIONS),
    )
    def declare(
        self,
        listed: tuple[str, ...],
        policy: VersionPolicy,
        replicas: int,
        rollout: Rollout = ROLLOUTS[0],
        transition: Transition = TRANSITIONS[0],
    ) -> None:
        self.serving.intersection_update(listed)
        self.whole.intersection_update(listed)
        self.declared = listed
        self.transitions = dict.fromkeys(listed, transition)
        copies = max(replicas, 2) if transition == "shard-rolling" else replicas
        declared = config(*listed, policy=policy, devices=2, shards=2, replicas=replicas)
        servables = tuple(
            dataclasses.replace(
                each,
                labels=rollout.labels,
                split=rollout.split,
                transition=transition,
                replicas=copies,
                table_replicas=copies,
            )
            for each in declared.servables
        )
        self.named = {
            key: label
            for key, label in self.named.items()
            if key[0] in listed and key[1] in rollout.labels
        }
        self.send(Declared(config=dataclasses.replace(declared, servables=servables)))

    @rule(name=names, found=st.sets(versions, max_size=4))
    def list_store(self, name: str, found: set[int]) -> None:
        self.send(Listed(servable=name, versions=tuple(found)))

    @precondition(lambda self: self.reads)
    @rule(data=st.data(), error=st.sampled_from(ERRORS))
    def answer_read(self, data: st.DataObject, error: Exception | None) -> None:
        read = self.reads.pop(data.draw(st.integers(0, len(self.reads) - 1)))
        self.send(
            read.done(model(read.servable, read.version)) if error is None else read.failed(error)
        )

    @precondition(lambda self: self.orders)
    @rule(data=st.data(), error=st.sampled_from(ERRORS), warming=st.booleans())
    def answer_order(self, data: st.DataObject, error: Exception | None, warming: bool) -> None:
        order = self.orders.pop(data.draw(st.integers(0, len(self.orders) - 1)))
        if isinstance(order, Load) and warming:
            self.send(order.warming())
        self.carry_out(order, error)

    def carry_out(self, order: Load | Unload, error: Exception | None) -> None:
        hosted = self.hosted.get((order.actor, order.generation), {})
        if isinstance(order, Load) == (error is not None):
            servable = order.order if isinstance(order, Load) else order
            hosted.pop((servable.servable, servable.version), None)
        if self.running.get(order.actor) != order.generation:
            lost = ActorLost(name=order.actor, generation=order.generation)
            self.send(lost)
            return
        done = order.done(error)
        if done.error is None:
            held = (done.actor, done.generation, done.servable, done.version)
            if isinstance(done, Loaded):
                self.holds.add(held)
            else:
                self.holds.discard(held)
        self.send(done)

    @precondition(lambda self: self.starts)
    @rule(data=st.data(), starts=st.sampled_from([True, True, True, False]))
    def answer_start(self, data: st.DataObject, starts: bool) -> None:
        start = self.starts.pop(data.draw(st.integers(0, len(self.starts) - 1)))
        if not starts:
            self.send(ActorLost(name=start.name, generation=0))
            return
        if start.name not in self.running:
            self.generation += 1
            self.running[start.name] = self.generation
        self.send(ActorUp(report=self.report(start.name)))

    @rule(name=names, version=versions)
    def all_goes_well_for_a_while(self, name: str, version: int) -> None:
        """A version is listed, and whatever is asked for succeeds at once."""
        self.send(Listed(servable=name, versions=(version,)))
        for _ in range(30):
            if self.starts:
                start = self.starts.pop(0)
                if start.name not in self.running:
                    self.generation += 1
                    self.running[start.name] = self.generation
                self.send(ActorUp(report=self.report(start.name)))
            elif self.reads:
                read = self.reads.pop(0)
                self.send(read.done(model(read.servable, read.version)))
            elif self.orders:
                self.carry_out(self.orders.pop(0), None)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def report_again(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.running)))
        self.send(ActorUp(report=self.report(name)))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.running)))
        self.whole.clear()
        self.send(ActorLost(name=name, generation=self.running.pop(name)))

    @rule(router=st.sampled_from(["r0", "r1"]), behind=st.integers(0, 3))
    def lease(self, router: str, behind: int) -> None:
        self.send(RouterLeased(router=router, oldest_live_epoch=max(0, self.number - behind)))

    @rule(router=st.sampled_from(["r0", "r1"]))
    def router_goes(self, router: str) -> None:
        self.send(RouterGone(router=router))

    @rule(seconds=st.sampled_from([0.01, 1.0, 5.0, 30.0, 700.0]))
    def sleep(self, seconds: float) -> None:
        end = self.shell.now + seconds
        while (at := self.shell.core.next_wakeup()) is not None and at <= end:
            assert at > self.shell.now
            # Honest: just before the instant there is nothing to do.
            self.shell.now += (at - self.shell.now) * 0.999
            assert self.shell.send(Tick()) == []
            self.shell.now = at
            self.send(Tick())
        self.shell.now = end
        self.send(Tick())

    @precondition(lambda self: self.past)
    @rule(data=st.data())
    def repeat_the_past(self, data: st.DataObject) -> None:
        """A late copy of an answer that was given long ago."""
        event = data.draw(st.sampled_from(self.past))
        self.take(self.shell.send(event))

    # Taking effects in, and what must hold of them

    def report(self, name: str) -> ActorReport:
        generation = self.running[name]
        held = [(s, v) for actor, g, s, v in self.holds if (actor, g) == (name, generation)]
        return report(name, generation, sorted(held), capacity=self.capacity)

    def send(self, event: Event) -> None:
        self.take(self.shell.send(event))
        if isinstance(event, Loaded | Unloaded | ActorLost):
            self.past = [*self.past[-20:], event]
        if not (isinstance(event, ActorLost) and event.generation == 0):
            assert self.shell.send(event) == [], ("said twice", event)

    def take(self, effects: list[Effect]) -> None:
        for publish in of(Publish, effects):
            assert publish.epoch.number > self.number
            self.number = publish.epoch.number
        assert len(of(Publish, effects)) <= 1
        for load in of(Load, effects):
            key = (load.actor, load.generation, load.order.servable, load.order.version)
            assert key not in self.holds, ("told to load what it holds", key)
            hosted = self.hosted.setdefault((load.actor, load.generation), {})
            hosted[load.order.servable, load.order.version] = load.order.units
            assert occupied(hosted, lambda key: model(*key)) <= self.capacity, load
        for unload in of(Unload, effects):
            served = self.shell.epoch.servables.get(unload.servable, {}).get(unload.version)
            parts = () if served is None else tuple(served.placement.values())
            named = {actor for copies in parts for part in copies for actor in part}
            assert unload.actor not in named, "told to unload what an epoch names there"
        for stop in of(StopActor, effects):
            if self.running.get(stop.name) == stop.generation:
                del self.running[stop.name]
        self.reads += of(ReadManifest, effects)
        self.starts += of(EnsureActor, effects)
        self.orders += [each for each in effects if isinstance(each, Load | Unload)]

    @invariant()
    def what_serves_goes_on_serving(self) -> None:
        """The last available version of a declared servable is never unloaded.

        Nor does it give up a part before another version answers, as long as no actor is lost.
        Declared ``resource`` it may.
        """
        if not hasattr(self, "shell"):
            return
        served = self.shell.epoch.servables
        assert self.serving & self.kept <= served.keys(), (self.serving, served)
        self.serving = served.keys() & set(self.declared)
        whole = {
            name
            for name, versions in served.items()
            if any(
                all(part for parts in version.placement.values() for part in parts)
                for version in versions.values()
            )
        }
        assert self.whole & self.kept <= whole, (self.whole, whole)
        self.whole = whole & set(self.declared)

    @invariant()
    def labels_and_splits_are_of_what_is_served_and_labels_stay(self) -> None:
        """A label that an epoch has had is in every later one, as long as it is declared."""
        if not hasattr(self, "shell"):
            return
        epoch = self.shell.epoch
        for name, labels in epoch.labels.items():
            assert set(labels.values()) <= epoch.servables[name].keys()
        for name, shares in epoch.splits.items():
            assert {share.version for share in shares} <= epoch.servables[name].keys()
        now = {
            (name, label): version
            for name, labels in epoch.labels.items()
            for label, version in labels.items()
        }
        before = {key for key in self.named if key[0] in self.kept}
        assert before <= now.keys(), (self.named, now)
        config = self.shell.core.config
        assert config is not None
        kept = {(each.name, label) for each in config.servables for label in each.labels}
        self.named = {key: version for key, version in now.items() if key in kept}

    @invariant()
    def an_epoch_names_only_processes_that_run_and_hold_the_version(self) -> None:
        if not hasattr(self, "shell"):
            return
        epoch = self.shell.epoch
        for name, endpoint in epoch.endpoints.items():
            assert self.running.get(name) == endpoint.generation
        for name, served in epoch.servables.items():
            for number, version in served.items():
                for actor in {a for u in version.placement.values() for p in u for a in p}:
                    generation = epoch.endpoints[actor].generation
                    assert (actor, generation, name, number) in self.holds

    @invariant()
    def parts_without_a_copy_are_told(self) -> None:
        if not hasattr(self, "shell"):
            return
        told = {(each.servable, each.version): each for each in self.shell.epoch.statuses}
        for name, served in self.shell.epoch.servables.items():
            for number, version in served.items():
                empty = any(not part for parts in version.placement.values() for part in parts)
                assert (told[name, number].error_code == "UNAVAILABLE") == empty

    @invariant()
    def every_step_was_in_the_table(self) -> None:
        if not hasattr(self, "shell"):
            return
        drawn = {(str(before), str(step), str(after)) for (before, step), after in TABLE.items()}
        for servable in self.shell.core.status()["servables"].values():
            for version in servable["versions"]:
                for line in version["story"]:
                    _, before, step, after, *_ = line.split()
                    assert (before, step.strip("->"), after) in drawn, line


TestStories = Stories.TestCase
TestStories.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
