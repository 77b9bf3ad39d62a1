"""How many versions load at once, and in which order, in the controller core."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from batching.errors import Internal
from cluster.config import Config, VersionPolicy
from cluster.control import (
    ActorUp,
    Declared,
    Effect,
    Failure,
    Listed,
    Load,
    ManifestRead,
    Persist,
    ReadManifest,
    Unload,
)
from cluster.declared import decode
from tests.cluster.control_fakes import (
    Shell,
    config,
    manifest,
    map_unit,
    of,
    report,
    table_unit,
)

NAMES = ("a", "b", "c", "d")


def bounded(
    *names: str, start: int = 2, later: int = 1, policy: VersionPolicy | None = None
) -> Config:
    declared = config(*names, policy=policy)
    cluster = dataclasses.replace(declared.cluster, load_parallel_start=start, load_parallel=later)
    return dataclasses.replace(declared, cluster=cluster)


def begun(declared: Config) -> Shell:
    shell = Shell()
    shell.begin(declared)
    return shell


def coming(shell: Shell, *keys: tuple[str, int]) -> list[Load]:
    """List versions and give their manifests, all at once."""
    effects: list[Effect] = []
    for name in dict.fromkeys(name for name, _ in keys):
        known = shell.core.status()["servables"][name]["complete"]
        new = tuple(version for each, version in keys if each == name)
        effects += shell.send(Listed(servable=name, versions=(*known, *new)))
    return of(Load, read(shell, effects))


def read(shell: Shell, effects: Iterable[Effect]) -> list[Effect]:
    found: list[Effect] = []
    for each in of(ReadManifest, effects):
        found += shell.send(each.done(manifest(each.servable, each.version)))
    return found


def loads(effects: Iterable[Effect]) -> list[tuple[str, int]]:
    return [(each.order.servable, each.order.version) for each in of(Load, effects)]


def note(shell: Shell, name: str, version: int) -> str:
    rows = shell.core.status()["servables"][name]["versions"]
    return str(next(row["note"] for row in rows if row["version"] == version))


def serving(
    *names: str, start: int = 2, later: int = 1, policy: VersionPolicy | None = None
) -> Shell:
    """A cluster whose start is over: version 1 of everything serves."""
    shell = begun(bounded(*names, start=start, later=later, policy=policy))
    shell.carry_out(coming(shell, *((name, 1) for name in names)))
    assert all(shell.versions(name) == [1] for name in names)
    return shell


def test_so_many_load_at_the_start_and_the_next_when_one_of_them_is_there() -> None:
    shell = begun(bounded(*NAMES))
    first = coming(shell, *((name, 1) for name in NAMES))
    assert loads(first) == [("a", 1), ("b", 1)]
    assert loads(shell.send(first[1].done())) == [("c", 1)]
    assert loads(shell.send(first[0].done())) == [("d", 1)]


def test_who_waits_says_for_how_many() -> None:
    shell = begun(bounded(*NAMES))
    first = coming(shell, *((name, 1) for name in NAMES))
    assert note(shell, "c", 1) == "waits for 2 loads before it"
    assert note(shell, "d", 1) == "waits for 3 loads before it"
    shell.send(first[0].done())
    assert note(shell, "c", 1) == ""
    assert note(shell, "d", 1) == "waits for 2 loads before it"


def test_who_waits_has_no_place_and_is_not_remembered() -> None:
    shell = begun(bounded("a", "b", start=1))
    [first] = coming(shell, ("a", 1), ("b", 1))
    rows = shell.core.status()["servables"]["b"]["versions"]
    assert [(row["step"], row["actors"]) for row in rows] == [("NEW", [])]
    promised = shell.core.status()["actors"]["device-0"]["promised_bytes"]
    shell.send(first.done())
    assert shell.core.status()["actors"]["device-0"]["promised_bytes"] > promised


def test_one_that_is_no_longer_wanted_while_it_waits_costs_no_order() -> None:
    shell = begun(bounded("a", "b", start=1))
    [first] = coming(shell, ("a", 1), ("b", 1))
    effects = shell.send(Declared(config=bounded("a", start=1)))
    assert not of(Load, effects)
    assert not of(Unload, effects)
    assert "b" not in shell.core.status()["servables"]
    assert loads(shell.send(first.done())) == []


def test_a_load_that_fails_makes_room_for_the_next() -> None:
    shell = begun(bounded("a", "b", start=1))
    [first] = coming(shell, ("a", 1), ("b", 1))
    assert loads(shell.send(first.done(Internal("broken")))) == [("b", 1)]


def test_a_load_that_is_called_off_makes_room_before_its_actor_has_answered() -> None:
    shell = begun(bounded("a", "b", start=1))
    coming(shell, ("a", 1), ("b", 1))
    effects = shell.send(Declared(config=bounded("b", start=1)))
    assert loads(effects) == [("b", 1)]
    assert [each.servable for each in of(Unload, effects)] == ["a"]


def test_an_actor_that_is_lost_makes_room() -> None:
    shell = begun(bounded("a", "b", start=1))
    coming(shell, ("a", 1), ("b", 1))
    assert loads(shell.lost("device-0")) == []
    assert note(shell, "b", 1) == "waits for device-0"
    shell.sleep(0.9)
    assert loads(shell.up("device-0", generation=2)) == [("b", 1)]


def test_later_fewer_load_at_once() -> None:
    shell = serving(*NAMES, start=4, later=1)
    first = coming(shell, *((name, 2) for name in NAMES))
    assert loads(first) == [("a", 2)]
    assert loads(shell.send(first[0].done())) == [("b", 2)]


def test_the_start_is_over_when_everything_is_there_or_has_failed_once() -> None:
    shell = begun(bounded("a", "b", "c", start=3, later=1))
    a, b, c = coming(shell, ("a", 1), ("b", 1), ("c", 1))
    shell.send(a.done())
    shell.send(b.done(Internal("broken")))
    assert len(coming(shell, ("a", 2), ("b", 2))) == 2
    shell.effects.clear()
    shell = begun(bounded("a", "b", "c", start=3, later=1))
    a, b, c = coming(shell, ("a", 1), ("b", 1), ("c", 1))
    shell.send(a.done(), b.done(Internal("broken")), c.done())
    assert len(coming(shell, ("a", 2), ("b", 2))) == 1


def test_a_servable_whose_listing_fails_does_not_prolong_the_start() -> None:
    shell = begun(bounded("a", "b", "gone", start=3, later=1))
    shell.send(Listed(servable="gone", error=Failure(code="NOT_FOUND", message="it is gone")))
    shell.carry_out(coming(shell, ("a", 1), ("b", 1)))
    assert len(coming(shell, ("a", 2), ("b", 2))) == 1


def test_what_is_declared_later_is_no_start() -> None:
    shell = serving("a", start=4, later=1)
    shell.send(Declared(config=bounded("a", "b", "c", start=4, later=1)))
    assert loads(coming(shell, ("b", 1), ("c", 1))) == [("b", 1)]


def test_the_bounds_can_be_declared_anew() -> None:
    shell = serving("a", "b", "c", start=3, later=1)
    assert len(coming(shell, ("a", 2), ("b", 2), ("c", 2))) == 1
    effects = shell.send(Declared(config=bounded("a", "b", "c", start=3, later=3)))
    assert loads(effects) == [("b", 2), ("c", 2)]


def test_a_servable_that_answers_nothing_goes_before_those_that_get_another_version() -> None:
    shell = serving("a", "b", later=1)
    shell.send(Declared(config=bounded("a", "b", "new", later=1)))
    [first] = coming(shell, ("a", 2), ("b", 2), ("new", 1))
    assert note(shell, "new", 1) == "waits for 1 load before it"
    assert note(shell, "b", 2) == "waits for 2 loads before it"
    effects = shell.send(first.done())
    assert loads(effects) == [("new", 1)]


def test_of_several_new_versions_of_a_servable_one_is_urgent() -> None:
    policy = VersionPolicy(latest=2)
    shell = begun(bounded("a", "b", start=1, policy=policy))
    [first] = coming(shell, ("a", 1), ("a", 2), ("b", 1))
    order = loads([first])
    for _ in range(2):
        [first] = of(Load, shell.send(first.done()))
        order += loads([first])
    assert order == [("a", 1), ("b", 1), ("a", 2)]


def test_what_cannot_be_placed_keeps_nobody_back() -> None:
    shell = begun(bounded("a", "big", "b", start=1))
    shell.send(ActorUp(report=report("device-0", capacity=100)))
    effects = [
        *shell.send(Listed(servable="big", versions=(1,))),
        *shell.send(Listed(servable="b", versions=(1,))),
    ]
    big, b = of(ReadManifest, effects)
    assert not loads(shell.send(big.done(manifest("big", 1, trunk=map_unit("t", 4000)))))
    assert loads(shell.send(b.done(manifest("b", 1, trunk=map_unit("u", 4))))) == [("b", 1)]


def test_an_actor_that_comes_back_loads_what_serves_whoever_is_in_line() -> None:
    shell = serving("a", "b", "c", start=3, later=1)
    [first] = coming(shell, ("c", 2))
    shell.send(first.done())
    shell.lost("device-0")
    shell.sleep(5.0)
    effects = shell.up("device-0", generation=2)
    assert sorted(loads(effects)) == [("a", 1), ("b", 1), ("c", 2)]


def test_one_whose_actor_is_away_keeps_nobody_back() -> None:
    """It is placed on two, has loaded on one that is gone since, and the other is done."""
    declared = bounded("t", "m", start=1)
    cluster = dataclasses.replace(declared.cluster, shards=2)
    shell = begun(dataclasses.replace(declared, cluster=cluster))
    [read_t] = of(ReadManifest, shell.send(Listed(servable="t", versions=(1,))))
    two = shell.send(read_t.done(manifest("t", 1, words=table_unit("w", [8, 8]))))
    one, other = of(Load, two)
    shell.send(one.done())
    shell.lost(one.actor)
    [read_m] = of(ReadManifest, shell.send(Listed(servable="m", versions=(1,))))
    assert loads(shell.send(read_m.done(manifest("m", 1)))) == []
    assert loads(shell.send(other.done())) == [("m", 1)]


def test_a_reign_that_finds_a_load_under_way_goes_on_with_it_and_begins_no_other() -> None:
    shell = begun(bounded("a", "b", start=1))
    [first] = coming(shell, ("a", 1), ("b", 1))
    kept = decode(of(Persist, shell.effects)[-1].data)
    assert [placed.servable for placed in kept.placements] == ["a"]
    shell = Shell(dataclasses.replace(kept, term=2))
    shell.begin(bounded("a", "b", start=1))
    for servable in ("a", "b"):
        shell.send(Listed(servable=servable, versions=(1,)))
    again = shell.send(*(_read(name) for name in ("a", "b")))
    assert [(each.actor, each.order.units) for each in of(Load, again)] == [
        (first.actor, first.order.units)
    ]
    assert note(shell, "b", 1) == "waits for 1 load before it"


def _read(name: str) -> ManifestRead:
    return ManifestRead(servable=name, version=1, manifest=manifest(name, 1))
