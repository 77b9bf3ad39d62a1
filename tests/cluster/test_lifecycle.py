"""The table of a version's life, held against what the rest of the system promises about it."""

from __future__ import annotations

import itertools
import re

import pytest

from cluster.lifecycle import (
    PUBLIC,
    TABLE,
    IllegalTransition,
    Lifecycle,
    State,
    Step,
    diagram,
    public_state,
)

ORDINARY = (Step.RESERVE, Step.LOAD, Step.WARM, Step.SERVE, Step.DRAIN, Step.UNLOAD, Step.FINISH)


def reached(start: State) -> set[State]:
    """States that can follow, near or far."""
    found: set[State] = set()
    front = {start}
    while front:
        front = {after for (before, _), after in TABLE.items() if before in front} - found
        found |= front
    return found


def test_the_ordinary_life_passes_every_state_once() -> None:
    life = Lifecycle("m:1")
    states = [life.state] + [life.take(step, 0.0) for step in ORDINARY]
    assert states == [
        State.NEW, State.RESERVED, State.LOADING, State.WARMING, State.AVAILABLE,
        State.DRAINING, State.UNLOADING, State.END,
    ]  # fmt: skip


def test_the_public_story_is_that_of_tensorflow_serving() -> None:
    """E12: START, LOADING, AVAILABLE, UNLOADING, END, each once and in this order."""
    life = Lifecycle("m:1")
    states = [life.state] + [life.take(step, 0.0) for step in ORDINARY]
    shown = [name for name, _ in itertools.groupby(map(public_state, states))]
    assert shown == ["START", "LOADING", "AVAILABLE", "UNLOADING", "END"]


def test_a_failed_load_goes_from_loading_to_end() -> None:
    """E13."""
    life = Lifecycle("m:1")
    for step in (Step.RESERVE, Step.LOAD, Step.FAIL):
        life.take(step, 0.0)
    assert (life.state, public_state(life.state)) == (State.ERROR, "END")
    assert life.take(Step.FINISH, 0.0) is State.END


@pytest.mark.parametrize(
    ("state", "step"),
    [pair for pair in itertools.product(State, Step) if pair not in TABLE],
    ids=lambda each: str(each),
)
def test_a_step_outside_the_table_is_refused_and_changes_nothing(state: State, step: Step) -> None:
    life = Lifecycle("m:1")
    life.state = state
    assert not life.may(step)
    with pytest.raises(IllegalTransition):
        life.take(step, 0.0)
    assert life.state is state
    assert life.story == ()


def test_the_refusal_tells_the_story() -> None:
    life = Lifecycle("m:1")
    life.take(Step.RESERVE, 1.5, "it fits")
    with pytest.raises(IllegalTransition) as caught:
        life.take(Step.SERVE, 2.0)
    assert str(caught.value) == (
        "m:1: no step serve from RESERVED; before that:\n  1.500 NEW -reserve-> RESERVED (it fits)"
    )


def test_the_story_is_bounded() -> None:
    life = Lifecycle("m:1")
    for step in ORDINARY[:4]:
        life.take(step, 0.0)
    for at in range(100):
        life.take(Step.DRAIN, float(at))
        life.take(Step.SERVE, float(at))
    assert len(life.story) == 32
    assert life.story[-1].startswith("99.000 DRAINING -serve-> AVAILABLE")


def test_any_state_but_the_end_can_fail_and_every_life_can_end() -> None:
    for state in State:
        assert ((state, Step.FAIL) in TABLE) == (state not in (State.END, State.ERROR))
        assert State.END in reached(state) or state is State.END


def test_nothing_follows_the_end_and_error_only_ends() -> None:
    assert reached(State.END) == set()
    assert reached(State.ERROR) == {State.END}


def test_what_was_available_is_never_unloaded_without_draining() -> None:
    assert (State.AVAILABLE, Step.UNLOAD) not in TABLE
    into = {before for (before, _), after in TABLE.items() if after is State.UNLOADING}
    assert State.AVAILABLE not in into


def test_every_state_has_a_public_name() -> None:
    assert PUBLIC.keys() == set(State)
    assert set(PUBLIC.values()) == {"START", "LOADING", "AVAILABLE", "UNLOADING", "END"}


def test_the_diagram_is_the_table() -> None:
    drawn = set(re.findall(r"^    (\w+) --> (\w+): (\w+)$", diagram(), flags=re.MULTILINE))
    assert drawn == {
        (str(before), str(after), str(step)) for (before, step), after in TABLE.items()
    }
    assert diagram().startswith("stateDiagram-v2\n    [*] --> NEW\n")
