"""Shard-rolling: versions that do not fit beside each other change places, and one answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from batching.errors import InvalidArgument, ResourceExhausted
from cluster.config import Config, VersionPolicy, parse
from cluster.control import (
    ActorUp,
    ControlSettings,
    Declared,
    Effect,
    Load,
    Persist,
    Publish,
    ReadManifest,
    Unload,
)
from cluster.declared import decode
from cluster.lifecycle import State
from cluster.packing import Strategy
from cluster.placement import place
from cluster.rolling import given_up, kept_copies, place_rolling
from cluster.signals import Listed
from cluster.sites import Site
from cluster.versions import (
    Action,
    ActionKind,
    VersionSnapshot,
    availability_preserving,
    resource_preserving,
    shard_rolling,
)
from shards.manifest import Manifest
from tests.cluster.control_fakes import Shell, config, manifest, map_unit, of, report, table_unit

A, D, L, N, E = State.AVAILABLE, State.DRAINING, State.LOADING, State.NEW, State.END
PAIR = (("d0", "d1"),)


def old(
    idle: str = "", live: str = "d0 d1", back: str = "", *, held: bool = False
) -> VersionSnapshot:
    """Version 1, which answers and is not aspired."""
    return VersionSnapshot(
        version=1, state=A, aspired=False, ready=True, held=held, parts=PAIR,
        idle=frozenset(idle.split()), live=frozenset(live.split()), back=frozenset(back.split()),
    )  # fmt: skip


def new(
    state: State | None = L,
    idle: str = "d1",
    live: str = "",
    back: str = "",
    *,
    ready: bool = False,
) -> VersionSnapshot:
    """Version 2, which is aspired."""
    return VersionSnapshot(
        version=2, state=state, aspired=True, ready=ready, parts=PAIR,
        idle=frozenset(idle.split()), live=frozenset(live.split()), back=frozenset(back.split()),
    )  # fmt: skip


TABLE: list[tuple[str, list[VersionSnapshot], tuple[str, int, str] | None]] = [
    ("nothing is known", [], None),
    ("the new one begins beside the old", [old(), new(None)], ("load", 2, "")),
    ("nothing is given up before it is placed", [old(), new(N, idle="")], None),
    ("then an actor is given up for it", [old(), new()], ("give up", 1, "d0")),
    ("also while a label is on the old one", [old(held=True), new()], ("give up", 1, "d0")),
    ("then it is waited for", [old(idle="d0"), new()], None),
    ("the last copy that answers is not given up", [old(live="d0"), new()], None),
    ("one that does not answer is", [old(live="d1"), new()], ("give up", 1, "d0")),
    ("the old one goes when the new one answers",
     [old(idle="d0"), new(A, live="d0", ready=True)], ("drain", 1, "")),
    ("not while a label is on it",
     [old(idle="d0", held=True), new(A, live="d0", ready=True)], None),
    ("the new one is told of the rest of its actors",
     [old(idle="d0"), new(A, live="d0", back="d1", ready=True)], ("spread", 2, "")),
    ("what was given up comes back when the new one fails",
     [old(idle="d0", back="d0"), new(E, idle="")], ("spread", 1, "")),
    ("not before the actor has let go of it", [old(idle="d0"), new(E, idle="")], None),
    ("nor while another try is under way", [old(idle="d0", back="d0"), new()], None),
    ("with nothing to come, what serves stays", [old()], None),
]  # fmt: skip


@pytest.mark.parametrize(("sentence", "rows", "expected"), TABLE, ids=[row[0] for row in TABLE])
def test_the_policy(
    sentence: str, rows: list[VersionSnapshot], expected: tuple[str, int, str] | None
) -> None:
    action = shard_rolling(rows)
    if expected is None:
        assert action is None
    else:
        kind, version, actor = expected
        assert action == Action(kind=ActionKind(kind), version=version, actor=actor)


@pytest.mark.parametrize("transition", [availability_preserving, resource_preserving])
def test_what_was_placed_where_others_give_way_begins_anew_where_they_no_longer_do(
    transition: Callable[..., Action | None],
) -> None:
    cancel = Action(kind=ActionKind.CANCEL, version=2)
    assert transition([old(idle="d0"), new()]) == cancel
    assert transition([old(), new()]) == cancel
    # What was given up for it comes back; what is available has others leave first.
    spread = Action(kind=ActionKind.SPREAD, version=1)
    assert transition([old(idle="d0", back="d0"), new(State.UNLOADING)]) == spread
    drain = Action(kind=ActionKind.DRAIN, version=1)
    assert transition([old(idle="d0"), new(A, live="d0", ready=True)]) == drain


def test_one_actor_at_a_time() -> None:
    """Version 1 has two copies over four actors; version 2 comes to the first two."""
    parts = (("s0", "s2"), ("s1", "s3"))
    first = dataclasses.replace(old(), parts=parts, live=frozenset({"s0", "s1", "s2", "s3"}))
    second = dataclasses.replace(new(), parts=parts, idle=frozenset({"s2", "s3"}))
    given = Action(kind=ActionKind.GIVE_UP, version=1, actor="s0")
    assert shard_rolling([first, second]) == given
    first = dataclasses.replace(first, idle=frozenset({"s0"}))
    assert shard_rolling([first, second]) is None
    second = dataclasses.replace(second, live=frozenset({"s0"}))
    assert shard_rolling([first, second]) == dataclasses.replace(given, actor="s1")


parts = st.lists(
    st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4, unique=True), max_size=6
)


@given(parts)
def test_every_part_keeps_copies_elsewhere_and_gives_up_what_it_can(found: list[list[str]]) -> None:
    given = given_up(found)
    left = [[each for each in part if each not in given] for part in found]
    both = list(zip(left, found, strict=True))
    assert all(len(rest) >= kept_copies(len(part)) for rest, part in both)
    for actor in {each for part in left for each in part}:
        # No other could be given up as well.
        assert any(actor in rest and len(rest) == kept_copies(len(part)) for rest, part in both)


# Placement


def sites(
    kind: str, count: int, capacity: int, pieces: Mapping[str, Mapping[tuple[str, int], int]]
) -> list[Site]:
    return [
        Site(name=f"{kind}-{i}", kind=kind, node=f"n{i % 2}", capacity_bytes=capacity,  # type: ignore[arg-type]
             pieces=pieces.get(f"{kind}-{i}", {}))
        for i in range(count)
    ]  # fmt: skip


def table(version: int) -> Manifest:
    return manifest("m", version, words=table_unit(f"w{version}", [8, 8, 8, 8]))


def test_copies_of_a_table_are_on_actors_and_nodes_of_their_own() -> None:
    placed = place(table(1), sites("shard", 4, 16, {}), table_replicas=2)
    for part in placed.units["words"]:
        assert len({int(actor[-1]) % 2 for actor in part}) == 2
    assert given_up(placed.units["words"]) == {"shard-0", "shard-1"}
    with pytest.raises(ResourceExhausted, match="its partitions need 6 shard actors, 4 are up"):
        place(table(1), sites("shard", 4, 16, {}), table_replicas=3, shards=2)


def test_a_version_goes_where_the_old_one_gives_way_first_and_then_to_the_rest() -> None:
    placed = place(table(1), sites("shard", 4, 16, {}), table_replicas=2)
    full, empty = sites("shard", 4, 16, placed.pieces), sites("shard", 4, 16, {})
    with pytest.raises(ResourceExhausted, match="short"):
        place(table(2), full, table_replicas=2)
    parts = placed.units["words"]
    found, later = place_rolling(
        table(2), parts, full, empty, replicas=1, table_replicas=2, shards=None
    )
    assert later == {"shard-2", "shard-3"}
    assert all(part[0] in given_up(parts) and part[1] in later for part in found.units["words"])
    # A part that has one copy cannot give way.
    one = place(table(1), sites("shard", 2, 16, {}))
    with pytest.raises(ResourceExhausted, match="short"):
        place_rolling(
            table(2), one.units["words"], sites("shard", 2, 16, one.pieces),
            sites("shard", 2, 16, {}), replicas=1, table_replicas=1, shards=None,
        )  # fmt: skip


def test_one_copy_cannot_be_declared_to_roll() -> None:
    text = "store: s\nservables: [{name: m, transition: shard-rolling, %s}]"
    with pytest.raises(InvalidArgument, match=r"servables\[0\].transition: .*set replicas, or"):
        parse(text % "replicas: 1")
    assert parse(text % "replicas: 2").servables[0].table_replicas == 1
    assert parse(text % "table_replicas: 2").servables[0].replicas == 1


# Stories


def declared(*versions: int) -> Config:
    policy = VersionPolicy(specific=versions) if versions else VersionPolicy(latest=1)
    found = config("m", policy=policy, devices=2, shards=0, replicas=2)
    rolling = dataclasses.replace(found.servables[0], transition="shard-rolling")
    return dataclasses.replace(found, servables=(rolling,))


def trunk(version: int) -> Manifest:
    return manifest("m", version, trunk=map_unit(f"trunk-{version}", 16))


def ups(shell: Shell, held: Iterable[tuple[str, int]] = (), generation: int = 1) -> list[Effect]:
    """Both devices report; neither has room for two versions."""
    return shell.send(
        *(
            ActorUp(report=report(f"device-{i}", generation, held, f"n{i}", capacity=16))
            for i in range(2)
        )
    )


def serving() -> Shell:
    """A shell that serves version 1 from both devices, with a router that uses it."""
    shell = Shell(settings=ControlSettings())
    shell.send(Declared(config=declared()))
    ups(shell)
    shell.serve("m", 1, trunk(1))
    shell.router()
    assert homes(shell) == {1: ("device-0", "device-1")}
    shell.effects.clear()
    return shell


def homes(shell: Shell) -> dict[int, tuple[str, ...]]:
    """Version to the devices that an epoch names for it."""
    return {
        number: version.placement["trunk"][0]
        for number, version in shell.epoch.servables.get("m", {}).items()
    }


def come(shell: Shell, version: int = 2) -> list[Effect]:
    """Version 2 is saved; the old one gives up a device for it."""
    (read,) = of(ReadManifest, shell.listed("m", 1, version))
    return shell.send(read.done(trunk(version)))


def moved(shell: Shell) -> Load:
    """Version 2 has come as far as its first load."""
    come(shell)
    (unload,) = of(Unload, shell.router())
    (load,) = of(Load, shell.send(unload.done()))
    return load


def test_the_whole_change_one_epoch_a_step() -> None:
    shell = serving()
    effects = come(shell)
    # No router can be told to ask device-0 for version 1 any more; it is unloaded when none does.
    assert homes(shell) == {1: ("device-1",)}
    assert not of(Load, effects)
    assert not of(Unload, effects)
    (unload,) = of(Unload, shell.router())
    assert (unload.actor, unload.version) == ("device-0", 1)
    (load,) = of(Load, shell.send(unload.done()))
    assert (load.actor, load.order.version) == ("device-0", 2)
    # One epoch has the new version instead of the old one.
    (_,) = of(Publish, shell.send(load.done()))
    assert homes(shell) == {2: ("device-0",)}
    (unload,) = of(Unload, shell.router())
    assert (unload.actor, unload.version) == ("device-1", 1)
    (load,) = of(Load, shell.send(unload.done()))
    assert (load.actor, load.order.version) == ("device-1", 2)
    shell.send(load.done())
    assert homes(shell) == {2: ("device-0", "device-1")}
    assert all(each.epoch.servables["m"] for each in of(Publish, shell.effects))


def test_a_load_that_fails_gives_the_old_version_its_actor_back() -> None:
    shell = serving()
    load = moved(shell)
    (load,) = of(Load, shell.send(load.done(InvalidArgument("shapes"))))
    assert (load.actor, load.order.version) == ("device-0", 1)
    shell.send(load.done())
    assert homes(shell) == {1: ("device-0", "device-1")}
    assert shell.states()[2] == ("END", "INVALID_ARGUMENT")


def test_a_rollback_half_way_through_loads_only_what_was_given_up() -> None:
    shell = serving()
    load = moved(shell)
    effects = shell.send(Declared(config=declared(1)))
    (unload,) = of(Unload, effects)
    assert (unload.actor, unload.version) == ("device-0", 2)
    assert load.order.version == 2
    (load,) = of(Load, shell.send(unload.done()))
    assert (load.actor, load.order.version) == ("device-0", 1)
    shell.send(load.done())
    assert homes(shell) == {1: ("device-0", "device-1")}


def test_what_is_aspired_again_before_it_was_let_go_of_is_not_loaded_anew() -> None:
    shell = serving()
    come(shell)
    effects = shell.send(Declared(config=declared(1)))
    assert homes(shell) == {1: ("device-0", "device-1")}
    effects += shell.router()
    assert not of(Load, effects)
    assert not of(Unload, effects)


def test_the_other_copy_that_is_lost_meanwhile_is_waited_for() -> None:
    shell = serving()
    shell.lost("device-1")
    effects = come(shell)
    assert homes(shell)[1] == ("device-0",)
    effects += shell.router()
    assert not of(Unload, effects)


def test_no_room_even_so_leaves_everything_as_it_is() -> None:
    shell = serving()
    (read,) = of(ReadManifest, shell.listed("m", 1, 2))
    large = manifest("m", 2, trunk=map_unit("trunk-2", 32))
    effects = shell.send(read.done(large))
    assert not of(Unload, effects)
    assert not of(Load, effects)
    assert shell.states()[2] == ("END", "RESOURCE_EXHAUSTED")
    assert homes(shell) == {1: ("device-0", "device-1")}


def test_a_controller_that_begins_half_way_through_goes_on() -> None:
    shell = serving()
    moved(shell)
    state = decode(of(Persist, shell.effects)[-1].data)
    assert {each.version: each.idle for each in state.placements} == {
        1: ("device-0",),
        2: ("device-1",),
    }
    later = Shell(dataclasses.replace(state, term=2, seq=0))
    # Device-0 has let go of version 1, and was loading version 2.
    later.send(ActorUp(report=report("device-0", 1, (), "n0", capacity=16)))
    later.send(ActorUp(report=report("device-1", 1, [("m", 1)], "n1", capacity=16)))
    effects = later.send(Listed(servable="m", versions=(1, 2)))
    reads = of(ReadManifest, [*later.effects])
    effects = later.send(*(read.done(trunk(read.version)) for read in reads))
    assert homes(later) == {1: ("device-1",)}
    (load,) = of(Load, effects)
    assert (load.actor, load.order.version) == ("device-0", 2)
    later.send(load.done())
    assert homes(later) == {2: ("device-0",)}


@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    capacities=st.lists(st.integers(5, 40), min_size=2, max_size=6),
    nodes=st.integers(1, 3),
)
@example(sizes=[12, 20, 15], capacities=[12, 40, 7, 45, 18], nodes=2)
def test_few_messages_find_room_wherever_even_bytes_do(
    sizes: list[int], capacities: list[int], nodes: int
) -> None:
    found = manifest("m", 1, words=table_unit("w", sizes))
    actors = [
        Site(name=f"shard-{i}", kind="shard", node=f"n{i % nodes}", capacity_bytes=capacity)
        for i, capacity in enumerate(capacities)
    ]

    def placed(strategy: Strategy) -> bool:
        try:
            place_rolling(
                found, (), actors, actors, replicas=0, table_replicas=2, shards=None,
                strategy=strategy,
            )  # fmt: skip
        except ResourceExhausted:
            return False
        return True

    assert placed("messages") or not placed("capacity")
