"""Nodes that are drained: what is there moves while it is served, and nothing is left."""

from __future__ import annotations

import pickle
from collections.abc import Mapping

import pytest

from batching.errors import FailedPrecondition
from cluster.config import Config
from cluster.control import (
    ActorUp,
    ControlSettings,
    Declared,
    Effect,
    EnsureActor,
    ListStore,
    Load,
    ManifestRead,
    StopActor,
    Unload,
)
from cluster.declared import DeclaredState, decode
from cluster.draining import NoRoomElsewhere
from cluster.editing import take_edit
from cluster.edits import DrainNode, Edited, decode_edited, encode_edit
from cluster.settling import undrained
from cluster.signals import NodesSeen, Persist
from tests.cluster.control_fakes import Shell, config, manifest, map_unit, of, report, table_unit

NODES = {"node-a": 0, "node-b": 0}


def edit(shell: Shell, node: str, *, undo: bool = False) -> tuple[Edited, list[Effect]]:
    """Drain a node, as the controller is told to."""
    found: list[Effect] = []
    answer = take_edit(
        shell.core,
        encode_edit(DrainNode(node=node, undo=undo)),
        lambda event: found.extend(shell.send(event)),
    )
    return decode_edited(answer), found


def up(shell: Shell, name: str, node: str, capacity: int = 0) -> list[Effect]:
    return shell.send(ActorUp(report=report(name, node=node, capacity=capacity)))


def served(
    nodes: Mapping[str, str], *, memory: Mapping[str, int] = NODES, declared: Config | None = None
) -> Shell:
    """A table with a partition for each of these shard actors."""
    shell = Shell()
    shell.send(Declared(config=declared or config("m", devices=0, shards=len(nodes))))
    shell.send(NodesSeen(memory_bytes=memory))
    for name, node in nodes.items():
        up(shell, name, node)
    shell.serve("m", 1, manifest("m", 1, words=table_unit("w1", [8] * len(nodes))))
    assert shell.versions() == [1]
    return shell


def placed(shell: Shell) -> list[set[str]]:
    return [set(part) for part in shell.epoch.servables["m"][1].placement["words"]]


def actors(shell: Shell) -> set[str]:
    return set(shell.core.status()["actors"])


def test_what_a_node_holds_is_served_twice_and_then_elsewhere_alone() -> None:
    shell = served({"shard-0": "node-a", "shard-1": "node-b"})
    edited, effects = edit(shell, "node-a")
    assert edited.changes == ("nodes.node-a: serving -> drained",)
    assert of(EnsureActor, effects) == [EnsureActor(name="shard-2", kind="shard")]
    assert of(Load, effects) == []
    assert undrained(shell.core.status(), "node-a") == (
        "shard-0 there; m:1 cannot leave shard-0 yet: waits for shard-2"
    )
    effects = up(shell, "shard-2", "node-b")
    (load,) = of(Load, effects)
    assert (load.actor, load.order.units[0].partitions) == ("shard-2", (0,))
    assert placed(shell) == [{"shard-0"}, {"shard-1"}]
    shell.router(epoch=shell.epoch.number)
    before = shell.epoch.number
    effects = shell.send(load.done())
    # One epoch later it answers alone; who took the one before may ask the old one still.
    assert placed(shell) == [{"shard-2"}, {"shard-1"}]
    assert of(Unload, effects) == []
    assert shell.core.status()["nodes"]["node-a"]["state"] == "draining"
    (unload,) = of(Unload, shell.router() + shell.sleep(1.0))
    assert shell.epoch.number > before
    assert unload.actor == "shard-0"
    (stop,) = of(StopActor, shell.send(unload.done()))
    assert stop.name == "shard-0"
    shell.lost("shard-0")
    assert actors(shell) == {"shard-1", "shard-2"}
    assert shell.core.status()["nodes"]["node-a"] == {"state": "drained", "actors": []}
    assert undrained(shell.core.status(), "node-a") == ""
    assert {type(effect) for effect in shell.sleep(600.0)} == {ListStore}


def test_one_copy_is_under_way_at_a_time() -> None:
    shell = served({"shard-0": "node-a", "shard-1": "node-a", "shard-2": "node-b"})
    edit(shell, "node-a")
    effects = up(shell, "shard-3", "node-b") + up(shell, "shard-4", "node-b")
    (load,) = of(Load, effects)
    effects = shell.send(load.done())
    (second,) = of(Load, effects)
    assert {load.actor, second.actor} == {"shard-3", "shard-4"}
    shell.carry_out(shell.send(second.done()))
    shell.router()
    shell.carry_out(shell.sleep(30.0))
    assert all(part <= {"shard-2", "shard-3", "shard-4"} for part in placed(shell))


def test_a_new_version_goes_nowhere_near_a_drained_node() -> None:
    shell = served({"shard-0": "node-a", "shard-1": "node-b"})
    edit(shell, "node-a")
    shell.carry_out(up(shell, "shard-2", "node-b"))
    shell.serve("m", 2, manifest("m", 2, words=table_unit("w2", [8, 8])))
    found = shell.epoch.servables["m"][2].placement["words"]
    assert {actor for part in found for actor in part} == {"shard-1", "shard-2"}


def test_units_of_devices_and_hosts_move_as_well() -> None:
    shell = Shell()
    shell.send(Declared(config=config("m", devices=1, shards=0)), NodesSeen(memory_bytes=NODES))
    up(shell, "device-0", "node-a")
    shell.serve("m", 1, manifest("m", 1, trunk=map_unit("t")))
    edit(shell, "node-a")
    shell.carry_out(up(shell, "device-1", "node-b"))
    assert shell.epoch.servables["m"][1].placement["trunk"] == (("device-1",),)


def test_of_two_copies_the_one_that_stays_is_not_enough() -> None:
    declared = config("m", devices=2, shards=0, replicas=2)
    shell = Shell()
    shell.send(Declared(config=declared), NodesSeen(memory_bytes=NODES))
    up(shell, "device-0", "node-a")
    up(shell, "device-1", "node-b")
    shell.serve("m", 1, manifest("m", 1, trunk=map_unit("t")))
    edit(shell, "node-a")
    (load,) = of(Load, up(shell, "device-2", "node-b"))
    assert set(shell.epoch.servables["m"][1].placement["trunk"][0]) == {"device-0", "device-1"}
    shell.send(load.done())
    assert set(shell.epoch.servables["m"][1].placement["trunk"][0]) == {"device-1", "device-2"}


def test_without_room_elsewhere_it_stays_where_it_is_and_says_so() -> None:
    shell = served({"shard-0": "node-a", "shard-1": "node-b"})
    edit(shell, "node-a")
    assert of(Load, up(shell, "shard-2", "node-b", capacity=4)) == []
    (version,) = shell.core.status()["servables"]["m"]["versions"]
    assert version["note"] == "cannot leave shard-0 yet: no other has room for it"
    waits = undrained(shell.core.status(), "node-a")
    assert waits == "shard-0 there; m:1 cannot leave shard-0 yet: no other has room for it"
    assert placed(shell) == [{"shard-0"}, {"shard-1"}]
    edit(shell, "node-a", undo=True)
    (version,) = shell.core.status()["servables"]["m"]["versions"]
    assert version["note"] == "", "it need not leave any more"


def test_a_drain_that_is_undone_leaves_what_has_not_moved() -> None:
    shell = served({"shard-0": "node-a", "shard-1": "node-b"})
    edit(shell, "node-a")
    edited, _ = edit(shell, "node-a", undo=True)
    assert edited.changes == ("nodes.node-a: drained -> serving",)
    assert shell.core.status()["nodes"]["node-a"]["state"] == "serving"
    shell.sleep(60.0)
    assert placed(shell) == [{"shard-0"}, {"shard-1"}]
    assert edit(shell, "node-a", undo=True)[0].code == "NOT_FOUND"
    with pytest.raises(FailedPrecondition, match="node-a is not drained any more"):
        undrained(shell.core.status(), "node-a")


def test_a_later_reign_goes_on_with_a_drain() -> None:
    shell = served({"shard-0": "node-a", "shard-1": "node-b"})
    edit(shell, "node-a")
    up(shell, "shard-2", "node-b")  # it has been told to load, and that is remembered
    kept = decode(of(Persist, shell.effects)[-1].data)
    assert kept.drained == ("node-a",)
    later = Shell(
        DeclaredState(
            term=2, seq=0, config=kept.config, placements=kept.placements, drained=kept.drained
        )
    )
    later.send(NodesSeen(memory_bytes=NODES))
    waits = undrained(later.core.status(), "node-a")
    assert waits == "a new controller is still to hear who is there"
    value = manifest("m", 1, words=table_unit("w1", [8, 8]))
    later.listed("m", 1)
    later.send(ManifestRead(servable="m", version=1, manifest=value))
    for name, node in (("shard-0", "node-a"), ("shard-1", "node-b"), ("shard-2", "node-b")):
        held = () if name == "shard-2" else (("m", 1),)
        later.send(ActorUp(report=report(name, 1, held, node=node)))
    later.carry_out(of(Load, later.effects))
    later.router()
    later.carry_out(later.sleep(30.0))
    assert placed(later) == [{"shard-2"}, {"shard-1"}]
    assert [load.actor for load in of(Load, later.effects)] == ["shard-2"]


def test_nodes_are_named_by_the_beginning_of_their_ids() -> None:
    shell = served({"shard-0": "node-a", "shard-1": "node-b"})
    for node, code in (
        ("node-c", "NOT_FOUND"), ("node", "INVALID_ARGUMENT"), ("nod", "NOT_FOUND"),
    ):  # fmt: skip
        assert edit(shell, node)[0].code == code
    alone = served({"shard-0": "node-a"}, memory={"node-a": 0})
    assert edit(alone, "node-a")[0].code == "FAILED_PRECONDITION"
    assert edit(shell, "node-a")[0].code == "OK"
    assert edit(shell, "node-a")[0].changes == ()
    assert edit(shell, "node-b")[0].code == "FAILED_PRECONDITION"


def test_memory_that_is_short_on_the_other_nodes_refuses_a_drain() -> None:
    nodes = {"shard-0": "node-a", "shard-1": "node-b"}
    shell = served(nodes, memory={"node-a": 100, "node-b": 15})
    edited, effects = edit(shell, "node-a")
    assert (edited.code, effects) == ("RESOURCE_EXHAUSTED", [])
    assert "what shard-0 holds has no room on another node, 1 bytes are short" in edited.message
    assert edit(served(nodes, memory={"node-a": 100, "node-b": 16}), "node-a")[0].code == "OK"
    # What is on a node that is drained already goes to the same others.
    memory = {"node-a": 99, "node-b": 99, "node-c": 23}
    shell = served({**nodes, "shard-2": "node-c"}, memory=memory)
    assert edit(shell, "node-a")[0].code == "OK"
    assert "1 bytes are short where most is free" in edit(shell, "node-b")[0].message
    error = NoRoomElsewhere("n", "shard-0", 7)
    again = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert (str(again), again.short_bytes) == (str(error), 7)


def accelerated(capacity: int = 0, replicas: int = 1) -> Shell:
    """A servable on an accelerator of node-a (or of both nodes); there is one on each."""
    shell = Shell(settings=ControlSettings(accelerators=2))
    declared = config("m", devices=0, shards=0, replicas=replicas)
    seen = NodesSeen(memory_bytes=NODES, accelerators=dict.fromkeys(NODES, 1))
    shell.send(Declared(config=declared), seen)
    up(shell, "device-0", "node-a")
    up(shell, "device-1", "node-b", capacity)
    shell.serve("m", 1, manifest("m", 1, trunk=map_unit("t")))
    return shell


def test_what_is_on_an_accelerator_moves_to_another_that_has_room() -> None:
    shell = accelerated()
    edited, effects = edit(shell, "node-a")
    assert edited.code == "OK"
    (load,) = of(Load, effects)
    assert load.actor == "device-1"
    assert of(EnsureActor, effects) == [], "there is one actor for each accelerator, and no other"
    (unload,) = of(Unload, shell.send(load.done()))
    assert of(StopActor, shell.send(unload.done())) == [StopActor(name="device-0", generation=1)]
    shell.lost("device-0")
    assert actors(shell) == {"device-1"}
    # A controller that comes later knows as many.
    kept = decode(of(Persist, shell.effects)[-1].data)
    later = Shell(
        DeclaredState(
            term=2, seq=0, config=kept.config, placements=kept.placements, drained=kept.drained
        ),
        settings=ControlSettings(accelerators=2),
    )
    later.send(NodesSeen(memory_bytes=NODES, accelerators=dict.fromkeys(NODES, 1)))
    assert later.core._world.fleet.declared == {"device-1"}
    effects = edit(shell, "node-a", undo=True)[1]
    assert of(EnsureActor, effects) == [EnsureActor(name="device-0", kind="device")]


def test_accelerators_that_have_no_room_or_have_a_copy_already_refuse_a_drain() -> None:
    edited, effects = edit(accelerated(replicas=2), "node-a")
    assert (edited.code, effects) == ("FAILED_PRECONDITION", [])
    assert edited.message == (
        "node node-a cannot be drained: m:1 is on 1 of its accelerators, and 0 elsewhere have "
        "nothing of it yet"
    )
    needed = map_unit("t").params[0].blob.size
    shell = accelerated(needed - 1)
    assert shell.epoch.servables["m"][1].placement["trunk"] == (("device-0",),)
    edited, effects = edit(shell, "node-a")
    assert (edited.code, effects) == ("RESOURCE_EXHAUSTED", [])
    assert "bytes are short" in edited.message


def test_where_all_other_nodes_are_gone_a_drained_one_is_better_than_none() -> None:
    shell = served({"shard-0": "node-a", "shard-1": "node-b"})
    edit(shell, "node-a")
    up(shell, "shard-2", "node-b")
    shell.send(NodesSeen(memory_bytes={"node-a": 0}))
    effects = shell.lost("shard-1") + shell.lost("shard-2") + shell.sleep(60.0)
    assert shell.core.drained == {"node-a"}, "it is remembered"
    # What was to move stays, what was lost is started there, and no actor is ended for its node.
    assert {effect.name for effect in of(EnsureActor, effects)} >= {"shard-1"}
    shell.carry_out(shell.send(ActorUp(report=report("shard-1", 2, node="node-a"))))
    assert placed(shell) == [{"shard-0"}, {"shard-1"}]
    assert of(StopActor, shell.effects) == []
    assert of(EnsureActor, shell.sleep(60.0)) == []
    # With another node the drain goes on.
    effects = shell.send(NodesSeen(memory_bytes=NODES))
    assert {effect.name for effect in of(EnsureActor, effects)} == {"shard-2", "shard-3"}


def test_a_node_that_is_gone_is_drained_no_longer() -> None:
    shell = served({"shard-0": "node-a", "shard-1": "node-b"})
    edit(shell, "node-a")
    shell.send(NodesSeen(memory_bytes={"node-b": 0}))
    assert shell.core.drained == frozenset()
