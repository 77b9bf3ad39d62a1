"""The version policy, by table: one row, one sentence."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import VersionPolicy
from cluster.lifecycle import State
from cluster.versions import (
    TRANSITIONS,
    Action,
    ActionKind,
    VersionSnapshot,
    aspired,
    availability_preserving,
    resource_preserving,
)

A, D, L, N, E = State.AVAILABLE, State.DRAINING, State.LOADING, State.NEW, State.END
Row = tuple[int, State | None, bool, bool]


def snapshot(row: Row) -> VersionSnapshot:
    version, state, is_aspired, ready = row
    return VersionSnapshot(version=version, state=state, aspired=is_aspired, ready=ready)


@pytest.mark.parametrize(
    ("policy", "complete", "expected"),
    [
        (VersionPolicy(latest=1), (42, 17), (42,)),
        (VersionPolicy(latest=2), (42, 17, 3), (42, 17)),
        (VersionPolicy(latest=5), (17,), (17,)),
        (VersionPolicy(latest=1), (), ()),
        (VersionPolicy(all=True), (17, 42), (42, 17)),
        (VersionPolicy(specific=(17,)), (42, 17), (17,)),
        (VersionPolicy(specific=(17, 99)), (42, 17), (17,)),
        (VersionPolicy(specific=(99,)), (42, 17), ()),
        (VersionPolicy(latest=1), (7, 7, 7), (7,)),
    ],
)
def test_g19_aspired_versions(
    policy: VersionPolicy, complete: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert aspired(policy, complete) == expected


#: (version, state, aspired, ready) ... -> action
TABLE: list[tuple[str, list[Row], tuple[str, int] | None]] = [
    ("nothing is known", [], None),
    ("the first version is loaded", [(1, None, True, False)], ("load", 1)),
    ("the highest is loaded first", [(1, None, True, False), (2, None, True, False)], ("load", 2)),
    ("a load under way is left alone", [(1, L, True, False)], None),
    ("another is loaded beside it", [(1, None, True, False), (2, L, True, False)], ("load", 1)),
    ("what serves and is aspired stays", [(1, A, True, True)], None),
    ("a new one is loaded beside it", [(1, A, False, True), (2, None, True, False)], ("load", 2)),
    ("the old stays while the new loads", [(1, A, False, True), (2, L, True, False)], None),
    ("the old goes when the new is ready", [(1, A, False, True), (2, A, True, True)], ("drain", 1)),
    ("not while the new has lost a part", [(1, A, False, True), (2, A, True, False)], None),
    ("E8: of two old ones the lower goes while the new one fails",
     [(0, A, False, True), (1, A, False, True), (7, E, True, False)], ("drain", 0)),
    ("E8: the last stays", [(1, A, False, True), (7, E, True, False)], None),
    ("a broken old one goes before a whole one",
     [(1, A, False, True), (2, A, False, False), (3, L, True, False)], ("drain", 2)),
    ("the last goes even broken only when another serves",
     [(2, A, False, False), (3, L, True, False)], None),
    ("E6: an older version is loaded, then the newer drained",
     [(0, None, True, False), (1, A, False, True)], ("load", 0)),
    ("E6: and then", [(0, A, True, True), (1, A, False, True)], ("drain", 1)),
    ("E7: unload before load",
     [(1, A, False, True), (2, A, True, True), (3, None, True, False)], ("drain", 1)),
    ("a load that is no longer wanted is cancelled",
     [(1, A, True, True), (2, L, False, False)], ("cancel", 2)),
    ("also before it has begun to load", [(1, N, False, False)], ("cancel", 1)),
    ("E10: what drains and is aspired again serves again",
     [(1, D, True, False), (2, A, False, True)], ("revive", 1)),
    ("a failed one that may not be tried again is left", [(1, E, True, False)], None),
    ("latest 2: the third oldest goes at once",
     [(1, A, False, True), (2, A, True, True), (3, L, True, False)], ("drain", 1)),
]  # fmt: skip


@pytest.mark.parametrize(("sentence", "rows", "expected"), TABLE, ids=[row[0] for row in TABLE])
def test_the_policy(sentence: str, rows: list[Row], expected: tuple[str, int] | None) -> None:
    action = availability_preserving([snapshot(row) for row in rows])
    assert action == (
        None if expected is None else Action(kind=ActionKind(expected[0]), version=expected[1])
    )


#: The same for the policy that has no room for two.
RESOURCE: list[tuple[str, list[Row], tuple[str, int] | None]] = [
    ("nothing is known", [], None),
    ("the first version is loaded", [(1, None, True, False)], ("load", 1)),
    ("the old one goes first", [(1, A, False, True), (2, None, True, False)], ("drain", 1)),
    ("the new one waits while it drains", [(1, D, False, False), (2, None, True, False)], None),
    ("and while it is being let go",
     [(1, State.UNLOADING, False, False), (2, None, True, False)], None),
    ("also of what failed", [(1, State.ERROR, False, False), (2, None, True, False)], None),
    ("then it is loaded", [(1, E, False, False), (2, None, True, False)], ("load", 2)),
    ("all old ones go, the lowest first",
     [(1, A, False, True), (2, A, False, True), (3, None, True, False)], ("drain", 1)),
    ("what is aspired and serves stays", [(1, A, True, True), (2, None, True, False)], ("load", 2)),
    ("with nothing to come, what serves stays", [(1, A, False, True)], None),
    ("also when what should come has failed", [(1, A, False, True), (2, E, True, False)], None),
    ("a load that is no longer wanted is cancelled",
     [(1, None, True, False), (2, L, False, False)], ("cancel", 2)),
    ("what drains and is aspired again serves again",
     [(1, D, True, False), (2, None, False, False)], ("revive", 1)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("sentence", "rows", "expected"), RESOURCE, ids=[row[0] for row in RESOURCE]
)
def test_the_policy_that_unloads_first(
    sentence: str, rows: list[Row], expected: tuple[str, int] | None
) -> None:
    action = resource_preserving([snapshot(row) for row in rows])
    assert action == (
        None if expected is None else Action(kind=ActionKind(expected[0]), version=expected[1])
    )


def test_e4_all_versions_of_a_servable_that_is_removed_go_lowest_first() -> None:
    rows = [snapshot((1, A, False, True)), snapshot((2, A, False, True))]
    for transition in TRANSITIONS.values():
        assert transition(rows, removed=True) == Action(kind=ActionKind.DRAIN, version=1)
        assert transition(rows[1:], removed=True) == Action(kind=ActionKind.DRAIN, version=2)


rows_of_servables = st.lists(
    st.tuples(st.integers(1, 6), st.sampled_from([None, *State]), st.booleans(), st.booleans()).map(
        lambda row: (row[0], row[1], row[2], row[3] and row[1] is A)
    ),
    max_size=6,
    unique_by=lambda row: row[0],
)


@given(rows_of_servables)
def test_the_last_ready_version_is_never_drained_and_the_policy_comes_to_rest(
    rows: list[Row],
) -> None:
    table = {row[0]: row for row in rows}
    for _ in itertools.count():
        action = availability_preserving([snapshot(row) for row in table.values()])
        if action is None:
            break
        version, state, is_aspired, _ = table[action.version]
        if action.kind is ActionKind.DRAIN:
            assert any(row[3] for row in table.values() if row[0] != version)
            assert not is_aspired
        after = {
            ActionKind.LOAD: N,
            ActionKind.CANCEL: State.UNLOADING,
            ActionKind.DRAIN: D,
            ActionKind.REVIVE: A,
        }[action.kind]
        assert state is not after
        table[version] = (version, after, is_aspired, action.kind is ActionKind.REVIVE)
        assert _ < 20


@given(rows_of_servables)
def test_unloading_first_never_has_something_new_beside_something_on_its_way_out(
    rows: list[Row],
) -> None:
    table = {row[0]: row for row in rows}
    leaving = {row[0] for row in rows if not row[2] and row[1] in (A, D, State.UNLOADING)}
    for _ in range(30):
        action = resource_preserving([snapshot(row) for row in table.values()])
        if action is None:
            break
        version, _, is_aspired, _ = table[action.version]
        if action.kind is ActionKind.LOAD:
            assert not leaving & {n for n, row in table.items() if row[1] is not E}
        # Whatever goes is gone at once; the rest is as the policy wants it.
        after = {ActionKind.LOAD: A, ActionKind.REVIVE: A}.get(action.kind, E)
        table[version] = (version, after, is_aspired, after is A)
    else:
        raise AssertionError("it does not come to rest")


@given(rows_of_servables)
def test_the_order_of_snapshots_does_not_matter(rows: list[Row]) -> None:
    snapshots = [snapshot(row) for row in rows]
    for transition in TRANSITIONS.values():
        assert transition(snapshots) == transition(snapshots[::-1])
