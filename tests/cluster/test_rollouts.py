"""Labels and splits in the controller core: they move with the load that makes them true.

G numbers are TensorFlow Serving's test cases.
"""

from __future__ import annotations

import dataclasses

import pytest

from batching.errors import InvalidArgument, Unavailable
from cluster.config import Config, Shadow, VersionPolicy
from cluster.control import Declared, Listed, Load, Persist, Publish, ReadManifest, Tick, Unload
from cluster.declared import DeclaredState, decode
from cluster.epochs import Copies, Epoch, Share
from cluster.routes import Routes
from tests.cluster.control_fakes import Shell, begun, config, manifest, of


def declared(*versions: int, **fields: object) -> Config:
    """One servable with these specific versions; all complete ones where none is given."""
    policy = VersionPolicy(specific=versions) if versions else VersionPolicy(all=True)
    found = config("m", policy=policy)
    servable = dataclasses.replace(found.servables[0], **fields)  # type: ignore[arg-type]
    return dataclasses.replace(found, servables=(servable,))


def serving(*versions: int, **fields: object) -> Shell:
    """A shell that serves these versions."""
    shell = begun(declared(*versions, **fields))
    load(shell, *versions)
    return shell


def load(shell: Shell, *versions: int) -> None:
    """Have versions listed, and everything that is asked for succeed."""
    read(shell, shell.listed("m", *versions))


def read(shell: Shell, effects: object) -> None:
    reads = of(ReadManifest, effects)  # type: ignore[arg-type]
    shell.carry_out(shell.send(*(each.done(manifest("m", each.version)) for each in reads)))


def labels(epoch: Epoch) -> dict[str, int]:
    return epoch.labels.get("m", {})


def test_g1_labels_of_available_versions_are_in_the_epoch_that_names_them() -> None:
    shell = serving(1, 2, labels={"stable": 1, "canary": 2})
    assert labels(shell.epoch) == {"stable": 1, "canary": 2}
    for publish in of(Publish, shell.effects):
        assert set(labels(publish.epoch).values()) <= publish.epoch.servables.get("m", {}).keys()
    # The last of the two to be there brought its label in the same epoch.
    named = [(sorted(e.epoch.servables.get("m", {})), labels(e.epoch))
             for e in of(Publish, shell.effects)]  # fmt: skip
    assert ([2], {"canary": 2}) in named or ([1], {"stable": 1}) in named
    assert named[-1] == ([1, 2], {"stable": 1, "canary": 2})


def test_a_label_split_and_version_change_in_one_epoch() -> None:
    shell = serving(1, labels={"stable": 1}, split={"stable": 1})
    shell.listed("m", 1, 2)
    effects = shell.send(Declared(config=declared(2, labels={"stable": 2}, split={"stable": 3})))
    reads = of(ReadManifest, effects)
    (order,) = of(Load, shell.send(*(r.done(manifest("m", r.version)) for r in reads)))
    before = shell.epoch
    assert (sorted(before.servables["m"]), labels(before)) == ([1], {"stable": 1})
    assert before.splits == {"m": (Share(target="stable", version=1, weight=1),)}
    (publish,) = of(Publish, shell.send(order.done()))
    after = publish.epoch
    assert (sorted(after.servables["m"]), labels(after)) == ([2], {"stable": 2})
    assert after.splits == {"m": (Share(target="stable", version=2, weight=3),)}


def test_a_version_that_a_label_is_still_on_is_not_drained_although_another_is_ready() -> None:
    """Version 2 is ready, so the policy alone would let version 1 go, and the label with it."""
    shell = serving(1, 2, labels={"stable": 1, "canary": 2})
    shell.listed("m", 1, 2, 3)
    new = declared(2, 3, labels={"stable": 3, "canary": 2})
    effects = shell.send(Declared(config=new))
    assert shell.versions() == [1, 2]
    assert labels(shell.epoch) == {"stable": 1, "canary": 2}
    read(shell, effects)
    assert shell.versions() == [2, 3]
    assert labels(shell.epoch) == {"stable": 3, "canary": 2}


def test_a_failed_load_moves_no_label_and_the_status_says_for_what_it_waits() -> None:
    shell = serving(1, labels={"stable": 1}, split={"stable": 1})
    shell.listed("m", 1, 2)
    effects = shell.send(Declared(config=declared(2, labels={"stable": 2}, split={"2": 1})))
    (read_it,) = of(ReadManifest, effects)
    (order,) = of(Load, shell.send(read_it.done(manifest("m", 2))))
    before = shell.epoch
    shell.send(order.done(InvalidArgument("shapes do not fit")))
    after = shell.epoch
    assert (after.servables, after.labels, after.splits) == (
        before.servables, before.labels, before.splits,
    )  # fmt: skip
    status = shell.core.status()["servables"]["m"]
    assert status["labels"] == {"stable": 1}
    assert status["rollout"] == "waits for version 2 (label stable, the split)"


def test_a_named_version_is_loaded_and_kept_whatever_latest_says() -> None:
    found = config("m", policy=VersionPolicy(latest=1))
    pinned = dataclasses.replace(found.servables[0], labels={"stable": 1})
    shell = begun(dataclasses.replace(found, servables=(pinned,)))
    load(shell, 1, 2, 3)
    assert shell.versions() == [1, 3]
    shell.send(Declared(config=found))
    assert shell.versions() == [3]
    assert labels(shell.epoch) == {}


def test_g4_a_label_that_waits_is_refused_with_why_and_an_unknown_one_as_ever() -> None:
    shell = serving(1, 2, labels={"stable": 1})
    shell.send(Declared(config=declared(1, 2, 9, labels={"stable": 1, "next": 9})))
    routes = Routes(shell.epoch)
    assert routes.find("m", label="stable").version == 1
    with pytest.raises(Unavailable, match="label next of m waits for version 9, which is not"):
        routes.find("m", label="next")
    with pytest.raises(InvalidArgument, match="Unrecognized servable version label: nope"):
        routes.find("m", label="nope")


def test_a_first_split_sends_nothing_to_the_newest_alone_when_that_comes_last() -> None:
    shell = begun(declared(1, 2, split={"1": 95, "2": 5}))
    load(shell, 1)
    first = Share(target="1", version=1, weight=95)
    assert list(shell.epoch.splits["m"]) == [first]
    load(shell, 1, 2)
    assert list(shell.epoch.splits["m"]) == [first, Share(target="2", version=2, weight=5)]


def test_shadow_copies_are_published_while_their_candidate_is_there() -> None:
    shadow = Shadow(to="2", percent=10.0, tolerance=1e-5)
    shell = begun(declared(1, 2, shadow=shadow))
    load(shell, 1)
    assert shell.epoch.copies == {}
    load(shell, 1, 2)
    assert shell.epoch.copies == {"m": Copies(version=2, percent=10.0, tolerance=1e-5)}


def test_what_is_in_effect_outlives_the_controller() -> None:
    """The label waits for version 2; a new reign must not take it off version 1 meanwhile."""
    shell = serving(1, labels={"stable": 1})
    shell.listed("m", 1, 2)
    shell.send(Declared(config=declared(2, labels={"stable": 2})))
    kept = decode(of(Persist, shell.effects)[-1].data)
    assert kept.rollouts["m"].labels == {"stable": 1}
    heir = Shell(dataclasses.replace(kept, term=2, seq=0))
    reads = of(ReadManifest, heir.send(Tick()))
    heir.up_holding("device-0", ("m", 1))
    heir.up("shard-0")
    effects = heir.send(*(each.done(manifest("m", each.version)) for each in reads))
    assert (heir.versions(), labels(heir.epoch)) == ([1], {"stable": 1})
    effects += heir.send(Listed(servable="m", versions=(1, 2)))
    read(heir, effects)
    assert (heir.versions(), labels(heir.epoch)) == ([2], {"stable": 2})


def test_a_state_that_has_not_changed_is_not_kept_again() -> None:
    shell = serving(1, 2, labels={"stable": 1})
    assert of(Persist, shell.send(Tick(), Declared(config=shell.core.config or config()))) == []


def test_a_removed_servable_leaves_no_label_behind() -> None:
    shell = serving(1, labels={"stable": 1}, split={"stable": 1})
    effects = shell.send(Declared(config=config()))
    assert (shell.epoch.labels, shell.epoch.splits, shell.epoch.pending) == ({}, {}, {})
    assert of(Unload, effects)


def test_moving_a_label_to_what_serves_already_is_one_epoch_and_loads_nothing() -> None:
    shell = serving(1, 2, labels={"stable": 1})
    effects = shell.send(Declared(config=declared(1, 2, labels={"stable": 2})))
    assert [type(each) for each in effects] == [Persist, Publish]
    assert labels(shell.epoch) == {"stable": 2}


def test_a_state_says_what_was_declared() -> None:
    shell = serving(1, labels={"stable": 1})
    kept = decode(of(Persist, shell.effects)[-1].data)
    assert isinstance(kept, DeclaredState)
    assert kept.config == shell.core.config


def test_without_room_for_two_the_old_version_goes_first_and_its_label_waits() -> None:
    shell = serving(1, labels={"stable": 1}, transition="resource")
    shell.listed("m", 1, 2)
    effects = shell.send(Declared(config=declared(2, labels={"stable": 2}, transition="resource")))
    assert (shell.versions(), labels(shell.epoch)) == ([], {})
    assert shell.epoch.pending == {"m": {"stable": 2}}
    (unload,) = of(Unload, effects)
    assert of(ReadManifest, effects) == []
    read(shell, shell.send(unload.done()))
    assert (shell.versions(), labels(shell.epoch)) == ([2], {"stable": 2})
