"""The books of an actor: for how long a servable is allowed what."""

from __future__ import annotations

from pathlib import Path

import pytest

from batching.allowance import Allowance
from batching.errors import FailedPrecondition, ResourceExhausted
from shards.orders import AllowOrder
from tests.shards.test_hosting import Actor, run


def test_what_a_servable_is_allowed_holds_from_its_first_version_to_its_last(
    tmp_path: Path,
) -> None:
    async def scenario(actor: Actor) -> None:
        await actor.load(1, allowance=Allowance(weight=2.0))
        await actor.load(2, allowance=Allowance(weight=3.0))
        await actor.unload(1)
        assert actor.allowed == [("ranker", 2.0), ("ranker", 3.0)]
        await actor.unload(2)
        assert actor.allowed[2:] == [("ranker", None)]

    run(tmp_path, scenario)


def test_an_order_that_was_carried_out_still_says_what_is_allowed(tmp_path: Path) -> None:
    async def scenario(actor: Actor) -> None:
        await actor.load()
        await actor.load(allowance=Allowance(weight=2.0))
        assert actor.allowed == [("ranker", 1.0), ("ranker", 2.0)]

    run(tmp_path, scenario)


def test_an_allowance_changes_without_a_load_and_not_by_who_was_succeeded(tmp_path: Path) -> None:
    async def scenario(actor: Actor) -> None:
        allow = AllowOrder(term=2, servable="ranker", allowance=Allowance(weight=5.0))
        actor.books.allow(allow)
        assert actor.allowed == [], "nothing of it is loaded"
        await actor.load(term=2)
        before = list(actor.opener.log)
        actor.books.allow(allow)
        assert actor.allowed == [("ranker", 1.0), ("ranker", 5.0)]
        assert actor.opener.log == before
        with pytest.raises(FailedPrecondition, match="term 1"):
            actor.books.allow(AllowOrder(term=1, servable="ranker", allowance=Allowance()))

    run(tmp_path, scenario)


def test_what_failed_to_load_is_allowed_nothing(tmp_path: Path) -> None:
    async def scenario(actor: Actor) -> None:
        with pytest.raises(ResourceExhausted):
            await actor.load()
        assert actor.allowed == []

    run(tmp_path, scenario, capacity_bytes=1)
