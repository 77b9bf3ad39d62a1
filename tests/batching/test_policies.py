"""Policies by name: what a declaration, a simulation and a bench may ask for."""

from __future__ import annotations

import pytest

from batching import DEFAULT_POLICY, POLICIES, EffSafe, policy_named
from batching.errors import InvalidArgument


@pytest.mark.parametrize("name", POLICIES)
def test_every_call_makes_a_policy_of_its_own(name: str) -> None:
    assert policy_named(name) is not policy_named(name)


def test_the_default_protects_deadlines() -> None:
    assert isinstance(policy_named(DEFAULT_POLICY), EffSafe)


def test_only_a_policy_that_protects_takes_a_guard() -> None:
    assert isinstance(policy_named("effsafe", guard_s=0.01), EffSafe)
    with pytest.raises(InvalidArgument, match="policy 'edf' has no guard"):
        policy_named("edf", guard_s=0.01)


def test_an_unknown_name_is_told_the_known_ones() -> None:
    with pytest.raises(InvalidArgument, match="no policy 'best': effsafe, round-robin, fifo"):
        policy_named("best")
