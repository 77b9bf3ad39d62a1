"""Servables that refer to the unit of another, in a running cluster."""

from __future__ import annotations

import json
from itertools import groupby
from typing import Any

import pytest

from tests.e2e import models
from tests.e2e.running import Cluster, ask, until
from tests.e2e.traffic import Traffic

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

ROW = [[1.0, 2.0, 3.0, 4.0]]
SERVED_S = 120.0
#: Versions that no other servable of these tests equals: equal units are one.
TRUNK: dict[str, Any] = {
    "name": "trunk", "policy": {"specific": [6, 7]}, "labels": {"stable": 6},
}  # fmt: skip


def test_a_label_takes_along_who_refers_to_it_and_nobody_misses_who_goes(cluster: Cluster) -> None:
    """One refers to the label, one to version 6; neither has a copy of the trunk of its own."""
    for version in (6, 7):
        models.save_mlp(cluster.store, version, "trunk")
    models.save_tenfold(cluster.store, "follows", label="stable")
    models.save_tenfold(cluster.store, "pinned", version=6)
    before = ask(cluster.rest, "/v1/admin/config").json["config"]["servables"]
    declare(cluster, *before, TRUNK, {"name": "follows"}, {"name": "pinned"})
    with (
        Traffic(lambda: cluster.predict("follows", ROW)) as following,
        Traffic(lambda: cluster.predict("pinned", ROW)) as staying,
    ):
        moved = {"label": "stable", "version": 7}
        assert ask(cluster.rest, "/v1/admin/models/trunk:label?wait_s=30", moved).status == 200
        for traffic in (following, staying):
            until("an answer after that", traffic.answered_since_now(), SERVED_S)
        assert users(cluster.status()) == {
            6: ["pinned:1/trunk", "trunk:6/model"], 7: ["follows:1/trunk", "trunk:7/model"],
        }  # fmt: skip
        # Nobody else is touched where one of those who refer goes, nor where the trunk is
        # declared no longer: it goes on for the one that is left.
        declare(cluster, *before, {"name": "pinned"})
        until("it to go", lambda: cluster.predict("follows", ROW).status == 404, SERVED_S)
        until("an answer after that", staying.answered_since_now(), SERVED_S)
        # Routers have left it by then; the unit itself goes a moment later.
        left = {6: ["pinned:1/trunk", "trunk:6/model"]}
        until("the other version to go", lambda: users(cluster.status()) == left, SERVED_S)
        assert cluster.status()["servables"]["trunk"]["needed"] == [6]
    assert staying.failures() == []
    assert versions_of(staying) == [6]
    # Never back and forth: every request is of one epoch, and those come in their order.
    assert versions_of(following) == [6, 7]
    declare(cluster, *before)
    until("the trunk to go", lambda: cluster.predict("trunk", ROW).status == 404, SERVED_S)


def declare(cluster: Cluster, *servables: dict[str, Any]) -> None:
    """Declare these, and wait until they answer."""
    path = "/v1/admin/config?wait_s=60"
    made = ask(cluster.rest, path, {"servables": servables}, method="PUT", timeout_s=90.0)
    assert made.status == 200, made.body


def versions_of(traffic: Traffic) -> list[int]:
    """By way of which versions of the trunk requests were answered, one after the other."""
    answers = {
        version: [[10 * value for value in row] for row in models.mlp_answer(ROW, version)]
        for version in (6, 7)
    }
    told = [json.loads(each.text)["predictions"] for each in traffic.outcomes if each.status == 200]
    numbers = [next(n for n, answer in answers.items() if answer == each) for each in told]
    return [number for number, _ in groupby(numbers)]


def users(status: dict[str, Any]) -> dict[int, list[str]]:
    """Version of the trunk to all who use its one copy, as the status counts them."""
    found: dict[int, list[str]] = {}
    for row in status["shared"]:
        own = [each for each in row["users"] if each.startswith("trunk:")]
        if own:
            assert row["refs"] == len(row["users"])
            assert row["kind"] == "device"
            found[int(own[0].removeprefix("trunk:").partition("/")[0])] = row["users"]
    return found
