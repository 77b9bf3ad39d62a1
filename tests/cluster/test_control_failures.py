"""The controller core by example: what fails, and what it may disturb."""

from __future__ import annotations

import dataclasses

import pytest

from batching.errors import (
    DataLoss,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)
from cluster.control import (
    ActorUp,
    ControlSettings,
    Declared,
    ListStore,
    Load,
    Persist,
    Publish,
    ReadManifest,
    Tick,
    Unload,
)
from tests.cluster.control_fakes import (
    FOUR_SHARDS,
    Shell,
    begun,
    config,
    loading,
    manifest,
    map_unit,
    of,
    report,
    table_unit,
)

# Failures


def test_a_failed_load_leaves_the_older_version_serving_and_says_why() -> None:
    """E8."""
    shell = begun()
    shell.serve("m", 1)
    (load,) = loading(shell, 1, 7)
    shell.effects.clear()
    shell.send(load.done(InvalidArgument("shape [b,3] is not [b,4]")))
    assert of(Unload, shell.effects) == []
    assert shell.versions() == [1]
    assert shell.states() == {7: ("END", "INVALID_ARGUMENT"), 1: ("AVAILABLE", "OK")}
    failed = next(each for each in shell.epoch.statuses if each.version == 7)
    assert failed.error_message == "device-0: shape [b,3] is not [b,4]"
    (load,) = loading(shell, 1, 7, 8)
    shell.send(load.done())
    assert shell.versions() == [8]
    assert [unload.version for unload in of(Unload, shell.effects)] == [1]


def test_a_failure_that_another_try_cannot_mend_is_tried_once() -> None:
    """E16, E9."""
    shell = begun()
    (load,) = loading(shell, 1)
    shell.send(load.done(Internal("bug")))
    assert of(Load, shell.sleep(1000.0)) == []
    shell.listed("m", 1)
    assert of(ReadManifest, shell.sleep(1000.0)) == []


def test_a_retriable_failure_is_tried_again_later_and_later_and_then_left() -> None:
    """E14."""
    shell = begun()
    start = shell.now
    times: list[float] = []
    loads = loading(shell, 1)
    while loads:
        times.append(shell.now - start)
        effects = shell.send(loads[0].done(Unavailable("the store is slow")))
        while not of(ReadManifest, effects) and shell.now < start + 500.0:
            effects = shell.sleep(0.5)
        reads = of(ReadManifest, effects)
        loads = of(Load, shell.send(*(read.done(manifest("m", 1)) for read in reads)))
    assert times == [0.0, 1.0, 3.0, 7.0]
    assert shell.states() == {1: ("END", "UNAVAILABLE")}


def test_a_retry_that_succeeds_is_available_without_an_error() -> None:
    """E14."""
    shell = begun()
    (load,) = loading(shell, 1)
    shell.send(load.done(ResourceExhausted("no memory just now")))
    assert shell.states() == {1: ("END", "RESOURCE_EXHAUSTED")}
    (read,) = of(ReadManifest, shell.sleep(1.0))
    (load,) = of(Load, shell.send(read.done(manifest("m", 1))))
    shell.send(load.done())
    assert shell.states() == {1: ("AVAILABLE", "OK")}


def test_what_other_shards_loaded_of_a_failed_version_is_let_go() -> None:
    shell = begun(FOUR_SHARDS)
    effects = shell.listed("m", 1)
    model = manifest("m", 1, words=table_unit("w", [8] * 4))
    loads = of(Load, shell.send(of(ReadManifest, effects)[0].done(model)))
    shell.send(loads[0].done())
    unloads = of(Unload, shell.send(loads[1].done(DataLoss("partition 1"))))
    assert [each.actor for each in unloads] == ["shard-0", "shard-2", "shard-3"]
    # Loads that end after they were cancelled say nothing that matters.
    assert shell.send(loads[2].done(), loads[3].done(Internal("cancelled"))) == []
    shell.send(*(unload.done() for unload in unloads))
    assert shell.core.status()["servables"]["m"]["versions"][0]["step"] == "END"
    assert shell.states() == {1: ("END", "DATA_LOSS")}


def test_a_manifest_that_cannot_be_read_is_a_failed_version() -> None:
    """E11."""
    shell = begun()
    shell.serve("m", 1)
    (read,) = of(ReadManifest, shell.listed("m", 1, 2))
    shell.send(read.failed(DataLoss("servable.json does not parse")))
    assert shell.states() == {2: ("END", "DATA_LOSS"), 1: ("AVAILABLE", "OK")}


def test_a_manifest_of_another_version_is_refused() -> None:
    shell = begun()
    (read,) = of(ReadManifest, shell.listed("m", 1))
    shell.send(read.done(manifest("m", 2)))
    assert shell.states() == {1: ("END", "DATA_LOSS")}


def test_one_bad_servable_is_no_other_servables_business() -> None:
    shell = begun(config("bad", "good"))
    (load,) = loading(shell, 1, name="bad")
    shell.send(
        load.done(Internal("bug")), ListStore(servable="bad").failed(OSError("no such place"))
    )
    shell.serve("good", 1)
    assert shell.versions("good") == [1]


def test_a_version_without_room_says_what_is_short_and_loads_when_there_is_room() -> None:
    shell = Shell()
    shell.send(Declared(config=config("m", "n", devices=1)))
    shell.send(ActorUp(report=report("device-0", capacity=10)), ActorUp(report=report("shard-0")))
    shell.serve("m", 1, manifest("m", 1, t=map_unit("m", 8)))
    (read,) = of(ReadManifest, shell.listed("n", 1))
    effects = shell.send(read.done(manifest("n", 1, t=map_unit("n", 8))))
    assert of(Load, effects) == []
    assert shell.states("n") == {1: ("END", "RESOURCE_EXHAUSTED")}
    (status,) = (each for each in shell.epoch.statuses if each.servable == "n")
    assert status.error_message == (
        "n version 1: unit 't', copy 1 of 1, fits nowhere: "
        "device-0 needs 8 B of device memory, 2 B free of 10 B: 6 B short"
    )
    assert of(ReadManifest, shell.sleep(500.0)) == []
    (unload,) = of(Unload, shell.send(Declared(config=config("n", devices=1))))
    (read,) = of(ReadManifest, shell.send(unload.done()))
    effects = shell.send(read.done(manifest("n", 1, t=map_unit("n", 8))))
    assert len(of(Load, effects)) == 1


def test_a_version_waits_for_room_that_is_about_to_be_free() -> None:
    shell = Shell()
    shell.send(Declared(config=config("m", "n", devices=1)))
    shell.send(ActorUp(report=report("device-0", capacity=10)), ActorUp(report=report("shard-0")))
    shell.serve("m", 1, manifest("m", 1, t=map_unit("m", 8)))
    (unload,) = of(Unload, shell.send(Declared(config=config("n", devices=1))))
    (read,) = of(ReadManifest, shell.listed("n", 1))
    shell.send(read.done(manifest("n", 1, t=map_unit("n", 8))))
    assert shell.states("n") == {1: ("START", "OK")}
    assert len(of(Load, shell.send(unload.done()))) == 1


def test_a_failed_version_is_tried_again_when_its_declaration_changes() -> None:
    shell = begun(config("m", replicas=2))
    (read,) = of(ReadManifest, shell.listed("m", 1))
    shell.send(read.done(manifest("m", 1)))
    assert shell.states() == {1: ("END", "RESOURCE_EXHAUSTED")}
    (read,) = of(ReadManifest, shell.send(Declared(config=config("m", replicas=1))))
    assert len(of(Load, shell.send(read.done(manifest("m", 1))))) == 1


@pytest.mark.parametrize(
    "changed", [{"store": "/elsewhere"}, {"cluster": config(devices=1).cluster}]
)
def test_what_a_running_cluster_cannot_change_is_refused_and_nothing_happens(
    changed: dict[str, object],
) -> None:
    declared = dataclasses.replace(
        config("m"), cluster=dataclasses.replace(config("m").cluster, name="one")
    )
    shell = begun(declared)
    shell.serve("m", 1)
    before = shell.core.status()
    with pytest.raises(FailedPrecondition, match="cannot change while the cluster runs"):
        shell.send(Declared(config=dataclasses.replace(declared, **changed)))  # type: ignore[arg-type]
    assert shell.core.status() == before
    assert shell.core.config == declared


def test_what_cannot_be_kept_is_not_done_and_comes_back_with_what_rests_on_it() -> None:
    shell = begun()
    (read,) = of(ReadManifest, shell.listed("m", 1))
    effects = shell.send(read.done(manifest("m", 1)))
    assert [type(each) for each in effects] == [Persist, Publish, Load]
    shell.core.put_back(effects)
    assert shell.core.next_wakeup() == shell.now + ControlSettings().retry_first_s
    assert shell.send(Tick()) == effects
    assert shell.send(Tick()) == []


def test_of_what_is_put_back_again_and_again_only_what_still_counts_is_left() -> None:
    """A store that is away for long must not fill the memory, nor revive what is over."""
    shell = begun()
    (read,) = of(ReadManifest, shell.listed("m", 1))
    shell.core.put_back(shell.send(read.done(manifest("m", 1))))
    for generation in range(1, 30):
        shell.core.put_back(shell.lost("device-0", generation))
        shell.core.put_back(shell.sleep(60.0))
        shell.core.put_back(shell.up("device-0", generation=generation + 1))
    effects = shell.send(Tick())
    assert len(effects) == len({type(each) for each in effects})
    assert len(of(Persist, effects)) == len(of(Publish, effects)) == 1
    assert of(Publish, effects)[0].epoch == shell.epoch
    assert all(load.generation == 30 for load in of(Load, effects))
