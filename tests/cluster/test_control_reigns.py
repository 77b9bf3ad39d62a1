"""The controller core by example: one controller takes over from another."""

from __future__ import annotations

import dataclasses

import msgspec

from batching.errors import (
    DataLoss,
    Unavailable,
)
from cluster.control import (
    EPOCHS_PER_TERM,
    ActorUp,
    Declared,
    EnsureActor,
    Listed,
    Load,
    Persist,
    Publish,
    ReadManifest,
    Tick,
    Unload,
)
from cluster.declared import DeclaredState, decode
from tests.cluster.control_fakes import (
    FOUR_SHARDS,
    Shell,
    begun,
    config,
    loading,
    manifest,
    of,
    report,
    table_unit,
)

# Reigns


def reign(shell: Shell, **changes: object) -> Shell:
    """A new controller that found what the last one left."""
    (*_, last) = of(Persist, shell.effects)
    state = decode(last.data)
    successor = Shell(dataclasses.replace(state, term=state.term + 1, seq=0, **changes))  # type: ignore[arg-type]
    successor.now = shell.now
    return successor


def served_shards() -> tuple[Shell, list[Load]]:
    shell = begun(FOUR_SHARDS)
    shell.serve("m", 1, manifest("m", 1, words=table_unit("w", [8] * 4)))
    return shell, of(Load, shell.effects)


MODEL = manifest("m", 1, words=table_unit("w", [8] * 4))


def test_a_new_reign_adopts_what_actors_hold_and_loads_nothing() -> None:
    old, _ = served_shards()
    new = reign(old)
    effects = new.send(Tick())
    assert of(Publish, effects) == []
    assert len(of(EnsureActor, effects)) == 4
    assert of(ReadManifest, effects) == [ReadManifest(servable="m", version=1)]
    new.send(ReadManifest(servable="m", version=1).done(MODEL))
    held = [("m", 1)]
    for index in range(3):
        effects = new.send(ActorUp(report=report(f"shard-{index}", loaded=held)))
        assert of(Publish, effects) == [], "nothing is published before all is heard"
    effects = new.send(ActorUp(report=report("shard-3", loaded=held)))
    (published,) = of(Publish, effects)
    assert published.epoch.servables == old.epoch.servables
    assert published.epoch.endpoints == old.epoch.endpoints
    assert published.epoch.number > old.epoch.number
    assert published.epoch.number == 2 * EPOCHS_PER_TERM + 1
    new.listed("m", 1)
    assert not of(Load, new.effects)
    assert not of(Unload, new.effects)


def test_an_actor_that_died_between_reigns_loads_again_alone() -> None:
    old, _ = served_shards()
    new = reign(old)
    new.send(Tick(), ReadManifest(servable="m", version=1).done(MODEL))
    for index in range(4):
        loaded = [] if index == 2 else [("m", 1)]
        new.send(ActorUp(report=report(f"shard-{index}", 1 + (index == 2), loaded)))
    (load,) = of(Load, new.effects)
    assert (load.actor, load.order.term) == ("shard-2", 2)
    assert new.epoch.servables["m"][1].placement["words"][2] == ()
    new.send(load.done())
    assert new.states() == {1: ("AVAILABLE", "OK")}


def test_when_every_actor_died_between_reigns_the_version_is_unavailable_until_it_is_loaded() -> (
    None
):
    """And not unknown: what was there before must not be answered with NOT_FOUND."""
    old, _ = served_shards()
    new = reign(old)
    new.send(Tick(), Listed(servable="m", versions=(1,)))
    new.send(ReadManifest(servable="m", version=1).done(MODEL))
    new.up("shard-0", "shard-1", "shard-2", "shard-3", generation=2)
    assert new.states() == {1: ("AVAILABLE", "UNAVAILABLE")}
    assert new.epoch.servables["m"][1].placement == {"words": ((),) * 4}
    loads = of(Load, new.effects)
    assert len(loads) == 4
    new.send(*(load.done() for load in loads))
    assert new.states() == {1: ("AVAILABLE", "OK")}


def test_a_new_reign_waits_for_a_silent_actor_only_so_long() -> None:
    old, _ = served_shards()
    new = reign(old)
    new.send(Tick(), ReadManifest(servable="m", version=1).done(MODEL))
    for index in range(3):
        new.send(ActorUp(report=report(f"shard-{index}", loaded=[("m", 1)])))
    assert of(Publish, new.sleep(59.999)) == []
    (published,) = of(Publish, new.sleep(0.001))
    assert published.epoch.servables["m"][1].placement["words"][3] == ()
    # The silent one is heard at last, and still holds its part.
    effects = new.send(ActorUp(report=report("shard-3", loaded=[("m", 1)])))
    assert of(Load, effects) == []
    assert new.epoch.servables["m"][1].placement["words"][3] == ("shard-3",)


def test_an_outage_of_the_store_at_the_start_of_a_reign_publishes_nothing_less() -> None:
    old, _ = served_shards()
    new = reign(old)
    new.send(Tick())
    for index in range(4):
        new.send(ActorUp(report=report(f"shard-{index}", loaded=[("m", 1)])))
    for _ in range(100):
        new.send(ReadManifest(servable="m", version=1).failed(Unavailable("store")))
        new.sleep(1.0)
    assert of(Publish, new.effects) == []
    assert len(of(ReadManifest, new.effects)) == 101
    (published,) = of(Publish, new.send(ReadManifest(servable="m", version=1).done(MODEL)))
    assert sorted(published.epoch.servables) == ["m"]


def test_a_version_whose_manifest_is_gone_is_unloaded_behind_the_fence() -> None:
    old, _ = served_shards()
    new = reign(old)
    new.send(Tick(), ReadManifest(servable="m", version=1).failed(DataLoss("not JSON")))
    for index in range(4):
        new.send(ActorUp(report=report(f"shard-{index}", loaded=[("m", 1)])))
    assert new.versions() == []
    assert new.states() == {1: ("END", "DATA_LOSS")}
    assert of(Unload, new.sleep(19.9)) == []
    assert len(of(Unload, new.sleep(0.1))) == 4


def test_a_manifest_written_anew_under_its_number_is_not_what_actors_hold() -> None:
    old, _ = served_shards()
    new = reign(old)
    other = manifest("m", 1, words=table_unit("w", [8] * 2))
    new.send(Tick(), Listed(servable="m", versions=(1,)))
    for index in range(4):
        new.send(ActorUp(report=report(f"shard-{index}", loaded=[("m", 1)])))
    new.send(ReadManifest(servable="m", version=1).done(other))
    new.send(ReadManifest(servable="m", version=1).done(other))
    assert of(Load, new.effects) == []
    unloads = of(Unload, new.sleep(20.0))
    assert len(unloads) == 4
    loads = of(Load, new.send(*(unload.done() for unload in unloads)))
    assert [load.actor for load in loads] == ["shard-0", "shard-1"]


def test_what_nobody_remembers_is_let_go_behind_the_fence() -> None:
    shell = Shell(DeclaredState(term=5, seq=0, config=config("m")))
    shell.send(Tick(), ActorUp(report=report("device-0", loaded=[("gone", 3)])))
    assert of(Unload, shell.sleep(19.999)) == []
    (unload,) = of(Unload, shell.sleep(0.001))
    assert (unload.servable, unload.version) == ("gone", 3)


def test_a_load_of_an_earlier_reign_that_ends_late_is_noticed_and_let_go() -> None:
    shell = begun()
    shell.send(ActorUp(report=report("device-0", loaded=[("gone", 3)])))
    (unload,) = of(Unload, shell.effects)
    assert (unload.servable, unload.version) == ("gone", 3)


def test_a_version_is_forgotten_before_its_actors_let_go_of_it() -> None:
    """So that no later reign adopts what an unload order is already on its way to."""
    shell = begun()
    shell.serve("m", 1)
    effects = shell.send(Declared(config=config()))
    assert isinstance(effects[0], Persist)
    assert decode(effects[0].data).placements == ()
    assert len(of(Unload, effects)) == 1


def test_a_version_that_drained_when_the_reign_ended_goes_on_draining() -> None:
    old = begun()
    old.serve("m", 1)
    old.router()
    old.serve("m", 2)
    new = reign(old)
    new.send(Tick(), Listed(servable="m", versions=(1, 2)))
    new.send(*(ReadManifest(servable="m", version=v).done(manifest("m", v)) for v in (1, 2)))
    new.send(ActorUp(report=report("shard-0")))
    new.send(ActorUp(report=report("device-0", loaded=[("m", 1), ("m", 2)])))
    assert new.versions() == [2]
    assert new.states() == {2: ("AVAILABLE", "OK"), 1: ("UNLOADING", "OK")}
    assert of(Load, new.effects) == []
    new.router()
    assert of(Unload, new.sleep(19.999)) == [], "a router may exist that was not heard yet"
    (unload,) = of(Unload, new.router() + new.sleep(0.001))
    assert unload.version == 1


def test_numbers_of_epochs_grow_across_reigns() -> None:
    numbers: list[int] = []
    for term in (1, 2, 7):
        shell = Shell(DeclaredState(term=term, seq=0))
        shell.begin(config("m"))
        shell.serve("m", 1)
        numbers += [each.epoch.number for each in of(Publish, shell.effects)]
    assert numbers == sorted(set(numbers))


def test_an_actor_heard_too_late_is_not_believed_about_a_version_that_was_begun_anew() -> None:
    """Its version was placed elsewhere meanwhile; the parts it holds are not the ones placed."""
    old = begun(config("m", devices=2))
    old.serve("m", 1)
    new = reign(old)
    new.send(Tick(), Listed(servable="m", versions=(1,)))
    new.send(ReadManifest(servable="m", version=1).done(manifest("m", 1)))
    new.up("shard-0", "device-1")
    new.sleep(60.0)
    new.send(ReadManifest(servable="m", version=1).done(manifest("m", 1)))
    new.sleep(60.0)
    new.send(*(load.done() for load in of(Load, new.effects)))
    assert new.epoch.servables["m"][1].placement == {"trunk": (("device-1",),)}
    effects = new.send(ActorUp(report=report("device-0", loaded=[("m", 1)])))
    assert [(unload.actor, unload.version) for unload in of(Unload, effects)] == [("device-0", 1)]
    assert of(Publish, effects) == []


def test_a_report_taken_before_an_unload_does_not_make_the_next_life_available() -> None:
    shell = begun()
    shell.serve("m", 1)
    stale = ActorUp(report=report("device-0", loaded=[("m", 1)]))
    (unload,) = of(Unload, shell.send(Declared(config=config())))
    shell.send(unload.done())
    shell.send(Declared(config=config("m")))
    (load,) = loading(shell, 1)
    shell.send(stale)
    assert shell.versions() == []
    shell.send(load.done())
    assert shell.versions() == [1]


def test_an_order_of_the_last_reign_that_is_under_way_is_joined_by_the_same_order() -> None:
    """The controller died while a version loaded; another placement could meet the old order."""
    old = begun(config("m", "n", devices=2))
    (first,) = loading(old, 1)
    assert first.actor == "device-0"
    new = reign(old)
    new.send(Tick(), ReadManifest(servable="m", version=1).done(manifest("m", 1)))
    new.up("shard-0", "device-0", "device-1")
    (again,) = of(Load, new.effects)
    assert again.order == msgspec.structs.replace(first.order, term=2)


def test_a_controller_that_stood_still_hears_its_routers_before_it_unloads() -> None:
    shell = begun()
    shell.serve("m", 1)
    shell.router()
    shell.serve("m", 2)
    shell.now += 60.0
    assert of(Unload, shell.send(Tick())) == []
    (unload,) = of(Unload, shell.router())
    assert unload.version == 1
