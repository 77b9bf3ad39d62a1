"""What moves from one actor to another ends on one of the two, whatever happens meanwhile."""

from __future__ import annotations

from dataclasses import replace

from msgspec import structs

from batching.errors import Internal, InvalidArgument, Unavailable
from cluster.control import (
    ActorUp,
    Declared,
    EnsureActor,
    Load,
    ManifestRead,
    ReadManifest,
    Unload,
)
from cluster.declared import DeclaredState, Placed, decode
from cluster.fleet import Fleet
from cluster.ledger import Version
from cluster.rolling import given_up
from cluster.signals import NodesSeen, Persist, Rehearse
from cluster.supervision import Intensity
from shards.manifest import Manifest
from tests.cluster.control_fakes import Shell, config, manifest, map_unit, of, report, table_unit
from tests.cluster.control_models import WARMUPS
from tests.cluster.test_draining import NODES, actors, edit, placed, served, up

WORDS = manifest("m", 1, words=table_unit("w1", [8, 8]))
HALVES = {"shard-0": "node-a", "shard-1": "node-b"}


def moving(memory: dict[str, int] = NODES) -> tuple[Shell, Load]:
    """Two shards, of which one is moved from node-a; and the order to load its part elsewhere."""
    shell = served(HALVES, memory=memory)
    edit(shell, "node-a")
    (load,) = of(Load, up(shell, "shard-2", "node-b"))
    assert load.actor == "shard-2"
    return shell, load


def kept(shell: Shell) -> Placed:
    (found,) = decode(of(Persist, shell.effects)[-1].data).placements
    return found


def later_reign(shell: Shell, value: Manifest, holders: dict[str, tuple[str, bool]]) -> Shell:
    """The next reign, which hears these actors: node, and whether they hold the version.

    Args:
        shell: of the reign before.
        value: the version's manifest.
        holders: actor to its node and whether it holds the version.
    """
    left = decode(of(Persist, shell.effects)[-1].data)
    later = Shell(
        DeclaredState(
            term=2, seq=0, config=left.config, placements=left.placements, drained=left.drained
        )
    )
    later.send(NodesSeen(memory_bytes=NODES))
    later.listed("m", 1)
    later.send(ManifestRead(servable="m", version=1, manifest=value))
    for name, (node, holds) in holders.items():
        later.send(ActorUp(report=report(name, 1, (("m", 1),) if holds else (), node=node)))
    return later


def test_a_copy_that_is_being_made_is_taken_back_when_the_drain_is_undone() -> None:
    shell, load = moving()
    assert kept(shell).moves == {"shard-2": "shard-0"}
    _, effects = edit(shell, "node-a", undo=True)
    (unload,) = of(Unload, effects)
    assert unload.actor == "shard-2", "no epoch has named it, so nobody is waited for"
    shell.send(load.done(), unload.done())
    assert placed(shell) == [{"shard-0"}, {"shard-1"}]
    assert (kept(shell).moves, kept(shell).idle) == ({}, ())
    # The actor that was started for it ends, and the first one counts again.
    shell.lost("shard-2")
    assert actors(shell) == {"shard-0", "shard-1"}
    assert of(Load, shell.sleep(60.0)) == []


def test_what_has_moved_stays_where_it_is_when_the_drain_is_undone() -> None:
    shell, load = moving()
    shell.router(epoch=shell.epoch.number)
    shell.send(load.done())  # now it is named alone, and a request may ask the other still
    edit(shell, "node-a", undo=True)
    assert placed(shell) == [{"shard-2"}, {"shard-1"}]
    effects = shell.router() + shell.sleep(30.0)
    assert [unload.actor for unload in of(Unload, effects)] == ["shard-0"]
    assert of(Load, effects) == [], "it does not come back"
    shell.carry_out(effects)
    shell.lost("shard-0")
    assert actors(shell) == {"shard-1", "shard-2"}
    assert kept(shell).units == {"words": (("shard-2",), ("shard-1",))}


def test_a_part_that_an_actor_cannot_load_moves_to_another() -> None:
    shell = served({"shard-0": "node-a", "shard-1": "node-b"}, memory={**NODES, "node-c": 0})
    shell.send(Declared(config=config("m", devices=0, shards=3)))
    up(shell, "shard-2", "node-c")
    (load,) = of(Load, edit(shell, "node-a")[1])
    assert of(Load, up(shell, "shard-3", "node-b")) == []
    (again,) = of(Load, shell.send(load.done(InvalidArgument("not here"))))
    assert (load.actor, again.actor) == ("shard-2", "shard-3")
    shell.carry_out(shell.send(again.done()))
    assert placed(shell) == [{"shard-3"}, {"shard-1"}]
    assert kept(shell).moves == {}


def test_a_part_that_nobody_else_can_load_stays_and_says_why() -> None:
    shell, load = moving()
    shell.send(load.done(InvalidArgument("not here")))
    (version,) = shell.core.status()["servables"]["m"]["versions"]
    text = "cannot leave shard-0 yet: shard-2 cannot load it: INVALID_ARGUMENT: not here"
    assert version["note"] == text
    assert of(Load, shell.sleep(60.0)) == []
    assert placed(shell) == [{"shard-0"}, {"shard-1"}]
    # What may end otherwise is tried again.
    shell, load = moving()
    shell.send(load.done(Unavailable("away")))
    (again,) = of(Load, shell.sleep(60.0))
    shell.send(again.done())
    assert placed(shell) == [{"shard-2"}, {"shard-1"}]


def test_a_failing_move_keeps_no_other_back() -> None:
    shell = Shell()
    shell.send(Declared(config=config("m", "n", devices=1, shards=1)))
    shell.send(NodesSeen(memory_bytes=NODES))
    up(shell, "shard-0", "node-a")
    up(shell, "device-0", "node-a")
    shell.serve("m", 1, manifest("m", 1, words=table_unit("w1", [8])))
    shell.serve("n", 1, manifest("n", 1, trunk=map_unit("t")))
    edit(shell, "node-a")
    (load,) = of(Load, up(shell, "shard-1", "node-b"))
    assert of(Load, up(shell, "device-1", "node-b")) == [], "one at a time"
    (other,) = of(Load, shell.send(load.done(InvalidArgument("not here"))))
    assert (other.actor, other.order.servable) == ("device-1", "n")


def test_the_node_of_a_newcomer_that_is_drained_or_lost_is_left_out() -> None:
    shell, load = moving({**NODES, "node-c": 0})
    effects = edit(shell, "node-b")[1]
    assert [unload.actor for unload in of(Unload, effects)] == ["shard-2"]
    shell.send(load.done(), *(unload.done() for unload in of(Unload, effects)))
    for each in of(EnsureActor, shell.effects):
        if each.name not in HALVES and each.name != "shard-2":
            shell.carry_out(up(shell, each.name, "node-c"))
    shell.router()
    shell.carry_out(shell.sleep(60.0))
    (one,), (two,) = placed(shell)
    assert not {one, two} & {"shard-0", "shard-1", "shard-2"}
    assert kept(shell).moves == {}


def test_the_first_of_two_that_has_it_answers_when_the_drained_node_is_lost() -> None:
    shell, load = moving()
    shell.lost("shard-0")
    shell.send(NodesSeen(memory_bytes={"node-b": 0}))
    assert placed(shell) == [set(), {"shard-1"}]
    shell.carry_out(shell.send(load.done()) + shell.sleep(60.0))
    assert placed(shell) == [{"shard-2"}, {"shard-1"}]
    assert kept(shell).units == {"words": (("shard-2",), ("shard-1",))}
    shell, load = moving()
    shell.lost("shard-0")
    shell.sleep(60.0)  # it may be started again meanwhile, on the other node
    (own,) = of(Load, shell.send(ActorUp(report=report("shard-0", 2, node="node-b"))))
    effects = shell.send(own.done())
    assert placed(shell) == [{"shard-0"}, {"shard-1"}]
    assert [unload.actor for unload in of(Unload, effects)] == ["shard-2"]


def test_a_later_reign_takes_back_a_copy_of_a_drain_that_was_undone() -> None:
    shell, _ = moving()
    edit(shell, "node-a", undo=True)  # and the controller dies with that
    holders = {"shard-0": ("node-a", True), "shard-1": ("node-b", True)}
    later = later_reign(shell, WORDS, {**holders, "shard-2": ("node-b", True)})
    assert placed(later) == [{"shard-0"}, {"shard-1"}]
    (unload,) = of(Unload, later.sleep(60.0))
    assert unload.actor == "shard-2"
    later.send(unload.done())
    assert kept(later).units == {"words": (("shard-0",), ("shard-1",))}
    assert of(Load, later.effects) == []


def test_a_later_reign_ends_a_move_whose_old_actor_nobody_names_any_more() -> None:
    shell, load = moving()
    shell.router(epoch=shell.epoch.number)
    shell.send(load.done())
    holders = {name: ("node-b", True) for name in ("shard-1", "shard-2")}
    later = later_reign(shell, WORDS, {"shard-0": ("node-a", True), **holders})
    # A router that the last reign told of shard-0 has not heard of this one yet.
    later.router(epoch=shell.epoch.number - 1)
    for _ in range(20):
        later.router(epoch=shell.epoch.number - 1)
        assert of(Unload, later.sleep(1.0)) == []
    assert placed(later) == [{"shard-2"}, {"shard-1"}]
    (unload,) = of(Unload, later.router() + later.sleep(30.0))
    assert unload.actor == "shard-0"
    later.send(unload.done())
    assert kept(later).units == {"words": (("shard-2",), ("shard-1",))}


def test_more_copies_that_are_declared_later_are_no_business_of_a_drain() -> None:
    shell = served(HALVES)
    declared = config("m", devices=0, shards=2)
    servables = tuple(replace(each, table_replicas=2) for each in declared.servables)
    shell.send(Declared(config=replace(declared, servables=servables)))
    edit(shell, "node-a")
    (load,) = of(Load, up(shell, "shard-2", "node-b"))
    shell.carry_out(shell.send(load.done()) + shell.router() + shell.sleep(30.0))
    assert placed(shell) == [{"shard-2"}, {"shard-1"}]


def test_a_version_that_serves_on_as_the_newest_has_failed_moves() -> None:
    shell = served(HALVES)
    (read,) = of(ReadManifest, shell.listed("m", 1, 2))
    loads = of(Load, shell.send(read.done(manifest("m", 2, words=table_unit("w2", [8, 8])))))
    shell.carry_out(shell.send(loads[0].done(InvalidArgument("shapes do not fit"))))
    assert shell.versions() == [1]
    edit(shell, "node-a")
    (load,) = of(Load, up(shell, "shard-2", "node-b"))
    assert (load.actor, load.order.version) == ("shard-2", 1)


def test_a_copy_that_was_never_named_is_let_go_without_another_epoch() -> None:
    shell = Shell()
    shell.send(Declared(config=config("m", devices=1, shards=0)), NodesSeen(memory_bytes=NODES))
    up(shell, "device-0", "node-a")
    value = structs.replace(manifest("m", 1, trunk=map_unit("t")), warmups=WARMUPS)
    (replay,) = of(Rehearse, shell.serve("m", 1, value))
    shell.send(replay.done())
    edit(shell, "node-a")
    (load,) = of(Load, up(shell, "device-1", "node-b"))
    (replay,) = of(Rehearse, shell.send(load.done()))
    shell.router()
    shell.send(replay.done(Internal("warm-up request 1 of 3 failed")))
    before = shell.epoch.number
    effects = edit(shell, "node-a", undo=True)[1] + shell.router()
    assert shell.epoch.number == before
    assert [unload.actor for unload in of(Unload, effects)] == ["device-1"]


def test_a_version_that_gives_way_does_not_count_what_it_has_moved_away_from() -> None:
    """Else its successor would be placed where it can never give way: nobody would be left."""
    version = Version(("m", 1))
    version.place_on({"words": (("shard-0", "shard-1", "shard-2"), ("shard-3", "shard-4"))})
    version.moves = {"shard-2": "shard-1"}
    assert version.parts[0] == ("shard-0", "shard-1", "shard-2"), "that is still open"
    for gone, left in (("shard-1", "shard-2"), ("shard-2", "shard-1")):
        version.rest({gone: 7})
        assert version.moved_away == {gone}
        assert version.parts == (("shard-0", left), ("shard-3", "shard-4"))
    assert given_up(version.parts) == {"shard-0", "shard-3"}
    assert version.may_come_back(Fleet(Intensity(), 1.0)) == frozenset()
