"""The controller core with many servables: what is saved when hardly anything changes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.control import ListStore, Publish
from cluster.lifecycle import State
from cluster.signals import Tick
from cluster.versions import TRANSITIONS, VersionSnapshot
from cluster.world import listing_at
from tests.cluster.control_fakes import Shell, begun, config, of

NAMES = [f"m{at}" for at in range(8)]


def serving() -> Shell:
    shell = begun(config(*NAMES, shards=0))
    for name in NAMES:
        shell.serve(name, 1)
    return shell


def test_all_servables_are_listed_at_the_same_instants() -> None:
    shell = serving()
    shell.sleep(2.0)
    for name in NAMES:
        shell.now += 0.01  # each listing takes its time
        shell.listed(name, 1)
    asked = []
    for _ in range(3):
        at = shell.core.next_wakeup()
        assert at is not None
        shell.now = at
        asked.append([each.servable for each in of(ListStore, shell.send(Tick()))])
        shell.send(*(ListStore(servable=name).done((1,)) for name in asked[-1]))
    assert asked == [sorted(NAMES)] * 3


def test_a_listing_that_says_nothing_new_asks_for_nothing_and_the_next_is_in_time() -> None:
    shell = serving()
    shell.sleep(2.0)
    [before] = of(Publish, shell.effects)[-1:]
    assert shell.listed("m0", 1) == []
    assert of(Publish, shell.effects)[-1] is before
    assert [each.servable for each in of(ListStore, shell.sleep(2.0))] == ["m0"]


def test_a_listing_that_says_something_new_is_acted_upon_at_once() -> None:
    shell = serving()
    assert shell.listed("m0", 1, 2)
    failed = shell.send(ListStore(servable="m1").failed(OSError("no route")))
    assert failed == []
    told = shell.core.status()["servables"]
    assert told["m1"]["listing"] != "ok"
    assert [row["aspired"] for row in told["m0"]["versions"]] == [True, False]


@given(now=st.floats(0, 1e7), poll_s=st.sampled_from([0.05, 0.1, 1 / 3, 1.0, 2.0, 60.0]))
def test_a_listing_is_later_by_a_moment_at_least_and_by_a_period_at_most(
    now: float, poll_s: float
) -> None:
    at = listing_at(poll_s, now)
    assert 0.04 * poll_s < at - now < 1.06 * poll_s
    # What is listed within a moment of its instant is listed next a period later.
    again = listing_at(poll_s, at + 0.01 * poll_s)
    assert again - at == pytest.approx(poll_s, rel=1e-3, abs=1e-6)
    assert listing_at(poll_s, at - 0.01 * poll_s) == again


@pytest.mark.parametrize("transition", sorted(TRANSITIONS))
@given(data=st.data())
def test_no_policy_has_anything_to_do_for_a_servable_at_rest(
    transition: str, data: st.DataObject
) -> None:
    numbers = data.draw(st.sets(st.integers(1, 5), max_size=4))
    actors = st.frozensets(st.sampled_from(["a", "b"]))
    snapshots = [
        VersionSnapshot(
            version=number,
            state=State.AVAILABLE,
            aspired=True,
            ready=data.draw(st.booleans()),
            held=data.draw(st.booleans()),
            parts=(("a", "b"),),
            live=data.draw(actors),
        )
        for number in numbers
    ]
    assert TRANSITIONS[transition](snapshots) is None  # type: ignore[index]


def test_what_is_at_rest_goes_on_as_soon_as_it_is_declared_otherwise() -> None:
    shell = serving()
    assert all(each.is_at_rest for each in shell.core._world.servables.values())
    shell.listed("m0", 1, 2)
    servables = shell.core._world.servables
    assert [name for name, each in servables.items() if not each.is_at_rest] == ["m0"]
