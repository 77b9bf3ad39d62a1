"""Edits of the declaration: what comes of each, what is refused, and that nothing is half done.

G numbers are TensorFlow Serving's test cases.
"""

from __future__ import annotations

import json

import msgspec
import pytest

from batching.errors import FailedPrecondition, InvalidArgument, NotFound, ServingError
from cluster.config import Config, ServableConfig, dump, parse
from cluster.control import Event, ListStore
from cluster.editing import changes, digest_of, edited, take_edit
from cluster.edits import (
    Edit,
    Edited,
    LoadVersion,
    LookAgain,
    ReplaceConfig,
    RollBack,
    SetLabel,
    SetSplit,
    Show,
    UnloadVersion,
    View,
    decode_edited,
    encode_edit,
)
from tests.cluster.control_fakes import Shell, begun, config, loading, of

VIEW = View(aspired=(3, 2), complete=(1, 2, 3), available=frozenset({2, 3}))


def declared(text: str = "") -> Config:
    return parse(f"store: s\nservables: [{{name: m, {text}}}, {{name: other}}]")


def after(text: str, edit: Edit, view: View = VIEW) -> ServableConfig | None:
    """What the servable is declared as after an edit; the others must be as they were."""
    before = declared(text)
    found = edited(before, edit, {"m": view})
    assert found is not None
    assert found.servables[-1] == before.servables[1]
    assert (found.store, found.cluster) == (before.store, before.cluster)
    return next((each for each in found.servables if each.name == "m"), None)


#: what is declared, the edit, what is declared then ("" for no servable)
DONE: list[tuple[str, Edit, str]] = [
    ("policy: {specific: [2, 3]}", LoadVersion(servable="m", version=1),
     "policy: {specific: [1, 2, 3]}"),
    ("policy: {latest: 2}", LoadVersion(servable="m", version=3), "policy: {latest: 2}"),
    ("policy: {latest: 2}", LoadVersion(servable="m", version=9, label="next"),
     "policy: {specific: [2, 3, 9]}, labels: {next: 9}"),
    ("policy: {specific: [2, 3]}", LoadVersion(servable="m", version=1, only=True),
     "policy: {specific: [1]}"),
    ("policy: {specific: [2, 3]}", LoadVersion(servable="m"), "policy: {latest: 1}"),
    ("policy: {latest: 2}", LoadVersion(servable="m"), "policy: {latest: 2}"),
    ("policy: {latest: 2}", UnloadVersion(servable="m", version=2), "policy: {specific: [3]}"),
    ("policy: {latest: 2}", UnloadVersion(servable="m"), ""),
    ("policy: {specific: [2, 3, 9]}", UnloadVersion(servable="m", version=9),
     "policy: {specific: [2, 3]}"),
    ("policy: {specific: [2, 3, 9]}", LoadVersion(servable="m", version=1),
     "policy: {specific: [1, 2, 3, 9]}"),
    ("", SetLabel(servable="m", label="a", version=2), "labels: {a: 2}"),
    ("labels: {a: 2, b: 3}", SetLabel(servable="m", label="a", version=3), "labels: {b: 3, a: 3}"),
    ("labels: {a: 2, b: 3}", SetLabel(servable="m", label="a"), "labels: {b: 3}"),
    ("", SetLabel(servable="m", label="a", version=1, when_available=True), "labels: {a: 1}"),
    ("labels: {a: 2}", SetSplit(servable="m", weights={"a": 9, "3": 1}),
     "labels: {a: 2}, split: {a: 9, 3: 1}"),
    ("split: {2: 9, 3: 1}", SetSplit(servable="m", weights={}), ""),
    ("policy: {latest: 2}", LookAgain(servable="m"), "policy: {latest: 2}"),
    ("policy: {latest: 2}, labels: {a: 3, b: 2}", RollBack(servable="m"),
     "policy: {specific: [2]}, labels: {a: 2, b: 2}"),
    ("policy: {latest: 2}", RollBack(servable="m", to=1), "policy: {specific: [1, 2]}"),
    ("split: {2: 9, 3: 1}", RollBack(servable="m"), "policy: {specific: [2]}, split: {2: 10}"),
    ("split: {2: 9, 3: 1}", RollBack(servable="m", to=1),
     "policy: {specific: [1, 2]}, split: {2: 9, 1: 1}"),
    ("labels: {c: 3}, shadow: {to: c}", RollBack(servable="m"),
     "policy: {specific: [2]}, labels: {c: 2}"),
    ("labels: {c: 2}, shadow: {to: c}", RollBack(servable="m"),
     "policy: {specific: [2]}, labels: {c: 2}, shadow: {to: c}"),
]  # fmt: skip


@pytest.mark.parametrize(("before", "edit", "expected"), DONE)
def test_what_comes_of_an_edit(before: str, edit: Edit, expected: str) -> None:
    found = after(before, edit)
    if isinstance(edit, UnloadVersion) and edit.version is None:
        assert found is None
    else:
        assert found == declared(expected).servables[0]


REFUSED: list[tuple[str, Edit, type[ServingError], str]] = [
    ("", SetLabel(servable="m", label="a", version=1), FailedPrecondition,
     "Request to assign label a to version 1 of model m, which is not currently available for"),
    ("labels: {a: 2}", SetLabel(servable="m", label="a", version=1), FailedPrecondition,
     "not currently available for inference"),
    ("", SetLabel(servable="m", label="a", version=9, when_available=True), NotFound,
     "no complete version 9"),
    ("", SetLabel(servable="m", label="7", version=2), InvalidArgument, "m: labels.7: only digits"),
    ("", SetLabel(servable="m", label="a"), NotFound, "m has no label 'a'"),
    ("labels: {a: 2}, split: {a: 1}", SetLabel(servable="m", label="a"), InvalidArgument,
     "split.a: neither a version nor a declared label"),
    ("", SetSplit(servable="m", weights={"1": 1}), FailedPrecondition, "not currently available"),
    ("", SetSplit(servable="m", weights={"x": 1}), InvalidArgument, "split.x: neither"),
    ("", SetSplit(servable="m", weights={"2": 0}), InvalidArgument, "every weight is 0"),
    ("labels: {a: 2}, split: {a: 1}", UnloadVersion(servable="m", version=2), FailedPrecondition,
     "version 2 of m is used by label a and the split"),
    ("", UnloadVersion(servable="m", version=1), NotFound, "not declared; these are: 2, 3"),
    ("", UnloadVersion(servable="no"), NotFound, "'no' is not declared; declared are: m, other"),
    ("labels: {a: 2}", LoadVersion(servable="m", version=1, only=True), InvalidArgument,
     "labels.a: version 2 is not in policy.specific"),
    ("", LoadVersion(servable="m", label="x"), InvalidArgument, "needs a version"),
    ("", LoadVersion(servable="a b"), InvalidArgument, "name: 'a b' is not a name"),
    ("", RollBack(servable="m", to=3), NotFound, "version 3 of m is not older than 3"),
    ("", RollBack(servable="m", to=9), NotFound, "not older than 3 and complete: 1, 2"),
]  # fmt: skip


@pytest.mark.parametrize(("before", "edit", "error", "told"), REFUSED)
def test_what_is_refused(before: str, edit: Edit, error: type[ServingError], told: str) -> None:
    with pytest.raises(error) as caught:
        after(before, edit)
    assert told in caught.value.message


def test_there_is_nothing_older_than_the_first_version() -> None:
    only = View(aspired=(1,), complete=(1,), available=frozenset({1}))
    with pytest.raises(NotFound, match="no version of m that is older than 1"):
        after("", RollBack(servable="m"), only)
    with pytest.raises(FailedPrecondition, match="the only one of m; unload m itself"):
        after("", UnloadVersion(servable="m", version=1), only)
    with pytest.raises(FailedPrecondition, match="no version that could be given up"):
        after("", RollBack(servable="m"), View())


def test_a_newest_version_that_never_loaded_is_rolled_back_as_well() -> None:
    view = View(aspired=(3,), complete=(1, 2, 3), available=frozenset({2}))
    assert (
        after("", RollBack(servable="m"), view) == declared("policy: {specific: [2]}").servables[0]
    )


def test_loading_what_is_not_declared_declares_it() -> None:
    before = declared()
    found = edited(before, LoadVersion(servable="new", version=4), {})
    assert found is not None
    assert found.servables[:2] == before.servables
    assert (
        found.servables[2]
        == parse("store: s\nservables: [{name: new, policy: {specific: [4]}}]").servables[0]
    )


# The whole declaration


def replaced(body: object, expected: str = "") -> Config | None:
    edit = ReplaceConfig(config=json.dumps(body).encode(), expected=expected)
    return edited(declared("replicas: 2"), edit, {})


def test_a_whole_declaration_takes_the_place_of_the_old_and_may_leave_the_cluster_out() -> None:
    found = replaced({"servables": [{"name": "m"}]})
    assert found == parse("store: s\nservables: [{name: m}]")
    assert replaced({"servables": []}) == parse("store: s")


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({}, "servables: is missing"),
        ([], "an object with `servables`"),
        ({"servables": [{"name": "m"}, {"name": "m"}]}, "'m' is declared twice"),
        ({"servables": [{"name": "m", "polcy": {}}]}, "unknown key; did you mean policy"),
    ],
    ids=["nothing", "a list", "G6", "typo"],
)
def test_a_declaration_that_cannot_be_meant_is_refused_whole(body: object, told: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        replaced(body)
    assert told in caught.value.message


def test_who_changes_what_somebody_else_has_changed_meanwhile_is_told() -> None:
    body = {"servables": [{"name": "m"}]}
    assert replaced(body, digest_of(declared("replicas: 2"))) is not None
    with pytest.raises(FailedPrecondition, match="has changed since it was read"):
        replaced(body, digest_of(declared()))


def test_changes_are_told_by_path() -> None:
    before = declared("policy: {latest: 2}, labels: {a: 3}")
    now = parse("store: s\nservables: [{name: m, policy: {specific: [2]}, labels: {a: 2, b: 2}}]")
    told = changes(before, now)
    assert 'm.policy: {"latest": 2} -> {"specific": [2]}' in told
    assert "m.labels.a: 3 -> 2" in told
    assert "m.labels.b: (nothing) -> 2" in told
    assert 'other.policy: {"latest": 1} -> (nothing)' in told
    assert changes(now, now) == ()


# Over the core


def take(shell: Shell, edit: Edit) -> Edited:
    def feed(event: Event) -> None:
        shell.send(event)

    return decode_edited(take_edit(shell.core, encode_edit(edit), feed))


def test_an_edit_changes_the_declaration_and_says_what() -> None:
    shell = begun(config("m"))
    shell.carry_out(loading(shell, 1, 2))
    found = take(shell, RollBack(servable="m"))
    assert found.changes == ('m.policy: {"latest": 1} -> {"specific": [1]}',)
    assert shell.core.config is not None
    assert (found.config, found.digest) == (dump(shell.core.config), digest_of(shell.core.config))
    assert take(shell, Show()) == msgspec.structs.replace(found, changes=())


def test_a_refused_edit_changes_nothing() -> None:
    shell = begun(config("m"))
    before = shell.core.config
    found = take(shell, SetLabel(servable="m", label="a", version=1))
    assert (found.code, found.changes) == ("FAILED_PRECONDITION", ())
    fixed = {"store": "/elsewhere", "servables": []}
    found = take(shell, ReplaceConfig(config=json.dumps(fixed).encode()))
    assert found.code == "FAILED_PRECONDITION"
    assert "store cannot change while the cluster runs" in found.message
    assert shell.core.config == before


def test_what_is_no_edit_is_refused() -> None:
    shell = begun(config("m"))
    found = decode_edited(take_edit(shell.core, b"\xc1", lambda _: None))
    assert (found.code, found.message[:11]) == ("INVALID_ARGUMENT", "not an edit")


def test_before_anything_is_declared_there_is_nothing_to_edit() -> None:
    shell = Shell()
    assert take(shell, Show()) == Edited()
    assert take(shell, RollBack(servable="m")).code == "FAILED_PRECONDITION"


def test_a_load_looks_into_the_store_at_once_and_tries_what_failed_again() -> None:
    shell = begun(config("m"))
    (order,) = loading(shell, 1)
    shell.send(order.done(InvalidArgument("shapes do not fit")))
    assert shell.states() == {1: ("END", "INVALID_ARGUMENT")}
    shell.effects.clear()
    take(shell, LoadVersion(servable="m", version=1))
    assert of(ListStore, shell.effects) == [ListStore(servable="m")]
    assert shell.states() == {1: ("START", "OK")}
