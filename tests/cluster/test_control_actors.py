"""The controller core by example: actors come and go."""

from __future__ import annotations

from collections import deque
from typing import Any

from msgspec import structs

from batching.errors import (
    Internal,
    ResourceExhausted,
)
from cluster.control import (
    ActorLost,
    ControlSettings,
    Declared,
    Effect,
    EnsureActor,
    Load,
    Publish,
    ReadManifest,
    StopActor,
    Unload,
)
from cluster.epochs import VersionStatus
from cluster.signals import ActorUp
from shards.orders import HostedUnit
from tests.cluster.control_fakes import (
    FOUR_SHARDS,
    Shell,
    begun,
    config,
    loading,
    manifest,
    of,
    report,
    sharded,
    table_unit,
)
from tests.cluster.test_device_metrics import device

# Actors come and go


def test_a_lost_shard_leaves_the_epoch_at_once_and_only_it_loads_again() -> None:
    shell = sharded()
    effects = shell.lost("shard-2")
    (published,) = of(Publish, effects)
    epoch = published.epoch
    assert epoch.servables["m"][1].placement == {
        "words": (("shard-0",), ("shard-1",), (), ("shard-3",))
    }
    assert sorted(epoch.endpoints) == ["shard-0", "shard-1", "shard-3"]
    assert epoch.statuses == (
        VersionStatus(
            servable="m",
            version=1,
            state="AVAILABLE",
            error_code="UNAVAILABLE",
            error_message="degraded: words[2] waits for shard-2",
        ),
    )
    assert of(EnsureActor, effects) == [EnsureActor(name="shard-2", kind="shard")]
    effects = shell.up("shard-2", generation=2)
    (load,) = of(Load, effects)
    assert (load.actor, load.generation) == ("shard-2", 2)
    assert load.order.units == (HostedUnit(name="words", partitions=(2,)),)
    assert of(Publish, effects) == []
    (published,) = of(Publish, shell.send(load.done()))
    assert published.epoch.endpoints["shard-2"].generation == 2
    assert published.epoch.servables["m"][1].placement["words"][2] == ("shard-2",)
    assert shell.states() == {1: ("AVAILABLE", "OK")}
    assert len(of(Load, shell.effects)) == 1


def test_a_lost_copy_is_covered_by_the_other() -> None:
    shell = begun(config("m", devices=2, replicas=2))
    shell.serve("m", 1)
    shell.lost("device-0")
    assert shell.epoch.servables["m"][1].placement == {"trunk": (("device-1",),)}
    assert shell.states() == {1: ("AVAILABLE", "OK")}


def test_an_actor_replaced_before_its_loss_is_heard_is_a_loss_and_a_start() -> None:
    shell = sharded()
    effects = shell.up("shard-2", generation=2)
    assert [load.actor for load in of(Load, effects)] == ["shard-2"]
    assert shell.epoch.servables["m"][1].placement["words"][2] == ()
    assert shell.lost("shard-2", generation=1) == []


def test_late_words_of_a_lost_process_are_ignored() -> None:
    shell = begun()
    (load,) = loading(shell, 1)
    shell.lost("device-0")
    shell.up("device-0", generation=2)
    assert shell.send(load.done(), load.warming()) == []
    assert shell.up("device-0", generation=1) == []
    assert shell.lost("device-0", generation=1) == []
    assert shell.versions() == []


def test_while_the_new_version_is_degraded_the_old_one_stays() -> None:
    shell = begun(FOUR_SHARDS)
    for version in (1, 2):
        words = table_unit(f"w{version}", [8] * 4)
        effects = shell.listed("m", *range(1, version + 1))
        read = of(ReadManifest, effects)[0]
        loads = of(Load, shell.send(read.done(manifest("m", version, words=words))))
        if version == 1:
            shell.send(*(load.done() for load in loads))
            continue
        shell.send(*(load.done() for load in loads[:3]))
        # Two at once: the last shard of the new version, and the loss of another.
        shell.send(ActorLost(name="shard-0", generation=1), loads[3].done())
    assert shell.versions() == [1]
    effects = shell.up("shard-0", generation=2)
    shell.send(*(load.done() for load in of(Load, effects)))
    assert shell.versions() == [2]


def test_an_actor_that_crashes_too_often_is_left_alone_for_a_pause_and_all_say_so() -> None:
    shell = sharded()
    generation = 1
    for _ in range(5):
        shell.lost("shard-1", generation)
        effects = shell.sleep(5.0)
        generation += 1
        shell.up("shard-1", generation=generation)
    effects = shell.lost("shard-1", generation)
    assert of(EnsureActor, effects + shell.sleep(4.9)) == []
    assert shell.core.status()["actors"]["shard-1"]["state"] == "FAILED"
    (status,) = shell.epoch.statuses
    why = "killed; it crashed too often and is tried again after 5 s"
    assert status.error_message == f"degraded: words[1] waits for shard-1 (failed: {why})"
    effects = shell.send(Declared(config=FOUR_SHARDS))
    assert of(EnsureActor, effects) == [EnsureActor(name="shard-1", kind="shard")]


def given_up(shell: Shell) -> int:
    """Crash a device until it is left alone for its first pause; returns its last generation."""
    for generation in range(1, 6):
        shell.lost("device-0", generation)
        shell.sleep(5.0)
        shell.up("device-0", generation=generation + 1)
    shell.lost("device-0", 6)
    assert shell.core.status()["actors"]["device-0"]["state"] == "FAILED"
    return 6


def test_pauses_grow_until_a_process_lives_for_a_whole_window() -> None:
    shell = begun()
    generation = given_up(shell)
    pauses: list[float] = []
    for lives_s in (1.0, 1.0, 1.0, 1.0, 61.0, 1.0):
        failed_at = shell.now
        while not of(EnsureActor, shell.sleep(0.5)):
            assert shell.now < failed_at + 100.0
        pauses.append(shell.now - failed_at)
        generation += 1
        shell.up("device-0", generation=generation)
        shell.sleep(lives_s)
        effects = shell.lost("device-0", generation)
        if of(EnsureActor, effects):
            break
    assert pauses == [5.0, 10.0, 20.0, 40.0, 60.0]


def test_nothing_waits_for_an_actor_that_is_tried_again_after_a_pause() -> None:
    shell = begun(config("m", devices=2))
    given_up(shell)
    while not of(EnsureActor, shell.sleep(0.5)):
        pass
    assert shell.core.status()["actors"]["device-0"]["state"] == "STARTING"
    (load,) = loading(shell, 1)
    assert load.actor == "device-1"


def test_restarts_wait_longer_and_longer() -> None:
    shell = begun()
    delays: list[float] = []
    for generation in range(1, 6):
        lost_at = shell.now
        effects = shell.lost("device-0", generation)
        while not of(EnsureActor, effects):
            effects = shell.sleep(0.5)
        delays.append(shell.now - lost_at)
        shell.up("device-0", generation=generation + 1)
    assert delays == [0.0, 0.5, 1.0, 2.0, 4.0]


def test_a_start_that_fails_is_a_crash() -> None:
    shell = Shell()
    shell.send(Declared(config=config("m")))
    starts = 1
    for _ in range(6):
        effects = shell.send(ActorLost(name="device-0", generation=0, reason="no such image"))
        starts += len(of(EnsureActor, effects + shell.sleep(4.5)))
    assert starts == 1 + 5
    reason = shell.core.status()["actors"]["device-0"]["reason"]
    assert reason == "no such image; it crashed too often and is tried again after 5 s"


def test_a_version_that_kills_its_actors_is_given_up_before_the_actors_are() -> None:
    shell = begun(config("good", "bad"))
    shell.serve("good", 1)
    todo: deque[Effect] = deque(loading(shell, 1, name="bad"))
    generation = 1
    while shell.now < 300.0:
        match todo.popleft() if todo else None:
            case Load(order=order) as load if order.servable == "bad":
                todo.extend(shell.lost("device-0", load.generation))
            case Load() as load:
                todo.extend(shell.send(load.done()))
            case ReadManifest(servable=name) as read:
                todo.extend(shell.send(read.done(manifest(name, 1))))
            case EnsureActor(name=name):
                generation += 1
                todo.extend(shell.up(name, generation=generation))
            case None:
                todo.extend(shell.sleep(0.5))
            case _:
                pass
    assert generation - 1 == ControlSettings().attempts_max
    assert shell.states("bad") == {1: ("END", "UNAVAILABLE")}
    assert shell.states("good") == {1: ("AVAILABLE", "OK")}
    assert shell.core.status()["actors"]["device-0"]["state"] == "UP"


def test_what_may_have_killed_an_actor_loads_alone() -> None:
    """Two versions were loading when the actor died; each is then tried alone."""
    shell = begun(config("a", "b", "c"))
    loading(shell, 1, name="a")
    loading(shell, 1, name="b")
    shell.lost("device-0")
    shell.up("device-0", generation=2)
    reads = of(ReadManifest, shell.sleep(1.0))
    effects = shell.send(*(read.done(manifest(read.servable, 1)) for read in reads))
    (first,) = of(Load, effects)
    assert first.order.servable == "a"
    assert loading(shell, 1, name="c") == []
    effects = shell.send(first.done())
    (second,) = of(Load, effects)
    assert second.order.servable == "c"
    (third,) = of(Load, shell.send(second.done()))
    assert third.order.servable == "b"


def test_a_reload_that_fails_degrades_the_version_and_does_not_take_it_down() -> None:
    shell = sharded()
    shell.lost("shard-0")
    (load,) = of(Load, shell.up("shard-0", generation=2))
    effects = shell.send(load.done(ResourceExhausted("no memory")))
    assert of(Unload, effects) == []
    (status,) = shell.epoch.statuses
    assert status.error_message == (
        "degraded: words[0] waits for shard-0 (RESOURCE_EXHAUSTED: no memory)"
    )
    (load,) = of(Load, shell.sleep(1.0))
    shell.send(load.done())
    assert shell.states() == {1: ("AVAILABLE", "OK")}


def test_a_version_placed_on_an_actor_that_is_given_up_is_placed_anew() -> None:
    shell = begun(config("m", devices=2))
    (load,) = loading(shell, 1)
    assert load.actor == "device-0"
    shell.send(*(ActorLost(name="device-0", generation=1) for _ in range(1)))
    for _ in range(5):
        shell.sleep(5.0)
        shell.send(ActorLost(name="device-0", generation=0))
    assert shell.core.status()["actors"]["device-0"]["state"] == "FAILED"
    effects = shell.sleep(60.0)
    reads = of(ReadManifest, shell.effects)
    loads = of(Load, effects + shell.send(*(read.done(manifest("m", 1)) for read in reads)))
    assert [load.actor for load in loads] == ["device-1"]


def test_actors_that_are_no_longer_declared_end_when_nothing_is_on_them() -> None:
    shell = begun(config("m", devices=2))
    shell.serve("m", 1)
    effects = shell.send(Declared(config=config("m", devices=1)))
    assert of(StopActor, effects) == [StopActor(name="device-1", generation=1)]
    shell.lost("device-1")
    assert "device-1" not in shell.core.status()["actors"]
    assert shell.core.status()["actors"]["device-0"]["state"] == "UP"


def test_an_actor_that_is_no_longer_declared_serves_until_its_version_goes() -> None:
    shell = begun(config("m", devices=2, replicas=2))
    shell.serve("m", 1)
    effects = shell.send(Declared(config=config("m", devices=1, replicas=1)))
    assert of(StopActor, effects) == []
    (load,) = loading(shell, 1, 2)
    assert load.actor == "device-0"
    unloads = of(Unload, shell.send(load.done()))
    effects = shell.send(*(unload.done() for unload in unloads))
    assert of(StopActor, effects) == [StopActor(name="device-1", generation=1)]


def test_an_order_without_an_answer_is_given_again_under_the_same_number() -> None:
    shell = begun()
    (load,) = loading(shell, 1)
    assert of(Load, shell.sleep(599.999)) == []
    assert of(Load, shell.sleep(0.001)) == [load]
    shell.send(load.done())
    (unload,) = of(Unload, shell.send(Declared(config=config())))
    assert of(Unload, shell.sleep(600.0)) == [unload]


def test_an_unload_that_fails_is_ordered_again() -> None:
    shell = begun()
    shell.serve("m", 1)
    (unload,) = of(Unload, shell.send(Declared(config=config())))
    assert shell.send(unload.done(Internal("still mapped"))) == []
    assert of(Unload, shell.sleep(600.0)) == [unload]
    shell.send(unload.done())
    assert shell.core.status()["servables"] == {}


def test_status_says_what_a_device_did_between_its_last_two_reports() -> None:
    shell = begun()

    def heard(generation: int, up_s: float, busy_s: float) -> dict[str, Any] | None:
        statistics = device(up_s=up_s, busy_s=busy_s)
        said = structs.replace(report("device-0", generation=generation), statistics=statistics)
        shell.send(ActorUp(report=said))
        found: dict[str, Any] | None = shell.core.status()["actors"]["device-0"]["device"]
        return found

    first = heard(1, 100.0, 20.0)
    assert first is not None
    assert (first["seconds"], first["busy"]) == (100.0, 0.2)
    second = heard(1, 105.0, 22.0)
    assert second is not None
    assert (second["seconds"], second["busy"]) == (5.0, 0.4)
    assert [row["servable"] for row in second["servables"]] == ["m"]
    shell.lost("device-0")
    assert shell.core.status()["actors"]["device-0"]["device"] is None
    anew = heard(2, 110.0, 1.1)
    assert anew is not None
    assert (anew["seconds"], anew["busy"]) == (110.0, 0.01)
