"""The books of ``faults``: what counts as lost, twice, mixed, of the dead, and as recovered."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.faults_ledger import (
    Account,
    Attempt,
    Bounds,
    Ending,
    Phase,
    account,
    answered_twice,
)

BOUNDS = Bounds(deadline_s=2.0, grace_s=0.5)
PHASE = Phase(fault="device", struck=10.0, until=20.0)


def attempt(
    request: int,
    sent: float,
    ending: Ending = Ending.ANSWER,
    *,
    took: float = 0.1,
    door: str = "direct",
    detail: str = "",
    versions: tuple[int, ...] = (1, 1),
    life: int = 0,
) -> Attempt:
    return Attempt(
        request=request,
        door=door,
        sent=sent,
        ended=sent + took,
        ending=ending,
        detail=detail,
        told=request if ending is Ending.ANSWER else None,
        versions=versions if ending is Ending.ANSWER else (),
        life=life,
    )


def one(*attempts: Attempt, phase: Phase = PHASE) -> Account:
    [found] = account(attempts, [phase], BOUNDS)
    return found


def test_answers_alone_mean_that_clients_saw_nothing() -> None:
    found = one(attempt(1, 11.0), attempt(2, 12.0, took=0.3))
    assert (found.answered, found.errors, found.lost) == (2, {}, 0)
    assert found.back_s == 0.0
    assert found.slowest_s == pytest.approx(0.3)
    assert found.recovered


def test_a_typed_error_is_an_end_and_is_told_by_its_code() -> None:
    found = one(
        attempt(1, 11.0, Ending.ERROR, detail="UNAVAILABLE"),
        attempt(2, 11.5, Ending.ERROR, detail="UNAVAILABLE"),
        attempt(3, 11.6, Ending.ERROR, detail="DEADLINE_EXCEEDED", took=2.0),
        attempt(4, 12.0),
    )
    assert found.errors == {"UNAVAILABLE": 2, "DEADLINE_EXCEEDED": 1}
    assert found.lost == 0
    assert found.back_s == pytest.approx(2.1)


@pytest.mark.parametrize(("took", "lost"), [(2.5, 0), (2.6, 1)])
@pytest.mark.parametrize("ending", [Ending.ANSWER, Ending.ERROR])
def test_an_end_that_comes_too_late_is_a_loss(ending: Ending, took: float, lost: int) -> None:
    assert one(attempt(1, 10.5, ending, took=took), attempt(2, 18.0)).lost == lost


def test_a_broken_connection_is_a_loss_unless_the_fault_breaks_that_door() -> None:
    attempts = (attempt(1, 11.0, Ending.RESET), attempt(1, 11.5))
    unexcused = one(*attempts)
    assert (unexcused.lost, unexcused.broken) == (1, 0)
    excused = one(*attempts, phase=replace(PHASE, breaks=frozenset({"direct"})))
    assert (excused.lost, excused.broken) == (0, 1)
    other = one(*attempts, phase=replace(PHASE, breaks=frozenset({"serve"})))
    assert other.lost == 1


@pytest.mark.parametrize("ending", [Ending.SILENT, Ending.ANSWER])
def test_silence_is_a_loss_unless_a_proxy_may_hold_what_nobody_can_take(ending: Ending) -> None:
    """A fault that breaks connections is no excuse for being silent on them."""
    attempts = (attempt(1, 11.0, ending, took=3.0), attempt(1, 15.0, Ending.ERROR))
    breaking = one(*attempts, phase=replace(PHASE, breaks=frozenset({"direct"})))
    assert (breaking.lost, breaking.held) == (1, 0)
    held = one(*attempts, phase=replace(PHASE, holds=frozenset({"direct"})))
    assert (held.lost, held.held, held.broken) == (0, 1, 0)


def test_a_broken_connection_is_a_loss_when_no_later_attempt_is_answered() -> None:
    phase = replace(PHASE, breaks=frozenset({"direct"}))
    found = one(
        attempt(1, 11.0, Ending.RESET),
        attempt(1, 12.0, Ending.REFUSED),
        attempt(2, 13.0),
        phase=phase,
    )
    assert (found.lost, found.broken, found.refused) == (1, 1, 1)


def test_a_refused_attempt_that_is_answered_later_is_no_loss() -> None:
    found = one(
        attempt(1, 11.0, Ending.REFUSED), attempt(1, 11.2, Ending.REFUSED), attempt(1, 12.0)
    )
    assert (found.refused, found.lost) == (2, 0)
    assert found.back_s == pytest.approx(2.1)


def test_an_answer_that_is_not_the_requests_is_a_loss() -> None:
    wrong = Attempt(request=1, door="direct", sent=11.0, ended=11.1, ending=Ending.WRONG, told=7)
    found = one(wrong, attempt(2, 12.0))
    assert (found.lost, found.answered) == (1, 1)


def test_an_attempt_belongs_to_the_fault_during_which_it_ended() -> None:
    earlier = Phase(fault="nothing", struck=0.0, until=10.0)
    breaking = replace(PHASE, breaks=frozenset({"direct"}))
    attempts = [attempt(1, 9.9, Ending.RESET, took=0.2), attempt(1, 10.5)]
    before, after = account(attempts, [earlier, breaking], BOUNDS)
    assert (before.lost, before.broken, before.answered) == (0, 0, 0)
    assert (after.lost, after.broken, after.answered) == (0, 1, 1)


def test_a_door_that_never_answers_again_has_not_recovered() -> None:
    found = one(
        attempt(1, 11.0),
        attempt(2, 12.0, Ending.ERROR, door="serve"),
        attempt(3, 18.0),
    )
    assert found.back_s is None
    assert not found.recovered


def test_the_slowest_door_says_when_answers_were_back() -> None:
    found = one(
        attempt(1, 10.1, Ending.ERROR),
        attempt(2, 10.5),
        attempt(3, 10.2, Ending.ERROR, door="serve"),
        attempt(4, 14.0, door="serve"),
    )
    assert found.back_s == pytest.approx(4.1)


def test_a_cluster_that_never_said_it_was_whole_has_not_recovered() -> None:
    assert not one(attempt(1, 11.0), phase=replace(PHASE, whole_s=None)).recovered


def test_an_answer_of_two_versions_is_mixed() -> None:
    found = one(attempt(1, 11.0, versions=(1, 2)), attempt(2, 12.0, versions=(2, 2)))
    assert found.mixed == 1


def test_an_answer_of_the_dead_is_one_that_was_asked_after_the_successor_spoke() -> None:
    old, new = 5, 6
    alive = [
        attempt(1, 10.0, life=old),
        attempt(2, 11.0, life=new),
        # Asked before the successor had spoken: it may have been under way when its process died.
        attempt(3, 11.05, life=old),
    ]
    assert one(*alive).dead == 0
    assert one(*alive, attempt(4, 12.0, life=old)).dead == 1
    assert one(*alive, attempt(4, 12.0, life=old, versions=(2, 2))).dead == 0, "another version"


def test_a_number_that_is_told_again_is_answered_twice() -> None:
    attempts = [attempt(1, 11.0), attempt(2, 12.0), attempt(1, 13.0)]
    assert answered_twice(attempts[:2], 0) == 0
    assert answered_twice(attempts, 0) == 1
    assert answered_twice(attempts, 2) == 3


@given(
    st.lists(
        st.tuples(
            st.integers(1, 6),
            st.floats(10.0, 19.0),
            st.sampled_from(Ending),
            st.sampled_from(["direct", "serve"]),
            st.floats(0.0, 4.0),
        ),
        max_size=30,
    )
)
def test_every_request_of_a_run_is_ended_well_or_lost(
    drawn: list[tuple[int, float, Ending, str, float]],
) -> None:
    """No request can fall out of the books: what did not end well in time is counted as lost."""
    attempts = [
        attempt(number, sent, ending, door=door, took=took)
        for number, sent, ending, door, took in drawn
    ]
    whole = replace(PHASE, until=30.0, breaks=frozenset({"direct", "serve"}))
    found = one(*attempts, phase=whole)
    ended_well = {
        a.request
        for a in attempts
        if a.ending in (Ending.ANSWER, Ending.ERROR) and a.ended - a.sent <= BOUNDS.late_s
    }
    asked = {a.request for a in attempts}
    assert found.lost >= len(asked - ended_well)
    assert found.lost <= len(asked)
