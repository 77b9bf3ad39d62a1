"""Shard actors that come while a table is served, and partitions that go there under traffic.

The controller dies on the way.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from cluster.settling import unbalanced
from tests.e2e import models
from tests.e2e.models import TEXTS
from tests.e2e.running import Cluster, until
from tests.e2e.traffic import Traffic

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


def rebalance(cluster: Cluster, *options: str) -> dict[str, list[str]]:
    printed = cluster.command("rebalance", "--config", str(cluster.config), "--json", *options)
    found: dict[str, list[str]] = json.loads(printed.splitlines()[-1])
    return found


def held(cluster: Cluster) -> dict[str, int]:
    """Actor to the bytes of tables that it says it holds."""
    return {
        name: actor["reserved_bytes"]
        for name, actor in cluster.status()["actors"].items()
        if name.startswith("shard-")
    }


def test_partitions_go_to_actors_that_have_come_while_every_request_is_answered(
    tmp_path: Path,
) -> None:
    models.save_words(tmp_path / "store")
    shape = {"devices": 1, "hosts": 1, "allow_entry_points": ["tests.e2e.*"]}
    cluster = Cluster(tmp_path, "even", shards=1, **shape)
    cluster.declare({"name": "words"})
    try:
        cluster.up("--no-serve")
        (all_of_it,) = held(cluster).values()
        grown = Cluster(tmp_path, "even", shards=3, **shape)
        grown.rest, grown.ray = cluster.rest, cluster.ray
        grown.declare({"name": "words"})
        grown.command("apply", "--config", str(grown.config))
        until("three shards", lambda: len(held(grown)) == 3, 60.0)
        with Traffic(lambda: grown.predict("words", TEXTS)) as traffic:
            told = rebalance(grown, "--dry-run")
            assert [*held(grown).values()].count(0) == 2, "nothing has moved"
            moved = rebalance(grown, "--wait-s", "0")
            assert moved["moves"] == told["moves"] != []
            before = grown.status()
            os.kill(before["pid"], signal.SIGKILL)
            until("another reign", lambda: grown.settled()["term"] > before["term"], 60.0)
            until("even load", lambda: not unbalanced(grown.status()), 60.0)
            until("an answer after that", traffic.answered_since_now(), 60.0)
        assert traffic.statuses.keys() == {200}, traffic.statuses
        answer = {"predictions": models.words_answer(TEXTS)}
        assert all(json.loads(each.text) == answer for each in traffic.outcomes if each.text)
        assert grown.predict("words", TEXTS).json == answer

        # Reports come every few seconds.
        def is_even() -> bool:
            found = held(grown)
            return sum(found.values()) == all_of_it and all(found.values())

        until("each part once, on three actors", is_even, 30.0)
        assert rebalance(grown)["moves"] == []
    finally:
        cluster.down()
