"""Tables that are made even over shard actors while they are served, on request."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from batching.errors import InvalidArgument, Unavailable
from cluster.control import ActorUp, Declared, Effect, ListStore, Load, ManifestRead, Unload
from cluster.declared import DeclaredState, decode
from cluster.editing import take_edit
from cluster.edits import Rebalance, decode_edited, encode_edit
from cluster.packing import Strategy
from cluster.settling import unbalanced
from cluster.signals import NodesSeen, Persist
from tests.cluster.control_fakes import Shell, config, manifest, of, report, table_unit
from tests.cluster.test_draining import NODES, edit, up

FOUR = manifest("m", 1, words=table_unit("w1", [8] * 4))


def asked(shell: Shell, *, dry_run: bool = False) -> tuple[dict[str, Any], list[Effect]]:
    """Rebalance, as the controller is told to."""
    found: list[Effect] = []
    answer = take_edit(
        shell.core,
        encode_edit(Rebalance(dry_run=dry_run)),
        lambda event: found.extend(shell.send(event)),
    )
    edited = decode_edited(answer)
    assert edited.code == "OK", edited
    return msgspec.json.decode(edited.balance), found


def grown(*, capacity: int = 0, placement: Strategy = "capacity") -> Shell:
    """Four partitions on two shard actors, and two more that came afterwards."""
    shell = Shell()

    def declare(shards: int) -> None:
        declared = config("m", devices=0, shards=shards)
        servables = tuple(replace(each, placement=placement) for each in declared.servables)
        shell.send(Declared(config=replace(declared, servables=servables)))

    declare(2)
    shell.send(NodesSeen(memory_bytes=NODES))
    for index in range(2):
        up(shell, f"shard-{index}", "node-a")
    shell.serve("m", 1, FOUR)
    declare(4)
    for index in range(2, 4):
        up(shell, f"shard-{index}", "node-b", capacity=capacity)
    shell.router(epoch=shell.epoch.number)
    return shell


def homes(shell: Shell) -> list[tuple[str, ...]]:
    return list(shell.epoch.servables["m"][1].placement["words"])


def kept(shell: Shell) -> DeclaredState:
    return decode(of(Persist, shell.effects)[-1].data)


def finish(shell: Shell, effects: list[Effect]) -> None:
    """Answer whatever is ordered, with routers that follow, until nothing is."""
    for _ in range(30):
        shell.carry_out(effects)
        effects = shell.router() + shell.sleep(2.0)


def test_half_of_what_an_actor_has_goes_to_one_that_has_come() -> None:
    shell = grown()
    before = homes(shell)
    found, effects = asked(shell)
    assert len(found["moves"]) == 2
    assert found["uneven"] == [2.0, 1.0]
    (load,) = of(Load, effects)
    assert load.actor == "shard-2"
    (partition,) = load.order.units[0].partitions
    (old,) = before[partition]
    assert homes(shell) == before, "nobody is asked for what it does not have yet"
    # It has answered: the next epoch names it alone, and the other may still be asked.
    effects = shell.send(load.done())
    assert homes(shell)[partition] == ("shard-2",)
    assert (of(Load, effects), of(Unload, effects)) == ([], [])
    # Nobody can be asking it any more: it is to hold what is left.
    (less,) = of(Load, shell.router() + shell.sleep(1.0))
    assert less.actor == old
    (left,) = less.order.units[0].partitions
    assert homes(shell)[left] == (old,)
    finish(shell, shell.send(less.done()))
    assert sorted(homes(shell)) == [(f"shard-{index}",) for index in range(4)]
    assert unbalanced(shell.core.status()) == ""
    assert (kept(shell).rebalancing, kept(shell).placements[0].shift) == (False, None)


def test_a_second_one_right_after_moves_nothing() -> None:
    shell = grown()
    finish(shell, asked(shell)[1])
    found, effects = asked(shell)
    assert (found["moves"], found["uneven"]) == ([], [1.0, 1.0])
    assert of(Load, effects) == []
    assert {type(effect) for effect in shell.sleep(600.0)} == {ListStore}


def test_a_dry_run_tells_the_same_and_does_nothing() -> None:
    shell = grown()
    told, effects = asked(shell, dry_run=True)
    assert effects == []
    assert asked(shell)[0] == told


def test_an_actor_gets_parts_beside_those_that_it_has() -> None:
    shell = Shell()
    shell.send(Declared(config=config("m", devices=0, shards=2)))
    for index in range(2):
        up(shell, f"shard-{index}", "node-a")
    shell.serve("m", 1, FOUR)
    # All of it on one, as after the other was away for long.
    up(shell, "shard-9", "node-a")
    left = kept(shell)
    (placed,) = left.placements
    units = {"words": (("shard-0",), ("shard-0",), ("shard-0",), ("shard-1",))}
    lopsided = replace(left, placements=(msgspec.structs.replace(placed, units=units),))
    later = reign(lopsided, ("shard-0", "shard-1"))
    (load,) = of(Load, asked(later)[1])
    assert (load.actor, len(load.order.units[0].partitions)) == ("shard-1", 2)
    assert homes(later) == list(units["words"])
    effects = later.send(load.done())
    assert sorted(homes(later)) == [("shard-0",)] * 2 + [("shard-1",)] * 2
    finish(later, effects)
    assert kept(later).placements[0].shift is None


def reign(left: DeclaredState, holders: Collection[str], others: Collection[str] = ()) -> Shell:
    """The next reign, which hears shard-0, shard-1 and others, some of which hold the version."""
    later = Shell(replace(left, term=2, seq=0))
    later.listed("m", 1)
    later.send(ManifestRead(servable="m", version=1, manifest=FOUR))
    for name in ("shard-0", "shard-1", *others):
        held = (("m", 1),) if name in holders else ()
        node = "node-b" if name in others else "node-a"
        later.send(ActorUp(report=report(name, 1, held, node=node)))
    later.router()
    return later


def test_one_that_cannot_load_the_parts_gets_none_and_others_do() -> None:
    shell = grown()
    (load,) = of(Load, asked(shell)[1])
    before = homes(shell)
    effects = shell.send(load.done(InvalidArgument("not here")))
    assert homes(shell) == before
    (other,) = of(Load, effects)
    assert (load.actor, other.actor) == ("shard-2", "shard-3")
    finish(shell, effects)
    assert {actor for part in homes(shell) for actor in part} == {"shard-0", "shard-1", "shard-3"}
    assert not kept(shell).rebalancing
    stays = asked(shell, dry_run=True)[0]["stays"]
    assert stays["m:1 on shard-2"] == "INVALID_ARGUMENT: not here"
    # Whoever asks again has it tried again.
    (again,) = of(Load, asked(shell)[1])
    assert again.actor == "shard-2"


def test_an_actor_that_refuses_more_keeps_what_it_has_and_serves() -> None:
    shell = Shell()
    shell.send(Declared(config=config("m", devices=0, shards=2)))
    left = DeclaredState(term=1, seq=0, config=shell.core.config)
    units = {"words": (("shard-0",), ("shard-0",), ("shard-0",), ("shard-1",))}
    placed = [
        msgspec.convert(
            {"servable": "m", "version": 1, "available": True, "units": units}, type(each)
        )
        for each in kept(grown()).placements
    ]
    later = reign(replace(left, placements=tuple(placed)), ("shard-0", "shard-1"))
    (load,) = of(Load, asked(later)[1])
    later.send(load.done(Unavailable("the store is away")))
    assert homes(later) == list(units["words"])
    finish(later, later.router())
    assert homes(later) == list(units["words"])
    assert unbalanced(later.core.status()) == ""


@pytest.mark.parametrize("steps", range(6))
def test_a_later_reign_goes_on_at_every_step(steps: int) -> None:
    shell = grown()
    effects = asked(shell)[1]
    for _ in range(steps):
        answers = [each.done() for each in effects if isinstance(each, Load | Unload)]
        effects = shell.send(*answers) + shell.router() + shell.sleep(1.0)
    actors = shell.core._world.fleet.actors.items()
    holding = {name for name, actor in actors if actor.has_loaded(("m", 1))}
    later = reign(kept(shell), holding, ("shard-2", "shard-3"))
    finish(later, later.effects)
    assert sorted(homes(later)) == [(f"shard-{index}",) for index in range(4)]
    assert unbalanced(later.core.status()) == ""


def test_drains_go_first() -> None:
    shell = grown()
    (load,) = of(Load, edit(shell, "node-a")[1])
    found, _ = asked(shell)
    assert found["waits"] == "waits for shard-4, shard-5"
    effects = up(shell, "shard-4", "node-b")
    assert asked(shell)[0]["waits"] == "waits for shard-5"
    effects += [load, *up(shell, "shard-5", "node-b")]
    assert asked(shell)[0]["waits"] == "waits until m:1 has left a node that is drained"
    finish(shell, effects)
    assert {actor for part in homes(shell) for actor in part} <= shell.core._world.fleet.declared
    assert shell.core.status()["nodes"]["node-a"]["state"] != "serving"
    assert all(
        len(hosted) == 1 for hosted in (shell.core._world.pieces()[a] for (a,) in homes(shell))
    )


def test_what_is_on_few_actors_on_purpose_stays_and_that_is_said() -> None:
    found, effects = asked(grown(placement="messages"))
    assert found["stays"] == {
        "m:1": "it is on as few actors as it may be (placement: messages)",
    }
    assert (found["moves"], of(Load, effects)) == ([], [])


def test_where_there_is_no_room_that_is_said() -> None:
    found, effects = asked(grown(capacity=7))
    assert found["stays"] == {
        "more on shard-2": "1 bytes short",
        "more on shard-3": "1 bytes short",
    }
    assert (found["moves"], of(Load, effects)) == ([], [])


def test_a_lost_newcomer_is_waited_for_and_the_old_one_answers() -> None:
    shell = grown()
    (load,) = of(Load, asked(shell)[1])
    before = homes(shell)
    shell.lost(load.actor)
    shell.send(load.done())
    assert homes(shell) == before
    finish(shell, shell.sleep(60.0) + up(shell, load.actor, "node-b"))
