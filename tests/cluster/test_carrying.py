"""Effects go in order, and none rests on a state that was not kept."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batching.errors import DataLoss, Unavailable
from cluster.carrying import Carrying, claim_when_there
from cluster.signals import Effect, ListStore, Persist


class Shell:
    """Notes what is carried out; states are kept when the test says so."""

    def __init__(self) -> None:
        self.done: list[Effect] = []
        self.keeping: list[Persist] = []
        self.back: list[Effect] = []
        self.carrying = Carrying(self.done.append, self.keeping.append, self._put_back)

    def _put_back(self, effects: Sequence[Effect]) -> None:
        self.back += effects


def other(number: int) -> Effect:
    return ListStore(servable=f"s{number}", source=None)


def state(seq: int) -> Persist:
    return Persist(term=1, seq=seq, data=b"")


def test_what_follows_a_state_waits_until_it_is_kept() -> None:
    shell = Shell()
    shell.carrying.take([other(1), state(1), other(2), state(2), other(3)])
    shell.carrying.take([other(4)])
    assert (shell.done, shell.keeping) == ([other(1)], [state(1)])
    shell.carrying.kept()
    assert (shell.done, shell.keeping) == ([other(1), other(2)], [state(1), state(2)])
    shell.carrying.kept()
    assert shell.done == [other(n) for n in (1, 2, 3, 4)]


def test_what_rests_on_a_state_that_was_not_kept_goes_back_with_it() -> None:
    shell = Shell()
    shell.carrying.take([state(1), other(1)])
    shell.carrying.take([other(2), state(2)])
    shell.carrying.not_kept()
    assert shell.back == [state(1), other(1), other(2), state(2)]
    assert shell.done == []
    shell.carrying.take([other(3)])
    assert shell.done == [other(3)]


@given(st.lists(st.one_of(st.lists(st.booleans(), max_size=4), st.sampled_from(["kept", "lost"]))))
def test_nothing_is_lost_doubled_or_out_of_order(steps: list[list[bool] | str]) -> None:
    """A step is a batch of effects (true for a state), or the end of the keeping of a state."""
    shell = Shell()
    given_: list[Effect] = []
    ended = 0
    for step in [*steps, *(["kept"] * len(steps) * 4)]:
        if isinstance(step, list):
            batch = [
                state(len(given_) + i) if is_state else other(len(given_) + i)
                for i, is_state in enumerate(step)
            ]
            given_ += batch
            shell.carrying.take(batch)
        elif len(shell.keeping) > ended:
            ended += 1
            if step == "kept":
                shell.carrying.kept()
            else:
                shell.carrying.not_kept()
        assert len(shell.keeping) - ended in (0, 1), "one state at a time"
    kept = [each for each in shell.keeping if each not in shell.back]
    carried = [each for each in given_ if each in shell.done or each in kept]
    assert carried == sorted([*shell.done, *kept], key=given_.index)
    assert [each for each in given_ if each in shell.back] == shell.back
    assert len(carried) + len(shell.back) == len(given_)
    assert shell.done == [each for each in given_ if each in shell.done]


class Away:
    """A store that answers only after so many tries."""

    def __init__(self, errors: list[Exception]) -> None:
        self.errors = errors

    def next_term(self, cluster: str) -> int:
        if self.errors:
            raise self.errors.pop(0)
        return 7

    def latest_state(self, cluster: str) -> None:
        return None

    def put_state(self, cluster: str, term: int, seq: int, data: bytes) -> None:
        pass


def test_a_reign_begins_when_the_store_is_there() -> None:
    slept: list[float] = []
    store = Away([Unavailable("away"), OSError("away"), *[Unavailable("away")] * 5])
    assert claim_when_there(store, "main", slept.append).term == 7
    assert slept == [0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0]


def test_a_reign_does_not_wait_for_what_waiting_does_not_change() -> None:
    with pytest.raises(DataLoss):
        claim_when_there(Away([DataLoss("broken")]), "main", lambda _: None)
