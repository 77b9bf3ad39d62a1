"""Declarations, one after the other: TensorFlow Serving's cases G, and its users' pains."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest

from batching.errors import DataLoss, Unavailable
from cluster.control import Effect, Event, Listed, ListStore, Load, Publish, ReadManifest, Unload
from cluster.editing import take_edit
from cluster.edits import Edited, ReplaceConfig, decode_edited, encode_edit
from tests.cluster.control_fakes import Shell, begun, config, manifest, of


class Reloading:
    """A shell whose declaration is replaced, and whose store has what it is told."""

    def __init__(self, *names: str) -> None:
        self.shell: Shell = begun(config())
        self.stored = {name: [1] for name in names}
        self.broken: set[str] = set()

    def reload(self, *servables: dict[str, Any]) -> Edited:
        effects: list[Effect] = []

        def feed(event: Event) -> None:
            effects.extend(self.shell.send(event))

        body = json.dumps({"servables": servables}).encode()
        edited = decode_edited(
            take_edit(self.shell.core, encode_edit(ReplaceConfig(config=body)), feed)
        )
        self.answer(effects)
        return edited

    def look(self) -> None:
        """Time passes, and the store is looked into again."""
        self.answer(self.shell.sleep(2.0))

    def answer(self, effects: Iterable[Effect]) -> None:
        """Answer everything until nothing is asked for."""
        waiting = list(effects)
        while waiting:
            effect = waiting.pop(0)
            match effect:
                case ListStore():
                    done: Event = effect.done(tuple(self.stored.get(effect.servable, ())))
                case ReadManifest() if effect.servable in self.broken:
                    done = effect.failed(DataLoss("half a manifest"))
                case ReadManifest():
                    done = effect.done(manifest(effect.servable, effect.version))
                case Load() | Unload():
                    done = effect.done()
                case _:
                    continue
            waiting += self.shell.send(done)

    @property
    def served(self) -> dict[str, list[int]]:
        return {name: sorted(found) for name, found in self.shell.epoch.servables.items()}


def named(name: str, **fields: object) -> dict[str, Any]:
    return {"name": name, **fields}


def test_g11_what_is_left_out_goes_and_g12_comes_back() -> None:
    reloading = Reloading("a", "b")
    reloading.reload(named("a"), named("b"))
    assert reloading.served == {"a": [1], "b": [1]}
    reloading.reload(named("b"))
    assert reloading.served == {"b": [1]}
    reloading.reload(named("a"), named("b"))
    assert reloading.served == {"a": [1], "b": [1]}


def test_g21_what_is_in_both_is_never_without_its_version() -> None:
    reloading = Reloading("a", "b", "c")
    reloading.reload(named("a"), named("b"))
    reloading.shell.effects.clear()
    reloading.reload(named("b"), named("c"))
    assert reloading.served == {"b": [1], "c": [1]}
    for publish in of(Publish, reloading.shell.effects):
        assert sorted(publish.epoch.servables["b"]) == [1]
    assert "b" not in {each.servable for each in of(Unload, reloading.shell.effects)}


def test_g13_versions_follow_what_is_declared() -> None:
    reloading = Reloading("a")
    reloading.stored["a"] = [1, 2, 3]
    for policy, expected in (
        ({"all": True}, [1, 2, 3]),
        ({"latest": 2}, [2, 3]),
        ({"specific": [1]}, [1]),
        ({"latest": 1}, [3]),
    ):
        reloading.reload(named("a", policy=policy))
        assert reloading.served == {"a": expected}


def test_a_label_and_the_version_that_it_is_for_come_in_one_reload() -> None:
    """There it fails without a flag, since labels are set before loads."""
    reloading = Reloading("a")
    reloading.reload(named("a", labels={"stable": 1}))
    reloading.stored["a"] = [1, 2]
    reloading.look()
    assert reloading.served == {"a": [1, 2]}
    reloading.reload(named("a", policy={"specific": [2]}, labels={"stable": 2}))
    assert reloading.served == {"a": [2]}
    assert reloading.shell.epoch.labels == {"a": {"stable": 2}}


def test_one_bad_servable_holds_up_no_other() -> None:
    """There one path that cannot be read ends the whole poll, or the start."""
    reloading = Reloading("bad", "good")
    reloading.broken.add("bad")
    reloading.reload(named("bad", labels={"x": 1}), named("missing"), named("good"))
    assert reloading.served == {"good": [1]}
    status = reloading.shell.core.status()["servables"]
    assert status["missing"]["listing"] == "the store lists no complete version"
    (row,) = status["bad"]["versions"]
    assert (row["state"], row["error_message"]) == ("END", "half a manifest")
    assert status["bad"]["rollout"] == "waits for version 1 (label x)"


@pytest.mark.parametrize("error", [None, Unavailable("away"), OSError("no such file")])
def test_g20_an_empty_or_failing_listing_takes_neither_versions_nor_labels_away(
    error: Exception | None,
) -> None:
    reloading = Reloading("a")
    reloading.reload(named("a", labels={"stable": 1}, split={"stable": 1}))
    before = reloading.shell.epoch
    ask = ListStore(servable="a")
    event: Listed = ask.done(()) if error is None else ask.failed(error)
    effects = reloading.shell.send(event)
    assert of(Unload, effects) == []
    after = reloading.shell.epoch
    assert (after.servables, after.labels, after.splits) == (
        before.servables, before.labels, before.splits,
    )  # fmt: skip


def test_g22_the_time_between_two_looks_may_change() -> None:
    """There it may not."""
    reloading = Reloading("a")
    reloading.reload(named("a"))
    declared = json.loads(reloading.reload(named("a")).config)
    declared["cluster"]["poll_s"] = 30.0
    edit = ReplaceConfig(config=json.dumps(declared).encode())
    found = decode_edited(
        take_edit(reloading.shell.core, encode_edit(edit), lambda e: reloading.answer(
            reloading.shell.send(e)
        ))
    )  # fmt: skip
    assert found.changes == ("cluster.poll_s: 2.0 -> 30.0",)
    reloading.look()
    reloading.stored["a"] = [1, 2]
    reloading.look()
    assert reloading.served == {"a": [1]}
    reloading.answer(reloading.shell.sleep(30.0))
    assert reloading.served == {"a": [2]}
