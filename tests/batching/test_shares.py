"""Who has had more than their share of the device."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batching import Shares
from batching.errors import InvalidArgument


def shares(*owners: str, credit_s: float = 1.0) -> Shares:
    found = Shares(credit_s)
    for owner in owners:
        found.wake(owner)
    return found


def test_an_owner_that_is_ahead_by_more_than_the_credit_is_out_of_share() -> None:
    found = shares("a", "b")
    found.charge("a", 1.0)
    assert found.in_share("a")
    found.charge("a", 0.5)
    assert (found.in_share("a"), found.in_share("b")) == (False, True)


def test_alone_an_owner_is_always_in_share() -> None:
    found = shares("a")
    found.charge("a", 100.0)
    assert found.in_share("a")


def test_weight_is_how_much_more_an_owner_may_use() -> None:
    found = shares("a", "b", credit_s=0.0)
    found.set_weight("a", 3.0)
    found.charge("a", 3.0)
    found.charge("b", 1.0)
    assert found.time_of("a") == found.time_of("b") == 1.0


def test_time_that_was_not_used_is_not_saved_up_beyond_the_credit() -> None:
    found = shares("a")
    found.charge("a", 100.0)
    found.wake("b")
    assert found.time_of("b") == 99.0


def test_after_all_have_slept_the_clock_goes_on_where_it_was() -> None:
    found = shares("a")
    found.charge("a", 50.0)
    found.sleep("a")
    found.wake("b")
    assert found.time_of("b") == 49.0


def test_an_owner_in_several_lanes_sleeps_when_the_last_is_empty() -> None:
    found = shares("a", "a", "b")
    found.charge("b", 5.0)
    found.sleep("a")
    assert not found.in_share("b")
    found.sleep("a")
    assert found.in_share("b")


def test_two_that_come_back_to_a_flood_one_after_the_other_resume_alike() -> None:
    found = shares("flood")
    found.charge("flood", 100.0)
    found.wake("first")
    found.wake("second")
    assert found.time_of("first") == found.time_of("second") == 99.0
    found.charge("flood", 0.1)
    assert [found.in_share(owner) for owner in ("first", "second", "flood")] == [True, True, False]


def test_without_a_set_credit_an_owner_may_be_five_batches_ahead() -> None:
    found = Shares()
    for owner in "ab":
        found.wake(owner)
    for _ in range(6):
        found.ran(0.5)
        found.charge("a", 0.5)
        assert found.in_share("a") == (found.time_of("a") <= 2.5)
    assert not found.in_share("a")


def test_the_credit_follows_what_batches_take() -> None:
    found = Shares()
    found.ran(1.0)
    for _ in range(400):
        found.ran(0.01)
    assert found.credit_s == pytest.approx(0.05, rel=0.1)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.0, 2.0)), max_size=40))
def test_of_those_who_want_the_device_the_least_served_is_in_share(
    charges: list[tuple[str, float]],
) -> None:
    found = shares("a", "b", "c")
    for owner, seconds in charges:
        found.charge(owner, seconds)
    assert found.in_share(min("abc", key=found.time_of))


def test_weights_and_credits_that_mean_nothing_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="must be positive"):
        shares().set_weight("a", 0.0)
    with pytest.raises(InvalidArgument, match="a credit is at least 0"):
        Shares(-1.0)


def test_owners_that_slept_long_are_forgotten_and_resume_where_they_would_have() -> None:
    found = shares("always")
    for number in range(500):
        found.wake(f"m{number}")
        found.charge(f"m{number}", 0.5)
        found.charge("always", 0.5)
        found.sleep(f"m{number}")
    assert len(found._times) < 100
    found.wake("m0")
    assert found.time_of("m0") == found.time_of("always") - 1.0
