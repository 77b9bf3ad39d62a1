"""The controller core by example: warm-up requests are answered before a version is available."""

from __future__ import annotations

import dataclasses

from msgspec import structs

from batching.errors import Internal, Unavailable
from cluster.control import Declared, Load, Persist, Publish, ReadManifest, Tick, Unload
from cluster.declared import decode
from cluster.signals import Rehearse
from shards.manifest import BlobRef, Manifest, Warmups
from tests.cluster.control_fakes import (
    FOUR_SHARDS,
    Shell,
    begun,
    config,
    manifest,
    map_unit,
    of,
    table_unit,
)


def warmed(version: int, **units: object) -> Manifest:
    """A manifest of a version with three warm-up requests."""
    warmups = Warmups(requests=3, blob=BlobRef(digest="00", size=64))
    return structs.replace(manifest("m", version), warmups=warmups, **units)


def loaded(shell: Shell, version: int, *known: int) -> list[Rehearse]:
    """List one more version, and answer until every actor has loaded it; the replays."""
    (read,) = of(ReadManifest, shell.listed("m", *known, version))
    loads = of(Load, shell.send(read.done(warmed(version))))
    return of(Rehearse, shell.send(*(load.done() for load in loads)))


def step(shell: Shell, version: int) -> str:
    rows = shell.core.status()["servables"]["m"]["versions"]
    return str(next(row["step"] for row in rows if row["version"] == version))


def note(shell: Shell, version: int) -> str:
    rows = shell.core.status()["servables"]["m"]["versions"]
    return str(next(row["note"] for row in rows if row["version"] == version))


def test_a_version_is_available_when_its_warm_up_requests_have_been_answered() -> None:
    shell = begun()
    (rehearse,) = loaded(shell, 1)
    assert (step(shell, 1), note(shell, 1)) == ("WARMING", "answers 3 warm-up requests")
    assert shell.versions() == []
    assert shell.send(Tick()) == []
    (publish,) = of(Publish, shell.send(rehearse.done()))
    assert list(publish.epoch.servables["m"]) == [1]
    assert (step(shell, 1), note(shell, 1)) == ("AVAILABLE", "")
    story = shell.core.status()["servables"]["m"]["versions"][0]["story"]
    assert "has answered its warm-up requests" in str(story)


def test_a_replay_names_what_is_to_be_asked_and_where_it_is() -> None:
    declared = config("m", deadline_ms=500)
    servable = dataclasses.replace(declared.servables[0], warmup_s=7.0)
    shell = begun(dataclasses.replace(declared, servables=(servable,)))
    (rehearse,) = loaded(shell, 1)
    order = rehearse.order
    assert (order.store, order.timeout_s, order.served.deadline_ms) == ("/store", 7.0, 500)
    assert order.served.placement == {"trunk": (("device-0",),)}
    assert {name: each.generation for name, each in order.endpoints.items()} == {"device-0": 1}
    assert order.continuation_bytes_min == declared.cluster.continuation_bytes_min


def test_a_version_without_warm_up_requests_is_replayed_nothing() -> None:
    shell = begun()
    assert not of(Rehearse, shell.serve("m", 1))
    assert shell.versions() == [1]


def test_a_warm_up_that_fails_fails_its_version_and_nothing_else() -> None:
    shell = begun()
    shell.serve("m", 1)
    (rehearse,) = loaded(shell, 2, 1)
    effects = shell.send(rehearse.done(Internal("warm-up request 2 of 3 (score) failed: bad")))
    assert shell.versions() == [1]
    assert shell.states()[2] == ("END", "INTERNAL") or step(shell, 2) == "ERROR"
    (unload,) = of(Unload, effects)
    shell.send(unload.done())
    assert shell.states()[2] == ("END", "INTERNAL")
    rows = shell.core.status()["servables"]["m"]["versions"]
    assert rows[0]["error_message"] == "warm-up request 2 of 3 (score) failed: bad"
    assert shell.versions() == [1]
    assert not of(Rehearse, shell.sleep(300.0)), "tried again, though waiting changes nothing"


def test_a_warm_up_that_could_end_otherwise_is_tried_again_with_a_new_load() -> None:
    shell = begun()
    (rehearse,) = loaded(shell, 1)
    (unload,) = of(Unload, shell.send(rehearse.done(Unavailable("no router"))))
    shell.send(unload.done())
    reads = of(ReadManifest, shell.sleep(1.5))
    loads = of(Load, shell.send(*(read.done(warmed(1)) for read in reads)))
    (again,) = of(Rehearse, shell.send(*(load.done() for load in loads)))
    assert again.number != rehearse.number
    shell.send(again.done())
    assert shell.versions() == [1]


def test_an_answer_about_a_process_that_was_replaced_says_nothing() -> None:
    for error in (None, Internal("it was dying")):
        shell = begun()
        (rehearse,) = loaded(shell, 1)
        shell.lost("device-0")
        assert not of(Rehearse, shell.send(Tick()))
        shell.send(rehearse.done(error))
        assert step(shell, 1) == "WARMING"
        assert shell.versions() == []
        shell.sleep(2.0)
        (load,) = of(Load, shell.up("device-0", generation=2))
        (again,) = of(Rehearse, shell.send(load.done()))
        assert again.order.endpoints["device-0"].generation == 2
        shell.send(again.done())
        assert shell.versions() == [1]


def test_late_and_repeated_answers_change_nothing() -> None:
    shell = begun()
    (rehearse,) = loaded(shell, 1)
    shell.send(rehearse.done())
    epoch = shell.epoch
    assert shell.send(rehearse.done(), rehearse.done(Internal("no"))) == []
    assert shell.epoch == epoch


def test_a_replay_that_is_not_heard_of_is_asked_for_again() -> None:
    shell = begun()
    (rehearse,) = loaded(shell, 1)
    assert not of(Rehearse, shell.sleep(60.0 + 599.0))
    (again,) = of(Rehearse, shell.sleep(2.0))
    assert again.order == rehearse.order
    shell.send(rehearse.done())
    assert shell.versions() == [], "an answer to the one that was given up"
    shell.send(again.done())
    assert shell.versions() == [1]


def test_a_version_that_is_not_wanted_any_more_is_let_go_of_while_it_answers() -> None:
    shell = begun()
    (rehearse,) = loaded(shell, 1)
    (unload,) = of(Unload, shell.send(Declared(config=config())))
    shell.send(rehearse.done(), unload.done())
    assert shell.core.status()["servables"] == {}


def test_an_available_version_is_not_replayed_when_its_only_copy_comes_back() -> None:
    shell = begun()
    (rehearse,) = loaded(shell, 1)
    shell.send(rehearse.done())
    shell.effects.clear()
    shell.lost("device-0")
    shell.sleep(2.0)
    (load,) = of(Load, shell.up("device-0", generation=2))
    shell.send(load.done())
    assert not of(Rehearse, shell.effects)


def test_every_actor_must_have_loaded_its_part_before_a_replay() -> None:
    shell = begun(FOUR_SHARDS)
    (read,) = of(ReadManifest, shell.listed("m", 1))
    value = warmed(1, units={"words": table_unit("w", [8] * 4)})
    first, *others, last = of(Load, shell.send(read.done(value)))
    assert not of(Rehearse, shell.send(first.done(), *(load.done() for load in others)))
    (rehearse,) = of(Rehearse, shell.send(last.done()))
    assert set(rehearse.order.endpoints) == {f"shard-{index}" for index in range(4)}


def test_a_new_reign_replays_what_was_not_available_and_nothing_else() -> None:
    for is_available in (False, True):
        old = begun()
        (rehearse,) = loaded(old, 1)
        if is_available:
            old.send(rehearse.done())
        (*_, last) = of(Persist, old.effects)
        new = Shell(dataclasses.replace(decode(last.data), term=2, seq=0))
        new.send(Tick(), ReadManifest(servable="m", version=1).done(warmed(1)))
        new.up_holding("device-0", ("m", 1))
        new.up("shard-0")
        assert len(of(Rehearse, new.effects)) == (not is_available)
        assert new.versions() == ([1] if is_available else [])


# Copies that come later


def twice() -> Shell:
    """A shell that serves a version from two devices, with a router that uses it."""
    shell = begun(config("m", devices=2, shards=0, replicas=2))
    (rehearse,) = loaded(shell, 1)
    assert set(rehearse.order.endpoints) == {"device-0", "device-1"}
    shell.send(rehearse.done())
    shell.router()
    shell.effects.clear()
    return shell


def homes(shell: Shell) -> tuple[str, ...]:
    """The devices that the epoch names for version 1."""
    return shell.epoch.servables["m"][1].placement["trunk"][0]


def returned(shell: Shell, name: str = "device-1") -> list[Rehearse]:
    """An actor is lost, and its successor has loaded the version; the replays."""
    shell.lost(name)
    shell.sleep(2.0)
    (load,) = of(Load, shell.up(name, generation=2))
    return of(Rehearse, shell.send(load.done()))


def test_a_copy_that_comes_back_answers_warm_up_requests_before_it_is_named() -> None:
    shell = twice()
    (rehearse,) = returned(shell)
    assert homes(shell) == ("device-0",)
    assert rehearse.order.served.placement == {"trunk": (("device-1",),)}
    assert {name: each.generation for name, each in rehearse.order.endpoints.items()} == {
        "device-1": 2
    }
    assert note(shell, 1) == "answers 3 warm-up requests on device-1"
    assert shell.send(Tick()) == []
    shell.send(rehearse.done())
    assert homes(shell) == ("device-0", "device-1")
    assert (step(shell, 1), note(shell, 1)) == ("AVAILABLE", "")


def test_a_copy_that_does_not_answer_is_asked_again_and_the_version_goes_on_without_it() -> None:
    shell = twice()
    (rehearse,) = returned(shell)
    for pause_s in (1.0, 2.0, 4.0):
        assert not of(Rehearse, shell.send(rehearse.done(Internal("a warm-up failed"))))
        assert (homes(shell), step(shell, 1)) == (("device-0",), "AVAILABLE")
        assert note(shell, 1) == "device-1 does not answer warm-up requests: a warm-up failed"
        assert not of(Rehearse, shell.sleep(pause_s - 0.1))
        (rehearse,) = of(Rehearse, shell.sleep(0.2))
    shell.send(rehearse.done())
    assert homes(shell) == ("device-0", "device-1")


def test_a_cold_copy_is_named_at_once_where_no_other_is_left() -> None:
    shell = twice()
    (rehearse,) = returned(shell)
    (publish,) = of(Publish, shell.lost("device-0"))
    assert publish.epoch.servables["m"][1].placement["trunk"] == (("device-1",),)
    # It answers requests now: what the replay says of it changes nothing.
    assert shell.send(rehearse.done(Internal("no"))) == []
    assert homes(shell) == ("device-1",)


def test_an_answer_of_a_copy_that_was_replaced_meanwhile_does_not_count_for_its_successor() -> None:
    shell = twice()
    (first,) = returned(shell)
    shell.lost("device-1", generation=2)
    shell.sleep(5.0)
    (load,) = of(Load, shell.up("device-1", generation=3))
    (second,) = of(Rehearse, shell.send(load.done()))
    shell.send(first.done())
    assert homes(shell) == ("device-0",)
    shell.send(second.done())
    assert homes(shell) == ("device-0", "device-1")


def test_a_copy_of_a_part_is_asked_together_with_copies_of_the_others_that_answer() -> None:
    shell = begun(config("m", devices=2, shards=1, replicas=2))
    (read,) = of(ReadManifest, shell.listed("m", 1))
    value = warmed(1, units={"trunk": map_unit("t"), "words": table_unit("w", [8, 8])})
    loads = of(Load, shell.send(read.done(value)))
    (rehearse,) = of(Rehearse, shell.send(*(load.done() for load in loads)))
    shell.send(rehearse.done())
    (rehearse,) = returned(shell)
    assert rehearse.order.served.placement == {
        "trunk": (("device-1",),),
        "words": (("shard-0",), ("shard-0",)),
    }
    # Nobody has the words meanwhile: there is nobody to ask, and nothing is asked.
    shell.send(rehearse.done(Unavailable("shard-0 is gone")))
    shell.lost("shard-0")
    assert not of(Rehearse, shell.sleep(1.5))
    (load,) = of(Load, shell.up("shard-0", generation=2))
    (rehearse,) = of(Rehearse, shell.send(load.done()))
    shell.send(rehearse.done())
    assert homes(shell) == ("device-0", "device-1")


def test_a_version_without_warm_up_requests_names_a_copy_when_it_is_back() -> None:
    shell = begun(config("m", devices=2, shards=0, replicas=2))
    shell.serve("m", 1)
    assert not returned(shell)
    assert len(shell.epoch.servables["m"][1].placement["trunk"][0]) == 2
