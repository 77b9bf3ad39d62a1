"""Which version answers: what may be declared, and when a change takes effect."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import ConfigInvalid, parse
from cluster.traffic import Rollout, Shadow, settle


@pytest.mark.parametrize(
    ("declared", "told"),
    [
        ("labels: {stable: 3}", "labels.stable: version 3 is not in policy.specific (1, 2)"),
        ("labels: {'1': 1}", "labels.1: only digits"),
        ("labels: {stable: x}", "labels.stable: input should be a valid integer"),
        ("labels: {stable: 0}", "labels.stable: a version is at least 1"),
        ("labels: {a/b: 1}", "labels.a/b: is not a label"),
        ("split: {x: 1}", "split.x: neither a version nor a declared label; labels are: none"),
        ("split: {7: 1}", "split.7: version 7 is not in policy.specific"),
        ("split: {2: 0}", "split: every weight is 0"),
        ("split: {1: 3, 2: -1}", "split.2: a weight is from 0"),
        ("split: {'02': 1}", "split.02: a version is written in decimal"),
        ("split: {'9999999999999999999': 1}", "split.9999999999999999999: a version is written"),
        ("shadow: {to: z}", "shadow.to: neither a version nor a declared label"),
        ("shadow: {to: '1', percent: 0}", "shadow.percent: must be above 0"),
        ("shadow: {to: '1', tolerance: -1}", "shadow.tolerance: must be at least 0"),
        ("shadow: {too: '1'}", "shadow.too: unknown key; did you mean to"),
        (
            "transition: slow",
            "transition: input should be 'availability', 'resource' or 'shard-rolling'",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_path(declared: str, told: str) -> None:
    text = f"store: s\nservables:\n  - name: m\n    policy: {{specific: [1, 2]}}\n    {declared}"
    with pytest.raises(ConfigInvalid) as caught:
        parse(text)
    assert f"servables[0].{told}" in str(caught.value)


def test_bounds_of_labels_and_targets() -> None:
    many = ", ".join(f"l{number}: 1" for number in range(65))
    with pytest.raises(ConfigInvalid, match=r"labels: at most 64, got 65"):
        parse(f"store: s\nservables: [{{name: m, labels: {{{many}}}}}]")
    many = ", ".join(f"{number}: 1" for number in range(1, 18))
    with pytest.raises(ConfigInvalid, match=r"split: at most 16, got 17"):
        parse(f"store: s\nservables: [{{name: m, split: {{{many}}}}}]")


def test_a_version_in_digits_needs_no_label() -> None:
    text = "store: s\nservables: [{name: m, policy: {all: true}, split: {2: 5, 10: 1}}]"
    assert parse(text).servables[0].rollout.versions == {2, 10}


def rollout(labels: str = "", split: str = "", shadow: str = "") -> Rollout:
    """From ``"a1 b2"``, ``"a9 2:1"`` and a target."""
    return Rollout(
        labels={word[0]: int(word[1:]) for word in labels.split()},
        split={name: int(weight) for name, weight in (word.split("=") for word in split.split())},
        shadow=Shadow(to=shadow) if shadow else None,
    )


#: sentence, declared, in effect, ready versions, what is in effect then
SETTLED: list[tuple[str, Rollout, Rollout, set[int], Rollout]] = [
    ("nothing is declared", rollout(), rollout(), {1}, rollout()),
    ("G1: labels of available versions", rollout("a1 b2"), rollout(), {1, 2}, rollout("a1 b2")),
    ("a first label does not wait for another's version",
     rollout("a1 b2"), rollout(), {1}, rollout("a1")),
    ("G4: a label stays while its next version is not there",
     rollout("a2"), rollout("a1"), {1}, rollout("a1")),
    ("and moves when it is", rollout("a2"), rollout("a1"), {1, 2}, rollout("a2")),
    ("two labels move together", rollout("a2 b3"), rollout("a1 b2"), {1, 2}, rollout("a1 b2")),
    ("or not at all", rollout("a2 b3"), rollout("a1 b2"), {2, 3}, rollout("a2 b3")),
    ("a label is taken away together with a move",
     rollout("a2"), rollout("a1 b1"), {1}, rollout("a1 b1")),
    ("a label whose version has gone is gone", rollout("a2"), rollout("a1"), set(), rollout()),
    ("and begins anew", rollout("a2"), rollout("a1"), {2}, rollout("a2")),
    ("a split changes when all its versions are there",
     rollout(split="2=9 3=1"), rollout(split="1=9 2=1"), {1, 2}, rollout(split="1=9 2=1")),
    ("a first split begins with those that are there",
     rollout(split="1=9 2=1"), rollout(), {1}, rollout(split="1=9 2=1")),
    ("a split goes with nothing to wait for",
     rollout(), rollout(split="1=9 2=1"), {1, 2}, rollout()),
    ("a label and the split that names it move together",
     rollout("a1 b2", "a=9 b=1"), rollout("a1", "a=1"), {1}, rollout("a1", "a=1")),
    ("shadow copies begin when the candidate is there",
     rollout("a1", shadow="2"), rollout("a1"), {1}, rollout("a1")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("sentence", "declared", "current", "ready", "expected"), SETTLED, ids=[r[0] for r in SETTLED]
)
def test_settling(
    sentence: str, declared: Rollout, current: Rollout, ready: set[int], expected: Rollout
) -> None:
    assert settle(declared, current, ready, ready) == expected


rollouts = st.builds(
    Rollout,
    labels=st.dictionaries(st.sampled_from("abc"), st.integers(1, 4), max_size=3),
    split=st.dictionaries(st.sampled_from("1234"), st.integers(1, 9), max_size=3),
)
some_versions = st.sets(st.integers(1, 4))


@given(rollouts, rollouts, some_versions, some_versions)
def test_settling_is_idempotent_and_never_names_what_is_not_there(
    declared: Rollout, current: Rollout, ready: set[int], more: set[int]
) -> None:
    available = ready | more
    found = settle(declared, current, ready, available)
    assert settle(declared, found, ready, available) == found
    assert set(found.labels.values()) <= available
    for label, version in current.labels.items():
        # Until all is there, what was in effect is as it was.
        if version in available and found != declared:
            assert found.labels[label] == version
    if declared.versions <= ready:
        assert found == declared
