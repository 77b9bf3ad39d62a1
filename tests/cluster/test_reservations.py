"""Memory is promised before it is used, never twice, and given back whatever happens."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec import structs

from batching.errors import Internal, ResourceExhausted
from cluster.control import (
    ActorUp,
    ControlSettings,
    Declared,
    Effect,
    Listed,
    Load,
    ReadManifest,
    Tick,
    Unload,
)
from shards.manifest import Manifest
from shards.orders import UnitState
from tests.cluster.control_fakes import Shell, config, manifest, map_unit, of, report, table_unit

DEVICES = 2
CAPACITY = 40


def fleet(*names: str, capacity: int = 10, devices: int = DEVICES) -> Shell:
    """Declared servables, and actors with so much memory each."""
    shell = Shell()
    shell.send(Declared(config=config(*names, devices=devices)))
    for index in range(devices):
        shell.send(ActorUp(report=report(f"device-{index}", capacity=capacity)))
    shell.send(ActorUp(report=report("shard-0", capacity=capacity)))
    return shell


def load_of(shell: Shell, name: str, size: int, version: int = 1) -> list[Load]:
    """List a version with one unit of so many bytes; the load orders that follow."""
    (read,) = of(ReadManifest, shell.listed(name, version))
    value = manifest(name, version, t=map_unit(f"{name}-{version}", size))
    return of(Load, shell.send(read.done(value)))


def again(shell: Shell, effects: list[Effect], size: int) -> list[Load]:
    """Give the manifest once more where it is asked for."""
    (read,) = of(ReadManifest, effects)
    value = manifest(read.servable, read.version, t=map_unit(f"{read.servable}-1", size))
    return of(Load, shell.send(read.done(value)))


def why(shell: Shell, name: str) -> str:
    (status,) = (each for each in shell.epoch.statuses if each.servable == name)
    return f"{status.state} {status.error_code}: {status.error_message}"


def test_two_versions_that_load_at_once_are_promised_different_memory() -> None:
    shell = fleet("a", "b", "c")
    (first,), (second,) = load_of(shell, "a", 8), load_of(shell, "b", 8)
    assert {first.actor, second.actor} == {"device-0", "device-1"}
    assert load_of(shell, "c", 8) == []
    assert "fits nowhere: device-0 needs 8 B of device memory, 2 B free" in why(shell, "c")


def test_a_version_of_which_one_part_fits_nowhere_takes_nothing() -> None:
    shell = fleet("a", "b")
    (read,) = of(ReadManifest, shell.listed("a", 1))
    value = manifest("a", 1, t=map_unit("t", 8), words=table_unit("w", [12]))
    assert of(Load, shell.send(read.done(value))) == []
    assert "partition 0 of 'words' fits nowhere: shard-0 needs 12 B of shard memory" in why(
        shell, "a"
    )
    for name in ("device-0", "device-1"):
        assert shell.core.status()["actors"][name]["promised_bytes"] == 0
    assert len(load_of(shell, "b", 8)) == 1


def test_what_an_actor_has_no_room_for_is_placed_on_another_at_once() -> None:
    shell = fleet("a")
    (load,) = load_of(shell, "a", 8)
    full = load.done(ResourceExhausted("a version 1 needs 8 bytes, 3 are free"))
    (elsewhere,) = again(shell, shell.send(full), 8)
    assert {load.actor, elsewhere.actor} == {"device-0", "device-1"}
    shell.send(elsewhere.done())
    assert shell.versions("a") == [1]


def test_a_second_refusal_waits_like_any_other_failure() -> None:
    shell = fleet("a")
    (load,) = load_of(shell, "a", 8)
    (elsewhere,) = again(shell, shell.send(load.done(ResourceExhausted("full"))), 8)
    effects = shell.send(elsewhere.done(ResourceExhausted("full as well")))
    assert of(ReadManifest, effects) == []
    assert why(shell, "a") == f"END RESOURCE_EXHAUSTED: {elsewhere.actor}: full as well"
    (third,) = again(shell, shell.sleep(2.5), 8)
    assert third.actor in {"device-0", "device-1"}


def test_a_refusal_with_no_room_elsewhere_says_both() -> None:
    shell = fleet("a", "b")
    (other,) = load_of(shell, "b", 8)
    shell.send(other.done())
    (load,) = load_of(shell, "a", 8)
    assert load.actor != other.actor
    effects = shell.send(load.done(ResourceExhausted("full")))
    assert again(shell, effects, 8) == []
    said = why(shell, "a")
    assert f"{load.actor}: full; and elsewhere: " in said
    assert f"{other.actor} needs 8 B of device memory, 2 B free of 10 B" in said
    (third,) = again(shell, shell.sleep(5.0), 8)
    assert third.actor == load.actor


def test_the_only_device_is_not_left_out() -> None:
    shell = fleet("a", devices=1)
    (load,) = load_of(shell, "a", 8)
    effects = shell.send(load.done(ResourceExhausted("full")))
    assert of(ReadManifest, effects) == []
    assert len(again(shell, shell.sleep(1.5), 8)) == 1


@pytest.mark.parametrize(("measured", "fit"), [(4, True), (8, False)])
def test_a_promise_becomes_what_was_measured(measured: int, fit: bool) -> None:
    shell = fleet("a", "b", devices=1)
    (load,) = load_of(shell, "a", 8)
    shell.send(load.done())
    assert load_of(shell, "b", 4) == []
    said = structs.replace(
        report("device-0", loaded=[("a", 1)], capacity=10),
        units=(UnitState(id="a-1", users=("a:1",), nbytes=measured, batch_max=1),),
    )
    effects = shell.send(ActorUp(report=said))
    assert len(of(ReadManifest, effects)) == fit
    assert shell.core.status()["actors"]["device-0"]["promised_bytes"] == measured


def test_what_a_step_took_is_promised_to_the_next_version_with_the_same_programs() -> None:
    shell = fleet("a", capacity=20, devices=1)
    (load,) = load_of(shell, "a", 4)
    shell.send(load.done())
    said = structs.replace(
        report("device-0", loaded=[("a", 1)], capacity=20),
        units=(UnitState(id="a-1", users=("a:1",), nbytes=4 + 9, batch_max=1),),
    )
    shell.send(ActorUp(report=said))
    reads = of(ReadManifest, shell.listed("a", 1, 2))
    value = manifest("a", 2, t=map_unit("a-2", 4))
    assert of(Load, shell.send(reads[0].done(value))) == []
    (status, _) = shell.epoch.statuses
    assert "device-0 needs 13 B of device memory, 7 B free of 20 B" in status.error_message
    assert shell.versions("a") == [1]


def test_what_a_lost_process_had_measured_is_kept_free_for_the_next_one() -> None:
    shell = fleet("a", "b", capacity=20, devices=1)
    (load,) = load_of(shell, "a", 4)
    shell.send(load.done())
    said = structs.replace(
        report("device-0", loaded=[("a", 1)], capacity=20),
        units=(UnitState(id="a-1", users=("a:1",), nbytes=4 + 9, batch_max=1),),
    )
    shell.send(ActorUp(report=said))
    shell.lost("device-0")
    shell.sleep(5.0)
    effects = shell.send(ActorUp(report=report("device-0", generation=2, capacity=20)))
    assert [each.order.servable for each in of(Load, effects)] == ["a"]
    # Beside the 4 bytes of its manifest it would fit, and "a" could not come back.
    assert load_of(shell, "b", 4) == []
    assert "device-0 needs 13 B of device memory, 7 B free of 20 B" in why(shell, "b")


class Books(RuleBasedStateMachine):
    """Versions of many sizes come, fail, are called off and go; actors never promise too much."""

    @initialize()
    def begin(self) -> None:
        self.shell = Shell(settings=ControlSettings(attempts_max=4))
        self.sizes: dict[tuple[str, int], tuple[int, int]] = {}
        self.open: dict[str, dict[str, UnitState]] = {}
        self.reads: list[ReadManifest] = []
        self.orders: list[Load | Unload] = []
        self.declare(("a", "b", "c"))
        for index in range(DEVICES):
            self.send(ActorUp(report=report(f"device-{index}", capacity=CAPACITY)))
            self.send(ActorUp(report=report(f"shard-{index}", capacity=CAPACITY)))

    def send(self, *events: object) -> None:
        effects = self.shell.send(*events)  # type: ignore[arg-type]
        self.reads += of(ReadManifest, effects)
        self.orders += [each for each in effects if isinstance(each, Load | Unload)]

    @rule(names=st.lists(st.sampled_from("abc"), max_size=3, unique=True))
    def declare(self, names: tuple[str, ...] | list[str]) -> None:
        found = config(*names, devices=DEVICES, shards=DEVICES)
        self.send(Declared(config=dataclasses.replace(found)))

    @rule(
        name=st.sampled_from("abc"),
        version=st.integers(1, 5),
        size=st.integers(1, 10),
        rows=st.integers(0, 30),
    )
    def save(self, name: str, version: int, size: int, rows: int) -> None:
        self.sizes.setdefault((name, version), (4 * size, rows))
        self.send(Listed(servable=name, versions=tuple(v for n, v in self.sizes if n == name)))

    def model(self, name: str, version: int) -> Manifest:
        size, rows = self.sizes[name, version]
        return manifest(
            name, version, t=map_unit(f"{name}-{version}", size),
            words=table_unit(f"{name}-{version}-words", [rows, rows // 2]),
        )  # fmt: skip

    @precondition(lambda self: self.reads)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        read = self.reads.pop(data.draw(st.integers(0, len(self.reads) - 1)))
        self.send(read.done(self.model(read.servable, read.version)))

    @precondition(lambda self: self.orders)
    @rule(data=st.data(), how=st.sampled_from(["done", "done", "full", "broken"]))
    def answer(self, data: st.DataObject, how: str) -> None:
        order = self.orders.pop(data.draw(st.integers(0, len(self.orders) - 1)))
        error = {"full": ResourceExhausted("full"), "broken": Internal("bug")}.get(how)
        self.send(order.done(error if isinstance(order, Load) else None))

    @precondition(lambda self: any(isinstance(each, Load) for each in self.orders))
    @rule(size=st.integers(1, 10))
    def measure(self, size: int) -> None:
        """An actor has loaded something, and a device has measured no more than was promised."""
        at = next(i for i, each in enumerate(self.orders) if isinstance(each, Load))
        order = self.orders.pop(at)
        assert isinstance(order, Load)
        self.send(order.done())
        key = (order.order.servable, order.order.version)
        if order.actor.startswith("device"):
            name = f"{key[0]}-{key[1]}"
            state = UnitState(id=name, nbytes=min(4 * size, self.sizes[key][0]))
            self.open.setdefault(order.actor, {})[name] = state
            said = report(order.actor, loaded=[key], capacity=CAPACITY)
            units = tuple(self.open[order.actor].values())
            self.send(ActorUp(report=structs.replace(said, units=units)))

    @rule(seconds=st.sampled_from([0.5, 5.0, 60.0]))
    def wait(self, seconds: float) -> None:
        self.shell.now += seconds
        self.send(Tick())

    @invariant()
    def never_below_nothing_and_never_above_capacity(self) -> None:
        if hasattr(self, "shell"):
            for name, actor in self.shell.core.status()["actors"].items():
                assert 0 <= actor["promised_bytes"] <= CAPACITY, name

    def teardown(self) -> None:
        if not hasattr(self, "shell"):
            return
        self.declare(())
        for _ in range(100):
            if not self.orders:
                break
            orders, self.orders = self.orders, []
            self.send(*(order.done() for order in orders))
            self.wait(60.0)
        for name, actor in self.shell.core.status()["actors"].items():
            assert (actor["promised_bytes"], actor["holds"]) == (0, {}), name


Books.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBooks = Books.TestCase
