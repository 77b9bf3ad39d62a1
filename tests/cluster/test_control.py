"""The controller core by example: versions. E numbers are TensorFlow Serving's test cases."""

from __future__ import annotations

import dataclasses
import json

import pytest

from batching.errors import (
    Internal,
    Unavailable,
)
from cluster.config import BatchingConfig, VersionPolicy
from cluster.control import (
    AcceleratorsFound,
    ActorUp,
    ControlSettings,
    Declared,
    EnsureActor,
    Event,
    Listed,
    ListStore,
    Load,
    Loaded,
    Persist,
    Publish,
    ReadManifest,
    RouterGone,
    RouterLeased,
    Tick,
    Unload,
)
from cluster.declared import DeclaredState, decode
from shards.orders import HostedUnit, LoadOrder
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
    sharded,
    table_unit,
)

# The ordinary way


def test_a_declaration_is_kept_before_anything_follows_from_it() -> None:
    shell = Shell()
    declared = config("m", devices=1, shards=1)
    persist, *others = shell.send(Declared(config=declared))
    assert isinstance(persist, Persist)
    assert decode(persist.data) == DeclaredState(term=1, seq=1, config=declared)
    assert others == [
        Publish(epoch=shell.epoch),
        EnsureActor(name="device-0", kind="device"),
        EnsureActor(name="shard-0", kind="shard"),
        ListStore(servable="m"),
    ]
    assert shell.epoch.servables == {}


def test_before_anything_is_declared_nothing_is_asked_for() -> None:
    shell = Shell()
    assert shell.send(Tick(), ActorUp(report=report("device-0"))) == []
    assert shell.core.next_wakeup() is None
    assert shell.core.epoch is None


def test_a_listed_version_is_read_placed_loaded_and_published() -> None:
    """E12, as effects."""
    shell = begun()
    assert of(ReadManifest, shell.listed("m", 1)) == [ReadManifest(servable="m", version=1)]
    model = manifest("m", 1, trunk=map_unit("t"))
    effects = shell.send(ReadManifest(servable="m", version=1).done(model))
    assert [type(effect) for effect in effects] == [Persist, Publish, Load]
    (load,) = of(Load, effects)
    assert load == Load(
        actor="device-0",
        generation=1,
        number=1,
        order=LoadOrder(
            term=1, store="/store", servable="m", version=1, units=(HostedUnit(name="trunk"),)
        ),
    )
    assert shell.states() == {1: ("LOADING", "OK")}
    assert shell.versions() == []
    effects = shell.send(load.done())
    assert [type(effect) for effect in effects] == [Persist, Publish]
    served = shell.epoch.servables["m"][1]
    assert served.manifest == model
    assert served.placement == {"trunk": (("device-0",),)}
    assert shell.epoch.endpoints == {"device-0": report("device-0").endpoint}
    assert shell.states() == {1: ("AVAILABLE", "OK")}


def test_orders_carry_the_lane_bounds_and_the_term() -> None:
    declared = config("m")
    servable = dataclasses.replace(
        declared.servables[0], batching=BatchingConfig(rows_max=7, bytes_max=99)
    )
    shell = Shell(DeclaredState(term=6, seq=0))
    shell.begin(dataclasses.replace(declared, servables=(servable,)))
    (load,) = loading(shell, 1)
    assert load.order.term == 6
    assert (load.order.allowance.rows_max, load.order.allowance.bytes_max) == (7, 99)
    (unload,) = of(Unload, shell.send(Declared(config=config())))
    assert unload.term == 6


def test_a_version_is_available_only_when_every_shard_has_loaded_it() -> None:
    shell = begun(FOUR_SHARDS)
    effects = shell.listed("m", 1)
    model = manifest("m", 1, words=table_unit("w", [8] * 4))
    effects = shell.send(of(ReadManifest, effects)[0].done(model))
    loads = of(Load, effects)
    assert [load.actor for load in loads] == ["shard-0", "shard-1", "shard-2", "shard-3"]
    for load in loads[:3]:
        assert shell.send(load.done()) == []
    assert shell.versions() == []
    published = of(Publish, shell.send(loads[3].done()))
    assert [sorted(each.epoch.servables["m"]) for each in published] == [[1]]


def test_weights_in_place_on_every_actor_is_a_state_of_its_own() -> None:
    shell = begun(FOUR_SHARDS)
    effects = shell.listed("m", 1)
    model = manifest("m", 1, words=table_unit("w", [8] * 2))
    loads = of(Load, shell.send(of(ReadManifest, effects)[0].done(model)))

    def step() -> str:
        versions = shell.core.status()["servables"]["m"]["versions"]
        return str(versions[0]["step"])

    shell.send(loads[0].done())
    assert step() == "LOADING"
    shell.send(loads[1].warming(), loads[1].warming())
    assert step() == "WARMING"
    shell.send(loads[1].done())
    assert step() == "AVAILABLE"


def test_placement_waits_for_actors_that_are_still_starting() -> None:
    shell = Shell()
    shell.send(Declared(config=config("m", devices=2)))
    shell.up("device-0", "shard-0")
    assert loading(shell, 1) == []
    (note,) = (each["note"] for each in shell.core.status()["servables"]["m"]["versions"])
    assert note == "waits for device-1"
    assert [load.actor for load in of(Load, shell.up("device-1"))] == ["device-0"]


def test_placement_does_not_wait_forever_for_an_actor_that_never_starts() -> None:
    shell = Shell()
    shell.send(Declared(config=config("m", devices=2)))
    shell.up("device-0", "shard-0")
    loading(shell, 1)
    settings = ControlSettings()
    assert of(Load, shell.sleep(settings.start_timeout_s - 0.001)) == []
    effects = shell.sleep(0.001)
    assert [load.actor for load in of(Load, effects)] == ["device-0"]
    assert EnsureActor(name="device-1", kind="device") in effects


def test_accelerators_decide_the_number_of_device_actors() -> None:
    shell = Shell(settings=ControlSettings(accelerators=3))
    effects = shell.send(Declared(config=config(devices=1, shards=0)))
    assert [each.name for each in of(EnsureActor, effects)] == ["device-0", "device-1", "device-2"]


def test_an_accelerator_that_joins_later_gets_a_device_actor() -> None:
    shell = Shell(settings=ControlSettings(accelerators=1))
    shell.send(Declared(config=config(devices=0, shards=0)))
    shell.up("device-0")
    effects = shell.send(AcceleratorsFound(count=2))
    assert of(EnsureActor, effects) == [EnsureActor(name="device-1", kind="device")]


def test_accelerators_that_are_gone_take_no_actor_away() -> None:
    """Their node may come back; whose process has ended is told by actors."""
    shell = Shell(settings=ControlSettings(accelerators=2))
    shell.send(Declared(config=config(devices=0, shards=0)))
    shell.up("device-0", "device-1")
    assert shell.send(AcceleratorsFound(count=1)) == []
    assert shell.send(Declared(config=config(devices=0, shards=0))) == []


def test_accelerators_count_that_were_found_before_anything_was_declared() -> None:
    shell = Shell(settings=ControlSettings(accelerators=1))
    assert shell.send(AcceleratorsFound(count=2)) == []
    effects = shell.send(Declared(config=config(devices=0, shards=0)))
    assert [each.name for each in of(EnsureActor, effects)] == ["device-0", "device-1"]


# Versions replace one another


def test_the_new_version_replaces_the_old_in_one_epoch() -> None:
    shell = begun()
    shell.serve("m", 1)
    shell.router()
    before = shell.epoch.number
    (load,) = loading(shell, 1, 2)
    shell.effects.clear()
    shell.send(load.done())
    (published,) = of(Publish, shell.effects)
    assert sorted(published.epoch.servables["m"]) == [2]
    assert published.epoch.number > before
    assert shell.states() == {2: ("AVAILABLE", "OK"), 1: ("UNLOADING", "OK")}


def test_the_old_version_is_unloaded_when_the_last_router_has_moved_on() -> None:
    shell = begun()
    shell.serve("m", 1)
    shell.router("r1")
    shell.router("r2")
    old = shell.epoch.number
    shell.serve("m", 2)
    assert of(Unload, shell.effects) == []
    assert of(Unload, shell.router("r1")) == []
    assert of(Unload, shell.router("r2", old)) == []
    (unload,) = of(Unload, shell.router("r2"))
    assert (unload.actor, unload.servable, unload.version) == ("device-0", "m", 1)
    shell.send(unload.done())
    assert shell.states() == {2: ("AVAILABLE", "OK"), 1: ("END", "OK")}


def test_without_routers_the_old_version_goes_at_once() -> None:
    shell = begun()
    shell.serve("m", 1)
    shell.serve("m", 2)
    assert [unload.version for unload in of(Unload, shell.effects)] == [1]


def test_a_router_that_is_gone_is_not_waited_for() -> None:
    shell = begun()
    shell.serve("m", 1)
    shell.router()
    shell.serve("m", 2)
    assert len(of(Unload, shell.send(RouterGone(router="r")))) == 1


def test_a_silent_router_holds_the_old_version_for_its_lease_and_the_longest_deadline() -> None:
    shell = begun(config("m", deadline_ms=3_000))
    shell.serve("m", 1)
    shell.router()
    shell.serve("m", 2)
    assert of(Unload, shell.sleep(12.999)) == []
    assert len(of(Unload, shell.sleep(0.001))) == 1


def test_a_router_without_an_epoch_yet_holds_everything() -> None:
    shell = begun()
    shell.serve("m", 1)
    shell.router("late", epoch=0)
    shell.serve("m", 2)
    assert of(Unload, shell.effects) == []


def test_rollback_loads_the_older_then_drains_the_newer() -> None:
    """E6."""
    shell = begun()
    shell.serve("m", 1)
    (load,) = loading(shell, 2)
    shell.carry_out([load])
    (load,) = loading(shell, 1)
    assert (load.order.version, shell.versions()) == (1, [2])
    shell.send(load.done())
    assert shell.versions() == [1]


def test_a_rollback_while_the_old_version_drains_loads_nothing() -> None:
    """E10, without the wait: nothing has let go of it yet."""
    shell = begun()
    shell.serve("m", 1)
    shell.router()
    shell.serve("m", 2)
    shell.effects.clear()
    shell.listed("m", 1)
    assert not of(Load, shell.effects)
    assert not of(Unload, shell.effects)
    assert shell.versions() == [1]
    assert shell.states() == {1: ("AVAILABLE", "OK"), 2: ("UNLOADING", "OK")}


def test_a_version_aspired_again_while_it_unloads_waits_and_loads_exactly_once() -> None:
    """E10."""
    shell = begun()
    shell.serve("m", 1)
    shell.listed("m", 1, 2)
    (read,) = of(ReadManifest, shell.effects)[1:]
    (load,) = of(Load, shell.send(read.done(manifest("m", 2))))
    unload = of(Unload, shell.send(load.done()))[0]
    assert loading(shell, 1) == []
    effects = shell.send(unload.done())
    (read,) = of(ReadManifest, effects)
    (load,) = of(Load, shell.send(read.done(manifest("m", 1))))
    assert load.order.version == 1
    shell.send(load.done())
    assert shell.versions() == [1]


def test_a_load_that_is_no_longer_wanted_is_cancelled() -> None:
    """E15."""
    shell = begun()
    shell.serve("m", 1)
    (load,) = loading(shell, 1, 2)
    effects = shell.listed("m", 1)
    (unload,) = of(Unload, effects)
    assert unload.version == 2
    assert shell.send(load.done()) == []
    shell.send(unload.done())
    assert shell.versions() == [1]
    assert shell.states() == {1: ("AVAILABLE", "OK"), 2: ("END", "OK")}


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (VersionPolicy(latest=1), [3]),
        (VersionPolicy(latest=2), [2, 3]),
        (VersionPolicy(all=True), [1, 2, 3]),
        (VersionPolicy(specific=(1, 3)), [1, 3]),
    ],
)
def test_policies(policy: VersionPolicy, expected: list[int]) -> None:
    shell = begun(config("m", policy=policy))
    for load in loading(shell, 1, 2, 3):
        shell.send(load.done())
    assert shell.versions() == expected


def test_a_servable_that_is_left_out_is_unloaded_and_others_are_not() -> None:
    """E4."""
    shell = begun(config("m", "n"))
    shell.serve("m", 1)
    shell.serve("n", 1)
    effects = shell.send(Declared(config=config("n")))
    (unload,) = of(Unload, effects)
    assert (unload.servable, unload.version) == ("m", 1)
    assert list(shell.epoch.servables) == ["n"]
    shell.send(unload.done())
    assert list(shell.core.status()["servables"]) == ["n"]


def test_a_version_left_out_of_specific_is_unloaded_alone() -> None:
    """E5."""
    shell = begun(config("m", policy=VersionPolicy(specific=(1, 2))))
    for load in loading(shell, 1, 2):
        shell.send(load.done())
    effects = shell.send(Declared(config=config("m", policy=VersionPolicy(specific=(2,)))))
    assert [unload.version for unload in of(Unload, effects)] == [1]
    assert shell.versions() == [2]


def test_a_servable_declared_again_while_it_drains_goes_on_serving() -> None:
    shell = begun()
    shell.serve("m", 1)
    shell.router()
    shell.send(Declared(config=config()))
    assert shell.versions() == []
    effects = shell.send(Declared(config=config("m")))
    assert shell.versions() == [1]
    assert not of(Load, effects)
    assert not of(Unload, shell.effects)


# Listings


@pytest.mark.parametrize(
    "event",
    [
        Listed(servable="m"),
        ListStore(servable="m").failed(Unavailable("the store is away")),
        ListStore(servable="m").failed(OSError("no route")),
    ],
)
def test_an_empty_or_failing_listing_unloads_nothing_and_is_told(event: Event) -> None:
    shell = begun()
    shell.serve("m", 1)
    shell.effects.clear()
    shell.send(event)
    assert shell.effects == []
    assert shell.versions() == [1]
    assert shell.core.status()["servables"]["m"]["listing"] not in ("ok", "not listed yet")


def test_a_specific_version_that_is_not_there_unloads_nothing() -> None:
    shell = begun()
    shell.serve("m", 1)
    shell.send(Declared(config=config("m", policy=VersionPolicy(specific=(9,)))))
    assert shell.versions() == [1]
    assert of(Unload, shell.effects) == []


def test_the_store_is_listed_again_after_the_poll_interval() -> None:
    shell = begun()
    shell.listed("m", 1)
    assert of(ListStore, shell.sleep(1.999)) == []
    assert of(ListStore, shell.sleep(0.001)) == [ListStore(servable="m")]


def test_a_listing_that_does_not_come_is_asked_for_again() -> None:
    shell = begun()
    assert of(ListStore, shell.sleep(29.999)) == []
    assert of(ListStore, shell.sleep(0.001)) == [ListStore(servable="m")]


def test_a_listing_of_a_servable_that_is_not_declared_is_ignored() -> None:
    shell = begun()
    assert shell.listed("other", 1) == []


# Saying things twice


def test_repeated_events_ask_for_nothing_more() -> None:
    shell = begun()
    (load,) = loading(shell, 1)
    events: list[Event] = [
        Declared(config=config("m")),
        ActorUp(report=report("device-0")),
        Listed(servable="m", versions=(1,)),
        ReadManifest(servable="m", version=1).done(manifest("m", 1)),
        load.done(),
        RouterLeased(router="r", oldest_live_epoch=shell.epoch.number + 1),
        Tick(),
        RouterGone(router="r"),
    ]
    for event in events:
        shell.send(event)
        assert shell.send(event) == [], event


def test_an_answer_to_an_earlier_order_is_not_taken_for_this_one() -> None:
    """A late word of the first life must not make the second one available."""
    shell = begun()
    (first,) = loading(shell, 1)
    shell.send(first.done())
    (unload,) = of(Unload, shell.send(Declared(config=config())))
    shell.send(unload.done())
    shell.send(Declared(config=config("m")))
    (second,) = loading(shell, 1)
    assert second.number != first.number
    assert shell.send(first.done(), unload.done(), first.done(Internal("late"))) == []
    assert shell.versions() == []
    shell.send(second.done())
    assert shell.versions() == [1]


def test_a_made_up_answer_is_ignored() -> None:
    shell = begun()
    bogus = Loaded(actor="device-0", generation=1, servable="m", version=1, number=99)
    assert shell.send(bogus) == []
    assert shell.send(dataclasses.replace(bogus, actor="nobody")) == []


# Telling


def test_the_status_is_plain_json_and_tells_what_matters() -> None:
    shell = sharded()
    shell.router("router-n1")
    shell.lost("shard-3")
    status = shell.core.status()
    assert json.loads(json.dumps(status)) == status
    assert status["term"] == 1
    assert status["epoch"] == shell.epoch.number
    assert status["policy"] == "effsafe"
    assert status["routers"] == {"router-n1": shell.epoch.number - 1}
    servable = status["servables"]["m"]
    assert (servable["declared"], servable["aspired"], servable["listing"]) == (True, [1], "ok")
    (version,) = servable["versions"]
    assert (version["state"], version["step"]) == ("AVAILABLE", "AVAILABLE")
    assert version["actors"] == ["shard-0", "shard-1", "shard-2", "shard-3"]
    assert version["story"][-1].endswith("(every actor has loaded it)")
    assert status["actors"]["shard-0"]["holds"] == {"m:1": "LOADED"}
    assert status["actors"]["shard-3"]["state"] == "STARTING"
    assert status["actors"]["shard-3"]["reason"] == "killed"


def test_versions_that_are_gone_are_remembered_within_bounds() -> None:
    shell = begun()
    for version in range(1, 31):
        shell.serve("m", version)
    states = shell.states()
    assert states[30] == ("AVAILABLE", "OK")
    assert states[29] == ("END", "OK")
    assert len(states) == 1 + 16
