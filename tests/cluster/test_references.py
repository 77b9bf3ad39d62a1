"""Versions that refer to units of other servables: bound, moved together, never left alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import msgspec
import pytest

from cluster.config import Config, ServableConfig, VersionPolicy
from cluster.control import Declared, Load, Publish, ReadManifest, Unload
from cluster.declared import DeclaredState
from cluster.references import DEPTH_MAX
from shards.manifest import Manifest, Reference
from shards.specs import Spec
from tests.cluster.control_fakes import Shell, config, manifest, map_unit, of, table_unit

OUT = {"h": Spec(("b", 4))}


def encoder(version: int, width: int = 4, name: str = "encoder") -> Manifest:
    """A servable whose unit ``trunk`` yields rows of a width."""
    unit = msgspec.structs.replace(
        map_unit(f"{name}-{version}-trunk"), outputs={"h": Spec(("b", width))}
    )
    return manifest(name, version, trunk=unit)


def to(
    servable: str = "encoder", *, version: int | None = None, label: str = "", unit: str = "trunk"
) -> Reference:
    return Reference(servable=servable, unit=unit, version=version, label=label, outputs=OUT)


def ranker(reference: Reference, version: int = 1, name: str = "ranker") -> Manifest:
    """A servable with a unit of its own, which refers to a trunk."""
    own = manifest(name, version, head=map_unit(f"{name}-{version}-head"))
    return msgspec.structs.replace(own, references={"trunk": reference})


def declared(**labels: dict[str, int]) -> Config:
    """Servables by name, with their labels, each at its newest version."""
    found = config()
    servables = tuple(
        ServableConfig(name=name, policy=VersionPolicy(latest=1), labels=each)
        for name, each in labels.items()
    )
    return dataclasses.replace(found, servables=servables)


def feed(shell: Shell, store: Sequence[Manifest]) -> None:
    """List what the store has, and answer everything until nothing is asked for."""
    by_key = {(each.name, each.version): each for each in store}
    names = shell.core.status()["servables"]
    effects = []
    for name in dict.fromkeys(each.name for each in store):
        if name in names:
            effects += shell.listed(name, *sorted(n for s, n in by_key if s == name))
    answer(shell, effects, by_key)


def answer(
    shell: Shell, effects: Sequence[object], by_key: dict[tuple[str, int], Manifest]
) -> None:
    effects = list(effects)
    while effects:
        events = [e.done(by_key[e.servable, e.version]) for e in effects
                  if isinstance(e, ReadManifest)]  # fmt: skip
        events += [e.done() for e in effects if isinstance(e, Load | Unload)]  # type: ignore[misc]
        effects = list(shell.send(*events)) if events else []


def declare(shell: Shell, found: Config, store: Sequence[Manifest]) -> None:
    answer(
        shell,
        shell.send(Declared(config=found)),
        {(each.name, each.version): each for each in store},
    )


def serving(store: Sequence[Manifest], **labels: dict[str, int]) -> Shell:
    shell = Shell()
    shell.begin(declared(**labels))
    feed(shell, store)
    shell.router()
    return shell


def trunk(shell: Shell, parent: str = "ranker", version: int = 1) -> str:
    """The identity of the trunk that the latest epoch has a parent use."""
    return shell.epoch.servables[parent][version].manifest.units["trunk"].id


def why(shell: Shell, name: str = "ranker", version: int = 1) -> tuple[str, str, str]:
    rows = shell.core.status()["servables"][name]["versions"]
    (row,) = [each for each in rows if each["version"] == version]
    return row["state"], row["error_code"], row["error_message"] or row["note"]


STABLE = to(label="stable")


def test_a_parent_answers_with_the_unit_where_the_other_servable_has_it() -> None:
    shell = serving([encoder(3), ranker(STABLE)], encoder={"stable": 3}, ranker={})
    served = shell.epoch.servables["ranker"][1]
    assert not served.manifest.references
    assert trunk(shell) == "encoder-3-trunk"
    assert served.placement["trunk"] == shell.epoch.servables["encoder"][3].placement["trunk"]
    # Nobody was told to load the trunk a second time.
    orders = {e.order.servable: [u.name for u in e.order.units] for e in of(Load, shell.effects)}
    assert orders == {"encoder": ["trunk"], "ranker": ["head"]}
    (row,) = shell.core.status()["servables"]["ranker"]["versions"]
    assert row["refers"] == {"trunk": "encoder@stable/trunk is encoder:3"}


def test_a_parent_is_not_placed_before_what_it_refers_to_is_available() -> None:
    shell = Shell()
    shell.begin(declared(encoder={"stable": 3}, ranker={}))
    (read,) = of(ReadManifest, shell.listed("ranker", 1))
    assert of(Load, shell.send(read.done(ranker(STABLE)))) == []
    assert why(shell) == ("START", "OK", "waits for encoder:3")
    (read,) = of(ReadManifest, shell.listed("encoder", 3))
    (load,) = of(Load, shell.send(read.done(encoder(3))))
    assert load.order.servable == "encoder"
    (load,) = of(Load, shell.send(load.done()))
    assert load.order.servable == "ranker"
    shell.send(load.done())
    assert trunk(shell) == "encoder-3-trunk"


def test_a_label_that_moves_takes_all_parents_along_in_one_epoch() -> None:
    parents = [ranker(STABLE, name=name) for name in ("a", "b", "c")]
    store = [encoder(3), *parents]
    shell = serving(store, encoder={"stable": 3}, a={}, b={}, c={})
    store.append(encoder(4))
    feed(shell, store)
    assert {trunk(shell, name) for name in "abc"} == {"encoder-3-trunk"}
    shell.effects.clear()
    declare(shell, declared(encoder={"stable": 4}, a={}, b={}, c={}), store)
    seen = [
        ({trunk_of(each, name) for name in "abc"}, each.epoch.labels["encoder"]["stable"])
        for each in of(Publish, shell.effects)
    ]
    assert ({"encoder-4-trunk"}, 4) in seen
    assert all(ids == {f"encoder-{label}-trunk"} for ids, label in seen)


def trunk_of(publish: Publish, parent: str) -> str:
    return publish.epoch.servables[parent][1].manifest.units["trunk"].id


def test_what_a_label_leaves_is_unloaded_when_no_request_of_a_parent_can_be_using_it() -> None:
    store = [encoder(3), encoder(4), ranker(STABLE)]
    shell = serving(store, encoder={"stable": 3}, ranker={})
    before = shell.epoch.number
    declare(shell, declared(encoder={"stable": 4}, ranker={}), store)
    assert trunk(shell) == "encoder-4-trunk"
    shell.effects.clear()
    shell.router(epoch=before)
    shell.sleep(1.0)
    assert of(Unload, shell.effects) == []
    shell.router()
    shell.sleep(1.0)
    (unload,) = of(Unload, shell.effects)
    assert (unload.servable, unload.version) == ("encoder", 3)


def test_a_label_does_not_move_to_what_a_parent_cannot_use() -> None:
    store = [encoder(3), encoder(4, width=8), ranker(STABLE)]
    shell = serving(store, encoder={"stable": 3}, ranker={})
    declare(shell, declared(encoder={"stable": 4}, ranker={}), store)
    assert trunk(shell) == "encoder-3-trunk"
    assert shell.epoch.labels["encoder"] == {"stable": 3}
    told = shell.core.status()["servables"]["encoder"]["rollout"]
    assert told.startswith("waits for version 4 (label stable), but ranker:1 cannot follow:")
    assert "float32" in told
    # Nor while the parent is drained, since it may be served again.
    declare(shell, declared(encoder={"stable": 4}), store)
    assert shell.versions("ranker") == []
    assert shell.epoch.labels["encoder"] == {"stable": 3}
    declare(shell, declared(encoder={"stable": 4}, ranker={}), store)
    assert trunk(shell) == "encoder-3-trunk"
    # When the parent has gone, nothing keeps it back.
    declare(shell, declared(encoder={"stable": 4}), store)
    shell.router()
    shell.sleep(1.0)
    assert shell.epoch.labels["encoder"] == {"stable": 4}


def test_a_version_that_is_named_is_loaded_and_kept_whatever_its_own_policy_says() -> None:
    store = [encoder(3), encoder(4), ranker(to(version=3))]
    shell = serving(store, encoder={}, ranker={})
    assert sorted(shell.epoch.servables["encoder"]) == [3, 4]
    assert trunk(shell) == "encoder-3-trunk"
    assert shell.core.status()["servables"]["encoder"]["needed"] == [3]
    declare(shell, declared(encoder={}), store)
    shell.sleep(1.0)
    shell.router()
    shell.sleep(1.0)
    assert sorted(shell.epoch.servables["encoder"]) == [4]


def test_what_is_referred_to_is_unloaded_after_the_last_parent_whatever_is_declared() -> None:
    store = [encoder(3), ranker(STABLE, name="a"), ranker(to(version=3), name="b")]
    shell = serving(store, encoder={"stable": 3}, a={}, b={})
    shell.effects.clear()
    declare(shell, declared(a={}, b={}), store)
    assert trunk(shell, "a") == trunk(shell, "b") == "encoder-3-trunk"
    assert of(Unload, shell.effects) == []
    declare(shell, declared(b={}), store)
    settle(shell)
    assert trunk(shell, "b") == "encoder-3-trunk"
    assert [(e.servable, e.version) for e in of(Unload, shell.effects)] == [("a", 1)]
    declare(shell, declared(), store)
    settle(shell)
    assert shell.epoch.servables == {}
    assert [e.servable for e in of(Unload, shell.effects)] == ["a", "b", "encoder"]


def settle(shell: Shell) -> None:
    """Routers move on, and actors let go of whatever they are told to."""
    for _ in range(6):
        shell.router()
        effects = shell.sleep(1.0)
        shell.carry_out(effects)


@pytest.mark.parametrize(
    ("reference", "code", "text"),
    [
        (to("nobody", version=1), "NOT_FOUND", "no servable nobody is declared"),
        (to(label="canary"), "NOT_FOUND", "without a label canary"),
        (to(version=9), "NOT_FOUND", "the store has no encoder version 9"),
        (to(version=3, unit="tail"), "NOT_FOUND", "encoder:3 has no unit 'tail'"),
        (
            Reference(servable="encoder", unit="trunk", version=3, outputs={"h": Spec(("b", 5))}),
            "INVALID_ARGUMENT",
            "is relied on to have outputs",
        ),
        (
            Reference(servable="encoder", unit="trunk", version=3, kind="table", dtype="float32"),
            "INVALID_ARGUMENT",
            "is relied on to have kind table, it has map",
        ),
    ],
)
def test_a_parent_that_cannot_be_bound_ends_with_a_typed_error(
    reference: Reference, code: str, text: str
) -> None:
    shell = serving([encoder(3), ranker(reference)], encoder={"stable": 3}, ranker={})
    state, found, message = why(shell)
    assert (state, found) == ("END", code)
    assert text in message
    assert [e.order.servable for e in of(Load, shell.effects)] in ([], ["encoder"])
    # It is not tried again as long as nothing has changed.
    reads = len(of(ReadManifest, shell.effects))
    shell.sleep(300.0)
    assert len(of(ReadManifest, shell.effects)) == reads


def test_a_parent_that_came_too_early_is_tried_again_when_what_it_needs_is_declared() -> None:
    store = [encoder(3), ranker(STABLE)]
    shell = serving(store, ranker={})
    assert why(shell)[:2] == ("END", "NOT_FOUND")
    declare(shell, declared(encoder={"stable": 3}, ranker={}), store)
    feed(shell, store)
    assert trunk(shell) == "encoder-3-trunk"


def chain(count: int, *, closed: bool = False) -> list[Manifest]:
    """Servables of which each refers to the next, and the last to a trunk or to the first."""
    names = [f"s{index}" for index in range(count)]
    nexts = [*names[1:], names[0] if closed else "encoder"]
    return [
        ranker(to(after, version=1, unit="trunk"), name=name)
        for name, after in zip(names, nexts, strict=True)
    ]


def test_a_circle_is_refused_for_all_who_are_in_it() -> None:
    store = chain(3, closed=True)
    shell = serving(store, s0={}, s1={}, s2={})
    for name in ("s0", "s1", "s2"):
        state, code, text = why(shell, name)
        assert (state, code) == ("END", "FAILED_PRECONDITION")
        assert "in a circle" in text
    assert of(Load, shell.effects) == []


@pytest.mark.parametrize("count", [DEPTH_MAX - 1, DEPTH_MAX])
def test_so_many_may_refer_to_one_another_in_a_row_and_no_more(count: int) -> None:
    store = [encoder(1), *chain(count)]
    names: dict[str, dict[str, int]] = {each.name: {} for each in store}
    shell = serving(store, **names)
    for _ in range(count):
        feed(shell, store)
    if count < DEPTH_MAX:
        assert trunk(shell, "s0") == "encoder-1-trunk"
        return
    assert why(shell, "s0")[:2] == ("END", "FAILED_PRECONDITION")
    assert trunk(shell, "s1") == "encoder-1-trunk"


def test_who_refers_to_one_that_refers_moves_with_it() -> None:
    middle = msgspec.structs.replace(ranker(STABLE, name="middle"))
    store = [encoder(3), encoder(4), middle, ranker(to("middle", version=1))]
    shell = serving(store, encoder={"stable": 3}, middle={}, ranker={})
    assert trunk(shell) == "encoder-3-trunk"
    declare(shell, declared(encoder={"stable": 4}, middle={}, ranker={}), store)
    for publish in of(Publish, shell.effects):
        served = publish.epoch.servables
        if "ranker" in served:
            assert trunk_of(publish, "ranker") == trunk_of(publish, "middle")
    assert trunk(shell) == "encoder-4-trunk"


def test_who_refers_through_a_servable_that_is_declared_no_more_follows_labels_still() -> None:
    store = [encoder(3), encoder(4), ranker(STABLE, name="middle"), ranker(to("middle", version=1))]
    shell = serving(store, encoder={"stable": 3}, middle={}, ranker={})
    declare(shell, declared(encoder={"stable": 3}, ranker={}), store)
    declare(shell, declared(encoder={"stable": 4}, ranker={}), store)
    assert trunk(shell) == trunk(shell, "middle") == "encoder-4-trunk"


def test_a_router_that_is_silent_is_waited_for_as_long_as_a_parents_requests_may_take() -> None:
    store = [encoder(3), encoder(4), ranker(STABLE)]

    def slow(label: int) -> Config:
        found = declared(encoder={"stable": label}, ranker={})
        one, other = found.servables
        return dataclasses.replace(
            found,
            servables=(
                dataclasses.replace(one, deadline_ms=1_000),
                dataclasses.replace(other, deadline_ms=60_000),
            ),
        )

    shell = Shell()
    shell.begin(slow(3))
    feed(shell, store)
    shell.router()
    declare(shell, slow(4), store)
    assert trunk(shell) == "encoder-4-trunk"
    shell.effects.clear()
    shell.sleep(60.0)
    assert of(Unload, shell.effects) == []
    shell.sleep(60.0)
    assert [(e.servable, e.version) for e in of(Unload, shell.effects)] == [("encoder", 3)]


def test_a_part_that_nobody_answers_for_is_empty_in_the_parents_too_until_it_is_back() -> None:
    shell = serving([encoder(3), ranker(STABLE)], encoder={"stable": 3}, ranker={})
    shell.lost("device-0")
    served = shell.epoch.servables
    assert served["ranker"][1].placement == {"head": ((),), "trunk": ((),)}
    effects = shell.up("device-0", generation=2)
    shell.carry_out(effects)
    placement = shell.epoch.servables["ranker"][1].placement
    assert placement == {"head": (("device-0",),), "trunk": (("device-0",),)}


def test_a_table_may_be_referred_to_and_one_with_nothing_of_its_own_may_refer() -> None:
    words = manifest("words", 1, rows=table_unit("w", [8, 8]))
    reference = Reference(servable="words", unit="rows", version=1, kind="table",
                          dtype="float32", dim=1)  # fmt: skip
    empty = msgspec.structs.replace(manifest("alias", 1), units={}, references={"t": reference})
    shell = serving([words, empty], words={}, alias={})
    served = shell.epoch.servables
    assert served["alias"][1].placement == {"t": served["words"][1].placement["rows"]}
    assert [e.order.servable for e in of(Load, shell.effects)] == ["words"]


def test_a_new_reign_publishes_parents_bound_as_they_were() -> None:
    store = [encoder(3), encoder(4), ranker(STABLE)]
    empty = msgspec.structs.replace(
        manifest("alias", 1), units={}, references={"trunk": to(version=3)}
    )
    store.append(empty)
    shell = serving(store, encoder={"stable": 3}, ranker={}, alias={})
    assert trunk(shell) == trunk(shell, "alias") == "encoder-3-trunk"
    state = dataclasses.replace(shell.core._to_keep(), term=2, seq=0)
    assert isinstance(state, DeclaredState)
    after = Shell(state)
    held = [(each.servable, each.version) for each in state.placements if each.units]
    effects = after.up_holding("device-0", *held)
    effects += after.up("shard-0")
    by_key = {(each.name, each.version): each for each in store}
    reads = of(ReadManifest, [*effects, *after.effects])
    keys = {(each.servable, each.version): each for each in reads}
    after.send(*(each.done(by_key[key]) for key, each in keys.items()))
    first = of(Publish, after.effects)[0].epoch
    assert sorted(first.servables) == ["alias", "encoder", "ranker"]
    for parent in ("ranker", "alias"):
        assert first.servables[parent][1].manifest.units["trunk"].id == "encoder-3-trunk"
    assert of(Load, after.effects) == []
